"""The command line: what commands there are, and what they take.

Each command imports what does its work when it is called: `--help` should not wait for DSPy, nor `agentcast run` for a
web server.
"""

import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agentcast import __version__
from agentcast.server.cli.exits import FAILED, failure

if TYPE_CHECKING:
    from agentcast.server.config import Settings

cli = typer.Typer(
    name="agentcast",
    help="Run many LLM agents at once and let any number of people watch them live.",
    epilog="Start with `agentcast serve`, then open the URL that it prints.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Url = Annotated[
    str,
    typer.Option(
        metavar="URL",
        envvar="AGENTCAST_URL",
        show_envvar=False,
        show_default=False,
        help="Where the hub is. [env: AGENTCAST_URL; default: http://127.0.0.1:8000]",
    ),
]
DEFAULT_URL = "http://127.0.0.1:8000"


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


# -- serve and doctor --------------------------------------------------------------------------------------------------

Agents = Annotated[
    str | None,
    typer.Option(
        metavar="REGISTRIES",
        help="Registries to load, as `package.module:registry`, comma separated. "
        "[env: AGENTCAST_AGENTS; default: the demo agents]",
    ),
]
Host = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Address to bind. [env: AGENTCAST_HOST; default: 127.0.0.1]"),
]
Port = Annotated[
    int | None,
    typer.Option(metavar="PORT", help="Port to bind; 0 takes a free one. [env: AGENTCAST_PORT; default: 8000]"),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The language model: any string that `dspy.LM` takes (`openai/gpt-5-mini`, `ollama_chat/llama3`), "
        "or `offline`. Keys come from the provider's usual variables. [env: AGENTCAST_LM; default: offline]",
    ),
]
McpConfig = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="MCP servers, in the `mcpServers` shape of other clients: adds an agent, `assistant`, that has their "
        "tools, and defines them for agents that name them. [env: AGENTCAST_MCP_CONFIG]",
    ),
]
RedisUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="A Redis that several hubs share, as `redis://host:6379/0` (`rediss://` for TLS). One with a password "
        "is better given by the variable. [env: AGENTCAST_REDIS; default: none, all runs live in this process]",
    ),
]


@cli.command()
def serve(
    agents: Agents = None,
    host: Host = None,
    port: Port = None,
    hosts: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Further host names under which browsers and clients may reach the hub, comma separated; "
            "`*` for any. [env: AGENTCAST_HOSTS]",
        ),
    ] = None,
    mcp_config: McpConfig = None,
    lm: Model = None,
    redis: RedisUrl = None,
    max_connections: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER",
            help="Connections that the hub keeps at once; others get status 503 and come back later. Health is always "
            "answered. [env: AGENTCAST_MAX_CONNECTIONS; default: 10000, and no more than 80 % of the descriptors]",
        ),
    ] = None,
    max_connections_per_address: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER",
            help="The same for each client address, of IPv6 for each /64. "
            "[env: AGENTCAST_MAX_CONNECTIONS_PER_ADDRESS; default: 2500]",
        ),
    ] = None,
    trusted_proxies: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESSES",
            help="Reverse proxies before this hub, as addresses or networks, comma separated "
            "(`127.0.0.1,10.0.0.0/24`): their `X-Forwarded-For` says which address a connection counts for. Without "
            "it all clients of a proxy share the limit of its address. [env: AGENTCAST_TRUSTED_PROXIES; default: none]",
        ),
    ] = None,
    log_level: Annotated[
        str | None,
        typer.Option(metavar="LEVEL", help="debug, info, warning or error. [env: AGENTCAST_LOG_LEVEL; default: info]"),
    ] = None,
) -> None:
    """Start a hub: agents, WebSocket, HTTP and a page, in one process.

    Examples:

    * `agentcast serve` runs the demo agents, without keys or Redis.

    * `agentcast serve --agents shop.agents:registry --port 9000` runs your own.

    * `agentcast serve --redis redis://localhost:6379/0` is one of several hubs that show the same runs.

    * `agentcast serve --lm openai/gpt-5-mini` takes a real model; its key is in `OPENAI_API_KEY`.

    Ctrl-C, or SIGTERM, lets running agents finish for a while, then ends them; a second one ends them at once.
    """
    import gc

    gc.disable()  # until the hub is up: most of what is imported stays, and looking through it took 0.25 s
    from agentcast.server.cli import serving

    given = {"agents": agents, "host": host, "port": port, "hosts": hosts, "lm": lm}
    given |= {"mcp_config": mcp_config, "redis": redis, "log_level": log_level}
    given |= {"max_connections": max_connections, "max_connections_per_address": max_connections_per_address}
    given |= {"trusted_proxies": trusted_proxies}
    settings = _settings({name: value for name, value in given.items() if value is not None})
    try:
        code = serving.serve(settings)
    except serving.CannotServe as error:
        raise failure(str(error)) from None
    raise typer.Exit(code)


