"""Work for agents of tests: a random mixture of everything that an agent can emit."""

import random

import anyio
from pydantic import BaseModel

from agentcast.agents.base import Emitter
from agentcast.agents.events import (
    Failure,
    LmEnd,
    LmStart,
    MessageEnd,
    MessageRetracted,
    MessageStart,
    NodeEnd,
    NodeError,
    NodeStart,
    Status,
    Token,
    ToolEnd,
    ToolProgress,
    ToolStart,
    Usage,
    ValidationFailed,
)


class Seed(BaseModel):
    seed: int


class Work:
    """One run's work: a random mixture of everything an agent can emit, some of it at the same time."""

    def __init__(self, seed: int, emit: Emitter) -> None:
        self.rng = random.Random(seed)
        self.emit = emit

    async def pause(self) -> None:
        await anyio.sleep(self.rng.choice([0, 0, 0, 0.001, 0.004, 0.012]))

    async def message(self, name: str, span: str) -> None:
        await self.emit.send(MessageStart(message=name, span=span, field="answer"))
        words = [f"{name}-{i}☃ " for i in range(self.rng.randint(0, 25))]
        for word in words:
            await self.emit.send(Token(message=name, delta=word))
            await self.pause()
        if self.rng.random() < 0.2:
            await self.emit.send(MessageRetracted(message=name, reason="it did not validate"))
        else:
            await self.emit.send(MessageEnd(message=name, text="".join(words)))

    async def tool(self, name: str, parent: str) -> None:
        await self.emit.send(ToolStart(span=name, parent=parent, tool="look", args={"at": name, "none": None}))
        for step in range(self.rng.randint(0, 3)):
            await self.emit.send(ToolProgress(span=name, progress=step, total=3, message=f"step {step}"))
            await self.pause()
        if self.rng.random() < 0.3:
            error = Failure(code="not_found", message="nothing there")
            await self.emit.send(ToolEnd(span=name, tool="look", duration=0.1, error=error))
        else:
            await self.emit.send(
                ToolEnd(span=name, tool="look", duration=0.1, result=self.rng.choice([None, [1], "x"]))
            )

    async def node(self, number: int) -> None:
        span = f"n{number}"
        await self.emit.send(NodeStart(span=span, node="think", kind="module", inputs={"number": number}))
        await self.emit.send(LmStart(span=f"{span}l", parent=span, model="m"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.message, f"{span}a", span)
            tasks.start_soon(self.message, f"{span}b", span)
            tasks.start_soon(self.tool, f"{span}t", span)
            await self.emit.send(Status(message=f"at {number}", span=span))
        usage = Usage(input_tokens=number, output_tokens=2)
        await self.emit.send(LmEnd(span=f"{span}l", duration=0.1, usage=usage))
        if self.rng.random() < 0.3:
            failed = ValidationFailed(
                span=span, node="think", attempt=1, max_retries=2, error="too short", failed_fields=("answer",)
            )
            await self.emit.send(failed)
            error = Failure(code="invalid", message="gave up")
            await self.emit.send(NodeError(span=span, node="think", error=error, duration=0.1))
        else:
            await self.emit.send(NodeEnd(span=span, node="think", patch={f"k{number}": number}, duration=0.1))
