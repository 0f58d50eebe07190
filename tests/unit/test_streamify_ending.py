"""How streams end before their programs do (G6): the program stops, nothing of it remains, nothing is raised."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import anyio
import anyio.to_thread
import dspy
import pytest

from agentcast.agents.channel import HARD_CAP
from agentcast.agents.streaming import EventStream, Stream, StreamError, stream_events, streamify
from tests.support.lms import chat, lm_of, pieces

pytestmark = pytest.mark.anyio


class Asker(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        self.ask = dspy.Predict("question -> answer")
        self.ended = threading.Event()


class Endless(Asker):
    """Asks again and again."""

    async def aforward(self) -> Any:
        try:
            while True:
                await self.ask.acall(question="?")
        finally:
            self.ended.set()


class EndlessSync(Asker):
    """Does so in a thread, and never gives up because of an error."""

    def forward(self) -> Any:
        try:
            while True:
                try:
                    self.ask(question="?")
                except Exception:  # noqa: BLE001, S110
                    pass
        finally:
            self.ended.set()


class World:
    """An endless program that streams, and what is seen of it."""

    def __init__(self, is_async: bool, kind: str) -> None:
        self.lm = lm_of(lambda _: pieces(chat(answer="on and on [" * 20), 2))
        self.program = Endless() if is_async else EndlessSync()
        self.program.set_lm(self.lm)
        if kind == "events":
            self.start: Callable[[], Stream[Any]] = lambda: stream_events(self.program, {})
        else:
            self.start = streamify(self.program, is_async_program=is_async)

    async def stopped(self) -> None:
        """Waits until the program has ended; then its LM is not called any more."""
        assert await anyio.to_thread.run_sync(self.program.ended.wait, 5), "the program goes on"
        calls = self.lm.engine.calls
        await anyio.wait_all_tasks_blocked()
        assert self.lm.engine.calls == calls


@pytest.fixture(params=["events", "items"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[True, False], ids=["async", "sync"])
async def world(request: pytest.FixtureRequest, kind: str, caplog: pytest.LogCaptureFixture) -> AsyncIterator[World]:
    """Asserts at the end that the program has stopped, and that no task, thread, log line or loop error remains."""
    loop = asyncio.get_running_loop()
    errors: list[Any] = []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    threads = set(threading.enumerate())
    world = World(request.param, kind)
    yield world
    await world.stopped()
    gc.collect()
    await anyio.wait_all_tasks_blocked()
    for thread in set(threading.enumerate()) - threads:
        if not thread.name.startswith(("AnyIO", "asyncio")):  # idle ones of pools
            thread.join(5)
            assert not thread.is_alive(), thread
    assert not [task for task in asyncio.all_tasks() if "TestRunner" not in repr(task)]
    assert not errors
    assert not caplog.records
    loop.set_exception_handler(None)


async def take(stream: Stream[Any], count: int) -> None:
    async for _ in stream:
        count -= 1
        if not count:
            break


async def test_break_and_leave(world: World):
    await take(world.start(), 10)  # the stream is dropped as this returns


async def test_dropped_without_a_word(world: World):
    stream = world.start()
    await anext(stream)
    dropped = weakref.ref(stream)
    del stream
    gc.collect()
    assert dropped() is None, "something holds the stream"


async def test_dropped_in_another_thread(world: World):
    streams = [world.start()]
    await anext(streams[0])
    await anyio.to_thread.run_sync(streams.clear)


async def test_closed_by_the_consumer(world: World):
    stream = world.start()
    await take(stream, 10)
    await stream.aclose()
    await stream.aclose()
    assert world.program.ended.is_set()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_closed_by_leaving_the_context(world: World):
    async with world.start() as stream:
        await anext(stream)
    assert world.program.ended.is_set()


async def test_closed_from_another_task_while_the_consumer_waits_or_not(world: World):
    async def consume() -> None:
        async for _ in stream:
            seen.set()
        ended.set()

    stream = world.start()
    seen, ended = anyio.Event(), anyio.Event()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(consume)
            await seen.wait()
            await stream.aclose()
            await ended.wait()


async def test_the_consumers_own_exception(world: World):
    async def consume() -> None:
        async for _ in world.start():
            raise KeyError("the consumer's")

    with pytest.raises(KeyError, match="consumer"):
        await consume()


async def forever() -> None:
    await anyio.sleep_forever()


@pytest.mark.parametrize("busy", [True, False], ids=["busy elsewhere", "waiting for an item"])
async def test_a_timeout_around_the_consumer(world: World, busy: bool):
    async def consume(stream: Stream[Any]) -> None:
        async with asyncio.timeout(0) as timeout:
            timeout.reschedule(None)
            async for _ in stream:
                timeout.reschedule(asyncio.get_running_loop().time())
                if busy:
                    await forever()

    with pytest.raises(TimeoutError):
        await consume(world.start())


async def test_cancelling_the_consumer_raises_nothing_but_that(world: World):
    caught: list[BaseException] = []
    taken = anyio.Event()

    async def consume() -> None:
        try:
            async for _ in world.start():
                taken.set()
        except BaseException as error:
            caught.append(error)
            raise

    async with anyio.create_task_group() as group:
        group.start_soon(consume)
        await taken.wait()
        group.cancel_scope.cancel()
    assert [type(error) for error in caught] == [asyncio.CancelledError]


# -- Cases of their own ------------------------------------------------------------------------------------------------


async def test_a_cancelled_wait_stops_the_program_although_the_stream_is_kept():
    asked = anyio.Event()

    async def before_chunk(number: int) -> None:
        asked.set()
        await anyio.sleep_forever()

    program = Endless()
    stream = stream_events(program, {})
    with dspy.context(lm=lm_of(lambda _: "", before_chunk=before_chunk)):
        async with anyio.create_task_group() as group:
            group.start_soon(take, stream, -1)
            await asked.wait()
            group.cancel_scope.cancel()
        with anyio.fail_after(5):
            await anyio.to_thread.run_sync(program.ended.wait, 5)
    assert [event async for event in stream] == []


async def test_closing_cancels_a_program_that_waits_for_something_else():
    cancelled = anyio.Event()

    class Waits(dspy.Module):  # type: ignore[misc]
        async def aforward(self) -> Any:
            try:
                await anyio.sleep_forever()
            except asyncio.CancelledError:
                cancelled.set()
                raise

    async with stream_events(Waits(), {}) as stream:
        await anext(stream)
        await anyio.wait_all_tasks_blocked()
    assert cancelled.is_set()


async def test_closing_lets_the_program_clean_up_with_awaits():
    cleaned = anyio.Event()

    class Clean(Endless):
        async def aforward(self) -> Any:
            try:
                await super().aforward()
            finally:
                await anyio.wait_all_tasks_blocked()
                cleaned.set()

    with dspy.context(lm=lm_of(lambda _: chat(answer="x"))):
        async with stream_events(Clean(), {}) as stream:
            await anext(stream)
    assert cleaned.is_set()


async def test_a_program_that_does_not_end_is_left_behind(monkeypatch: pytest.MonkeyPatch):
    from agentcast.agents.streaming import stream as module

    monkeypatch.setattr(module, "GRACE", 0.05)

    class Stubborn(dspy.Module):  # type: ignore[misc]
        async def aforward(self) -> Any:
            while True:
                try:
                    await anyio.sleep_forever()
                except asyncio.CancelledError:
                    pass

    async with stream_events(Stubborn(), {}) as stream:
        await anext(stream)
    assert stream._run is not None
    with anyio.fail_after(5):
        await stream._run.done.wait()


async def test_a_stream_that_was_never_started_leaves_nothing():
    stream = stream_events(Endless(), {})
    await stream.aclose()
    assert [event async for event in stream] == []
    streamify(Endless(), is_async_program=True)()


@pytest.mark.parametrize("error", [asyncio.CancelledError, StopAsyncIteration, GeneratorExit])
async def test_what_would_be_taken_for_the_consumers_own_arrives_as_an_error(error: type[BaseException]):
    class Odd(dspy.Module):  # type: ignore[misc]
        async def aforward(self) -> Any:
            raise error

    with pytest.raises((StreamError, RuntimeError)):
        await take(stream_events(Odd(), {}), -1)


async def test_a_burst_that_cannot_be_held_back_ends_the_stream_with_an_error():
    class Burst(dspy.Module):  # type: ignore[misc]
        async def aforward(self) -> Any:
            tool = dspy.Tool(lambda: None, name="t")
            for _ in range(HARD_CAP):
                tool()

    with pytest.raises(StreamError, match="10000"):
        await take(stream_events(Burst(), {}), -1)


async def test_a_task_of_its_own_program_may_close_the_stream():
    streams: list[EventStream] = []

    class Closer(dspy.Module):  # type: ignore[misc]
        async def aforward(self) -> Any:
            await streams.pop().aclose()

    from agentcast.agents.streaming import stream as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GRACE", 0.1)
        streams.append(stream_events(Closer(), {}))
        stream = streams[0]
        with anyio.fail_after(5):
            events = [event async for event in stream]
    assert events == []


async def test_the_outcome_is_there_after_the_last_event():
    with dspy.context(lm=lm_of(lambda _: pieces(chat(reasoning="so", answer="yes"), 3))):
        stream = stream_events(dspy.ChainOfThought("question -> answer"), {"question": "?"}, messages=["answer"])
        before: Any = stream.outcome
        assert before is None
        events = [event async for event in stream]
    outcome: Any = stream.outcome
    assert outcome.prediction.answer == "yes"
    assert outcome.usage.input_tokens == 10
    assert {event.field for event in events if event.event == "message_start"} == {"answer"}


async def test_step_limits_and_statuses_of_tools_reach_whoever_streams_events():
    from agentcast.agents.context import status
    from agentcast.agents.react import ReAct

    def reply(prompt: str) -> Iterable[str]:
        if "`[[ ## next_thought ## ]]`" not in prompt:
            return chat(reasoning="so", answer="yes")
        return chat(next_thought="hm", next_tool_name="look", next_tool_args="{}")

    async def look() -> str:
        status("looking")
        return "nothing"

    with dspy.context(lm=lm_of(reply)):
        events = [e async for e in stream_events(ReAct("question -> answer", [look], 1), {"question": "?"})]
    kinds = [event.event for event in events]
    assert "status" in kinds
    assert "step_limit" in kinds
