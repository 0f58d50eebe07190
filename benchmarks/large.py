"""30 clients join a run whose state is as large as it may be: how long the hub's loop stands still at most."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

from benchmarks import goals
from benchmarks.audience import start
from benchmarks.processes import running
from benchmarks.report import Row
from benchmarks.serving import MARK
from benchmarks.sockets import Socket, Watchers

CLIENTS, ROUNDS = 30, 3
GROUP = f"{CLIENTS} clients join a run of the largest state at once"
SHAPES = {"text": "long texts", "lists": "empty lists, a million of them"}
BEGINNING = b'"type":"snapshot"'


def measure() -> Iterator[Row]:
    for shape, name in SHAPES.items():
        rounds = [_round(shape) for _ in range(ROUNDS)]
        stalls = [one["longest"] * 1000 for one in rounds]
        goal = goals.LARGE if shape == "text" else None
        yield Row(GROUP, f"{name}: longest stall", "ms", stalls, "of a 5 ms ticker in the hub's loop", goal=goal)
        yield Row(GROUP, f"{name}: until all have it", "s", [one["seconds"] for one in rounds])
        sizes = [one["bytes"] / 2**20 for one in rounds]
        yield Row(GROUP, f"{name}: sent to each", "MiB", sizes, "the state, and one event")


def _round(shape: str) -> dict[str, float]:
    with running("benchmarks.hub") as hub, ExitStack() as stack:
        run = start(hub, "large", {"shape": shape})
        with closing(Socket(hub.port)) as first:
            first.ask(op="subscribe", to={"run": run}, detail="progress")
            first.receive(
                lambda frame: "complete" in (frame.get("message"), frame.get("state", {}).get("status_message"))
            )
        sockets = [stack.enter_context(closing(Socket(hub.port))) for _ in range(CLIENTS)]
        hub.get("/stall")
        start_time = time.perf_counter()
        for socket in sockets:
            socket.send(op="subscribe", to={"run": run})
        received = _count(sockets, BEGINNING)
        hub.go()  # the event comes after the state
        received += _count(sockets, MARK.encode())
        seconds = time.perf_counter() - start_time
        return {**hub.get("/stall"), "seconds": seconds, "bytes": received / CLIENTS}


def _count(sockets: list[Socket], text: bytes) -> int:
    """Read until each socket has received `text`; gives how many bytes came."""
    received, waiting, tails = 0, set(range(len(sockets))), [b""] * len(sockets)
    with closing(Watchers(sockets)) as watchers:
        for number, _, data in watchers.chunks():
            received += len(data)
            if text in tails[number] + data:
                waiting.discard(number)
                if not waiting:
                    return received
            tails[number] = data[-len(text) :]
    raise AssertionError
