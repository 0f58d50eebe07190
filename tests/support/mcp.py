"""MCP servers as processes, and agents that call their tools as a script says."""

import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import dspy
from anyio.streams.text import TextReceiveStream

from agentcast.agents.context import within
from agentcast.agents.events import AgentEvent
from agentcast.agents.mcp import McpServer, mcp_server, running
from agentcast.agents.streaming import run_program
from tests.support.lms import chat, lm_of

FAULTY = str(Path(__file__).with_name("mcp_faulty.py"))
LEGACY = str(Path(__file__).with_name("mcp_legacy.py"))
RAW = str(Path(__file__).with_name("mcp_raw.py"))
PATIENCE = 40
"""Seconds for what takes one second on an idle machine."""


def faulty(name: str = "faulty", *options: str, **settings: Any) -> McpServer:
    """The server of `mcp_faulty`, over stdio."""
    return mcp_server(name, command=sys.executable, args=["-P", FAULTY, *options], **settings)


def failing_at_first(name: str, file: Path, failures: int) -> McpServer:
    """The same, but its first starts fail. `file` has the number of starts, which may be changed meanwhile."""
    words = 'File "/srv/faulty/start.py", line 3\nno luck with TOKEN-abcdefgh at /srv/faulty/data'
    script = f"""n=$(cat {file} || echo 0); echo $((n + 1)) > {file}
        [ $n -lt {failures} ] && printf %s '{words}' >&2 && exit 3
        exec {sys.executable} -P {FAULTY}"""
    return mcp_server(name, command="sh", args=["-c", script])


@asynccontextmanager
async def faulty_http(*options: str) -> AsyncIterator[tuple[str, Any]]:
    """The same over HTTP: its URL and its process, which is killed at the end."""
    async with _over_http(FAULTY, *options) as served:
        yield served


@asynccontextmanager
async def legacy_http() -> AsyncIterator[str]:
    """The URL of the server of `mcp_legacy`, which has sessions."""
    async with _over_http(LEGACY) as (url, _):
        yield url


@asynccontextmanager
async def raw(kind: str, file: Path, **script: Any) -> AsyncIterator[McpServer]:
    """The server of `mcp_raw`, running, with `script` in `file`; `kind` is `stdio`, or what it is given as options,
    such as `http` or `sse --gzip`."""
    file.write_text(json.dumps({"tools": [], "replies": {}, **script}))  # noqa: ASYNC240
    if kind == "stdio":
        server = mcp_server("raw", command=sys.executable, args=["-P", RAW, str(file)], timeout=PATIENCE)
        async with running(server):
            yield server
    else:
        async with _over_http(RAW, str(file), *f"--{kind}".split()) as (url, _):
            server = mcp_server("raw", url=url, timeout=PATIENCE)
            async with running(server):
                yield server


@asynccontextmanager
async def _over_http(script: str, *options: str) -> AsyncIterator[tuple[str, Any]]:
    if not {"--http", "--sse"} & set(options):
        options = ("--http", *options)
    async with await anyio.open_process([sys.executable, "-P", script, *options], stderr=None) as process:
        try:
            assert process.stdout is not None
            with anyio.fail_after(PATIENCE):
                port = (await TextReceiveStream(process.stdout).receive()).strip()
            yield f"http://127.0.0.1:{port}/mcp", process
        finally:
            if process.returncode is None:
                process.kill()
                with anyio.CancelScope(shield=True):
                    await process.wait()


class Heard:
    """An emitter that keeps what it is sent, and can wait for the first event of a kind."""

    def __init__(self) -> None:
        self.events: list[AgentEvent] = []
        self._changed = anyio.Event()

    async def send(self, event: AgentEvent) -> None:
        self.nowait(event)

    def nowait(self, event: AgentEvent) -> None:
        self.events.append(event)
        self._changed.set()

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    async def first(self, kind: type) -> Any:
        with anyio.fail_after(PATIENCE):
            while not (found := self.of(kind)):
                await self._changed.wait()
                self._changed = anyio.Event()
        return found[0]


Move = tuple[str, dict[str, Any]]


class Played:
    """What came of a run: `observations` of the agent's moves, its events, and the prompts that its model saw."""

    def __init__(self) -> None:
        self.heard = Heard()
        self.prompts: list[str] = []
        self.observations: list[Any] = []


async def play(agent: Any, moves: Sequence[Move], played: Played | None = None) -> Played:
    """Run a ReAct agent, "question -> answer", whose model makes exactly `moves` and then answers."""
    played = played or Played()
    replies = [
        *(chat(next_thought="t", next_tool_name=tool, next_tool_args=json.dumps(args)) for tool, args in moves),
        chat(next_thought="t", next_tool_name="finish", next_tool_args="{}"),
        chat(reasoning="r", answer="a"),
    ]

    def reply(prompt: str) -> str:
        played.prompts.append(prompt)
        return replies.pop(0)

    with dspy.context(lm=lm_of(reply), adapter=dspy.ChatAdapter()), within(emitter=played.heard):
        outcome = await run_program(agent, {"question": "Q-1-Z"}, played.heard)
    trajectory = outcome.prediction.trajectory
    played.observations = [trajectory[f"observation_{number}"] for number in range(len(moves))]
    return played


async def until(condition: Any) -> None:
    """Wait until `condition()` holds. For what only another process or a log knows."""
    with anyio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110 -- as it says
            await anyio.sleep(0.02)
