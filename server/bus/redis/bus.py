"""The bus of several hub processes over one Redis primary (6.2 or newer, or Valkey; no cluster).

Every write is one script, so it happens wholly or not at all, and may be repeated. After each reconnect `heads` and
`feed` find out what was missed (G2). The owners of runs are asked to verify them then, and restore what Redis has lost
if it came back empty, or older than it was.

Calls use three connections, so that none waits for unrelated ones: control (heartbeat, probe, claims, commands), which
carries nothing large; appends; and reads, which share theirs with summaries and, in pieces, the states of runs.
"""

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import anyio
from anyio.abc import TaskStatus

from agentcast.server.bus.base import (
    ACTIVE,
    FEED_LENGTH,
    KEY_TTL,
    LOG_BYTES,
    LOG_EVENTS,
    TTL,
    Announce,
    Announcement,
    CommandHandler,
    Created,
    Deliver,
    DeliverSummaries,
    Ends,
    Filter,
    Frame,
    Listing,
    NewRun,
    Opened,
    Origin,
    Page,
    RunInfo,
    Snapshot,
    Status,
    Subscription,
    Summary,
    check_append,
    check_summaries,
    new_epoch,
    stamp,
)
from agentcast.server.bus.redis import scripts
from agentcast.server.bus.redis.codec import announcement, flags
from agentcast.server.bus.redis.commands import Commands
from agentcast.server.bus.redis.feed import Feed
from agentcast.server.bus.redis.heads import HeadTracker, Position
from agentcast.server.bus.redis.keys import Keys
from agentcast.server.bus.redis.listener import Listener
from agentcast.server.bus.redis.pieces import Pieces
from agentcast.server.bus.redis.pipelined import PipelinedConnection, Script, connections
from agentcast.server.bus.redis.queries import Queries
from agentcast.server.bus.redis.summaries import Summaries
from agentcast.server.bus.redis.workers import Workers
from agentcast.server.errors import Conflict, Ended, Fenced, HeadMismatch, NotFound, Unavailable

RECHECK_TICK = 5.0
RESTORING = 5.0
"""Seconds that owners get to restore their runs in a Redis that has lost some; until then no run counts as unknown."""
INDEXED = 3 * 24 * 3600.0
"""Seconds that a run's id stays in the indices; none lives that much longer than its creation."""

