"""A client that follows runs whatever happens: it is cut, comes back to any hub, and never lets a rule be broken (G1).

Its rules are those of `tests.support.client`, on every connection: rising `seq`, no holes but across a snapshot, each
event once. What it holds of a run in the end is compared with what the hubs hold (G10).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from tests.faults.chaos.world import World
from tests.support.client import TERMINAL, Client, Memory
from tests.support.process import ServedHub
from tests.support.waiting import PATIENCE

LOST = (ConnectionClosed, InvalidHandshake, OSError, TimeoutError)
"""What a lost connection looks like. A timeout is silence, in which no ping came either."""


@dataclass(eq=False)
class Viewer:
    """Follows everything, or only `runs`, on `hub` or on any; cut every so many seconds, `life` at most."""

    world: World
    rng: random.Random
    detail: str = "full"
    hub: ServedHub | None = None
    runs: Sequence[str] | None = None
    life: float | None = None
    memory: Memory = field(default_factory=Memory)
    gone: set[str] = field(default_factory=set)
    """Runs that a hub has said it does not know."""
    pings: list[dict[str, Any]] = field(default_factory=list)
    ends: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Every terminal event that it was shown, with its run."""
    feed_recovered: bool = True
    """Whether the feed always reached back to where it had been."""
    connections: int = 0
    slowest_refusal: float = 0.0
    following: anyio.Event = field(default_factory=anyio.Event)
    """Set while all subscriptions stand."""
    _left: anyio.Event = field(default_factory=anyio.Event)
    """Set when the connection is lost."""
    _connection: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    _changed: anyio.Event = field(default_factory=anyio.Event)

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                await self._connect()
            except* LOST:
                await anyio.sleep(self.rng.uniform(0.05, 0.5))
            self.following = anyio.Event()
            self._left.set()

    async def _connect(self) -> None:
        hub = self.hub or self.rng.choice(self.world.hubs)
        for view in self.memory.views.values():
            view.gap = None  # its snapshot went down with the connection
        async with hub.client(memory=self.memory, detail=self.detail) as client:
            self.connections += 1
            life = None if self.life is None else self.rng.uniform(0.1, self.life)
            self._left = anyio.Event()
            with anyio.move_on_after(life) as self._connection:
                await self._subscribe(client)
                self.following.set()
                while True:
                    frame = await client.frame()
                    self._note(frame)
            client.cut()

    def _note(self, frame: dict[str, Any]) -> None:
        if frame["type"] == "ping":
            self.pings.append(frame)
        if frame.get("event") in TERMINAL:
            self.ends.append((frame["run"], frame))
        self._changed.set()
        self._changed = anyio.Event()

    async def _subscribe(self, client: Client) -> None:
        if self.runs is None:
            fields = {"since": self.memory.since()} | ({} if self.memory.feed is None else {"feed": self.memory.feed})
            await self._ask(client, to={"all": True}, detail=self.detail, **fields)
            return
        for run in self.runs:
            if run not in self.gone and not self.memory.view(run).ended:
                since = {run: self.memory.view(run).position}
                await self._ask(client, to={"run": run}, detail=self.detail, since=since)

    async def _ask(self, client: Client, **fields: Any) -> None:
        """Subscribe, as often as it takes."""
        while True:
            asked_at = anyio.current_time()
            reply = await client.call("subscribe", **fields)
            if reply["ok"]:
                self._learn(reply["result"])
                return
            if reply["error"]["code"] == "not_found":
                self._miss(fields["to"]["run"])
                return
            assert reply["error"]["code"] == "unavailable", reply
            assert reply["error"]["retryable"], reply
            self.slowest_refusal = max(self.slowest_refusal, anyio.current_time() - asked_at)
            await anyio.sleep(self.rng.uniform(0.1, 0.5))

    def _learn(self, result: dict[str, Any]) -> None:
        self.memory.learn(result)
        self.feed_recovered = self.feed_recovered and result.get("feed_recovered", True)
        for run in result.get("missing", ()):
            self._miss(run)

    def _miss(self, run: str) -> None:
        self.gone.add(run)
        self.memory.forget(run)

    # -- What it saw -------------------------------------------------------------------------------------------------

    def ended(self, run: str) -> bool:
        return run in self.gone or (run in self.memory.views and self.memory.view(run).ended)

    async def has_ended(self, runs: Sequence[str], within: float) -> None:
        """Until it has seen the end of these runs."""
        with anyio.move_on_after(within):
            while not all(self.ended(run) for run in runs):
                await self._changed.wait()
            return
        missing = {run: self._position(run) for run in runs if not self.ended(run)}
        raise AssertionError(f"a viewer at detail {self.detail} has not seen the end of {missing}")

    async def come_back(self) -> None:
        """Lose the connection, return for good, and hear of every run that it knows."""
        self.life = None
        self._connection.cancel()
        with anyio.fail_after(PATIENCE):
            await self._left.wait()
            await self.following.wait()

    async def has_seen(self, run: str, seq: int, epoch: str) -> None:
        """Until it has come to that position."""
        with anyio.move_on_after(PATIENCE):
            while (view := self.memory.view(run)).epoch != epoch or view.seq < seq:
                await self._changed.wait()
            return
        raise AssertionError(f"a viewer is at {self._position(run)} of run {run}, not at {seq} of epoch {epoch}")

    def _position(self, run: str) -> object:
        return self.memory.view(run).position if run in self.memory.views else None

    def check(self, run: str, final: dict[str, Any]) -> None:
        """What it was shown of a run, folded, is the run's final state; at detail progress, of what that shows."""
        view = self.memory.view(run)
        if self.detail == "full":
            assert view.document == final["state"], (view.position, final["epoch"], final["seq"])
            assert view.seq == final["seq"]
        else:
            shown, state = view.document, final["state"]
            for name in ("status", "status_message", "result", "error", "state"):
                assert shown.get(name) == state.get(name), (name, shown.get(name), state.get(name))
            assert [span["span"] for span in shown["spans"]] == [span["span"] for span in state["spans"]]
