"""Pulling for the followers that are behind: out of the topic's ring, or a page or state from the bus (G1, G2, G4).

What is read is shared by all who ask for it at the same time. An answer that comes late acts on the follower and the
topic that asked for it, and only if the follower still needs it.
"""

import random

import anyio
from anyio.lowlevel import checkpoint

from agentcast.server.bus.base import Bus, Snapshot
from agentcast.server.bus.load_state import load_state
from agentcast.server.errors import NotFound, Unavailable
from agentcast.server.hub.follower import Follower, State
from agentcast.server.hub.frames import Segment
from agentcast.server.hub.outbox import Outbox
from agentcast.server.hub.topic import RunTopic

PULLS = 32
"""Followers of one connection that are pulled for at the same time."""
SNAPSHOTS_BYTES = 64 * 1024 * 1024
"""What is kept of states that were read, in all topics of a process."""


class CatchUp:
    """Pulls for the connections of this process."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._kept: dict[RunTopic, int] = {}
        """Topics with a snapshot, and its size; the oldest first."""
        self._size = 0

    async def pull(self, outbox: Outbox) -> None:
        """Pull for the followers that are behind, in turn, until all are live or the queue is full."""
        pulls = min(outbox.behind, PULLS)
        if pulls <= 1:
            await self._pull_in_turn(outbox)
            return
        async with anyio.create_task_group() as tasks:
            for _ in range(pulls):
                tasks.start_soon(self._pull_in_turn, outbox)

    async def _pull_in_turn(self, outbox: Outbox) -> None:
        while (follower := outbox.claim()) is not None:
            topic = follower.topic
            try:
                await self._pull(topic, follower)
            except NotFound:  # it ended so long ago that the bus has forgotten it
                topic.give_up(follower)
            except Unavailable:
                await anyio.sleep(jitter())
            finally:
                outbox.release(follower)
            await checkpoint()  # a bus that answers at once must not let one client hold the loop

    async def _pull(self, topic: RunTopic, follower: Follower) -> None:
        if follower.state is State.BEHIND and (reason := topic.gap_before(follower)) is not None:
            topic.lose(follower, reason)
        if follower.state is State.RESYNC:
            await self._pull_snapshot(topic, follower)
            return
        topic.rest(follower)
        if follower.state is not State.BEHIND:
            return
        if segments := topic.recent(follower):
            for segment in segments:
                if topic.supply(follower, segment):
                    break
        else:
            await self._pull_page(topic, follower)

    async def _pull_page(self, topic: RunTopic, follower: Follower) -> None:
        epoch, cursor = follower.epoch, follower.cursor
        page = await topic.pages((epoch, cursor), lambda: self._read(topic.run, epoch, cursor))
        if follower.state is not State.BEHIND or (follower.epoch, follower.cursor) != (epoch, cursor):
            return  # dropped, lost or pulled for meanwhile
        if page is None:
            topic.lose(follower, "trimmed")
            return
        for segment in page:
            topic.supply(follower, segment)
        topic.rest(follower)
        if not page and cursor < topic.head:
            raise Unavailable("the bus has lost the newest of the log, which is yet to be restored")

    async def _read(self, run: str, epoch: str, after: int) -> list[Segment] | None:
        """One segment; none at the head; None if the log does not hold what follows."""
        page = await self._bus.read(run, epoch, after)
        return page if page is None else [Segment(page.frames)] if page.frames else []

    async def _pull_snapshot(self, topic: RunTopic, follower: Follower) -> None:
        epoch, snapshot = topic.epoch, topic.snapshot
        if snapshot is None or not _is_ahead(snapshot, follower):
            snapshot = await self.load(topic)
            if follower.state is not State.RESYNC or topic.epoch not in (epoch, snapshot.epoch):
                return  # dropped, or the log was replaced and the answer is of before
            if not _is_known(topic, snapshot):
                raise Unavailable("the bus is back at an epoch that was over; the owner of the run starts a new one")
            if not _is_ahead(snapshot, follower):
                return  # another follower had asked for it before this one got so far
        if not follower.outbox.full:
            topic.supply_snapshot(follower, snapshot)

    async def load(self, topic: RunTopic) -> Snapshot:
        """The state of the topic's run at its head. Those who ask at the same time share the work."""
        snapshot = await topic.states(topic.epoch, lambda: load_state(self._bus, topic.run))
        newer = topic.snapshot is None or topic.snapshot.seq < snapshot.seq
        if topic.used and newer and snapshot.epoch == topic.epoch:  # all may have left meanwhile
            self.forget(topic)
            topic.snapshot = snapshot
            self._kept[topic] = len(snapshot.state)
            self._size += len(snapshot.state)
            while self._size > SNAPSHOTS_BYTES:
                self.forget(next(iter(self._kept)))
        return snapshot

    def forget(self, topic: RunTopic) -> None:
        """Let go of the topic's snapshot."""
        self._size -= self._kept.pop(topic, 0)
        topic.snapshot = None


def _is_known(topic: RunTopic, snapshot: Snapshot) -> bool:
    """Have the topic know what the snapshot says of the log; False if that is of an epoch that is over."""
    if snapshot.epoch != topic.epoch:
        return topic.advance(snapshot.epoch, snapshot.seq, ended=snapshot.ended)
    return topic.advance(topic.epoch, topic.head, ended=snapshot.ended and snapshot.seq <= topic.head)


def _is_ahead(snapshot: Snapshot, follower: Follower) -> bool:
    """Whether it takes the follower forward, and not back."""
    return follower.resync == "log_lost" or snapshot.epoch != follower.epoch or snapshot.seq >= follower.cursor


def jitter() -> float:
    """Seconds to wait before the bus is asked again."""
    return random.uniform(0.2, 1.0)  # noqa: S311 -- not a secret
