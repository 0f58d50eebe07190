"""From `emit` to the client: an event's own `ts` against the time at which a watcher has its bytes, on one clock."""

from collections.abc import Iterator

import orjson

from benchmarks.processes import Server, running
from benchmarks.report import Row, percentile
from benchmarks.sockets import Socket, Watchers, cut

GROUP = "Latency, emit → client"
RATE, COUNT, WARM_UP = 50.0, 400, 10
WATCHERS = (1, 100)
_MEANING = {
    "status": "the whole way: channel, log, fold, encoding, hub, socket",
    "token": "as above, and up to 25 ms in which tokens are gathered, by design",
}


def measure() -> Iterator[Row]:
    for kind in ("status", "token"):
        for watchers in WATCHERS:
            with running("benchmarks.hub") as hub:
                found = latencies(hub, hub.port, kind, watchers)
            many = f"{watchers} watcher{'s' * (watchers > 1)}"
            for name, value in (
                ("p50", percentile(found, 0.5)),
                ("p99", percentile(found, 0.99)),
                ("max", max(found)),
            ):
                meaning = _MEANING[kind] if name == "p50" else ""
                yield Row(GROUP, f"{kind} events, {RATE:g}/s, {many}: {name}", "ms", [value * 1000], meaning)


def latencies(hub: Server, port: int, kind: str, watchers: int) -> list[float]:
    """Seconds from emit, in a run of `hub`, to clients of the hub at `port`."""
    control = Socket(hub.port)
    input = {"kind": kind, "rate": RATE, "count": COUNT}
    run = control.ask(op="start", agent="steady", input=input, subscribe=False)["run"]
    sockets = [Socket(port) for _ in range(watchers)]
    for socket in sockets:
        socket.ask(op="subscribe", to={"run": run}, since={run: {"seq": 0}})
        socket.receive(lambda frame: frame.get("event") == "run_start")
    hub.go()
    received = _receive(sockets)
    found = []
    for socket, chunks in zip(sockets, received, strict=True):
        buffer = socket.buffer
        for now, data in chunks:
            buffer += data
            events = [orjson.loads(frame) for frame in cut(buffer)]
            found += [now - event["ts"] for event in events if event.get("event") == kind][-COUNT:]
    assert len(found) > watchers * COUNT / 4, "events are missing"
    return found[WARM_UP * watchers :]


def _receive(sockets: list[Socket]) -> list[list[tuple[float, bytes]]]:
    """What each socket receives, and when, until all have the run's end. Looked at only afterwards."""
    received: list[list[tuple[float, bytes]]] = [[] for _ in sockets]
    watching = Watchers(sockets)
    left = len(sockets)
    for number, now, data in watching.chunks():
        received[number].append((now, data))
        left -= b'"run_end"' in data
        if not left:
            watching.close()
            return received
    raise AssertionError
