"""Detail `summary`: the newest small record of each of thousands of runs, for those who watch them.

The summaries of the bus are watched only while somebody watches the board. A subscription to everything, an agent or
a thread begins with the active runs, whose stored summaries are read once for all who ask for the same. What may have
been missed, after a gap or because an owner died, is read again.

This module must not know sockets or commands, or what is in a summary.
"""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import anyio
from anyio import sleep
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint

from agentcast.server import protocol
from agentcast.server.bus.base import ACTIVE, Bus, Filter, RunInfo, Subscription, Summary
from agentcast.server.errors import NotFound, Unavailable
from agentcast.server.hub.board import Board, run_key
from agentcast.server.hub.catch_up import jitter
from agentcast.server.hub.outbox import MAX_FOLLOWED, Outbox
from agentcast.server.hub.single_flight import SingleFlight
from agentcast.server.hub.viewers import Group, Slot, Watch
from agentcast.server.protocol import To

INTERVAL = 0.25
"""Seconds between two records of a run to one connection, at least."""
REFRESH = 60.0
"""Seconds after which a run that looks active is looked up, if nothing came of it."""
PAGE = 500
"""Runs whose summaries are read at a time."""
MAX_NAMED = MAX_FOLLOWED
"""Runs that one connection may watch by name."""


@dataclass(slots=True)
class SummaryJoin:
    """A subscription that adds no frame yet: reply with `result`, then `commit`."""

    _summaries: "Summaries"
    _watch: Watch
    result: dict[str, Any]
    _found: dict[str, Slot] | None = None
    """Runs that were asked for by name; None: it is to all active runs of its group."""

    def commit(self) -> None:
        """From now on records are sent. Must follow the reply without an await in between."""
        board, watch = self._summaries.board, self._watch
        if self._found is None:
            board.begin(watch)
        else:
            board.begin(watch, self._found, awaited=self._found)
        self._summaries.wake()


