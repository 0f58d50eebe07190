"""The bus of several hub processes over one Redis primary (6.2 or newer, or Valkey; no cluster).

Every write is one script, so it happens wholly or not at all, and may be repeated. News travel by pub/sub, which may
lose some: after each reconnect the heads of all followed runs are compared with what was delivered, and those of quiet
runs every `RECHECK` seconds (G2). A Redis that came back empty, or older than it was, is told what it lost by the
owners of the runs: they are asked to verify after each reconnect, too.
"""

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import orjson
from anyio.abc import TaskStatus

from server.bus.base import (
    ACTIVE,
    FEED_LENGTH,
    KEY_TTL,
    LOG_BYTES,
    LOG_EVENTS,
    PAGE_BYTES,
    PAGE_EVENTS,
    TTL,
    Announce,
    Announcement,
    CommandHandler,
    Created,
    Deliver,
    Filter,
    Frame,
    Gone,
    Head,
    NewRun,
    Origin,
    Page,
    Registration,
    RunInfo,
    Snapshot,
    Status,
    Subscription,
    new_epoch,
    stamp,
)
from server.bus.redis import scripts
from server.bus.redis.commands import Commands
from server.bus.redis.frames import flags, news, unpack
from server.bus.redis.keys import Keys
from server.bus.redis.lane import Lane, Script, connections
from server.bus.redis.listener import Listener
from server.bus.redis.workers import Workers
from server.errors import Conflict, Ended, Fenced, HeadMismatch, NotFound, Unavailable

RECHECK = 15.0
"""Seconds without news after which the head of a followed run is compared."""
RECHECK_TICK = 5.0
RESTORING = 5.0
"""Seconds that owners get to restore their runs in a Redis that has lost some; until then none is called unknown."""
GONE_AFTER = 10.0
"""Seconds after which a followed run that Redis has lost, and nobody restored, is gone."""
INDEXED = 3 * 24 * 3600.0
"""Seconds that a run's id stays in the indices; none lives that much longer than its creation."""
READ_PATIENCE = 5.0
"""Seconds for pages and snapshots, which may be large."""
LIST_CHUNK = 200

CREATE, CLAIM, APPEND, REBASE, READ, SAVE_SNAPSHOT = map(
    Script,
    (scripts.CREATE, scripts.CLAIM, scripts.APPEND, scripts.REBASE, scripts.READ, scripts.SAVE_SNAPSHOT),
)
_INFO = ("agent", "principal", "thread", "epoch", "head", "status", "created", "ended")

logger = logging.getLogger(__name__)

Position = tuple[str, int]
"""Epoch and seq."""


@dataclass(slots=True, eq=False)
class _Followed:
    """A run whose news this process gets."""

    run: str
    delivers: dict[object, Deliver] = field(default_factory=dict)
    known: Position | None = None
    heard_at: float = 0.0
    missing_since: float | None = None

    def deliver(self, item: Sequence[Frame] | Head | Gone) -> None:
        for token, deliver in list(self.delivers.items()):
            if token in self.delivers:  # one delivery may close another's subscription
                deliver(item)


