"""Runs and frames to put on a bus, and inboxes for what it delivers."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import anyio

from agentcast.server.bus.base import (
    Announcement,
    Bus,
    Created,
    Deliver,
    Frame,
    Gone,
    Head,
    NewRun,
    Snapshot,
    Status,
    Subscription,
    Summary,
    Update,
    new_epoch,
    new_run_id,
)
from agentcast.server.errors import NotFound

PATIENCE = 15.0
T = TypeVar("T")


def frames(run: str, epoch: str, first: int, count: int = 1, *, end: bool = False, size: int = 0) -> list[Frame]:
    """`count` frames from seq `first` on; with `end`, the last one is terminal. `size` pads each one's bytes."""
    return [
        Frame(run, epoch, seq, f'{{"seq":{seq}}}'.encode().ljust(size), terminal=end and seq == first + count - 1)
        for seq in range(first, first + count)
    ]


def new_run(
    run: str = "",
    *,
    agent: str = "echo",
    principal: str = "ann",
    thread: str | None = None,
    key: str | None = None,
    fingerprint: str = "",
) -> NewRun:
    run, epoch = run or new_run_id(), new_epoch()
    return NewRun(
        run=run,
        epoch=epoch,
        agent=agent,
        principal=principal,
        thread=thread,
        created=1_000.0,
        first=frames(run, epoch, 1)[0],
        key=key,
        fingerprint=fingerprint,
    )


class Log:
    """One run on a bus, seen by its owner."""

    def __init__(self, bus: Bus, created: Created) -> None:
        assert created.fence is not None
        self.bus = bus
        self.run = created.run
        self.epoch = created.epoch
        self.fence = created.fence
        self.head = 1

    @classmethod
    async def create(cls, bus: Bus, new: NewRun | None = None) -> "Log":
        return cls(bus, await bus.create(new or new_run()))

    def next(self, count: int = 1, *, end: bool = False, size: int = 0) -> list[Frame]:
        return frames(self.run, self.epoch, self.head + 1, count, end=end, size=size)

    async def append(self, count: int = 1, *, end: bool = False, size: int = 0) -> list[Frame]:
        batch = self.next(count, end=end, size=size)
        await self.bus.append(self.run, self.fence, batch, "done" if end else "running")
        self.head += count
        return batch

    async def rebase(self, seq: int, state: bytes = b"{}", status: Status = "running") -> str:
        self.epoch = await self.bus.rebase(self.run, self.fence, seq, state, status)
        self.head = seq
        return self.epoch

    async def save(self, seq: int, state: bytes = b"{}") -> Snapshot:
        snapshot = Snapshot(self.run, self.epoch, seq, state)
        await self.bus.save_snapshot(self.fence, snapshot)
        return snapshot

    async def read_all(self, after: int = 0) -> list[Frame]:
        """All that follows `after`, page by page."""
        found: list[Frame] = []
        for _ in itertools.repeat(None):
            page = await self.bus.read(self.run, self.epoch, found[-1].seq if found else after)
            assert page is not None
            if not page.frames:
                break
            found += page.frames
        return found


async def follow(bus: Bus, run: str, deliver: Deliver) -> Subscription:
    """Open one run.

    :raises NotFound: there is no such run.
    """
    opened = await bus.open({run: deliver})
    if run not in opened:
        raise NotFound(run)
    return opened[run].subscription


def summary(log: Log, seq: int | None = None, **fields: Any) -> Summary:
    """A summary of a run after event `seq`, by its owner."""
    known: dict[str, Any] = {
        "run": log.run,
        "epoch": log.epoch,
        "seq": log.head if seq is None else seq,
        "fence": log.fence,
        "principal": "ann",
        "agent": "echo",
        "thread": None,
        "status": "running",
        "created": 1_000.0,
        "data": b'{"at":%d}' % (log.head if seq is None else seq),
    }
    return Summary(**known | fields)


class Inbox(Generic[T]):
    """Keeps what is put into it and lets a test wait for it."""

    def __init__(self) -> None:
        self.items: list[T] = []
        self._arrived = anyio.Event()

    def put(self, item: T) -> None:
        self.items.append(item)
        self._arrived.set()

    async def until(self, ready: Callable[[list[T]], bool]) -> list[T]:
        with anyio.fail_after(PATIENCE):
            while not ready(self.items):
                self._arrived = anyio.Event()
                await self._arrived.wait()
        return self.items

    async def take(self, count: int) -> list[T]:
        """The first `count` items, once they are there."""
        return (await self.until(lambda items: len(items) >= count))[:count]


class Mail(Inbox[Frame | Head]):
    """An inbox for the updates of a run."""

    def deliver(self, update: Update) -> None:
        assert not isinstance(update, Gone)
        for item in [update] if isinstance(update, Head) else update:
            self.put(item)


class Summaries(Inbox[Summary | None]):
    """An inbox for summaries. None stands for some that may have been missed."""

    def deliver(self, records: Sequence[Summary] | None) -> None:
        for item in [None] if records is None else records:
            self.put(item)


class Heard(Inbox[Announcement]):
    """An inbox for announcements."""

    def announce(self, announcement: Announcement | None) -> None:
        if announcement is not None:
            self.put(announcement)
