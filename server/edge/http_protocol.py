"""A uvicorn protocol that does not wait for ever for a request, and does not take one of any size (G11).

A client that sends half a request, or nothing, holds a descriptor: it gets `HEAD_TIMEOUT` seconds for the head, from
the moment it connects, which covers the handshake of a WebSocket, and `BODY_TIMEOUT` for the body. One that does not
take its response is cut after `RESPONSE_TIMEOUT`. Between two requests uvicorn's `timeout_keep_alive` holds.

Relies on inner parts of uvicorn's `HttpToolsProtocol`: checked against 0.54.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT = 10.0
BODY_TIMEOUT = 30.0
RESPONSE_TIMEOUT = 30.0
"""Seconds in which a client that does not read must begin to take what waits for it."""
HEAD_BYTES = 32 * 1024
"""Bytes of the request line and the headers together; each line of a handshake may have 8 KiB."""
MAX_PIPELINED = 8
"""Requests that a client may send before it has the response to an earlier one."""

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with deadlines and a limit on the head of a request."""

    _deadline: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _head: int | None = 0
    """Bytes of the head that is being read; None while none is."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_within(HEAD_TIMEOUT)

    def data_received(self, data: bytes) -> None:
        view = memoryview(data)
        for start in range(0, len(view), HEAD_BYTES):
            if self.transport.is_closing() or self.transport.get_protocol() is not self:
                return
            self._feed(bytes(view[start : start + HEAD_BYTES]))

    def _feed(self, data: bytes) -> None:
        super().data_received(data)
        if self._head is not None and not self.transport.is_closing():
            self._head += len(data)
            if self._head >= HEAD_BYTES:
                self.transport.write(_TOO_LARGE)
                self.transport.close()
                self._expect_within(HEAD_TIMEOUT)

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests at once")  # uvicorn answers 400 and closes
        super().on_message_begin()
        self._head = 0
        self._expect_within(HEAD_TIMEOUT)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._head = None
        self._expect_within(BODY_TIMEOUT)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._expect_within(None)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(RESPONSE_TIMEOUT, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._expect_within(None)
        if self._stalled is not None:
            self._stalled.cancel()

    def _expect_within(self, seconds: float | None) -> None:
        """Cut the connection after `seconds`; None: not any more."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)
