"""Keeping MCP servers: for a hub, for a script, and to look whether they work."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import anyio

from agentcast.agents.mcp.server import START_TIMEOUT, McpServer, ServerStatus


async def supervise(servers: Iterable[McpServer]) -> None:
    """Keep `servers`, each by a task of its own, until cancelled; all have ended when this returns."""
    async with anyio.create_task_group() as tasks:
        for server in servers:
            tasks.start_soon(server.keep, name=f"MCP server {server.name}")


@asynccontextmanager
async def running(*servers: McpServer, within: float = START_TIMEOUT) -> AsyncIterator[None]:
    """Keep `servers` inside of the block, which begins when each is up or has failed to start, or after `within`
    seconds. Those that failed are tried on, and say why when their tools are called."""
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(supervise, dict.fromkeys(servers))
        with anyio.move_on_after(within):
            await _tried(servers)
        try:
            yield
        except Exception as error:  # noqa: BLE001 -- raised below, where no task group wraps it
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def check(servers: Iterable[McpServer], within: float = START_TIMEOUT) -> list[ServerStatus]:
    """Start `servers`, say how each stands after its first attempt or after `within` seconds, and end them.

    One that nobody has defined counts as stopped, and one that is running already is left as it is.
    """
    given = list(dict.fromkeys(servers))
    idle = [server for server in given if server.defined and server.status.state == "stopped"]
    async with running(*idle, within=within):
        return [server.status for server in given]


async def _tried(servers: Iterable[McpServer]) -> None:
    async with anyio.create_task_group() as tasks:
        for server in servers:
            tasks.start_soon(server.tried)
