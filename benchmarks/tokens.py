"""One run of tokens to 200 clients: the CPU time that each delivery costs the hub."""

import time
from collections.abc import Iterator
from contextlib import closing

from benchmarks import goals
from benchmarks.audience import HUB, audience
from benchmarks.report import Row
from benchmarks.sockets import Watchers

CLIENTS, RATE, SECONDS, ROUNDS = 200, 50, 5, 3
GROUP = f"A run of {RATE} tokens/s to {CLIENTS} clients"


def measure() -> Iterator[Row]:
    rounds = [_round() for _ in range(ROUNDS)]
    yield Row(
        GROUP,
        "CPU of one delivery",
        "µs",
        [one["cpu"] / one["deliveries"] * 1e6 for one in rounds],
        "all that the hub does, the run included, for each token event at each client",
        goal=goals.TOKENS,
    )
    yield Row(GROUP, "token events", "1/s", [one["deliveries"] / CLIENTS / one["seconds"] for one in rounds])
    yield Row(GROUP, "CPU of the hub", "% of a core", [one["cpu"] / one["seconds"] * 100 for one in rounds])


def _round() -> dict[str, float]:
    input = {"kind": "token", "rate": RATE, "count": RATE * SECONDS}
    with audience(HUB, CLIENTS, "steady", **input) as served, closing(Watchers(served.sockets)) as watchers:
        cpu, start = served.server.cpu, time.perf_counter()
        served.server.go()
        received: list[list[bytes]] = [[] for _ in served.sockets]
        left = CLIENTS
        for number, _, data in watchers.chunks():
            received[number].append(data)
            left -= b'"run_end"' in data
            if not left:
                break
        seconds, cpu = time.perf_counter() - start, served.server.cpu - cpu
    deliveries = sum(b"".join(chunks).count(b'"event":"token"') for chunks in received)
    return {"cpu": cpu, "seconds": seconds, "deliveries": deliveries}
