"""What each new run costs the hub while others have 1,000 subscriptions that do not match it, against none."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

from benchmarks import goals
from benchmarks.audience import start_many
from benchmarks.processes import Server, running
from benchmarks.report import Row
from benchmarks.sockets import Socket

RULES, PER_CLIENT, RUNS, ROUNDS = 1_000, 100, 1_000, 5
GROUP = f"A new run, {RULES:,} subscriptions to other threads"
INPUT = {"tokens": 0, "interval": 0.0}
INTERVAL = 0.001
"""Seconds between two starts: each is announced by itself."""


def measure() -> Iterator[Row]:
    with ExitStack() as stack:
        without, among = (stack.enter_context(running("benchmarks.hub")) for _ in range(2))
        for client in range(RULES // PER_CLIENT):
            socket = stack.enter_context(closing(Socket(among.port)))
            for number in range(PER_CLIENT):
                socket.ask(op="subscribe", to={"thread": f"{client}-{number}"})
        for hub in (without, among):
            _cost(hub)
        costs = [(_cost(without), _cost(among)) for _ in range(ROUNDS)]
    meaning = "CPU of the hub, start to end of a run that emits one empty message"
    yield Row(GROUP, "a run, no subscriptions", "µs", [1e6 * one for one, _ in costs], meaning)
    yield Row(GROUP, "a run among them", "µs", [1e6 * one for _, one in costs])
    yield Row(GROUP, "difference", "µs", [1e6 * (more - less) for less, more in costs], goal=goals.RULES)


def _cost(hub: Server) -> float:
    """Seconds of CPU time for each run."""
    cpu = hub.cpu
    start_many(hub, RUNS, "stream", INPUT, INTERVAL)
    while hub.get("/active")["active"]:
        time.sleep(0.05)
    return (hub.cpu - cpu) / RUNS
