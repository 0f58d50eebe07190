"""What a run's channel carries: events a second from its producers to its consumer, without hub or network."""

import functools
import time
from collections.abc import Awaitable, Callable, Iterator

import anyio
import anyio.to_thread

from agentcast.agents.channel import Channel
from agentcast.agents.events import Token
from agentcast.agents.execution import drive
from benchmarks.report import Row

GROUP = "Channel of a run, events to its consumer"
EVENTS, ROUNDS = 100_000, 3
EVENT = Token(message="m", delta="token ")


def measure() -> Iterator[Row]:
    cases: list[tuple[str, Callable[[], Awaitable[None]], str]] = [
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
        start = time.perf_counter()
        await case()
        return time.perf_counter() - start

    return anyio.run(run, backend_options={"use_uvloop": True})


async def _tasks(runs: int, tasks: int) -> None:
    each = EVENTS // (runs * tasks)

    async def produce(channel: Channel) -> None:
        for _ in range(each):
            await channel.send(EVENT)

    async def agent(channel: Channel) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(tasks):
                group.start_soon(produce, channel)

    async def run() -> None:
        channel = Channel()
        async with anyio.create_task_group() as group:
            group.start_soon(_consume, channel, each * tasks)
            await drive(produce(channel) if tasks == 1 else agent(channel), channel)

    async with anyio.create_task_group() as group:
        for _ in range(runs):
            group.start_soon(run)


async def _threads(threads: int) -> None:
    channel = Channel()
    each = EVENTS // threads

    def produce() -> None:
        for _ in range(each):
            channel.nowait(EVENT)

    async with anyio.create_task_group() as group:
        group.start_soon(_consume, channel, each * threads)
        for _ in range(threads):
            group.start_soon(anyio.to_thread.run_sync, produce)


async def _consume(channel: Channel, wanted: int) -> None:
    while wanted:
        wanted -= len(await channel.receive())
