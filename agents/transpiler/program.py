"""`AgentTranspiler` and `Program`: a compiled graph as a `dspy.Module`, and the stream of its events."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, overload

import dspy
from pydantic import BaseModel

from agentcast.agents.context import current
from agentcast.agents.failures import failure_of
from agentcast.agents.graph import Graph, GraphError
from agentcast.agents.graph.building import OnLoopLimit
from agentcast.agents.graph.checking import declared_inputs, is_sound, problems, program_inputs, reducers
from agentcast.agents.graph.drawing import described, mermaid
from agentcast.agents.graph.flow import Shape
from agentcast.agents.streaming import Stream, run_program
from agentcast.agents.threads import run_to_end
from agentcast.agents.transpiler.prompts import load_prompts, save_prompts
from agentcast.agents.transpiler.running import GraphRun, Plan, RunMetadata, metadata_of
from agentcast.agents.transpiler.steps import ErrorFormatter, default_formatter, module_of

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

Item = dict[str, Any]


class Program(dspy.Module, Generic[T]):  # type: ignore[misc]  # dspy is untyped
    """A compiled graph. `steps` are the modules of its nodes, by the nodes' names: what optimizers tune is what runs.

    Any number of runs may go on at once. In an agent function, too, the events of its nodes are the run's.
    """

    def __init__(self, plan: Plan, steps: dict[str, Any]) -> None:
        super().__init__()
        self.steps = steps
        self._plan = plan

    # -- Running ---------------------------------------------------------------------------------------------------

    async def aforward(
        self,
        *,
        max_retries: int | None = None,
        max_steps: int | None = None,
        on_loop_limit: OnLoopLimit | None = None,
        **inputs: Any,
    ) -> T:
        """Run the graph; the result is an instance of `output_model`, or without one a `dspy.Prediction`.

        `max_retries` is of nodes that ask a language model and do not set their own; `max_steps` and `on_loop_limit`
        are the graph's unless given.

        :raises ValueError: an input is missing or wrong (`pydantic.ValidationError`), there is none of that name, or an
            option is out of range.
        :raises Exception: what a node raised, as it is, with the attribute `node`; `OutputError` if its output stayed
            wrong, `StepLimitError`, `NodeTimeout` and others of `agentcast.agents.graph.errors`.
        """
        options = _given(max_retries=max_retries, max_steps=max_steps, on_loop_limit=on_loop_limit)
        callers = dspy.settings.caller_modules or [None]
        # Called by its own name, it takes the way that callbacks and usage tracking are on.
        call = self._run(options, inputs) if callers[-1] is self else self.acall(**options, **inputs)
        result: T = await call
        return result

    async def acall(self, **inputs: Any) -> T:
        """As `aforward`."""
        result: T = await call_observed(self, inputs) if is_unobserved() else await super().acall(**inputs)
        return result

    def forward(
        self,
        *,
        max_retries: int | None = None,
        max_steps: int | None = None,
        on_loop_limit: OnLoopLimit | None = None,
        **inputs: Any,
    ) -> T:
        """As `aforward`, from synchronous code. In a thread whose event loop runs, that loop waits."""
        options = _given(max_retries=max_retries, max_steps=max_steps, on_loop_limit=on_loop_limit)
        call = call_observed(self, {**options, **inputs}) if is_unobserved() else self._run(options, inputs)
        result: T = run_to_end(lambda: call)
        return result

    def __call__(self, **inputs: Any) -> T:
        """As `forward`."""
        result: T = run_to_end(lambda: call_observed(self, inputs)) if is_unobserved() else super().__call__(**inputs)
        return result

    def astream(
        self,
        *,
        max_retries: int | None = None,
        max_steps: int | None = None,
        on_loop_limit: OnLoopLimit | None = None,
        **inputs: Any,
    ) -> "ProgramStream[T]":
        """The events of a run as dicts, see docs/graphs.md; the last one is `finished`, or `error`, after which the
        exception is raised. The run starts with the first event that is asked for, and is cancelled when the stream is
        closed or dropped."""
        options = _given(max_retries=max_retries, max_steps=max_steps, on_loop_limit=on_loop_limit)
        return ProgramStream(
            functools.partial(_emitting, self, {**options, **inputs}), type(self).__name__, threaded=False
        )

    @staticmethod
    def metadata(result: Any) -> RunMetadata:
        """The steps and retries of the run that returned `result`. A copy of a result has them, too; what is made of
        its fields has not.

        :raises ValueError: `result` is no result of a graph.
        """
        return metadata_of(result)

    async def _run(self, options: Mapping[str, Any], inputs: Mapping[str, Any]) -> T:
        result: T = self._handed_over(await GraphRun(self._plan, self.steps, inputs, options).run())
        return result

    # -- What it is ------------------------------------------------------------------------------------------------

    @property
    def graph(self) -> Graph:
        return self._plan.graph

    @property
    def input_model(self) -> type[BaseModel]:
        return self._plan.input_model

    @property
    def output_model(self) -> type[BaseModel] | None:
        return self._plan.output_model

    @property
    def tools(self) -> Sequence[Any]:
        """The tools of all nodes, those of programs inside among them."""
        found = [tool for node in self.graph.nodes for tool in node.tools]
        for step in self.steps.values():
            if isinstance(step, Program):
                found += step.tools
        return found

    def describe(self) -> dict[str, Any]:
        """The graph as data: its nodes, edges and entry."""
        return described(self.graph)

    def mermaid(self) -> str:
        """The graph as a Mermaid flowchart."""
        return mermaid(self.graph)

    # -- Prompts ---------------------------------------------------------------------------------------------------

    def save_prompts(self, path: str | Path) -> None:
        """Write the instructions and demos of the nodes' predictors to a JSON file.

        :raises ValueError: a demo has a value that JSON cannot hold; nothing is written.
        """
        save_prompts(self.steps, path)

    def load_prompts(self, path: str | Path) -> None:
        """Take the instructions and demos from a file that `save_prompts` wrote. Nothing else of the program changes.

        :raises ValueError: the file is of another graph, or none of prompts; nothing changes.
        """
        load_prompts(self.steps, path)

    # -- DSPy ------------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: Any) -> Self:
        """A program with modules of its own for the same graph, as optimizers want it."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.steps = {name: step.deepcopy() for name, step in self.steps.items()}
        new.callbacks, new.history = list(self.callbacks), []
        memo[id(self)] = new
        return new

    def _handed_over(self, result: Any) -> Any:
        """`result`; for DSPy's own `dspy.streamify`, which never ends without a prediction, one made of it."""
        settings = dspy.settings
        if settings.send_stream is None or current().observer is not None or settings.caller_modules != [self]:
            return result
        return result if isinstance(result, dspy.Prediction) else dspy.Prediction(**dict(result))

    def _set_lm_usage(self, tokens: dict[str, Any], output: Any) -> None:
        """A typed result has no place for it; `dspy.track_usage()` around the call has it in any case."""
        if self.output_model is None:
            super()._set_lm_usage(tokens, output)


