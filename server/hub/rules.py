"""Open-ended subscriptions, and the feed that brings them runs (G1, G2).

A `Rule` is a subscription to everything, an agent or a thread. However late the feed is read, each run is brought once,
and none is left out:

- A rule begins at a position of the feed that is asked for before the active runs are listed. What was announced up to
  there is dropped: such a run is listed, or had ended. All that was announced later is applied.
- What was shown already is recognised by the number of the read that announces it; see `feed_place`.

Rules are kept by what they ask for, so an announcement costs those that it concerns. This module must not know who
follows which run.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from anyio.lowlevel import checkpoint

from agentcast.server.bus.base import ACTIVE, Announce, Announcement, Bus, Filter, RunInfo, Subscription, Summary
from agentcast.server.hub.feed_place import FeedPosition
from agentcast.server.hub.outbox import MAX_FOLLOWED, Outbox
from agentcast.server.protocol import Detail, To

MAX_LISTED = MAX_FOLLOWED
"""Active runs that an open-ended subscription begins with, the newest."""
LIST_PAGE = 1_000
"""Runs that are listed at a time."""
SLICE = 200
"""Rules that a run is brought to in one turn of the loop."""

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
    left: bool = False
    backlog: list["Arrival"] = field(default_factory=list)
    """What was announced before it has begun, in order."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What it asks for."""
        return self.to.key(self.principal)

    def matches(self, run: Announcement | RunInfo) -> bool:
        return self.key in keys_of(run)


def keys_of(run: Announcement | RunInfo | Summary) -> list[tuple[str, str, str]]:
    """The keys of the rules that cover a run."""
    keys = [(run.principal, "all", ""), (run.principal, "agent", run.agent)]
    return keys if run.thread is None else [*keys, (run.principal, "thread", run.thread)]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A run that was announced."""

    entry: Announcement
    before: str
    """The feed's position before it."""
    read: int
    """The number of the read that announced it."""


class Rules:
    """The rules of this process."""

    def __init__(self) -> None:
        self._named: dict[tuple[Outbox, str], Rule] = {}
        self._begun: dict[tuple[str, str, str], dict[Rule, None]] = {}
        self._beginning: dict[Rule, None] = {}

    def __len__(self) -> int:
        return len(self._named)

    def add(self, rule: Rule, position: FeedPosition) -> None:
        """Add a rule that is yet to begin: from now on, what is announced waits for it."""
        self._named[rule.outbox, rule.subscription] = rule
        self._beginning[rule] = None
        rule.outbox.feed.source = position
        rule.outbox.feed.beginning += 1

    def begin(self, rule: Rule) -> list[Arrival]:
        """The rule has got to its place in the feed. Gives what was announced after it, and is for this rule.

        If the feed lacks the position, it was replaced: everything is then applied, since a run that comes twice is
        better than one that never comes.
        """
        del self._beginning[rule]
        self._begun.setdefault(rule.key, {})[rule] = None
        positions = [arrival.entry.position for arrival in rule.backlog]
        late = rule.backlog[positions.index(rule.joined) + 1 if rule.joined in positions else 0 :]
        rule.joined, rule.backlog = None, []
        late = [arrival for arrival in late if rule.matches(arrival.entry)]
        for arrival in late:
            rule.outbox.feed.expect(arrival.entry.run, arrival.before)
        rule.outbox.feed.beginning -= 1
        return late

    def remove(self, outbox: Outbox, subscription: str) -> None:
        rule = self._named.pop((outbox, subscription), None)
        if rule is None:
            return
        rule.left = True
        if rule in self._beginning:
            del self._beginning[rule]
            rule.outbox.feed.beginning -= 1
        else:
            begun = self._begun[rule.key]
            del begun[rule]
            if not begun:
                del self._begun[rule.key]

    @property
    def beginning(self) -> list[Rule]:
        """Rules that have not begun yet."""
        return list(self._beginning)

    def covering(self, entry: Announcement) -> Iterator[Rule]:
        """The rules that have begun and cover a run."""
        for key in keys_of(entry):
            yield from list(self._begun.get(key, ()))


class FeedReader:
    """Reads the feed of `bus`, one read at a time."""

    def __init__(self, bus: Bus, rules: Rules) -> None:
        self.place = FeedPosition()
        self._bus = bus
        self._rules = rules

    async def watch(self, announce: Announce) -> Subscription:
        """Begin where the feed is now."""
        subscription, self.place.position = await self._bus.watch_feed(announce)
        return subscription

    async def end(self) -> str:
        """The feed's position now."""
        subscription, position = await self._bus.watch_feed(_ignore)
        subscription.close()
        return position

    async def read(self) -> list[tuple[Arrival, list[Rule]]]:
        """What was announced since the last read, each with the rules that it is for. They are expected to show it from
        now on."""
        ready = [rule for rule in self._rules.beginning if rule.ready]
        self.place.begun += 1
        try:
            entries = await self._bus.read_feed(self.place.position)
            if entries is None:
                logger.warning(
                    "the feed does not reach back to %s; listing the active runs instead", self.place.position
                )
                entries = await self._list_active()
        except BaseException:
            self.place.begun -= 1
            raise
        brought = await self._hand_out(entries, self.place.begun)
        for rule in ready:
            if not rule.left:
                brought += self.begin(rule)
        self.place.handed_out = self.place.begun
        return brought

    def begin(self, rule: Rule) -> list[tuple[Arrival, list[Rule]]]:
        """See `Rules.begin`."""
        try:
            return [(arrival, [rule]) for arrival in self._rules.begin(rule)]
        except Exception as error:  # noqa: BLE001 -- of this connection; the others must hear of the runs
            rule.outbox.fail(error)
            return []

    async def _hand_out(self, entries: Sequence[Announcement], read: int) -> list[tuple[Arrival, list[Rule]]]:
        brought = []
        for entry in entries:
            arrival = Arrival(entry, self.place.position, read)
            for rule in self._rules.beginning:
                rule.backlog.append(arrival)
            concerned = [rule for rule in self._rules.covering(entry) if _expects(rule, arrival)]
            if concerned:
                brought.append((arrival, concerned))
            self.place.position = entry.position
            if len(concerned) >= SLICE:
                await checkpoint()
        return brought

    async def _list_active(self) -> list[Announcement]:
        """Every active run, as if it were announced at the feed's position now."""
        position = await self.end()
        active = await list_active(self._bus, Filter())  # more than a connection may follow: those say `truncated`
        self.place.position = position
        return [Announcement(position, run.run, run.epoch, run.agent, run.thread, run.principal) for run in active]


async def list_active(bus: Bus, filter: Filter, most: int | None = None) -> list[RunInfo]:
    """The active runs that pass the filter, page by page: all, or the first so many."""
    found: list[RunInfo] = []
    before: str | None = None
    while most is None or len(found) < most:
        limit = LIST_PAGE if most is None else min(LIST_PAGE, most - len(found))
        page = await bus.list(replace(filter, statuses=ACTIVE, before=before, limit=limit))
        found += page
        before = page.next
        if before is None:
            break
        await checkpoint()
    return found


def _expects(rule: Rule, arrival: Arrival) -> bool:
    try:
        rule.outbox.feed.expect(arrival.entry.run, arrival.before)
    except Exception as error:  # noqa: BLE001 -- of this connection; the others must hear of the run
        rule.outbox.fail(error)
        return False
    return True


def _ignore(announcement: Announcement | None) -> None:
    pass
