"""What others would do to send one text to many clients; a process like `hub`, with the fan-out and nothing else.

- `starlette`: the way of most tutorials, `send_text` to one client after the other, on uvicorn with its faster
  WebSocket implementation and uvloop;
- `websockets`: the library's own `broadcast`, on uvloop;
- `bare`: no library, no checks: one frame, made once, written to one transport of uvloop after the other.

Each text begins with the time at which it is sent.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable

import anyio
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.asyncio.server import ServerConnection, broadcast, serve

from benchmarks.serving import EVENT_BYTES, MARK, Go, serving


def text() -> str:
    return f"{MARK}{time.time():.6f} ".ljust(EVENT_BYTES, "x")


async def starlette() -> None:
    clients: list[WebSocket] = []

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        clients.append(websocket)
        try:
            while True:
                await websocket.receive_text()
        except WebSocketDisconnect:
            clients.remove(websocket)

    async def send() -> None:
        message = text()
        for client in clients:
            await client.send_text(message)

    app = Starlette(routes=[WebSocketRoute("/ws", endpoint)])
    async with serving(app, "websockets-sansio") as port:
        await send_at_go(send, port)


async def websockets() -> None:
    clients: set[ServerConnection] = set()

    async def handle(connection: ServerConnection) -> None:
        clients.add(connection)
        await connection.wait_closed()
        clients.remove(connection)

    async def send() -> None:
        broadcast(clients, text())

    async with serve(handle, "127.0.0.1", 0, compression=None, ping_interval=None) as server:
        await send_at_go(send, next(iter(server.sockets)).getsockname()[1])


class Bare(asyncio.Protocol):
    """One connection: takes a handshake, without looking at it, and then nothing."""

    transport: asyncio.Transport

    def __init__(self, clients: set[asyncio.Transport]) -> None:
        self.clients = clients
        self.request = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.request += data
        if self.request.endswith(b"\r\n\r\n"):
            self.transport.write(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
            self.clients.add(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.clients.discard(self.transport)


async def bare() -> None:
    clients: set[asyncio.Transport] = set()

    async def send() -> None:
        frame = b"\x81\x7e" + EVENT_BYTES.to_bytes(2, "big") + text().encode()
        for client in clients:
            client.write(frame)

    server = await asyncio.get_running_loop().create_server(lambda: Bare(clients), "127.0.0.1", 0)
    async with server:
        await send_at_go(send, server.sockets[0].getsockname()[1])


async def send_at_go(send: Callable[[], Awaitable[None]], port: int) -> None:
    go = Go()
    go.listen()
    print(port, flush=True)
    while True:
        for _ in range(await go()):
            await send()


if __name__ == "__main__":
    peer = {"starlette": starlette, "websockets": websockets, "bare": bare}[sys.argv[1]]
    anyio.run(peer, backend_options={"use_uvloop": True})
