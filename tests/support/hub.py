"""A hub in this process, behind a real server on a free port."""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import httpx
import pytest
import uvicorn

from agentcast.server.app import AgentCast
from agentcast.server.bus.base import Bus
from agentcast.server.bus.memory import MemoryBus
from agentcast.server.config import Settings
from agentcast.server.edge.http_protocol import HttpProtocol
from agentcast.server.edge.websocket import FrameProtocol
from agentcast.server.protocol import MESSAGE_BYTES
from tests.support.agents import OFFLINE, FunctionAgent
from tests.support.client import Client, connect

ws_protocol: Any = FrameProtocol


@pytest.fixture(params=["handed over", "plain"])
def each_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test twice: with sockets that are handed over, and on uvicorn as it is."""
    if request.param == "plain":
        monkeypatch.setattr("tests.support.hub.ws_protocol", "websockets-sansio")


@dataclass
class RunningHub:
    """`core` is the hub itself, for tests that look inside."""

    core: AgentCast
    server: "_Server"
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    @asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[Client]:
        """A strict client that has been greeted."""
        async with connect(self.ws_url, **options) as client:
            yield client

    @asynccontextmanager
    async def http(self) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(base_url=self.url, trust_env=False) as http:
            yield http

    async def stop(self) -> None:
        """As `agentcast serve` does on a signal: first the hub, then its server."""
        await self.core.stop()
        self.server.stop_requested.set()

    def log(self, run: str) -> Any:
        """The memory bus's log of a run, for its subscribers."""
        assert isinstance(self.core.bus, MemoryBus)
        return self.core.bus._logs[run]

    def tasks(self) -> int:
        """Tasks on this loop: the hub's, its server's and the test's."""
        return len(anyio.get_running_tasks())

    async def left(self, condition: Callable[[], bool]) -> None:
        """Wait until so many connections have left that `condition` holds."""
        with anyio.fail_after(20):
            while not condition():
                self.core.connections._gone = anyio.Event()
                await self.core.connections._gone.wait()

    async def idle(self) -> None:
        """Wait until every connection is gone, and see that nothing is left of what they followed."""
        await self.left(lambda: len(self.core.connections) == 0)
        assert not self.core.hub.topics
        assert not len(self.core.hub.rules)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = anyio.Event()
        self.stop_requested = anyio.Event()
        self.down = anyio.Event()

    async def run_until_stopped(self) -> None:
        try:
            await self.serve()
        finally:
            self.down.set()

    async def main_loop(self) -> None:
        await self.stop_requested.wait()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


@asynccontextmanager
async def open_hub(*agents: FunctionAgent, bus: Bus | None = None, **settings: Any) -> AsyncIterator[RunningHub]:
    """Serve `agents`. Graces are short unless `settings` says otherwise, so that nothing waits in vain."""
    core = AgentCast(
        {agent.spec.name: agent for agent in agents},
        OFFLINE,
        Settings(**{"grace": 0.0, "cancel_grace": 0.3} | settings),
        bus,
    )
    server = _Server(
        uvicorn.Config(
            core.app,
            port=0,
            http=HttpProtocol,
            ws=ws_protocol,
            ws_max_size=MESSAGE_BYTES,
            ws_ping_interval=None,
            ws_per_message_deflate=False,
            timeout_graceful_shutdown=5,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
        )
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.run_until_stopped)
        with anyio.fail_after(20):
            await server.up.wait()
        hub = RunningHub(core, server, server.servers[0].sockets[0].getsockname()[1])
        try:
            yield hub
        finally:
            with anyio.move_on_after(20, shield=True):
                await hub.stop()
                await server.down.wait()
    assert core.crashed is None
