"""A hub as users start it: `agentcast serve`, in a process of its own."""

import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
from anyio.abc import Process
from anyio.streams.text import TextReceiveStream

from tests.support.client import Client, connect
from tests.support.forking import ROOT, ForkedProcess, open_agentcast, run_agentcast

__all__ = ["REGISTRY", "ROOT", "ServedHub", "environment", "refused", "serve", "serve_confined"]

REGISTRY = "tests.support.served:registry"


def environment(**settings: str) -> dict[str, str]:
    """This process's environment, with the hub's own settings and nothing else of them."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AGENTCAST_")}
    return clean | {f"AGENTCAST_{name.upper()}": value for name, value in settings.items()}


@dataclass
class ServedHub:
    process: Process
    url: str
    banner: str
    log: list[str]
    """What it has written to stderr so far."""

    @asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[Client]:
        async with connect(f"{self.url.replace('http', 'ws', 1)}/ws", **options) as client:
            yield client

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def exit_code(self, within: float) -> int:
        with anyio.fail_after(within):
            return await self.process.wait()


def serve(*arguments: str, agents: str = REGISTRY, **settings: str) -> AbstractAsyncContextManager[ServedHub]:
    """Start a hub on a free port and wait for its banner. It is killed at the end if it is still there."""
    return _serving(open_agentcast(*_command(agents, *arguments), env=environment(**settings)))


def serve_confined(descriptors: int, *arguments: str) -> AbstractAsyncContextManager[ServedHub]:
    """The same, with a process that may have only so many descriptors."""
    return _serving(open_agentcast(*_command(REGISTRY, *arguments), descriptors=descriptors, env=environment()))


def _command(agents: str, *arguments: str) -> tuple[str, ...]:
    return ("serve", "--port", "0", "--agents", agents, *arguments)


@asynccontextmanager
async def _serving(opening: Awaitable[ForkedProcess]) -> AsyncIterator[ServedHub]:
    async with await opening as process:
        log: list[str] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_collect, TextReceiveStream(process.stderr), log)
            try:
                with anyio.move_on_after(45) as patience:
                    url, banner = await _banner(TextReceiveStream(process.stdout))
                assert not patience.cancelled_caught, "no banner; its log:\n" + "".join(log)
                yield ServedHub(process, url, banner, log)
            finally:
                if process.returncode is None:
                    process.kill()
                    with anyio.CancelScope(shield=True):
                        await process.wait()


async def _collect(stream: TextReceiveStream, log: list[str]) -> None:
    async for text in stream:
        log += [text]


async def _banner(stream: TextReceiveStream) -> tuple[str, str]:
    """The URL, and all of it."""
    text = ""
    async for part in stream:
        text += part
        if found := re.search(r"running at (http://\S+).*Ctrl-C\n", text, re.DOTALL):
            return found[1], text
    raise AssertionError(f"it ended without a banner: {text}")


async def refused(*arguments: str, **settings: str) -> tuple[int, str]:
    """Exit code and stderr of a hub that does not start."""
    with anyio.fail_after(45):
        done = await run_agentcast("serve", *arguments, env=environment(**settings))
    return done.returncode, done.stderr
