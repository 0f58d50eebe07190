"""The channel's promises, with every kind of producer, on asyncio, asyncio in debug mode and uvloop."""

import asyncio
import contextvars
import gc
import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import anyio
import anyio.to_thread
import pytest

from agentcast.agents import channel as channel_module
from agentcast.agents.base import Stopped
from agentcast.agents.channel import Channel
from agentcast.agents.events import AgentEvent, Status, Token
from agentcast.agents.execution import Execution, drive

pytestmark = pytest.mark.anyio


@pytest.fixture(
    params=[("asyncio", {}), ("asyncio", {"debug": True}), ("asyncio", {"use_uvloop": True})],
    ids=["asyncio", "debug", "uvloop"],
)
def anyio_backend(request: Any) -> Any:
    return request.param


def token(producer: str, number: int) -> Token:
    return Token(message=producer, delta=str(number))


def by_producer(events: Iterable[AgentEvent]) -> dict[str, list[int]]:
    result: dict[str, list[int]] = {}
    for event in events:
        assert isinstance(event, Token)
        result.setdefault(event.message, []).append(int(event.delta))
    return result


async def drive_and_close(run: Any, channel: Channel) -> None:
    try:
        await drive(run, channel)
    finally:
        channel.close()


async def receive_all(channel: Channel, pause: Callable[[], Any] | None = None) -> tuple[list[AgentEvent], int]:
    """Every event until the channel is closed, and how many waited at most."""
    events: list[AgentEvent] = []
    deepest = 0
    while items := await channel.receive():
        events += [item.event for item in items]
        deepest = max(deepest, len(items))
        if pause is not None:
            await pause()
    return events, deepest


async def some_turns() -> None:
    """Let everything that can run on the loop run for a while."""
    for _ in range(50):
        await anyio.lowlevel.checkpoint()


# -- Order -----------------------------------------------------------------------------------------------------------


COUNT = 150


async def in_task(channel: Channel, name: str) -> None:
    for number in range(COUNT):
        channel.nowait(token(name, number))
        if number % 3 == 0:
            await channel.room()
            await anyio.lowlevel.checkpoint()


async def awaiting(channel: Channel, name: str) -> None:
    for number in range(COUNT):
        await channel.send(token(name, number))


def in_thread(channel: Channel, name: str) -> None:
    for number in range(COUNT):
        channel.nowait(token(name, number))


async def on_second_loop(channel: Channel) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(awaiting, channel, "second loop a")
        group.start_soon(awaiting, channel, "second loop b")


async def all_kinds(channel: Channel) -> None:
    raw = [
        threading.Thread(target=contextvars.copy_context().run, args=(in_thread, channel, f"raw {number}"))
        for number in range(2)
    ]
    raw.append(threading.Thread(target=lambda: asyncio.run(on_second_loop(channel))))
    for thread in raw:
        thread.start()
    async with anyio.create_task_group() as group:
        for number in range(3):
            group.start_soon(in_task, channel, f"task {number}")
            group.start_soon(awaiting, channel, f"awaiting {number}")
            group.start_soon(anyio.to_thread.run_sync, in_thread, channel, f"worker {number}")
    for thread in raw:
        await anyio.to_thread.run_sync(thread.join)


async def test_events_of_all_kinds_of_producers_keep_their_order_and_none_is_lost(monkeypatch):
    monkeypatch.setattr(
        "agentcast.agents.channel.LOOP_BLOCKED_AFTER", 15
    )  # a slow machine does not look like a blocked loop
    channel = Channel()
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(drive_and_close, all_kinds(channel), channel)
            events, deepest = await receive_all(channel, some_turns)
    found = by_producer(events)
    assert len(found) == 3 * 3 + 2 + 2
    assert all(numbers == list(range(COUNT)) for numbers in found.values())
    assert deepest <= 64 + 3 * len(found)


