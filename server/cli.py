"""The command line: serve a hub, list its agents, start a run and watch it."""

import logging
import os
import socket
from types import FrameType
from typing import Annotated, Any

import anyio
import typer
import uvicorn
from agents.registry import RegistryError, load
from pydantic import ValidationError

from agents import llm
from agents.base import redact
from server import __version__
from server.app import AgentCast
from server.asgi import FrameProtocol
from server.config import Settings
from server.protocol import MESSAGE_BYTES

cli = typer.Typer(
    name="agentcast",
    help="Run many LLM agents at once and let any number of people watch them live.",
    epilog="Start with `agentcast serve`, then open the URL that it prints.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"agentcast {__version__}")
        raise typer.Exit


@cli.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@cli.command()
def serve(
    agents: Annotated[
        str | None,
        typer.Option(
            help="Registries to load, as `package.module:registry`, comma separated. "
            "[env: AGENTCAST_AGENTS; default: the demo agents]"
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to bind. [env: AGENTCAST_HOST; default: 127.0.0.1]")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to bind; 0 takes a free one. [env: AGENTCAST_PORT; default: 8000]")
    ] = None,
    hosts: Annotated[
        str | None,
        typer.Option(
            help="Further host names under which browsers and clients may reach the hub, comma separated; "
            "`*` for any. [env: AGENTCAST_HOSTS]"
        ),
    ] = None,
    lm: Annotated[
        str | None,
        typer.Option(
            help="The language model: any string that `dspy.LM` takes (`openai/gpt-5-mini`, `ollama_chat/llama3`), "
            "or `offline`. Keys come from the provider's usual variables. [env: AGENTCAST_LM; default: offline]"
        ),
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning or error. [env: AGENTCAST_LOG_LEVEL; default: info]")
    ] = None,
) -> None:
    """Start a hub: agents, WebSocket, HTTP and a page, in one process.

    Examples:

    * `agentcast serve` runs the demo agents, without keys or Redis.

    * `agentcast serve --agents shop.agents:registry --port 9000` runs your own.
    """
    given = {"agents": agents, "host": host, "port": port, "hosts": hosts, "lm": lm, "log_level": log_level}
    settings = _settings({name: value for name, value in given.items() if value is not None})
    _set_up_logging(settings.log_level)
    try:
        registry = load(",".join(settings.agents))
    except RegistryError as error:
        raise _failure(str(error)) from None
    try:
        model = llm.configure(settings.lm)
    except ValueError as error:
        raise _failure(f"the language model {settings.lm!r} cannot be used: {error}") from None
    sock = _bind(settings)
    hub = AgentCast({agent.spec.name: agent for agent in registry}, model, settings)
    server = _Server(hub, settings, banner=_banner(hub, model, sock))
    server.run(sockets=[sock])
    logging.shutdown()
    if hub.runs.abandoned:  # their threads would keep the interpreter from exiting, for as long as they like
        os._exit(server.exit_code)
    raise typer.Exit(server.exit_code)


class _Server(uvicorn.Server):
    """uvicorn, except that a stop first ends the runs and lets their last events out.

    Left to itself, uvicorn would close the sockets first.
    """

    def __init__(self, hub: AgentCast, settings: Settings, banner: str) -> None:
        super().__init__(
            uvicorn.Config(
                hub.app,
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
        self._stopping = anyio.CancelScope()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            typer.echo(self._banner)

    async def on_tick(self, counter: int) -> bool:
        if self._hub.crashed is not None:
            self.exit_code = 1
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        with self._stopping:
            await self._hub.stop()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self.force_exit:  # a second Ctrl-C
            self._stopping.cancel()


def _settings(given: dict[str, Any]) -> Settings:
    try:
        return Settings(**given)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)]
        raise _failure("wrong settings: " + "; ".join(lines)) from None


def _bind(settings: Settings) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        where = f"{settings.host}:{settings.port}"
        raise _failure(f"cannot listen on {where}: {reason}; choose another --port (0 takes a free one)") from None


def _banner(hub: AgentCast, model: llm.ModelInfo, sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    shown = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host  # noqa: S104
    names = ", ".join(hub.runs.agents) or "none"
    lines = [
        f"agentcast {__version__} is running at http://{shown}:{port}",
        f"  agents  {names}",
        f"  model   {model.name}" + ("  (offline; set AGENTCAST_LM for a real one)" if model.offline else ""),
        "  stop    Ctrl-C",
    ]
    return "\n".join(lines)


class _Redacting(logging.Formatter):
    """Log lines without the secrets of this process's environment, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _set_up_logging(level: str) -> None:
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise _failure(f"log level {level!r} is none of debug, info, warning, error")
    handler = logging.StreamHandler()
    handler.setFormatter(_Redacting("%(asctime)s %(levelname)-8s %(name)s: %(message)s"))
    logging.basicConfig(level=number, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(max(number, logging.WARNING) if number > logging.DEBUG else number)


def _failure(message: str) -> typer.Exit:
    typer.echo(f"agentcast: {message}", err=True)
    return typer.Exit(2)


def main() -> None:
    cli()


if __name__ == "__main__":
    main()