class AgentTranspiler:
    """Makes programs of graphs."""

    @overload
    @staticmethod
    def compile(graph: Graph, output_model: type[M], error_formatter: ErrorFormatter | None = None) -> "Program[M]": ...

    @overload
    @staticmethod
    def compile(
        graph: Graph, output_model: None = None, error_formatter: ErrorFormatter | None = None
    ) -> "Program[Any]": ...

    @staticmethod
    def compile(
        graph: Graph, output_model: type[BaseModel] | None = None, error_formatter: ErrorFormatter | None = None
    ) -> "Program[Any]":
        """The program of `graph`. Its result is an `output_model`, made of the state at the end, or without one a
        `dspy.Prediction` of all fields that nodes have set. `error_formatter` says what is wrong with a node's output,
        given the `pydantic.ValidationError`; by default field and reason, without the value.

        :raises GraphError: the graph cannot run; it names every reason.
        """
        return Program(*compiled(graph, output_model, error_formatter))


def compiled(
    graph: Graph, output_model: type[BaseModel] | None, error_formatter: ErrorFormatter | None = None
) -> tuple[Plan, dict[str, Any]]:
    """What a `Program` is made of.

    :raises GraphError: the graph cannot run; it names every reason.
    """
    graph = graph.copy()
    steps, unusable = _steps(graph)
    found = [*problems(graph, output_model), *unusable]
    declared, taken = declared_inputs(graph), program_inputs(graph)
    if found or declared is None or taken is None:
        raise GraphError(found)
    plan = Plan(
        graph=graph,
        shape=Shape(graph),
        nodes={node.name: node for node in graph.nodes},
        reducers=reducers(graph),
        input_model=taken,
        always_set=frozenset(declared.model_fields),
        output_model=output_model,
        formatter=error_formatter or default_formatter,
    )
    return plan, steps


def _steps(graph: Graph) -> tuple[dict[str, Any], list[str]]:
    """The modules of the nodes that are sound, and why some cannot be made."""
    steps, unusable = {}, []
    for node in filter(is_sound, graph.nodes):
        try:
            module = module_of(node)
        except Exception as error:  # noqa: BLE001 -- DSPy raises anything for fields and tools that it cannot use
            unusable.append(f"node {node.name!r}: {error}")
        else:
            if module is not None:
                steps[node.name] = module
    return steps, unusable


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


# -- Events --------------------------------------------------------------------------------------------------------


class ProgramStream(Stream[Item], Generic[T]):
    """The events of one run, then `{"event": "finished", "prediction": T, "metadata": …}`; or `{"event": "error", …}`,
    and then the exception itself."""

    _error: Exception | None = None

    async def __anext__(self) -> Item:
        if self._error is not None and not self._items:
            error, self._error = self._error, None
            raise error
        item: Any = await super().__anext__()
        return item if isinstance(item, dict) else _plain(item)

    def _settle(self, value: Any) -> None:
        result = value.prediction
        self._items.append({"event": "finished", "prediction": result, "metadata": asdict(metadata_of(result))})

    def _finish(self, run: Any) -> None:
        try:
            super()._finish(run)
        except Exception as error:  # noqa: BLE001 -- raised once the event was taken
            self._error = error
            node = getattr(error, "node", None)
            named = {"node": node} if isinstance(node, str) else {}
            self._items.append({"event": "error", **named, "error": failure_of(error).message})


async def _emitting(program: Any, inputs: Mapping[str, Any], channel: Any) -> Any:
    return await run_program(program, inputs, channel, root=False)


def _plain(event: Any) -> Item:
    """As on the wire, but with lists where JSON has them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in event.wire().items()}


# -- Calls -----------------------------------------------------------------------------------------------------------


def is_unobserved() -> bool:
    """Whether the calling code is in the run of an agent function, where nothing observes what programs do."""
    return current().observer is None and current().emitter is not None


async def call_observed(program: Any, inputs: Mapping[str, Any]) -> Any:
    """What `program` returns; its events are emitted in the run of the agent function that calls it."""
    emitter = current().emitter
    assert emitter is not None  # noqa: S101 -- see is_unobserved
    return (await run_program(program, inputs, emitter, root=False)).prediction
