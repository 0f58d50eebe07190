"""Open-ended subscriptions, and the feed that brings them runs (G1, G2).

A `Rule` is a subscription to everything, an agent or a thread. What the feed announces waits in its backlog until the
hub has turned it into a follower. However late the feed is read, each run is brought once, and none is left out:

- A rule begins at a position of the feed that is asked for before the active runs are listed. What was announced up to
  there is dropped: such a run is listed, or had ended. All that was announced later is applied.
- A read of the feed gives all that was announced before it began, in order. So when a connection has shown a run to its
  end, or its client has left the run, the announcement of that run waits in a backlog, or comes with the next read to
  begin, or never comes. Until then the outbox keeps the run in `past`. Applying the announcement of a run that has
  ended does nothing; a run that was left goes on where it was left.

This module must not know who follows which run.
"""

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from agentcast.server.bus.base import ACTIVE, Announce, Announcement, Bus, Filter, RunInfo, Subscription
from agentcast.server.hub.outbox import Follower, Outbox
from agentcast.server.protocol import Detail, To

MAX_LISTED = 5_000

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Rule:
    """An open-ended subscription of one connection."""

    subscription: str
    outbox: Outbox
    principal: str
    to: To
    detail: Detail
    joined: str | None = None
    """Where in the feed it begins, as long as what was announced before may still come."""
    ready: bool = False
    """Whether its reply was queued."""
    backlog: dict[str, Announcement] = field(default_factory=dict)
    """Run → its announcement, in order."""

    def matches(self, run: Announcement | RunInfo) -> bool:
        return run.principal == self.principal and (
            self.to.all is True
            or (self.to.agent is not None and self.to.agent == run.agent)
            or (self.to.thread is not None and self.to.thread == run.thread)
        )

    @property
    def next(self) -> Announcement | None:
        """What is to be applied next, if it is time for it."""
        if not self.ready or self.joined is not None or not self.backlog:
            return None
        return next(iter(self.backlog.values()))

    def add(self, entry: Announcement) -> None:
        if entry.run not in self.backlog:
            self.backlog[entry.run] = entry
            self.outbox.expect(entry.position)

    def pop(self, follower: Follower | None = None) -> None:
        """The oldest announcement is done with; `follower` follows its run, if it is wanted here."""
        entry = self.backlog.pop(next(iter(self.backlog)))
        self.outbox.announce(entry.position, follower)

    def begin(self) -> None:
        """Drop what was announced before the rule joined. The feed must have been read since.

        If the feed lacks the position, it was replaced: everything is then applied, since a run that comes twice is
        better than one that never comes.
        """
        positions = [entry.position for entry in self.backlog.values()]
        if self.joined in positions:
            for _ in range(positions.index(self.joined) + 1):
                self.pop()
        self.joined = None


class FeedReader:
    """Reads the feed of `bus`, one read at a time, and hands what it announces to all `rules`."""

    def __init__(self, bus: Bus, rules: Mapping[tuple[Outbox, str], Rule]) -> None:
        self.position = ""
        """Everything up to here was handed out."""
        self.reads = 0
        """Reads that have begun."""
        self._bus = bus
        self._rules = rules

    async def watch(self, announce: Announce) -> Subscription:
        """Begin where the feed is now."""
        subscription, self.position = await self._bus.watch_feed(announce)
        return subscription

    async def end(self) -> str:
        """The feed's position now."""
        subscription, position = await self._bus.watch_feed(_ignore)
        subscription.close()
        return position

    async def read(self) -> None:
        """Hand out what was announced since the last read."""
        ready = {rule for rule in self._rules.values() if rule.ready}
        self.reads += 1
        for rule in self._rules.values():
            rule.outbox.feed_read = self.reads
        entries = await self._bus.read_feed(self.position)
        if entries is None:
            logger.warning("the feed does not reach back to %s; listing the active runs instead", self.position)
            entries = await self._list_active()
        if entries:
            self.position = entries[-1].position
        by_outbox: dict[Outbox, list[Rule]] = {}
        for rule in self._rules.values():
            if entries or rule.joined is not None or rule.outbox.past:
                by_outbox.setdefault(rule.outbox, []).append(rule)
        for outbox, rules in by_outbox.items():
            try:
                self._hand_out(outbox, rules, entries, ready)
            except Exception as error:  # noqa: BLE001 -- of this connection; the others must hear of the runs
                outbox.fail(error)

    def _hand_out(
        self, outbox: Outbox, rules: Sequence[Rule], entries: Sequence[Announcement], ready: Set[Rule]
    ) -> None:
        for entry in entries:
            for rule in rules:
                rule.add(entry)
        for rule in rules:
            if rule in ready:
                rule.begin()
        outbox.forget_past(self.reads, lambda run: any(run in rule.backlog for rule in rules))

    async def _list_active(self) -> list[Announcement]:
        """Every active run, as if it were announced at the feed's position now."""
        position = await self.end()
        active = await self._bus.list(Filter(statuses=ACTIVE, limit=MAX_LISTED))
        self.position = position
        return [Announcement(position, run.run, run.epoch, run.agent, run.thread, run.principal) for run in active]


def _ignore(announcement: Announcement | None) -> None:
    pass
