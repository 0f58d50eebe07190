"""The WebSocket endpoint: the only place where a client's socket, outbox and session meet (G4).

Each connection costs one task, its reader. Writing needs none: what is queued in one turn of the loop goes out in one
write at the end of it, and goes on when the transport has room again. Pulling for followers that are behind happens
in a task that lives only while there are any. One ticker serves the heartbeats, feed positions and slow clients of all
connections.

What breaks on behalf of one connection, in its tasks, in the ticker, in a callback of the loop or in the hub, ends that
connection with 1011 and nothing else.
"""

import asyncio
import contextvars
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import monotonic
from typing import TypeVarTuple

import anyio
from anyio.abc import TaskGroup
from starlette.websockets import WebSocket, WebSocketDisconnect

from agentcast import __version__
from agentcast.server import protocol
from agentcast.server.config import Settings
from agentcast.server.edge.session import ANONYMOUS, Session
from agentcast.server.edge.websocket import EXTENSION, FrameWriter
from agentcast.server.errors import BINARY_MESSAGE, INTERNAL_ERROR, SHUTTING_DOWN, CloseReason
from agentcast.server.hub.hub import Hub
from agentcast.server.hub.outbox import Outbox
from agentcast.server.runs.runs import Runs

TICK = 1.0
CLOSE_TIMEOUT = 2.0
DEGRADED_EVERY = 5.0
"""Seconds between two pings that say that the bus is away."""

logger = logging.getLogger(__name__)

Args = TypeVarTuple("Args")


class Connections:
    """The open connections of this process."""

    def __init__(
        self, hub: Hub, runs: Runs, settings: Settings, degraded: Callable[[], str | None] = lambda: None
    ) -> None:
        """`degraded` says why the bus does not work at the moment, if so."""
        self._degraded = degraded
        self.hub = hub
        self.runs = runs
        self.settings = settings
        self._open: set[Connection] = set()
        self._closing = False
        self._gone = anyio.Event()

    def __len__(self) -> int:
        return len(self._open)

    async def endpoint(self, websocket: WebSocket) -> None:
        """`GET /ws`."""
        writer = websocket.scope["extensions"].get(EXTENSION)
        if writer is None:
            logger.error("this server cannot write frames; start it with `agentcast serve` (or see edge/websocket.py)")
            await websocket.close(INTERNAL_ERROR.code)
            return
        offered = websocket.scope["subprotocols"]
        await websocket.accept(protocol.SUBPROTOCOL if protocol.SUBPROTOCOL in offered else None)
        connection = Connection(websocket, writer, self.hub, self.runs, self.settings)
        self._open.add(connection)
        try:
            await connection.serve(SHUTTING_DOWN if self._closing else None)
        finally:
            self._open.discard(connection)
            self._gone.set()

    async def tick(self) -> None:
        """Call `tick` of every connection once a second, until cancelled."""
        while True:
            await anyio.sleep(TICK)
            now, degraded = monotonic(), self._degraded()
            self.hub.wake()  # a read of the feed lets connections forget runs that have ended
            for connection in list(self._open):
                try:
                    connection.tick(now, degraded)
                except Exception as error:  # noqa: BLE001 -- the connection logs it
                    connection.fail(error)

    async def close(self) -> None:
        """Close all connections, and those still to come, as `shutting_down`. Returns once all have been told."""
        self._closing = True
        for connection in list(self._open):
            connection.close(SHUTTING_DOWN)
        with anyio.move_on_after(CLOSE_TIMEOUT + 0.5):
            while self._open:
                self._gone = anyio.Event()
                await self._gone.wait()


