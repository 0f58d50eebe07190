"""An MCP server that agents use: what it is, how it stands, and its tools.

One task owns it (`McpServer.keep`): starts it, restarts it with growing pauses when it dies or hangs, and ends it. Any
number of agents and runs share it. It is one connection at a time, on one event loop.
"""

import functools
import importlib
import logging
import random
import re
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anyio
from anyio.lowlevel import EventLoopToken, current_token

from agentcast.agents.base import ToolError, redact
from agentcast.agents.context import current
from agentcast.agents.events import ToolProgress
from agentcast.agents.mcp.sources import Http, InProcess, Source, Stdio, is_address
from agentcast.agents.mcp.tools import McpTool, make_tools
from agentcast.agents.values import cut_text

if TYPE_CHECKING:
    from mcp_types import Tool

    from agentcast.agents.mcp.connection import Connection

CALL_TIMEOUT = 120.0
START_TIMEOUT = 30.0
"""Seconds in which a server has to start and to list its tools."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between attempts to start: the first pause; each is twice the one before, up to the longest."""
STEADY_AFTER = 30.0
"""Seconds after which a connection counts as good, and the pauses start from the first again."""
MAX_PROBLEMS, PROBLEM_BYTES = 20, 1_000
"""Entries of a listing that are named as unusable, and the size of what is said of one."""
RETRY_PATIENCE = 10.0
"""Seconds that a run waits for a server whose newest start has failed."""