async def test_what_a_thread_emits_before_it_hands_over_comes_before_what_the_loop_then_emits():
    """The loop is not woken in between: it waits for the thread."""
    channel = Channel(high_water=1000)
    for number in range(0, 100, 2):
        thread = threading.Thread(target=channel.nowait, args=(token("both", number),))
        thread.start()
        thread.join()  # hands over
        channel.nowait(token("both", number + 1))
    assert by_producer(item.event for item in await channel.receive()) == {"both": list(range(100))}


async def test_one_wake_up_of_the_loop_serves_all_that_threads_have_put(monkeypatch: pytest.MonkeyPatch):
    channel = Channel(high_water=1000)
    wakes = 0
    wake = channel._wake

    def counted() -> None:
        nonlocal wakes
        wakes += 1
        wake()

    monkeypatch.setattr(channel, "_wake", counted)
    for name in "ab":
        thread = threading.Thread(target=in_thread, args=(channel, name))
        thread.start()
        thread.join()
    assert set(by_producer(item.event for item in await channel.receive())) == {"a", "b"}
    await some_turns()
    assert wakes == 1


@pytest.mark.parametrize("kind", ["task", "scope"])
async def test_a_receive_that_is_cancelled_as_an_event_arrives_does_not_lose_it(kind: str):
    channel = Channel()
    scope = anyio.CancelScope()

    async def receive() -> None:
        with scope:
            got.extend(await channel.receive())

    got: list[Any] = []
    task = asyncio.get_running_loop().create_task(receive())
    await some_turns()
    channel.nowait(token("a", 0))
    if kind == "task":
        task.cancel()
    else:
        scope.cancel()
    await asyncio.wait([task])
    if not got:
        got = await channel.receive()
    assert by_producer(item.event for item in got) == {"a": [0]}


async def test_a_cancelled_receive_loses_nothing():
    channel = Channel()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await channel.receive()
    channel.nowait(token("a", 0))
    with anyio.CancelScope() as scope:
        scope.cancel()
        items = await channel.receive()
    if scope.cancelled_caught:
        items = await channel.receive()
    assert by_producer(item.event for item in items) == {"a": [0]}


async def test_each_event_has_the_time_at_which_it_was_emitted():
    channel = Channel()
    before = time.time()
    channel.nowait(token("a", 0))
    between = time.time()
    (item,) = await channel.receive()
    assert before <= item.ts <= between


# -- Waiting for more ------------------------------------------------------------------------------------------------

NEVER = 1000.0


async def readiness(channel: Channel, patience: float) -> anyio.Event:
    """Set once the channel is ready; events of the producer "patient" can wait."""
    ready = anyio.Event()

    async def wait() -> None:
        await channel.ready(patience, lambda event: isinstance(event, Token) and event.message == "patient")
        ready.set()

    tasks.append(asyncio.get_running_loop().create_task(wait()))
    await some_turns()
    return ready


tasks: list[asyncio.Task[None]] = []


async def test_events_that_can_wait_wait_until_another_comes():
    channel = Channel()
    ready = await readiness(channel, NEVER)
    for number in range(2):
        channel.nowait(token("patient", number))
    await some_turns()
    assert not ready.is_set()
    channel.nowait(token("urgent", 0))
    await some_turns()
    assert ready.is_set()
    assert by_producer(item.event for item in channel.take()) == {"patient": [0, 1], "urgent": [0]}
    channel.nowait(token("patient", 2))
    ready = await readiness(channel, NEVER)
    assert not ready.is_set()
    channel.close()
    await some_turns()
    assert ready.is_set()


async def test_an_urgent_event_that_came_while_nobody_waited_is_not_left_waiting():
    channel = Channel()
    await readiness(channel, NEVER)
    channel.nowait(token("urgent", 0))
    await some_turns()
    channel.take()
    for name in ("urgent", "patient"):
        channel.nowait(token(name, 0))
    assert (await readiness(channel, NEVER)).is_set()


