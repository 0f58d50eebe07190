"""The socket of a connection under a server that knows ASGI only, with the interface of a `FrameSocket`.

It costs a task for each connection besides the server's own, and a send for each frame. What the server buffers is not
seen: a client counts as slow while a send waits.
"""

from collections import deque
from contextlib import suppress

import anyio
from starlette.websockets import WebSocket, WebSocketDisconnect

from agentcast.server.edge.frame_socket import CLOSE_TIMEOUT, Receiver
from agentcast.server.hub.frames import Batch


class AsgiSocket:
    """The `FrameWriter` of a WebSocket that the app has accepted; it works while `serve` runs."""

    def __init__(self, websocket: WebSocket, receiver: Receiver) -> None:
        self._websocket = websocket
        self._receiver = receiver
        self._queue: deque[bytes] = deque()
        """What is written but not sent. The receiver writes again when all was sent."""
        self._written = anyio.Event()
        """Set when something was written, or the connection is to be closed."""
        self._released = anyio.Event()
        self._scope = anyio.CancelScope()
        self._closing: tuple[int, str] | None = None
        self._closed = False
        self.writable = True
        self.held = False
        self.pending = 0
        self.taken = 0

    def write(self, batch: Batch) -> None:
        self._queue.extend(batch.payloads)
        self.pending += batch.size
        self.writable = False
        self._written.set()

    def hold(self, held: bool) -> None:
        self.held = held
        if not held:
            self._released.set()

    def close(self, code: int, reason: str) -> None:
        if not self._closed:
            self._closed = True
            self.writable = False
            self._closing = (code, reason)
            self._scope.deadline = anyio.current_time() + CLOSE_TIMEOUT
            self._written.set()

    def abort(self) -> None:
        self.writable = False
        self._scope.cancel()

    async def serve(self) -> None:
        """Read and write until the connection is closed."""
        try:
            with self._scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._read, tasks.cancel_scope)
                    await self._write()
                    tasks.cancel_scope.cancel()
        finally:
            self.writable = False
            if not self._closed:
                self._closed = True
                self._receiver.on_closed()

    async def _read(self, scope: anyio.CancelScope) -> None:
        while True:
            while self.held:
                self._released = anyio.Event()
                await self._released.wait()
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                scope.cancel()
                return
            if (text := message.get("text")) is None:
                self._receiver.on_binary()
            else:
                self._receiver.on_text(text)

    async def _write(self) -> None:
        with suppress(WebSocketDisconnect):
            while True:
                while self._queue:
                    await self._send(self._queue.popleft())
                if self._closing is not None:
                    await self._websocket.close(*self._closing)
                    return
                self.writable = True
                self._written = anyio.Event()
                self._receiver.on_writable()
                await self._written.wait()

    async def _send(self, payload: bytes) -> None:
        await self._websocket.send_text(str(payload, "utf-8"))
        self.pending -= len(payload)
        self.taken += len(payload)