CREATE, CLAIM, APPEND, REBASE, SAVE_SNAPSHOT = map(
    Script,
    (scripts.CREATE, scripts.CLAIM, scripts.APPEND, scripts.REBASE, scripts.SAVE_SNAPSHOT),
)
logger = logging.getLogger(__name__)


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
        self._control = PipelinedConnection(connect())
        self._appends = PipelinedConnection(connect())
        self._reads = PipelinedConnection(reads)
        self._keys = keys = Keys(prefix, reads.db)
        self._pieces = Pieces(self._reads, keys)
        self._feed = Feed(self._reads, keys, feed_length)
        self._commands = Commands(self._publish, keys, worker)
        receivers = {keys.commands(worker): self._commands.take, keys.feed_channel: self._feed.take}
        self._listener = Listener(connect, self._publish, keys.probe(worker), receivers, self._catch_up)
        self._heads = HeadTracker(self._listener, self._reads, keys)
        self._summaries = Summaries(self._listener, self._reads, keys)
        self._queries = Queries(self._reads, keys, lambda: self._restoring)
        self._workers = Workers(self._control, keys, worker)
        self._owned: dict[str, Position] = {}
        self._restoring_until = 0.0
        self._losses = 0
        self._verified = 0

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        async with anyio.create_task_group() as tasks:
            parts = (self._control, self._appends, self._reads)
            for part in (*parts, self._commands, self._listener, self._workers):
                tasks.start_soon(part.run)
            await self._listener.connected.wait()
            task_status.started()
            while True:
                await anyio.sleep(RECHECK_TICK)
                with suppress(Unavailable):  # the listener reports it
                    await self._heads.compare_quiet()
                    self._feed.hint()

    @property
    def degraded(self) -> str | None:
        return self._listener.problem or self._workers.problem

    @property
    def counters(self) -> Mapping[str, int]:
        return {
            "connections_lost": self._listener.attempts,
            "probes": self._listener.probes,
            "probes_lost": self._listener.probes_lost,
            "resubscribed": self._listener.resubscribed,
            "heads_compared": self._heads.compared,
            "heads_missed": self._heads.missed,
            "losses": self._losses,
            "verified": self._verified,
        }

    # -- Logs ------------------------------------------------------------------------------------------------------

    async def create(self, new: NewRun) -> Created:
        keys = self._keys
        answer = await self._appends.script(
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
            *(announcement(new), self._feed.entries, keys.feed_channel, keys.run("")),
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
        answer = await self._control.script(CLAIM, keys, run, self._worker, self._keys.owned(""))
        self._check(run, answer)
        return int(answer[1])

    async def append(self, run: str, fence: int, frames: Sequence[Frame], status: Status) -> None:
        check_append(frames)
        keys = self._keys
        last = frames[-1]
        content = [part for frame in frames for part in (flags(frame), frame.data)]
        answer = await self._appends.script(
            APPEND,
            [*keys.log(run), keys.active, keys.owned(self._worker)],
            *(run, fence, last.epoch, frames[0].seq, status, time.time() if last.terminal else "", int(TTL)),
            keys.updates(run),
            *content,
        )
        if answer[0] == b"lost":
            raise NotFound(f"Redis has lost run {run}")
        self._check(run, answer)
        self._note_owned(run, (last.epoch, last.seq), status)

    async def rebase(
        self, run: str, fence: int, seq: int, state: bytes, status: Status, origin: Origin | None = None
    ) -> str:
        keys, epoch = self._keys, new_epoch()
        source = origin or Origin("", "", None, 0.0)
        announced = NewRun(
            run=run,
            epoch=epoch,
            agent=source.agent,
            principal=source.principal,
            thread=source.thread,
            created=source.created,
            first=Frame(run, epoch, seq, b""),
        )
        run_key, log, feed, counter = keys.log_and_feed(run)
        staged, piece, pieces = await self._pieces.stage(run, fence, epoch, seq, state)
        answer = await self._appends.script(
            REBASE,
            [
                *(run_key, log, keys.snapshot(run), *keys.indices(source.agent, source.thread)),
                *(keys.active, keys.owned(self._worker), keys.workers, feed, counter, staged),
            ],
            *(run, fence, epoch, seq, piece, status, "" if status in ACTIVE else time.time(), int(TTL)),
            *(keys.updates(run), self._worker, int(origin is not None)),
            *(source.agent, source.principal, source.thread or "", source.created),
            *(announcement(announced), self._feed.entries, keys.feed_channel, pieces),
        )
        self._check(run, answer)
        self._note_owned(run, (epoch, seq), status)
        return epoch

    async def info(self, runs: Collection[str]) -> dict[str, RunInfo]:
        found = await self._queries.infos(list(runs))
        self._check_known(runs, found)
        return found

    async def read(self, run: str, epoch: str, after: int) -> Page | None:
        answer = await self._queries.log(run, epoch, after)
        if isinstance(answer, list):
            self._check(run, answer)
            return None  # it answered that the log has a gap there
        return answer

    async def save_snapshot(self, fence: int, snapshot: Snapshot) -> None:
        run, epoch, seq = snapshot.run, snapshot.epoch, snapshot.seq
        staged, piece, pieces = await self._pieces.stage(run, fence, epoch, seq, snapshot.state)
        answer = await self._reads.script(
            SAVE_SNAPSHOT,
            [*self._keys.log(run), staged],
            *(fence, epoch, seq, piece, self._log_events, self._log_bytes, int(TTL), pieces),
        )
        if answer[0] != b"lost":  # the next append notices, and restores it
            self._check(run, answer)

    async def load_snapshot(self, run: str) -> Snapshot | None:
        snapshot = await self._pieces.load(run)
        if snapshot is None:
            await self._known(run)
        return snapshot

    async def read_ends(self, runs: Collection[str]) -> dict[str, Ends]:
        found = await self._queries.ends(list(runs))
        self._check_known(runs, found)
        return found

    # -- Updates ---------------------------------------------------------------------------------------------------

    async def open(self, deliver: Mapping[str, Deliver]) -> dict[str, Opened]:
        subscriptions = await self._heads.subscribe(deliver)
        unused = dict(subscriptions)
        try:
            infos = await self.info(deliver)
            return {run: Opened(info, unused.pop(run)) for run, info in infos.items()}
        finally:
            for subscription in unused.values():
                subscription.close()

    async def publish_summaries(self, records: Sequence[Summary]) -> None:
        check_summaries(records)
        await self._summaries.publish(records)

    async def watch_summaries(self, deliver: DeliverSummaries) -> Subscription:
        return await self._summaries.watch(deliver)

    async def summaries(self, runs: Collection[str]) -> dict[str, Summary]:
        return await self._summaries.read(runs)

    async def watch_feed(self, announce: Announce) -> tuple[Subscription, str]:
        return await self._feed.watch(announce)

    async def read_feed(self, after: str) -> Sequence[Announcement] | None:
        return await self._feed.read(after)

    async def _catch_up(self) -> None:
        """After a (re)connection: updates may have been missed, and Redis may have lost data."""
        if not await self._feed.catch_up():
            logger.warning("Redis has lost what it held, or the newest of it; runs are restored by their owners")
            self._losses += 1
            self._restoring_until = anyio.current_time() + RESTORING
        self._summaries.report_gap()
        await self._heads.compare_all()
        await self._check_owned()

    async def _check_owned(self) -> None:
        """Have the owner, in this process, verify each run whose head differs in Redis."""
        owned = dict(self._owned)
        answers = await self._reads.calls([("HMGET", self._keys.run(run), "epoch", "head") for run in owned])
        for (run, (epoch, seq)), (now_epoch, head) in zip(owned.items(), answers, strict=True):
            if (now_epoch, head) != (epoch.encode(), b"%d" % seq):
                self._verified += 1
                self._commands.verify(run)

    # -- Listing ----------------------------------------------------------------------------------------------------

    async def list(self, filter: Filter) -> Listing:
        return await self._queries.page(filter)

    # -- Commands, workers, health ---------------------------------------------------------------------------------

    async def send_command(self, run: str, command: Mapping[str, Any]) -> None:
        owner = await self._control.call("HGET", self._keys.run(run), "owner")
        if owner is None:
            await self._known(run)
        await self._commands.send((owner or b"").decode(), run, command)

    async def handle_commands(self, handler: CommandHandler) -> Subscription:
        return await self._commands.register(handler)

    async def orphans(self, mine: Collection[str]) -> Sequence[str]:
        return await self._workers.orphans(mine, self.degraded)

    async def fenced(self, fences: Mapping[str, int]) -> Collection[str]:
        return await self._workers.fenced(fences)

    async def check(self) -> None:
        await self._listener.probe()
        if self._workers.problem is not None:  # Redis may deliver, and yet refuse writes
            raise Unavailable(self._workers.problem)

    async def aclose(self) -> None:
        """Does nothing: `run` closes the connections when it ends."""

    # -- Inside ----------------------------------------------------------------------------------------------------

    @property
    def _restoring(self) -> bool:
        """Whether a run that Redis does not have may be restored: Redis has lost some, or that is not known yet."""
        return self._listener.problem is not None or anyio.current_time() < self._restoring_until

    async def _publish(self, channel: str, message: bytes) -> int:
        receivers: int = await self._control.call("PUBLISH", channel, message)
        return receivers

    def _note_owned(self, run: str, position: Position, status: Status) -> None:
        if status in ACTIVE:
            self._owned[run] = position
        else:
            self._owned.pop(run, None)

    def _check_known(self, runs: Collection[str], found: Collection[str]) -> None:
        """:raises Unavailable: runs are missing that may be restored."""
        if self._restoring and any(run not in found for run in runs):
            raise Unavailable("Redis has lost runs, which are being restored; try again in a moment")

    async def _known(self, run: str) -> None:
        """:raises NotFound: Redis does not have the run."""
        if run not in await self.info([run]):
            raise NotFound(f"there is no run {run[:64]!r}")

    def _check(self, run: str, answer: Sequence[Any]) -> None:
        """Raise the error that a script's answer stands for."""
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
            case b"incomplete":
                raise Unavailable("Redis has lost a part of the state; try again")
            case b"mismatch":
                raise HeadMismatch(run, answer[1].decode(), int(answer[2]))
            case _:
                return


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
