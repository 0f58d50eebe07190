"""An address that leads to one server, and later to another: what a failover looks like to those who use it, or a link
that carries little.
"""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf

import anyio
from anyio.abc import ByteStream, SocketAttribute, TaskGroup, TaskStatus

CHUNK = 16 * 1024


class Door:
    """Forwards connections from `port` to where it leads."""

    def __init__(self, target: int) -> None:
        self.port = 0
        self.rate = inf
        """Bytes per second that are carried, each way, for all connections together."""
        self._target = target
        self._open: set[anyio.CancelScope] = set()
        self._there, self._back = anyio.Lock(), anyio.Lock()

    def lead_to(self, target: int) -> None:
        """From now on lead to another port of this machine; what was connected is cut."""
        self._target = target
        for scope in self._open:
            scope.cancel()

    async def _forward(self, inner: ByteStream) -> None:
        with anyio.CancelScope() as scope:
            self._open.add(scope)
            try:
                async with inner, await anyio.connect_tcp("127.0.0.1", self._target) as outer:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(self._copy, inner, outer, self._there, tasks)
                        tasks.start_soon(self._copy, outer, inner, self._back, tasks)
            except OSError:
                pass  # nobody is there: the connection is closed at once
            finally:
                self._open.discard(scope)

    async def _copy(self, source: ByteStream, sink: ByteStream, way: anyio.Lock, tasks: TaskGroup) -> None:
        """Carry what comes, a little at a time, in turn with the other connections."""
        try:
            while True:
                data = await source.receive(CHUNK)
                if self.rate < inf:
                    async with way:
                        await anyio.sleep(len(data) / self.rate)
                await sink.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream):
            pass
        tasks.cancel_scope.cancel()

    async def serve(self, *, task_status: TaskStatus[None]) -> None:
        """Forward until cancelled."""
        async with await anyio.create_tcp_listener(local_host="127.0.0.1", family=socket.AF_INET) as listener:
            self.port = listener.extra(SocketAttribute.local_port)  # noqa: S610 -- not of Django
            task_status.started()
            await listener.serve(self._forward)


@asynccontextmanager
async def open_door(target: int) -> AsyncIterator[Door]:
    """A door for the time of the context."""
    async with anyio.create_task_group() as tasks:
        door = Door(target)
        await tasks.start(door.serve)
        yield door
        tasks.cancel_scope.cancel()
