"""One event to 500 clients: deliveries a second that one core makes, beside peers that do only that."""

import time
from collections.abc import Iterator

from benchmarks.processes import Server, running
from benchmarks.report import Row
from benchmarks.serving import EVENT_BYTES, MARK
from benchmarks.sockets import Socket, Watchers

WATCHERS, ROUNDS, SECONDS = 500, 3, 1.0
GROUP = f"Fan-out to {WATCHERS} watchers, {EVENT_BYTES}-byte events, one core"
SIZES = (1, 10, 100)
PEERS = {
    "agentcast": "logged, folded, resumable; each encoded once, what is queued goes out in one write",
    "websockets": "websockets.broadcast(): one write per client and message",
    "starlette": "await send_text() to one client after the other",
}


def measure() -> Iterator[Row]:
    """Closed loop: the next burst is sent when all watchers have the last one, so that nobody falls behind."""
    for size in SIZES:
        for peer, meaning in PEERS.items():
            name = "singly" if size == 1 else f"in bursts of {size}"
            yield Row(GROUP, f"{name}: {peer}", "deliveries/s", _rounds(peer, size), meaning)


def _rounds(peer: str, size: int) -> list[float]:
    command = ["benchmarks.hub"] if peer == "agentcast" else ["benchmarks.peers", peer, str(size)]
    with running(*command) as server:
        sockets = [Socket(server.port) for _ in range(WATCHERS)]
        if peer == "agentcast":
            _subscribe(server, sockets, size)
        watchers = Watchers(sockets)
        _burst(server, watchers, size)
        rounds = [_round(server, watchers, size) for _ in range(ROUNDS)]
        watchers.close()
        for socket in sockets:
            socket.close()
        return rounds


def _subscribe(server: Server, sockets: list[Socket], size: int) -> None:
    run = sockets[0].ask(op="start", agent="bursts", input={"size": size}, subscribe=False)["run"]
    for socket in sockets:
        socket.ask(op="subscribe", to={"run": run}, since={run: {"seq": 0}})
        socket.receive(lambda frame: frame.get("event") == "run_start")


def _round(server: Server, watchers: Watchers, size: int) -> float:
    deliveries = 0
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < SECONDS:
        _burst(server, watchers, size)
        deliveries += WATCHERS * size
    return deliveries / passed


def _burst(server: Server, watchers: Watchers, size: int) -> None:
    server.go()
    watchers.count(MARK.encode(), WATCHERS * size)
