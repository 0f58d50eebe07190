"""The run that code is part of: one context, right for each call, in each thread, and gone when the call is over."""

import dataclasses
import random
from typing import Any

import dspy
import pytest

from agentcast.agents.base import Emitter, Task
from agentcast.agents.context import RunContext, current, status, within
from agentcast.agents.events import AgentEvent, NodeStart, Status, ToolEnd, ToolStart
from agentcast.agents.llm import Retrying
from agentcast.agents.registry import Registry
from agentcast.agents.streaming import run_program, streamify
from tests.support.lms import chat, lm_of

pytestmark = pytest.mark.anyio


class Heard:
    def __init__(self) -> None:
        self.events: list[AgentEvent] = []

    async def send(self, event: AgentEvent) -> None:
        self.events.append(event)

    def nowait(self, event: AgentEvent) -> None:
        self.events.append(event)

    def span_of(self, name: str) -> str:
        starts = [event for event in self.events if isinstance(event, NodeStart | ToolStart)]
        return next(start.span for start in starts if name in (getattr(start, "node", ""), getattr(start, "tool", "")))

    @property
    def statuses(self) -> dict[str, str | None]:
        return {event.message: event.span for event in self.events if isinstance(event, Status)}


def test_outside_of_a_run_there_is_none_and_a_status_goes_nowhere():
    assert not current()
    assert current() == RunContext()
    status("nobody hears this")
    with within(retrying=Retrying(attempts=1)):
        assert not current()  # how calls are retried may be set without a run


def test_it_cannot_be_changed_only_replaced_for_what_is_called():
    heard = Heard()
    with within(emitter=heard), pytest.raises(dataclasses.FrozenInstanceError):
        current().emitter = None  # type: ignore[misc]
    with within(emitter=heard):
        with within(span="7"):
            status("inside")
        status("outside")
    assert heard.statuses == {"inside": "7", "outside": None}
    assert not current()


async def test_all_of_it_is_one_setting_of_dspys():
    keys: list[Any] = []
    registry = Registry()

    @registry.agent
    async def look() -> None:
        keys.extend(key for key in dspy.settings.config if "agentcast" in key)
        assert current().task is not None

    agent = registry["look"]
    await agent.run(Task(run="r", input=agent.spec.input_model()), Heard())
    assert keys == ["agentcast"]


class Looking(dspy.Module):  # type: ignore[misc]
    """Calls a tool, in this thread or in others."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.tool = dspy.Tool(lambda: status(f"in {name}"), name=name, args={})

    def forward(self) -> Any:
        return dspy.Prediction(done=self.tool())


class Spread(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Looking("one"), Looking("two")

    def forward(self) -> Any:
        dspy.Parallel(num_threads=2, disable_progress_bar=True)([(self.first, {}), (self.second, {})])
        status("after")
        return dspy.Prediction(done=True)


async def test_it_reaches_the_threads_of_parallel_calls_and_each_knows_its_span():
    heard = Heard()
    with dspy.context(lm=lm_of(lambda _: chat(answer="x"))):
        await run_program(Spread(), {}, heard)
    expected = {"in one": heard.span_of("one"), "in two": heard.span_of("two"), "after": heard.span_of("Spread")}
    assert heard.statuses == expected


class Nested(dspy.Module):  # type: ignore[misc]
    """Streams another program inside its own run."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dspy.ChainOfThought("question -> answer")
        self.seen: list[Any] = []

    async def aforward(self) -> Any:
        status("before")
        self.seen.append(current())
        await self.stream()
        status("after")
        self.seen.append(current())
        return dspy.Prediction(done=True)

    async def stream(self) -> None:
        async for _ in streamify(self.inner, is_async_program=True)(question="?"):
            pass


class NestedRun(Nested):
    async def stream(self) -> None:
        await run_program(self.inner, {"question": "?"}, Heard())


class Called(Nested):
    """Its calls are seen by two runs at once, of which the outer one enters, and leaves, first."""

    async def aforward(self) -> Any:
        await run_program(Twice(self), {}, Heard())
        status("after")
        return dspy.Prediction(done=True)


class Twice(dspy.Module):  # type: ignore[misc]
    def __init__(self, outer: Called) -> None:
        super().__init__()
        self.ask = dspy.Predict("question -> answer")
        self.seen = outer.seen

    async def aforward(self) -> Any:
        self.seen.append(current())
        await self.ask.acall(question="?")
        self.seen.append(current())
        return dspy.Prediction(done=True)


@pytest.mark.parametrize("kind", [Nested, NestedRun, Called])
async def test_after_a_run_inside_a_run_all_is_as_before(kind: type[Nested]):
    heard, program = Heard(), kind()
    with dspy.context(lm=lm_of(lambda _: chat(reasoning="r", answer="x"))):
        await run_program(program, {}, heard)
    before, after = program.seen
    assert after == before
    assert set(heard.statuses.values()) == {heard.span_of(kind.__name__)}
    assert not current()


class Fails(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.tool = dspy.Tool(self.fail, name="fail", args={})

    def fail(self) -> None:
        raise ValueError("broken")

    async def aforward(self) -> Any:
        before = current()
        with pytest.raises(ValueError, match="broken"):
            await self.tool.acall()
        assert current() == before
        status("after")
        return dspy.Prediction(done=True)


async def test_a_call_that_fails_leaves_nothing_behind():
    heard = Heard()
    await run_program(Fails(), {}, heard)
    assert heard.statuses == {"after": heard.span_of("Fails")}


class Seeds(dspy.Module):  # type: ignore[misc]
    """Wants the same random numbers each time."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = dspy.Tool(self.seed, name="outer", args={}), dspy.Tool(int, name="inner", args={})
        self.drawn = 0.0

    async def seed(self) -> None:
        random.seed(7)
        await self.inner.acall()
        self.drawn = random.random()

    async def aforward(self) -> Any:
        random.seed(7)
        await self.outer.acall()
        return dspy.Prediction(done=True)


async def test_a_program_that_seeds_random_numbers_gets_them_and_mixes_up_no_calls():
    heard, program = Heard(), Seeds()
    await run_program(program, {}, heard)
    assert program.drawn == random.Random(7).random()
    starts = [event.span for event in heard.events if isinstance(event, ToolStart)]
    assert [event.span for event in heard.events if isinstance(event, ToolEnd)] == starts[::-1]


async def test_a_program_that_runs_inside_a_span_of_the_run_is_below_it():
    heard = Heard()
    with dspy.context(lm=lm_of(lambda _: chat(answer="x"))), within(emitter=heard, span="5"):
        await run_program(dspy.Predict("question -> answer"), {"question": "?"}, heard)
    (start,) = [event for event in heard.events if isinstance(event, NodeStart)]
    assert (start.parent, start.kind) == ("5", "agent")


async def test_each_run_of_an_agent_numbers_its_spans_from_one():
    registry = Registry()

    @registry.agent
    async def asking(emit: Emitter) -> None:
        for _ in range(2):
            await run_program(dspy.Predict("question -> answer"), {"question": "?"}, emit)

    agent = registry["asking"]
    with dspy.context(lm=lm_of(lambda _: chat(answer="x"))):
        for _ in range(2):
            heard = Heard()
            await agent.run(Task(run="r", input=agent.spec.input_model()), heard)
            assert [event.span for event in heard.events if isinstance(event, NodeStart)] == ["1", "3"]
