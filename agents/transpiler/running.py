"""One run of a graph: each node in a task of its own, as soon as the flow lets it start."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import dspy
from pydantic import BaseModel, ValidationError

from agentcast.agents.base import public_message
from agentcast.agents.context import emit_event, wait_for_room
from agentcast.agents.events import StepLimit
from agentcast.agents.graph import Graph, StatefulNode
from agentcast.agents.graph.building import OnLoopLimit, Reducer, Route
from agentcast.agents.graph.checking import option_problems
from agentcast.agents.graph.errors import (
    InputError,
    NodeCancelled,
    NodeTimeout,
    ResultError,
    StepLimitError,
    limit_text,
    name_node,
)
from agentcast.agents.graph.flow import Flow, Shape, Step, targets
from agentcast.agents.graph.state import State, View, detached
from agentcast.agents.streaming import NodeSpan, node_span, replace_methods
from agentcast.agents.threads import unblocking
from agentcast.agents.transpiler.steps import ErrorFormatter, accepted_output, attempts_of, parts_of, retries_of
from agentcast.agents.values import plain


@dataclass(frozen=True)
class Plan:
    """What all runs of one compiled graph share: read-only, and without the modules that do the work, which belong to
    the program and may be tuned or replaced."""

    graph: Graph
    shape: Shape
    nodes: Mapping[str, StatefulNode]
    reducers: Mapping[str, Reducer]
    input_model: type[BaseModel]
    always_set: frozenset[str]
    """The inputs that are in the state even if only their default is known; others only if they are given."""
    output_model: type[BaseModel] | None
    formatter: ErrorFormatter


@dataclass(frozen=True, slots=True)
class Options:
    """How one call runs the graph.

    :raises ValueError: one is out of range.
    """

    max_retries: int | None
    """Of nodes that ask a language model and do not set their own; None: the default."""
    max_steps: int
    on_loop_limit: OnLoopLimit

    def __post_init__(self) -> None:
        retries = 0 if self.max_retries is None else self.max_retries
        problems = list(option_problems(retries, self.max_steps, self.on_loop_limit))
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True, slots=True)
class RunMetadata:
    """What a run took: `steps` are the nodes that it ran, `retries` how often an output was asked for again; of this
    program's own nodes, not of those of programs inside it."""

    steps: int
    retries: int


