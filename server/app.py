"""The composition root: the one place where the parts of a hub are put together."""

import logging
import resource
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from secrets import token_hex
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute

from agentcast.agents.base import Agent
from agentcast.agents.llm import ModelInfo, close_connections
from agentcast.agents.mcp import supervise
from agentcast.agents.registry import servers_used
from agentcast.server.bus.base import Bus
from agentcast.server.bus.memory import MemoryBus
from agentcast.server.config import Settings
from agentcast.server.edge.admission import ADMISSION, Admission
from agentcast.server.edge.connections import Connections
from agentcast.server.edge.costs import Costs
from agentcast.server.edge.http import Api, Guard, no_route
from agentcast.server.hub.hub import Hub
from agentcast.server.runs.runs import Runs
from agentcast.server.runs.watchdog import Watchdog

CLOSING = 2.0
"""Seconds that idle connections to LM providers get to close."""

logger = logging.getLogger(__name__)


class AgentCast:
    """One hub: its parts, and the order in which they start and stop. `app` is what an ASGI server serves.

    :raises RegistryError: the MCP servers of the agents are not defined, or go by one name.
    """

    def __init__(
        self, agents: Mapping[str, Agent], model: ModelInfo, settings: Settings, bus: Bus | None = None
    ) -> None:
        worker = f"w-{token_hex(4)}"
        self.bus: Bus = bus or _bus(settings, worker)
        self.hub = Hub(self.bus)
        self.runs = Runs(self.bus, agents, settings, worker)
        self.admission = Admission(
            settings.max_connections,
            settings.max_connections_per_address,
            _descriptors(),
            settings.trusted_proxies,
        )
        costs = Costs()
        self.connections = Connections(
            self.hub, self.runs, settings, self.admission, costs, degraded=lambda: self.bus.degraded
        )
        self.watchdog = Watchdog()
        self.mcp_servers = servers_used(agents.values())
        self.crashed: str | None = None
        """The part that broke, if one did: the hub is not ready from then on, and its server should exit."""
        self._started = False
        self._stopping = False
        api = Api(self.bus, self.hub, self.runs, costs, model, ready=lambda: self.ready)
        self.app = Starlette(
            routes=[*api.routes, WebSocketRoute("/ws", self.connections.endpoint)],
            middleware=[Middleware(Guard, allowed=settings.allowed_hosts)],
            exception_handlers={HTTPException: no_route},
            lifespan=self._lifespan,
        )

    @property
    def ready(self) -> bool:
        """Whether the hub takes new runs."""
        return self._started and not self._stopping and self.crashed is None

    async def stop(self) -> None:
        """End in order: no new runs, running ones end, their last events go out, then the clients are let go."""
        if self._stopping:
            return
        self._stopping = True
        await self.runs.stop()
        await self.connections.close()

    def hurry(self) -> None:
        """Stop without waiting for running runs to finish."""
        self.runs.hurry()

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[dict[str, Any]]:
        async with anyio.create_task_group() as tasks:
            await tasks.start(self._guarded, "bus", self.bus.run)
            await tasks.start(self._guarded, "hub", self.hub.run)
            await tasks.start(self._guarded, "runs", self.runs.serve)
            await tasks.start(self._guarded, "connections", self.connections.serve)
            tasks.start_soon(self._guarded, "watchdog", self.watchdog.run)
            tasks.start_soon(self._guarded, "MCP servers", lambda: supervise(self.mcp_servers))
            self._started = True
            try:
                yield {ADMISSION: self.admission}
            finally:
                await self.stop()
                tasks.cancel_scope.cancel()
        with anyio.move_on_after(CLOSING, shield=True):
            await close_connections()
        await self.bus.aclose()

    async def _guarded(
        self,
        part: str,
        run: Callable[..., Awaitable[None]],
        *,
        task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run one part. If it crashes, the hub must not go on answering as if nothing had happened."""
        try:
            if task_status is anyio.TASK_STATUS_IGNORED:
                await run()
            else:
                await run(task_status=task_status)
        except Exception:
            logger.critical("%s crashed; this hub is going down", part, exc_info=True)
            self.crashed = part


def _descriptors() -> int:
    """How many this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def _bus(settings: Settings, worker: str) -> Bus:
    if settings.redis is None:
        return MemoryBus()
    from agentcast.server.bus.redis import RedisBus  # 70 ms that a hub without Redis need not wait

    return RedisBus(settings.redis.get_secret_value(), worker, prefix=settings.redis_prefix)
