"""What is sent to clients: the text of frames, and the same framed for the wire, made once for all who get it.

This module must not know what is in a frame.
"""

from collections.abc import Iterable

_TEXT = 0x81  # FIN, opcode 1 (RFC 6455, section 5.2)


class Batch:
    """Frames that go out together, in order. The same object goes to every client that gets these bytes."""

    __slots__ = ("_framed", "payloads", "size")

    def __init__(self, payloads: Iterable[bytes]) -> None:
        self.payloads = tuple(payloads)
        """The JSON text of each frame."""
        self.size = sum(map(len, self.payloads))
        """Bytes of the payloads."""
        self._framed: bytes | None = None

    def __len__(self) -> int:
        return len(self.payloads)

    @property
    def framed(self) -> bytes:
        """All of them as unmasked WebSocket text frames: without compression, the same bytes for every client."""
        if self._framed is None:
            parts: list[bytes] = []
            for payload in self.payloads:
                parts += (_header(len(payload)), payload)
            self._framed = b"".join(parts)
        return self._framed


def _header(length: int) -> bytes:
    if length < 126:
        return bytes((_TEXT, length))
    if length < 65_536:
        return bytes((_TEXT, 126)) + length.to_bytes(2, "big")
    return bytes((_TEXT, 127)) + length.to_bytes(8, "big")
