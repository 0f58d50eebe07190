"""A hub as a process: settings in, exit code out. The socket, the log, uvicorn, and the order of a stop (G6).

Kept apart from the command line because it loads everything that agents need, which takes a second: commands that only
talk to a hub should not wait for it.
"""

import asyncio
import logging
import os
import resource
import socket
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

import anyio
import typer
import uvicorn
import uvloop

from agentcast import __version__
from agentcast.agents import llm
from agentcast.agents.base import redact
from agentcast.agents.mcp import McpConfigError, load_servers, tried
from agentcast.agents.registry import RegistryError, add_assistant, load
from agentcast.server.app import AgentCast
from agentcast.server.cli.collector import Collector, freeze_heap
from agentcast.server.config import Settings
from agentcast.server.edge.http_protocol import HttpProtocol
from agentcast.server.edge.websocket import FrameProtocol
from agentcast.server.errors import BusError
from agentcast.server.protocol import MESSAGE_BYTES

DESCRIPTORS = 65_536
LEAVING = 1.0
"""Seconds that tasks which agents have left behind get to end, once the hub has stopped."""

logger = logging.getLogger(__name__)


class CannotServe(Exception):
    """The hub cannot start; the text says why and what to do."""


def serve(settings: Settings) -> int:
    """Run a hub until a signal stops it; gives the process's exit code.

    :raises CannotServe: an agent, the model, the Redis, the address or the log level is wrong.
    """
    set_up_logging(settings.log_level)
    raise_descriptor_limit()
    try:
        servers = load_servers(settings.mcp_config) if settings.mcp_config else []
        registry = add_assistant(load(",".join(settings.agents)), servers)
        model = llm.configure(settings.lm, retrying(settings))
        redis = None
        if settings.redis is not None:
            from agentcast.server.bus.redis import check  # 70 ms that a hub without Redis need not wait

            redis = anyio.run(check, settings.redis.get_secret_value(), settings.redis_prefix)
        hub = AgentCast({agent.spec.name: agent for agent in registry}, model, settings)
    except (RegistryError, McpConfigError, llm.ModelError, BusError) as error:
        raise CannotServe(str(error)) from None
    sock = bind(settings)
    server = _Server(hub, settings, banner=_banner(hub, model, redis, sock))
    anyio.run(_serve, server, sock, backend_options={"loop_factory": _Loop})
    return server.exit_code


class _Loop(uvloop.Loop):
    """An event loop that goes on when a task raises `SystemExit` or `KeyboardInterrupt` (G9).

    asyncio lets these out of the loop, besides giving them to those who wait for the task. A task of an agent may raise
    them, and ends its run by that. Signals come to `_Server.handle_exit`, and are no exceptions.
    """

    def run_until_complete(self, future: Any) -> Any:
        task = asyncio.ensure_future(future, loop=self)  # noqa: TID251 -- as every loop does
        while True:
            try:
                return super().run_until_complete(task)
            except (SystemExit, KeyboardInterrupt) as error:
                if task.done():
                    raise
                logger.error("a task raised %s; the hub goes on", type(error).__name__, exc_info=error)


async def _serve(server: "_Server", sock: socket.socket) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.freeze_again)
        tasks.start_soon(server.collector.run)
        await server.serve([sock])
        tasks.cancel_scope.cancel()
    if not await _end_tasks():
        _exit(server.exit_code)


async def _end_tasks() -> bool:
    """Cancel what still runs, tasks of agents; whether they end, in bounded time. The runner would wait for ever."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    return not tasks or not (await asyncio.wait(tasks, timeout=LEAVING))[1]


def _exit(code: int) -> NoReturn:
    """End the process without waiting for what agents have left behind (G6)."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


def retrying(settings: Settings) -> llm.Retrying:
    """How LM calls are retried."""
    return llm.Retrying(
        attempts=settings.lm_attempts,
        patience=settings.lm_patience,
        backoff=settings.lm_backoff,
        idle=settings.lm_idle,
    )


def raise_descriptor_limit() -> None:
    """Let this process open as many descriptors as the system allows it, up to `DESCRIPTORS`: the usual limit, 1,024,
    is one of programs that use `select`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # macOS has a further limit, which it does not report
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Server(uvicorn.Server):
    """uvicorn, except that a stop first ends the runs and lets their last events out.

    Left to itself, uvicorn would close the sockets first.
    """

    def __init__(self, hub: AgentCast, settings: Settings, banner: str) -> None:
        super().__init__(
            uvicorn.Config(
                hub.app,
                http=HttpProtocol,
                ws=FrameProtocol,
                ws_max_size=MESSAGE_BYTES,
                ws_ping_interval=None,
                ws_per_message_deflate=False,
                timeout_graceful_shutdown=5,
                lifespan="on",
                log_config=None,
                access_log=settings.log_level == "debug",
                server_header=False,
            )
        )
        self._hub = hub
        self._banner = banner
        self.exit_code = 0
        self.collector = Collector(lambda: hub.runs.active, lambda: hub.runs.ended)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            freeze_heap()
            typer.echo(self._banner)

    async def freeze_again(self) -> None:
        """Freeze what the first MCP server has loaded: it starts while the hub serves already."""
        if self._hub.mcp_servers:
            await tried(self._hub.mcp_servers)
            freeze_heap()

    async def on_tick(self, counter: int) -> bool:
        if self._hub.crashed is not None:
            self.exit_code = 1
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._hub.stop()
        await super().shutdown(sockets)
        if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
            # A cancelled run may have left it behind. asyncio and the interpreter would wait for it, however long.
            _exit(self.exit_code)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: stop; a second one: at once. uvicorn would raise it again in the end, and so die of it."""
        if self.should_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self._hub.hurry)
        self.should_exit = True


def bind(settings: Settings) -> socket.socket:
    """The socket that a hub listens on.

    :raises CannotServe: the address cannot be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        where = f"{settings.host}:{settings.port}"
        raise CannotServe(f"cannot listen on {where}: {reason}; choose another --port (0 takes a free one)") from None


def _banner(hub: AgentCast, model: llm.ModelInfo, redis: str | None, sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    shown = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host  # noqa: S104
    names = ", ".join(hub.runs.agents) or "none"
    lines = [
        f"agentcast {__version__} is running at http://{shown}:{port}",
        f"  agents  {names}",
        f"  model   {model.name}{_remark(model)}",
        *([] if redis is None else [f"  redis   {redis}"]),
        "  stop    Ctrl-C",
    ]
    return "\n".join(lines)


def _remark(model: llm.ModelInfo) -> str:
    if model.offline:
        return "  (offline; set AGENTCAST_LM for a real one)"
    return f"  (cannot be called: {model.missing_key} is not set)" if model.missing_key else ""


class _Redacting(logging.Formatter):
    """Log lines without the secrets of this process's environment, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def set_up_logging(level: str) -> None:
    """Log to stderr, without secrets.

    :raises CannotServe: there is no such level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise CannotServe(f"log level {level!r} is none of debug, info, warning, error")
    handler = logging.StreamHandler()
    handler.setFormatter(_Redacting("%(asctime)s %(levelname)-8s %(name)s: %(message)s"))
    logging.basicConfig(level=number, handlers=[handler], force=True)
    # Each request to an MCP server would be a line.
    logging.getLogger("httpx2").setLevel(number if number <= logging.DEBUG else max(number, logging.WARNING))
    logging.getLogger("uvicorn").setLevel(max(number, logging.WARNING) if number > logging.DEBUG else number)
