"""What a run's channel carries, and what a token costs from the channel to the log: no hub, no network, memory bus."""

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
from agentcast.server.cli.collector import freeze_heap
from agentcast.server.runs.publisher import SummaryPublisher
from agentcast.server.runs.recorder import Recorder
from agentcast.server.runs.snapshots import Snapshots
from benchmarks.report import Row

GROUP = "Channel of a run, events to its consumer"
TOKENS = "A token from the channel to the log, at 50 tokens a second and run"
EVENTS, ROUNDS, AT_ONCE = 100_000, 3, 50
SECONDS, RATE, PARTS = 2.0, 50, 5
TOKEN = Token(message="m", delta="token ")


def measure() -> Iterator[Row]:
    freeze_heap()  # as a hub does: else collections look through DSPy again and again, in some rounds
    yield from _carried()
    yield from _recorded()


# -- What it carries ---------------------------------------------------------------------------------------------------


def _carried() -> Iterator[Row]:
    cases: list[tuple[str, Callable[[], Awaitable[None]], str]] = [
        ("the anyio stream alone", _stream, "what a channel is made of: put and taken, 50 at a time"),
        ("put and taken, 50 at a time", _bare, "no task waits for another"),
        ("one task, awaited sends", functools.partial(_tasks, 1, 1), "an agent on the loop"),
        ("200 runs, a task each", functools.partial(_tasks, 200, 1), "many agents at once, a channel each, added up"),
        ("50 tasks of one run", functools.partial(_tasks, 1, 50), "parallel sub-calls, held back together"),
        ("one worker thread", functools.partial(_threads, 1), "a synchronous tool or program"),
        ("4 worker threads", functools.partial(_threads, 4), "synchronous tools in parallel"),
    ]
    for what, case, meaning in cases:
        yield Row(GROUP, what, "events/s", [EVENTS / _timed(case) for _ in range(ROUNDS)], meaning)


def _timed(case: Callable[[], Awaitable[None]]) -> float:
    async def run() -> float:
        start = time.process_time()
        await case()
        return time.process_time() - start

    return anyio.run(run, backend_options={"use_uvloop": True})


async def _stream() -> None:
    sending, receiving = anyio.create_memory_object_stream[Token](AT_ONCE)
    with sending, receiving:
        for _ in range(EVENTS // AT_ONCE):
            for _ in range(AT_ONCE):
                sending.send_nowait(TOKEN)
            for _ in range(AT_ONCE):
                receiving.receive_nowait()


async def _bare() -> None:
    channel = Channel()
    for _ in range(EVENTS // AT_ONCE):
        for _ in range(AT_ONCE):
            channel.nowait(TOKEN)
        await channel.receive()


async def _tasks(runs: int, tasks: int) -> None:
    each = EVENTS // (runs * tasks)

    async def produce(channel: Any) -> None:
        for _ in range(each):
            await channel.send(TOKEN)

    async def agent(channel: Any) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(tasks):
                group.start_soon(produce, channel)

    async def run() -> None:
        channel = Channel()
        async with anyio.create_task_group() as group:
            group.start_soon(_consume, channel, each * tasks)
            await drive(produce(channel) if tasks == 1 else agent(channel), channel)
        channel.close()

    async with anyio.create_task_group() as group:
        for _ in range(runs):
            group.start_soon(run)


async def _threads(threads: int) -> None:
    channel = Channel()
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
        rounds = [{make: _cost(make, runs) for make in (_nothing, _recording)} for _ in range(ROUNDS)]
        spent = [each[_recording] - each[_nothing] for each in rounds]
        what = f"{runs:,} run{'s' if runs > 1 else ''}"
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


async def _recording(bus: MemoryBus, run: str) -> Source:
    recorder, channel = await _recorder(bus, run), Channel()
    return channel, functools.partial(recorder.record_from, channel)


async def _recorder(bus: MemoryBus, run: str) -> Recorder:
    origin = Origin("a", "p", None, 1.0)
    recorder = Recorder(bus, run, origin, "e", 1, snapshots=Snapshots(), summaries=SummaryPublisher(bus))
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
