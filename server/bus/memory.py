"""The bus of a single process, and the reference for what any bus must do.

Nothing here awaits inside an operation, so each is atomic on its loop. It keeps the last `MAX_ENDED` ended runs, fewer
if they exceed `MAX_ENDED_BYTES`, and `MAX_KEYS` idempotency keys.
"""

import bisect
import time
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import anyio
from anyio.abc import TaskStatus

from agentcast.server.bus.base import (
    ACTIVE,
    FEED_LENGTH,
    KEY_TTL,
    LIST_EXAMINED,
    LOG_BYTES,
    LOG_EVENTS,
    PAGE_BYTES,
    PAGE_EVENTS,
    Announce,
    Announcement,
    CommandHandler,
    Created,
    Deliver,
    DeliverSummaries,
    Ends,
    Filter,
    Frame,
    Head,
    Listing,
    NewRun,
    Opened,
    Origin,
    Page,
    Registration,
    RunInfo,
    Snapshot,
    Status,
    Subscription,
    Summary,
    check_append,
    check_summaries,
    new_epoch,
)
from agentcast.server.bus.memory_log import Log
from agentcast.server.errors import Conflict, Ended, Fenced, HeadMismatch, NotFound, Unavailable

MAX_ENDED = 1_000
MAX_ENDED_BYTES = 256 * 1024 * 1024
MAX_KEYS = 100_000


@dataclass(frozen=True, slots=True)
class _Key:
    run: str
    fingerprint: str
    expires: float


