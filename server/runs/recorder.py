"""The single writer of one run's log: stamps, coalesces, folds, encodes once and appends (G1, G5, G7, G10).

The first token of a message goes at once. Later ones wait in the channel, for `FLUSH_AFTER` seconds at most or until
another event comes, and are then joined, per message. What was stamped is sealed: it is appended in parts of what one
append takes, and while the bus is away the very same part is retried. Nothing more is taken from the run's channel
meanwhile, so the agent is held back.

This module must not know who follows the run, how agents work, or when a run starts and ends.
"""

import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
from anyio.lowlevel import checkpoint

from agentcast.agents.channel import Channel, Emitted
from agentcast.agents.events import (
    FULL_ONLY_EVENTS,
    TERMINAL_EVENTS,
    AgentEvent,
    Event,
    LmEnd,
    MessageEnd,
    MessageRetracted,
    MessageStart,
    Token,
    Usage,
)
from agentcast.agents.values import VALUE_BYTES, Pieces, clean_text, cut_text, text_bytes
from agentcast.server.bus.base import APPEND_BYTES, Bus, Frame, Origin, Snapshot, Status, first_part
from agentcast.server.bus.load_state import load_state
from agentcast.server.errors import HeadMismatch, LogError, NotFound, Unavailable
from agentcast.server.protocol import encode_event
from agentcast.server.state import MAX_MESSAGES, RunState

FLUSH_AFTER = 0.025
BATCH_EVENTS = 256
SNAPSHOT_GROWTH = 64 * 1024
APPEND_PATIENCE = 1.0
"""Seconds that a snapshot waits for an append that is going on, before it is another run's turn."""
_RETRY_FIRST, _RETRY_MOST = 0.1, 2.0

logger = logging.getLogger(__name__)


class _Message:
    """A message that streams: what was sent of it, and what waits to be sent."""

    __slots__ = ("cut", "pieces", "room", "sent", "ts", "waiting")

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.waiting: list[str] = []
        self.pieces = Pieces()
        self.ts = 0.0
        """When the oldest waiting delta was emitted."""
        self.room = VALUE_BYTES
        self.cut = False

    def add(self, ts: float, delta: str) -> None:
        if not self.waiting:
            self.ts = ts
        self.waiting.append(delta)

    def flush(self) -> str:
        """All that waits and is certain, joined; sent from now on."""
        joined = self.pieces.push("".join(self.waiting))
        self.waiting.clear()
        return self.say(joined)

    def say(self, text: str) -> str:
        """What of the clean `text` is to be sent: a message is cut where it grows over what one value may take."""
        if self.cut or not text:
            return ""
        size = text_bytes(text)
        if size > self.room:
            self.cut = True
            text = cut_text(text, max(self.room, 200)) if size > max(self.room, 200) else text + "… [cut]"
        self.room -= size
        self.sent.append(text)
        return text


