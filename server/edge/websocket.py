"""A uvicorn protocol that hands the socket of an accepted connection over to the app.

uvicorn keeps a task, a queue, the request and its own protocol object for as long as a WebSocket is open, and writes
each message by itself. Here the app takes the socket once it has accepted, and returns; what is left of the connection
is one `FrameSocket`. `agentcast serve` uses it; under any other server, see `AsgiSocket`.

Relies on inner parts of uvicorn's `WebSocketsSansIOProtocol`: checked against 0.54.
"""

import asyncio
from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from agentcast.server.edge.admission import Entry
from agentcast.server.edge.frame_socket import FrameSocket, FrameWriter, Receiver

EXTENSION = "agentcast.frames"

HandOver = Callable[[Receiver], FrameWriter]
"""`scope["extensions"]["agentcast.frames"]`: take the socket, once it is accepted. From then on everything that comes
is given to the receiver; the ASGI app's `receive` and `send` are unusable, and it returns."""


class FrameProtocol(WebSocketsSansIOProtocol):
    """uvicorn's sans-I/O WebSocket protocol for the handshake, with a `HandOver` in the scope's extensions."""

    entry: Entry | None = None
    """What the connection is counted as, where `HttpProtocol` has counted it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.pause_reading()  # nothing may come before the answer; uvicorn feeds the request by itself

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.entry is not None:
            self.entry.release()
            self.entry = None

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if not self.close_sent:  # the app's task was created, but cannot have run yet
            extensions: dict[str, Any] = self.scope["extensions"]
            extensions[EXTENSION] = self._hand_over

    async def send(self, message: Any) -> None:
        await super().send(message)
        # A refusal completes the handshake as well. uvicorn does not note that, and would log an error for each.
        self.handshake_complete = self.handshake_complete or self.close_sent
        if message["type"] == "websocket.accept" and not self.transport.is_closing():
            self.transport.resume_reading()

    def _hand_over(self, receiver: Receiver) -> FrameWriter:
        transport, lost = self.transport, self.disconnected
        socket = FrameSocket(transport, receiver, cast(Any, self.connections), self.entry)
        self.entry = None
        self.connections.discard(self)
        self.stop_keepalive()
        self.conn.parser.close()  # it and the connection hold each other
        self.transport = cast(asyncio.Transport, _Gone())
        del self.scope["extensions"][EXTENSION]
        if lost:
            self.loop.call_soon(socket.connection_lost, None)
        else:
            transport.set_protocol(socket)
        return socket


class _Gone:
    """What uvicorn closes when the app has returned, of a socket that was handed over."""

    def close(self) -> None:
        pass
