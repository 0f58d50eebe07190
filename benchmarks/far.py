"""1,001 active runs, and a Redis that is 2 ms away: one client of another hub subscribes to everything."""

import time
from collections.abc import Iterator
from contextlib import closing

import orjson

from benchmarks import goals
from benchmarks.audience import start_many
from benchmarks.processes import RedisServer, running, running_redis
from benchmarks.report import Row
from benchmarks.sockets import Socket, cut

RUNS, DELAY, ROUNDS = 1_001, 0.002, 3
GROUP = f"{RUNS:,} active runs of another hub, Redis {DELAY * 1000:g} ms away each way: subscribe to all"
WAITING = {"kind": "status", "rate": 1.0, "count": 1}


def measure() -> Iterator[Row]:
    with running_redis() as redis, running("benchmarks.hub", AGENTCAST_REDIS=redis.url) as owner:
        runs = set(start_many(owner, RUNS, "steady", WAITING))
        with running("benchmarks.proxy", str(redis.port), str(DELAY)) as proxy:
            url = RedisServer(proxy.port).url
            rounds = [_round(url, runs) for _ in range(ROUNDS)]
    yield Row(GROUP, "reply", "s", [replied for replied, _ in rounds])
    meaning = "a snapshot of each has come"
    yield Row(GROUP, "all shown", "s", [shown for _, shown in rounds], meaning, goal=goals.FAR)


def _round(url: str, runs: set[str]) -> tuple[float, float]:
    """Seconds from the subscribe to the reply, and to the last run's snapshot, by a hub that follows nothing yet."""
    with running("benchmarks.hub", AGENTCAST_REDIS=url) as hub, closing(Socket(hub.port)) as socket:
        start = time.perf_counter()
        result = socket.ask(op="subscribe", to={"all": True})
        replied = time.perf_counter()
        assert {one["run"] for one in result["runs"]} == runs
        left = set(runs)
        while left:
            for frame in map(orjson.loads, cut(socket.buffer)):
                if frame["type"] == "snapshot":
                    left.discard(frame["run"])
            if left:
                socket.fill()
        return replied - start, time.perf_counter() - start
