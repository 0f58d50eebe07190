"""20 events a second to 500 watchers: how long after each is emitted they have it, beside `websockets.broadcast`."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, closing
from time import perf_counter, sleep

from benchmarks import goals
from benchmarks.audience import HUB, Audience, audience
from benchmarks.report import Row, percentile
from benchmarks.serving import MARK
from benchmarks.sockets import Watchers

WATCHERS, RATE, COUNT, ROUNDS = 500, 20, 80, 3
GROUP = f"{RATE} events/s to {WATCHERS} watchers, emit → client"
PEERS = (HUB, "websockets")
SHARES = {"p50": 0.5, "p99": 0.99}
GOALS = {"p50": goals.PACE_P50, "p99": goals.PACE_P99}
_SENT = re.compile(rb'(?:"ts":|#)(\d+\.\d+)')
"""The Unix time at which the hub's agent emitted the event, or a peer began to send."""


def measure() -> Iterator[Row]:
    rounds: dict[str, list[list[list[float]]]] = {name: [] for name in PEERS}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(audience(name, WATCHERS)) for name in PEERS}
        for served in servers.values():
            _events(served, COUNT // 4)
        for name in [*PEERS] * ROUNDS:  # in turn, so that what disturbs the machine disturbs both
            rounds[name].append(_events(servers[name], COUNT))
    for whose, of in (("all watchers", _all), ("last watcher", _last)):
        for share in SHARES:
            found = {name: [percentile(of(one), SHARES[share]) for one in rounds[name]] for name in PEERS}
            for name in PEERS:
                yield Row(GROUP, f"{whose}, {share}: {name}", "ms", [value * 1000 for value in found[name]])
            ratios = [ours / theirs for ours, theirs in zip(*found.values(), strict=True)]
            goal = GOALS[share] if whose == "all watchers" else None
            yield Row(GROUP, f"{whose}, {share}: ratio", "×", ratios, goal=goal)


def _all(events: list[list[float]]) -> list[float]:
    return [one for event in events for one in event]


def _last(events: list[list[float]]) -> list[float]:
    return [max(event) for event in events]


def _events(served: Audience, count: int) -> list[list[float]]:
    """Of each event, the seconds that it took to each watcher."""
    found = []
    with closing(Watchers(served.sockets)) as watchers:
        start = perf_counter()
        for number in range(count):
            sleep(max(0.0, start + number / RATE - perf_counter()))
            served.server.go()
            found.append(_event(watchers))
    return found


def _event(watchers: Watchers) -> list[float]:
    received: list[float] = []
    sent = None
    for _, now, data in watchers.chunks():
        sent = sent or _SENT.search(data)
        received += [now] * data.count(MARK.encode())
        if len(received) == WATCHERS:
            break
    assert sent is not None
    return [now - float(sent[1]) for now in received]
