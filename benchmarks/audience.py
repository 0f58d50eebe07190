"""A server and the clients that it sends the same frames to: a hub whose clients follow one run, or a peer."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

from benchmarks.processes import Server, running
from benchmarks.sockets import Socket

HUB = "agentcast"


class Audience:
    """The clients of one server. `run` is the run that they follow, None with a peer."""

    def __init__(self, server: Server, run: str | None) -> None:
        self.server = server
        self.run = run
        self.sockets: list[Socket] = []

    def grow(self, clients: int) -> None:
        """Connect more clients; they have received all there is when this returns."""
        for _ in range(clients):
            socket = Socket(self.server.port)
            self.sockets.append(socket)
            if self.run is not None:
                socket.ask(op="subscribe", to={"run": self.run}, since={self.run: {"seq": 0}})
                socket.receive(lambda frame: frame.get("event") == "run_start")


@contextmanager
def audience(name: str, clients: int, agent: str = "bursts", **input: Any) -> Iterator[Audience]:
    """`clients` of the hub, where they follow a run of `agent`, or of a peer (see `peers`)."""
    with running(*["benchmarks.hub"] if name == HUB else ["benchmarks.peers", name]) as server:
        run = start(server, agent, input) if name == HUB else None
        served = Audience(server, run)
        try:
            served.grow(clients)
            yield served
        finally:
            for socket in served.sockets:
                socket.close()


def start(server: Server, agent: str, input: dict[str, Any]) -> str:
    """The id of a new run."""
    return start_many(server, 1, agent, input)[0]


def start_many(server: Server, count: int, agent: str, input: dict[str, Any], interval: float = 0.0) -> list[str]:
    """The ids of new runs, each started `interval` seconds after the other."""
    query = urlencode({"count": count, "agent": agent, "input": json.dumps(input), "interval": interval})
    runs: list[str] = server.get(f"/start?{query}")["runs"]
    return runs
