"""How long the hub's loop stands still at most, while clients join a run whose state is as large as any can be."""

import time
from collections.abc import Iterator

from benchmarks.processes import running
from benchmarks.report import Row
from benchmarks.sockets import Socket

GROUP = "30 clients join the largest state at once"
CLIENTS, ROUNDS = 30, 3


def measure() -> Iterator[Row]:
    for shape, name in (("text", "long texts"), ("lists", "empty lists, a million of them")):
        rounds = [_round(shape) for _ in range(ROUNDS)]
        yield Row(GROUP, f"{name}: state", "MiB", [one["bytes"] / 2**20 for one in rounds], "as the snapshot has it")
        yield Row(
            GROUP,
            f"{name}: longest stall",
            "ms",
            [one["longest"] * 1000 for one in rounds],
            "the longest time in which one turn of the loop, or garbage collection, kept all else waiting",
        )
        yield Row(
            GROUP, f"{name}: all joined", "ms", [one["seconds"] * 1000 for one in rounds], "the last has its snapshot"
        )


def _round(shape: str) -> dict[str, float]:
    with running("benchmarks.hub") as hub:
        control = Socket(hub.port)
        control.send(op="start", agent="large", input={"shape": shape}, detail="progress")
        run = control.receive(lambda frame: frame.get("message") == "filled")["run"]
        sockets = [Socket(hub.port) for _ in range(CLIENTS)]
        hub.get("/stall")
        start = time.perf_counter()
        for socket in sockets:
            socket.send(op="subscribe", to={"run": run})
        sizes = [_wait_for_snapshot(socket) for socket in sockets]
        seconds = time.perf_counter() - start
        return {**hub.get("/stall"), "seconds": seconds, "bytes": max(sizes)}


def _wait_for_snapshot(socket: Socket) -> int:
    """The bytes that came until the snapshot was whole: it ends with the state, and nothing follows it."""
    while b'"type":"snapshot"' not in socket.buffer or not socket.buffer.endswith(b"}}"):
        socket.buffer += socket._read()
    return len(socket.buffer)