class Recorder:
    """Writes the log of one run that this process owns under `fence`. One task may use it at a time; `snapshots` saves
    what is due meanwhile.

    Every method raises `Fenced` or `Ended` if the run is not, or no longer, this process's to write.
    """

    def __init__(
        self, bus: Bus, run: str, origin: Origin, epoch: str, fence: int = 0, *, snapshots: "Snapshots"
    ) -> None:
        self.run = run
        self.epoch = epoch
        self.fence = fence
        """To be set to what `Bus.create` gives, before anything is recorded."""
        self.state = RunState.new(run, origin.agent)
        self.usage: Usage | None = None
        self._bus = bus
        self._origin = origin
        self._seq = 0
        self._prev = 0
        self._ts = 0.0
        self._batch: list[Frame] = []
        self._sealed = 0
        """Bytes of the batch."""
        self._last: Frame | None = None
        """The newest frame that the bus has taken."""
        self._messages: dict[str, _Message] = {}
        self._silent: set[str] = set()
        """Open messages of which nothing was sent yet."""
        self._waiting: dict[str, _Message] = {}
        """Open messages with deltas that wait to be sent; only while events are being taken."""
        self._channel: Channel | None = None
        self._snapshots = snapshots
        self._grown = 0
        self._snapshot_size = 0
        self._lock = anyio.Lock(fast_acquire=True)

    @classmethod
    async def take_over(cls, bus: Bus, run: str, snapshots: "Snapshots") -> "Recorder":
        """Claim a run of another process and go on with its log, in a new epoch.

        :raises Ended: it has ended in the meantime.
        :raises NotFound: there is no such run.
        :raises Unavailable: the bus is away.
        """
        fence = await bus.claim(run)
        snapshot = await load_state(bus, run)
        info = (await bus.info([run])).get(run)
        if info is None:
            raise NotFound(f"there is no run {run[:64]!r}")
        origin = Origin(info.agent, info.principal, info.thread, info.created)
        recorder = cls(bus, run, origin, snapshot.epoch, fence, snapshots=snapshots)
        recorder.state = RunState.decode(snapshot.state)
        recorder._seq = recorder._prev = snapshot.seq
        await recorder._retry(recorder._rebase)
        return recorder

    @property
    def status(self) -> Status:
        status: Status = self.state.document["status"]
        return status

    def first_frame(self, ts: float, event: Event) -> Frame:
        """The frame of seq 1, which is not appended: `Bus.create` writes it."""
        self._stamp(ts, event)
        self._last = self._batch.pop()
        return self._last

    async def record(self, ts: float, *events: Event) -> None:
        """Append what the hub itself has to say, after everything that the agent has emitted before."""
        async with self._lock:
            if self._channel is not None:
                await self._record_waiting(self._channel)
            for event in events:
                self._stamp(ts, event)
            await self._append()

    async def save_snapshot(self) -> None:
        """Save the state after what was appended last. It goes on being appended meanwhile.

        :raises Unavailable: the bus is away, or just taking an append.
        :raises NotFound: the bus has let go of the run.
        """
        with anyio.move_on_after(APPEND_PATIENCE) as patience:
            async with self._lock:
                snapshot = Snapshot(self.run, self.epoch, self._seq, self.state.encode())
                self._snapshot_size, self._grown = len(snapshot.state), 0
        if patience.cancelled_caught:
            raise Unavailable("an append waits for the bus")
        await self._bus.save_snapshot(self.fence, snapshot)

    async def verify(self) -> None:
        """If the bus does not hold all that was appended, begin a new epoch at this state. Waits for a bus that is
        away.

        The newest frame is appended once more: to a log that has it, that changes nothing.
        """
        async with self._lock:
            if self._last is not None:
                await self._retry(self._append_frames, [self._last])

    async def record_from(self, channel: Channel) -> None:
        """Record all that comes out of `channel`, until it is closed and drained."""
        self._channel = channel
        try:
            while await channel.ready(FLUSH_AFTER, self._can_wait):
                async with self._lock:
                    await self._record_waiting(channel)
            async with self._lock:
                self._end_pieces()
                await self._append()
        finally:
            self._channel = None

    def _can_wait(self, event: AgentEvent) -> bool:
        """Whether `event` may wait for others: whether it is a token, and not its message's first."""
        return type(event) is Token and event.message not in self._silent

    async def _record_waiting(self, channel: Channel) -> None:
        """Record what waits in `channel` now."""
        items = channel.take()
        for start in range(0, len(items), BATCH_EVENTS):
            if start:
                await checkpoint()  # a burst must not hold the loop for longer than one batch takes
            for emitted in items[start : start + BATCH_EVENTS]:
                self._take(emitted)
                if self._sealed >= APPEND_BYTES:
                    await self._append()
                    await checkpoint()
            self._flush()
            await self._append()

    # -- Stamping --------------------------------------------------------------------------------------------------

    def _take(self, emitted: Emitted) -> None:
        ts, event = emitted
        match event:
            case Token():
                self._take_token(ts, event)
                return
            case MessageStart() | MessageEnd() if (event.message in self._messages) is (event.event == "message_start"):
                return  # a message that begins twice goes on; one that is not open cannot end
            case MessageStart():
                self._begin(event)
            case MessageEnd():
                event = self._complete(ts, event)
            case MessageRetracted():
                self._flush()
                self._close(event.message)
            case LmEnd(usage=Usage() as usage):
                self.usage = usage if self.usage is None else self.usage + usage
            case _:
                pass
        self._flush()
        self._stamp(ts, event)

    def _take_token(self, ts: float, event: Token) -> None:
        message = self._messages.get(event.message)
        if message is None or message.cut or not event.delta:
            return  # without a message: it has not begun, or has ended
        message.add(ts, event.delta)
        self._waiting[event.message] = message
        if event.message in self._silent:
            self._flush()

    def _begin(self, event: MessageStart) -> None:
        if len(self._messages) >= MAX_MESSAGES:  # no more can be open than a RunState shows
            self._flush()
            self._close(next(iter(self._messages)))
        self._messages[event.message] = _Message()
        self._silent.add(event.message)

    def _complete(self, ts: float, event: MessageEnd) -> MessageEnd:
        """The joined deltas always equal the text: what they lack is sent; where they contradict it, they win."""
        self._flush()
        message = self._messages[event.message]
        said, text, half = "".join(message.sent), clean_text(event.text), message.pieces.end()
        self._send(event.message, ts, message.say(text[len(said) :] if text.startswith(said) else half))
        self._close(event.message)
        return MessageEnd(message=event.message, text="".join(message.sent))

    def _close(self, id: str) -> None:
        self._messages.pop(id, None)
        self._silent.discard(id)

    def _end_pieces(self) -> None:
        """Nothing more comes: whatever messages are open lack no more than the half pairs that wait of them."""
        for id, message in self._messages.items():
            self._send(id, 0.0, message.say(message.pieces.end()))

    def _flush(self) -> None:
        """Send what waits of all messages."""
        if self._waiting:
            for id, message in self._waiting.items():
                self._send(id, message.ts, message.flush())
            self._waiting.clear()

    def _send(self, id: str, ts: float, delta: str) -> None:
        if delta:
            self._silent.discard(id)
            # No model: deltas were checked one by one, and together they stay under the message's cap.
            self._stamp_fact(ts, {"event": "token", "message": id, "delta": delta})

    def _stamp(self, ts: float, event: Event) -> None:
        self._stamp_fact(ts, event.wire())

    def _stamp_fact(self, ts: float, fact: dict[str, Any]) -> None:
        name, seq, ts = fact["event"], self._seq + 1, max(self._ts, ts)
        data = encode_event(
            self.run, self._origin.agent, seq, self._prev, ts, fact
        )  # if it cannot be encoded, it never was
        self._seq, self._ts = seq, ts
        self.state.apply(fact | {"seq": seq, "ts": ts})
        progress = name not in FULL_ONLY_EVENTS
        self._batch.append(Frame(self.run, self.epoch, seq, data, progress, name in TERMINAL_EVENTS))
        self._sealed += len(data)
        if progress:
            self._prev = seq

    # -- Appending -------------------------------------------------------------------------------------------------

    async def _append(self) -> None:
        """Append the sealed batch, in parts, however long the bus takes; then a snapshot may be due."""
        if not self._batch:
            return
        ended = self._batch[-1].terminal
        while self._batch:
            part = first_part(self._batch)
            await self._retry(self._append_frames, part)
            self._batch = self._batch[len(part) :]
        self._sealed = 0
        if ended or self._grown >= max(SNAPSHOT_GROWTH, self._snapshot_size):
            self._snapshots.due(self)

    async def _append_frames(self, frames: Sequence[Frame]) -> None:
        try:
            await self._bus.append(self.run, self.fence, frames, self.status)
            self._last = frames[-1]
            self._grown += sum(len(frame.data) for frame in frames)
        except (HeadMismatch, NotFound) as error:
            logger.warning("%s; starting a new epoch at %d", error, self._seq)
            await self._rebase()

    async def _rebase(self) -> None:
        """The bus lost some of the log, or all. Our state says what it held, and all that is sealed: it becomes the
        base of a new epoch."""
        state = self.state.encode()
        self.epoch = await self._bus.rebase(self.run, self.fence, self._seq, state, self.status, self._origin)
        self._last = Frame(self.run, self.epoch, self._seq, b"")  # only to ask by: this log begins after it
        self._snapshot_size, self._grown = len(state), 0
        self._batch = []

    async def _retry(self, write: Callable[..., Awaitable[None]], *args: object) -> None:
        delay = _RETRY_FIRST
        while True:
            try:
                await write(*args)
                return
            except Unavailable as error:
                if delay == _RETRY_FIRST:
                    logger.warning("run %s waits for the bus: %s", self.run, error)
                await anyio.sleep(delay * random.uniform(0.5, 1.5))  # noqa: S311 -- jitter, not a secret
                delay = min(delay * 2, _RETRY_MOST)


