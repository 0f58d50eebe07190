"""What the measured servers share: the event that is fanned out, uvicorn with a moment at which it is up, and `go`."""

import asyncio
import os
import socket
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import uvicorn

MARK = "#"
"""Once in each event that is counted, and nowhere else, frame headers included (`~` is the byte of their length)."""
EVENT_BYTES = 200


class Go:
    """Lets one waiter on for each byte that comes on stdin, and gives it the byte: how much it is to do."""

    def __init__(self) -> None:
        self._bytes: deque[int] = deque()
        self._permits = asyncio.Semaphore(0)

    async def __call__(self) -> int:
        await self._permits.acquire()
        return self._bytes.popleft()

    def listen(self) -> None:
        asyncio.get_running_loop().add_reader(0, self._take)

    def _take(self) -> None:
        for byte in os.read(0, 4096):
            self._bytes.append(byte)
            self._permits.release()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = anyio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


@asynccontextmanager
async def serving(app: Any, ws: Any, http: Any = "auto") -> AsyncIterator[int]:
    """Serve `app` on a free port, which it gives, without pings and compression."""
    config = uvicorn.Config(
        app, port=0, http=http, ws=ws, ws_ping_interval=None, ws_per_message_deflate=False, log_level="error"
    )
    server = _Server(config)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.serve)
        await server.up.wait()
        yield server.servers[0].sockets[0].getsockname()[1]
        server.should_exit = True
