"""The single writer of one run's log: stamps, coalesces, folds, encodes once and appends (G1, G5, G7, G10).

Tokens, but for the first of a message, wait in the channel, for `FLUSH_AFTER` seconds at most or until another event
comes. What was stamped is sealed: it is appended in parts of what one append takes, and while the bus is away the very
same part is retried. Nothing more is taken from the run's channel meanwhile, so the agent is held back.

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
    Event,
    MessageEnd,
    MessageRetracted,
    MessageStart,
    Token,
    Usage,
)
from agentcast.server.bus.base import APPEND_BYTES, Bus, Frame, Origin, Snapshot, Status, Summary, first_part
from agentcast.server.bus.load_state import load_state
from agentcast.server.bus.slices import in_slices
from agentcast.server.errors import HeadMismatch, NotFound, Unavailable
from agentcast.server.protocol import encode_event
from agentcast.server.runs.publisher import SummaryPublisher
from agentcast.server.runs.snapshots import Snapshots
from agentcast.server.runs.summary import RunSummary
from agentcast.server.runs.tokens import Messages
from agentcast.server.runs.trimming import StateSize
from agentcast.server.state import RunState

FLUSH_AFTER = 0.025
BATCH_EVENTS = 256
SNAPSHOT_GROWTH = 64 * 1024
APPEND_PATIENCE = 1.0
"""Seconds that a snapshot waits for an append that is going on, before it is another run's turn."""
_RETRY_FIRST, _RETRY_MOST = 0.1, 2.0

logger = logging.getLogger(__name__)


class Recorder:
    """Writes the log of one run that this process owns under `fence`. One task may use it at a time; `snapshots` saves
    what is due meanwhile, and `summaries` publishes it.

    Every method raises `Fenced` or `Ended` if the run is not, or no longer, this process's to write.
    """

    def __init__(
        self,
        bus: Bus,
        run: str,
        origin: Origin,
        epoch: str,
        fence: int = 0,
        *,
        snapshots: Snapshots,
        summaries: SummaryPublisher,
    ) -> None:
        self.run = run
        self.epoch = epoch
        self.fence = fence
        self.state = RunState.new(run, origin.agent)
        self._size = StateSize(self.state)
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
        self._messages = Messages(self._send_token)
        self._channel: Channel | None = None
        self._snapshots = snapshots
        self._summaries = summaries
        self._summary = RunSummary(run, origin.agent, origin.thread, origin.created)
        self._summary_changed = False
        self._grown = 0
        self._snapshot_size = 0
        self._lock = anyio.Lock(fast_acquire=True)

    @classmethod
    async def take_over(cls, bus: Bus, run: str, snapshots: Snapshots, summaries: SummaryPublisher) -> "Recorder":
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
        recorder = cls(bus, run, origin, snapshot.epoch, fence, snapshots=snapshots, summaries=summaries)
        recorder.state = await in_slices(RunState.decode_steps(snapshot.state))
        recorder._size = StateSize(recorder.state)
        recorder._summary = RunSummary.of_state(recorder.state.document)
        recorder._seq = recorder._prev = snapshot.seq
        await recorder._retry(recorder._rebase)
        return recorder

    @property
    def status(self) -> Status:
        status: Status = self.state.document["status"]
        return status

    @property
    def usage(self) -> Usage | None:
        """The sum of all LM calls so far."""
        return self._summary.usage

    def summarise(self) -> Summary | None:
        """The summary after everything that was sealed; None while the last event is yet to be appended."""
        if self._batch and self._batch[-1].terminal:
            return None
        origin = self._origin
        return Summary(
            run=self.run,
            epoch=self.epoch,
            seq=self._seq,
            fence=self.fence,
            principal=origin.principal,
            agent=origin.agent,
            thread=origin.thread,
            status=self._summary.status,
            created=origin.created,
            data=self._summary.encode(self._seq),
        )

    def begin(self, fence: int) -> None:
        """The bus has created the run: it is this process's under `fence`. Nothing may be recorded before."""
        self.fence = fence
        self._summaries.due(self)

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
                snapshot = Snapshot(self.run, self.epoch, self._seq, await self._encode_state())
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
            while await channel.ready(FLUSH_AFTER, self._messages.can_wait):
                async with self._lock:
                    await self._record_waiting(channel)
            async with self._lock:
                self._messages.end_pieces()
                await self._append()
        finally:
            self._channel = None

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
            self._messages.flush()
            await self._append()

    # -- Stamping --------------------------------------------------------------------------------------------------

    def _take(self, emitted: Emitted) -> None:
        ts, event = emitted
        match event:
            case Token():
                self._messages.take(ts, event)
                return
            case MessageStart() | MessageEnd() if (event.message in self._messages) is (event.event == "message_start"):
                return  # a message that begins twice goes on; one that is not open cannot end
            case MessageStart():
                self._messages.begin(event)
            case MessageEnd():
                event = self._messages.complete(ts, event)
            case MessageRetracted():
                self._messages.flush()
                self._messages.close(event.message)
            case _:
                pass
        self._messages.flush()
        self._stamp(ts, event)

    def _send_token(self, id: str, ts: float, delta: str) -> None:
        # No model: deltas were checked one by one, and together they stay under the message's cap.
        self._stamp_fact(ts, {"event": "token", "message": id, "delta": delta})

    def _stamp(self, ts: float, event: Event) -> None:
        self._stamp_fact(ts, event.wire())

    def _stamp_fact(self, ts: float, fact: dict[str, Any]) -> None:
        data = self._encode_event(ts, fact)  # if it cannot be encoded, it never was
        if not self._size.takes(data):
            for trimmed in self._size.trim():
                self._seal(ts, trimmed, self._encode_event(ts, trimmed))
            data = self._encode_event(ts, fact)
        self._seal(ts, fact, data)
        self._size.add(data)

    def _encode_event(self, ts: float, fact: dict[str, Any]) -> bytes:
        return encode_event(self.run, self._origin.agent, self._seq + 1, self._prev, max(self._ts, ts), fact)

    def _seal(self, ts: float, fact: dict[str, Any], data: bytes) -> None:
        name, seq, ts = fact["event"], self._seq + 1, max(self._ts, ts)
        self._seq, self._ts = seq, ts
        event = fact | {"seq": seq, "ts": ts}
        self.state.apply(event)
        self._summary_changed |= self._summary.apply(event)
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
        self._publish_summary(ended)
        if ended or self._grown >= max(SNAPSHOT_GROWTH, self._snapshot_size):
            self._snapshots.due(self)

    def _publish_summary(self, ended: bool) -> None:
        if ended:
            self._summaries.ended(self)
        elif self._summary_changed:
            self._summaries.due(self)
        self._summary_changed = False

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
        state = await self._encode_state()
        self.epoch = await self._bus.rebase(self.run, self.fence, self._seq, state, self.status, self._origin)
        self._last = Frame(self.run, self.epoch, self._seq, b"")  # only to ask by: this log begins after it
        self._batch = []
        self._summaries.due(self)

    async def _encode_state(self) -> bytes:
        """The state, to be saved. Nothing may be stamped meanwhile."""
        state = await in_slices(self.state.encode_steps())
        self._snapshot_size, self._grown = len(state), 0
        self._size.measured(len(state))
        return state

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
