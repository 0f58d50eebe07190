"""What several hubs over one Redis cost: the way through it and a second hub, appends, Redis's CPU and memory.

The peers are what one would write with redis-py alone: `publish` and `listen`; `XADD` and `PUBLISH`, each awaited.
"""

import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from redis.asyncio import Redis

from agentcast.server.bus.base import Frame, NewRun, Snapshot, new_epoch, new_run_id
from agentcast.server.bus.redis import RedisBus
from benchmarks.latency import latencies
from benchmarks.processes import RedisServer, running, running_redis
from benchmarks.report import Row, percentile

LATENCY = "Redis, emit → client of a second hub"
APPENDS = "Redis, appends of one 200-byte event"
COST = "Redis, what an event costs it"
RATE, COUNT, WARM_UP = 50.0, 400, 10
EVENTS, ROUNDS = 6_000, 3
EVENT = b"x" * 200
RUNS, RUN_EVENTS = 200, 100


def measure() -> Iterator[Row]:
    with running_redis() as redis:
        yield from _latency(redis)
        for runs in (1, 50):
            many = f"{runs} run{'s' * (runs > 1)}"
            yield Row(APPENDS, f"this bus, {many}", "appends/s", _rates(redis, runs, _append), _CHECKED)
            yield Row(APPENDS, f"awaited XADD + PUBLISH, {many}", "appends/s", _rates(redis, runs, _xadd_publish))
        yield from _cost(redis)


_CHECKED = "owner, order and end are checked by a script; those on their way at once share a round trip"


def _latency(redis: RedisServer) -> Iterator[Row]:
    with running("benchmarks.hub", AGENTCAST_REDIS=redis.url) as first:
        with running("benchmarks.hub", AGENTCAST_REDIS=redis.url) as second:
            through = latencies(first, second.port, "status", watchers=1)
    with running("benchmarks.publisher", redis.url, str(RATE), str(COUNT)) as publisher:
        raw = anyio.run(_listen, redis.url, publisher.go, backend_options={"use_uvloop": True})[WARM_UP:]
    for what, found in (("status events, 50/s", through), ("raw redis-py publish → listen, 50/s", raw)):
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            yield Row(LATENCY, f"{what}: {name}", "ms", [percentile(found, share) * 1000])


async def _listen(url: str, go: Callable[[], None]) -> list[float]:
    found: list[float] = []
    async with Redis.from_url(url) as redis, redis.pubsub() as pubsub:
        await pubsub.subscribe("peer")
        async for message in pubsub.listen():
            if message["type"] == "subscribe":
                go()
            else:
                found.append(time.time() - float(message["data"].split(b" ", 1)[0]))
                if len(found) == COUNT:
                    break
    return found


# -- Appends -------------------------------------------------------------------------------------------------------

Case = Callable[[str, int], Awaitable[float]]


def _rates(redis: RedisServer, runs: int, case: Case) -> list[float]:
    """Appends a second, by `runs` writers that each await their own."""
    return [EVENTS / anyio.run(case, redis.url, runs, backend_options={"use_uvloop": True}) for _ in range(ROUNDS)]


async def _append(url: str, runs: int) -> float:
    async with _bus(url) as bus:
        logs = [await _create(bus) for _ in range(runs)]

        async def write(frame: Frame) -> None:
            for seq in range(2, 2 + EVENTS // runs):
                await bus.append(frame.run, 1, [Frame(frame.run, frame.epoch, seq, EVENT)], "running")

        return await _together(write, logs)


async def _xadd_publish(url: str, runs: int) -> float:
    async with Redis.from_url(url) as redis:

        async def write(name: int) -> None:
            for _ in range(EVENTS // runs):
                await redis.xadd(f"peer:{name}", {"d": EVENT})
                await redis.publish(f"peer:{name}", EVENT)

        return await _together(write, list(range(runs)))


async def _together(write: Callable[[Any], Coroutine[Any, Any, None]], logs: list[Any]) -> float:
    start = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for log in logs:
            tasks.start_soon(write, log)
    return time.perf_counter() - start


# -- What it costs Redis ---------------------------------------------------------------------------------------------


def _cost(redis: RedisServer) -> Iterator[Row]:
    before = redis.info()
    anyio.run(_append, redis.url, 50, backend_options={"use_uvloop": True})
    after = redis.info()

    def grown(*names: str) -> float:
        return sum(float(after[name]) - float(before[name]) for name in names)

    cpu = grown("used_cpu_sys_main_thread", "used_cpu_user_main_thread")
    yield Row(COST, "CPU", "µs", [cpu / EVENTS * 1e6])
    yield Row(COST, "received from the hub", "bytes", [grown("total_net_input_bytes") / EVENTS])
    yield Row(COST, "memory, 200 bytes of it the event", "bytes", [grown("used_memory") / EVENTS])
    before = redis.info()
    anyio.run(_whole_runs, redis.url, backend_options={"use_uvloop": True})
    after = redis.info()
    meaning = "with all its index entries and a snapshot of 4 KiB"
    yield Row(COST, f"memory, a run of {RUN_EVENTS} events", "KiB", [grown("used_memory") / RUNS / 1024], meaning)


async def _whole_runs(url: str) -> None:
    async with _bus(url) as bus:
        for _ in range(RUNS):
            first = await _create(bus)
            for start in range(2, RUN_EVENTS + 1, 11):
                batch = [Frame(first.run, first.epoch, seq, EVENT) for seq in range(start, start + 11)]
                await bus.append(first.run, 1, batch, "running")
            await bus.save_snapshot(1, Snapshot(first.run, first.epoch, RUN_EVENTS, b"x" * 4096))


async def _create(bus: RedisBus) -> Frame:
    run, epoch = new_run_id(), new_epoch()
    first = Frame(run, epoch, 1, EVENT)
    await bus.create(
        NewRun(run=run, epoch=epoch, agent="a", principal="p", thread=None, created=time.time(), first=first)
    )
    return first


@asynccontextmanager
async def _bus(url: str) -> Any:
    bus = RedisBus(url, new_epoch(), prefix=new_epoch())
    async with anyio.create_task_group() as tasks:
        await tasks.start(bus.run)
        yield bus
        tasks.cancel_scope.cancel()
