"""The hub against a simple reference, under whatever clients, runs and the bus come up with (G1, G2, G10).

Limits are tiny, so that queues overflow, logs are trimmed and clients fall far behind all the time; the bus takes its
time, so that everything happens in between everything else.
"""

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import agentcast.server.bus.memory
import agentcast.server.hub.catch_up
import agentcast.server.hub.hub
import agentcast.server.hub.outbox
import agentcast.server.hub.topic
from agentcast.server.hub.ring import Rings
from tests.model.client import Client, Line
from tests.model.world import Run, World

QUEUE_FRAMES = 4
LOG_EVENTS = 8
MAX_DISTANCE = 12
RING_BYTES = 600
"""A few frames."""
PAGE_EVENTS = 3
MAX_ASKED = 4
HELD_AFTER = 300
"""Turns of the loop after which a client no longer waits for a reply before it goes on."""

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "300"))
STEPS = 50

pick = st.integers(min_value=0, max_value=5)
details = st.sampled_from(["full", "progress"])
agents = st.sampled_from(["ant", "bee"])
threads = st.sampled_from([None, "t"])
kinds = st.lists(st.sampled_from(["status", "text", "tool", "close"]), min_size=1, max_size=6)
endings = st.sampled_from([None, None, None, "end", "fail"])
turns = st.integers(min_value=0, max_value=12)
slowness = st.sampled_from([3, 3, 12, 60])
"""Turns of the loop that an answer of the bus takes before and after it is given, at most."""
targets = st.sampled_from(["run", "run", "run", "all", "all", "agent", "thread", "nowhere"])


sinces = st.sampled_from(["known", "known", "none", "start", "ahead"])


