"""A run's topic and clients that follow it, without a hub, a bus or sockets."""

from typing import Any

import orjson

from agentcast.server.bus.base import Frame, RunInfo, Snapshot
from agentcast.server.hub.follower import Follower
from agentcast.server.hub.frames import Segment
from agentcast.server.hub.outbox import Outbox
from agentcast.server.hub.ring import RING_BYTES, Rings
from agentcast.server.hub.topic import RunTopic
from agentcast.server.protocol import Detail, Position
from tests.support.link import Link

RUN, EPOCH = "r", "e"


def info(head: int, *, run: str = RUN, epoch: str = EPOCH, ended: bool = False, oldest: int = 1) -> RunInfo:
    return RunInfo(
        run=run,
        agent="echo",
        principal="ann",
        thread=None,
        epoch=epoch,
        head=head,
        status="done" if ended else "running",
        created=1.0,
        ended=2.0 if ended else None,
        oldest=oldest,
    )


def topic_at(
    head: int,
    *,
    run: str = RUN,
    ended: bool = False,
    oldest: int = 1,
    ring_bytes: int = RING_BYTES,
    closed: list[RunTopic] | None = None,
) -> RunTopic:
    """An open topic, whose log is held from `oldest` on."""
    topic = RunTopic(run, (closed if closed is not None else []).append, Rings(each=ring_bytes))
    topic.open(info(head, run=run, ended=ended, oldest=oldest))
    return topic


def frame(
    seq: int, *, run: str = RUN, epoch: str = EPOCH, progress: bool = True, terminal: bool = False, size: int = 0
) -> Frame:
    data = orjson.dumps({"type": "event", "seq": seq}).ljust(size)
    return Frame(run, epoch, seq, data, progress, terminal)


def frames(first: int, last: int, *, size: int = 0) -> list[Frame]:
    return [frame(seq, size=size) for seq in range(first, last + 1)]


def segment(first: int, last: int, *, size: int = 0) -> Segment:
    return Segment(frames(first, last, size=size))


def snapshot(seq: int, epoch: str = EPOCH, *, ended: bool = False) -> Snapshot:
    return Snapshot(RUN, epoch, seq, b"{}", ended=ended)


class Client:
    """An outbox, its link, and what was taken out of it."""

    def __init__(self, *, queue_frames: int = 100, queue_bytes: int = 1_000_000) -> None:
        self.link = Link()
        self.outbox = Outbox(self.link, queue_frames=queue_frames, queue_bytes=queue_bytes)

    def joining(
        self, topic: RunTopic, at: int | None = 0, detail: Detail = "full", *, subscription: str = "s1"
    ) -> Follower:
        """A follower that begins after `at`, or with a snapshot."""
        self.outbox.subscribe(subscription, single=True)
        follower = Follower(topic, self.outbox, {subscription: detail})
        topic.place(follower, None if at is None else Position(seq=at, epoch=topic.epoch))
        return follower

    def follow(
        self, topic: RunTopic, at: int | None = 0, detail: Detail = "full", *, subscription: str = "s1"
    ) -> Follower:
        """The same, let in."""
        return topic.admit(self.joining(topic, at, detail, subscription=subscription))

    def live(self, topic: RunTopic, detail: Detail = "full", *, subscription: str = "s1") -> Follower:
        """A follower that has everything."""
        follower = self.follow(topic, topic.head, detail, subscription=subscription)
        topic.rest(follower)
        return follower

    def take(self) -> list[Any]:
        taken: list[Any] = []
        while batches := self.outbox.take():
            taken += [orjson.loads(payload) for batch in batches for payload in batch.payloads]
        return taken

    def seqs(self) -> list[int | str]:
        """What was queued: the seq of events and snapshots (as `=n`), the type of anything else."""
        return [
            frame["seq"] if frame["type"] == "event" else f"={frame['seq']}" if "seq" in frame else frame["type"]
            for frame in self.take()
        ]

    def brief(self) -> list[str]:
        """What was queued, as `event 3` or `gap`."""
        return [f"event {item['seq']}" if "type" not in item else str(item["type"]) for item in self.take()]

    def seqs_of(self) -> list[int]:
        """The seqs of what was queued, where nothing but events may be."""
        return [item["seq"] for item in self.take()]