@pytest.mark.parametrize("before", [True, False], ids=["came before the wait", "came in the wait"])
async def test_events_that_can_wait_wait_no_longer_than_that(before: bool):
    channel = Channel()
    await readiness(channel, NEVER)
    channel.nowait(token("urgent", 0))
    await some_turns()
    channel.take()
    if before:
        channel.nowait(token("patient", 0))
        assert not (await readiness(channel, NEVER)).is_set()
        tasks.pop().cancel()
        await some_turns()
    ready = await readiness(channel, 0.01)
    if not before:
        channel.nowait(token("patient", 0))
    with anyio.fail_after(5):
        await ready.wait()
    assert len(channel.take()) == 1


async def test_events_that_can_wait_do_not_hold_the_run_back():
    channel = Channel(high_water=4)
    ready = await readiness(channel, NEVER)
    for number in range(4):
        assert not ready.is_set()
        channel.nowait(token("patient", number))
        await some_turns()
    assert ready.is_set()


# -- Back-pressure ---------------------------------------------------------------------------------------------------


async def test_fifty_gathered_tasks_wait_where_they_emit_and_tasks_of_others_do_not():
    async def child(channel: Channel, name: str) -> None:
        for number in range(40):
            await channel.send(token(name, number))

    async def run(channel: Channel) -> None:
        async with anyio.create_task_group() as group:
            for number in range(50):
                group.start_soon(child, channel, f"c{number}")

    channel = Channel(high_water=64)
    async with anyio.create_task_group() as group:
        group.start_soon(drive_and_close, run(channel), channel)
        await some_turns()
        held_at = len(channel)
        assert 64 <= held_at <= 64 + 50
        await some_turns()  # this task was not made inside the run
        assert len(channel) == held_at
        events, deepest = await receive_all(channel, some_turns)
    assert deepest <= 64 + 50
    assert all(numbers == list(range(40)) for numbers in by_producer(events).values())


async def test_tasks_that_wait_for_room_begin_one_by_one():
    """As calls of DSPy do: each waits for room and then emits several events at once, which cannot wait."""

    async def child(channel: Channel, name: str) -> None:
        for number in range(0, 40, 4):
            await channel.room()
            for each in range(4):
                channel.nowait(token(name, number + each))

    async def run(channel: Channel) -> None:
        async with anyio.create_task_group() as group:
            for number in range(50):
                group.start_soon(child, channel, f"c{number}")

    channel = Channel(high_water=64)
    async with anyio.create_task_group() as group:
        group.start_soon(drive_and_close, run(channel), channel)
        events, deepest = await receive_all(channel, some_turns)
    assert 64 <= deepest < 64 + 4
    assert all(numbers == list(range(40)) for numbers in by_producer(events).values())


async def test_a_task_that_never_waits_meets_the_hard_cap():
    async def child(channel: Channel) -> None:
        while True:
            channel.nowait(token("status", 0))
            await anyio.lowlevel.checkpoint()

    async def run(channel: Channel) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(child, channel)

    channel = Channel(high_water=8, hard_cap=100)
    with pytest.raises(BaseExceptionGroup) as raised, anyio.fail_after(5):
        await drive(run(channel), channel)
    assert raised.value.subgroup(Stopped)
    assert channel.overflowed
    assert len(await channel.receive()) == 100


