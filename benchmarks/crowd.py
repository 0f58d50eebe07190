"""2,000 clients reconnect at once onto 20 runs, each with its position: when all are live, and who waits meanwhile."""

import selectors
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import orjson

from benchmarks import goals
from benchmarks.audience import start_many
from benchmarks.processes import Server, running
from benchmarks.report import Row
from benchmarks.sockets import Socket, cut

CLIENTS, RUNS, ROUNDS = 2_000, 20, 3
RATE, COUNT, MISSED = 4.0, 28, 3
"""Events of each run, a second and in all, and how many of them its clients have missed when they return."""
GROUP = f"{CLIENTS:,} clients reconnect at once onto {RUNS} runs"
STEADY = {"kind": "status", "rate": RATE, "count": COUNT}


@dataclass(slots=True, eq=False)
class Client:
    """One that returns: it connects, subscribes with its position, and checks that it misses nothing."""

    socket: Socket
    run: str
    epoch: str
    seq: int
    head: int | None = None
    """Where the log stood, once the reply has said it."""
    ended: bool = False

    @property
    def live(self) -> bool:
        return self.head is not None and self.seq >= self.head

    def subscribe(self) -> None:
        since = {self.run: {"epoch": self.epoch, "seq": self.seq}}
        self.socket.send(id=1, op="subscribe", to={"run": self.run}, since=since)

    def take(self, frame: dict[str, Any]) -> None:
        match frame["type"]:
            case "reply":
                assert frame["ok"], frame
                (run,) = frame["result"]["runs"]
                assert run["recovered"], "a client could not go on from its position"
                self.head = run["seq"]
            case "event":
                self.seq += 1
                assert frame["seq"] == self.seq, "an event was lost, or came twice"
                self.ended = frame["event"] == "run_end"


def measure() -> Iterator[Row]:
    rounds = [_round() for _ in range(ROUNDS)]
    meaning = "the connections and handshakes included, and the clients' own work, on another core; nothing is lost"
    yield Row(GROUP, "until all are live", "s", [one["live"] for one in rounds], meaning)
    slowest = [1000 * one["slowest"] for one in rounds]
    meaning = "to a client that pings a hundred times a second"
    yield Row(GROUP, "slowest reply to another client", "ms", slowest, meaning, goal=goals.CROWD)


def _round() -> dict[str, float]:
    with running("benchmarks.hub") as hub, running("benchmarks.pinger", str(hub.port), with_servers=False) as pinger:
        runs = start_many(hub, RUNS, "steady", STEADY)
        for _ in runs:
            hub.go()
        states = [_later(hub, run, MISSED + 4) for run in runs]
        _slowest(pinger)
        start = time.perf_counter()
        clients = _return(hub, states)
        try:
            live = _read_until(clients, "live") - start
            slowest = _slowest(pinger)
            _read_until(clients, "ended")
        finally:
            for client in clients:
                client.socket.close()
        return {"live": live, "slowest": slowest}


def _later(hub: Server, run: str, seq: int) -> dict[str, Any]:
    """A run's snapshot, once its log has got that far."""
    while True:
        state: dict[str, Any] = hub.get(f"/v1/runs/{run}")
        if state["seq"] >= seq:
            return state
        time.sleep(0.1)


def _return(hub: Server, states: list[dict[str, Any]]) -> list[Client]:
    """All connect and send their handshakes before the first is answered."""
    clients = []
    for number in range(CLIENTS):
        state = states[number % RUNS]
        socket = Socket(hub.port, wait=False)
        clients.append(Client(socket, state["run"], state["epoch"], state["seq"] - MISSED))
    return clients


def _read_until(clients: list[Client], done: str) -> float:
    """Read until all are `done`; gives the time of that."""
    waiting = {client for client in clients if not getattr(client, done)}
    with closing(selectors.DefaultSelector()) as selector:
        for client in clients:
            selector.register(client.socket.raw, selectors.EVENT_READ, client)
        while waiting:
            ready = selector.select(30.0)
            assert ready, f"{len(waiting)} clients are not {done} after 30 s"
            for key, _ in ready:
                _read(client := key.data)
                if getattr(client, done):
                    waiting.discard(client)
    return time.perf_counter()


def _read(client: Client) -> None:
    socket = client.socket
    opened = socket.open
    socket.fill()
    if not opened and socket.open:
        client.subscribe()
    if socket.open:
        for frame in cut(socket.buffer):
            client.take(orjson.loads(frame))


def _slowest(pinger: Server) -> float:
    """Seconds of its slowest reply since this was asked last."""
    pinger.go()
    return float(pinger.line())
