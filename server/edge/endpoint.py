"""One client's end: the only place where its socket, outbox and session meet (G4).

What is sent goes to the socket at once while it takes more, and waits in the outbox otherwise. Commands, and pulling
for followers that are behind, run in tasks that live only as long as they take.

What breaks on behalf of one connection, in its tasks, in the ticker, in a callback of the loop or in the hub, ends that
connection with 1011 and nothing else.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from enum import Enum, auto
from time import monotonic
from typing import Protocol, TypeVarTuple

import anyio
from anyio.abc import TaskGroup

from agentcast import __version__
from agentcast.server import protocol
from agentcast.server.config import Settings
from agentcast.server.edge.costs import Costs
from agentcast.server.edge.frame_socket import CLOSE_TIMEOUT, FrameWriter
from agentcast.server.edge.session import ANONYMOUS, Session
from agentcast.server.errors import BINARY_MESSAGE, INTERNAL_ERROR, SHUTTING_DOWN, CloseReason
from agentcast.server.hub.frames import Batch
from agentcast.server.hub.hub import Hub
from agentcast.server.hub.outbox import Outbox
from agentcast.server.runs.runs import Runs

COMMANDS_SIZE = 512 * 1024
"""Characters of commands in progress past which no more are read: a client that waits for its turn sends no further."""
DEGRADED_EVERY = 5.0
"""Seconds between two pings that say that the bus is away."""

logger = logging.getLogger(__name__)

Args = TypeVarTuple("Args")


class Phase(Enum):
    OPEN = auto()
    LEAVING = auto()
    """It is to close, after what is queued. Nothing of the client is read any more."""
    CLOSED = auto()


_AFTER = {
    Phase.OPEN: (Phase.LEAVING, Phase.CLOSED),
    Phase.LEAVING: (Phase.CLOSED,),
    Phase.CLOSED: (),
}


class Flushing(Protocol):
    """What flushes connections at the end of the loop's turn."""

    def add(self, connection: "Connection") -> None: ...


class Process(Protocol):
    """What all connections of the process share: see `Connections`."""

    hub: Hub
    runs: Runs
    settings: Settings
    costs: Costs

    @property
    def flusher(self) -> Flushing: ...

    @property
    def tasks(self) -> TaskGroup: ...

    def discard(self, connection: "Connection") -> None: ...


