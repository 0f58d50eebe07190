"""Pages of the list of runs, and those that live: a client is sent the records that change in its page,
and its order.

All who look at the same page, by filter, order and place, share one `Page`. It is read again only if a record shows
that a run has entered or left it, at most 4 times a second, however many clients and events there are. The records of
its runs come over the board, as any summary does.

This module must not know sockets or commands, or what is in a summary.
"""

from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import orjson
from anyio import sleep
from anyio.abc import TaskStatus

from agentcast.server import protocol
from agentcast.server.bus.base import ACTIVE, Bus, Filter, RunInfo, Summary
from agentcast.server.errors import TooMany, Unavailable
from agentcast.server.hub.board import run_key
from agentcast.server.hub.catch_up import jitter
from agentcast.server.hub.frames import Batch
from agentcast.server.hub.outbox import Outbox
from agentcast.server.hub.single_flight import SingleFlight
from agentcast.server.hub.summaries import INTERVAL, Summaries, read_records
from agentcast.server.hub.viewers import Key, Watch

MAX_WATCHED = 8
"""Pages that one connection may watch."""
MAX_PAGES = 256
"""Different pages that a process keeps alive."""
READING = 8
"""Pages that are read again at the same time."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a page shows."""

    runs: tuple[str, ...] = ()
    next: str | None = None
    """What `Filter.before` takes for the page after it; None on the last."""


@dataclass(slots=True, eq=False)
class Reader:
    """One client's subscription to a page."""

    watch: Watch
    shown: Order | None = None
    """The order that it was sent last; None: its reply is still to come."""


@dataclass(slots=True, eq=False)
class Page:
    """A page that somebody watches. `changed` is called when it has to be read again."""

    filter: Filter
    changed: Callable[[], None]
    order: Order = field(default_factory=Order)
    members: frozenset[str] = frozenset()
    stale: int = 0
    """How many times it is yet to be read. A change costs two: the bus's list may lag behind the records."""
    reading: int = 0
    newer: dict[str, Summary] = field(default_factory=dict)
    """What was delivered while it is being read."""
    readers: dict[Reader, None] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """The smallest key that covers all its runs."""
        principal, agent, thread = self.filter.principal or "", self.filter.agent, self.filter.thread
        if thread is not None:
            return principal, "thread", thread
        return (principal, "all", "") if agent is None else (principal, "agent", agent)

    def notice(self, record: Summary) -> None:
        """See whether the record makes a run enter or leave."""
        if self.reading:
            self.newer[record.run] = record
        if (record.run in self.members) != (self._fits(record) and self._reaches(record.run)):
            self.stale = 2
            self.changed()

    def miss(self) -> None:
        """Records may have been missed."""
        self.stale = max(self.stale, 1)
        self.changed()

    def _fits(self, record: Summary) -> bool:
        agent, statuses = self.filter.agent, self.filter.statuses
        return agent in (None, record.agent) and (statuses is None or record.status in statuses)

    def _reaches(self, run: str) -> bool:
        """Whether the run's place in the list is on this page."""
        first, last = self.filter.before, self.order.next
        if self.filter.order == "newest":
            return (first is None or run < first) and (last is None or run >= last)
        return (first is None or run > first) and (last is None or run <= last)


@dataclass(slots=True)
class PageJoin:
    """A subscription to a page that adds no frame yet: reply with `result`, then `commit`."""

    _lists: "LiveLists"
    _reader: Reader
    _records: Collection[Summary]
    _order: Order
    result: dict[str, Any]

    def commit(self) -> None:
        """From now on changes are sent. Must follow the reply without an await in between."""
        watch, replied = self._reader.watch, {record.run: record.data for record in self._records}
        slots = {run: slot for group in watch.groups for run, slot in group.slots.items()}
        newer = {run: slot for run, slot in slots.items() if slot.record.data != replied.get(run)}
        self._reader.shown = self._order
        self._lists.summaries.board.begin(watch, newer)
        self._lists.summaries.wake()
        self._lists.wake()


