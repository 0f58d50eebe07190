"""What a run's channel carries, and what a token costs from the channel to the log: no hub, no network, memory bus.

Each number stands beside that of the former channel and recorder (`benchmarks.former`), measured in turns.
"""

import asyncio
import functools
import gc
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import anyio
import anyio.to_thread
from anyio.lowlevel import checkpoint

from agentcast.agents.channel import Channel
from agentcast.agents.events import MessageStart, RunQueued, Token
from agentcast.agents.execution import drive
from agentcast.server.bus.base import NewRun, Origin
from agentcast.server.bus.memory import MemoryBus
from agentcast.server.recorder import Recorder, Snapshots
from agentcast.server.serving import freeze_heap
from benchmarks.former import FormerChannel, FormerRecorder
from benchmarks.report import Row

GROUP = "Channel of a run, events to its consumer"
TOKENS = "A token from the channel to the log, at 50 tokens a second and run"
EVENTS, ROUNDS = 100_000, 3
SECONDS, RATE, PARTS = 2.0, 50, 5
TOKEN = Token(message="m", delta="token ")

Made = Callable[[], Any]


def measure() -> Iterator[Row]:
    freeze_heap()  # as a hub does: else collections look through DSPy again and again, in some rounds
    yield from _carried()
    yield from _recorded()


# -- What it carries ---------------------------------------------------------------------------------------------------


def _carried() -> Iterator[Row]:
    cases: list[tuple[str, Callable[[Made], Awaitable[None]], str]] = [
        ("put and taken, 64 at a time", _bare, "no task waits for another"),
        ("one task, awaited sends", functools.partial(_tasks, 1, 1), "an agent on the loop"),
        ("200 runs, a task each", functools.partial(_tasks, 200, 1), "many agents at once, a channel each, added up"),
        ("50 tasks of one run", functools.partial(_tasks, 1, 50), "parallel sub-calls, held back together"),
        ("one worker thread", functools.partial(_threads, 1), "a synchronous tool or program"),
        ("4 worker threads", functools.partial(_threads, 4), "synchronous tools in parallel"),
    ]
    for what, case, meaning in cases:
        rounds = [(_timed(case, FormerChannel), _timed(case, Channel)) for _ in range(ROUNDS)]
        yield Row(GROUP, what, "events/s", [EVENTS / now for _, now in rounds], meaning)
        yield Row(GROUP, f"{what}: before", "events/s", [EVENTS / before for before, _ in rounds])


def _timed(case: Callable[[Made], Awaitable[None]], make: Made) -> float:
    async def run() -> float:
        start = time.process_time()
        await case(make)
        return time.process_time() - start

    return anyio.run(run, backend_options={"use_uvloop": True})


async def _bare(make: Made) -> None:
    channel = make()
    for _ in range(EVENTS // 50):
        for _ in range(50):
            channel.nowait(TOKEN)
        await channel.receive()


async def _tasks(runs: int, tasks: int, make: Made) -> None:
    each = EVENTS // (runs * tasks)

    async def produce(channel: Any) -> None:
        for _ in range(each):
            await channel.send(TOKEN)

    async def agent(channel: Any) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(tasks):
                group.start_soon(produce, channel)

    async def run() -> None:
        channel = make()
        async with anyio.create_task_group() as group:
            group.start_soon(_consume, channel, each * tasks)
            await drive(produce(channel) if tasks == 1 else agent(channel), channel)
        channel.close()

    async with anyio.create_task_group() as group:
        for _ in range(runs):
            group.start_soon(run)


async def _threads(threads: int, make: Made) -> None:
    channel = make()
    each = EVENTS // threads

    def produce() -> None:
        for _ in range(each):
            channel.nowait(TOKEN)

    async with anyio.create_task_group() as group:
        group.start_soon(_consume, channel, each * threads)
        for _ in range(threads):
            group.start_soon(anyio.to_thread.run_sync, produce)
    channel.close()


async def _consume(channel: Any, wanted: int) -> None:
    while wanted:
        wanted -= len(await channel.receive())


# -- What a token costs ------------------------------------------------------------------------------------------------


def _recorded() -> Iterator[Row]:
    for runs in (1, 100, 1_000):
        rounds = [{make: _cost(make, runs) for make in (_nothing, _former, _now)} for _ in range(ROUNDS)]
        for make, note in ((_now, ""), (_former, ": before")):
            spent = [each[make] - each[_nothing] for each in rounds]
            what = f"{runs:,} run{'s' if runs > 1 else ''}{note}"
            meaning = "CPU, without that of the ticker that emits the tokens"
            yield Row(TOKENS, what, "µs/token", [cpu / (SECONDS * RATE * runs) * 1e6 for cpu in spent], meaning)
            yield Row(TOKENS, f"{what}, share of a core", "%", [cpu / SECONDS * 100 for cpu in spent])


class Nowhere:
    """Takes events and forgets them."""

    def nowait(self, event: Any) -> None:
        pass

    def close(self) -> None:
        pass


Source = tuple[Any, Callable[[], Coroutine[Any, Any, None]]]
"""A channel, and what records from it."""


async def _nothing(bus: MemoryBus, run: str) -> Source:
    return Nowhere(), checkpoint


async def _former(bus: MemoryBus, run: str) -> Source:
    recorder, channel = await _recorder(bus, run), FormerChannel()
    return channel, functools.partial(FormerRecorder(bus, run, recorder.state).record_from, channel)


async def _now(bus: MemoryBus, run: str) -> Source:
    recorder, channel = await _recorder(bus, run), Channel()
    return channel, functools.partial(recorder.record_from, channel)


async def _recorder(bus: MemoryBus, run: str) -> Recorder:
    recorder = Recorder(bus, run, Origin("a", "p", None, 1.0), "e", 1, snapshots=Snapshots())
    first = recorder.first_frame(1.0, RunQueued(epoch="e", input={}))
    new = NewRun(run=run, epoch="e", agent="a", principal="p", thread=None, created=1.0, first=first)
    await bus.create(new)
    return recorder


def _cost(make: Callable[[MemoryBus, str], Awaitable[Source]], runs: int) -> float:
    """CPU seconds for `SECONDS` of `runs`."""
    return anyio.run(_play, make, runs, backend_options={"use_uvloop": True})


async def _play(make: Callable[[MemoryBus, str], Awaitable[Source]], runs: int) -> float:
    bus = MemoryBus()
    sources = [await make(bus, f"r{number}") for number in range(runs)]
    async with anyio.create_task_group() as group:
        for channel, record in sources:
            group.start_soon(record)
            channel.nowait(MessageStart(message="m", span="s", field="f"))
            channel.nowait(TOKEN)
        await asyncio.sleep(0.1)
        gc.collect()
        start = time.process_time()
        await _tick([channel for channel, _ in sources])
        cpu = time.process_time() - start
        for channel, _ in sources:
            channel.close()
    return cpu


async def _tick(channels: list[Any]) -> None:
    """Emit `RATE` tokens a second into each channel, in `PARTS` of them, one after another."""
    parts = [channels[number::PARTS] for number in range(min(PARTS, len(channels)))]
    due = time.perf_counter()
    for _ in range(int(SECONDS * RATE)):
        for part in parts:
            for channel in part:
                channel.nowait(TOKEN)
            due += 1 / RATE / len(parts)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
