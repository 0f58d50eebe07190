"""How long the hub's loop stands still at most, while 100 runs stream to one watcher of everything."""

import time
from collections.abc import Iterator

from benchmarks.processes import Server, running
from benchmarks.report import Row
from benchmarks.sockets import Socket, Watchers

GROUP = "100 runs stream to one watcher of everything"
RUNS, ROUNDS = 100, 3
PACED = {"tokens": 200, "interval": 0.02}
FLAT_OUT = {"tokens": 2_000, "interval": 0.0}


def measure() -> Iterator[Row]:
    for name, input in (("50 tokens/s each", PACED), ("as fast as they are let", FLAT_OUT)):
        rounds = [_round(input) for _ in range(ROUNDS)]
        yield Row(
            GROUP,
            f"{name}: longest stall",
            "ms",
            [one["longest"] * 1000 for one in rounds],
            "the longest time in which one turn of the loop, or garbage collection, kept all else waiting",
        )
        yield Row(
            GROUP,
            f"{name}: stall p99",
            "ms",
            [one["p99"] * 1000 for one in rounds],
            "99 % of the wake-ups of a 5 ms ticker came less late",
        )
        yield Row(
            GROUP,
            f"{name}: tokens",
            "1/s",
            [RUNS * input["tokens"] / one["seconds"] for one in rounds],
            "what the agents emitted",
        )
        yield Row(
            GROUP,
            f"{name}: events",
            "1/s",
            [one["events"] / one["seconds"] for one in rounds],
            "what came of it in the logs (tokens are gathered), all of it encoded, folded and sent",
        )


def _round(input: dict[str, float]) -> dict[str, float]:
    with running("benchmarks.hub") as hub:
        watcher, control = Socket(hub.port), Socket(hub.port)
        watcher.ask(op="subscribe", to={"all": True})
        hub.get("/stall")
        start = time.perf_counter()
        for _ in range(RUNS):
            control.send(op="start", agent="stream", input=input, subscribe=False)
        _wait_for_the_ends(watcher)
        seconds = time.perf_counter() - start
        return {**hub.get("/stall"), "seconds": seconds, "events": _events(hub)}


def _wait_for_the_ends(watcher: Socket) -> None:
    """Each run ends with an event, or, if the watcher was too slow for it, with a snapshot of what is done."""
    left, tail = RUNS, b""
    for _, _, data in Watchers([watcher]).chunks():
        text = tail + data
        for end in (b'"event":"run_end"', b'"status":"done"'):
            left -= text.count(end) - tail.count(end)
        if left <= 0:
            return
        tail = text[-16:]


def _events(hub: Server) -> int:
    runs = hub.get(f"/v1/runs?limit={RUNS}")["runs"]
    assert {run["status"] for run in runs} == {"done"}, "a run failed"
    return sum(run["seq"] for run in runs)