class Snapshots:
    """Saves the snapshots of this process's runs, one at a time: no append waits for one, and what they take in memory
    is one encoded state. `run` must be running meanwhile.
    """

    def __init__(self) -> None:
        self.saved = anyio.Event()
        """Set while none is due."""
        self.saved.set()
        self._due: dict[str, Recorder] = {}
        self._arrived = anyio.Event()

    def due(self, recorder: Recorder) -> None:
        """Save a snapshot of this run when it is its turn, of its state by then."""
        self._due.setdefault(recorder.run, recorder)
        if self.saved.is_set():
            self.saved = anyio.Event()
        self._arrived.set()

    async def run(self) -> None:
        """Save what is due until cancelled."""
        while True:
            await self._arrived.wait()
            self._arrived = anyio.Event()
            while self._due:
                await self._save(self._due.pop(next(iter(self._due))))
            self.saved.set()

    async def _save(self, recorder: Recorder) -> None:
        try:
            await recorder.save_snapshot()
        except Unavailable:
            self.due(recorder)
            await anyio.sleep(_RETRY_MOST * random.uniform(0.5, 1.0))  # noqa: S311 -- jitter, not a secret
        except (LogError, NotFound):
            pass  # another process has claimed the run, or the bus has forgotten it
        except Exception:
            logger.exception("no snapshot of run %s could be saved", recorder.run)
