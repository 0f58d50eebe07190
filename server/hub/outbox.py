"""What one connection still has to be sent, and which runs it follows (G1, G2, G4).

Frames go to the socket at once while it takes more, and wait in the *queue* otherwise. Once that is full, run events
are refused, while replies are always taken (they are bounded by the commands in progress). Nothing that was queued is
dropped. The *line* holds the followers that something must be pulled for, as soon as there is room.

Without I/O. This module must not know the bus, sockets, commands, or when a follower changes its state: its topic does
that.
"""

from collections import deque
from typing import Protocol

from agentcast.server import protocol
from agentcast.server.errors import LIMIT_EXCEEDED, CloseReason, TooMany
from agentcast.server.hub.feed_place import FeedPlace
from agentcast.server.hub.follower import Follower
from agentcast.server.hub.frames import Batch, Segment

QUEUE_FRAMES = 512
QUEUE_BYTES = 1024 * 1024
TAKE_BYTES = 256 * 1024
MAX_FOLLOWED = 5_000
"""Runs that one connection may follow at once. Others that its subscriptions cover are left out, and it is said so."""


class Link(Protocol):
    """The connection that an outbox belongs to. Every method returns at once."""

    def write(self, batch: Batch) -> bool:
        """Write to the socket at once, where it takes more; False: it does not, and nothing was written. Called only
        while nothing is queued."""

    def wake(self) -> None:
        """Something was queued."""

    def pull(self) -> None:
        """There is something to pull, and room for it."""

    def cut(self, reason: CloseReason) -> None:
        """The connection cannot go on."""

    def fail(self, error: Exception) -> None:
        """Something of the connection broke: it ends, and nobody else notices."""


