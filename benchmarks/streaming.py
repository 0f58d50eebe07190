"""The bridge from DSPy: what streaming costs, what it carries, and what becomes of scenarios in which DSPy freezes."""

import asyncio
import functools
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import anyio
import dspy
from dspy.streaming import StreamListener

from agentcast.agents.base import Emitter
from agentcast.agents.context import carrying, current
from agentcast.agents.events import Status
from agentcast.agents.streaming import stream_events, streamify
from benchmarks.freezing import SCENARIOS, lm
from benchmarks.report import Row, percentile

ROUNDS = 3
COST = "Streaming a run of 270 tokens, on top of the same run with a sink that drops everything"
LOAD = "200 runs × 300 events, from tasks, worker threads, foreign threads and second event loops"
FREEZING = "Scenarios that freeze dspy.streamify (benchmarks/freezing.py)"
REPEAT, RUNS_EACH, PACE = 149, 20, 0.002
RUNS, EVENTS = 200, 300


def measure() -> Iterator[Row]:
    yield from _cost()
    yield from _load()
    yield from _scenarios()


# -- What it costs -----------------------------------------------------------------------------------------------------


class Drop:
    """A sink that drops everything."""

    async def send(self, chunk: Any) -> None:
        pass


async def _dropped(program: Any) -> None:
    with dspy.context(send_stream=Drop()):
        await program.acall(question="Q-1-Z")


async def _items(make: Callable[[], Any], program: Any) -> None:
    async for _ in make():
        pass


def _ways(program: Any) -> dict[str, Callable[[], Awaitable[None]]]:
    raw = streamify(program, is_async_program=True)
    heard = streamify(program, stream_listeners=[StreamListener("answer")], is_async_program=True)
    inputs = {"question": "Q-1-Z"}
    return {
        "dropped": functools.partial(_dropped, program),
        "streamify, raw chunks": functools.partial(_items, functools.partial(raw, **inputs), program),
        "streamify, a listener": functools.partial(_items, functools.partial(heard, **inputs), program),
        "stream_events": functools.partial(_items, functools.partial(stream_events, program, inputs), program),
    }


def _cost() -> Iterator[Row]:
    fast = [anyio.run(_timed, 0.0, RUNS_EACH) for _ in range(ROUNDS)]
    paced = [anyio.run(_timed, PACE, 2) for _ in range(ROUNDS)]
    base = [round_["dropped"][0] for round_ in fast]
    yield Row(COST, "dropped: CPU of a run", "ms", [value * 1000 for value in base], "an LM that answers at once")
    for way in ("streamify, raw chunks", "streamify, a listener", "stream_events"):
        extra = [(round_[way][0] - round_["dropped"][0]) * 1000 for round_ in fast]
        yield Row(COST, f"{way}: more CPU", "ms", extra, "an LM that answers at once")
        wall = [(round_[way][1] / round_["dropped"][1] - 1) * 100 for round_ in paced]
        yield Row(COST, f"{way}: more wall time", "%", wall, "an LM that sends a token every 2 ms")


async def _timed(pause: float, runs: int) -> dict[str, tuple[float, float]]:
    """Way → CPU and wall seconds of a run. The ways take turns, so that the machine's moods hit them alike."""
    program = dspy.Predict("question -> answer")
    seconds: dict[str, list[tuple[float, float]]] = {}
    with dspy.context(lm=lm(pause, REPEAT), disable_history=True):
        for _ in range(runs):
            for way, go in _ways(program).items():
                cpu, wall = time.process_time(), time.perf_counter()
                await go()
                seconds.setdefault(way, []).append((time.process_time() - cpu, time.perf_counter() - wall))
    return {way: (median(cpu for cpu, _ in all_), median(wall for _, wall in all_)) for way, all_ in seconds.items()}


# -- What it carries ---------------------------------------------------------------------------------------------------


class Producers:
    """The ways in which one run emits numbered events."""

    def __init__(self, emit: Emitter, each: int, seed: int) -> None:
        self.emit = emit
        self.each = each
        self.chance = random.Random(seed)

    async def awaited(self, name: str) -> None:
        for number in range(self.each):
            await self.emit.send(Status(message=f"{name} {number}"))
            if self.chance.random() < 0.1:
                await asyncio.sleep(self.chance.random() * 0.002)

    async def at_once(self, name: str) -> None:
        for number in range(self.each):
            self.emit.nowait(Status(message=f"{name} {number}"))
            if self.chance.random() < 0.1:
                await asyncio.sleep(0)

    def blocking(self, name: str) -> None:
        for number in range(self.each):
            self.emit.nowait(Status(message=f"{name} {number}"))
            if self.chance.random() < 0.02:
                time.sleep(self.chance.random() * 0.001)

    def second_loop(self, name: str) -> None:
        asyncio.run(self.awaited(name))


