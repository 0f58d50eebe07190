"""One run of tokens to 200 clients: the CPU time that each delivery costs the hub, beside peers at the same pace.

A hub with little to do pays more for each delivery than one that fans out without a pause: caches are cold, and each
write wakes its reader. The peers pay for that, too.
"""

import time
from collections.abc import Iterator
from contextlib import closing

from benchmarks import goals
from benchmarks.audience import HUB, audience
from benchmarks.report import Row
from benchmarks.serving import MARK
from benchmarks.sockets import Watchers

CLIENTS, RATE, SECONDS, ROUNDS = 200, 50, 5, 3
EVENTS = RATE // 2
"""A second: tokens are gathered for up to 25 ms."""
PEERS = {
    "websockets": "websockets.broadcast() of 200 bytes, as often as the hub sends",
    "bare": "transport.write() of a ready frame to one client after the other: what this machine can do",
}
GROUP = f"A run of {RATE} tokens/s to {CLIENTS} clients"


def measure() -> Iterator[Row]:
    rounds = [_hub(CLIENTS) for _ in range(ROUNDS)]
    alone = [_hub(1) for _ in range(ROUNDS)]
    peers = {name: [_peer(name) for _ in range(ROUNDS)] for name in PEERS}
    yield Row(
        GROUP,
        "CPU of one delivery: agentcast",
        "µs",
        [cpu / deliveries * 1e6 for cpu, deliveries in rounds],
        "all that the hub does, the run included, for each token event at each client",
        goal=goals.TOKENS,
    )
    for name, found in peers.items():
        yield Row(GROUP, f"CPU of one delivery: {name}", "µs", [cpu / count * 1e6 for cpu, count in found], PEERS[name])
    yield Row(
        GROUP,
        "CPU of one event to one client",
        "µs",
        [cpu / deliveries * 1e6 for cpu, deliveries in alone],
        "in a process that does nothing else: of the deliveries above, each pays for a 200th of it",
    )
    events = [deliveries / CLIENTS / SECONDS for _, deliveries in rounds]
    yield Row(GROUP, "token events of agentcast", "1/s", events)


def _hub(clients: int) -> tuple[float, int]:
    """Seconds of CPU, and deliveries."""
    input = {"kind": "token", "rate": RATE, "count": RATE * SECONDS}
    with audience(HUB, clients, "steady", **input) as served, closing(Watchers(served.sockets)) as watchers:
        cpu = served.server.cpu
        served.server.go()
        received: list[list[bytes]] = [[] for _ in served.sockets]
        left = clients
        for number, _, data in watchers.chunks():
            received[number].append(data)
            left -= b'"run_end"' in data
            if not left:
                break
        cpu = served.server.cpu - cpu
    return cpu, sum(b"".join(chunks).count(b'"event":"token"') for chunks in received)


def _peer(name: str) -> tuple[float, int]:
    with audience(name, CLIENTS) as served, closing(Watchers(served.sockets)) as watchers:
        cpu, start = served.server.cpu, time.perf_counter()
        for number in range(EVENTS * SECONDS):
            time.sleep(max(0.0, start + number / EVENTS - time.perf_counter()))
            served.server.go()
            watchers.count(MARK.encode(), CLIENTS)
        return served.server.cpu - cpu, CLIENTS * EVENTS * SECONDS