class Connection:
    """One client: the `Receiver` of its socket and the `Link` of its outbox."""

    __slots__ = (
        "_commands",
        "_commands_size",
        "_deadline",
        "_degraded_sent_at",
        "_outbox",
        "_phase",
        "_process",
        "_pulling",
        "_reason",
        "_scopes",
        "_sent",
        "_sent_at",
        "_session",
        "_taken",
        "_taken_at",
        "_ticked_at",
        "_woken",
        "_writer",
    )

    _writer: FrameWriter

    def __init__(self, process: Process) -> None:
        self._process = process
        self._outbox = Outbox(self)
        self._session = Session(secrets.token_hex(8), ANONYMOUS, process.hub, process.runs, self._outbox, process.costs)
        self._phase = Phase.OPEN
        self._reason: CloseReason | None = None
        self._woken = True  # until there is a socket, nothing can be flushed
        self._commands = 0
        """Commands in progress."""
        self._commands_size = 0
        """Of their texts."""
        self._pulling = False
        self._scopes: set[anyio.CancelScope] | None = None
        """Of the tasks that work for this connection."""
        self._deadline: asyncio.TimerHandle | None = None
        self._sent_at = self._taken_at = self._ticked_at = monotonic()
        self._sent = self._taken = 0
        """Bytes, at the last tick."""
        self._degraded_sent_at: float | None = None

    def open(self, writer: FrameWriter) -> None:
        """Greet the client that is at the other end of `writer`."""
        self._writer = writer
        self._outbox.put(protocol.hello(self._session.id, f"agentcast/{__version__}", self._process.settings.heartbeat))
        self.flush()

    # -- Writing ---------------------------------------------------------------------------------------------------

    def write(self, batch: Batch) -> bool:
        """Write to the socket, if it takes more. The hot path: uvloop gathers what is written in one turn of the loop
        into one system call."""
        writer = self._writer
        if writable := writer.writable:
            writer.write(batch)
        return writable

    def wake(self) -> None:
        """Something was queued."""
        if not self._woken:
            self._woken = True
            self._process.flusher.add(self)

    def flush(self) -> None:
        """Write what is queued, as far as the socket takes it."""
        self._woken = False
        writer, outbox = self._writer, self._outbox
        try:
            while writer.writable and outbox:
                for batch in outbox.take():
                    writer.write(batch)
        except Exception as error:  # noqa: BLE001 -- `fail` logs it; frames were lost, so none may follow
            self.fail(error)
        if writer.held:
            self._pace()
        if self._phase is Phase.LEAVING:
            self._say_goodbye()

    on_writable = flush

    def pull(self) -> None:
        """A follower is behind, and there is room."""
        if not self._pulling and self._phase is not Phase.CLOSED:
            self._pulling = True
            self._spawn(self._catch_up)

    async def _catch_up(self) -> None:
        try:
            await self._process.hub.catch_up(self._outbox)
        finally:
            self._pulling = False
        if self._outbox.is_behind and not self._outbox.full:
            self.pull()
        if self._phase is Phase.LEAVING:
            self._say_goodbye()

    # -- Reading ---------------------------------------------------------------------------------------------------

    def on_text(self, text: str) -> None:
        if self._phase is Phase.OPEN:
            self._commands += 1
            self._commands_size += len(text)
            self._pace()
            self._spawn(self._handle, text)

    def on_binary(self) -> None:
        self.leave(BINARY_MESSAGE)

    async def _handle(self, text: str) -> None:
        try:
            reason = await self._session.handle(text)
        finally:
            self._commands -= 1
            self._commands_size -= len(text)
            self._pace()
        if reason is not None:
            self.leave(reason)

    def _pace(self) -> None:
        """Read on only while there is room for the replies, and the commands that were read have had their turn."""
        busy = self._commands >= protocol.MAX_COMMANDS or self._commands_size >= COMMANDS_SIZE
        self._writer.hold(busy or self._outbox.full)

    def _spawn(self, work: Callable[[*Args], Awaitable[None]], *args: *Args) -> None:
        self._process.tasks.start_soon(self._guarded, work, *args)

    async def _guarded(self, work: Callable[[*Args], Awaitable[None]], *args: *Args) -> None:
        """Work in a task, for as long as the connection lasts."""
        if self._scopes is None:
            self._scopes = set()
        with anyio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                await work(*args)
            except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001 -- `fail` logs it
                self.fail(error)
            finally:
                self._scopes.discard(scope)

    # -- Every second ----------------------------------------------------------------------------------------------

    def tick(self, now: float, degraded: str | None = None) -> None:
        """Once a second: send the feed's position, keep the connection alive, cut it if the client takes nothing."""
        settings = self._process.settings
        self._outbox.put_notices()
        self._send_degraded(now, degraded)
        taken, pending = self._writer.taken, self._writer.pending
        if taken + pending != self._sent:
            self._sent, self._sent_at = taken + pending, self._ticked_at  # at the earliest
        if not self._outbox and now - self._sent_at >= settings.heartbeat:
            self._outbox.put(protocol.PING)
        if taken != self._taken or not (self._outbox or pending):
            self._taken, self._taken_at = taken, now
        elif now - self._taken_at >= settings.slow_client:
            logger.warning("session %s took nothing for %.0f s: cut", self._session.id, now - self._taken_at)
            self._writer.abort()
        self._ticked_at = now

    def _send_degraded(self, now: float, degraded: str | None) -> None:
        """Say at once, and now and then, that the bus is away; and at once that it is back."""
        if degraded is None and self._degraded_sent_at is not None:
            self._degraded_sent_at = None
            self._outbox.put(protocol.PING)
        elif degraded is not None and now - (self._degraded_sent_at or 0.0) >= DEGRADED_EVERY:
            self._degraded_sent_at = now
            self._outbox.put(protocol.degraded_ping(degraded))

    # -- Closing ---------------------------------------------------------------------------------------------------

    def leave(self, reason: CloseReason) -> None:
        """Close the connection, after what is queued; on a shutdown, which has ended all runs, after what is still to
        be pulled as well. The client gets `CLOSE_TIMEOUT` seconds for that."""
        if self._phase is Phase.OPEN:
            self._enter(Phase.LEAVING)
            self._reason = reason
            loop = asyncio.get_running_loop()
            loop.call_soon(self._stop_following)  # not now: the hub may be in the midst of its followers
            self._deadline = loop.call_later(CLOSE_TIMEOUT, self._give_up)

    def cut(self, reason: CloseReason) -> None:
        """The connection is past saving: close it, after what is queued."""
        self.leave(reason)

    def fail(self, error: BaseException) -> None:
        """Something of this connection broke: log it, and close the connection without sending what is queued."""
        if self._phase is not Phase.CLOSED:
            logger.error("session %s is closed: something of it broke", self._session.id, exc_info=error)
            self._enter(Phase.CLOSED)
            self._writer.close(INTERNAL_ERROR.code, INTERNAL_ERROR.reason)
            self._end_soon()

    def on_closed(self) -> None:
        if self._phase is not Phase.CLOSED:
            self._enter(Phase.CLOSED)
            self._end_soon()

    def _stop_following(self) -> None:
        if self._reason is not SHUTTING_DOWN:
            self._process.hub.disconnect(self._outbox)
        self.flush()

    def _say_goodbye(self) -> None:
        """Close the connection if nothing is left to be sent."""
        if not self._outbox and not self._outbox.is_behind and self._reason is not None:
            self._enter(Phase.CLOSED)
            self._writer.close(self._reason.code, self._reason.reason)
            self._end_soon()

    def _give_up(self) -> None:
        self._writer.abort()
        self.on_closed()

    def _end_soon(self) -> None:
        """Not now: the hub may be in the midst of its followers, and a command that came before the close, such as a
        start, is to begin."""
        asyncio.get_running_loop().call_soon(self._end)

    def _end(self) -> None:
        """Nothing more is to be done for the client: leave nothing behind."""
        if self._deadline is not None:
            self._deadline.cancel()
        for scope in list(self._scopes or ()):
            scope.cancel()
        self._process.hub.disconnect(self._outbox)
        self._process.discard(self)

    def _enter(self, phase: Phase) -> None:
        if phase not in _AFTER[self._phase]:
            raise RuntimeError(f"a connection that is {self._phase.name} cannot become {phase.name}")
        self._phase = phase