State = Literal["stopped", "starting", "up", "down"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_log = logging.getLogger(__name__)


class McpUnavailable(ToolError):
    """A server cannot be used at the moment."""


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """How a server stands. `reason` says why it is down, fit for clients; `problems` what of its tools cannot be used,
    or not be checked."""

    name: str
    kind: str
    state: State
    reason: str | None
    tools: int
    problems: tuple[str, ...] = ()


class McpServer(anyio.AsyncContextManagerMixin):
    """An MCP server by name. Made by `mcp_server`; what is secret in its description is never shown.

    A hub keeps the servers of its agents running. Elsewhere `async with server:` runs it inside of the block.
    """

    def __init__(self, name: str, source: Source | None = None, timeout: float = CALL_TIMEOUT) -> None:
        self.name = name
        self.tools: tuple[McpTool, ...] = ()
        """Of the newest listing. Each listing is a tuple of its own, so that identity distinguishes it."""
        self._source = source
        self._timeout = timeout
        self._state: State = "stopped"
        self._reason: str | None = None
        self._problems: tuple[str, ...] = ()
        self._connection: Connection | None = None
        self._loop: EventLoopToken | None = None
        self._keeper = anyio.Lock()
        self._settled = anyio.Event()
        """Set when the attempt to start that is going on has succeeded or failed."""

    def __repr__(self) -> str:
        return f"<McpServer {self.name} ({self.kind}, {self._state})>"

    def __deepcopy__(self, memo: Any) -> "McpServer":
        return self  # copies of a program use the same server

    @property
    def kind(self) -> str:
        """`stdio`, `http`, `in-process`; `undefined` as long as only its name is known."""
        return "undefined" if self._source is None else self._source.kind

    @property
    def defined(self) -> bool:
        return self._source is not None

    @property
    def status(self) -> ServerStatus:
        return ServerStatus(self.name, self.kind, self._state, self._reason, len(self.tools), self._problems)

    @property
    def unavailable(self) -> str | None:
        """Why it cannot be used: the newest attempt to start it failed. `None` while it is being tried."""
        return f"MCP server {self.name}: {self._reason}" if self._reason is not None else None

    def define_as(self, other: "McpServer") -> None:
        """Be what `other` is; of this one only the name was known, or an older description."""
        self._source, self._timeout = other._source, other._timeout

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncIterator["McpServer"]:
        async with running(self):
            yield self

    # -- For runs --------------------------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Wait until it is connected, for a while.

        :raises McpUnavailable: it is not; the text says why.
        """
        await self._connected()

    async def call(self, tool: str, args: dict[str, Any]) -> Any:
        """Call a tool, reporting its progress to the run that this happens in. Gives plain, bounded data.

        :raises ToolError: it failed, took too long, its arguments cannot be sent, or the server is not available.
        """
        connection = await self._connected()
        call = connection.call(tool, args, self._timeout)
        emit, span = current().emitter, current().span
        try:
            async for progress, total, message in call.progress():
                if emit is not None and span is not None:
                    await emit.send(ToolProgress(span=span, progress=progress, total=total, message=message))
        finally:
            call.cancel()
        return call.result()

    async def _connected(self) -> "Connection":
        if self._state == "stopped":
            raise McpUnavailable(f"MCP server {self.name} is not running: use `async with`, or a hub")
        if self._loop != current_token():
            raise McpUnavailable(f"MCP server {self.name} can be used on its own event loop only: call it with `await`")
        if self._connection is None:
            with anyio.move_on_after(START_TIMEOUT if self._reason is None else RETRY_PATIENCE):
                await self._settled.wait()
        if self._connection is None:
            raise McpUnavailable(self.unavailable or f"MCP server {self.name} is being started; try again")
        return self._connection

    # -- For its owner ---------------------------------------------------------------------------------------------

    async def keep(self) -> None:
        """Start it and keep it running, until cancelled. Its end is complete when this returns.

        While another task keeps it, this waits, and takes over when they end.

        :raises RuntimeError: it is not defined.
        """
        if self._source is None:
            raise RuntimeError(f"MCP server {self.name} is not defined")
        async with self._keeper:
            self._loop, self._state = current_token(), "starting"
            try:
                await self._live(self._source)
            finally:
                self._state, self._reason, self._connection, self.tools = "stopped", None, None, ()
                self._problems = ()
                self._settled = anyio.Event()

    async def tried(self) -> None:
        """Wait until the attempt to start it that is going on has succeeded or failed."""
        await self._settled.wait()

    async def _live(self, source: Source) -> None:
        pause = FIRST_PAUSE
        while True:
            steady = await self._live_once(source)
            pause = FIRST_PAUSE if steady else pause
            await anyio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 -- so that not all come at once
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _live_once(self, source: Source) -> bool:
        """One connection, from start to end. Gives whether it stood for a good while."""
        # Importing the SDK takes half a second: only a server that runs needs it, and a hub serves meanwhile.
        connecting = await anyio.to_thread.run_sync(importlib.import_module, "agentcast.agents.mcp.connection")
        connection: Connection = connecting.Connection(self.name, source)
        up_since: float | None = None

        async def listed(tools: "Sequence[Tool]", left_out: Sequence[str]) -> None:
            nonlocal up_since
            self.tools = await make_tools(self, tools)
            self._note_problems(left_out)
            if up_since is None:
                up_since = anyio.current_time()
                _log.info("MCP server %s is up, with %d tools", self.name, len(self.tools))
                self._connection, self._state, self._reason = connection, "up", None
                self._settled.set()

        def lost() -> None:
            self._connection, self._state, self._settled = None, "starting", anyio.Event()

        try:
            await connection.run(START_TIMEOUT, listed, lost)
        except Exception as error:  # noqa: BLE001 -- a server may fail in any way; the hub must not
            self._lose(connection.reason(error), was_up=up_since is not None)
            _log.debug("MCP server %s", self.name, exc_info=error)
        return up_since is not None and anyio.current_time() - up_since >= STEADY_AFTER

    def _note_problems(self, left_out: Sequence[str]) -> None:
        unchecked = [(tool.name, tool.problem) for tool in self.tools if tool.problem]
        found = [*left_out, *(f"the arguments of tool {name!r} are not checked: {why}" for name, why in unchecked)]
        if len(found) > MAX_PROBLEMS:
            found[MAX_PROBLEMS:] = [f"and {len(found) - MAX_PROBLEMS} more of this kind"]
        problems = tuple(redact(cut_text(problem, PROBLEM_BYTES)) for problem in found)
        for problem in problems:
            if problem not in self._problems:
                _log.warning("MCP server %s: %s", self.name, problem)
        self._problems = problems

    def _lose(self, reason: str, *, was_up: bool) -> None:
        if was_up:
            _log.warning("MCP server %s: %s; starting it again", self.name, reason)
            return
        if reason != self._reason:
            _log.warning("MCP server %s cannot be started: %s; still trying", self.name, reason)
        self._state, self._reason = "down", reason
        self._settled.set()
        self._settled = anyio.Event()


def mcp_server(
    name: str,
    *,
    command: str | None = None,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    url: str | None = None,
    headers: Mapping[str, str] | None = None,
    token: str | None = None,
    server: Any = None,
    timeout: float = CALL_TIMEOUT,
) -> McpServer:
    """An MCP server, to be given to agents among their tools.

    It is a `command` (with `args`, `env` besides what every process needs, and `cwd`), or a `url` (with `headers`, and
    `token` for `Authorization: Bearer`), or a `server` object of the SDK in this process. With the name alone it is the
    one of that name in the file given as `--mcp-config`. `timeout` is that of one call, in seconds.

    The same object means the same process or connection, however many agents use it.

    :raises ValueError: the name is wrong, or what is given does not go together.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"MCP server {name!r}: the name must be of letters, digits, _, - and ., at most 64 of them")
    if not timeout > 0:
        raise ValueError(f"MCP server {name!r}: timeout is {timeout}; give it a number of seconds above 0")
    ways = [way for way, value in (("command", command), ("url", url), ("server", server)) if value is not None]
    if len(ways) > 1:
        raise ValueError(f"MCP server {name!r}: it is either of {' and '.join(ways)}, not both")
    _check_options(name, ways, {"command": (args, env, cwd), "url": (headers, token)})
    if command is not None:
        return McpServer(name, Stdio(command, tuple(args), dict(env or {}), None if cwd is None else str(cwd)), timeout)
    if url is not None:
        if not is_address(url):
            raise ValueError(f"MCP server {name!r}: its url must begin with http:// or https:// and a host")
        bearer = {} if token is None else {"Authorization": f"Bearer {token}"}
        return McpServer(name, Http(url, {**(headers or {}), **bearer}), timeout)
    return named_server(name) if server is None else McpServer(name, InProcess(server), timeout)


