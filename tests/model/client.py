"""A strict client: it holds positions as a real one does, and fails at anything that the protocol does not allow.

It knows the runs' own books, so each event and each snapshot is compared with what its owner wrote.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from agentcast.agents.events import FULL_ONLY_EVENTS, TERMINAL_EVENTS
from agentcast.server.bus.base import ACTIVE
from agentcast.server.state import RunState
from tests.model.world import Connection, Run, World

Document = dict[str, Any]


@dataclass
class Known:
    """What the client has of one run: everything up to `seq` of `epoch`."""

    seq: int = 0
    epoch: str | None = None
    state: RunState | None = None
    exact: bool = True
    """Whether `state` was folded from every event, at full detail."""

    def copy(self) -> "Known":
        state = None if self.state is None else RunState.decode(self.state.encode())
        return Known(self.seq, self.epoch, state, self.exact)

    def position(self) -> Document:
        return {"seq": self.seq} if self.epoch is None else {"seq": self.seq, "epoch": self.epoch}


@dataclass
class Held:
    """A subscription whose reply was read."""

    to: Document
    detail: str
    listed: set[str]
    """Runs that its reply listed."""
    sent_at: int
    """Runs that there were when it was asked for, or at its feed position: it may cover any later one."""
    held_at: int
    """Runs that there were when its reply was read: it must cover any later one."""
    over: set[str] = field(default_factory=set)
    """Runs that have ended since: it brings them no more."""


@dataclass
class Asked:
    """A `subscribe` or `start` that waits for its reply."""

    to: Document
    detail: str
    sent_at: int
    since: dict[str, Known]
    feed: str | None
    complete: bool = False
    """Whether `since` names every run that the client knows."""
    followed: frozenset[str] = frozenset()
    """Runs that came already when it was sent."""
    alone: bool = True
    """Whether nothing else was asked for at the same time."""
    exclusive: bool = False
    started: bool = False
    """Whether this is a `start`."""


@dataclass
class Line:
    """What goes on on one connection."""

    connection: Connection
    asked: dict[int, Asked] = field(default_factory=dict)
    leaving: dict[int, str] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    """Runs that are followed, with the newest seq that came on this connection."""
    finished: set[str] = field(default_factory=set)
    """Runs that ended here: nothing of them may come until they are asked for again."""
    due: dict[str, str] = field(default_factory=dict)
    """Runs whose next frame must be a snapshot (or, where it says `gap`, a gap and then the snapshot)."""
    complete: set[str] = field(default_factory=set)
    """Runs that had ended, and were complete, when they were subscribed to; the hub may not have noticed yet."""
    replaceable: set[str] = field(default_factory=set)
    """Runs that an open-ended subscription may have brought, or may yet bring, from seq 1."""


class Client:
    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.known: dict[str, Known] = {}
        self.feeds: dict[str, str] = {}
        """Open-ended `to` → the position from which it can be recovered."""
        self.owed: dict[str, int] = {}
        """Open-ended `to` → the number of runs from which on the client must know every one that fits."""
        self.line: Line | None = None
        self._ids = 0

    # -- Asking ----------------------------------------------------------------------------------------------------

    def subscribe(self, to: Document, detail: str, *, since: str, feed: bool) -> None:
        """`since` is `known`, `none`, `start` (seq 0 for each) or `ahead` (more than can be)."""
        line = self._line()
        if self._exclusive():
            return
        if line.asked or line.complete:
            since = "known" if since in ("start", "ahead") else since
        if self._unsure():
            since = "none"
        named = {} if since == "none" else {run: known.copy() for run, known in self.known.items()}
        for run, known in named.items():
            if since == "start":
                named[run] = Known()
            elif since == "ahead":
                known.seq, known.exact = self._run(run).head + 3, False
        position = self.feeds.get(_key(to)) if feed else None
        command: Document = {"op": "subscribe", "to": to, "detail": detail}
        command["since"] = {run: known.position() for run, known in named.items()} | {"nowhere": {"seq": 3}}
        if position is not None:
            command["feed"] = position
        asked = Asked(to, detail, len(self.world.runs), named, position, since != "none", frozenset(line.last))
        asked.alone = not line.asked
        asked.exclusive = since in ("start", "ahead")
        line.asked[self._send(command)] = asked

    def _unsure(self) -> bool:
        """Whether some run was left, or is about to be, that an open-ended subscription may or may not cover yet. So
        it is unknown from outside whether a position in it means anything."""
        line = self._line()
        left = line.leaving or line.replaceable & line.last.keys()
        return bool(left) and any("run" not in held.to for held in line.held.values())

    def start(self, agent: str, detail: str) -> None:
        if self._exclusive():
            return
        asked = Asked({}, detail, len(self.world.runs), {}, None, alone=not self._line().asked, started=True)
        self._line().asked[self._send({"op": "start", "agent": agent, "input": {}, "detail": detail})] = asked

    def _exclusive(self) -> bool:
        """Whether positions are in flight that mean something else if another subscription is there first."""
        return any(asked.exclusive for asked in self._line().asked.values())

    def unsubscribe(self, subscription: str) -> None:
        self._line().leaving[self._send({"op": "unsubscribe", "subscription": subscription})] = subscription

    def _send(self, command: Document) -> int:
        self._ids += 1
        for other in self._line().asked.values():
            other.alone = False
        self.world.do(self._line().connection.send({**command, "id": self._ids}))
        return self._ids

    # -- Reading ---------------------------------------------------------------------------------------------------

    def read(self, count: int) -> int:
        """Read up to `count` frames; gives how many there were."""
        return self.world.do(self._read(count))

    async def _read(self, count: int) -> int:
        for done in range(count):
            frame = await self._line().connection.read()
            if frame is None:
                return done
            match frame["type"]:
                case "reply":
                    self._read_reply(frame)
                case "event":
                    self._read_event(frame)
                case "snapshot":
                    self._read_snapshot(frame)
                case "gap":
                    self._read_gap(frame)
                case "feed":
                    self._read_feed(frame)
                case other:
                    raise AssertionError(other)
        return count

    def cut(self) -> None:
        self.line = None

    def _read_reply(self, frame: Document) -> None:
        line = self._line()
        if frame["id"] in line.leaving:
            self._left(line.leaving.pop(frame["id"]), frame)
            return
        asked = line.asked.pop(frame["id"])
        if not frame["ok"]:
            single = asked.to.get("run")
            assert frame["error"]["code"] == "unavailable" or (
                frame["error"]["code"] == "not_found" and single == "nowhere"
            ), frame
            return
        result = frame["result"]
        if not asked.to:
            asked.to = {"run": result["run"]}
            asked.since = {result["run"]: Known()}
            result = {**result, "runs": [{**result, "recovered": True}]}
            del result["runs"][0]["subscription"]
        self._joined(asked, result)

    def _joined(self, asked: Asked, result: Document) -> None:
        line = self._line()
        listed = {entry["run"] for entry in result["runs"]}
        assert all(self._run(run).matches(asked.to) for run in listed)
        raised = {run for run in listed & line.last.keys() if asked.detail == "full" and not self._surely(run, "full")}
        maybe_full = {run for run in raised if self._maybe(run, "full")}
        sent_at = min(asked.sent_at, _number(result["feed"])) if "feed" in result else asked.sent_at
        held = Held(asked.to, asked.detail, listed, sent_at, len(self.world.runs))
        line.held[result["subscription"]] = held
        for entry in result["runs"]:
            run = entry["run"]
            if run not in line.last:
                others = [other for other in line.held.values() if other is not held]
                self._began(entry, asked, maybe_followed=any(self._may_cover(other, run) for other in others))
            elif run not in maybe_full:
                followed = run not in line.replaceable
                assert asked.started or not followed or entry["recovered"] == (run not in raised), entry
                if not entry["recovered"]:
                    line.due.setdefault(run, "snapshot")
        if "run" not in asked.to:
            self._recovered(asked, result)

    def _began(self, entry: Document, asked: Asked, *, maybe_followed: bool) -> None:
        """`maybe_followed`: an open-ended subscription may already have brought the run, unless it does so later."""
        line, run = self._line(), entry["run"]
        given = asked.since.get(run)
        if maybe_followed and run not in line.finished:
            line.replaceable.add(run)
        else:
            line.replaceable.discard(run)
        maybe_followed = maybe_followed or run in line.complete or run in asked.followed or not asked.alone
        line.finished.discard(run)
        if given is not None or run not in line.complete or not entry["recovered"]:
            self.known[run] = Known() if given is None else given.copy()
        line.last[run] = 0
        if not entry["recovered"]:
            line.due[run] = "snapshot" if given is None or maybe_followed else "gap"
        else:
            assert given is not None or asked.feed is not None or maybe_followed, "recovered what was not asked for"
            self._is_complete(run)

    def _is_complete(self, run: str) -> None:
        """Nothing is to come of a run that had ended and of which the client had everything."""
        known, reference = self.known[run], self._run(run)
        if known.seq and known.seq == reference.head and reference.ended:
            self._finished(run)
            self._line().complete.add(run)

    def _recovered(self, asked: Asked, result: Document) -> None:
        """What an open-ended subscription is good for from now on."""
        assert result["missing"] == ["nowhere"]
        key = _key(asked.to)
        assert result.get("feed_recovered") == (None if asked.feed is None else True)
        if asked.feed is None or key not in self.owed or not asked.complete:
            self.owed[key] = len(self.world.runs)
        self.feeds[key] = result["feed"]

    def _left(self, subscription: str, frame: Document) -> None:
        line = self._line()
        held = line.held.pop(subscription, None)
        assert frame["ok"] == (held is not None), frame
        if held is None:
            assert frame["error"]["code"] == "not_found"
            return
        for run in list(line.last):
            if not any(self._covers(other, run) for other in line.held.values()):
                line.due.pop(run, None)
                if any(self._may_cover(other, run) for other in line.held.values()):
                    line.replaceable.add(run)
                else:
                    del line.last[run]
        if "run" not in held.to and not any(_key(other.to) == _key(held.to) for other in line.held.values()):
            self.owed.pop(_key(held.to), None)
            self.feeds.pop(_key(held.to), None)

    def _read_event(self, frame: Document) -> None:
        line, run = self._line(), frame["run"]
        reference = self._run(run)
        self._is_wanted(run)
        assert run not in line.due, f"a {line.due[run]} of {run} was due, not {frame}"
        assert reference.logged.get(frame["seq"]) == orjson.dumps(frame), f"{frame} is not what was logged"
        if run not in line.last or (run in line.replaceable and frame["seq"] == 1):
            assert frame["seq"] == 1, f"{run} begins in the middle: {frame}"
            line.last[run] = 0
            self.known[run] = Known()
        line.replaceable.discard(run)
        known = self.known[run]
        assert frame["seq"] > line.last[run], f"again, or out of order: {frame}"
        if frame["seq"] != known.seq + 1:
            assert known.seq < frame["seq"], f"{frame} was there before {known.seq}"
            assert frame["prev"] <= known.seq, f"something is missing between {known.seq} and {frame}"
            assert not self._surely(run, "full"), f"a hole between {known.seq} and {frame}"
            known.exact = False
        if frame["event"] in FULL_ONLY_EVENTS:
            assert self._maybe(run, "full"), f"only progress was asked for: {frame}"
        if known.state is None:
            known.state = RunState.new(run, reference.agent)
        known.state.apply(frame)
        known.seq, known.epoch = frame["seq"], known.epoch or reference.epochs[0]
        line.last[run] = frame["seq"]
        if frame["event"] in TERMINAL_EVENTS:
            self._finished(run)

    def _read_gap(self, frame: Document) -> None:
        line, run = self._line(), frame["run"]
        reference = self._run(run)
        self._is_wanted(run)
        assert line.due.get(run) in (None, "gap", "snapshot")
        assert frame["from"] <= frame["to"] <= reference.head + 1, frame
        if frame["reason"] == "log_lost":
            known = self.known.get(run)
            ahead = known is not None and not known.exact
            assert len(reference.epochs) > 1 or ahead, f"nothing of {run} was lost: {frame}"
        line.due[run] = "snapshot only"

    def _read_snapshot(self, frame: Document) -> None:
        line, run = self._line(), frame["run"]
        reference = self._run(run)
        self._is_wanted(run)
        assert line.due.pop(run, None) != "gap", f"a gap should have come before {frame}"
        assert frame["epoch"] in reference.epochs
        assert frame["seq"] >= line.last.get(run, 0), f"back from {line.last[run]}: {frame}"
        assert frame["state"] == orjson.loads(reference.states[frame["seq"]]), "not the state at that seq"
        self.known[run] = Known(frame["seq"], frame["epoch"], RunState.decode(orjson.dumps(frame["state"])))
        line.last[run] = frame["seq"]
        line.replaceable.discard(run)
        if frame["state"]["status"] not in ACTIVE:
            self._finished(run)

    def _read_feed(self, frame: Document) -> None:
        line = self._line()
        reached = _number(frame["position"])
        for held in line.held.values():
            if "run" in held.to:
                continue
            for run in self.world.runs[held.held_at : reached]:
                assert run.id in self.known or not run.matches(held.to), f"the feed is ahead of {run.id}"
            self.feeds[_key(held.to)] = frame["position"]

    def _finished(self, run: str) -> None:
        line = self._line()
        line.finished.add(run)
        del line.last[run]
        for held in line.held.values():
            held.over.add(run)
        for subscription in [id for id, held in line.held.items() if held.to.get("run") == run]:
            del line.held[subscription]

    def _is_wanted(self, run: str) -> None:
        line = self._line()
        assert run not in line.finished, f"{run} had ended"
        wanted = run in line.complete or any(self._may_cover(held, run) for held in line.held.values())
        assert wanted, f"nobody asked for {run}"

    # -- What the client may expect --------------------------------------------------------------------------------

    def _covers(self, held: Held, run: str) -> bool:
        return run not in held.over and (held.to.get("run") == run or run in held.listed)

    def _may_cover(self, held: Held, run: str) -> bool:
        reference = self._run(run)
        later = reference.index >= held.sent_at and reference.matches(held.to)
        return run not in held.over and (later or self._covers(held, run))

    def _surely(self, run: str, detail: str) -> bool:
        """Whether the run must come at `detail`, whatever the hub has got to."""
        held = self._line().held.values()
        return any(self._covers(one, run) and one.detail == detail for one in held) or all(
            one.detail == detail for one in held if self._may_cover(one, run)
        )

    def _maybe(self, run: str, detail: str) -> bool:
        return any(one.detail == detail for one in self._line().held.values() if self._may_cover(one, run))

    def check(self) -> None:
        """At rest: nothing is missing (G1, G2, G10)."""
        line = self._line()
        assert not line.asked
        assert not line.leaving
        assert not line.due, f"never came: {line.due}"
        for held in line.held.values():
            runs = [run for run in self.world.runs if run.id not in held.over]  # what is over was whole when it ended
            for run in runs:
                if run.id in held.listed or (run.index >= held.held_at and run.matches(held.to)):
                    self._check_run(run, full=held.detail == "full")
                elif "run" not in held.to and run.index >= self.owed[_key(held.to)] and run.matches(held.to):
                    self._check_run(run, full=False)

    def _check_run(self, run: Run, *, full: bool) -> None:
        known = self.known.get(run.id)
        assert known is not None, f"{run.id} is unknown"
        missed: Sequence[int] = (
            range(known.seq + 1, run.head + 1) if full else [n for n in run.progress if n > known.seq]
        )
        assert not missed, f"{run.id} stands at {known.seq}; {missed} are missing"
        if known.exact and known.seq == run.head:
            assert known.state is not None
            assert known.state.document == run.state.document

    def _run(self, id: str) -> Run:
        return self.world.runs[int(id.removeprefix("run"))]

    def _line(self) -> Line:
        assert self.line is not None
        return self.line


def _number(position: str) -> int:
    """How many runs had been created at a position of the feed."""
    return int(position.rpartition(":")[2])


def _key(to: Document) -> str:
    return orjson.dumps(to).decode()
