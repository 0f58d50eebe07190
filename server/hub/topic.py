"""One run that this process follows: its head, its newest frames, its snapshot, and who follows it (G1, G2, G4).

The topic is the only owner of all that. It alone changes the state of a follower, and each of its methods names the
states that it may be called in. Without I/O: what it lacks is read from the bus by `catch_up`.

Live followers all stand at the head. So a segment that is delivered is framed once for each detail, and goes to each of
them as it is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import anyio

from agentcast.server import protocol
from agentcast.server.bus.base import Frame, Gone, Head, RunInfo, Snapshot, Subscription
from agentcast.server.errors import RUN_LOST
from agentcast.server.hub.follower import NEXT, Follower, GapReason, IllegalTransition, ResyncReason, State
from agentcast.server.hub.frames import Batch, Segment
from agentcast.server.hub.ring import Ring, Rings
from agentcast.server.hub.single_flight import SingleFlight
from agentcast.server.protocol import Position

MAX_DISTANCE = 1_000
"""Events behind the head from which on a snapshot is sent instead of the log."""


class RunTopic:
    """A run that this process follows. `unused` is called when its last follower and its last pin are gone."""

    def __init__(self, run: str, unused: Callable[["RunTopic"], None], rings: Rings) -> None:
        self.run = run
        self.info: RunInfo | None = None
        """What the bus knew of the run when the topic was opened."""
        self.is_new = True
        """Whether nobody has begun to open it."""
        self.unknown = False
        """Whether the bus knows of no such run."""
        self.epoch = ""
        self.head = 0
        self.ended = False
        self.followers: dict[Follower, None] = {}
        """In the order in which they were let in, so that what happens can be repeated."""
        self.pins = 0
        """Joins that need it open."""
        self.subscription: Subscription | None = None
        self.opened = anyio.Event()
        self.snapshot: Snapshot | None = None
        """The newest state that was read from the bus, while the ring reaches back to it."""
        self._snapshot_batch: tuple[Snapshot, Batch] | None = None
        self.pages: SingleFlight[tuple[str, int], list[Segment] | None] = SingleFlight()
        self.states: SingleFlight[str, Snapshot] = SingleFlight()
        self._oldest = 1
        """The oldest seq that the log held when the topic was opened."""
        self._live: dict[Follower, None] = {}
        self._ahead: dict[Follower, None] = {}
        """Followers that are behind, and yet have more than was delivered: a snapshot was newer."""
        self._ring = Ring(rings)
        self._former: set[str] = set()
        """Epochs that are over, of which something may still come."""
        self._unused = unused

    # -- The log ---------------------------------------------------------------------------------------------------

    def open(self, info: RunInfo) -> None:
        """The bus's answer to the question for which the topic was made."""
        self.info = info
        self.advance(info.epoch, info.head, ended=info.ended is not None)
        if self.epoch == info.epoch:
            self._oldest = info.oldest

    def advance(self, epoch: str, head: int, *, ended: bool) -> bool:
        """The log is known to reach `head` of `epoch`. Another epoch than before: what it held is lost.

        False, and nothing changes, if that epoch is over.
        """
        if epoch in self._former:
            return False
        if epoch != self.epoch:
            self._former.add(self.epoch)
            for follower in list(self.followers):
                self._guarded(follower, lambda one: self._lose(one, "log_lost"))
            self.epoch, self.head, self.ended, self.snapshot = epoch, head, False, None
            self._oldest = head + 1
            self._forget_ring()
        if head > self.head:
            self._set_head(head)
        self.ended = self.ended or ended
        return True

    def _set_head(self, head: int) -> None:
        """Frames up to `head` are in the log, but not here: the live followers are behind."""
        for follower in list(self._live):
            self._guarded(follower, self._fall_behind)
        self.head = head
        self._forget_ring()
        self._catch_up_with_ahead()

    def _catch_up_with_ahead(self) -> None:
        """The head has moved: what was ahead of it may not be any more."""
        for follower in [one for one in self._ahead if one.cursor <= self.head]:
            self._ahead.pop(follower, None)
            self._guarded(follower, self.rest)
            if follower.state is State.BEHIND:
                self._guarded(follower, follower.outbox.stand)

    def deliver(self, item: Sequence[Frame] | Head | Gone) -> None:
        """What the bus has of the run. Never raises: what breaks for a follower is its own connection's end."""
        if isinstance(item, Gone):
            for follower in list(self.followers):
                self._guarded(follower, self.give_up)
        elif isinstance(item, Head):
            self.advance(item.epoch, item.seq, ended=item.ended)
            self._end_if_over()
        elif item[-1].epoch == self.epoch and item[0].seq <= self.head + 1 <= item[-1].seq:
            self._extend(Segment(item[self.head + 1 - item[0].seq :]))
        else:
            self.advance(item[-1].epoch, item[-1].seq, ended=item[-1].terminal)
            self._end_if_over()

    def _extend(self, segment: Segment) -> None:
        """The next frames of the log: the hot path."""
        full, progress = segment.batch(full=True), segment.batch(full=False)
        behind: list[Follower] = []
        for follower in self._live:
            batch = full if follower.full else progress
            if not batch.payloads:
                continue
            try:
                if follower.outbox.send(batch):
                    follower.shown = True
                else:
                    behind.append(follower)
            except Exception as error:  # noqa: BLE001 -- the connection logs it
                follower.outbox.fail(error)
        for follower in behind:
            self._guarded(follower, self._fall_behind)
        self.head = segment.last
        self._keep(segment)
        if self._ahead:
            self._catch_up_with_ahead()
        if segment.terminal:
            self.ended = True
            self._end_if_over()

    def _end_if_over(self) -> None:
        """Let go of the live followers of a run that has ended: they have everything."""
        if self.ended:
            for follower in list(self._live):
                self._guarded(follower, self._end)

    def _guarded(self, follower: Follower, change: Callable[[Follower], None]) -> None:
        try:
            change(follower)
        except Exception as error:  # noqa: BLE001 -- the connection logs it
            follower.outbox.fail(error)

    # -- The ring --------------------------------------------------------------------------------------------------

    def _keep(self, segment: Segment) -> None:
        self._ring.extend(segment)
        if self.snapshot is not None and self.snapshot.seq < self.head - self._kept:
            self.snapshot = None  # nothing here could go on from it

    def _forget_ring(self) -> None:
        self._ring.clear()
        if self.snapshot is not None and self.snapshot.seq < self.head:
            self.snapshot = None

    @property
    def _kept(self) -> int:
        """Events, up to the head, that the ring holds."""
        first = self._ring.first
        return 0 if first is None else self.head - first + 1

    def recent(self, follower: Follower) -> list[Segment]:
        """What follows its cursor, if the ring reaches back to it; else nothing."""
        if follower.epoch != self.epoch or self.head - follower.cursor > self._kept:
            return []
        return self._ring.after(follower.cursor)

    # -- Followers: every change of a state ------------------------------------------------------------------------

    def place(self, follower: Follower, position: Position | None, *, whole: bool = False) -> None:
        """Where a joining follower begins: at `position`, or with a snapshot."""
        if position is None:
            follower.resync = "asked"
            return
        follower.cursor, follower.whole = position.seq, whole or position.seq == 0
        if position.epoch is not None or position.seq:
            follower.epoch = position.epoch or ""
        follower.resync = self.gap_before(follower)
        if follower.resync is None and follower.cursor + 1 < self._oldest:
            follower.resync = "trimmed"

    def resume(self, follower: Follower, left: Follower) -> None:
        """Where a joining follower begins whose client had left the run."""
        follower.epoch, follower.cursor, follower.shown = left.epoch, left.cursor, True
        follower.resync = left.resync or self.gap_before(follower)
        if follower.full and not left.full:
            follower.resync = follower.resync or "asked"

    def gap_before(self, follower: Follower) -> GapReason | None:
        """Why what follows the cursor is not to be replayed, as far as is known without looking into the log."""
        if follower.epoch != self.epoch or follower.cursor > self.head:
            return "log_lost"
        return "overflow" if self.head - follower.cursor > MAX_DISTANCE and not follower.whole else None

    def admit(self, follower: Follower) -> Follower:
        """Joining → behind or resync: the reply was queued. Where the connection follows the run already, that
        follower takes its subscriptions over, and goes on where it is; if that raises its detail, with a snapshot."""
        self._check(follower, State.JOINING, State.BEHIND)
        known = follower.outbox.followers.get(self.run)
        if known is not None:
            follower.state = State.DONE
            if known.want(follower.wants):
                self._lose(known, "asked")
            return known
        follower.outbox.add(follower)
        self.followers[follower] = None
        if follower.resync is None:
            follower.resync = self.gap_before(follower)
        self._move(follower, State.BEHIND if follower.resync is None else State.RESYNC)
        return follower

    def lose(self, follower: Follower, reason: ResyncReason) -> None:
        """Behind or live → resync: what follows the cursor cannot, or is not to, be replayed."""
        self._lose(follower, reason)

    def supply(self, follower: Follower, segment: Segment) -> bool:
        """Behind: queue what follows the cursor, up to the head and as far as there is room. At the head, it becomes
        live, or done. Whether something more of the segment is left for it."""
        self._check(follower, State.BEHIND, State.LIVE)
        part, outbox = segment.after(follower.cursor), follower.outbox
        if part is not None and part.first <= self.head:
            follower.cursor, shown = outbox.offer(part.until(self.head), full=follower.full)
            follower.shown = follower.shown or shown
        self.rest(follower)
        return follower.state is State.BEHIND and follower.cursor < segment.last

    def supply_snapshot(self, follower: Follower, snapshot: Snapshot) -> None:
        """Resync → behind, and at the head live, or done: queue the snapshot, after a `gap` unless it was asked for."""
        self._check(follower, State.RESYNC, State.BEHIND)
        if follower.resync is not None and follower.resync != "asked":
            first = min(follower.cursor, snapshot.seq) + 1
            follower.outbox.put(protocol.gap(self.run, first, max(first, snapshot.seq), follower.resync))
        follower.outbox.push(self._framed(snapshot))
        follower.epoch, follower.cursor, follower.resync, follower.shown = snapshot.epoch, snapshot.seq, None, True
        self._move(follower, State.BEHIND)
        if snapshot.ended:
            self._end(follower)
        else:
            self.rest(follower)

    def _framed(self, snapshot: Snapshot) -> Batch:
        """The frame of a snapshot: the same object for all who are sent it in a row."""
        if self._snapshot_batch is None or self._snapshot_batch[0] is not snapshot:
            frame = protocol.snapshot(self.run, snapshot.epoch, snapshot.seq, snapshot.state)
            self._snapshot_batch = (snapshot, Batch((frame,)))
        return self._snapshot_batch[1]

    def rest(self, follower: Follower) -> None:
        """Behind → live, or done, if it has everything."""
        if follower.state is not State.BEHIND or follower.epoch != self.epoch:
            return
        if follower.cursor > self.head:
            self._ahead[follower] = None
            follower.outbox.rest(follower)
        elif follower.cursor == self.head:
            self._move(follower, State.LIVE)
            if self.ended:
                self._end(follower)

    def leave(self, follower: Follower) -> None:
        """Any state → done: nobody wants it any more."""
        if follower.state is State.LIVE:
            follower.cursor = self.head
        if not follower.done:
            self._move(follower, State.DONE)

    def give_up(self, follower: Follower) -> None:
        """Any state → done: the bus has lost the run. No frame can say so, but the reply to a client that comes back
        does: `missing`."""
        if not follower.done:
            self._move(follower, State.DONE)
            follower.outbox.link.cut(RUN_LOST)

    def _fall_behind(self, follower: Follower) -> None:
        follower.cursor = self.head
        self._move(follower, State.BEHIND)

    def _lose(self, follower: Follower, reason: ResyncReason) -> None:
        if follower.state is State.LIVE:
            follower.cursor = self.head
        if follower.resync in (None, "asked"):
            follower.resync = reason
        if follower.state not in (State.RESYNC, State.JOINING):
            self._move(follower, State.RESYNC)

    def _end(self, follower: Follower) -> None:
        """Behind or live → done: the end of the run was queued."""
        self._move(follower, State.DONE)
        follower.outbox.remember(self.run, None)

    def _check(self, follower: Follower, state: State, target: State) -> None:
        """Before anything is queued, or changed: whether it is in the state that leads to `target` here."""
        if follower.state is not state:
            raise IllegalTransition(self.run, follower.state, target)

    def _move(self, follower: Follower, state: State) -> None:
        if state not in NEXT[follower.state]:
            raise IllegalTransition(self.run, follower.state, state)
        self._live.pop(follower, None)
        self._ahead.pop(follower, None)
        follower.state = state
        match state:
            case State.LIVE:
                follower.whole = False
                self._live[follower] = None
                follower.outbox.rest(follower)
            case State.DONE:
                self._forget(follower)
            case _:
                follower.outbox.stand(follower)

    def _forget(self, follower: Follower) -> None:
        self.followers.pop(follower, None)
        try:
            if follower.outbox.followers.get(self.run) is follower:
                follower.outbox.remove(follower)
        finally:
            self.close_unused()

    # -- Its life --------------------------------------------------------------------------------------------------

    def drop(self, follower: Follower) -> None:
        """Forget a follower whose connection's books may be wrong."""
        self._live.pop(follower, None)
        self._ahead.pop(follower, None)
        self.followers.pop(follower, None)
        follower.state = State.DONE
        self.close_unused()

    def unpin(self) -> None:
        """A join needs it no more."""
        self.pins -= 1
        self.close_unused()

    @property
    def used(self) -> bool:
        return bool(self.followers) or self.pins > 0

    def close(self) -> None:
        """Nothing of the run is to be delivered any more."""
        self._ring.clear()
        if self.subscription is not None:
            self.subscription.close()

    def close_unused(self) -> None:
        if not self.used:
            self._unused(self)

    def described(self, follower: Follower) -> dict[str, Any]:
        """What the reply to `subscribe` says of the run."""
        known = follower.outbox.followers.get(self.run)
        recovered = follower.resync is None if known is None else known.full or not follower.full
        return {"run": self.run, "epoch": self.epoch, "seq": self.head, "recovered": recovered}
