"""A hub on a bus whose answers a test holds back, and one run: the stage of tests that put one race on purpose."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio
import orjson
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from agentcast.server.bus.base import Created
from agentcast.server.hub.hub import Hub
from agentcast.server.protocol import Start
from tests.model.world import Connection, Run
from tests.support.buses import HeldBus


class _Starter:
    """Stands in for `Runs`."""

    active = 0

    def __init__(self, scene: "Scene") -> None:
        self._scene = scene

    async def start(self, principal: str, command: Start, starter: object) -> Created:
        return await self._scene.create(command.agent, command.thread)


class Scene:
    """A hub on such a bus, and one run."""

    def __init__(self, bus: HeldBus, hub: Hub, tasks: TaskGroup) -> None:
        self.bus = bus
        self.run = Run(0, "ant", "t")
        self.hub = hub
        self._tasks = tasks
        self.started: list[Run] = []
        self._ids = 0

    async def create(self, agent: str = "ant", thread: str | None = None) -> Created:
        """Another run; the newest is the last of `started`."""
        self.started.append(Run(len(self.started) + 1, agent, thread))
        return await self.started[-1].create(self.bus)

    async def connect(self) -> Connection:
        connection = Connection(self.hub, _Starter(self), queue_frames=100)
        await self._tasks.start(connection.serve)
        return connection

    async def subscribe(self, connection: Connection, **fields: Any) -> None:
        self._ids += 1
        command = {"op": "subscribe", "id": self._ids, "to": {"run": self.run.id}} | fields
        await connection.send(command)

    async def unsubscribe(self, connection: Connection, subscription: str) -> None:
        self._ids += 1
        await connection.send({"op": "unsubscribe", "id": self._ids, "subscription": subscription})

    async def start(self, connection: Connection, agent: str = "ant") -> None:
        self._ids += 1
        await connection.send({"op": "start", "id": self._ids, "agent": agent, "input": {}})

    async def turns(self, count: int = 100) -> None:
        for _ in range(count):
            await checkpoint()

    async def frames(self, connection: Connection) -> list[dict[str, Any]]:
        """All that comes until nothing does any more."""
        await self.turns()
        return [
            cast(dict[str, Any], orjson.loads(payload))
            for batch in connection.outbox.take()
            for payload in batch.payloads
        ]


@asynccontextmanager
async def playing(**options: Any) -> AsyncIterator[Scene]:
    """`options` are the bus's."""
    bus = HeldBus(**options)
    hub = Hub(bus)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            await tasks.start(hub.run)
            scene = Scene(bus, hub, tasks)
            await scene.run.create(bus)
            yield scene
            tasks.cancel_scope.cancel()


def brief(frames: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{frame['type']} {frame.get('seq', '')}".strip() for frame in frames]