class Hub(RuleBasedStateMachine):
    world: World
    clients: list[Client]

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(agentcast.server.hub.topic, "MAX_DISTANCE", MAX_DISTANCE)
        self.patch.setattr(agentcast.server.hub.hub, "Rings", lambda: Rings(each=RING_BYTES))
        for module in (agentcast.server.hub.hub, agentcast.server.hub.catch_up):
            self.patch.setattr(module, "jitter", lambda: 0.0)
        self.patch.setattr(agentcast.server.hub.outbox, "TAKE_BYTES", 1)  # one frame at a time
        self.patch.setattr(agentcast.server.bus.memory, "PAGE_EVENTS", PAGE_EVENTS)

    @initialize(
        seed=st.integers(min_value=0, max_value=2**32),
        late=st.booleans(),
        flaky=st.booleans(),
        most=slowness,
        feed=slowness,
    )
    def begin(self, seed: int, late: bool, flaky: bool, most: int, feed: int) -> None:
        limits = {"log_events": LOG_EVENTS, "queue_frames": QUEUE_FRAMES}
        self.world = World(seed, late=late, flaky=flaky, most=most, feed=feed, **limits)
        self.clients = [Client(self.world, name) for name in ("one", "two")]
        self.world.do(self.world.create("ant", "t"))

    def teardown(self) -> None:
        try:
            if hasattr(self, "world"):
                self._end()
        finally:
            self.patch.undo()

    def _end(self) -> None:
        try:
            self.come_to_rest()
            for client in self.clients:
                self._cut(client)
            self.world.do(self.world.settle())
            assert not self.world.hub.topics, "topics are left"
            assert not len(self.world.hub.rules), "rules are left"
            assert not self.world.bus.subscribed, "subscriptions are left"
        finally:
            self.world.close()

    # -- Runs ------------------------------------------------------------------------------------------------------

    @rule(agent=agents, thread=threads, turns=turns)
    def create(self, agent: str, thread: str | None, turns: int) -> None:
        self.world.do(self.world.create(agent, thread))
        self._turn(turns)

    @rule(run=pick, kinds=kinds, ending=endings, turns=turns)
    def append(self, run: int, kinds: list[str], ending: str | None, turns: int) -> None:
        if chosen := self._active(run):
            self.world.do(chosen.append(self.world.bus, [*kinds, ending] if ending else kinds))
        self._turn(turns)

    @rule(run=pick, ending=st.sampled_from(["end", "fail"]), turns=turns)
    def end(self, run: int, ending: str, turns: int) -> None:
        if chosen := self._active(run):
            self.world.do(chosen.append(self.world.bus, [ending]))
        self._turn(turns)

    @rule(run=pick)
    def save_snapshot(self, run: int) -> None:
        chosen = self.world.runs[-1 - run % len(self.world.runs)]
        self.world.do(chosen.save(self.world.bus))

    @rule(run=pick, lost=st.lists(st.sampled_from(["status", "text"]), max_size=3), ending=endings, turns=turns)
    def rebase(self, run: int, lost: list[str], ending: str | None, turns: int) -> None:
        if chosen := self._active(run):
            self.world.do(chosen.rebase(self.world.bus, [*lost, ending] if ending else lost))
        self._turn(turns)

    # -- Clients ---------------------------------------------------------------------------------------------------

    @rule(
        client=pick,
        what=targets,
        which=pick,
        detail=details,
        since=sinces,
        feed=st.booleans(),
        turns=turns,
    )
    def subscribe(self, client: int, what: str, which: int, detail: str, since: str, feed: bool, turns: int) -> None:
        asking = self._connected(client)
        if len(self._line(asking).asked) < MAX_ASKED:
            asking.subscribe(self._to(what, which), detail, since=since, feed=feed)
        self._turn(turns)

    @rule(client=pick, agent=agents, detail=details, turns=turns)
    def start(self, client: int, agent: str, detail: str, turns: int) -> None:
        asking = self._connected(client)
        if len(self._line(asking).asked) < MAX_ASKED:
            asking.start(agent, detail)
        self._turn(turns)

    @rule(client=pick, which=pick, turns=turns)
    def unsubscribe(self, client: int, which: int, turns: int) -> None:
        asking = self._connected(client)
        if held := list(self._line(asking).held):
            asking.unsubscribe(held[which % len(held)])
        self._turn(turns)

    @rule(client=pick, what=targets, which=pick, detail=details, since=sinces, held=turns, gap=turns, turns=turns)
    def remount(
        self, client: int, what: str, which: int, detail: str, since: str, held: int, gap: int, turns: int
    ) -> None:
        """Subscribe, leave as soon as that can be done, and subscribe again before the hub has got over it."""
        asking = self._connected(client)
        line = self._line(asking)
        before = set(line.held)
        to = self._to(what, which)
        if len(line.asked) < MAX_ASKED:
            asking.subscribe(to, detail, since=since, feed=False)
        for _ in range(HELD_AFTER):
            asking.read(1)
            if not line.asked:
                break
            self._turn(1)
        self._turn(held)
        for subscription in line.held.keys() - before:
            asking.unsubscribe(subscription)
        self._turn(gap)
        if len(line.asked) < MAX_ASKED:
            asking.subscribe(to, detail, since=since, feed=False)
        self._turn(turns)

    @rule(client=pick, count=st.integers(min_value=1, max_value=8))
    def read(self, client: int, count: int) -> None:
        self._connected(client).read(count)

    @rule(client=pick)
    def tick(self, client: int) -> None:
        """What the endpoint does once a second."""
        self._line(self._connected(client)).connection.outbox.put_notices()

    @rule(client=pick)
    def cut(self, client: int) -> None:
        self._cut(self.clients[client % 2])

    @rule(client=pick, detail=details, turns=turns)
    def resume(self, client: int, detail: str, turns: int) -> None:
        """Come back as the protocol says: with every position, and with those of the feed."""
        resuming = self.clients[client % 2]
        again = [held.to for held in resuming.line.held.values()] if resuming.line else []
        self._cut(resuming)
        self._connected(client)
        for to in again or [{"all": True}]:
            resuming.subscribe(to, detail, since="known", feed=True)
        self._turn(turns)

    # -- Time ------------------------------------------------------------------------------------------------------

    @rule(count=st.integers(min_value=1, max_value=40))
    def turn(self, count: int) -> None:
        self._turn(count)

    @precondition(lambda self: hasattr(self, "world"))
    @rule()
    def come_to_rest(self) -> None:
        """Every connected client has everything."""
        connected = [client for client in self.clients if client.line is not None]
        while True:
            self.world.bus.well = True
            self.world.do(self.world.settle())
            self.world.bus.well = False
            if not sum(client.read(100) for client in connected):
                break
        for client in connected:
            self._line(client).connection.outbox.put_notices()
            client.read(100)
            client.check()

    def _turn(self, count: int) -> None:
        self.world.do(self.world.turns(count))

    def _active(self, which: int) -> Run | None:
        active = [run for run in self.world.runs if not run.ended]
        return active[-1 - which % len(active)] if active else None

    def _to(self, what: str, which: int) -> dict[str, Any]:
        match what:
            case "run":
                return {"run": self.world.runs[-1 - which % len(self.world.runs)].id}
            case "nowhere":
                return {"run": "nowhere"}
            case "all":
                return {"all": True}
            case "agent":
                return {"agent": ("ant", "bee")[which % 2]}
            case _:
                return {"thread": "t"}

    def _connected(self, client: int) -> Client:
        chosen = self.clients[client % 2]
        if chosen.line is None:
            chosen.line = Line(self.world.do(self.world.connect()))
        return chosen

    def _cut(self, client: Client) -> None:
        if client.line is not None:
            self.world.do(client.line.connection.hang_up())
            client.cut()

    def _line(self, client: Client) -> Line:
        assert client.line is not None
        return client.line


TestHub: Any = pytest.mark.timeout(600)(Hub.TestCase)
TestHub.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    # A failure names the seed that reproduces it; making it small takes minutes, which CI has better uses for.
    phases=[Phase.explicit, Phase.reuse, Phase.generate, *([] if os.environ.get("CI") else [Phase.shrink])],
    print_blob=True,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
