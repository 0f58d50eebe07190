"""Who follows what: runs on one side, the outboxes of this process's clients on the other (G1, G2, G4).

Joining has one order everywhere, for all runs of a command at once: confirmed subscribe → heads → reply → pull.
Whatever happens in between is in the log. The feed announces new runs, and the rules turn them into followers.

Nothing here knows sockets, commands or how a run is executed.
"""

import logging
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
from anyio.abc import TaskGroup, TaskStatus
from anyio.lowlevel import checkpoint

from agentcast.server.bus.base import Announcement, Bus, Filter, Opened, RunInfo, Snapshot, Subscription
from agentcast.server.errors import NotFound, Unavailable
from agentcast.server.hub.catch_up import CatchUp, jitter
from agentcast.server.hub.follower import Follower
from agentcast.server.hub.live_list import LiveLists
from agentcast.server.hub.outbox import Outbox
from agentcast.server.hub.ring import Rings
from agentcast.server.hub.rules import MAX_LISTED, Arrival, FeedReader, Rule, Rules, list_active
from agentcast.server.hub.summaries import Summaries
from agentcast.server.hub.topic import RunTopic
from agentcast.server.protocol import Detail, Position, To

BRINGING = 16
"""Groups of announced runs that are opened at the same time; while there are as many, the feed is not read on."""
SLICE = 100
"""Followers that are made, or topics that are opened, in one turn of the loop."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Join:
    """A subscription that is confirmed on the bus but adds no frame yet: reply with `result`, then `commit`."""

    hub: "Hub"
    outbox: Outbox
    followers: list[tuple[RunTopic, Follower]]
    rule: Rule | None = None
    result: dict[str, Any] = field(default_factory=dict)

    def commit(self) -> None:
        """From now on the followers get frames. Must follow the reply without an await in between."""
        for topic, follower in self.followers:
            self.hub.admit(topic, follower)
        if self.rule is not None and not self.rule.left:
            self.rule.ready = True
            if self.rule.joined is None:
                self.hub.bring(self.hub.feed.begin(self.rule))
            else:
                self.hub.wake()


class Hub:
    """The clients of one process. `run` must be running while the others are used."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.topics: dict[str, RunTopic] = {}
        self.rules = Rules()
        self.feed = FeedReader(bus, self.rules)
        self.summaries = Summaries(bus)
        self.lists = LiveLists(bus, self.summaries)
        self._catch_up = CatchUp(bus)
        self._rings = Rings()
        self._announced = anyio.Event()
        self._tasks: TaskGroup | None = None
        self._bringing = anyio.Semaphore(BRINGING)

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Follow the feed until cancelled."""
        subscription = await self._watch_feed()
        try:
            async with anyio.create_task_group() as self._tasks:
                await self._tasks.start(self.summaries.run)
                await self._tasks.start(self.lists.run)
                task_status.started()
                await self._follow_feed()
        finally:
            subscription.close()

    async def _watch_feed(self) -> Subscription:
        while True:
            try:
                return await self.feed.watch(lambda _: self.wake())
            except Unavailable:
                await anyio.sleep(jitter())

    async def _follow_feed(self) -> None:
        while True:
            await self._announced.wait()
            self._announced = anyio.Event()
            async with self._bringing:  # as long as too much waits to be opened, no more is read
                pass
            try:
                self.bring(await self.feed.read())
            except Unavailable:
                await anyio.sleep(jitter())
                self.wake()

    def wake(self) -> None:
        """Something was announced, or a rule is to begin."""
        self._announced.set()

    # -- Joining ---------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def join(
        self,
        outbox: Outbox,
        subscription: str,
        principal: str,
        to: To,
        detail: Detail,
        since: Mapping[str, Position],
        feed: str | None = None,
    ) -> AsyncIterator[Join]:
        """Subscribe `outbox`; leaving the context without `commit` undoes it.

        :raises NotFound: `to` names a run that does not exist.
        :raises TooMany: the connection has too many subscriptions.
        :raises Unavailable: the bus is away.
        """
        outbox.subscribe(subscription, single=to.run is not None)
        wants: dict[str, Detail] = {subscription: detail}
        try:
            if to.run is not None:
                async with self.opened([to.run]) as topics:
                    topic = topics.get(to.run)
                    if topic is None or topic.info is None or topic.info.principal != principal:
                        raise NotFound(f"there is no run {to.run[:64]!r}")
                    await self._check_heads(topics, since)
                    join = Join(self, outbox, [_placed(topic, outbox, wants, since.get(to.run))])
                    join.result = {"subscription": subscription, "runs": _described(join.followers)}
                    if to.run not in outbox.followers and outbox.room <= 0:
                        outbox.subscriptions.pop(subscription, None)  # it may have been left meanwhile
                        join.result = {"runs": [], "truncated": 1}
                    yield join
            else:
                async with self._joined(Rule(subscription, outbox, principal, to, detail), since, feed) as join:
                    yield join
        except BaseException:
            self.leave(outbox, subscription)
            raise

    @asynccontextmanager
    async def _joined(self, rule: Rule, since: Mapping[str, Position], feed: str | None) -> AsyncIterator[Join]:
        self.rules.add(rule, self.feed.place)
        read_to = self.feed.place.position
        announced = None if feed is None else await self.bus.read_feed(feed)
        if feed is None or announced is None:
            position = await self.feed.end()
        else:
            position = announced[-1].position if announced else feed
        rule.joined = position if position != read_to else None
        named = await self.bus.info(list(since)) if since else {}
        wanted, left_out = await self._wanted(rule, named, announced or ())
        started = {entry.run for entry in announced or ()}
        async with self.opened(wanted) as topics:
            await self._check_heads(topics, since)
            join, wants = Join(self, rule.outbox, [], rule), {rule.subscription: rule.detail}
            for run, topic in topics.items():
                place = since.get(run) or (Position(seq=0) if run in started else None)
                join.followers.append(_placed(topic, rule.outbox, wants, place))
            asked = set(wanted)
            missing = [run for run in since if run not in named or (run in asked and run not in topics)]
            result = join.result
            result.update(subscription=rule.subscription, runs=_described(join.followers), missing=missing)
            result["feed"] = position
            if feed is not None:
                result["feed_recovered"] = announced is not None
            if left_out:
                result["truncated"] = left_out
            yield join

    async def _wanted(
        self, rule: Rule, named: Mapping[str, RunInfo], announced: Sequence[Announcement]
    ) -> tuple[list[str], int]:
        """The runs that an open-ended subscription begins with: active, named by `since`, or announced. And how many,
        at least, a connection cannot follow as well: the oldest of the active ones are left out first."""
        filter = Filter(principal=rule.principal, agent=rule.to.agent, thread=rule.to.thread)
        active = await list_active(self.bus, filter, MAX_LISTED + 1)
        runs: list[RunInfo | Announcement] = [*named.values(), *reversed(announced), *active]
        wanted = list(dict.fromkeys(run.run for run in runs if rule.matches(run)))
        new = [run for run in wanted if run not in rule.outbox.followers]
        left_out = set(new[max(rule.outbox.room, 0) :])
        return sorted(run for run in wanted if run not in left_out), len(left_out)

    async def _check_heads(self, topics: Mapping[str, RunTopic], since: Mapping[str, Position]) -> None:
        """A client may be ahead of what was delivered here, as from another process: then ask the bus."""
        ahead = [
            run
            for run, topic in topics.items()
            if (place := since.get(run)) is not None and place.epoch == topic.epoch and place.seq > topic.head
        ]
        for run, info in (await self.bus.info(ahead)).items() if ahead else ():
            topics[run].advance(info.epoch, info.head, ended=info.ended is not None)

    def admit(self, topic: RunTopic, follower: Follower) -> Follower | None:
        """Let a follower that was joining get frames. None if its subscription has ended, or the connection follows as
        many runs as it may."""
        outbox = follower.outbox
        if not follower.wants.keys() <= outbox.subscriptions.keys():
            return None
        if topic.run not in outbox.followers and outbox.room <= 0:
            outbox.refuse(follower)
            return None
        return topic.admit(follower)

    # -- Topics ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def opened(self, runs: Collection[str]) -> AsyncIterator[dict[str, RunTopic]]:
        """The open topics of those of the `runs` that exist, which stay open inside the context."""
        pinned: list[RunTopic] = []
        found: dict[str, RunTopic] = {}
        try:
            missing = list(dict.fromkeys(runs))
            while missing:
                topics = self._pin(missing, pinned)
                await self._open([topic for topic in topics if topic.is_new])
                for topic in topics:
                    await topic.opened.wait()
                found |= {topic.run: topic for topic in topics if topic.info is not None}
                # Those that another join was to open, and failed to, are tried again.
                missing = [topic.run for topic in topics if topic.info is None and not topic.unknown]
            yield {run: found[run] for run in runs if run in found}
        finally:
            for topic in pinned:
                topic.unpin()

    def _pin(self, runs: Sequence[str], pinned: list[RunTopic]) -> list[RunTopic]:
        """The topics of runs, made where there is none, which stay open until they are unpinned."""
        topics = []
        for run in runs:
            topic = self.topics.get(run)
            if topic is None:
                topic = self.topics[run] = RunTopic(run, self._close, self._rings)
            topic.pins += 1
            topics.append(topic)
        pinned += topics
        return topics

    async def _open(self, topics: Sequence[RunTopic]) -> None:
        """Open new topics, all at once."""
        if not topics:
            return
        for topic in topics:
            topic.is_new = False
        try:
            if len(topics) > SLICE:
                await checkpoint()  # making them took a while
            opened = await self.bus.open({topic.run: topic.deliver for topic in topics})
            await self._take_answers(topics, opened)
        finally:
            for topic in topics:
                if topic.info is None:
                    self._close(topic)
                topic.opened.set()

    async def _take_answers(self, topics: Sequence[RunTopic], opened: Mapping[str, Opened]) -> None:
        for topic in topics:
            answer = opened.get(topic.run)
            topic.unknown = answer is None
            topic.subscription = None if answer is None else answer.subscription
        for number, topic in enumerate(topics):
            if number % SLICE == SLICE - 1:
                await checkpoint()  # thousands must not hold the loop
            if topic.run in opened:
                topic.open(await self._newest(topic, opened[topic.run].info))

    async def _newest(self, topic: RunTopic, info: RunInfo) -> RunInfo:
        """What the bus knows of a run. Where its log was replaced since it was asked, it is asked again."""
        while topic.epoch not in ("", info.epoch):
            epoch = topic.epoch
            known = (await self.bus.info([topic.run])).get(topic.run)
            if known is None or topic.epoch in (epoch, known.epoch):
                return known or info
            info = known
        return info

    def _close(self, topic: RunTopic) -> None:
        if self.topics.get(topic.run) is topic:
            del self.topics[topic.run]
        self._catch_up.forget(topic)
        topic.close()

    # -- Leaving ---------------------------------------------------------------------------------------------------

    def leave(self, outbox: Outbox, subscription: str) -> None:
        """End a subscription, if the connection has it: no frame that only it asked for is queued any more."""
        self.rules.remove(outbox, subscription)
        self.lists.leave(outbox, subscription)
        self.summaries.leave(outbox, subscription)
        if outbox.subscriptions.pop(subscription, None) is None:
            return
        for follower in list(outbox.followers.values()):
            if follower.wants.keys() != {subscription}:
                follower.unwant(subscription)
                continue
            follower.topic.leave(follower)
            if follower.shown:
                outbox.remember(follower.run, follower)

    def disconnect(self, outbox: Outbox) -> None:
        """The connection is gone, or broken."""
        for subscription in list(outbox.subscriptions):
            self.rules.remove(outbox, subscription)
        self.lists.disconnect(outbox)
        self.summaries.disconnect(outbox)
        if outbox.broken:
            topics = list(self.topics.values())
            followers = [one for topic in topics for one in topic.followers if one.outbox is outbox]
        else:
            followers = list(outbox.followers.values())
        outbox.close()
        for follower in followers:
            follower.topic.drop(follower)

    # -- Catching up -----------------------------------------------------------------------------------------------

    async def catch_up(self, outbox: Outbox) -> None:
        """Pull for the followers that are behind, until all are live or the queue is full."""
        await self._catch_up.pull(outbox)

    async def snapshot(self, run: str) -> Snapshot:
        """The run's state at its head.

        :raises NotFound: there is no such run.
        """
        async with self.opened([run]) as topics:
            if run not in topics:
                raise NotFound(f"there is no run {run[:64]!r}")
            return await self._catch_up.load(topics[run])

    # -- The feed --------------------------------------------------------------------------------------------------

    def bring(self, announced: list[tuple[Arrival, list[Rule]]]) -> None:
        """Turn what was announced into followers, in a task of its own: what is slow to open delays nothing else."""
        if announced and self._tasks is not None:
            self._tasks.start_soon(self._bring, announced)

    async def _bring(self, announced: list[tuple[Arrival, list[Rule]]]) -> None:
        try:
            async with self._bringing, self.opened([arrival.entry.run for arrival, _ in announced]) as topics:
                for arrival, rules in announced:
                    await self._apply(arrival, rules, topics.get(arrival.entry.run))
        except Unavailable:
            await anyio.sleep(jitter())
            for one in announced:  # it may be only one of them that cannot be opened
                self.bring([one])
        except Exception as error:  # noqa: BLE001 -- the connections log it
            for rule in {rule for _, rules in announced for rule in rules}:
                rule.outbox.fail(error)

    async def _apply(self, arrival: Arrival, rules: Sequence[Rule], topic: RunTopic | None) -> None:
        if topic is None:
            logger.debug("run %s was forgotten before it could be followed", arrival.entry.run)
        for number, rule in enumerate(rules, 1):
            try:
                rule.outbox.feed.applied(arrival.entry.run, self._follow(rule, arrival, topic))
            except Exception as error:  # noqa: BLE001 -- the connection logs it
                rule.outbox.fail(error)
            if number % SLICE == 0:
                await checkpoint()

    def _follow(self, rule: Rule, arrival: Arrival, topic: RunTopic | None) -> Follower | None:
        """The follower that an announcement makes: from the run's beginning, or from where its client left it."""
        if topic is None or rule.left:
            return None
        past = rule.outbox.feed.place_of(topic.run, arrival.read)
        follower = Follower(topic, rule.outbox, {rule.subscription: rule.detail})
        if past is None:
            topic.place(follower, Position(seq=0))
        elif past.left is None:
            return None  # its end was shown
        else:
            topic.resume(follower, past.left)
        return self.admit(topic, follower)


def _placed(
    topic: RunTopic, outbox: Outbox, wants: dict[str, Detail], position: Position | None
) -> tuple[RunTopic, Follower]:
    """A follower that begins at `position`; without one, or where the run is followed already, with a snapshot."""
    follower = Follower(topic, outbox, dict(wants))
    topic.place(follower, None if topic.run in outbox.followers else position)
    return topic, follower


def _described(followers: Sequence[tuple[RunTopic, Follower]]) -> list[dict[str, Any]]:
    return [topic.described(follower) for topic, follower in followers]
