"""One connection to an MCP server, from its start to its end: listing its tools, making calls, noticing that it hangs.

It is entered and left by one task, as the SDK demands; calls come in through an inbox. A connection that has ended is
never used again: its owner makes a new one.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from anyio.abc import TaskGroup
from mcp import Client
from mcp.client.subscriptions import ListenNotSupportedError, SubscriptionLost
from mcp.shared.exceptions import MCPError
from mcp_types import METHOD_NOT_FOUND, Implementation, Tool, ToolListChangedNotification
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from agentcast.agents.mcp.calls import Call, sendable
from agentcast.agents.mcp.results import LEFT_OUT
from agentcast.agents.mcp.sources import Source
from agentcast.agents.mcp.stdio import StdioLog
from agentcast.agents.mcp.transports import explain, transport
from agentcast.agents.mcp.words import clean_error

PING_EVERY = 15.0
"""Seconds of idleness after which a server is asked whether it lives."""
PING_TIMEOUT = 10.0
RELISTEN_AFTER = 5.0
MAX_TOOLS = 2_000

_CLIENT = Implementation(name="agentcast", version="1")
_log = logging.getLogger(__name__)


Listed = Callable[[list[Tool], list[str]], Awaitable[None]]
"""Takes the tools of a listing, and what of it could not be used."""


class Lost(Exception):
    """The connection cannot be used any more; the text says why."""


class Connection:
    """A connection that is being made, or stands. `run` is its life."""

    def __init__(self, name: str, source: Source) -> None:
        self.log = StdioLog(name)
        self._name = name
        self._source = source
        self._calls: set[Call] = set()
        self._inbox, self._arriving = anyio.create_memory_object_stream[Call](1_000)
        self._doubt = anyio.Event()
        self._stale = anyio.Event()
        self._ended = False

    async def run(self, within: float, listed: Listed, lost: Callable[[], None]) -> None:
        """Connect within `within` seconds and serve until the connection is lost. `listed` is given the tools, at first
        and whenever they have changed; `lost` is called as soon as no more calls can be made, while the server's
        process, say, is still to be ended.

        :raises Exception: always, unless cancelled; `reason` says for people what it means.
        """
        try:
            with self._inbox, self._arriving, anyio.CancelScope(deadline=anyio.current_time() + within) as starting:
                async with Client(
                    transport(self._source, self._end, self.log),
                    cache=None,
                    client_info=_CLIENT,
                    message_handler=self._hear,
                ) as client:
                    # Structured content goes to a model and a page, not to code: checking it against a schema, on the
                    # event loop, would take seconds for a large one (G3).
                    client.session.validate_tool_result = _unchecked  # type: ignore[method-assign]
                    await listed(*await _tools(client))
                    starting.deadline = float("inf")
                    try:
                        await self._serve(client, listed)
                    finally:
                        lost()
                        for call in self._calls:
                            call.drop()
            raise Lost(f"it did not start within {within:g} s")
        finally:
            for call in self._calls:
                call.drop()

    def call(self, tool: str, args: dict[str, Any], timeout: float) -> Call:
        """Have `tool` called.

        :raises ToolError: its arguments cannot be sent.
        """
        call = Call(tool, sendable(args), timeout)
        self._calls.add(call)
        try:
            self._inbox.send_nowait(call)
        except (anyio.WouldBlock, anyio.ClosedResourceError, anyio.BrokenResourceError):
            self._calls.discard(call)
            call.drop()
        return call

    def reason(self, error: BaseException) -> str:
        """Why `run` ended with `error`, fit for clients."""
        leaf = error
        while isinstance(leaf, BaseExceptionGroup):
            leaf = leaf.exceptions[0]
        known = explain(self._source, leaf, self.log)
        if known is None and isinstance(leaf, Lost):
            known = str(leaf)
        if known is None and self._ended:
            known = "it closed the connection"
        if known is None and isinstance(leaf, MCPError):
            known = f"it answered with an error: {clean_error(leaf.message) or leaf.code}"
        if known is None:
            known = f"it does not speak MCP ({type(leaf).__name__})"
        if self.log.rubbish:
            known += f"; it wrote {self.log.rubbish} lines to stdout that are no messages"
        return known

    # -- Inside ----------------------------------------------------------------------------------------------------

    async def _serve(self, client: Client, listed: Listed) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._take_calls, client, tasks)
            tasks.start_soon(self._watch, client)
            tasks.start_soon(self._follow_changes, client)
            while True:
                await self._stale.wait()
                self._stale = anyio.Event()
                try:
                    await listed(*await _tools(client))
                except MCPError as error:  # it has those that it had; `_watch` finds out whether it lives
                    _log.warning("MCP server %s does not list its tools again: %s", self._name, error.message)
                    self._doubt.set()

    async def _take_calls(self, client: Client, tasks: TaskGroup) -> None:
        async for call in self._arriving:
            tasks.start_soon(self._make, client, call)

    async def _make(self, client: Client, call: Call) -> None:
        try:
            await call.make(client)
        finally:
            self._calls.discard(call)
        if call.doubtful:
            self._doubt.set()

    async def _watch(self, client: Client) -> None:
        """Ask whether the server lives: when there is reason for doubt, and now and then while it has nothing to do.

        One that works on a call may have no time to answer.
        """
        while True:
            with anyio.move_on_after(PING_EVERY):
                await self._doubt.wait()
            if self._doubt.is_set() or not self._calls:
                self._doubt = anyio.Event()
                await self._ping(client)

    async def _ping(self, client: Client) -> None:
        try:
            with anyio.fail_after(PING_TIMEOUT):
                if client.protocol_version in MODERN_PROTOCOL_VERSIONS:  # which have no ping
                    await client.session.send_discover(client.protocol_version)
                else:
                    await client.session.send_ping()
        except TimeoutError:
            raise Lost("it hangs: it answers nothing") from None
        except MCPError as error:
            if error.code != METHOD_NOT_FOUND:  # which is an answer, too
                raise Lost("the connection was lost") from error

    async def _hear(self, message: Any) -> None:
        if isinstance(message, ToolListChangedNotification):
            self._stale.set()

    async def _follow_changes(self, client: Client) -> None:
        """Protocols since 2026 report changes to those who ask for it only."""
        while True:
            try:
                async with client.listen(tools_list_changed=True) as changes:
                    async for _ in changes:
                        self._stale.set()
            except (ListenNotSupportedError, MCPError):
                return
            except SubscriptionLost:
                _log.debug("MCP server %s: the subscription to changes was lost", self._name)
            await anyio.sleep(RELISTEN_AFTER)
            self._stale.set()  # nothing reported what changed meanwhile

    def _end(self) -> None:
        self._ended = True
        self._doubt.set()


async def _tools(client: Client) -> tuple[list[Tool], list[str]]:
    """All that `client` lists, and what of it could not be used."""
    tools: list[Tool] = []
    left_out: list[str] = []
    cursors: set[str | None] = set()
    cursor: str | None = None
    while cursor not in cursors:
        cursors.add(cursor)
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        names = {tool.name for tool in page.tools}
        left_out += [reason for name, reason in (page.meta or {}).get(LEFT_OUT, ()) if name not in names]
        if len(tools) > MAX_TOOLS or len(cursors) > MAX_TOOLS:
            raise Lost(f"it has more than {MAX_TOOLS} tools")
        cursor = page.next_cursor or None
    return tools, left_out


async def _unchecked(name: str, result: Any) -> None:
    pass
