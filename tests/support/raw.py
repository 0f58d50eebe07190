"""HTTP and WebSocket by hand, for what a well-behaved library will not send."""

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import anyio
from anyio.abc import SocketStream
from websockets.client import ClientProtocol
from websockets.uri import parse_uri


@dataclass
class Response:
    status: int
    head: str
    body: bytes


async def exchange(port: int, *lines: str) -> Response:
    """Send a request as these lines are; gives the answer as far as one read shows it."""
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send("".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1"))
        data = b""
        with anyio.fail_after(5):
            while b"\r\n\r\n" not in data:
                data += await stream.receive()
    head, _, body = data.partition(b"\r\n\r\n")
    return Response(int(head.split(maxsplit=2)[1]), head.decode("latin-1"), body)


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True) -> bytes:
    """A frame of a client with a short payload, masked with zeros."""
    return bytes((opcode | (0x80 if fin else 0), 0x80 | len(payload), 0, 0, 0, 0)) + payload


@asynccontextmanager
async def deaf(port: int, *, receive_buffer: int = 4096) -> AsyncIterator["Deaf"]:
    """A WebSocket client that sends but never reads again after the handshake. Its kernel takes next to nothing."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect(("127.0.0.1", port))
    sock.setblocking(False)
    async with await SocketStream.from_socket(sock) as stream:
        client = Deaf(stream, sock, port)
        await client.shake_hands()
        yield client


class Deaf:
    def __init__(self, stream: SocketStream, sock: socket.socket, port: int) -> None:
        self._sock = sock
        self._stream = stream
        self._protocol = ClientProtocol(parse_uri(f"ws://127.0.0.1:{port}/ws"), max_size=None)

    async def shake_hands(self) -> None:
        self._protocol.send_request(self._protocol.connect())
        await self._flush()
        with anyio.fail_after(5):
            while not self._protocol.events_received():
                self._protocol.receive_data(await self._stream.receive(512))
        if self._protocol.handshake_exc is not None:
            raise self._protocol.handshake_exc

    async def send(self, text: str | bytes, *, binary: bool = False, times: int = 1) -> None:
        data = text.encode() if isinstance(text, str) else text
        for _ in range(times):
            self._protocol.send_binary(data) if binary else self._protocol.send_text(data)
        await self._flush()

    async def ping(self, *, times: int) -> None:
        """Protocol pings, which are answered below the hub."""
        for _ in range(times):
            self._protocol.send_ping(b"x" * 125)
        await self._flush()

    async def send_raw(self, data: bytes) -> None:
        """Bytes as they are."""
        await self._stream.send(data)

    async def receive_raw(self) -> bytes:
        return await self._stream.receive()

    async def close_code(self) -> int:
        """Read until the hub has closed the connection; the code of its close frame, 1006 if there was none."""
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while self._protocol.close_rcvd is None:
                self._protocol.receive_data(await self._stream.receive())
        return 1006 if self._protocol.close_rcvd is None else self._protocol.close_rcvd.code

    async def cut_off(self) -> None:
        """Read all that was sent, until the hub has cut the connection."""
        try:
            while True:
                await self._stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return

    def abort(self) -> None:
        """Reset the connection."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    async def _flush(self) -> None:
        await self._stream.send(b"".join(self._protocol.data_to_send()))
