"""What the hub keeps of the runs that are followed here, and of the open-ended subscriptions. Without I/O.

A `Topic` is one run that somebody of this process follows: the one bus subscription, the known head, the followers. A
`Rule` is a subscription to everything, an agent or a thread, which turns what the feed announces into followers.
"""

from collections import deque
from dataclasses import dataclass, field

import anyio

from server.bus.base import Announcement, RunInfo, Subscription
from server.outbox import Follower, Outbox
from server.protocol import Detail, To


@dataclass(slots=True, eq=False)
class Topic:
    """A run that this process follows. Closed when the last follower and the last pin are gone."""

    run: str
    epoch: str = ""
    head: int = 0
    ended: bool = False
    pins: int = 0
    followers: dict[Follower, Outbox] = field(default_factory=dict)
    subscription: Subscription | None = None
    opened: anyio.Event = field(default_factory=anyio.Event)
    former: set[str] = field(default_factory=set)
    """Epochs that are over, of which late news may still come."""

    def advance(self, epoch: str, head: int, *, ended: bool) -> bool:
        """The log is known to reach `head` of `epoch`. Another epoch than before: what it held is lost.

        False, and nothing changes, if that epoch is over.
        """
        if epoch in self.former:
            return False
        if epoch != self.epoch:
            self.former.add(self.epoch)
            self.epoch, self.head, self.ended = epoch, head, False
            for follower, outbox in self.followers.items():
                outbox.lose(follower, "log_lost")
        self.head = max(self.head, head)
        self.ended = self.ended or ended
        return True


@dataclass(slots=True, eq=False)
class Rule:
    """An open-ended subscription. What the feed announces waits in `backlog`, until the subscription is `ready` (its
    reply was queued) and the hub has got to it."""

    subscription: str
    outbox: Outbox
    principal: str
    to: To
    detail: Detail
    ready: bool = False
    backlog: deque[Announcement] = field(default_factory=deque)

    def matches(self, run: Announcement | RunInfo) -> bool:
        return run.principal == self.principal and (
            self.to.all is True
            or (self.to.agent is not None and self.to.agent == run.agent)
            or (self.to.thread is not None and self.to.thread == run.thread)
        )
