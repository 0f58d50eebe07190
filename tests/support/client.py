"""A strict client: every frame is checked against the rules of the protocol as it arrives.

It keeps what a client has to keep, a position per run and the feed's, and folds what it sees, so that a test can
compare its view with the log and with the hub's own state.
"""

import json
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as ws_connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from agentcast.server.state import RunState

Frame = dict[str, Any]

TERMINAL = frozenset({"run_end", "run_error", "run_cancelled"})
FULL_ONLY = frozenset({"token", "message_start", "tool_progress"})
WAIT = 20.0
"""Seconds that a frame may take. A wait that matters has a shorter limit of its own."""

_OF_FRAMES = {
    "hello": {"type", "protocol", "session", "server", "heartbeat", "limits"},
    "snapshot": {"type", "run", "epoch", "seq", "state"},
    "gap": {"type", "run", "from", "to", "reason"},
    "feed": {"type", "position"},
    "summary": {"type", "runs"},
    "truncated": {"type", "subscription", "runs"},
    "ping": {"type"},
}
_USER_DATA = frozenset({"input", "inputs", "patch", "result", "args", "state", "value", "details"})


@dataclass
class View:
    """What a client knows of one run."""

    run: str
    epoch: str = ""
    seq: int = 0
    shown: int | None = 0
    """The newest seq that detail `progress` shows, where that is known: not after a snapshot."""
    state: RunState | None = None
    events: list[Frame] = field(default_factory=list)
    """Since the last snapshot, or since seq 1."""
    texts: list[str] = field(default_factory=list)
    """The same, as they were received."""
    snapshots: list[Frame] = field(default_factory=list)
    gaps: list[Frame] = field(default_factory=list)
    gap: Frame | None = None
    """A gap whose snapshot is yet to come."""
    ended: bool = False

    @property
    def position(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "seq": self.seq} if self.epoch else {"seq": 0}

    @property
    def names(self) -> list[str]:
        return [event["event"] for event in self.events]

    @property
    def document(self) -> dict[str, Any]:
        assert self.state is not None, f"nothing is known of run {self.run}"
        return self.state.document


@dataclass
class Memory:
    """What survives a connection."""

    views: dict[str, View] = field(default_factory=dict)
    feed: str | None = None

    def forget(self, run: str) -> None:
        """The hub says that it does not know the run any more."""
        self.views.pop(run, None)

    def view(self, run: str) -> View:
        return self.views.setdefault(run, View(run))

    def since(self) -> dict[str, Any]:
        """The positions to come back with. Also of runs that have ended: the feed's position may be older than they."""
        return {run: view.position for run, view in self.views.items()}

    def learn(self, result: Frame) -> None:
        """Take in the reply to an open-ended subscribe: runs to come, and how far the feed was read."""
        for entry in result["runs"]:
            self.view(entry["run"])
        self.feed = result.get("feed", self.feed)


