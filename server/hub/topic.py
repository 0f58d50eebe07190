"""What the hub keeps of the runs that are followed here. Without I/O.

A `Topic` is one run that somebody of this process follows: the one bus subscription, the known head, the followers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anyio

from agentcast.server.bus.base import Subscription
from agentcast.server.hub.outbox import Follower, Outbox


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
            self.tell(lambda follower, outbox: outbox.lose(follower, "log_lost"))
        self.head = max(self.head, head)
        self.ended = self.ended or ended
        return True

    def tell(self, do: Callable[[Follower, Outbox], None]) -> None:
        """Call `do` for each follower. Where that breaks, it is that connection's end, and the others go on."""
        for follower, outbox in list(self.followers.items()):
            try:
                do(follower, outbox)
            except Exception as error:  # noqa: BLE001 -- the connection logs it
                outbox.fail(error)


def told(outbox: Outbox, topic: Topic, follower: Follower) -> dict[str, Any]:
    """What the reply to `subscribe` says of one run."""
    followed = outbox.followers.get(topic.run)
    recovered = follower.resync is None if followed is None else followed.full or not follower.full
    return {"run": topic.run, "epoch": topic.epoch, "seq": topic.head, "recovered": recovered}
