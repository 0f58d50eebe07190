"""Who follows what: runs on one side, the outboxes of this process's clients on the other (G1, G2, G4).

Joining has one order everywhere: confirmed subscribe → heads → reply → pull; whatever happens in between is in the log.
The feed announces new runs, and the rules turn them into followers. What is kept of runs and rules is in `topics` and
`rules`.

A follower belongs to one topic for good. A pull that comes back late acts on its own follower and topic, which may be
done with by then, and never on those that the run has now.

Nothing here knows sockets, commands or how a run is executed.
"""

import logging
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint

from agentcast.server.bus.base import (
    ACTIVE,
    Announcement,
    Bus,
    Filter,
    Frame,
    Gone,
    Head,
    Page,
    RunInfo,
    Snapshot,
    Subscription,
)
from agentcast.server.bus.load_state import load_state
from agentcast.server.errors import NotFound, Unavailable
from agentcast.server.hub.outbox import Follower, GapReason, Outbox
from agentcast.server.hub.rules import MAX_LISTED, FeedReader, Rule
from agentcast.server.hub.single_flight import SingleFlight
from agentcast.server.hub.topic import Topic, told
from agentcast.server.protocol import Detail, Position, To

MAX_DISTANCE = 1_000
"""Events behind the head from which on a snapshot is sent instead of the log."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Join:
    """A subscription that is confirmed on the bus but adds no frame yet: reply with `result`, then `commit`."""

    result: dict[str, Any]
    hub: "Hub"
    outbox: Outbox
    followers: list[tuple[Topic, Follower]]
    rule: Rule | None

    def commit(self) -> None:
        """From now on the followers get frames. Must follow the reply without an await in between."""
        for topic, follower in self.followers:
            self.hub.add_follower(self.outbox, topic, follower)
        if self.rule is not None:
            self.rule.ready = True
            if self.rule.backlog or self.rule.joined is not None:
                self.hub.wake()


class Hub:
    """The clients of one process. `run` must be running while the others are used."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self._topics: dict[str, Topic] = {}
        self._followed: dict[Follower, Topic] = {}
        self._rules: dict[tuple[Outbox, str], Rule] = {}
        self._feed = FeedReader(bus, self._rules)
        self._news = anyio.Event()
        self._pages: SingleFlight[tuple[str, str, int], Page | None] = SingleFlight()
        self._states: SingleFlight[tuple[str, str], Snapshot] = SingleFlight()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Follow the feed until cancelled."""
        subscription = await self._watch_feed()
        try:
            task_status.started()
            while True:
                await self._news.wait()
                self._news = anyio.Event()
                try:
                    await self._feed.read()
                    await self._work_off()
                except Unavailable:
                    await anyio.sleep(_jitter())
                    self.wake()
        finally:
            subscription.close()

    async def _watch_feed(self) -> Subscription:
        while True:
            try:
                return await self._feed.watch(lambda _: self.wake())
            except Unavailable:
                await anyio.sleep(_jitter())

    def wake(self) -> None:
        """There is news in the feed, or a rule to apply."""
        self._news.set()

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
        join = None
        try:
            async with AsyncExitStack() as stack:
                if to.run is not None:
                    join = await self._join_run(stack, outbox, subscription, principal, to.run, detail, since)
                else:
                    rule = Rule(subscription, outbox, principal, to, detail)
                    join = await self._join_rule(stack, rule, since, feed)
                yield join
        except BaseException:
            self.leave(outbox, subscription)
            raise

    async def _join_run(
        self,
        stack: AsyncExitStack,
        outbox: Outbox,
        subscription: str,
        principal: str,
        run: str,
        detail: Detail,
        since: Mapping[str, Position],
    ) -> Join:
        info = (await self.bus.info([run])).get(run)
        if info is None or info.principal != principal:
            raise NotFound(f"there is no run {run[:64]!r}")
        topic = await stack.enter_async_context(self._pinned(run))
        follower = await self._place(outbox, topic, {subscription: detail}, since.get(run))
        result = {"subscription": subscription, "runs": [told(outbox, topic, follower)]}
        return Join(result, self, outbox, [(topic, follower)], None)

    async def _join_rule(
        self, stack: AsyncExitStack, rule: Rule, since: Mapping[str, Position], feed: str | None
    ) -> Join:
        result: dict[str, Any] = {"subscription": rule.subscription}
        self._rules[rule.outbox, rule.subscription] = rule
        rule.outbox.feed_read, read_to = self._feed.reads, self._feed.position
        announced = None if feed is None else await self.bus.read_feed(feed)
        if feed is None or announced is None:
            position = await self._feed.end()
        else:
            position = announced[-1].position if announced else feed
        rule.joined = position if position != read_to else None
        wanted = await self._wanted(rule, since, announced or ())
        started = {entry.run for entry in announced or ()}
        missing = [run for run in since if run not in wanted]
        followers = []
        wants = {rule.subscription: rule.detail}
        for run in wanted:
            try:
                topic = await stack.enter_async_context(self._pinned(run))
                start = since.get(run) or (Position(seq=0) if run in started else None)
                followers.append((topic, await self._place(rule.outbox, topic, wants, start)))
            except NotFound:
                missing.append(run)
        known = await self.bus.info(missing)
        result["runs"] = [told(rule.outbox, topic, follower) for topic, follower in followers]
        result["missing"] = [run for run in missing if run not in known]
        result["feed"] = position
        if feed is not None:
            result["feed_recovered"] = announced is not None
        return Join(result, self, rule.outbox, followers, rule)

    async def _wanted(self, rule: Rule, since: Mapping[str, Position], announced: Sequence[Announcement]) -> list[str]:
        """The runs that an open-ended subscription begins with: active, named by `since`, or announced."""
        active = await self.bus.list(
            Filter(
                principal=rule.principal,
                agent=rule.to.agent,
                thread=rule.to.thread,
                statuses=ACTIVE,
                limit=MAX_LISTED,
            )
        )
        named = await self.bus.info(list(since))
        runs: list[RunInfo | Announcement] = [*named.values(), *announced, *reversed(active)]
        return list(dict.fromkeys(run.run for run in runs if rule.matches(run)))

    async def _place(
        self, outbox: Outbox, topic: Topic, wants: dict[str, Detail], position: Position | None
    ) -> Follower:
        """A follower that begins at `position`; without one, with a snapshot."""
        follower = Follower(topic.run, topic.epoch, 0, wants=dict(wants))
        if topic.run in outbox.followers or position is None:
            follower.resync = "asked"
            return follower
        follower.cursor = position.seq
        follower.whole = position.seq == 0
        if position.epoch is not None or not follower.whole:
            follower.epoch = position.epoch or ""
        follower.resync = _gap_before(follower, topic)
        if follower.resync is None and await self._page(topic.run, topic.epoch, position.seq) is None:
            follower.resync = "trimmed"
        return follower

    def add_follower(self, outbox: Outbox, topic: Topic, follower: Follower) -> Follower | None:
        """Let `outbox` follow the run. None if the subscription is gone by now."""
        if not follower.wants.keys() <= outbox.subscriptions.keys():
            return None
        followed = outbox.follow(follower)
        if followed is follower:
            topic.followers[follower] = outbox
            self._followed[follower] = topic
            if follower.epoch != topic.epoch:
                outbox.lose(follower, "log_lost")
        return followed

    @asynccontextmanager
    async def _pinned(self, run: str) -> AsyncIterator[Topic]:
        """The open topic of `run`, which stays open inside the context."""
        topic = self._topics.get(run)
        while topic is not None and not topic.opened.is_set():
            await topic.opened.wait()
            topic = self._topics.get(run)  # gone, if opening it failed
        if topic is None:
            topic = await self._open(run)
        topic.pins += 1
        try:
            yield topic
        finally:
            topic.pins -= 1
            self._close_unused(topic)

    async def _open(self, run: str) -> Topic:
        topic = self._topics[run] = Topic(run)
        try:
            topic.subscription = await self.bus.subscribe(run, lambda news: self._deliver(topic, news))
            info = await self._ask_info(topic)
            topic.advance(info.epoch, info.head, ended=info.ended is not None)
        except BaseException:
            self._close(topic)
            raise
        finally:
            topic.opened.set()
        return topic

    async def _ask_info(self, topic: Topic) -> RunInfo:
        while True:
            epoch = topic.epoch
            info = (await self.bus.info([topic.run])).get(topic.run)
            if info is None:
                raise NotFound(f"there is no run {topic.run[:64]!r}")
            if topic.epoch in (epoch, info.epoch):
                return info
            # The log was replaced meanwhile: the answer may be of before.

    def _deliver(self, topic: Topic, news: Sequence[Frame] | Head | Gone) -> None:
        if isinstance(news, Gone):
            topic.tell(self._give_up)
            return
        frames, last, ended = ((), news, news.ended) if isinstance(news, Head) else (news, news[-1], news[-1].terminal)
        if not topic.advance(last.epoch, last.seq, ended=ended):
            return

        def deliver(follower: Follower, outbox: Outbox) -> None:
            outbox.deliver(follower, frames)
            if isinstance(news, Head):
                outbox.expect_head(follower, topic.head)
            self._check_end(topic, follower, outbox)

        topic.tell(deliver)

    # -- Leaving ---------------------------------------------------------------------------------------------------

    def leave(self, outbox: Outbox, subscription: str) -> None:
        """End a subscription, if the connection has it: no frame that only it asked for is queued any more."""
        rule = self._rules.pop((outbox, subscription), None)
        while rule is not None and rule.backlog:
            rule.pop()
        if subscription in outbox.subscriptions:
            for follower in outbox.unsubscribe(subscription):
                self._drop(follower)

    def disconnect(self, outbox: Outbox) -> None:
        """The connection is gone, or broken."""
        for subscription in outbox.subscriptions:
            rule = self._rules.pop((outbox, subscription), None)
            if rule is not None:
                rule.backlog.clear()
        followers = outbox.close()
        if outbox.broken:
            followers = [follower for follower, topic in self._followed.items() if topic.followers[follower] is outbox]
        for follower in followers:
            self._drop(follower)

    def _drop(self, follower: Follower) -> None:
        topic = self._followed.pop(follower, None)
        if topic is not None:
            del topic.followers[follower]
            self._close_unused(topic)

    def _close_unused(self, topic: Topic) -> None:
        if not topic.followers and not topic.pins:
            self._close(topic)

    def _close(self, topic: Topic) -> None:
        if self._topics.get(topic.run) is topic:
            del self._topics[topic.run]
        if topic.subscription is not None:
            topic.subscription.close()

    # -- Catching up -----------------------------------------------------------------------------------------------

    async def catch_up(self, outbox: Outbox) -> None:
        """Pull for the followers that are behind, in turn, until all are live or the queue is full."""
        while (follower := outbox.next_behind()) is not None:
            try:
                await self._pull(outbox, self._followed[follower], follower)
            except NotFound:  # it ended so long ago that the bus has forgotten it
                self._give_up(follower, outbox)
            except Unavailable:
                await anyio.sleep(_jitter())
            await checkpoint()  # a bus that answers at once must not let one client hold the loop

    def _give_up(self, follower: Follower, outbox: Outbox) -> None:
        """The run is gone. No frame can say so, but the reply to a client that comes back does: `missing`."""
        if not follower.done:
            outbox.finish(follower)
            self._drop(follower)
            outbox.cut()

    async def _pull(self, outbox: Outbox, topic: Topic, follower: Follower) -> None:
        if follower.resync is None:
            follower.resync = _gap_before(follower, topic)
        if follower.resync is None:
            await self._pull_page(outbox, topic, follower)
        else:
            await self._pull_snapshot(outbox, topic, follower)
        self._check_end(topic, follower, outbox)

    async def _pull_page(self, outbox: Outbox, topic: Topic, follower: Follower) -> None:
        page = await self._page(topic.run, follower.epoch, follower.cursor)
        if follower.done or follower.resync is not None:
            return  # dropped, or widened, in the meantime
        if page is None:
            outbox.lose(follower, "trimmed")
            return
        topic.advance(follower.epoch, page.head, ended=False)
        outbox.add_page(follower, page, topic.head, ended=topic.ended)
        if not page.frames and follower.cursor < topic.head:
            raise Unavailable("the bus has lost the newest of the log, which is yet to be restored")

    async def _pull_snapshot(self, outbox: Outbox, topic: Topic, follower: Follower) -> None:
        epoch = topic.epoch
        snapshot = await self.snapshot(topic.run, epoch)
        if follower.done or topic.epoch not in (epoch, snapshot.epoch):
            return  # dropped, or the log was replaced and the answer is of before
        if not topic.advance(snapshot.epoch, snapshot.seq, ended=snapshot.ended):
            raise Unavailable("the bus is back at an epoch that was over; the owner of the run starts a new one")
        if snapshot.epoch == follower.epoch and snapshot.seq < follower.cursor <= topic.head:
            return  # somebody else had asked for it before the follower got so far
        outbox.add_snapshot(follower, snapshot, topic.head, ended=topic.ended)

    def _check_end(self, topic: Topic, follower: Follower, outbox: Outbox) -> None:
        """Let go of a follower that has everything. Not all are sent the end: some had it when they joined."""
        if topic.ended and follower.live and follower.cursor >= topic.head:
            outbox.end(follower)
        if follower.done:
            self._drop(follower)

    async def snapshot(self, run: str, epoch: str = "") -> Snapshot:
        """The run's state at its head. Those who ask at the same time share the work, if they know the same `epoch`.

        :raises NotFound: there is no such run.
        """
        return await self._states((run, epoch), lambda: load_state(self.bus, run))

    async def _page(self, run: str, epoch: str, after: int) -> Page | None:
        return await self._pages((run, epoch, after), lambda: self.bus.read(run, epoch, after))

    # -- The feed --------------------------------------------------------------------------------------------------

    async def _work_off(self) -> None:
        """Turn what was announced into followers, in order. What fails for one rule does not stop the others.

        :raises Unavailable: some is left, since the bus is away.
        """
        away: Unavailable | None = None
        for rule in list(self._rules.values()):
            try:
                while (entry := rule.next) is not None:
                    follower = await self._apply(rule, entry)
                    if rule.backlog:  # it was not left meanwhile
                        rule.pop(follower)
            except Unavailable as error:
                away = error
            except Exception as error:  # noqa: BLE001 -- the connection logs it
                rule.ready = False
                rule.outbox.fail(error)
        if away is not None:
            raise away

    async def _apply(self, rule: Rule, entry: Announcement) -> Follower | None:
        follower = None
        if rule.matches(entry) and not _has_ended(rule.outbox, entry.run):
            try:
                async with self._pinned(entry.run) as topic:
                    if not _has_ended(rule.outbox, entry.run):
                        follower = self.add_follower(rule.outbox, topic, _announced(rule, topic))
            except NotFound:
                logger.debug("run %s was forgotten before it could be followed", entry.run)
        return follower


def _has_ended(outbox: Outbox, run: str) -> bool:
    """Whether the end of `run` was queued."""
    past = outbox.past.get(run)
    return past is not None and past.left is None


def _announced(rule: Rule, topic: Topic) -> Follower:
    """A follower of a run that was announced to `rule`: from its beginning, or from where its client left it."""
    wants = {rule.subscription: rule.detail}
    past = rule.outbox.past.get(topic.run)
    if past is None or past.left is None:
        return Follower(topic.run, topic.epoch, 0, whole=True, wants=wants)
    left = past.left
    follower = Follower(topic.run, left.epoch, left.cursor, resync=left.resync, shown=True, wants=wants)
    follower.resync = follower.resync or _gap_before(follower, topic)
    if follower.full and not left.full:
        follower.resync = follower.resync or "asked"
    return follower


def _gap_before(follower: Follower, topic: Topic) -> GapReason | None:
    """Why what follows the cursor is not to be replayed, as far as can be told without looking into the log."""
    if follower.epoch != topic.epoch or follower.cursor > topic.head:
        return "log_lost"
    return "overflow" if topic.head - follower.cursor > MAX_DISTANCE and not follower.whole else None


def _jitter() -> float:
    """Seconds to wait before the bus is asked again."""
    return random.uniform(0.2, 1.0)  # noqa: S311 -- not a secret
