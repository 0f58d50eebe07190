"""The socket of an open WebSocket connection, for frames that are ready to be written; see `websocket`.

Server frames are unmasked and, without compression, the same bytes for every client, so one encoding serves all of
them; and many frames go out in one write, which is what fan-out costs are made of. A slow client shows as `writable`
turning false, never as a wait; one that takes nothing at all can be cut with `abort` (a closing handshake would wait
for it). What comes is parsed in turns within a budget (G11): past it, the socket is not read.

An object for each connection, of a few hundred bytes: no task, no queue. This module must not know what is in a frame.
"""

import asyncio
from enum import Enum, auto
from typing import Protocol, Self

from websockets.exceptions import InvalidState
from websockets.frames import CloseCode, Frame, Opcode

from agentcast.server.edge.admission import Entry
from agentcast.server.edge.intake import FRAMES_PER_TURN, MAX_FRAGMENTS, Budget, FrameParser
from agentcast.server.hub.frames import Batch

CLOSE_TIMEOUT = 2.0
"""Seconds that a peer gets to answer a close frame, and to take what was sent before it."""


class Receiver(Protocol):
    """Who is called with what happens on a connection. All return at once."""

    def on_text(self, text: str) -> None:
        """A text message has come."""

    def on_binary(self) -> None:
        """A binary message has come."""

    def on_writable(self) -> None:
        """`writable` is true again."""

    def on_closed(self) -> None:
        """The peer has closed the connection, or it is lost. Called once; not after `close`."""


class FrameWriter(Protocol):
    """The socket of one connection, as its receiver sees it."""

    writable: bool
    """Whether the socket takes more; false for good once the connection is closing."""
    held: bool
    """Whether messages are held back: see `hold`."""

    @property
    def pending(self) -> int:
        """Bytes that wait here because the client has not taken them."""

    @property
    def taken(self) -> int:
        """Bytes that the client, or the kernel for it, has taken so far."""

    def write(self, batch: Batch) -> None:
        """Send frames. Never waits; for nothing once the connection is closing."""

    def hold(self, held: bool) -> None:
        """Stop reading what the client sends, at once; or go on."""

    def close(self, code: int, reason: str) -> None:
        """Close the connection after what was written; the peer has `CLOSE_TIMEOUT` seconds."""

    def abort(self) -> None:
        """Cut the connection at once, without a handshake."""


class _Phase(Enum):
    OPEN = auto()
    CLOSING = auto()
    """A close frame was sent, or the transport is closing."""
    LOST = auto()


_AFTER = {
    _Phase.OPEN: (_Phase.CLOSING, _Phase.LOST),
    _Phase.CLOSING: (_Phase.LOST,),
    _Phase.LOST: (),
}


