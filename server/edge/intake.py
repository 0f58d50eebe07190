"""What one client may send: a parser of frames that stops on demand, and a budget of frames and bytes.

Without a socket. The rules of the wire (RFC 6455) are those of `websockets`; what is added is that it parses one frame
at a time, so that no read, however large, is parsed in one go. This module must not know what messages mean.

`reader`, `parser` and their generators are inner parts of `websockets`: checked against 15.0 and 17.4.
"""

import logging
from collections.abc import Generator
from typing import cast

from websockets.frames import Frame
from websockets.protocol import Protocol, Side
from websockets.streams import StreamReader

from agentcast.server.protocol import MESSAGE_BYTES

FRAMES_PER_TURN = 32
"""Frames that are taken from one connection before the loop turns to others."""
FRAMES_PER_SECOND = 1_000
FRAMES_AT_ONCE = 4 * FRAMES_PER_SECOND
"""Frames, and reads of the socket, that a client may save up."""
BYTES_PER_SECOND = 8 * 1024 * 1024
BYTES_AT_ONCE = BYTES_PER_SECOND
OVERSPENDING = 10.0
"""Seconds for which a client may go on to send more than its budget; it is slowed down meanwhile."""
MAX_FRAGMENTS = 1_024
"""Frames of one message."""

logger = logging.getLogger(__name__)


class FrameParser(Protocol):
    """The server's side of an open WebSocket connection, which gives one frame for each call."""

    def __init__(self) -> None:
        super().__init__(Side.SERVER, max_size=MESSAGE_BYTES, logger=logger)
        self.reader = self._gate = _GatedReader()
        self.parser = self.parse()
        next(self.parser)

    def feed(self, data: bytes) -> None:
        """Add what was read."""
        self._gate.buffer += data

    @property
    def buffered(self) -> int:
        """Bytes that are not parsed yet."""
        return len(self._gate.buffer)

    def next_frame(self) -> Frame | None:
        """The next frame; None if it is not complete yet, or if what was sent is no frame: see `parser_exc`."""
        self._gate.open = True
        next(self.parser)
        return cast(Frame, self.events.pop()) if self.events else None

    def close(self) -> None:
        """Free the parser, which would live until the garbage collector finds it."""
        self.parser.close()


class _GatedReader(StreamReader):
    """Has the parser wait before each frame until the gate is opened. It closes when the parser arrives there, for a
    parser that was within a frame would go on to the next one otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.open = False

    def at_eof(self) -> Generator[None, None, bool]:
        self.open = False
        while not (self.open and self.buffer):
            yield
        return False


class Budget:
    """What a client may still send: two buckets that fill with time, one of frames, one of bytes."""

    __slots__ = ("_bytes", "_filled_at", "_frames", "_spent_since")

    def __init__(self, now: float) -> None:
        self._frames = float(FRAMES_AT_ONCE)
        self._bytes = float(BYTES_AT_ONCE)
        self._filled_at = now
        self._spent_since: float | None = None
        """When the budget was spent, if it was not full again since."""

    def fill(self, now: float) -> None:
        """Add what has accrued."""
        passed, self._filled_at = now - self._filled_at, now
        self._frames = min(self._frames + passed * FRAMES_PER_SECOND, FRAMES_AT_ONCE)
        self._bytes = min(self._bytes + passed * BYTES_PER_SECOND, BYTES_AT_ONCE)
        if self._frames == FRAMES_AT_ONCE and self._bytes == BYTES_AT_ONCE:
            self._spent_since = None

    def spend(self, frames: int, size: int, now: float) -> None:
        """Charge for what came. It may exceed what there is, by one read; `delay` is longer for it."""
        self._frames -= frames
        self._bytes -= size
        if self.spent and self._spent_since is None:
            self._spent_since = now

    @property
    def spent(self) -> bool:
        return self._frames < 1 or self._bytes <= 0

    @property
    def delay(self) -> float:
        """Seconds until a turn's worth may be read again."""
        frames = (FRAMES_PER_TURN - self._frames) / FRAMES_PER_SECOND
        return max(frames, -self._bytes / BYTES_PER_SECOND, 0.0)

    def is_exhausted(self, now: float) -> bool:
        """Whether the client has gone on past its budget for too long."""
        return self._spent_since is not None and now - self._spent_since >= OVERSPENDING
