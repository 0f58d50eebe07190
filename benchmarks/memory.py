"""What an open connection costs that does nothing: a client of the hub that follows a run, beside one of a peer."""

from collections.abc import Iterator

from benchmarks import goals
from benchmarks.audience import HUB, audience
from benchmarks.report import Row

CLIENTS, WARM_UP, ROUNDS = 3_000, 50, 2
GROUP = f"Memory, {CLIENTS:,} idle connections"
PEERS = {HUB: "each follows a run in which nothing happens", "websockets": "each is in the set that is broadcast to"}


def measure() -> Iterator[Row]:
    rounds = {name: [_round(name) for _ in range(ROUNDS)] for name in PEERS}
    empty = [before / 2**20 for before, _ in rounds[HUB]]
    yield Row(GROUP, "hub before them", "MiB", empty, "resident; most of it is DSPy and what it imports")
    for name, meaning in PEERS.items():
        each = [(after - before) / CLIENTS / 1024 for before, after in rounds[name]]
        meaning += "; growth of the server's resident memory, the kernel's buffers not counted"
        yield Row(GROUP, f"each: {name}", "KiB", each, meaning, goal=goals.IDLE if name == HUB else None)


def _round(name: str) -> tuple[int, int]:
    """Resident bytes before and after the clients; a few come first, and pay for code paths and pools."""
    with audience(name, WARM_UP) as served:
        before = served.server.rss
        served.grow(CLIENTS)
        return before, served.server.rss
