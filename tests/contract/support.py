"""Runs and frames to put on a bus, and inboxes for what it delivers."""

import itertools
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import anyio

from agentcast.server.bus.base import (
    Announcement,
    Bus,
    Created,
    Frame,
    Gone,
    Head,
    NewRun,
    Snapshot,
    Status,
    new_epoch,
    new_run_id,
)

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


class Inbox(Generic[T]):
    """Keeps what is put into it and lets a test wait for it."""

    def __init__(self) -> None:
        self.items: list[T] = []
        self._news = anyio.Event()

    def put(self, item: T) -> None:
        self.items.append(item)
        self._news.set()

    async def until(self, ready: Callable[[list[T]], bool]) -> list[T]:
        with anyio.fail_after(PATIENCE):
            while not ready(self.items):
                self._news = anyio.Event()
                await self._news.wait()
        return self.items

    async def take(self, count: int) -> list[T]:
        """The first `count` items, once they are there."""
        return (await self.until(lambda items: len(items) >= count))[:count]


class Mail(Inbox[Frame | Head]):
    """An inbox for the news of a run."""

    def deliver(self, news: Sequence[Frame] | Head | Gone) -> None:
        assert not isinstance(news, Gone)
        for item in [news] if isinstance(news, Head) else news:
            self.put(item)


class Heard(Inbox[Announcement]):
    """An inbox for what the feed announces."""

    def announce(self, news: Announcement | None) -> None:
        if news is not None:
            self.put(news)