class RedisBus:
    """A `Bus` shared by all processes that are given the same `url` and `prefix`. `worker` names this one."""

    def __init__(
        self,
        url: str,
        worker: str,
        *,
        prefix: str = "agentcast",
        log_events: int = LOG_EVENTS,
        log_bytes: int = LOG_BYTES,
        feed_length: int = FEED_LENGTH,
    ) -> None:
        connect = connections(url)
        reads = connect()
        self._worker = worker
        self._log_events = log_events
        self._log_bytes = log_bytes
        self._feed_length = feed_length + 1  # the entry at a position proves that the position is of this feed
        self._writes = Lane(connect())
        self._reads = Lane(reads)
        self._keys = keys = Keys(prefix, reads.db)
        self._commands = Commands(self._publish, keys, worker)
        receivers = {keys.commands(worker): self._commands.take, keys.feed_channel: self._take_announcement}
        self._listener = Listener(connect, self._publish, keys.probe(worker), receivers, self._catch_up)
        self._workers = Workers(self._writes, keys, worker)
        self._followed: dict[str, _Followed] = {}
        self._owned: dict[str, Position] = {}
        self._watchers: dict[object, Announce] = {}
        self._feed_position: str | None = None
        self._restoring_until = 0.0

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        async with anyio.create_task_group() as tasks:
            for part in (self._writes, self._reads, self._commands, self._listener, self._workers):
                tasks.start_soon(part.run)
            await self._listener.connected.wait()
            task_status.started()
            while True:
                await anyio.sleep(RECHECK_TICK)
                await self._recheck()

    @property
    def degraded(self) -> str | None:
        return self._listener.problem or self._workers.problem

    # -- Logs ------------------------------------------------------------------------------------------------------

    async def create(self, new: NewRun) -> Created:
        keys = self._keys
        answer = await self._writes.script(
            CREATE,
            [
                *keys.log_and_feed(new.run),
                *keys.indices(new.agent, new.thread),
                keys.active,
                keys.owned(self._worker),
                keys.workers,
                keys.idempotency(new.principal, new.key or ""),
            ],
            *(new.run, new.epoch, new.agent, new.principal, new.thread or "", new.created, self._worker),
            *(flags(new.first), new.first.data, int(TTL), int(new.key is not None), new.fingerprint, int(KEY_TTL)),
            *(_announcement(new), self._feed_length, keys.feed_channel, keys.run("")),
            stamp(max(0, int((new.created - INDEXED) * 1e6))),
        )
        match [_text(part) for part in answer]:
            case ["created"]:
                self._owned[new.run] = (new.epoch, 1)
                return Created(new.run, new.epoch, 1)
            case ["known", run, epoch]:
                return Created(run, epoch, None)
            case _:
                raise Conflict("this key was used for a start with another agent or input; use a new key")

    async def claim(self, run: str) -> int:
        keys = [self._keys.run(run), self._keys.owned(self._worker), self._keys.workers]
        answer = await self._writes.script(CLAIM, keys, run, self._worker, self._keys.owned(""))
        self._check(run, answer)
        return int(answer[1])

    async def append(self, run: str, fence: int, frames: Sequence[Frame], status: Status) -> None:
        keys = self._keys
        last = frames[-1]
        content = [part for frame in frames for part in (flags(frame), frame.data)]
        answer = await self._writes.script(
            APPEND,
            [*keys.log(run), keys.active, keys.owned(self._worker)],
            *(run, fence, last.epoch, frames[0].seq, status, time.time() if last.terminal else "", int(TTL)),
            keys.news(run),
            *content,
        )
        if answer[0] == b"lost":
            raise NotFound(f"Redis has lost run {run}")
        self._check(run, answer)
        self._own(run, (last.epoch, last.seq), status)

    async def rebase(
        self, run: str, fence: int, seq: int, state: bytes, status: Status, origin: Origin | None = None
    ) -> str:
        keys, epoch = self._keys, new_epoch()
        who = origin or Origin("", "", None, 0.0)
        announced = NewRun(
            run=run,
            epoch=epoch,
            agent=who.agent,
            principal=who.principal,
            thread=who.thread,
            created=who.created,
            first=Frame(run, epoch, seq, b""),
        )
        run_key, log, feed, counter = keys.log_and_feed(run)
        answer = await self._writes.script(
            REBASE,
            [
                *(run_key, log, keys.snapshot(run), *keys.indices(who.agent, who.thread)),
                *(keys.active, keys.owned(self._worker), keys.workers, feed, counter),
            ],
            *(run, fence, epoch, seq, state, status, "" if status in ACTIVE else time.time(), int(TTL)),
            *(keys.news(run), self._worker, int(origin is not None)),
            *(who.agent, who.principal, who.thread or "", who.created),
            *(_announcement(announced), self._feed_length, keys.feed_channel),
        )
        self._check(run, answer)
        self._own(run, (epoch, seq), status)
        return epoch

    async def info(self, runs: Collection[str]) -> dict[str, RunInfo]:
        wanted = list(runs)
        answers = await self._reads.calls([("HMGET", self._keys.run(run), *_INFO) for run in wanted])
        found = _infos(wanted, answers)
        if len(found) < len(wanted) and self._restoring:
            raise Unavailable("Redis has lost runs, which are being restored; try again in a moment")
        return found

    async def read(self, run: str, epoch: str, after: int) -> Page | None:
        keys = [self._keys.run(run), self._keys.run_log(run)]
        answer = await self._reads.script(READ, keys, epoch, after, PAGE_EVENTS, PAGE_BYTES, patience=READ_PATIENCE)
        if answer[0] == b"gap":
            return None
        self._check(run, answer)
        return Page(unpack(run, epoch, answer[2]), int(answer[1]))

    async def save_snapshot(self, fence: int, snapshot: Snapshot) -> None:
        answer = await self._writes.script(
            SAVE_SNAPSHOT,
            self._keys.log(snapshot.run),
            *(fence, snapshot.epoch, snapshot.seq, snapshot.state, self._log_events, self._log_bytes, int(TTL)),
        )
        if answer[0] != b"lost":  # the next append will find out, and restore it
            self._check(snapshot.run, answer)

    async def load_snapshot(self, run: str) -> Snapshot | None:
        key = self._keys.snapshot(run)
        epoch, seq, state = await self._reads.call("HMGET", key, "epoch", "seq", "state", patience=READ_PATIENCE)
        if epoch is None:
            await self._known(run)
            return None
        return Snapshot(run, epoch.decode(), int(seq), state)

    # -- News ------------------------------------------------------------------------------------------------------

    async def subscribe(self, run: str, deliver: Deliver) -> Subscription:
        followed = self._followed.get(run)
        if followed is None:
            followed = self._followed[run] = _Followed(run, heard_at=anyio.current_time())
        token = object()
        followed.delivers[token] = deliver

        def close() -> None:
            followed.delivers.pop(token, None)
            if not followed.delivers and self._followed.get(run) is followed:
                del self._followed[run]
                self._listener.unsubscribe(self._keys.news(run))

        try:
            await self._listener.subscribe(self._keys.news(run), lambda message: self._take_news(run, message))
            await self._known(run)
        except BaseException:
            close()
            raise
        return Registration(close)

    def _take_news(self, run: str, message: bytes) -> None:
        followed = self._followed.get(run)
        if followed is not None:
            item = news(run, message)
            last = item if isinstance(item, Head) else item[-1]
            followed.known, followed.heard_at, followed.missing_since = (
                (last.epoch, last.seq),
                anyio.current_time(),
                None,
            )
            followed.deliver(item)

    async def _catch_up(self) -> None:
        """After a (re)connection: news may have been missed, and Redis may be another than it was."""
        await self._check_feed()
        await self._check_heads(list(self._followed.values()))
        await self._check_owned()

    async def _recheck(self) -> None:
        now = anyio.current_time()
        quiet = [
            followed
            for followed in self._followed.values()
            if followed.missing_since is not None or now - followed.heard_at >= RECHECK
        ]
        try:
            await self._check_heads(quiet)
        except Unavailable:
            return  # the listener says so
        for announce in list(self._watchers.values()):
            announce(None)

    async def _check_heads(self, followed: Sequence[_Followed]) -> None:
        answers = await self._reads.calls([("HMGET", self._keys.run(item.run), *_INFO) for item in followed])
        now = anyio.current_time()
        for item, answer in zip(followed, answers, strict=True):
            if answer[3] is None:
                item.missing_since = item.missing_since or now
                if now - item.missing_since >= GONE_AFTER:
                    item.deliver(Gone(item.run))
                continue
            info = _info(item.run, answer)
            item.heard_at, item.missing_since = now, None
            if item.known != (info.epoch, info.head):
                item.known = (info.epoch, info.head)
                item.deliver(Head(item.run, info.epoch, info.head, ended=info.ended is not None))

    async def _check_owned(self) -> None:
        """Have the owner, in this process, verify each run of which Redis knows something else."""
        owned = dict(self._owned)
        answers = await self._reads.calls([("HMGET", self._keys.run(run), "epoch", "head") for run in owned])
        for (run, (epoch, seq)), (now_epoch, head) in zip(owned.items(), answers, strict=True):
            if (now_epoch, head) != (epoch.encode(), b"%d" % seq):
                self._commands.verify(run)

    # -- Listing, and the feed -------------------------------------------------------------------------------------

    async def list(self, filter: Filter) -> Sequence[RunInfo]:
        index, end = self._keys.index(filter), "+" if filter.before is None else f"({filter.before}"
        found: list[RunInfo] = []
        while len(found) < filter.limit:
            ids = await self._reads.call("ZREVRANGEBYLEX", index, end, "-", "LIMIT", 0, LIST_CHUNK)
            if not ids:
                break
            runs = [id.decode() for id in ids]
            answers = await self._reads.calls([("HMGET", self._keys.run(run), *_INFO) for run in runs])
            known = _infos(runs, answers)
            found += [info for info in known.values() if filter.fits(info)]
            await self._forget(index, [run for run in runs if run not in known])
            end = f"({runs[-1]}"
        return found[: filter.limit]

    async def _forget(self, index: str, runs: Sequence[str]) -> None:
        """Take runs out of an index that Redis has let go of, unless they may be restored."""
        if runs and not self._restoring:
            await self._writes.call("ZREM", index, *runs)

    async def watch_feed(self, announce: Announce) -> tuple[Subscription, str]:
        token = object()
        self._watchers[token] = announce
        position = await self._feed_end()
        self._feed_position = self._feed_position or position
        return Registration(lambda: self._watchers.pop(token, None)), position

    async def _feed_end(self) -> str:
        entries = await self._reads.call("XREVRANGE", self._keys.feed, "+", "-", "COUNT", 1)
        return _entry_position(entries[0]) if entries else "0:"

    async def read_feed(self, after: str) -> Sequence[Announcement] | None:
        number, _, run = after.partition(":")
        if not (number.isascii() and number.isdecimal()) or len(number) > 15 or number != str(int(number)):
            return None
        entries = await self._reads.call("XRANGE", self._keys.feed, f"{number}-0", "+", "COUNT", self._feed_length)
        if number == "0":
            return _announcements(entries) if run == "" and (not entries or entries[0][0] == b"1-0") else None
        if not entries or _entry_position(entries[0]) != after:
            return None
        return _announcements(entries[1:])

    def _take_announcement(self, message: bytes) -> None:
        number, _, document = message.partition(b" ")
        announcement = _announced(number.decode(), document)
        self._feed_position = announcement.position
        for token, announce in list(self._watchers.items()):
            if token in self._watchers:
                announce(announcement)

    async def _check_feed(self) -> None:
        if self._feed_position is None:
            return
        if await self.read_feed(self._feed_position) is None:
            logger.warning("Redis has lost what it held, or the newest of it; runs are restored by their owners")
            self._restoring_until = anyio.current_time() + RESTORING
        self._feed_position = await self._feed_end()
        for announce in list(self._watchers.values()):
            announce(None)

    # -- Commands, workers, health ---------------------------------------------------------------------------------

    async def send_command(self, run: str, command: Mapping[str, Any]) -> None:
        owner = await self._reads.call("HGET", self._keys.run(run), "owner")
        if owner is None:
            await self._known(run)
        await self._commands.send((owner or b"").decode(), run, command)

    async def handle_commands(self, handler: CommandHandler) -> Subscription:
        return await self._commands.register(handler)

    async def orphans(self, mine: Collection[str]) -> Sequence[str]:
        return await self._workers.orphans(mine, self.degraded)

    async def check(self) -> None:
        await self._listener.probe()
        if self._workers.problem is not None:  # Redis may deliver, and yet take no writes
            raise Unavailable(self._workers.problem)

    async def aclose(self) -> None:
        """Nothing is left: `run` has let go of the connections when it ends."""

    # -- Inside ----------------------------------------------------------------------------------------------------

    @property
    def _restoring(self) -> bool:
        """Whether what Redis does not have may be restored: it has lost some, or has not yet been asked whether."""
        return self._listener.problem is not None or anyio.current_time() < self._restoring_until

    async def _publish(self, channel: str, message: bytes) -> int:
        receivers: int = await self._writes.call("PUBLISH", channel, message)
        return receivers

    def _own(self, run: str, position: Position, status: Status) -> None:
        if status in ACTIVE:
            self._owned[run] = position
        else:
            self._owned.pop(run, None)

    async def _known(self, run: str) -> None:
        """:raises NotFound: Redis does not have the run."""
        if run not in await self.info([run]):
            raise NotFound(f"there is no run {run[:64]!r}")

    def _check(self, run: str, answer: Sequence[Any]) -> None:
        """Raise what a script's answer means."""
        match answer[0]:
            case b"lost":
                if self._restoring:
                    raise Unavailable("Redis has lost runs, which are being restored; try again in a moment")
                raise NotFound(f"there is no run {run[:64]!r}")
            case b"fenced":
                self._owned.pop(run, None)
                raise Fenced(run)
            case b"ended":
                self._owned.pop(run, None)
                raise Ended(run)
            case b"mismatch":
                raise HeadMismatch(run, answer[1].decode(), int(answer[2]))
            case _:
                return


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _infos(runs: Sequence[str], answers: Sequence[Any]) -> dict[str, RunInfo]:
    """What is known of each run, unknown ones left out."""
    return {run: _info(run, answer) for run, answer in zip(runs, answers, strict=True) if answer[3] is not None}


def _info(run: str, answer: Sequence[bytes | None]) -> RunInfo:
    agent, principal, thread, epoch, head, status, created, ended = (value and value.decode() for value in answer)
    return RunInfo(
        run=run,
        agent=agent or "",
        principal=principal or "",
        thread=thread or None,
        epoch=epoch or "",
        head=int(head or 0),
        status=status,  # type: ignore[arg-type]  # only `append` and `rebase` write it
        created=float(created or 0.0),
        ended=None if ended is None else float(ended),
    )


def _announcement(new: NewRun) -> bytes:
    return orjson.dumps([new.run, new.epoch, new.agent, new.thread, new.principal])


def _announced(number: str, document: bytes) -> Announcement:
    run, epoch, agent, thread, principal = orjson.loads(document)
    return Announcement(f"{number}:{run}", run, epoch, agent, thread, principal)


def _announcements(entries: Sequence[Any]) -> list[Announcement]:
    return [_announced(id.decode().partition("-")[0], fields[3]) for id, fields in entries]


def _entry_position(entry: Any) -> str:
    id, fields = entry
    return f"{id.decode().partition('-')[0]}:{fields[1].decode()}"
