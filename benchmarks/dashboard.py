"""10,000 runs are active and change rarely: what they cost the hub, without a client and with one on summaries."""

import time
from collections.abc import Iterator
from contextlib import closing

import orjson

from benchmarks import goals
from benchmarks.audience import start_many
from benchmarks.processes import Server, running
from benchmarks.report import Row
from benchmarks.sockets import Socket, Watchers, cut

RUNS, EVERY, SECONDS = 10_000, 10.0, 7.0
INTERVAL, SETTLING = 0.001, 2.0
"""Seconds between two starts, which come much faster than in any use, and after the last."""
GROUP = f"{RUNS:,} active runs, each with a new status every {EVERY:g} s"
STALL = "the longest of a 5 ms ticker in the hub's loop"


def measure() -> Iterator[Row]:
    with running("benchmarks.hub") as hub:
        start_many(hub, RUNS, "rare", {"every": EVERY}, INTERVAL)
        time.sleep(SETTLING)
        hub.get("/stall")
        cpu = hub.cpu
        time.sleep(SECONDS)
        longest = hub.get("/stall")["longest"]
        yield Row(GROUP, "no client: longest stall", "ms", [longest * 1000], STALL, goal=goals.ACTIVE)
        yield Row(GROUP, "no client: CPU", "% of a core", [100 * (hub.cpu - cpu) / SECONDS])
        yield from _with_client(hub)


def _with_client(hub: Server) -> Iterator[Row]:
    with closing(Socket(hub.port)) as socket:
        cpu, start = hub.cpu, time.perf_counter()
        detail, reply = _subscribe(socket)
        replied = time.perf_counter()
        shown, received = _watch(socket, replied + SECONDS)
        seconds = time.perf_counter() - start
        longest = hub.get("/stall")["longest"]
        name = f"a client on detail {detail}"
        goal = goals.DASHBOARD if detail == "summary" else None
        yield Row(GROUP, f"{name}: longest stall", "ms", [longest * 1000], "the join included", goal=goal)
        yield Row(GROUP, f"{name}: CPU", "% of a core", [100 * (hub.cpu - cpu) / seconds])
    yield Row(GROUP, f"{name}: reply", "s", [replied - start])
    yield Row(GROUP, f"{name}: runs shown", "", [len(shown)], f"truncated: {reply.get('truncated', False)}")
    yield Row(GROUP, f"{name}: until the last of them", "s", [max(shown.values(), default=start) - start])
    yield Row(GROUP, f"{name}: received", "KiB/s", [received / seconds / 1024])


def _subscribe(socket: Socket) -> tuple[str, dict[str, object]]:
    """The detail that the hub takes, and the result of the subscription."""
    for detail in ("summary", "progress"):
        socket.send(op="subscribe", to={"all": True}, detail=detail)
        reply = socket.receive(lambda frame: frame["type"] == "reply")
        if reply["ok"]:
            return detail, reply["result"]
    raise AssertionError(reply)


def _watch(socket: Socket, until: float) -> tuple[dict[str, float], int]:
    """When each run was first shown, and the bytes that came."""
    shown: dict[str, float] = {}
    received = 0
    with closing(Watchers([socket])) as watchers:
        for _, _, data in watchers.chunks():
            received += len(data)
            socket.buffer += data
            now = time.perf_counter()
            for frame in map(orjson.loads, cut(socket.buffer)):
                for one in frame["runs"] if frame["type"] == "summary" else [frame]:
                    shown.setdefault(one.get("run", ""), now)
            if now > until:
                shown.pop("", None)
                return shown, received
    raise AssertionError
