"""What others would do to send one text to many clients; a process like `hub`, with the fan-out and nothing else.

- `starlette`: the way of most tutorials, `send_text` to one client after the other, on uvicorn with its faster
  WebSocket implementation and uvloop;
- `websockets`: the library's own `broadcast`, on uvloop.
"""

import sys
from collections.abc import Awaitable, Callable

import anyio
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.asyncio.server import ServerConnection, broadcast, serve

from benchmarks.serving import EVENT_BYTES, MARK, Go, serving

TEXT = MARK + "x" * (EVENT_BYTES - 1)


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
        for client in clients:
            await client.send_text(TEXT)

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
        broadcast(clients, TEXT)

    async with serve(handle, "127.0.0.1", 0, compression=None, ping_interval=None) as server:
        await send_at_go(send, next(iter(server.sockets)).getsockname()[1])


async def send_at_go(send: Callable[[], Awaitable[None]], port: int) -> None:
    go = Go()
    go.listen()
    print(port, flush=True)
    while True:
        for _ in range(await go()):
            await send()


if __name__ == "__main__":
    peer = {"starlette": starlette, "websockets": websockets}[sys.argv[1]]
    anyio.run(peer, backend_options={"use_uvloop": True})
