"""The open connections of this process: `GET /ws`, the tasks that work for them, and the turns in which they write.

An idle connection has no task. Commands and catching up run in one task group for all; one ticker serves the
heartbeats, feed positions and slow clients of all connections.
"""

import asyncio
import logging
from collections.abc import Callable
from time import monotonic

import anyio
from anyio.abc import TaskGroup, TaskStatus
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from agentcast.server import protocol
from agentcast.server.config import Settings
from agentcast.server.edge.admission import BUSY, BUSY_HEADERS, Admission
from agentcast.server.edge.asgi_socket import AsgiSocket
from agentcast.server.edge.costs import Costs
from agentcast.server.edge.endpoint import Connection
from agentcast.server.edge.frame_socket import CLOSE_TIMEOUT, FrameWriter
from agentcast.server.edge.websocket import EXTENSION, HandOver
from agentcast.server.errors import SHUTTING_DOWN
from agentcast.server.hub.hub import Hub
from agentcast.server.runs.runs import Runs

TICK = 1.0

logger = logging.getLogger(__name__)


class Connections:
    """The open connections of this process."""

    def __init__(
        self,
        hub: Hub,
        runs: Runs,
        settings: Settings,
        admission: Admission,
        costs: Costs,
        degraded: Callable[[], str | None] = lambda: None,
    ) -> None:
        """`degraded` says why the bus does not work at the moment, if so."""
        self.hub = hub
        self.runs = runs
        self.settings = settings
        self.costs = costs
        self.flusher = Flusher()
        self._admission = admission
        self._degraded = degraded
        self._open: set[Connection] = set()
        self._tasks: TaskGroup | None = None
        self._closing = False
        self._gone = anyio.Event()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def tasks(self) -> TaskGroup:
        """Where commands run, for whichever connection."""
        if self._tasks is None:
            raise RuntimeError("`serve` is not running")
        return self._tasks

    async def serve(self, *, task_status: TaskStatus[None]) -> None:
        """Work for the connections until cancelled."""
        async with anyio.create_task_group() as self._tasks:
            task_status.started()
            await self._tick()

    async def endpoint(self, websocket: WebSocket) -> None:
        """`GET /ws`. Returns at once where the server hands its socket over."""
        hand_over: HandOver | None = websocket.scope.get("extensions", {}).get(EXTENSION)
        if hand_over is None:
            await self._serve_plainly(websocket)
        elif (connection := await self._accept(websocket)) is not None:
            self._greet(connection, hand_over(connection))

    async def _serve_plainly(self, websocket: WebSocket) -> None:
        """A connection of a server that knows ASGI only. It has not counted it, and its descriptor is not known."""
        entry = self._admission.enter(websocket.client and websocket.client.host, 0, lambda: None)
        try:
            if not entry.admitted:
                await websocket.receive()
                await websocket.send_denial_response(Response(BUSY, 503, dict(BUSY_HEADERS)))
            elif (connection := await self._accept(websocket)) is not None:
                socket = AsgiSocket(websocket, connection)
                self._greet(connection, socket)
                await socket.serve()
        finally:
            entry.release()

    async def _accept(self, websocket: WebSocket) -> Connection | None:
        offered = websocket.scope["subprotocols"]
        try:
            await websocket.accept(protocol.SUBPROTOCOL if protocol.SUBPROTOCOL in offered else None)
        except WebSocketDisconnect:
            return None
        connection = Connection(self)
        self._open.add(connection)
        return connection

    def _greet(self, connection: Connection, socket: FrameWriter) -> None:
        connection.open(socket)
        if self._closing:
            connection.leave(SHUTTING_DOWN)

    def discard(self, connection: Connection) -> None:
        """A connection has ended."""
        self._open.discard(connection)
        self._gone.set()

    async def _tick(self) -> None:
        """Call `tick` of every connection once a second."""
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
        """Close all connections, and those still to come, as `shutting_down`. Returns once all have closed."""
        self._closing = True
        for connection in list(self._open):
            connection.leave(SHUTTING_DOWN)
        with anyio.move_on_after(CLOSE_TIMEOUT + 0.5):
            while self._open:
                self._gone = anyio.Event()
                await self._gone.wait()


class Flusher:
    """Writes once for each connection that something was queued for in this turn of the loop, at its end."""

    def __init__(self) -> None:
        self._woken: list[Connection] = []

    def add(self, connection: "Connection") -> None:
        """Flush the connection at the end of this turn. To be called once for each turn; see `Connection.wake`."""
        if not self._woken:
            asyncio.get_running_loop().call_soon(self._flush)
        self._woken.append(connection)

    def _flush(self) -> None:
        woken, self._woken = self._woken, []
        for connection in woken:
            connection.flush()
