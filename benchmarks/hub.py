"""The hub that is measured: agents that emit at a given pace, and a ticker that notices when the loop stands still.

Run as a process by `processes.running("benchmarks.hub")`; prints its port. A byte on stdin lets an agent that waits for
one go on.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

import anyio
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agentcast.agents.base import AgentSpec, Emitter, Task
from agentcast.agents.events import MessageEnd, MessageStart, StatePatch, Status, Token
from agentcast.agents.llm import ModelInfo
from agentcast.server.app import AgentCast
from agentcast.server.cli.serving import freeze_heap
from agentcast.server.config import Settings
from agentcast.server.edge.websocket import FrameProtocol
from benchmarks.report import percentile
from benchmarks.serving import EVENT_BYTES, MARK, Go, serving

TICK = 0.005

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


class Large(BaseModel):
    shape: Literal["text", "lists"]


async def large(input: Large, emit: Emitter) -> None:
    """Fill the run's state with whatever it takes, and wait."""
    value: Any = "x" * 60_000 if input.shape == "text" else [[]] * 20_000
    for number in range(480):
        await emit.send(StatePatch(patch={f"field {number}": value}))
    await emit.send(Status(message="filled"))
    await go()


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


@dataclass(frozen=True)
class FunctionAgent:
    spec: AgentSpec
    function: Callable[[BaseModel, Emitter], Awaitable[None]]

    async def run(self, task: Task, emit: Emitter) -> None:
        await self.function(task.input, emit)


def agent(name: str, input: type[BaseModel], function: Callable[..., Awaitable[None]]) -> FunctionAgent:
    spec = AgentSpec(name=name, description=name, input_model=input, timeout=3600.0, max_concurrent=1_000)
    return FunctionAgent(spec, function)


class Ticker:
    """How late the loop is to something that is due every `TICK` seconds."""

    def __init__(self) -> None:
        self._late: list[float] = []

    async def run(self) -> None:
        while True:
            before = time.perf_counter()
            await anyio.sleep(TICK)
            self._late.append(time.perf_counter() - before - TICK)

    async def read(self, request: Request) -> Response:
        """What was seen since the last reading, in seconds."""
        late, self._late = self._late or [0.0], []
        return JSONResponse({"longest": max(late), "p99": percentile(late, 0.99)})


async def main() -> None:
    agents = (
        agent("steady", Steady, steady),
        agent("stream", Stream, stream),
        agent("bursts", Bursts, bursts),
        agent("large", Large, large),
    )
    core = AgentCast({one.spec.name: one for one in agents}, ModelInfo("none", True), Settings(heartbeat=3600.0))
    ticker = Ticker()
    core.app.router.routes.append(Route("/stall", ticker.read))
    async with anyio.create_task_group() as tasks, serving(core.app, FrameProtocol) as port:
        tasks.start_soon(ticker.run)
        go.listen()
        freeze_heap()
        print(port, flush=True)
        await anyio.sleep_forever()


if __name__ == "__main__":
    anyio.run(main, backend_options={"use_uvloop": True})