class Outbox:
    """The queue and the followers of one connection."""

    __slots__ = (
        "__weakref__",
        "_bytes",
        "_claimed",
        "_frames",
        "_line",
        "_queue",
        "_queue_bytes",
        "_queue_frames",
        "_truncated",
        "broken",
        "feed",
        "followers",
        "link",
        "subscriptions",
    )

    def __init__(self, link: Link, *, queue_frames: int = QUEUE_FRAMES, queue_bytes: int = QUEUE_BYTES) -> None:
        self.link = link
        self._queue_frames = queue_frames
        self._queue_bytes = queue_bytes
        self._queue: deque[Batch] = deque()
        self._frames = 0
        self._bytes = 0
        self._line: dict[Follower, None] = {}
        self._claimed: set[Follower] = set()
        self._truncated: dict[str, int] = {}
        self.followers: dict[str, Follower] = {}
        self.subscriptions: dict[str, bool] = {}
        """Subscription → whether the feed brings it nothing: it is to a single run, and so ends with it, or to
        summaries."""
        self.feed = FeedPlace()
        self.broken = False
        """Whether it failed, so that its books may be wrong."""

    # -- The queue -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Frames that wait."""
        return self._frames

    @property
    def full(self) -> bool:
        """Whether run events are refused at the moment."""
        return self._frames >= self._queue_frames or self._bytes >= self._queue_bytes

    @property
    def space(self) -> int:
        """Bytes that fit into it as one more frame."""
        return 0 if self.full else self._queue_bytes - self._bytes

    def put(self, payload: bytes) -> None:
        """Send one frame, or queue it, whatever the queue holds."""
        self.push(Batch((payload,)))

    def send(self, batch: Batch) -> bool:
        """Send frames, or queue them; False: there is no room for them. The hot path."""
        if not self._queue and self.link.write(batch):
            return True
        fits = self.fits(batch)
        if fits:
            self._append(batch)
        return fits

    def push(self, batch: Batch) -> None:
        """Send frames, or queue them, whatever the queue holds."""
        if self._queue or not self.link.write(batch):
            self._append(batch)

    def _append(self, batch: Batch) -> None:
        self._queue.append(batch)
        self._frames += len(batch.payloads)
        self._bytes += batch.size
        self.link.wake()

    def fits(self, batch: Batch) -> bool:
        """Whether a whole batch can be queued without waiting for room."""
        return (
            self._frames + len(batch.payloads) <= self._queue_frames and self._bytes + batch.size <= self._queue_bytes
        )

    def offer(self, segment: Segment, *, full: bool) -> tuple[int, bool]:
        """Send or queue as much of a segment as there is room for, which is at least one frame unless the queue is
        `full`. Gives the last seq that it reaches, and whether that brought the client anything."""
        batch = segment.batch(full=full)
        if not self.fits(batch):
            if self.full:
                return segment.first - 1, False
            segment = segment.head(self._queue_frames - self._frames, self._queue_bytes - self._bytes)
            batch = segment.batch(full=full)
        if batch.payloads:
            self.push(batch)
        return segment.last, bool(batch.payloads)

    def take(self) -> list[Batch]:
        """The oldest batches, in order, about `TAKE_BYTES` of them; empty if nothing waits."""
        taken: list[Batch] = []
        size = 0
        while self._queue and size < TAKE_BYTES:
            batch = self._queue.popleft()
            taken.append(batch)
            size += batch.size
            self._frames -= len(batch.payloads)
        self._bytes -= size
        if self._line and not self.full:
            self.link.pull()
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
        if not single and not self.open_ended:
            self.feed.past.clear()  # an open-ended subscription brings nothing that was announced before it
        self.subscriptions[subscription] = single

    @property
    def open_ended(self) -> bool:
        """Whether any subscription takes in runs to come."""
        return not all(self.subscriptions.values())

    @property
    def room(self) -> int:
        """Runs that it may follow besides those that it does."""
        return MAX_FOLLOWED - len(self.followers)

    def add(self, follower: Follower) -> None:
        self.followers[follower.run] = follower
        self.feed.past.pop(follower.run, None)

    def remove(self, follower: Follower) -> None:
        """Nothing more is to be sent of the run; subscriptions to it alone end."""
        self.rest(follower)
        self._claimed.discard(follower)
        del self.followers[follower.run]
        for subscription in follower.wants:
            if self.subscriptions.get(subscription):
                del self.subscriptions[subscription]

    def remember(self, run: str, left: Follower | None) -> None:
        """A run that was shown is followed no more; None: its end was queued."""
        if not self.feed.remember(run, left) and self.open_ended:
            self.link.cut(LIMIT_EXCEEDED)

    def close(self) -> None:
        """Nothing is to be pulled for it any more."""
        self.followers.clear()
        self.subscriptions.clear()
        self._line.clear()

    def truncate(self, subscription: str) -> None:
        """A subscription covers a run that it cannot bring, for lack of room."""
        if subscription in self.subscriptions:
            self._truncated[subscription] = self._truncated.get(subscription, 0) + 1

    def refuse(self, follower: Follower) -> None:
        """The connection follows as many runs as it may: this one it cannot. Subscriptions to it alone end."""
        for subscription in follower.wants:
            if self.subscriptions.get(subscription):
                del self.subscriptions[subscription]
                self.put(protocol.truncated(subscription, 1))
            else:
                self.truncate(subscription)

    # -- The line --------------------------------------------------------------------------------------------------

    @property
    def is_behind(self) -> bool:
        return bool(self._line)

    @property
    def behind(self) -> int:
        """Followers that something must be pulled for, without those that it is being pulled for."""
        return len(self._line) - len(self._claimed)

    def stand(self, follower: Follower) -> None:
        """Something must be pulled for this follower."""
        self._line[follower] = None
        if not self.full:
            self.link.pull()

    def rest(self, follower: Follower) -> None:
        """Nothing must be pulled for it any more."""
        self._line.pop(follower, None)

    def claim(self) -> Follower | None:
        """The follower whose turn it is to be pulled for, until it is `release`d; None if there is none, or no room."""
        if self.full:
            return None
        follower = next((one for one in self._line if one not in self._claimed), None)
        if follower is not None:
            self._claimed.add(follower)
        return follower

    def release(self, follower: Follower) -> None:
        """It was pulled for. Where more must be, it goes to the end of the line."""
        self._claimed.discard(follower)
        if follower in self._line:
            del self._line[follower]
            self._line[follower] = None

    # -- Ending, and what is said in between -----------------------------------------------------------------------

    def fail(self, error: Exception) -> None:
        """Something of this connection broke."""
        self.broken = True
        self.link.fail(error)

    def put_notices(self) -> None:
        """Once a second: queue the feed's position, and the number of runs left out, if either has changed."""
        position = self.feed.next_position() if self.open_ended else None
        if position is not None:
            self.put(protocol.feed(position))
        for subscription, runs in self._truncated.items():
            if runs and subscription in self.subscriptions:
                self.put(protocol.truncated(subscription, runs))
        self._truncated.clear()
