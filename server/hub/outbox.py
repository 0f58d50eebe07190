"""What one connection still has to be sent, and how far it has got in each run that it follows (G1, G2, G4).

Two halves, both without I/O. The *queue* holds encoded frames for the writer and is bounded: once it is full, run
events are refused, while replies are always taken (they are bounded by the commands in progress). Each *follower* is
the connection's one position in one run. It is **live**: the next frame goes straight into the queue; or **behind**:
frames only raise the known head, and whoever has room pulls the log after the cursor until it is live again. Joining,
reconnecting and overflowing are all "become behind". Nothing that was queued is ever dropped.

This module must not know the bus's work, sockets or commands.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from agentcast.server import protocol
from agentcast.server.bus.base import Frame, Page, Snapshot
from agentcast.server.errors import TooMany
from agentcast.server.hub.frames import Batch
from agentcast.server.protocol import Detail

QUEUE_FRAMES = 512
QUEUE_BYTES = 1024 * 1024
TAKE_BYTES = 256 * 1024
MAX_FOLLOWED = 5_000
"""Runs that one connection may follow at once; one that lets more pile up is cut."""
MAX_PAST = 10_000
"""Runs that a connection was shown and follows no more, remembered while the feed lags, as many as the feed reaches
back; a connection that needs more is cut."""

GapReason = Literal["trimmed", "overflow", "log_lost"]


@dataclass(slots=True, eq=False)
class Follower:
    """One connection's position in one run: it has everything up to `cursor` of `epoch`."""

    run: str
    epoch: str
    cursor: int
    live: bool = False
    resync: GapReason | Literal["asked"] | None = None
    """Set while a snapshot is due. Except where it was asked for, a `gap` with this reason precedes it."""
    whole: bool = False
    """The log was asked for from its start: being far from the head is no reason for a snapshot."""
    shown: bool = False
    """Something of the run was queued, so the client knows of it."""
    done: bool = False
    """Nothing more is to be sent: the terminal event was queued, or nobody wants the run any more."""
    wants: dict[str, Detail] = field(default_factory=dict)
    """Subscription → the detail that it asked for."""

    @property
    def full(self) -> bool:
        """Whether any subscription wants every event."""
        return "full" in self.wants.values()


@dataclass(frozen=True, slots=True)
class Past:
    """A run that was shown, in part or to its end. An announcement that is read later must not bring that again; see
    `rules`."""

    read: int
    """The number of the hub's newest read of the feed at that time."""
    left: Follower | None
    """The position at which it was left; None: its end was queued."""


@dataclass(slots=True)
class _Announced:
    """One position of the feed: subscriptions that are yet to be told of it, and who follows what it announced."""

    waiting: int = 0
    followers: list[Follower] = field(default_factory=list)

    @property
    def shown(self) -> bool:
        return not self.waiting and all(follower.shown or follower.done for follower in self.followers)


