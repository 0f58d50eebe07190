"""The newest frames of a run, framed, so that a follower that is a little behind needs nothing from the bus.

Each ring has a bound, and all rings of a process share another: past it, the ring that was extended longest ago is
emptied. So what a process keeps of runs that are quiet is bounded, too. Nothing here knows followers.
"""

from collections import deque

from agentcast.server.hub.frames import Segment

RING_BYTES = 256 * 1024
"""What one ring keeps."""
RINGS_BYTES = 64 * 1024 * 1024
"""What all rings of a process keep."""


class Rings:
    """The budget that the rings of a process share."""

    def __init__(self, *, each: int = RING_BYTES, total: int = RINGS_BYTES) -> None:
        self.each = each
        self._total = total
        self._size = 0
        self._filled: dict[Ring, None] = {}
        """Rings that hold something; the one that was extended longest ago comes first."""

    def __len__(self) -> int:
        """Bytes that all rings hold."""
        return self._size

    def changed(self, ring: "Ring", by: int) -> None:
        """A ring was extended or emptied, which has changed its size by so many bytes."""
        self._size += by
        self._filled.pop(ring, None)
        if ring.size:
            self._filled[ring] = None
        while self._size > self._total:
            next(iter(self._filled)).clear()


class Ring:
    """The newest frames of one run's log, without holes."""

    __slots__ = ("_rings", "_segments", "size")

    def __init__(self, rings: Rings) -> None:
        self._rings = rings
        self._segments: deque[Segment] = deque()
        self.size = 0
        """Bytes that it holds."""

    def extend(self, segment: Segment) -> None:
        """Add what follows the last frame, and drop the oldest past the bound."""
        segments, size = self._segments, self.size
        segments.append(segment)
        self.size += segment.size
        while self.size > self._rings.each:
            self.size -= segments.popleft().size
        self._rings.changed(self, self.size - size)

    def clear(self) -> None:
        """Drop everything."""
        if self._segments:
            self._segments.clear()
            size, self.size = self.size, 0
            self._rings.changed(self, -size)

    @property
    def first(self) -> int | None:
        """The oldest seq that it holds, if it holds any."""
        return self._segments[0].first if self._segments else None

    def after(self, seq: int) -> list[Segment]:
        """What follows `seq`, which is not before the one that precedes its first."""
        segments: list[Segment] = []
        for segment in reversed(self._segments):
            part = segment.after(seq)
            if part is None:
                break
            segments.append(part)
        return segments[::-1]