def _settings(given: dict[str, Any]) -> "Settings":
    from pydantic import ValidationError

    from agentcast.server.config import Settings

    try:
        return Settings(**given)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)]
        raise failure("wrong settings: " + "; ".join(lines)) from None


@cli.command()
def doctor(
    agents: Agents = None,
    host: Host = None,
    port: Port = None,
    mcp_config: McpConfig = None,
    lm: Model = None,
    redis: RedisUrl = None,
) -> None:
    """Check what a hub with the same settings would need: registries, models, Redis, MCP servers, the port.

    Makes one small call to each model that is configured. What fails is followed by what to do about it.

    Examples:

    * `agentcast doctor`

    * `agentcast doctor --lm anthropic/claude-sonnet-4-5 --agents shop.agents:registry`

    Exit codes: 0 all is well, 1 something failed, 2 wrong usage.
    """
    import anyio

    from agentcast.server.cli import serving
    from agentcast.server.cli.doctor import examine

    given = {"agents": agents, "host": host, "port": port, "mcp_config": mcp_config, "lm": lm, "redis": redis}
    settings = _settings({name: value for name, value in given.items() if value is not None})
    serving.set_up_logging("critical")  # what matters is among the findings
    well = anyio.run(examine, settings, typer.echo)
    raise typer.Exit(0 if well else FAILED)


# -- agents --------------------------------------------------------------------------------------------------------


@cli.command()
def agents(
    url: Url = DEFAULT_URL,
    json: Annotated[bool, typer.Option("--json", help="Print the hub's answer, with the whole JSON Schemas.")] = False,
) -> None:
    """List the agents of a running hub and what they take.

    Examples:

    * `agentcast agents`

    * `agentcast agents --json | jq '.agents[].name'`

    Exit codes: 0 listed, 2 wrong usage, 4 no hub reachable.
    """
    from agentcast.server.cli import watching

    watching.list_agents(url, json)


# -- run -----------------------------------------------------------------------------------------------------------


@cli.command()
def run(
    agent: Annotated[str, typer.Argument(metavar="AGENT", help="The agent's name; `agentcast agents` lists them.")],
    values: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Its input, field by field. The agent's schema says what a value is: text is taken as it is, "
            "numbers, `true` and `false`, lists and objects as JSON.",
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    input: Annotated[
        str | None,
        typer.Option(
            metavar="JSON|@FILE|-",
            help="The input as one JSON object: written out, from a file, or from stdin. KEY=VALUE wins over it.",
        ),
    ] = None,
    thread: Annotated[
        str | None,
        typer.Option(metavar="ID", help="The conversation that this run is a turn of: it knows the earlier turns."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Idempotency key: for a day, the same key, agent and input give the same run. [default: a new one]",
        ),
    ] = None,
    detail: Annotated[
        Literal["full", "progress"], typer.Option(help="`progress` leaves out the streaming of texts.")
    ] = "full",
    json: Annotated[
        bool, typer.Option("--json", help="Print the frames as the hub sends them, one per line, and nothing else.")
    ] = False,
    patience: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="How long a lost hub is looked for.")
    ] = 60.0,
) -> None:
    """Start a run on a running hub and watch it live, to its end.

    Examples:

    * `agentcast run researcher question="How does a slow client affect others?"`

    * `agentcast run researcher question="And who cuts it?" --thread t1`

    * `agentcast run researcher --input @question.json --json | jq -r .event`

    A lost connection is replaced, and the run goes on where it was. Ctrl-C asks the run to stop and waits until it has;
    a second Ctrl-C leaves at once.

    Exit codes:

    * 0: the run is done (`run_end`).

    * 1: it failed (`run_error`), or the hub would not have it.

    * 2: wrong usage, input or agent.

    * 3: it was cancelled (`run_cancelled`).

    * 4: no hub reachable.

    * 130: left by a second Ctrl-C.
    """
    from agentcast.server.cli import watching

    options = {"thread": thread, "key": key, "detail": detail}
    raise typer.Exit(watching.run(url, agent, values or [], input, options, patience, json))


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal without UTF-8 must not end a run
    cli()


if __name__ == "__main__":
    main()
