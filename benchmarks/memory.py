"""What an open connection costs that does nothing."""

from collections.abc import Iterator

from benchmarks.processes import running
from benchmarks.report import Row
from benchmarks.sockets import Socket

GROUP = "Memory"
STEPS, ROUNDS = (1_000, 2_000), 3


def measure() -> Iterator[Row]:
    rounds = [_round() for _ in range(ROUNDS)]
    empty = [one[0] / 2**20 for one in rounds]
    yield Row(GROUP, "hub without connections", "MiB", empty, "resident; most of it is DSPy and what it imports")
    for step in STEPS:
        each = [(one[step] - one[0]) / step / 1024 for one in rounds]
        meaning = "growth of the hub's resident memory per open WebSocket; the kernel's buffers not counted"
        yield Row(GROUP, f"each of {step:,} idle connections", "KiB", each, meaning)


def _round() -> dict[int, int]:
    """Connections → resident bytes."""
    with running("benchmarks.hub") as hub:
        for socket in [_connected(hub.port) for _ in range(20)]:  # code paths and pools that the first ones pay for
            socket.close()
        hub.get("/healthz")
        resident = {0: hub.rss}
        sockets: list[Socket] = []
        for step in STEPS:
            sockets += [_connected(hub.port) for _ in range(step - len(sockets))]
            hub.get("/healthz")
            resident[step] = hub.rss
        for socket in sockets:
            socket.close()
        return resident


def _connected(port: int) -> Socket:
    socket = Socket(port)
    socket.receive(lambda frame: frame["type"] == "hello")
    return socket
