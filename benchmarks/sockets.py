"""A WebSocket client that costs next to nothing: plain sockets, one handshake, frames counted or cut as bytes."""

import selectors
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import orjson

CHUNK = 262_144
_HANDSHAKE = (
    "GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Socket:
    """One connection; `receive` gives documents, where their cost does not matter."""

    def __init__(self, port: int, wait: bool = True) -> None:
        """Without `wait` it is not open yet: call `fill` until it is."""
        self.raw = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.raw.sendall(_HANDSHAKE.format(port=port).encode())
        self.buffer = bytearray()
        self.open = False
        while wait and not self.open:
            self.fill()

    def send(self, **command: Any) -> None:
        data = orjson.dumps(command)
        size = bytes((0x80 | len(data),)) if len(data) < 126 else b"\xfe" + len(data).to_bytes(2, "big")
        self.raw.sendall(b"\x81" + size + b"\0\0\0\0" + data)  # masked with zeros: as it is

    def receive(self, wanted: Callable[[Any], bool]) -> Any:
        """The first frame that is `wanted`; those before it are dropped."""
        while True:
            for frame in cut(self.buffer):
                document = orjson.loads(frame)
                if wanted(document):
                    return document
            self.fill()

    def ask(self, **command: Any) -> Any:
        """The result of a command."""
        self.send(id="asked", **command)
        reply = self.receive(lambda frame: frame.get("id") == "asked")
        assert reply["ok"], reply
        return reply["result"]

    def close(self) -> None:
        self.raw.close()

    def fill(self) -> None:
        """Add what comes next to the buffer."""
        data = self.raw.recv(CHUNK)
        assert data, "the server closed the connection"
        self.buffer += data
        if not self.open and b"\r\n\r\n" in self.buffer:
            head, _, rest = self.buffer.partition(b"\r\n\r\n")
            assert b" 101 " in head.partition(b"\r\n")[0], bytes(head)
            self.buffer = bytearray(rest)
            self.open = True


class Watchers:
    """Many sockets, read by one loop."""

    def __init__(self, sockets: Sequence[Socket]) -> None:
        self._selector = selectors.DefaultSelector()
        self._buffer = memoryview(bytearray(CHUNK))  # one for all: making 256 KiB for each read costs more than it
        for number, one in enumerate(sockets):
            one.raw.setblocking(False)
            self._selector.register(one.raw, selectors.EVENT_READ, number)

    def chunks(self, timeout: float = 30.0) -> Iterator[tuple[int, float, bytes]]:
        """What comes, as it comes: the socket's number, the Unix time, the bytes."""
        while True:
            ready = self._selector.select(timeout)
            if not ready:
                raise TimeoutError(f"nothing came for {timeout:g} s")
            for key, _ in ready:
                size = key.fileobj.recv_into(self._buffer)  # type: ignore[union-attr]
                assert size, "the server closed a connection"
                yield key.data, time.time(), bytes(self._buffer[:size])

    def count(self, mark: bytes, wanted: int) -> None:
        """Read until one-byte `mark` has come `wanted` times, over all sockets."""
        chunks = self.chunks()
        while wanted > 0:
            wanted -= next(chunks)[2].count(mark)
        assert wanted == 0, "more came than was sent"

    def close(self) -> None:
        self._selector.close()


def cut(buffer: bytearray) -> Iterator[bytes]:
    """The whole frames at the front of `buffer`, which keeps those that were not asked for."""
    start = 0
    try:
        while (bounds := _bounds(buffer, start)) is not None:
            start = bounds[1]
            yield bytes(buffer[bounds[0] : start])
    finally:
        del buffer[:start]


def _bounds(buffer: bytearray, start: int) -> tuple[int, int] | None:
    if len(buffer) < start + 2:
        return None
    size, head = buffer[start + 1], 2
    if size >= 126:
        head = 4 if size == 126 else 10
        size = int.from_bytes(buffer[start + 2 : start + head], "big")
    end = start + head + size
    return (start + head, end) if end <= len(buffer) and len(buffer) >= start + head else None