def _check_options(name: str, ways: Sequence[str], options: Mapping[str, Sequence[Any]]) -> None:
    spelled = {"command": "args, env and cwd", "url": "headers and token"}
    for way, values in options.items():
        if way not in ways and any(values):
            raise ValueError(f"MCP server {name!r}: {spelled[way]} go with {way}=… only")


@functools.cache
def named_server(name: str) -> McpServer:
    """The server that a configuration file defines by `name`: the same object for all that name it."""
    return McpServer(name)


# -- Keeping servers -----------------------------------------------------------------------------------------------


def distinct(servers: Iterable[McpServer]) -> tuple[McpServer, ...]:
    """`servers`, each once.

    :raises ValueError: two different ones have one name.
    """
    found: dict[str, McpServer] = {}
    for server in servers:
        if found.setdefault(server.name, server) is not server:
            raise ValueError(f"there are two MCP servers named {server.name!r}: use one object for both, or rename one")
    return tuple(found.values())


def servers_of(program: Any) -> tuple[McpServer, ...]:
    """The MCP servers that a `dspy.Module` and the modules in it use.

    :raises ValueError: two different ones have one name.
    """
    return distinct(server for _, part in program.named_sub_modules() for server in getattr(part, "servers", ()))


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
            await tried(servers)
        try:
            yield
        except Exception as error:  # noqa: BLE001 -- raised below, where no task group wraps it
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def check(servers: Iterable[McpServer], within: float = START_TIMEOUT) -> list[ServerStatus]:
    """Start `servers`, report how each stands after its first attempt or after `within` seconds, and end them.

    One that is not defined counts as stopped, and one that is running already is left as it is.
    """
    given = list(dict.fromkeys(servers))
    idle = [server for server in given if server.defined and server.status.state == "stopped"]
    async with running(*idle, within=within):
        return [server.status for server in given]


async def tried(servers: Iterable[McpServer]) -> None:
    """Wait until the attempts to start `servers` that are going on have succeeded or failed."""
    async with anyio.create_task_group() as tasks:
        for server in servers:
            tasks.start_soon(server.tried)
