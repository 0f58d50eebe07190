"""One event to 500 clients: deliveries a second that one core makes, beside peers that do only that."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import product
from time import perf_counter

from benchmarks import goals
from benchmarks.audience import HUB, audience
from benchmarks.processes import Server
from benchmarks.report import Row
from benchmarks.serving import EVENT_BYTES, MARK
from benchmarks.sockets import Watchers

WATCHERS, ROUNDS, SECONDS = 500, 3, 0.7
GROUP = f"Fan-out to {WATCHERS} watchers, {EVENT_BYTES}-byte events"
SIZES = (1, 32, 100)
PEERS = {
    HUB: "logged, folded, resumable; each encoded once, what is queued goes out in one write",
    "websockets": "websockets.broadcast(), one write for each client and message",
    "starlette": "await send_text() to one client after the other",
    "bare": "transport.write() of a ready frame to one client after the other: what this machine can do",
}
GOALS = {1: goals.SINGLY, 32: goals.BURSTS}


@dataclass
class Peer:
    """A server with its watchers, and what was measured of it: size of the burst → deliveries a second."""

    server: Server
    watchers: Watchers
    by_cpu: dict[int, list[float]] = field(default_factory=lambda: {size: [] for size in SIZES})
    by_clock: dict[int, list[float]] = field(default_factory=lambda: {size: [] for size in SIZES})

    def measure(self, size: int) -> None:
        deliveries, cpu, start = 0, self.server.cpu, perf_counter()
        while (passed := perf_counter() - start) < SECONDS:
            self.burst(size)
            deliveries += WATCHERS * size
        self.by_cpu[size].append(deliveries / (self.server.cpu - cpu))
        self.by_clock[size].append(deliveries / passed)

    def burst(self, size: int) -> None:
        """The next one begins when all watchers have the last: nobody falls behind."""
        self.server.go(size)
        self.watchers.count(MARK.encode(), WATCHERS * size)


def measure() -> Iterator[Row]:
    with ExitStack() as stack:
        peers = {name: _peer(stack, name) for name in PEERS}
        for size in SIZES:
            for peer in peers.values():
                peer.burst(size)
            _rounds(list(peers.values()), size)
    for size, (name, peer) in product(SIZES, peers.items()):
        yield Row(GROUP, f"{_named(size)}: {name}", "/s of CPU", peer.by_cpu[size], PEERS[name])
    for size in SIZES:
        for name in (HUB, "bare"):
            ratios = _ratios(peers[name].by_cpu[size], peers["websockets"].by_cpu[size])
            goal = GOALS.get(size) if name == HUB else None
            yield Row(f"{GROUP}, against websockets", f"{_named(size)}: {name}", "×", ratios, goal=goal)
    for size, (name, peer) in product(SIZES, peers.items()):
        meaning = "the watchers' own work, on another core, is in it" if name == HUB else ""
        yield Row(f"{GROUP}, by the clock", f"{_named(size)}: {name}", "/s", peer.by_clock[size], meaning)


def _rounds(peers: Sequence[Peer], size: int) -> None:
    """In turn, so that whatever disturbs the machine disturbs all of them."""
    for peer in [*peers] * ROUNDS:
        peer.measure(size)


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def _named(size: int) -> str:
    return "singly" if size == 1 else f"in bursts of {size}"


def _peer(stack: ExitStack, name: str) -> Peer:
    served = stack.enter_context(audience(name, WATCHERS))
    return Peer(served.server, stack.enter_context(closing(Watchers(served.sockets))))
