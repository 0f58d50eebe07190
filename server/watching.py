"""`agentcast run` while it runs: one run on the screen, or as JSON lines, and what Ctrl-C does to it."""

import signal
import sys

import anyio
import orjson
import typer
from rich.console import Console

from agentcast.server.client import ClientError, Run
from agentcast.server.terminal import RunView

REFRESH = 0.1


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
        return None if self._left else str(run.state.document["status"])

    def on_drop(self, reason: str, attempt: int) -> None:
        """The connection is lost, or could not be had again."""
        if attempt == 1:
            self._say(f"the connection is lost ({reason}); connecting again …")
        elif attempt == 3:
            self._say(f"the hub cannot be reached ({reason}); still trying …")

    async def _show(self, run: Run) -> None:
        async with run:
            if self._json:
                async for frame in run:
                    sys.stdout.buffer.write(orjson.dumps(frame, option=orjson.OPT_APPEND_NEWLINE))
                    sys.stdout.buffer.flush()
            else:
                with self._view as view:
                    async for frame in run:
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