class LiveLists:
    """The pages that clients of this process watch. `run` must be running while the others are used."""

    def __init__(self, bus: Bus, summaries: Summaries) -> None:
        self.summaries = summaries
        self._bus = bus
        self._pages: dict[Filter, Page] = {}
        self._readers: dict[Outbox, dict[str, tuple[Page, Reader]]] = {}
        self._reads: SingleFlight[Page, tuple[Collection[Summary], Order]] = SingleFlight()
        self._changed = anyio.Event()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Keep the pages alive until cancelled."""
        task_status.started()
        while True:
            await self._changed.wait()
            self._changed = anyio.Event()
            await self._read_stale()
            due = [self._show_order(page, reader) for page in self._pages.values() for reader in page.readers]
            await sleep(INTERVAL)
            if any(due) or any(page.stale for page in self._pages.values()):
                self.wake()

    def wake(self) -> None:
        """A page has to be read, or its order to be sent."""
        self._changed.set()

    def _show_order(self, page: Page, reader: Reader) -> bool:
        """Send the page's order, if it has changed. Whether there was no room for that."""
        if reader.shown is None or reader.shown == page.order:
            return False
        outbox = reader.watch.viewer.outbox
        batch = Batch((protocol.page(reader.watch.subscription, page.order.runs, page.order.next),))
        if not outbox.fits(batch):
            return True
        outbox.push(batch)
        reader.shown = page.order
        return False

    # -- Reading ---------------------------------------------------------------------------------------------------

    async def read(self, filter: Filter) -> dict[str, Any]:
        """A page: the records of its `runs`, and what comes `next`.

        :raises Unavailable: the bus is away.
        """
        listed = await self._bus.list(filter)
        return _result(await read_records(self._bus, listed), listed.next)

    async def rows(self, filter: Filter) -> dict[str, Any]:
        """A page in the same way, with what the bus knows of each run around its record.

        :raises Unavailable: the bus is away.
        """
        listed = await self._bus.list(filter)
        records = await read_records(self._bus, listed)
        result = _result(records, listed.next)
        result["runs"] = [_row(info, record) for info, record in zip(listed, records, strict=True)]
        return result

    async def _read_stale(self) -> None:
        limiter = anyio.CapacityLimiter(READING)

        async def read(page: Page) -> None:
            async with limiter:
                page.stale -= 1
                try:
                    await self._reads(page, lambda: self._read_page(page))
                except Unavailable:
                    page.stale = 2
                    await sleep(jitter())

        async with anyio.create_task_group() as tasks:
            for page in [page for page in self._pages.values() if page.stale]:
                tasks.start_soon(read, page)

    async def _read_page(self, page: Page) -> tuple[Collection[Summary], Order]:
        """Read a page, and have the board keep the records of the runs that it shows now."""
        board = self.summaries.board
        page.reading += 1
        try:
            with board.reading() as read:
                listed = await self._bus.list(page.filter)
                found = await read_records(self._bus, listed)
                records = [page.newer.get(record.run, record) for record in found]
                order = Order(tuple(record.run for record in records), listed.next)
                entered = [record for record in records if record.run not in page.members]
                left = page.members.difference(order.runs)
                for reader in page.readers:
                    board.widen(reader.watch, [run_key(record.principal, record.run) for record in entered])
                slots = {record.run: slot for record in entered if (slot := board.take(record, read)) is not None}
                for reader in page.readers:
                    board.narrow(reader.watch, [run_key(page.filter.principal or "", run) for run in left])
                    board.show(reader.watch, slots)
        finally:
            page.reading -= 1
            if not page.reading:
                page.newer.clear()
        page.order, page.members = order, frozenset(order.runs)
        self.summaries.wake()
        return records, order

    # -- Joining ---------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def join(self, outbox: Outbox, subscription: str, filter: Filter) -> AsyncIterator[PageJoin]:
        """Subscribe `outbox` to a page; leaving the context with an error undoes it.

        :raises TooMany: the connection has too many subscriptions, or it or the process watches too many pages.
        :raises Unavailable: the bus is away.
        """
        if len(self._readers.get(outbox, ())) >= MAX_WATCHED:
            raise TooMany(f"a connection may watch {MAX_WATCHED} pages; unsubscribe from one of them first")
        if filter not in self._pages and len(self._pages) >= MAX_PAGES:
            raise TooMany(f"this hub keeps {MAX_PAGES} different pages alive; list without `subscribe`, or try later")
        outbox.subscribe(subscription, single=True)
        try:
            page, reader = self._enter(outbox, subscription, filter)
            await self.summaries.watch()
            with self.summaries.board.reading():  # what ends before the reply stays on the board until then
                records, order = await self._reads(page, lambda: self._read_page(page))
                result = {"subscription": subscription, **_result(records, order.next)}
                yield PageJoin(self, reader, records, order, result)
        except BaseException:
            outbox.subscriptions.pop(subscription, None)
            self.leave(outbox, subscription)
            raise

    def _enter(self, outbox: Outbox, subscription: str, filter: Filter) -> tuple[Page, Reader]:
        board = self.summaries.board
        page = self._pages.get(filter)
        if page is None:
            page = self._pages[filter] = Page(filter, self.wake)
            board.listen(page.key, page)
        keys = [run_key(filter.principal or "", run) for run in page.order.runs]
        reader = Reader(board.watch(outbox, subscription, keys))
        page.readers[reader] = None
        self._readers.setdefault(outbox, {})[subscription] = page, reader
        return page, reader

    def leave(self, outbox: Outbox, subscription: str) -> None:
        """End a subscription to a page, if the connection has it."""
        readers = self._readers.get(outbox, {})
        if subscription not in readers:
            return
        page, reader = readers.pop(subscription)
        if not readers:
            del self._readers[outbox]
        del page.readers[reader]
        if not page.readers:
            del self._pages[page.filter]
            self.summaries.board.unlisten(page.key, page)
        self.summaries.leave(outbox, subscription)

    def disconnect(self, outbox: Outbox) -> None:
        """The connection is gone, or broken."""
        for subscription in list(self._readers.get(outbox, ())):
            self.leave(outbox, subscription)


def _result(records: Collection[Summary], next: str | None) -> dict[str, Any]:
    result: dict[str, Any] = {"runs": [orjson.Fragment(record.data) for record in records]}
    if next is not None:
        result["next"] = next
    return result


def _row(info: RunInfo, record: Summary) -> dict[str, Any]:
    row = {
        "run": info.run,
        "agent": info.agent,
        "thread": info.thread,
        "epoch": info.epoch,
        "seq": info.head,
        "status": info.status,
        "active": info.status in ACTIVE,
        "created": info.created,
        "ended": info.ended,
    }
    return {name: value for name, value in row.items() if value is not None} | {"summary": orjson.Fragment(record.data)}