class MemoryBus:
    """A `Bus` whose runs end with the process."""

    def __init__(
        self,
        *,
        log_events: int = LOG_EVENTS,
        log_bytes: int = LOG_BYTES,
        feed_length: int = FEED_LENGTH,
        max_ended: int = MAX_ENDED,
        max_ended_bytes: int = MAX_ENDED_BYTES,
    ) -> None:
        self._log_events = log_events
        self._log_bytes = log_bytes
        self._max_ended = max_ended
        self._max_ended_bytes = max_ended_bytes
        self._logs: dict[str, Log] = {}
        self._ids: list[str] = []
        """The ids of all runs, sorted: by creation; those of one microsecond in any order, but always the same."""
        self._ended: OrderedDict[str, int] = OrderedDict()
        self._ended_bytes = 0
        self._keys: OrderedDict[tuple[str, str], _Key] = OrderedDict()
        self._feed: deque[Announcement] = deque(maxlen=feed_length)
        self._feed_id = new_epoch()
        self._announced = 0
        self._watchers: dict[object, Announce] = {}
        self._summary_watchers: dict[object, DeliverSummaries] = {}
        self._handler: CommandHandler | None = None

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await anyio.sleep_forever()

    @property
    def degraded(self) -> None:
        """Never."""

    @property
    def counters(self) -> Mapping[str, int]:
        return {}

    # -- Logs ------------------------------------------------------------------------------------------------------

    async def create(self, new: NewRun) -> Created:
        if new.key is not None:
            known = self._find_key(new.principal, new.key)
            if known is not None:
                if known.fingerprint != new.fingerprint:
                    raise Conflict("this key was used for a start with another agent or input; use a new key")
                return Created(known.run, self._log(known.run).info.epoch, None)
            self._keys.pop((new.principal, new.key), None)  # oldest first, also when a key is given out again
            self._keys[new.principal, new.key] = _Key(new.run, new.fingerprint, time.time() + KEY_TTL)
            if len(self._keys) > MAX_KEYS:
                self._keys.popitem(last=False)
        log = self._begin_log(new.run, new.epoch, Origin(new.agent, new.principal, new.thread, new.created), fence=1)
        log.info = replace(log.info, head=1)
        log.frames, log.stored = [new.first], len(new.first.data)
        return Created(new.run, new.epoch, 1)

    def _begin_log(self, run: str, epoch: str, origin: Origin, fence: int) -> Log:
        """An empty log, announced."""
        info = RunInfo(
            run=run,
            agent=origin.agent,
            principal=origin.principal,
            thread=origin.thread,
            epoch=epoch,
            head=0,
            status="queued",
            created=origin.created,
        )
        if run not in self._logs:
            bisect.insort(self._ids, run)
        log = self._logs[run] = Log(info, fence)
        self._announced += 1
        position = f"{self._feed_id}:{self._announced}"
        announcement = Announcement(position, run, epoch, origin.agent, origin.thread, origin.principal)
        self._feed.append(announcement)
        for token, announce in list(self._watchers.items()):
            if token in self._watchers:
                announce(announcement)
        return log

    async def claim(self, run: str) -> int:
        log = self._log(run)
        if log.ended:
            raise Ended(run)
        log.fence += 1
        return log.fence

    async def append(self, run: str, fence: int, frames: Sequence[Frame], status: Status) -> None:
        check_append(frames)
        log = self._owned(run, fence)
        head = log.info.head
        if frames[0].epoch == log.info.epoch and frames[-1].seq <= head:
            return
        if log.ended:
            raise Ended(run)
        if frames[0].epoch != log.info.epoch or frames[0].seq != head + 1:
            raise HeadMismatch(run, log.info.epoch, head)
        log.frames.extend(frames)
        log.stored += sum(len(frame.data) for frame in frames)
        ended = time.time() if frames[-1].terminal else None
        log.info = replace(log.info, head=frames[-1].seq, status=status, ended=ended)
        log.deliver(frames)
        if ended is not None:
            self._retire(run, log)

    async def rebase(
        self, run: str, fence: int, seq: int, state: bytes, status: Status, origin: Origin | None = None
    ) -> str:
        epoch = new_epoch()
        if run not in self._logs and origin is not None:
            self._begin_log(run, epoch, origin, fence)
        log = self._owned(run, fence)
        if log.info.ended is not None:
            raise Ended(run)
        if log.info.head > seq:
            raise Fenced(run)
        ended = None if status in ACTIVE else time.time()
        log.info = replace(log.info, epoch=epoch, head=seq, status=status, ended=ended, oldest=seq + 1)
        log.empty()
        log.snapshot = Snapshot(run, epoch, seq, state)
        log.deliver(Head(run, epoch, seq, ended=log.ended))
        if log.ended:
            self._retire(run, log)
        return epoch

    async def info(self, runs: Collection[str]) -> dict[str, RunInfo]:
        return {run: self._logs[run].info for run in runs if run in self._logs}

    async def read(self, run: str, epoch: str, after: int) -> Page | None:
        log = self._log(run)
        head = log.info.head
        first = head - len(log.frames) + 1
        if epoch != log.info.epoch or not first - 1 <= after <= head:
            return None
        start = after - first + 1
        frames: list[Frame] = []
        size = 0
        for frame in log.frames[start : start + PAGE_EVENTS]:
            frames.append(frame)
            size += len(frame.data)
            if size >= PAGE_BYTES:
                break
        return Page(frames, head)

    async def read_ends(self, runs: Collection[str]) -> dict[str, Ends]:
        return {run: self._logs[run].ends for run in runs if run in self._logs}

    async def save_snapshot(self, fence: int, snapshot: Snapshot) -> None:
        log = self._owned(snapshot.run, fence)
        saved = log.snapshot
        if snapshot.epoch != log.info.epoch or (saved is not None and snapshot.seq < saved.seq):
            return
        log.snapshot = snapshot
        log.trim(snapshot.seq, self._log_events, self._log_bytes)
        if log.ended:
            self._retire(snapshot.run, log)

    async def load_snapshot(self, run: str) -> Snapshot | None:
        return self._log(run).snapshot

    async def open(self, deliver: Mapping[str, Deliver]) -> dict[str, Opened]:
        known = {run: self._logs[run] for run in deliver if run in self._logs}
        return {run: Opened(log.info, log.subscribe(deliver[run])) for run, log in known.items()}

    async def list(self, filter: Filter) -> Listing:
        found: list[RunInfo] = []
        places = _listed(self._ids, filter)
        for place in places[:LIST_EXAMINED]:
            run = self._ids[place]
            info = self._logs[run].info
            if filter.fits(info):
                found.append(info)
                if len(found) == filter.limit:
                    break
        return Listing(found, run if places and place != places[-1] else None)

    # -- Summaries -------------------------------------------------------------------------------------------------

    async def publish_summaries(self, records: Sequence[Summary]) -> None:
        check_summaries(records)
        kept = [record for record in records if self._keep_summary(record)]
        for token, deliver in list(self._summary_watchers.items()) if kept else ():
            if token in self._summary_watchers:
                deliver(kept)

    def _keep_summary(self, record: Summary) -> bool:
        log = self._logs.get(record.run)
        if log is None or (record.fence, record.epoch) != (log.fence, log.info.epoch):
            return False
        if not record.replaces(log.summary):
            return False
        log.summary = record
        if log.ended:
            self._retire(record.run, log)
        return True

    async def watch_summaries(self, deliver: DeliverSummaries) -> Subscription:
        token = object()
        self._summary_watchers[token] = deliver
        return Registration(lambda: self._summary_watchers.pop(token, None))

    async def summaries(self, runs: Collection[str]) -> dict[str, Summary]:
        logs = {run: self._logs[run] for run in runs if run in self._logs}
        return {run: log.summary for run, log in logs.items() if log.summary is not None}

    # -- The feed --------------------------------------------------------------------------------------------------

    async def watch_feed(self, announce: Announce) -> tuple[Subscription, str]:
        token = object()
        self._watchers[token] = announce
        return Registration(lambda: self._watchers.pop(token, None)), f"{self._feed_id}:{self._announced}"

    async def read_feed(self, after: str) -> Sequence[Announcement] | None:
        feed, _, number = after.partition(":")
        oldest = self._announced - len(self._feed)
        if feed != self._feed_id or not number.isdecimal() or not oldest <= int(number) <= self._announced:
            return None
        return list(islice(self._feed, int(number) - oldest, None))

    # -- Commands --------------------------------------------------------------------------------------------------

    async def send_command(self, run: str, command: Mapping[str, Any]) -> None:
        self._log(run)
        if self._handler is None:
            raise Unavailable("no process runs this run at the moment; try again")
        await self._handler(run, command)

    async def handle_commands(self, handler: CommandHandler) -> Subscription:
        self._handler = handler

        def remove() -> None:
            if self._handler is handler:
                self._handler = None

        return Registration(remove)

    async def orphans(self, mine: Collection[str]) -> Sequence[str]:
        return ()  # there is no other process that could have left any

    async def fenced(self, fences: Mapping[str, int]) -> Collection[str]:
        return [run for run, fence in fences.items() if run in self._logs and self._logs[run].fence != fence]

    async def check(self) -> None:
        """Does nothing: there is no path that could fail."""

    async def aclose(self) -> None:
        self._logs.clear()
        self._ids.clear()
        self._watchers.clear()
        self._summary_watchers.clear()

    # -- Inside ----------------------------------------------------------------------------------------------------

    def _log(self, run: str) -> Log:
        try:
            return self._logs[run]
        except KeyError:
            raise NotFound(f"there is no run {run[:64]!r}") from None

    def _owned(self, run: str, fence: int) -> Log:
        log = self._log(run)
        if fence != log.fence:
            raise Fenced(run)
        return log

    def _find_key(self, principal: str, key: str) -> _Key | None:
        now = time.time()
        while self._keys and next(iter(self._keys.values())).expires <= now:
            self._keys.popitem(last=False)
        known = self._keys.get((principal, key))
        if known is None or known.run not in self._logs:
            return None
        info = self._logs[known.run].info
        return None if info.status == "failed" and info.head == 2 else known

    def _retire(self, run: str, log: Log) -> None:
        """Account for an ended run, and forget the oldest ended ones past the bounds; never the newest, whose followers
        have yet to read its end."""
        self._ended_bytes += log.size - self._ended.get(run, 0)
        self._ended[run] = log.size
        while len(self._ended) > 1 and (
            len(self._ended) > self._max_ended or self._ended_bytes > self._max_ended_bytes
        ):
            oldest, size = self._ended.popitem(last=False)
            self._ended_bytes -= size
            del self._logs[oldest]
            del self._ids[bisect.bisect_left(self._ids, oldest)]


def _listed(ids: Sequence[str], filter: Filter) -> range:
    """The indices of the `ids` that a listing goes through, in its order."""
    if filter.order == "newest":
        end = len(ids) if filter.before is None else bisect.bisect_left(ids, filter.before)
        return range(end - 1, -1, -1)
    return range(0 if filter.before is None else bisect.bisect_right(ids, filter.before), len(ids))