class Worker:
    """A library's: one task for all who use it, started by the first."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self._jobs, self._taken = anyio.create_memory_object_stream[tuple[int, list[int], anyio.Event]](math.inf)

    async def double(self, number: int) -> int:
        if self.task is None:
            self.task = asyncio.get_running_loop().create_task(self._work())
        result: list[int] = []
        done = anyio.Event()
        self._jobs.send_nowait((number, result, done))
        await done.wait()
        return result[0]

    async def _work(self) -> None:
        with self._taken:
            async for number, result, done in self._taken:
                result.append(2 * number)
                done.set()

    async def close(self) -> None:
        self._jobs.close()
        assert self.task is not None
        await self.task


@pytest.mark.parametrize("first", ["congested", "cancelled", "abandoned", "deaf"])
async def test_a_worker_that_one_run_has_started_serves_all_whatever_becomes_of_that_run(first: str):
    worker = Worker()

    async def starting(channel: Channel) -> None:
        assert await worker.double(1) == 2
        while True:
            try:
                for _ in range(8):
                    channel.nowait(token("first", 0))
                await anyio.sleep_forever()
            except asyncio.CancelledError:
                if first != "deaf":
                    raise

    async def using(channel: Channel) -> int:
        await channel.send(token("second", 0))
        return await worker.double(21)

    stuck, free = Channel("first", high_water=8), Channel("second")
    with anyio.fail_after(5):
        one = Execution(starting(stuck), stuck)
        while len(stuck) < 8:
            await anyio.lowlevel.checkpoint()
        if first in ("cancelled", "deaf"):
            one.cancel()
            await some_turns()
        if first in ("abandoned", "deaf"):
            one.abandon()
            await one.done.wait()
        assert worker.task is not None
        assert not worker.task.done()
        two = Execution(using(free), free)
        await two.done.wait()
        assert two.value == 42
        one.abandon()
        await one.done.wait()
        await worker.close()


async def test_the_loop_is_left_as_it_was_while_a_run_goes_on_and_after_it():
    loop = asyncio.get_running_loop()
    seen = []

    async def run(channel: Channel) -> None:
        seen.append(loop.get_task_factory())
        async with anyio.create_task_group() as group:
            group.start_soon(channel.send, Status(message="from a child"))

    before = loop.get_task_factory()
    channel = Channel()
    await drive(run(channel), channel)
    assert [*seen, loop.get_task_factory()] == [before, before]
    assert len(channel) == 1


async def test_the_runs_own_coroutine_is_not_resumed_while_nobody_receives():
    steps = 0

    async def run(channel: Channel) -> None:
        nonlocal steps
        while steps < 1000:
            channel.nowait(token("a", steps))
            steps += 1
            await anyio.lowlevel.checkpoint()

    channel = Channel(high_water=8)
    async with anyio.create_task_group() as group:
        group.start_soon(drive_and_close, run(channel), channel)
        await some_turns()
        assert steps == 8
        events, deepest = await receive_all(channel)
    assert deepest == 8
    assert len(events) == 1000


async def test_two_runs_do_not_hold_each_other_back():
    async def run(channel: Channel) -> None:
        for number in range(100):
            channel.nowait(token("a", number))
            await anyio.lowlevel.checkpoint()

    stuck, free = Channel(high_water=8), Channel(high_water=8)
    async with anyio.create_task_group() as group:
        group.start_soon(drive_and_close, run(stuck), stuck)
        group.start_soon(drive_and_close, run(free), free)
        with anyio.fail_after(5):
            events, _ = await receive_all(free)
        assert len(events) == 100
        assert len(stuck) == 8
        await receive_all(stuck)


async def test_a_thread_waits_for_room_while_the_loop_answers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(channel_module, "LOOP_BLOCKED_AFTER", 0.02)
    channel = Channel(high_water=8)

    def produce() -> None:
        for number in range(100):
            channel.nowait(token("thread", number))

    async with anyio.create_task_group() as group:
        group.start_soon(anyio.to_thread.run_sync, produce)
        while len(channel) < 8:
            await anyio.lowlevel.checkpoint()
        await anyio.sleep(0.1)  # five times what it takes for a blocked loop
        assert len(channel) == 8
        total = 0
        while total < 100:
            items = await channel.receive()
            assert len(items) <= 8
            total += len(items)


async def test_a_thread_goes_on_when_the_loop_is_blocked_waiting_for_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(channel_module, "LOOP_BLOCKED_AFTER", 0.02)
    channel = Channel(high_water=8)

    def produce() -> None:
        for number in range(100):
            channel.nowait(token("thread", number))

    async def run() -> None:
        thread = threading.Thread(target=produce, daemon=True)
        thread.start()
        thread.join(10)  # what DSPy does in some places
        assert not thread.is_alive()

    await drive(run(), channel)
    assert len(channel) == 100


async def test_waiting_senders_go_on_in_time_and_may_give_up_with_their_event_sent():
    channel = Channel(high_water=2)
    channel.nowait(token("a", 0))
    with anyio.CancelScope() as scope:
        scope.cancel()
        await channel.send(token("a", 1))
    assert scope.cancelled_caught
    async with anyio.create_task_group() as group:
        group.start_soon(channel.send, token("a", 2))
        await anyio.wait_all_tasks_blocked()
        items = await channel.receive()
    assert by_producer(item.event for item in items) == {"a": [0, 1, 2]}


# -- Its end ---------------------------------------------------------------------------------------------------------


async def test_a_storm_meets_the_hard_cap_and_what_came_before_is_received():
    channel = Channel(high_water=8, hard_cap=20)

    async def run() -> None:
        for number in range(1000):
            channel.nowait(token("storm", number))

    with pytest.raises(Stopped):
        await drive(run(), channel)
    assert channel.overflowed
    assert not channel.abandoned
    assert by_producer(item.event for item in await channel.receive()) == {"storm": list(range(20))}
    assert await channel.receive() == []
    with pytest.raises(Stopped):
        await channel.send(token("storm", 0))


async def test_threads_meet_the_hard_cap_while_the_loop_is_blocked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(channel_module, "LOOP_BLOCKED_AFTER", 0.02)
    channel = Channel(high_water=8, hard_cap=20)
    stopped = []

    def produce() -> None:
        try:
            for number in range(15, 100):
                channel.nowait(token("storm", number))
        except Stopped:
            stopped.append(number)

    for number in range(15):
        channel.nowait(token("storm", number))
    thread = threading.Thread(target=produce)
    thread.start()
    thread.join(10)  # blocks the loop
    assert stopped == [20]
    with pytest.raises(Stopped):
        channel.nowait(token("storm", 21))
    assert channel.overflowed
    assert by_producer(item.event for item in await channel.receive()) == {"storm": list(range(20))}
    assert await channel.receive() == []


async def test_closing_takes_nothing_more_but_gives_what_is_there():
    channel = Channel()
    channel.nowait(token("a", 0))
    channel.close()
    channel.close()
    with pytest.raises(Stopped):
        channel.nowait(token("a", 1))
    with pytest.raises(Stopped):
        await channel.send(token("a", 2))
    assert len(await channel.receive()) == 1
    assert await channel.receive() == []
    assert not channel.overflowed


async def test_closing_ends_a_waiting_receive_also_from_a_thread():
    channel = Channel()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.to_thread.run_sync, channel.close)
            assert await channel.receive() == []


async def test_closing_stops_waiting_threads_and_releases_waiting_tasks():
    channel = Channel(high_water=2)
    channel.nowait(token("a", 0))
    stopped = threading.Event()

    def produce() -> None:
        try:
            channel.nowait(token("thread", 0))
        except Stopped:
            stopped.set()

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.to_thread.run_sync, produce)
            while len(channel) < 2:
                await anyio.lowlevel.checkpoint()
            group.start_soon(channel.send, token("task", 0))
            await some_turns()
            channel.close()
    assert stopped.is_set()


async def test_cancelling_passes_the_gate():
    cleaned_up = False

    async def run(channel: Channel) -> None:
        nonlocal cleaned_up
        try:
            while True:
                channel.nowait(token("a", 0))
                await anyio.lowlevel.checkpoint()
        finally:
            cleaned_up = True

    channel = Channel(high_water=2)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(drive, run(channel), channel)
            await some_turns()
            group.cancel_scope.cancel()
    assert cleaned_up


async def test_what_swallows_its_cancellation_is_dropped_when_abandoned_and_its_tasks_go_on_until_they_emit():
    swallowed = 0
    go_on = anyio.Event()

    async def child() -> None:
        await go_on.wait()
        channel.nowait(token("child", 0))

    async def run() -> None:
        nonlocal swallowed
        children.append(asyncio.get_running_loop().create_task(child()))
        while True:
            try:
                await anyio.sleep_forever()
            except asyncio.CancelledError:
                swallowed += 1

    children: list[asyncio.Task[None]] = []
    channel = Channel()
    task = asyncio.get_running_loop().create_task(drive(run(), channel))
    with anyio.fail_after(5):
        await some_turns()
        task.cancel()
        await some_turns()
        assert swallowed == 1
        assert not task.done()
        channel.abandon()
        task.cancel()
        with pytest.raises(Stopped):
            await task
        assert swallowed == 1
        assert channel.abandoned
        await some_turns()
        assert not children[0].done()
        go_on.set()
        with pytest.raises(Stopped):
            await children[0]


async def test_a_coroutine_that_ignores_even_its_closing_is_kept_away_for_good():
    resumed = 0

    async def run() -> None:
        nonlocal resumed
        for _ in range(5):  # not for ever: as the process exits, the interpreter does resume it
            try:
                await asyncio.sleep(3600)
            except BaseException:  # noqa: BLE001 -- that is the point
                resumed += 1

    channel = Channel()
    task = asyncio.get_running_loop().create_task(drive(run(), channel))
    await some_turns()
    channel.abandon()
    task.cancel()
    with pytest.raises(Stopped):
        await task
    gc.collect()
    await some_turns()
    assert resumed == 1


async def test_what_the_run_returns_or_raises_comes_out_of_drive():
    async def returns() -> int:
        await anyio.lowlevel.checkpoint()
        return 7

    async def raises() -> None:
        await anyio.lowlevel.checkpoint()
        raise KeyError("mine")

    assert await drive(returns(), Channel()) == 7
    with pytest.raises(KeyError, match="mine"):
        await drive(raises(), Channel())


async def test_a_child_that_is_cancelled_before_its_first_step_leaves_no_warning():
    async def child() -> None:
        raise AssertionError("never started")

    async def run() -> None:
        task = asyncio.get_running_loop().create_task(child())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    await drive(run(), Channel())
    gc.collect()  # "coroutine was never awaited" would come from here, and fail the test


async def test_the_task_of_a_run_bears_its_name():
    channel = Channel("mine")

    async def run() -> str:
        task = asyncio.current_task()
        assert task is not None
        return task.get_name()

    execution = Execution(run(), channel)
    await execution.done.wait()
    assert execution.value == "mine"


# -- A loop that is blocked on its producers -------------------------------------------------------------------------


async def test_a_second_loop_that_the_loop_waits_for_is_not_held_back_for_ever():
    async def run() -> None:
        thread = threading.Thread(target=lambda: asyncio.run(awaiting(channel, "second loop")))
        thread.start()
        thread.join(10)  # blocks the loop
        assert not thread.is_alive()

    channel = Channel(high_water=8)
    async with anyio.create_task_group() as group:
        group.start_soon(drive_and_close, run(), channel)
        events, _ = await receive_all(channel)
    assert by_producer(events) == {"second loop": list(range(COUNT))}


async def test_handing_over_wakes_the_loop_but_does_not_wait_for_one_that_is_blocked():
    def put() -> bool:
        channel.nowait(token("thread", 0))
        channel.hand_over()
        return not channel._inbox

    channel = Channel()
    assert await anyio.to_thread.run_sync(put)
    thread = threading.Thread(target=put)
    thread.start()
    thread.join(10)  # blocks the loop
    assert not thread.is_alive()
    channel.hand_over()
    assert len(await channel.receive()) == 2
