"""`agentcast agents` and `agentcast run`: a hub's agents, and one run on the screen or as JSON lines until it ends."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import orjson
import typer
from rich.console import Console

from agentcast.server.cli.arguments import BadArgument, typed_input
from agentcast.server.cli.exits import CANCELLED, FAILED, LEFT, NO_HUB, WRONG_USAGE, failure
from agentcast.server.cli.terminal import AgentsView, RunView
from agentcast.server.client import BadUrl, Client, ClientError, Refused, Run, TooBig, Unreachable, connect

EXIT_CODES = {"done": 0, "failed": FAILED, "cancelled": CANCELLED}
USAGE_ERRORS = frozenset({"bad_request", "unknown_agent", "invalid_input", "conflict"})
"""Error codes of the hub that a different command line would have avoided."""
REFRESH = 0.1


# -- The commands ------------------------------------------------------------------------------------------------------


def list_agents(url: str, json: bool) -> None:
    """Print the agents of the hub at `url`; as JSON, the hub's answer as it is.

    :raises typer.Exit: that failed, and the reason is printed.
    """
    try:
        document = anyio.run(connect(url).describe)
    except ClientError as error:
        raise _client_failure(error) from None
    if json:
        typer.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())
        return
    console = PipeConsole()
    with console.capture() as capture:
        console.print(AgentsView(document, url), highlight=False)
    for line in capture.get().splitlines():
        typer.echo(line.rstrip())


def run(
    url: str,
    agent: str,
    values: Sequence[str],
    input: str | None,
    options: dict[str, Any],
    patience: float,
    json: bool,
) -> int:
    """Start a run of `agent` and show it until it ends; gives the exit code. `input` and `values` are what the command
    was given, `options` goes to `Client.start`.

    :raises typer.Exit: that failed, and the reason is printed.
    """
    watch = Watch(agent, json)
    try:
        client = connect(url, patience=patience, on_drop=watch.on_drop)
        following = client.start(agent, _input(client, agent, values, input), **options)
    except ClientError as error:
        raise _client_failure(error) from None
    try:
        status = anyio.run(watch.follow, following)
    except ClientError as error:
        raise _client_failure(error, following.id) from None
    except BrokenPipeError:  # the reader of our output has left; the run goes on without us
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return LEFT if status is None else EXIT_CODES[status]


def _input(client: Client, agent: str, values: Sequence[str], input: str | None) -> dict[str, Any]:
    """The input for `agent`, made of what the command was given and the agent's schema.

    :raises ClientError: the hub does not say what the schema is.
    :raises typer.Exit: it does not fit, or there is no such agent.
    """
    known = {described["name"]: described for described in anyio.run(client.describe)["agents"]}
    if agent not in known:
        raise failure(f"there is no agent {agent!r} at {client.url}; known are: {', '.join(known) or 'none'}")
    if not known[agent].get("available", True):
        reason = known[agent].get("reason", "the hub does not say why")
        raise failure(f"agent {agent} is not available: {reason}; try again later", FAILED)
    try:
        return typed_input(known[agent].get("input", {}), values, None if input is None else _read(input))
    except BadArgument as error:
        raise failure(f"input of {agent}: {error}") from None


def _read(input: str) -> str:
    try:
        if input == "-":
            return sys.stdin.read()
        return Path(input[1:]).read_text(encoding="utf-8") if input.startswith("@") else input
    except OSError as error:
        raise failure(f"--input: cannot read {input[1:]}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise failure(f"--input: {input.lstrip('@')} is not UTF-8 text") from None


def _client_failure(error: ClientError, run: str | None = None) -> typer.Exit:
    """What went wrong between the hub and us, and what to do."""
    match error:
        case BadUrl() | TooBig():
            return failure(str(error))
        case Unreachable():
            hint = f"run {run} may go on there" if run else "start one with `agentcast serve`, or give --url"
            return failure(f"{error}; {hint}", NO_HUB)
        case Refused() if error.code == "not_found" and run is not None:
            return failure(f"the hub has lost run {run}: it was restarted, or the run ended long ago", FAILED)
        case Refused():
            return failure(error.message, WRONG_USAGE if error.code in USAGE_ERRORS else FAILED)
        case _:
            return failure(str(error), FAILED)


# -- One run -----------------------------------------------------------------------------------------------------------


class PipeConsole(Console):
    """A console whose reader may go away: that raises, as any write would, instead of ending the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Watch:
    """One run on the screen, or as JSON lines, and what Ctrl-C does to it."""

    def __init__(self, agent: str, json: bool) -> None:
        self._json = json
        self._view = RunView(PipeConsole(), agent)
        self._left = False

    async def follow(self, run: Run) -> str | None:
        """Show the run to its end; gives the status that it ended with, or None if the user left before."""
        failure: Exception | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._interrupts, run, tasks.cancel_scope)
            tasks.start_soon(self._refresh)
            try:
                await self._show(run)
            except (ClientError, BrokenPipeError) as error:
                failure = error  # raised outside of the group, which would wrap it
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return None if self._left else str(run.state["status"])

    def on_drop(self, reason: str, attempt: int) -> None:
        """The connection is lost, or could not be had again."""
        if attempt == 1:
            self._say(f"the connection is lost ({reason}); connecting again …")
        elif attempt == 3:
            self._say(f"the hub cannot be reached ({reason}); still trying …")

    async def _show(self, run: Run) -> None:
        async with run:
            if self._json:
                async for frame in run.frames():
                    sys.stdout.buffer.write(orjson.dumps(frame, option=orjson.OPT_APPEND_NEWLINE))
                    sys.stdout.buffer.flush()
            else:
                with self._view as view:
                    async for frame in run.frames():
                        view.show(frame, run.state)

    async def _interrupts(self, run: Run, scope: anyio.CancelScope) -> None:
        with anyio.open_signal_receiver(signal.SIGINT) as signals:
            async for _ in signals:
                if run.cancelling or not await run.cancel("cancelled with Ctrl-C"):
                    self._left = True
                    if run.id is not None:
                        self._say(f"left; run {run.id} may still be ending")
                    scope.cancel()
                    return
                self._say("asked the run to stop; Ctrl-C again leaves at once")

    async def _refresh(self) -> None:
        while True:
            self._view.refresh()
            await anyio.sleep(REFRESH)

    def _say(self, text: str) -> None:
        if self._json:
            typer.echo(f"agentcast: {text}", err=True)
        else:
            self._view.note(text)
