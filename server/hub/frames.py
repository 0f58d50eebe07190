"""Bytes that go to many clients: framed once, however many there are.

A *batch* is a few frames that leave together. A *segment* is a stretch of a run's log, with one batch for each detail.
Nothing here knows clients, runs or sockets.
"""

from collections.abc import Sequence
from itertools import islice

from agentcast.server.bus.base import Frame

_TEXT = 0x81  # FIN, opcode 1 (RFC 6455, section 5.2)


class Batch:
    """The JSON texts of frames that leave together. Treat as read-only: the same object goes to every client."""

    __slots__ = ("_framed", "payloads", "size")

    def __init__(self, payloads: tuple[bytes, ...]) -> None:
        self.payloads = payloads
        self.size = sum(map(len, payloads))
        """Bytes of the payloads."""
        self._framed: bytes | None = None

    def __len__(self) -> int:
        return len(self.payloads)

    @property
    def framed(self) -> bytes:
        """The payloads as WebSocket text frames, unmasked, as a server sends them."""
        if self._framed is None:
            self._framed = b"".join([part for payload in self.payloads for part in (_header(len(payload)), payload)])
        return self._framed


def _header(length: int) -> bytes:
    if length < 126:
        return bytes((_TEXT, length))
    if length < 65_536:
        return bytes((_TEXT, 126)) + length.to_bytes(2, "big")
    return bytes((_TEXT, 127)) + length.to_bytes(8, "big")


class Segment:
    """Consecutive frames of one epoch of a run's log, at least one."""

    __slots__ = ("_full", "_progress", "epoch", "first", "frames", "last", "size", "terminal")

    def __init__(self, frames: Sequence[Frame]) -> None:
        self.frames = frames
        self.epoch = frames[0].epoch
        self.first = frames[0].seq
        self.last = frames[-1].seq
        self.terminal = frames[-1].terminal
        """Whether the run ends with it."""
        self.size = sum(len(frame.data) for frame in frames)
        self._full: Batch | None = None
        self._progress: Batch | None = None

    def batch(self, *, full: bool) -> Batch:
        """What a client of this detail is sent; it may be empty at detail `progress`."""
        if full:
            if self._full is None:
                self._full = Batch(tuple(frame.data for frame in self.frames))
            return self._full
        if self._progress is None:
            shown = tuple(frame.data for frame in self.frames if frame.progress)
            self._progress = self.batch(full=True) if len(shown) == len(self.frames) else Batch(shown)
        return self._progress

    def after(self, seq: int) -> "Segment | None":
        """What of it follows `seq`; None if nothing does."""
        if seq < self.first:
            return self
        return Segment(self.frames[seq - self.first + 1 :]) if seq < self.last else None

    def until(self, seq: int) -> "Segment":
        """What of it is not beyond `seq`, which is not before its first."""
        return self if self.last <= seq else Segment(self.frames[: seq - self.first + 1])

    def head(self, frames: int, size: int) -> "Segment":
        """As many of its frames, from the first on, as fit into so many frames and bytes, and the one that exceeds
        them; at least one."""
        count = total = 0
        for frame in islice(self.frames, max(frames, 1)):
            count += 1
            total += len(frame.data)
            if total >= size:
                break
        return self if count == len(self.frames) else Segment(self.frames[:count])