class FrameSocket(asyncio.Protocol):
    """An asyncio protocol that is the `FrameWriter` of its connection."""

    __slots__ = (
        "_budget",
        "_entry",
        "_fragments",
        "_loop",
        "_parser",
        "_peers",
        "_phase",
        "_receiver",
        "_resumption",
        "_text",
        "_timeout",
        "_transport",
        "_written",
        "held",
        "writable",
    )

    def __init__(
        self, transport: asyncio.Transport, receiver: Receiver, peers: set[Self], entry: Entry | None = None
    ) -> None:
        """`peers` are the open connections of the server, which calls `shutdown` of each when it stops; `entry` is what
        the connection is counted as, released when it is lost."""
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._receiver = receiver
        self._peers = peers
        self._entry = entry
        self._phase = _Phase.OPEN
        self._written = transport.get_write_buffer_size()
        self.writable = True
        self.held = False
        self._parser = FrameParser()
        self._budget = Budget(self._loop.time())
        self._resumption: asyncio.Handle | None = None
        """Set while reading waits for its next turn, or for budget."""
        self._fragments: list[bytes] | None = None
        """Of a message that is not complete."""
        self._text = False
        self._timeout: asyncio.Handle | None = None
        peers.add(self)

    # -- Writing ---------------------------------------------------------------------------------------------------

    def write(self, batch: Batch) -> None:
        data = batch.framed
        self._written += len(data)
        self._transport.write(data)

    @property
    def pending(self) -> int:
        return self._transport.get_write_buffer_size()

    @property
    def taken(self) -> int:
        return self._written - self.pending

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        if self._phase is _Phase.OPEN:
            self.writable = True
            self._receiver.on_writable()

    # -- Reading ---------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._budget.fill(now := self._loop.time())
        self._budget.spend(1, len(data), now)
        self._parser.feed(data)
        if self._resumption is None and not self.held:
            self._take_turn()

    def hold(self, held: bool) -> None:
        if held != self.held:
            self.held = held
            if held:
                self._pause()
            elif self._resumption is None:
                self._resumption = self._loop.call_soon(self._resume)

    def _take_turn(self) -> None:
        """Take frames, as many as a turn and the budget allow; the rest later."""
        taken = 0
        while taken < FRAMES_PER_TURN and not self._budget.spent and not self.held:
            if (frame := self._parser.next_frame()) is None:
                break
            taken += 1
            self._budget.spend(1, 0, self._loop.time())
            self._take(frame)
        self._send_control()
        if self._phase is _Phase.LOST or self._transport.is_closing():
            return
        if self._budget.spent or (taken == FRAMES_PER_TURN and self._parser.buffered):
            self._pause()
            self._resumption = self._loop.call_later(self._budget.delay, self._resume)
        elif not self.held:
            self._transport.resume_reading()

    def _resume(self) -> None:
        self._resumption = None
        self._budget.fill(now := self._loop.time())
        if self._phase is _Phase.LOST or self.held:
            return
        if self._budget.is_exhausted(now):
            self._refuse(CloseCode.POLICY_VIOLATION, "too much was sent for too long")
        self._take_turn()

    def _pause(self) -> None:
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def _take(self, frame: Frame) -> None:
        match frame.opcode:
            case Opcode.CLOSE:
                self._end()
            case Opcode.TEXT | Opcode.BINARY | Opcode.CONT if self._phase is _Phase.OPEN:
                self._take_data(frame)

    def _take_data(self, frame: Frame) -> None:
        if frame.opcode is not Opcode.CONT:
            self._text = frame.opcode is Opcode.TEXT
            if frame.fin:
                self._take_message(frame.data)
                return
        if self._fragments is None:
            self._fragments = []
        self._fragments.append(bytes(frame.data))
        if frame.fin:
            message, self._fragments = b"".join(self._fragments), None
            self._take_message(message)
        elif len(self._fragments) >= MAX_FRAGMENTS:
            self._refuse(CloseCode.POLICY_VIOLATION, f"a message of over {MAX_FRAGMENTS} fragments")

    def _take_message(self, data: bytes | bytearray | memoryview) -> None:
        if not self._text:
            self._receiver.on_binary()
            return
        try:
            text = str(data, "utf-8")
        except UnicodeDecodeError:
            self._refuse(CloseCode.INVALID_DATA, "not UTF-8")
        else:
            self._receiver.on_text(text)

    def _send_control(self) -> None:
        """Send pongs, unless the peer does not read: they would pile up (RFC 6455, 5.5.3 allows to leave them out);
        and the parser's own close frame, where what came was no frame."""
        data = b"".join(self._parser.data_to_send())
        if data and (self.writable or self._parser.parser_exc is not None):
            self._write_raw(data)
        if self._parser.parser_exc is not None and self._phase is _Phase.OPEN:
            self._break_off()

    def _write_raw(self, data: bytes) -> None:
        self._written += len(data)
        self._transport.write(data)

    # -- Closing ---------------------------------------------------------------------------------------------------

    def close(self, code: int, reason: str) -> None:
        if self._phase is not _Phase.OPEN:
            return
        self._enter(_Phase.CLOSING)
        try:
            self._parser.send_close(code, reason)
        except InvalidState:  # the peer was faster
            self._transport.close()
        self._write_raw(b"".join(self._parser.data_to_send()))
        self._expire()
        self.hold(False)  # so that the peer's answer is seen

    def abort(self) -> None:
        self.writable = False
        self._transport.abort()

    def shutdown(self) -> None:
        """The server stops: uvicorn calls it."""
        if self._phase is _Phase.OPEN:
            self.close(CloseCode.SERVICE_RESTART, "")
            self._receiver.on_closed()
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        was = self._phase
        self._enter(_Phase.LOST)
        self._peers.discard(self)
        if self._entry is not None:
            self._entry.release()
        self._parser.close()
        for handle in (self._timeout, self._resumption):
            if handle is not None:
                handle.cancel()
        if was is _Phase.OPEN:
            self._receiver.on_closed()

    def eof_received(self) -> None:
        """The peer sends no more, so it is gone: a WebSocket is never half-closed."""
        self._end()

    def _refuse(self, code: int, reason: str) -> None:
        """Close because of what the client has sent."""
        if self._phase is _Phase.OPEN:
            self._parser.fail(code, reason)
            self._break_off()

    def _break_off(self) -> None:
        """The parser has sent a close frame, and discards what comes. That is read on for a while: a socket that is
        closed with unread bytes is reset, and the peer might never see the close frame."""
        if self._phase is _Phase.OPEN:
            self._enter(_Phase.CLOSING)
            self._receiver.on_closed()
        self._send_last()
        self._expire()
        self.hold(False)

    def _end(self) -> None:
        """The peer has closed: close the transport, after what it still holds."""
        if self._phase is _Phase.OPEN:
            self._enter(_Phase.CLOSING)
            self._receiver.on_closed()
        self._send_last()
        self._transport.close()
        self._expire()

    def _send_last(self) -> None:
        data = b"".join(self._parser.data_to_send())
        if data:
            self._write_raw(data)

    def _expire(self) -> None:
        """A peer that does not take what the transport holds would keep it, and the descriptor, for ever."""
        if self._timeout is None:
            self._timeout = self._loop.call_later(CLOSE_TIMEOUT, self._transport.abort)

    def _enter(self, phase: _Phase) -> None:
        if phase not in _AFTER[self._phase]:
            raise RuntimeError(f"a socket that is {self._phase.name} cannot become {phase.name}")
        self._phase = phase
        self.writable = False