class Outbox:
    """The queue and the followers of one connection.

    `wake` is called when something was queued, `pull` when a follower fell behind, `cut` when the connection is past
    saving, and `fail` (by default `cut`) when something of it broke. All must return at once.
    """

    def __init__(
        self,
        wake: Callable[[], None],
        pull: Callable[[], None],
        cut: Callable[[], None],
        *,
        queue_frames: int = QUEUE_FRAMES,
        queue_bytes: int = QUEUE_BYTES,
        fail: Callable[[Exception], None] | None = None,
    ) -> None:
        self._wake = wake
        self._pull = pull
        self.cut = cut
        self._fail = fail
        self._queue_frames = queue_frames
        self._queue_bytes = queue_bytes
        self._queue: deque[Batch] = deque()
        self._bytes = 0
        self._behind: dict[Follower, None] = {}
        self._announced: dict[str, _Announced] = {}
        self.followers: dict[str, Follower] = {}
        self.subscriptions: dict[str, bool] = {}
        """Subscription → whether it is to a single run, and so ends with it."""
        self.broken = False
        """Whether it failed, so that what it says of its followers may be wrong."""
        self.feed_read = 0
        """The number of the hub's newest read of the feed."""
        self.past: dict[str, Past] = {}
        """Runs that were shown and are not followed any more, oldest first."""

    # -- The queue -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def full(self) -> bool:
        """Whether run events are refused at the moment."""
        return len(self._queue) >= self._queue_frames or self._bytes >= self._queue_bytes

    @property
    def is_behind(self) -> bool:
        return bool(self._behind)

    def put(self, data: bytes) -> None:
        """Queue one frame, whatever the queue holds."""
        self.push(_batch(data))

    def push(self, batch: Batch) -> None:
        """Queue a batch, whatever the queue holds."""
        self._queue.append(batch)
        self._bytes += batch.size
        self._wake()

    def take(self) -> list[Batch]:
        """The oldest frames, in order, about `TAKE_BYTES` of them; empty if nothing waits."""
        taken: list[Batch] = []
        size = 0
        while self._queue and size < TAKE_BYTES:
            batch = self._queue.popleft()
            taken.append(batch)
            size += batch.size
        self._bytes -= size
        if self._behind and not self.full:
            self._pull()
        return taken

    # -- Followers -------------------------------------------------------------------------------------------------

    def subscribe(self, subscription: str, *, single: bool) -> None:
        """Add a subscription; one that was added before stays as it is.

        :raises TooMany: the connection has as many subscriptions as it may have.
        """
        if subscription in self.subscriptions:
            return
        if len(self.subscriptions) >= protocol.MAX_SUBSCRIPTIONS:
            raise TooMany(f"a connection may have {protocol.MAX_SUBSCRIPTIONS} subscriptions; end one of them first")
        if not single and all(self.subscriptions.values()):
            self.past.clear()  # an open-ended subscription brings nothing that was announced before it
        self.subscriptions[subscription] = single

    def unsubscribe(self, subscription: str) -> list[Follower]:
        """End a subscription. Gives the followers that are done because nobody else wanted them."""
        del self.subscriptions[subscription]
        dropped = []
        for follower in list(self.followers.values()):
            if follower.wants.keys() == {subscription}:
                self.finish(follower)
                dropped.append(follower)
                if follower.shown:
                    self._remember(follower.run, Past(self.feed_read, follower))
            else:
                follower.wants.pop(subscription, None)
        return dropped

    def close(self) -> list[Follower]:
        """End all subscriptions. Gives the followers, all of which are done."""
        followers = list(self.followers.values())
        for follower in followers:
            follower.done, follower.live = True, False
        for entries in (self.subscriptions, self.followers, self._behind, self._announced, self.past):
            entries.clear()
        return followers

    def follow(self, new: Follower) -> Follower:
        """Follow a run, or widen the follower that there is: one position for each connection and run.

        Raising the detail asks for a snapshot; otherwise a run that is followed already goes on as it was.
        """
        follower = self.followers.get(new.run)
        if follower is None:
            if len(self.followers) >= MAX_FOLLOWED:
                self.cut()
            self.followers[new.run] = new
            self.past.pop(new.run, None)
            self._fall_behind(new)
            return new
        raised = not follower.full
        follower.wants.update(new.wants)
        if raised and follower.full:
            self.lose(follower, "asked")
        return follower

    def deliver(self, follower: Follower, frames: Sequence[Frame]) -> None:
        """News of a run: queued if the follower is live and the queue has room, else the follower is behind."""
        for frame in frames:
            if not follower.live:
                return
            if frame.epoch != follower.epoch or frame.seq > follower.cursor + 1 or self.full:
                self._fall_behind(follower)
            elif frame.seq > follower.cursor:
                self._push(follower, frame)

    def expect_head(self, follower: Follower, head: int) -> None:
        """The log reaches `head`: a live follower that was not given all of it is behind."""
        if follower.live and follower.cursor < head:
            self._fall_behind(follower)

    def lose(self, follower: Follower, reason: GapReason | Literal["asked"]) -> None:
        """What follows the cursor cannot, or is not to, be replayed: a snapshot is due."""
        if follower.resync in (None, "asked"):
            follower.resync = reason
        self._fall_behind(follower)

    def next_behind(self) -> Follower | None:
        """The follower whose turn it is to be pulled for; None if none is behind or there is no room."""
        if not self._behind or self.full:
            return None
        follower = next(iter(self._behind))
        del self._behind[follower]
        self._behind[follower] = None  # to the end of the line
        return follower

    def add_page(self, follower: Follower, page: Page, head: int, *, ended: bool = False) -> None:
        """Queue the page after the cursor, as far as there is room. At `head`, the follower is live; or done, if the
        log has `ended`."""
        for frame in page.frames:
            if self.full:
                return
            if frame.seq == follower.cursor + 1:
                self._push(follower, frame)
        self._check_live(follower, head, ended=ended)

    def add_snapshot(self, follower: Follower, snapshot: Snapshot, head: int, *, ended: bool) -> None:
        """Queue the snapshot that is due, after a `gap` unless it was asked for."""
        if follower.resync is not None and follower.resync != "asked":
            first = min(follower.cursor, snapshot.seq) + 1
            self.put(protocol.gap(follower.run, first, max(first, snapshot.seq), follower.resync))
        self.put(protocol.snapshot(snapshot.run, snapshot.epoch, snapshot.seq, snapshot.state))
        follower.epoch, follower.cursor = snapshot.epoch, snapshot.seq
        follower.resync, follower.shown = None, True
        self._check_live(follower, head, ended=ended)

    def _check_live(self, follower: Follower, head: int, *, ended: bool) -> None:
        if follower.cursor < head or follower.done:
            return
        if ended:
            self.end(follower)
        else:
            follower.live, follower.whole = True, False
            self._behind.pop(follower, None)

    def _push(self, follower: Follower, frame: Frame) -> None:
        if frame.progress or follower.full:
            self.put(frame.data)
            follower.shown = True
        follower.cursor = frame.seq
        if frame.terminal:
            self.end(follower)

    def _fall_behind(self, follower: Follower) -> None:
        follower.live = False
        self._behind[follower] = None
        if not self.full:
            self._pull()

    def end(self, follower: Follower) -> None:
        """The end of the run was queued."""
        self.finish(follower)
        self._remember(follower.run, Past(self.feed_read, None))

    def _remember(self, run: str, past: Past) -> None:
        self.past[run] = past
        if len(self.past) > MAX_PAST:
            del self.past[next(iter(self.past))]
            if not all(self.subscriptions.values()):
                self.cut()

    def forget_past(self, read: int, waiting: Callable[[str], bool]) -> None:
        """Forget what was shown before the feed read `read` began, except runs whose announcement is `waiting` to be
        applied."""
        for run in [run for run, past in self.past.items() if past.read < read and not waiting(run)]:
            del self.past[run]

    def finish(self, follower: Follower) -> None:
        """Nothing more is to be sent of the run; subscriptions to it alone end."""
        follower.done, follower.live = True, False
        self._behind.pop(follower, None)
        del self.followers[follower.run]
        for subscription in follower.wants:
            if self.subscriptions.get(subscription):
                del self.subscriptions[subscription]

    def fail(self, error: Exception) -> None:
        """Something of this connection broke: it ends, and nobody else is to notice."""
        self.broken = True
        if self._fail is None:
            self.cut()
        else:
            self._fail(error)

    # -- The feed --------------------------------------------------------------------------------------------------

    def expect(self, position: str) -> None:
        """One of this connection's open-ended subscriptions is to be told of what the feed announced at `position`."""
        self._announced.setdefault(position, _Announced()).waiting += 1

    def announce(self, position: str, follower: Follower | None) -> None:
        """It was told; `follower` follows the run announced there, if it is wanted here."""
        announced = self._announced[position]
        announced.waiting -= 1
        if follower is not None:
            announced.followers.append(follower)

    def put_feed(self) -> None:
        """Queue a `feed` frame, if there is news: the newest position up to which every run was shown.

        A client that resumes from it never hears of older runs again, so it must not be ahead of what was queued, on
        behalf of any subscription.
        """
        position = None
        for announced in list(self._announced):
            if not self._announced[announced].shown:
                break
            del self._announced[announced]
            position = announced
        if position is not None:
            self.put(protocol.feed(position))


_batches: dict[int, Batch] = {}
"""The batches of the newest frames, by the identity of their bytes: other clients are sent the very same."""


def _batch(data: bytes) -> Batch:
    batch = _batches.get(id(data))
    if batch is None:
        if len(_batches) >= 256:
            _batches.clear()
        batch = _batches[id(data)] = Batch((data,))
    return batch
