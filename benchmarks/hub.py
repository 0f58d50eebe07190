"""The hub that is measured: agents that emit at a given pace, and a ticker that notices when the loop stands still.

Run as a process by `processes.running("benchmarks.hub")`; prints its port. A byte on stdin lets an agent that waits for
one go on.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from json import loads
from random import random
from typing import Literal

import anyio
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agentcast.agents.base import AgentSpec, Emitter, Task
from agentcast.agents.events import MessageEnd, MessageStart, StatePatch, Status, Token, ToolEnd, ToolStart
from agentcast.agents.llm import ModelInfo
from agentcast.agents.values import VALUE_BYTES
from agentcast.server.app import AgentCast
from agentcast.server.cli.collector import Collector, freeze_heap
from agentcast.server.config import Settings
from agentcast.server.edge.http_protocol import HttpProtocol
from agentcast.server.edge.session import ANONYMOUS
from agentcast.server.edge.websocket import FrameProtocol
from agentcast.server.protocol import Start
from agentcast.server.runs.runs import Runs
from agentcast.server.state import MAX_DETAILED, MAX_MESSAGES, MAX_STATE_FIELDS
from benchmarks.report import percentile
from benchmarks.serving import EVENT_BYTES, MARK, Go, serving

TICK = 0.005
MAX_ACTIVE = 20_000

go = Go()


class Steady(BaseModel):
    kind: Literal["status", "token"]
    rate: float
    count: int


class Stream(BaseModel):
    tokens: int
    interval: float


class Bursts(BaseModel):
    pass


class Rare(BaseModel):
    every: float


class Large(BaseModel):
    shape: Literal["text", "lists"]


async def steady(input: Steady, emit: Emitter) -> None:
    """Wait for `go`, then emit `count` events, `rate` a second."""
    await go()
    if input.kind == "token":
        await emit.send(MessageStart(message="m", span="s", field="answer"))
    start = anyio.current_time()
    for number in range(input.count):
        await anyio.sleep_until(start + number / input.rate)
        await emit.send(Status(message="x" * 60) if input.kind == "status" else Token(message="m", delta="token "))


async def stream(input: Stream, emit: Emitter) -> None:
    """One text, token by token; without an interval as fast as it is let."""
    await emit.send(MessageStart(message="m", span="s", field="answer"))
    start = anyio.current_time()
    for number in range(input.tokens):
        if input.interval:
            await anyio.sleep_until(start + number * input.interval)
        await emit.send(Token(message="m", delta="token "))
    await emit.send(MessageEnd(message="m", text="token " * input.tokens))


async def bursts(input: Bursts, emit: Emitter) -> None:
    """At each `go`, as many events as it says, of about `EVENT_BYTES` on the wire."""
    event = Status(message=MARK + "x" * (EVENT_BYTES - 148))
    while True:
        for _ in range(await go()):
            await emit.send(event)


async def rare(input: Rare, emit: Emitter) -> None:
    """A status every so many seconds; runs that begin together do not emit together."""
    await anyio.sleep(random() * input.every)
    for number in count():
        await emit.send(Status(message=f"step {number}"))
        await anyio.sleep(input.every)


async def large(input: Large, emit: Emitter) -> None:
    """Emit until the run's state is as large as it may be; at `go` a marked event."""
    if input.shape == "lists":
        for number in range(100):
            await emit.send(StatePatch(patch={f"f{number}": [[]] * 20_000}))
    else:
        await _texts(emit)
    await emit.send(Status(message="complete"))
    await go()
    await emit.send(Status(message=MARK))
    await anyio.sleep_forever()


async def _texts(emit: Emitter) -> None:
    text = "x" * (VALUE_BYTES - 2)
    for number in range(MAX_DETAILED):
        span = f"s{number}"
        await emit.send(ToolStart(span=span, tool="t", args={"a": text, "b": text}))
        await emit.send(ToolEnd(span=span, tool="t", result=text, duration=0.0))
    for number in range(MAX_STATE_FIELDS):
        await emit.send(StatePatch(patch={f"f{number}": text}))
    for number in range(MAX_MESSAGES):
        message = f"m{number}"
        await emit.send(MessageStart(message=message, span="s", field="answer"))
        await emit.send(Token(message=message, delta=text))
        await emit.send(MessageEnd(message=message, text=text))


@dataclass(frozen=True)
class FunctionAgent:
    spec: AgentSpec
    function: Callable[[BaseModel, Emitter], Awaitable[None]]

    async def run(self, task: Task, emit: Emitter) -> None:
        await self.function(task.input, emit)


def agent(name: str, input: type[BaseModel], function: Callable[..., Awaitable[None]]) -> FunctionAgent:
    spec = AgentSpec(name=name, description=name, input_model=input, timeout=3600.0, max_concurrent=MAX_ACTIVE)
    return FunctionAgent(spec, function)


class Ticker:
    """How late the loop is to something that is due every `TICK` seconds, from the first reading on."""

    def __init__(self) -> None:
        self._late: list[float] = []
        self._wanted = anyio.Event()

    async def run(self) -> None:
        await self._wanted.wait()
        while True:
            before = time.perf_counter()
            await anyio.sleep(TICK)
            self._late.append(time.perf_counter() - before - TICK)

    async def read(self, request: Request) -> Response:
        """What was seen since the last reading, in seconds."""
        self._wanted.set()
        late, self._late = self._late or [0.0], []
        return JSONResponse({"longest": max(late), "p99": percentile(late, 0.99)})


class Starter:
    """Starts many runs at a time, as a client's `start` would, and knows how many of all runs are active."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs

    async def start(self, request: Request) -> Response:
        """`count` runs of `agent` with `input`, each `interval` seconds after the other."""
        command = Start(op="start", agent=request.query_params["agent"], input=loads(request.query_params["input"]))
        started = []
        for _ in range(int(request.query_params["count"])):
            started.append((await self._runs.start(ANONYMOUS, command)).run)
            await anyio.sleep(float(request.query_params["interval"]))
        return JSONResponse({"runs": started})

    async def active(self, request: Request) -> Response:
        return JSONResponse({"active": self._runs.active})


AGENTS = (
    agent("steady", Steady, steady),
    agent("stream", Stream, stream),
    agent("bursts", Bursts, bursts),
    agent("rare", Rare, rare),
    agent("large", Large, large),
)


async def main() -> None:
    settings = Settings(
        heartbeat=3600.0, max_active=MAX_ACTIVE, max_connections=20_000, max_connections_per_address=20_000
    )
    core = AgentCast({one.spec.name: one for one in AGENTS}, ModelInfo("none", True), settings)
    ticker, starter = Ticker(), Starter(core.runs)
    core.app.router.routes += [
        Route("/stall", ticker.read),
        Route("/start", starter.start),
        Route("/active", starter.active),
    ]
    async with anyio.create_task_group() as tasks, serving(core.app, FrameProtocol, HttpProtocol) as port:
        tasks.start_soon(ticker.run)
        go.listen()
        freeze_heap()
        tasks.start_soon(Collector(lambda: core.runs.active, lambda: core.runs.ended).run)
        print(port, flush=True)
        await anyio.sleep_forever()


if __name__ == "__main__":
    anyio.run(main, backend_options={"use_uvloop": True})
