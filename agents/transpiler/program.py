"""`AgentTranspiler` and `Program`: a compiled graph as a `dspy.Module`."""

import asyncio
import contextvars
import threading
from collections.abc import Sequence
from typing import Any, Generic, Self, TypeVar, overload

import dspy
from pydantic import BaseModel

from agentcast.agents.context import current
from agentcast.agents.graph import Graph
from agentcast.agents.graph.checking import is_sound
from agentcast.agents.graph.drawing import described, mermaid
from agentcast.agents.transpiler.asking import module_of
from agentcast.agents.transpiler.attempts import ErrorFormatter, default_formatter
from agentcast.agents.transpiler.plan import Plan, plan_of
from agentcast.agents.transpiler.play import Play
from agentcast.agents.transpiler.streaming import ProgramStream, stream_program

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class Program(dspy.Module, Generic[T]):  # type: ignore[misc]  # dspy is untyped
    """A compiled graph. `steps` are the modules of its nodes, by the nodes' names: what optimizers tune is what runs.

    Any number of runs may go on at once.
    """

    def __init__(self, plan: Plan, steps: dict[str, Any]) -> None:
        super().__init__()
        self.steps = steps
        self._plan = plan

    # -- Running ---------------------------------------------------------------------------------------------------

    async def aforward(self, **inputs: Any) -> T:
        """Run the graph; the result is an instance of `output_model`, or without one a `dspy.Prediction`.

        :raises ValueError: an input is missing or wrong (`pydantic.ValidationError`), or there is none of that name.
        :raises Exception: what a node raised, as it is, with the attribute `node`; `OutputError` if its output stayed
            wrong, `StepLimitError`, `NodeTimeout` and others of `agentcast.agents.graph.errors`.
        """
        callers = dspy.settings.caller_modules or [None]
        if callers[-1] is not self:  # called by its own name: take the way that callbacks and usage tracking are on
            return await self.acall(**inputs)
        result: T = self._handed_over(await Play(self._plan, self.steps, inputs).run())
        return result

    async def acall(self, **inputs: Any) -> T:
        """As `aforward`."""
        result: T = await super().acall(**inputs)
        return result

    def forward(self, **inputs: Any) -> T:
        """As `aforward`, from synchronous code. In a thread whose event loop runs, that loop waits."""
        result: T = self._handed_over(_run(lambda: Play(self._plan, self.steps, inputs).run()))
        return result

    def __call__(self, **inputs: Any) -> T:
        """As `forward`."""
        result: T = super().__call__(**inputs)
        return result

    def astream(self, **inputs: Any) -> ProgramStream[T]:
        """The events of a run as dicts, see docs/graphs.md; the last one is `finished`, or `error`, after which the
        exception is raised. The run starts with the first event that is asked for, and is cancelled when the stream is
        closed or dropped."""
        return stream_program(self, inputs)

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
        """`result`, save to `dspy.streamify` itself, which never ends without a prediction."""
        settings = dspy.settings
        if settings.send_stream is None or current().observer is not None or settings.caller_modules != [self]:
            return result
        return result if isinstance(result, dspy.Prediction) else dspy.Prediction(**dict(result))

    def _set_lm_usage(self, tokens: dict[str, Any], output: Any) -> None:
        """A typed result has no place for it; `dspy.track_usage()` around the call tells it in any case."""
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
        steps, problems = _steps(graph)
        return Program(plan_of(graph, output_model, error_formatter or default_formatter, problems), steps)


def _steps(graph: Graph) -> tuple[dict[str, Any], list[str]]:
    """The modules of the nodes that are sound, and why some cannot be made."""
    steps, problems = {}, []
    for node in filter(is_sound, graph.nodes):
        try:
            module = module_of(node)
        except Exception as error:  # noqa: BLE001 -- DSPy raises what it likes for fields and tools it cannot use
            problems.append(f"node {node.name!r}: {error}")
        else:
            if module is not None:
                steps[node.name] = module
    return steps, problems


def _run(play: Any) -> Any:
    if not _is_in_loop():
        return asyncio.run(play())
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((asyncio.run(play()), None))
        except BaseException as error:  # noqa: BLE001 -- raised again below
            outcome.extend((None, error))

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    thread.start()
    thread.join()
    value, error = outcome
    if error is not None:
        raise error
    return value


def _is_in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