class Busy(dspy.Module):  # type: ignore[misc]
    """Emits from everywhere at once, at random times."""

    def __init__(self, pool: ThreadPoolExecutor, each: int) -> None:
        self.pool = pool
        self.each = each

    async def aforward(self, seed: int) -> int:
        emitter = current().emitter
        assert emitter is not None
        producers = Producers(emitter, self.each, seed)
        foreign = threading.Thread(target=carrying(producers.blocking), args=("foreign thread",))
        foreign.start()
        async with anyio.create_task_group() as group:
            group.start_soon(producers.awaited, "awaited")
            group.start_soon(producers.at_once, "at once")
            group.start_soon(self._in_pool, producers.blocking, "worker thread")
            group.start_soon(self._in_pool, producers.second_loop, "second loop")
        await self._in_pool(foreign.join)
        return seed

    async def _in_pool(self, call: Callable[..., Any], *args: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(self.pool, carrying(call), *args)


WAYS = ["at once", "awaited", "foreign thread", "second loop", "worker thread"]


class LoadError(Exception):
    """Events were lost, doubled or out of order."""


async def load(runs: int = RUNS, events: int = EVENTS, apart: float = 0.0) -> list[float]:
    """Carry `runs` × `events`, the runs starting `apart` seconds from one another; gives how late a 5 ms ticker woke up
    each time, in seconds.

    :raises LoadError: an event was lost, doubled or out of order.
    """
    late: list[float] = []
    with ThreadPoolExecutor(32) as pool:
        program = Busy(pool, events // len(WAYS))
        async with anyio.create_task_group() as ticking:
            ticking.start_soon(_tick, late)
            async with anyio.create_task_group() as group:
                for seed in range(runs):
                    group.start_soon(_watch, program, seed, seed * apart)
            ticking.cancel_scope.cancel()
    return late


async def _watch(program: Busy, seed: int, delay: float) -> None:
    await asyncio.sleep(delay)
    seen = dict.fromkeys(WAYS, 0)
    stream = stream_events(program, {"seed": seed})
    async for event in stream:
        if isinstance(event, Status):
            name, _, number = event.message.rpartition(" ")
            if seen[name] != int(number):
                raise LoadError(f"run {seed}: {event.message} where {seen[name]} was due")
            seen[name] += 1
    if set(seen.values()) != {program.each} or stream.outcome is None or stream.outcome.prediction != seed:
        raise LoadError(f"run {seed} ended with {seen} and {stream.outcome}")


async def _tick(late: list[float]) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(0.005)
        late.append(time.perf_counter() - before - 0.005)


def _load() -> Iterator[Row]:
    seconds, stalls = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        anyio.run(load, backend_options={"use_uvloop": True})
        seconds.append(time.perf_counter() - start)
        stalls.append(anyio.run(load, RUNS, EVENTS, 0.01, backend_options={"use_uvloop": True}))
    meaning = "how late a 5 ms ticker woke up while a run started every 10 ms; threads and loops share one interpreter"
    yield Row(
        LOAD, "events, all runs at once", "1/s", [RUNS * EVENTS / each for each in seconds], "order and count checked"
    )
    yield Row(LOAD, "stall p99", "ms", [percentile(late, 0.99) * 1000 for late in stalls], meaning)
    yield Row(LOAD, "longest stall", "ms", [max(late) * 1000 for late in stalls], meaning)


# -- What becomes of the scenarios -------------------------------------------------------------------------------------


def _scenarios() -> Iterator[Row]:
    for name in SCENARIOS:
        for which in ("ours", "dspy"):
            result = scenario(which, name)
            outcome = "unfinished" if not result["finished"] else "right" if result["right"] else "wrong"
            what = f"{name}, {which}: {outcome}, {result['items']} items, longest stall"
            yield Row(FREEZING, what, "ms", [result["stall"]])


def scenario(which: str, name: str) -> dict[str, Any]:
    """One scenario in a process of its own; see `benchmarks.freezing`."""
    command = [sys.executable, "-m", "benchmarks.freezing", which, name]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, timeout=60).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result
