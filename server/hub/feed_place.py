"""How far one connection has got in the feed, which announces new runs (G1, G2). Without I/O.

A client that resumes from a position of the feed never hears of older runs again. So the position that it is given must
not be ahead of what was queued: `next_position` stops before the first announcement of which nothing was shown yet.

Announcements may be read late, after a run has come another way and ended, or was left. Reads of the feed are numbered;
each gives all that was announced before it began. So where a run is announced in the first read that began after it was
last shown, or in an earlier one, that is the announcement of what was shown, and `past` knows its place; in a later
read, it is another run.
"""

from dataclasses import dataclass, field

from agentcast.server.hub.follower import Follower

MAX_PAST = 10_000
"""Runs that a connection was shown and follows no more, remembered while the feed is late, as many as the feed reaches
back; a connection that needs more is closed."""


@dataclass(slots=True)
class FeedPosition:
    """How far this process has read the feed. One for all connections."""

    position: str = ""
    """Everything up to here was handed out."""
    begun: int = 0
    """The number of the newest read that has begun."""
    handed_out: int = 0
    """The number of the newest read that was handed out."""


@dataclass(frozen=True, slots=True)
class Past:
    """A run that was shown, in part or to its end, and is followed no more."""

    read: int
    """The number of the newest read of the feed at that time."""
    left: Follower | None
    """The place at which it was left; None: its end was queued."""


@dataclass(slots=True)
class _Pending:
    """An announced run to which rules of this connection are yet to be applied, or of which nothing was queued yet."""

    before: str
    """The feed's position before the announcement."""
    waiting: int = 0
    """Rules that are yet to be applied."""
    followers: list[Follower] = field(default_factory=list)

    @property
    def shown(self) -> bool:
        return not self.waiting and all(follower.shown or follower.done for follower in self.followers)


class FeedPlace:
    """One connection's place in the feed."""

    __slots__ = ("_pending", "_sent", "beginning", "past", "source")

    def __init__(self) -> None:
        self.source: FeedPosition | None = None
        """None until the connection has an open-ended subscription."""
        self.beginning = 0
        """Rules that have not got to their place in the feed yet: until then, none can be applied."""
        self.past: dict[str, Past] = {}
        """Oldest first."""
        self._pending: dict[str, _Pending] = {}
        self._sent: str | None = None

    # -- Announcements ---------------------------------------------------------------------------------------------

    def expect(self, run: str, before: str) -> None:
        """A rule of this connection is to be applied to a run; the feed stood at `before` ahead of its announcement."""
        pending = self._pending.get(run)
        if pending is None:
            pending = self._pending[run] = _Pending(before)
        pending.waiting += 1

    def applied(self, run: str, follower: Follower | None = None) -> None:
        """The rule was applied; the follower, if any, is to show the run."""
        pending = self._pending.get(run)
        if pending is not None:
            pending.waiting -= 1
            if follower is not None:
                pending.followers.append(follower)

    def next_position(self) -> str | None:
        """The newest position up to which every run was shown, if it was not given before."""
        if self.source is None or self.beginning:
            return None
        self.forget()
        position = next(iter(self._pending.values())).before if self._pending else self.source.position
        if position == self._sent:
            return None
        self._sent = position
        return position

    # -- What was shown before -------------------------------------------------------------------------------------

    def remember(self, run: str, left: Follower | None) -> bool:
        """A run is followed no more. False if more would have to be remembered than may be."""
        self.past.pop(run, None)
        self.past[run] = Past(self.source.begun if self.source else 0, left)
        if len(self.past) > MAX_PAST and self.source is not None:
            self.forget()
        if len(self.past) > MAX_PAST:
            del self.past[next(iter(self.past))]
            return False
        return True

    def place_of(self, run: str, read: int) -> Past | None:
        """What is known of a run that was announced in read number `read`; None: it is new."""
        past = self.past.get(run)
        return past if past is not None and read <= past.read + 1 else None

    def forget(self) -> None:
        """Forget the announcements that were shown, and the runs whose announcement, if any, has passed."""
        if self.beginning:
            return
        for run in [run for run, pending in self._pending.items() if pending.shown]:
            del self._pending[run]
        done = self.source.handed_out if self.source else 0
        for run in [run for run, past in self.past.items() if past.read < done and run not in self._pending]:
            del self.past[run]
