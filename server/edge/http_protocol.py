"""A uvicorn protocol that does not wait for ever for a request, does not take one of any size, and turns connections
away that are too many (G11).

A client that sends half a request, or nothing, holds a descriptor: it gets `HEAD_TIMEOUT` seconds for the head, from
the moment it connects, which covers the handshake of a WebSocket, and `BODY_TIMEOUT` for the body. One that does not
take its response is cut after `RESPONSE_TIMEOUT`. Between two requests uvicorn's `timeout_keep_alive` holds. One that
`Admission` did not admit is answered once, about the hub's health, or with 503.

Relies on inner parts of uvicorn's `HttpToolsProtocol`: checked against 0.54.
"""

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from agentcast.server.edge.admission import ADMISSION, BUSY, BUSY_HEADERS, Admission, Entry
from agentcast.server.edge.costs import ACCOUNT, Account
from agentcast.server.edge.websocket import FrameProtocol

HEAD_TIMEOUT = 10.0
BODY_TIMEOUT = 30.0
RESERVE_TIMEOUT = 2.0
"""Seconds for all that a connection over a limit may do."""
RESPONSE_TIMEOUT = 30.0
"""Seconds in which a client that does not read must begin to take what waits for it."""
HEAD_BYTES = 32 * 1024
"""Bytes of the request line and the headers together; each line of a handshake may have 8 KiB."""
MAX_PIPELINED = 8
"""Requests that a client may send before it has the response to an earlier one."""

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_HEALTH = (b"/healthz", b"/readyz")
_TOO_MANY = b"".join(
    [
        b"HTTP/1.1 503 Service Unavailable\r\n",
        *(f"{name}: {value}\r\n".encode() for name, value in BUSY_HEADERS),
        b"\r\n" + BUSY,
    ]
)


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with deadlines, a limit on the head of a request, and admission."""

    _entry: Entry | None = None
    """What the connection is counted as, as long as it is this protocol's."""
    _account: Account | None = None
    _refused = False
    """Whether the request is."""

    _deadline: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _head: int | None = 0
    """Bytes of the head that is being read; None while none is."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        admission: Admission | None = self.app_state.get(ADMISSION)
        if admission is not None:
            descriptor = transport.get_extra_info("socket").fileno()
            self._entry = admission.enter(self.client and self.client[0], descriptor, self._turn_away)
        if self._admitted:
            self._expect_within(HEAD_TIMEOUT)
        else:
            self._deadline = self.loop.call_later(RESERVE_TIMEOUT, self._turn_away)

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
        if self._admitted:
            self._expect_within(HEAD_TIMEOUT)

    def on_headers_complete(self) -> None:
        self._refused = not self._may_ask()
        self.app = _refuse if self._refused else self.config.loaded_app
        super().on_headers_complete()
        if self._account is None:
            self._account = Account()
        cast(dict[str, Any], self.scope)["extensions"] = {ACCOUNT: self._account}
        self._head = None
        if self._admitted:
            self._expect_within(BODY_TIMEOUT)
        elif self.cycle is not None:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self._admitted:
            self._expect_within(None)

    def handle_websocket_upgrade(self) -> None:
        if self._refused:
            self._turn_away()
            return
        super().handle_websocket_upgrade()
        successor = self.transport.get_protocol()
        if isinstance(successor, FrameProtocol):
            successor.entry, self._entry = self._entry, None
        self._release()  # of another protocol of WebSockets, the app counts the connection: see `Connections`

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
        self._release()
        self._expect_within(None)
        if self._stalled is not None:
            self._stalled.cancel()

    def _expect_within(self, seconds: float | None) -> None:
        """Cut the connection after `seconds`; None: not any more."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    # -- Admission -------------------------------------------------------------------------------------------------

    @property
    def _admitted(self) -> bool:
        return self._entry is None or self._entry.admitted

    def _may_ask(self) -> bool:
        """Whether the request whose head is complete is to be answered."""
        if self._entry is None or self.url.partition(b"?")[0] in _HEALTH:
            return True
        forwarded = b",".join([value for name, value in self.headers if name == b"x-forwarded-for"])
        return self._entry.forward(forwarded.decode("latin-1"))

    def _turn_away(self) -> None:
        """Refuse the connection at once."""
        cycle: Any = self.cycle
        if cycle is None or cycle.response_complete:
            self.transport.write(_TOO_MANY)
        self.transport.close()
        self._expect_within(RESERVE_TIMEOUT)

    def _release(self) -> None:
        if self._entry is not None:
            self._entry.release()
            self._entry = None


async def _refuse(scope: Any, receive: Any, send: Any) -> None:
    """The app of requests that are refused."""
    headers = [(name.encode(), value.encode()) for name, value in BUSY_HEADERS]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": BUSY})