class Connection:
    """One client."""

    def __init__(self, websocket: WebSocket, writer: FrameWriter, hub: Hub, runs: Runs, settings: Settings) -> None:
        self._websocket = websocket
        self._writer = writer
        self._hub = hub
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox(self)
        self._session = Session(secrets.token_hex(8), ANONYMOUS, hub, runs, self._outbox)
        self._commands = anyio.Semaphore(protocol.MAX_COMMANDS)
        self._room = anyio.Event()
        self._reading_paused = False
        self._reading = anyio.CancelScope()
        self._moved: anyio.Event | None = None
        """Set, while the goodbye waits for it, when frames were written or pulled."""
        self._flush_scheduled = False
        self._pulling = False
        self._sent_at = monotonic()
        self._degraded_told_at: float | None = None
        self._taken = 0
        self._taken_at = monotonic()
        self._tasks: TaskGroup | None = None
        self._reason: CloseReason | None = None
        # The transport calls back outside of any task, where anyio does not know its backend.
        context = contextvars.copy_context()
        writer.on_writable = lambda: context.run(self._flush)

    async def serve(self, reason: CloseReason | None) -> None:
        """Serve the client until it goes; with a reason, only say goodbye."""
        self._outbox.put(protocol.hello(self._session.id, f"agentcast/{__version__}", self._settings.heartbeat))
        if reason is not None:
            self.close(reason)
        try:
            async with anyio.create_task_group() as self._tasks:
                with self._reading:
                    await self._guarded(self._read, self._tasks)
                if self._reason is not None:
                    await self._say_goodbye()
                self._tasks.cancel_scope.cancel()
        finally:
            self._hub.disconnect(self._outbox)
            self._writer.on_writable = _nothing

    def close(self, reason: CloseReason) -> None:
        """Close the connection, after what is queued."""
        if self._reason is None:
            self._reason = reason
            self._reading.cancel()

    def cut(self, reason: CloseReason) -> None:
        """The connection cannot go on."""
        self.close(reason)

    def fail(self, error: Exception) -> None:
        """Something of this connection broke: log it, and close the connection without sending what is queued."""
        if self._reason is INTERNAL_ERROR:
            return
        logger.error("session %s is closed: something of it broke", self._session.id, exc_info=error)
        self._reason = INTERNAL_ERROR
        self._reading.cancel()
        if self._moved is not None:
            self._moved.set()

    async def _guarded(self, work: Callable[[*Args], Awaitable[None]], *args: *Args) -> None:
        try:
            await work(*args)
        except Exception as error:  # noqa: BLE001 -- `fail` logs it
            self.fail(error)

    def tick(self, now: float, degraded: str | None = None) -> None:
        """Once a second: tell the feed's position, keep the connection alive, cut it if the client takes nothing."""
        self._outbox.put_notices()
        self._tell_degraded(now, degraded)
        if not self._outbox and now - self._sent_at >= self._settings.heartbeat:
            self._outbox.put(protocol.PING)
        taken = self._writer.taken
        if taken != self._taken or not (self._outbox or self._writer.pending):
            self._taken, self._taken_at = taken, now
        elif now - self._taken_at >= self._settings.slow_client:
            logger.warning("session %s took nothing for %.0f s: cut", self._session.id, now - self._taken_at)
            self._writer.abort()

    def _tell_degraded(self, now: float, degraded: str | None) -> None:
        """Say at once, and now and then, that the bus is away; and at once that it is back."""
        if degraded is None and self._degraded_told_at is not None:
            self._degraded_told_at = None
            self._outbox.put(protocol.PING)
        elif degraded is not None and now - (self._degraded_told_at or 0.0) >= DEGRADED_EVERY:
            self._degraded_told_at = now
            self._outbox.put(protocol.degraded_ping(degraded))

    # -- Reading ---------------------------------------------------------------------------------------------------

    async def _read(self, tasks: TaskGroup) -> None:
        """Take messages while there is room for their replies; past that the socket is not read."""
        while True:
            while self._outbox.full and not self._writer.closed:
                self._room = anyio.Event()
                self._reading_paused = True
                await self._room.wait()
                self._reading_paused = False
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            if text is None:
                self._reason = BINARY_MESSAGE
                return
            await self._commands.acquire()
            tasks.start_soon(self._guarded, self._handle, text)

    async def _handle(self, text: str) -> None:
        try:
            reason = await self._session.handle(text)
        finally:
            self._commands.release()
        if reason is not None:
            self.close(reason)

    # -- Writing ---------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        try:
            while self._outbox and self._writer.writable and self._reason is not INTERNAL_ERROR:
                self._writer.write(self._outbox.take())
                self._sent_at = monotonic()
        except Exception as error:  # noqa: BLE001 -- `fail` logs it; frames were lost, so none may follow
            self.fail(error)
        if self._reading_paused and (self._writer.closed or not self._outbox.full):
            self._room.set()
        if self._moved is not None:
            self._moved.set()

    def pull(self) -> None:
        if not self._pulling and self._tasks is not None:
            self._tasks.start_soon(self._guarded, self._catch_up)
            self._pulling = True

    async def _catch_up(self) -> None:
        try:
            await self._hub.catch_up(self._outbox)
        finally:
            self._pulling = False
            if self._moved is not None:
                self._moved.set()
        if self._outbox.is_behind and not self._outbox.full:
            self.pull()

    async def _say_goodbye(self) -> None:
        """Close, after what is queued; on a shutdown, which has ended all runs, after what was still to be pulled."""
        if self._reason is not SHUTTING_DOWN:
            self._hub.disconnect(self._outbox)
        with anyio.move_on_after(CLOSE_TIMEOUT):
            self._flush()
            while self._has_more:
                self._moved = anyio.Event()
                await self._moved.wait()
            if self._reason is not None:
                with suppress(WebSocketDisconnect):  # the client was faster
                    await self._websocket.close(self._reason.code, self._reason.reason)
            return
        self._writer.abort()

    @property
    def _has_more(self) -> bool:
        """Whether something is to be sent before the connection closes, and can be."""
        if self._reason is INTERNAL_ERROR or self._writer.closed:
            return False
        return bool(self._outbox) or self._outbox.is_behind


def _nothing() -> None:
    pass
