"""One run of a graph: each node in a task of its own, as soon as the flow lets it start."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import anyio
import dspy
from pydantic import BaseModel, ValidationError

from agentcast.agents.base import public_message
from agentcast.agents.graph.building import Route, StatefulNode
from agentcast.agents.graph.detaching import detached
from agentcast.agents.graph.errors import (
    InputError,
    NodeCancelled,
    NodeTimeout,
    ResultError,
    RouteError,
    StepLimitError,
    carry,
    limit_text,
)
from agentcast.agents.graph.flow import Flow, Step
from agentcast.agents.graph.state import State, View
from agentcast.agents.streaming import NodeSpan, node_span, replace_methods, tell_step_limit, wait_for_room
from agentcast.agents.threads import unblocking
from agentcast.agents.transpiler.asking import asker, parts_of, retries_of
from agentcast.agents.transpiler.attempts import settle
from agentcast.agents.transpiler.plan import Plan
from agentcast.agents.values import cut_text, plain


class Play:
    """One run of the graph of `plan`, its work done by `modules` (node → module)."""

    def __init__(self, plan: Plan, modules: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        self._plan = plan
        self._modules = modules
        self._flow = Flow(plan.shape)
        self._state = State(plan.reducers, _checked_inputs(plan, inputs))
        self._failure: BaseException | None = None
        self._set: set[str] = set()
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
        return self._result()

    def _start(self, steps: Iterable[Step]) -> None:
        for step in steps:
            self._group.start_soon(self._step, step, name=f"node {step.node}")
        if self._flow.limited and not self._limited:
            self._limited = True
            limit = self._plan.shape.max_steps
            tell_step_limit(limit, limit_text(limit))
            if self._plan.graph.on_loop_limit == "raise":
                raise StepLimitError(limit)

    async def _step(self, step: Step) -> None:
        """Run a node and what follows. Nothing is raised but cancellation, so that the first failure stays itself."""
        node = self._plan.nodes[step.node]
        try:
            patch = await self._run_node(node, step)
            self._set.update(patch)
            targets = await self._targets(node, step, patch)
            self._start(self._flow.finish(step, targets))
        except (anyio.get_cancelled_exc_class(), GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 -- raised by `run`
            carry(error, node.name)
            self._failure = self._failure or error
            self._group.cancel_scope.cancel()

    # -- A node ----------------------------------------------------------------------------------------------------

    async def _run_node(self, node: StatefulNode, step: Step) -> dict[str, Any]:
        await wait_for_room()
        values = self._state.values(list(node.input_model.model_fields), step.past)
        module = self._modules.get(node.name)
        with node_span(node.name, lambda: self._shown(values), parts_of(node, module)) as span:
            with anyio.move_on_after(node.timeout) as scope, _stopped_by_nobody_else(node.name):
                output = await self._work(node, module, values, span)
            if scope.cancelled_caught:
                raise NodeTimeout(node.name, node.timeout or 0)
            patch = self._patch(output, step)
            self._state.set(step, patch)
            span.end(lambda: self._shown(self._state.values(list(patch))))
        return patch

    async def _work(self, node: StatefulNode, module: Any, values: Mapping[str, Any], span: NodeSpan) -> BaseModel:
        given = _checked_input(node, values)
        ask = await asker(node, module, given)
        return await settle(node, ask, span, self._plan.formatter, retries_of(node))

    def _patch(self, output: BaseModel, step: Step) -> dict[str, Any]:
        """The fields that were returned; and defaults, where the state has nothing yet."""
        return {
            name: getattr(output, name)
            for name in type(output).model_fields
            if name in output.model_fields_set or not self._state.has(name, step.past)
        }

    def _shown(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` as events show them. Values of the state never change, so each is looked at but once."""
        for value in values.values():
            if id(value) not in self._plain:
                self._plain[id(value)] = value, plain(value)  # kept, so that no other value gets its id
        return {name: self._plain[id(value)][1] for name, value in values.items()}

    # -- What follows ----------------------------------------------------------------------------------------------

    async def _targets(self, node: StatefulNode, step: Step, patch: Mapping[str, Any]) -> list[str]:
        targets = list(self._plan.shape.edges[node.name])
        for route in self._plan.shape.routes[node.name]:
            with _stopped_by_nobody_else(node.name):
                choice = await self._choose(route, step) if route.choose else self._decision(route, step, patch)
            targets += _looked_up(route, choice)
        return targets

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


@contextmanager
def _stopped_by_nobody_else(node: str) -> Iterator[None]:
    """A task that ends with a cancellation ends without a word, so one that did not come from outside is made an error:
    else the run would go on to its end as if the node had done its work."""
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
    return {name: getattr(checked, name) for name in model.model_fields}


def _checked_input(node: StatefulNode, values: Mapping[str, Any]) -> BaseModel:
    try:
        return node.input_model.model_validate(detached(dict(values)), by_name=True)
    except ValidationError as error:
        raise InputError(node.name, f"its input is wrong: {public_message(error)}") from error


def _looked_up(route: Route, choice: Any) -> Iterator[str]:
    for key in choice if isinstance(choice, list | tuple | set) else [choice]:
        try:
            yield route.path_map[key]
        except (KeyError, TypeError):
            known = ", ".join(map(_named, route.path_map))
            raise RouteError(route.source, f"its router chose {_named(key)}, which is none of {known}") from None


def _named(key: Any) -> str:
    """Clients are told of it, so not by the `repr` of whatever it is (G9)."""
    return cut_text(repr(plain(key)), 200)