class Summaries:
    """The board of this process. `run` must be running while the others are used."""

    def __init__(self, bus: Bus) -> None:
        self.board = Board()
        self._bus = bus
        self._changed = anyio.Event()
        self._missed = anyio.Event()
        self._subscription: Subscription | None = None
        self._subscribing = anyio.Lock()
        self._loads: SingleFlight[Group, None] = SingleFlight()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Send what changes until cancelled."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._refresh_now_and_then)
                task_status.started()
                await self._flush()
        finally:
            if self._subscription is not None:
                self._subscription.close()

    async def _flush(self) -> None:
        while True:
            await self._changed.wait()
            self._changed = anyio.Event()
            for _ in self.board.flush():
                await checkpoint()
            self.unwatch()  # a subscription to runs by name ends with them
            await sleep(INTERVAL)  # from the end of one to the beginning of the next: a run is never sent sooner
            if self.board.due:
                self.wake()

    def wake(self) -> None:
        """There is something to send."""
        self._changed.set()

    # -- Watching the bus ------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Have the board fed, since somebody has begun to watch it."""
        async with self._subscribing:
            if self._subscription is None:
                self._subscription = await self._bus.watch_summaries(self._deliver)
                self.unwatch()  # all may have left meanwhile

    def unwatch(self) -> None:
        """Somebody may have left the board: if nobody is left, it need not be fed."""
        if self.board.unwatched and self._subscription is not None:
            self._subscription.close()
            self._subscription = None

    def _deliver(self, records: Sequence[Summary] | None) -> None:
        if records is None:
            self._missed.set()
            return
        for record in records:
            self.board.take(record)
        if self.board.due:
            self.wake()

    # -- Joining ---------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def join(self, outbox: Outbox, subscription: str, principal: str, to: To) -> AsyncIterator[SummaryJoin]:
        """Subscribe `outbox` to records; leaving the context with an error undoes it.

        :raises NotFound: none of the runs that `to` names exists.
        :raises TooMany: the connection has too many subscriptions.
        :raises Unavailable: the bus is away.
        """
        outbox.subscribe(subscription, single=True)
        try:
            named = to.named
            join = await (
                self._join_group(outbox, subscription, principal, to)
                if named is None
                else self._join_runs(outbox, subscription, principal, named)
            )
            yield join
        except BaseException:
            outbox.subscriptions.pop(subscription, None)
            self.leave(outbox, subscription)
            raise

    async def _join_group(self, outbox: Outbox, subscription: str, principal: str, to: To) -> SummaryJoin:
        watch = self.board.watch(outbox, subscription, [to.key(principal)])
        group = next(iter(watch.groups))
        await self.watch()
        if watch.groups and not group.complete:  # it may have been left meanwhile
            await self._loads(group, lambda: self._load(group))
        result: dict[str, Any] = {"subscription": subscription}
        if group.left_out:
            result["truncated"] = len(group.left_out)
        return SummaryJoin(self, watch, result)

    async def _join_runs(self, outbox: Outbox, subscription: str, principal: str, named: Sequence[str]) -> SummaryJoin:
        room = max(MAX_NAMED - self.board.named(outbox), 0)
        asked = list(dict.fromkeys(named))
        wanted = asked[:room]
        watch = self.board.watch(outbox, subscription, [run_key(principal, run) for run in wanted], named=True)
        await self.watch()
        existing, found = await self._read(wanted, principal)
        self.board.narrow(watch, [run_key(principal, run) for run in wanted if run not in found])
        missing = [run for run in wanted if run not in existing]
        if wanted and not existing:
            raise NotFound(f"there is no run {wanted[0][:64]!r}")
        result: dict[str, Any] = {"subscription": subscription}
        if missing:
            result["missing"] = missing
        if left_out := len(asked) - len(missing) - len(found):
            result["truncated"] = left_out
        if not found:  # it could bring nothing, ever
            outbox.subscriptions.pop(subscription, None)
            self.leave(outbox, subscription)
            del result["subscription"]
        return SummaryJoin(self, watch, result, found)

    def leave(self, outbox: Outbox, subscription: str) -> None:
        """End a subscription to records, if the connection has it."""
        self.board.leave(outbox, subscription)
        self.unwatch()

    def disconnect(self, outbox: Outbox) -> None:
        """The connection is gone, or broken."""
        self.board.disconnect(outbox)
        self.unwatch()

    # -- Reading ---------------------------------------------------------------------------------------------------

    async def _load(self, group: Group) -> None:
        """Put the active runs of a group on the board, page by page, the newest first, as long as there is room."""
        principal, kind, value = group.key
        agent, thread = (value if kind == name else None for name in ("agent", "thread"))
        filter = Filter(principal=principal, agent=agent, thread=thread, statuses=ACTIVE, limit=PAGE)
        while True:
            with self.board.reading() as read:
                listed = await self._bus.list(filter)
                for record in await read_records(self._bus, listed):
                    self.board.take(record, read)
            if listed.next is None or group.left_out:
                break
            filter = replace(filter, before=listed.next)
            await checkpoint()
        group.complete = True

    async def _read(self, runs: Sequence[str], principal: str) -> tuple[set[str], dict[str, Slot]]:
        """Of these runs: those that exist, and their places on the board, as far as it has room."""
        existing: set[str] = set()
        found: dict[str, Slot] = {}
        for start in range(0, len(runs), PAGE):
            with self.board.reading() as read:
                infos = await self._bus.info(runs[start : start + PAGE])
                mine = [info for info in infos.values() if info.principal == principal]
                existing.update(info.run for info in mine)
                for record in await read_records(self._bus, mine):
                    if (slot := self.board.take(record, read)) is not None:
                        found[record.run] = slot
            await checkpoint()
        return existing, found

    # -- What was missed -------------------------------------------------------------------------------------------

    async def _refresh_now_and_then(self) -> None:
        until, unknown = 0, dict[str, int]()
        while True:
            with anyio.move_on_after(REFRESH):
                await self._missed.wait()
            until = self.board.number if self._missed.is_set() else until
            self._missed = anyio.Event()
            try:
                unknown = await self._refresh(until, unknown)
                until = self.board.number
            except Unavailable:
                await sleep(jitter())
                self._missed.set()
            self.wake()

    async def _refresh(self, until: int, before: Mapping[str, int]) -> dict[str, int]:
        """Read the runs again of which nothing came since the board stood at `until`, and list the active ones.

        Gives the runs that the bus does not know, and how many times in a row. It may be about to restore them: at the
        second time they are lost.
        """
        unknown: dict[str, int] = {}
        active = self.board.active(until)
        while page := {record.run: record for record in islice(active, PAGE)}:
            with self.board.reading() as read:
                infos = await self._bus.info(page)
                for record in await read_records(self._bus, infos.values()):
                    self.board.take(record, read)
                for run in page.keys() - infos.keys():
                    unknown[run] = before.get(run, 0) + 1
                    if unknown[run] > 1:
                        self.board.take(lost(page[run]), read)
            await checkpoint()
        for group in self.board.groups:
            if group.key[1] != "run":
                await self._loads(group, lambda group=group: self._load(group))  # type: ignore[misc]
        self.board.miss()
        return unknown


async def read_records(bus: Bus, infos: Collection[RunInfo]) -> list[Summary]:
    """The stored summary of each run, or else what its info says."""
    stored = await bus.summaries([info.run for info in infos])
    return [newest(info, stored.get(info.run)) for info in infos]


def newest(info: RunInfo, stored: Summary | None) -> Summary:
    """The record of a run. The log knows of its end before the summary does, whose owner may have died."""
    if stored is not None and (info.status in ACTIVE or stored.status not in ACTIVE):
        return stored
    made = Summary(
        run=info.run,
        epoch=info.epoch,
        seq=info.head,
        fence=0,
        principal=info.principal,
        agent=info.agent,
        thread=info.thread,
        status=info.status,
        created=info.created,
        data=b"",
    )
    return _filled(made, ended=info.ended)


def lost(record: Summary) -> Summary:
    """The last record of a run that the bus has lost."""
    error = {"code": "run_lost", "message": "the hub has lost this run"}
    return _filled(replace(record, status="failed"), error=error)


def _filled(record: Summary, **more: Any) -> Summary:
    """A record with the `data` that its other fields make."""
    facts = {name: getattr(record, name) for name in ("run", "agent", "thread", "status", "created")} | more
    data = protocol.encode({name: value for name, value in facts.items() if value is not None})
    return replace(record, data=data)