class Client:
    """One connection. `frame` gives the next frame that is no reply to `call`."""

    def __init__(self, ws: ClientConnection, memory: Memory, *, detail: str = "full") -> None:
        self.ws = ws
        self.memory = memory
        self.hello: Frame = {}
        self.received = 0
        self._detail = detail
        self._waiting: deque[Frame] = deque()
        self._ids = 0

    # -- Sending ---------------------------------------------------------------------------------------------------

    async def send(self, **fields: Any) -> int:
        """Send a command and give its id, without waiting for the reply."""
        self._ids += 1
        await self.ws.send(json.dumps({"id": self._ids} | fields))
        return self._ids

    async def call(self, op: str, **fields: Any) -> Frame:
        """The reply to a command; frames that come before it wait for `frame`."""
        id = await self.send(op=op, **fields)
        return await self.reply(fields.get("id", id))

    async def reply(self, id: Any) -> Frame:
        """The reply with this id."""
        kept: list[Frame] = []
        try:
            while (frame := await self.frame()).get("id") != id or frame["type"] != "reply":
                kept.append(frame)
        finally:
            self._waiting.extendleft(reversed(kept))
        return frame

    async def ask(self, op: str, **fields: Any) -> Frame:
        """The result of a command that succeeds."""
        reply = await self.call(op, **fields)
        assert reply["ok"], reply
        result: Frame = reply["result"]
        return result

    async def refused(self, op: str, **fields: Any) -> Frame:
        """The error of a command that fails."""
        reply = await self.call(op, **fields)
        assert not reply["ok"], reply
        error: Frame = reply["error"]
        return error

    async def start(self, agent: str, input: dict[str, Any] | None = None, **fields: Any) -> str:
        """Start a run and give its id."""
        run: str = (await self.ask("start", agent=agent, input=input or {}, **fields))["run"]
        return run

    async def follow_all(self, **fields: Any) -> Frame:
        """Subscribe to everything, from what `memory` holds."""
        if self.memory.feed is not None:
            fields = {"since": self.memory.since(), "feed": self.memory.feed} | fields
        result = await self.ask("subscribe", to={"all": True}, **fields)
        self.memory.learn(result)
        return result

    # -- Receiving -------------------------------------------------------------------------------------------------

    async def frame(self) -> Frame:
        """The next frame."""
        return self._waiting.popleft() if self._waiting else await self._receive()

    async def until(self, wanted: Callable[[Frame], bool]) -> Frame:
        """Read up to the first frame that is `wanted`."""
        while not wanted(frame := await self.frame()):
            pass
        return frame

    async def event(self, name: str, run: str | None = None) -> Frame:
        """Read up to the first event of that name."""
        return await self.until(lambda frame: frame.get("event") == name and run in (None, frame["run"]))

    async def end(self, *runs: str) -> Frame:
        """Read until all of these runs have ended; gives the last frame that was needed."""
        frame: Frame = {}
        while not all(self.memory.view(run).ended for run in runs):
            frame = await self.frame()
        return frame

    async def view(self, run: str) -> View:
        """Read until the run has ended; gives what was seen of it."""
        await self.end(run)
        return self.memory.view(run)

    async def quiet(self) -> list[Frame]:
        """All frames up to a ping's reply: whatever the hub had queued before it."""
        id = await self.send(op="ping")
        frames = []
        while (frame := await self.frame()).get("id") != id:
            frames.append(frame)
        return frames

    async def closed(self) -> tuple[int, str]:
        """Read until the connection is closed; gives code and reason (1006 without a handshake)."""
        try:
            while True:
                await self.frame()
        except ConnectionClosed:
            return self.ws.close_code or 1006, self.ws.close_reason or ""

    def cut(self) -> None:
        """Lose the connection, without a word."""
        self.ws.transport.abort()

    async def _receive(self) -> Frame:
        with anyio.fail_after(WAIT):
            text = await self.ws.recv()
        assert isinstance(text, str), "the hub sends text only"
        self.received += len(text)
        frame: Frame = json.loads(text)
        self._check(frame)
        if frame["type"] == "event":
            self.memory.view(frame["run"]).texts.append(text)
        return frame

    # -- The rules -------------------------------------------------------------------------------------------------

    def _check(self, frame: Frame) -> None:
        _check_nulls(frame)
        match frame["type"]:
            case "reply":
                assert frame.keys() - {"id"} == {"type", "ok", "result" if frame["ok"] else "error"}, frame
            case "event":
                self._check_event(frame)
            case "snapshot":
                self._take_snapshot(frame)
            case "gap":
                view = self.memory.view(frame["run"])
                assert view.gap is None, f"two gaps in a row: {frame}"
                assert frame["from"] <= frame["to"], frame
                view.gap = frame
                view.gaps.append(frame)
            case "feed":
                self.memory.feed = frame["position"]
            case "summary":
                assert frame["runs"], "a frame of summaries holds at least one"
                assert all(record.keys() >= {"run", "agent", "status"} for record in frame["runs"]), frame
            case "list":
                assert frame.keys() - {"next"} == {"type", "subscription", "runs"}, frame
            case "truncated":
                assert frame["runs"] > 0, frame
            case "hello" | "ping":
                pass
            case other:
                raise AssertionError(f"a frame of unknown type {other!r}")
        if keys := _OF_FRAMES.get(frame["type"]):
            assert frame.keys() - {"degraded"} == keys, frame
            assert "degraded" not in frame or frame["type"] == "ping", frame

    def _check_event(self, event: Frame) -> None:
        view = self.memory.view(event["run"])
        assert event.keys() >= {"type", "event", "run", "seq", "prev", "ts", "agent"}, event
        assert not view.ended, f"an event after the end: {event}"
        assert view.gap is None, f"a gap is followed by its snapshot, not by {event}"
        if self._detail == "full":
            assert event["seq"] == view.seq + 1, f"seq {event['seq']} after {view.seq}: {event}"
        else:
            assert event["event"] not in FULL_ONLY, event
            assert event["seq"] > view.seq, f"seq {event['seq']} after {view.seq}: {event}"
            assert event["prev"] <= view.seq, f"something was lost: prev {event['prev']}, position {view.seq}"
        assert event["prev"] < event["seq"], event
        if view.shown is not None:
            assert event["prev"] == view.shown, f"prev is {event['prev']}, not {view.shown}: {event}"
        if event["event"] not in FULL_ONLY:
            view.shown = event["seq"]
        if event["event"] == "run_queued":
            assert event["seq"] == 1, event
            view.epoch = event["epoch"]
        view.seq = event["seq"]
        view.events.append(event)
        if view.state is None:
            view.state = RunState.new(event["run"], event["agent"])
        view.state.apply(event)
        view.ended = event["event"] in TERMINAL

    def _take_snapshot(self, frame: Frame) -> None:
        view = self.memory.view(frame["run"])
        if view.gap is not None:
            assert view.gap["to"] == max(view.gap["from"], frame["seq"]), (view.gap, frame["seq"])
            view.gap = None
        assert frame["state"]["run"] == frame["run"], frame
        view.epoch, view.seq, view.events = frame["epoch"], frame["seq"], []
        view.texts, view.shown = [], None
        view.state = RunState(json.loads(json.dumps(frame["state"])))
        view.snapshots.append(frame)
        view.ended = frame["state"]["status"] in ("done", "failed", "cancelled")


@asynccontextmanager
async def connect(
    url: str,
    *,
    memory: Memory | None = None,
    detail: str = "full",
    subprotocols: tuple[str, ...] = ("agentcast.v1",),
    **options: Any,
) -> AsyncIterator[Client]:
    """A connection that has been greeted."""
    ws = await ws_connect(
        url,
        subprotocols=[Subprotocol(name) for name in subprotocols] or None,
        max_size=None,
        max_queue=None,
        ping_interval=None,
        compression=None,
        proxy=None,
        close_timeout=2,
        **options,
    )
    client = Client(ws, Memory() if memory is None else memory, detail=detail)
    try:
        client.hello = await client.frame()
        assert client.hello["type"] == "hello", client.hello
        yield client
    finally:
        with anyio.CancelScope(shield=True):
            await ws.close()


def _check_nulls(value: Any, where: str = "") -> None:
    """No field is `null`, save inside user data."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in _USER_DATA:
                assert item is not None, f"{where}{name} is null"
                _check_nulls(item, f"{where}{name}.")
    elif isinstance(value, list):
        for item in value:
            _check_nulls(item, where)
