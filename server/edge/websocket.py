"""A uvicorn protocol that lets the app write ready frames to its socket without waiting.

Server frames are unmasked and, without compression, the same bytes for every client, so one encoding serves all of
them; and many frames go out in one write, which is what fan-out costs are made of. A slow client shows as `writable`
turning false, never as a wait; one that takes nothing at all can be cut with `abort` (a closing handshake would wait
for it).

`agentcast serve` uses it. This module must not know what is in a frame.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from agentcast.server.hub.frames import Batch

EXTENSION = "agentcast.frames"


class FrameWriter:
    """The socket of one connection, as `scope["extensions"]["agentcast.frames"]`."""

    def __init__(self, protocol: "FrameProtocol") -> None:
        self._protocol = protocol
        self._written = 0
        self.on_writable: Callable[[], None] = _nothing
        """Called when `writable` turns true again, and when the connection is lost."""

    @property
    def writable(self) -> bool:
        """Whether the transport takes more; false as well once the connection is gone."""
        return self._protocol.writable.is_set() and not self.closed

    @property
    def closed(self) -> bool:
        """Whether the connection takes nothing any more: it is closing, or gone."""
        return self._protocol.close_sent or self._transport.is_closing()

    @property
    def pending(self) -> int:
        """Bytes that the transport holds because the client has not taken them."""
        return self._transport.get_write_buffer_size()

    @property
    def taken(self) -> int:
        """Bytes that the client, or the kernel for it, has taken so far."""
        return self._written - self.pending

    def write(self, messages: Sequence[Batch]) -> None:
        """Send each message as one text frame, all of them in one write. Never waits; for nothing once closed."""
        self.write_raw(b"".join([batch.framed for batch in messages]))

    def write_raw(self, data: bytes) -> None:
        """Send bytes as they are; everything must go through here, or `taken` is wrong."""
        self._written += len(data)
        self._transport.write(data)

    def abort(self) -> None:
        """Cut the connection at once, without a handshake."""
        self._transport.abort()

    @property
    def _transport(self) -> asyncio.Transport:
        return self._protocol.transport


class FrameProtocol(WebSocketsSansIOProtocol):
    """uvicorn's sans-I/O WebSocket protocol, with a `FrameWriter` in the scope's extensions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._writer = FrameWriter(self)

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if not self.close_sent:  # the app's task was created, but cannot have run yet
            extensions: dict[str, Any] = self.scope["extensions"]
            extensions[EXTENSION] = self._writer

    async def send(self, message: Any) -> None:
        await super().send(message)
        # A refusal completes the handshake as well. uvicorn does not note that, and would log an error for each.
        self.handshake_complete = self.handshake_complete or self.close_sent

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writer.on_writable()

    def handle_ping(self) -> None:
        """Answer, unless the peer does not read: pongs would pile up without bound (RFC 6455, 5.5.3 allows it)."""
        pong = b"".join(self.conn.data_to_send())
        if self._writer.writable:
            self._writer.write_raw(pong)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._writer.on_writable()

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text" and not self.close_sent:
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:  # uvicorn would do the same, and log a traceback for each
                self.frames = []
                self.conn.send_close(1007)
                self.handle_parser_exception()
                return
        super().send_receive_event_to_app()


def _nothing() -> None:
    pass