class GraphRun:
    """One run of the graph of `plan`, its work done by `modules` (node → module)."""

    def __init__(
        self, plan: Plan, modules: Mapping[str, Any], inputs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        graph = plan.graph
        given = {"max_retries": None, "max_steps": graph.max_steps, "on_loop_limit": graph.on_loop_limit, **options}
        self._options = Options(**given)
        self._plan = plan
        self._modules = modules
        self._flow = Flow(plan.shape, self._options.max_steps)
        self._state = State(plan.reducers, _checked_inputs(plan, inputs))
        self._failure: BaseException | None = None
        self._set: set[str] = set()
        self._retries = 0
        self._limited = False
        self._plain: dict[int, tuple[Any, Any]] = {}

    async def run(self) -> Any:
        """The program's result.

        :raises Exception: what the first node to fail raised, as it is; the others are cancelled.
        """
        replace_methods()
        async with anyio.create_task_group() as group:
            self._group = group
            self._start(self._flow.begin())
        if self._failure is not None:
            raise self._failure
        result = self._result()
        vars(result)[_METADATA] = RunMetadata(self._flow.started, self._retries)
        return result

    def _start(self, steps: Iterable[Step]) -> None:
        for step in steps:
            self._group.start_soon(self._step, step, name=f"node {step.node}")
        if self._flow.limited and not self._limited:
            self._limited = True
            limit = self._options.max_steps
            emit_event(StepLimit(max_steps=limit, message=limit_text(limit)))
            if self._options.on_loop_limit == "raise":
                raise StepLimitError(limit)

    async def _step(self, step: Step) -> None:
        """Run a node and what follows. Nothing is raised but cancellation, so that the first failure stays itself."""
        node = self._plan.nodes[step.node]
        try:
            patch = await self._run_node(node, step)
            self._set.update(patch)
            following = await self._targets(node, step, patch)
            self._start(self._flow.finish(step, following))
        except (anyio.get_cancelled_exc_class(), GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 -- raised by `run`
            name_node(error, node.name)
            self._failure = self._failure or error
            self._group.cancel_scope.cancel()

    # -- A node ----------------------------------------------------------------------------------------------------

    async def _run_node(self, node: StatefulNode, step: Step) -> dict[str, Any]:
        await wait_for_room()
        values = self._state.values(list(node.input_model.model_fields), step.past)
        module = self._modules.get(node.name)
        with node_span(node.name, lambda: self._shown(values), parts_of(node, module)) as span:
            with anyio.move_on_after(node.timeout) as scope, _cancelled_from_outside(node.name):
                output = await self._work(node, module, values, span)
            if scope.cancelled_caught:
                raise NodeTimeout(node.name, node.timeout or 0)
            patch = self._patch(output, step)
            self._state.set(step, patch)
            span.end(lambda: self._shown(self._state.values(list(patch))))
        return patch

    async def _work(self, node: StatefulNode, module: Any, values: Mapping[str, Any], span: NodeSpan) -> BaseModel:
        attempt = await attempts_of(node, module, _checked_input(node, values))
        retries = retries_of(node, self._options.max_retries)
        output, failed = await accepted_output(node, attempt, span, self._plan.formatter, retries)
        self._retries += failed
        return output

    def _patch(self, output: BaseModel, step: Step) -> dict[str, Any]:
        """The fields that were returned; and defaults, where the state has nothing yet."""
        return {
            name: getattr(output, name)
            for name in type(output).model_fields
            if name in output.model_fields_set or not self._state.has(name, step.past)
        }

    def _shown(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` as events show them. Values of the state never change, so each is converted only once."""
        for value in values.values():
            if id(value) not in self._plain:
                self._plain[id(value)] = value, plain(value)  # kept, so that no other value gets its id
        return {name: self._plain[id(value)][1] for name, value in values.items()}

    # -- What follows ----------------------------------------------------------------------------------------------

    async def _targets(self, node: StatefulNode, step: Step, patch: Mapping[str, Any]) -> list[str]:
        found = list(self._plan.shape.edges[node.name])
        for route in self._plan.shape.routes[node.name]:
            with _cancelled_from_outside(node.name):
                choice = await self._choose(route, step) if route.choose else self._decision(route, step, patch)
            found += targets(route, choice)
        return found

    def _decision(self, route: Route, step: Step, patch: Mapping[str, Any]) -> Any:
        """A default that was not returned is none if the field has had a value before."""
        name = route.decision
        return patch[name] if name in patch else self._state.value(name, step.sight)

    async def _choose(self, route: Route, step: Step) -> Any:
        assert route.choose is not None  # noqa: S101
        view = View(self._state.values(sight=step.sight))
        return await unblocking(route.choose, f"router of {route.source}")(view)

    # -- The end ---------------------------------------------------------------------------------------------------

    def _result(self) -> Any:
        model = self._plan.output_model
        if model is None:
            return dspy.Prediction(**self._state.values(sorted(self._set)))
        values = self._state.values(list(model.model_fields))
        try:
            return model.model_validate(values, by_name=True)
        except ValidationError as error:
            raise ResultError(f"the result is no {model.__name__}: {public_message(error)}") from error


_METADATA = "_agentcast_metadata"
"""Where a result keeps its `RunMetadata`: beside its fields, as `functools.cached_property` does, so that it is neither
compared, nor validated, nor dumped."""


def metadata_of(result: Any) -> RunMetadata:
    """:raises ValueError: `result` is no result of a graph."""
    found = getattr(result, "__dict__", {}).get(_METADATA)
    if not isinstance(found, RunMetadata):
        raise ValueError(f"a {type(result).__name__} that no program of a graph has returned has no metadata")
    return found


@contextmanager
def _cancelled_from_outside(node: str) -> Iterator[None]:
    """A cancelled task ends silently. If the run itself is not being cancelled, the cancellation becomes an error: else
    the run would go on to its end as if the node had done its work.

    :raises NodeCancelled: something inside was cancelled by other code.
    """
    try:
        yield
    except anyio.get_cancelled_exc_class() as error:
        if anyio.current_effective_deadline() == -math.inf:
            raise
        raise NodeCancelled(node) from error


def _checked_inputs(plan: Plan, inputs: Mapping[str, Any]) -> dict[str, Any]:
    model = plan.input_model
    unknown = [name for name in inputs if name not in model.model_fields]
    if unknown:
        known = ", ".join(model.model_fields) or "nothing"
        raise ValueError(f"the program takes no {', '.join(map(repr, unknown))}; it takes {known}")
    checked = model.model_validate(detached(dict(inputs)), by_name=True)
    return {name: getattr(checked, name) for name in model.model_fields if name in plan.always_set or name in inputs}


def _checked_input(node: StatefulNode, values: Mapping[str, Any]) -> BaseModel:
    try:
        return node.input_model.model_validate(detached(dict(values)), by_name=True)
    except ValidationError as error:
        raise InputError(node.name, f"its input is wrong: {public_message(error)}") from error
