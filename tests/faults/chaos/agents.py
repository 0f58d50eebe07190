"""The registry of the hubs under test: agents that keep a journal of what they emitted, outside of the hub.

A journal is a file per run, named by the run: a JSON line for each event that was emitted, written before `send` is
called, and one of `{"sent": n}` after it returned. Lines go to the file at once, so a hub that is killed loses none.
"""

import os
from pathlib import Path
from typing import Any

import anyio
import orjson

from agentcast.agents.base import Emitter, Task
from agentcast.agents.events import MessageEnd, MessageStart, StatePatch, Status, Token, ToolEnd, ToolStart
from agentcast.agents.registry import Registry

registry = Registry()


class Journal:
    def __init__(self, run: str) -> None:
        self._file = os.open(
            Path(os.environ["AGENTCAST_JOURNAL"]) / run, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL
        )
        self._count = 0

    async def send(self, emit: Emitter, event: Any) -> None:
        self._count += 1
        self.note(event.wire())
        await emit.send(event)
        self.note({"sent": self._count})

    def note(self, line: dict[str, Any]) -> None:
        os.write(self._file, orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))


async def _step(journal: Journal, emit: Emitter, step: int, tokens: int, pause: float) -> None:
    await journal.send(emit, Status(message=f"step {step}"))
    span, message = f"t{step}", f"m{step}"
    await journal.send(emit, ToolStart(span=span, tool="tell", args={"step": step}))
    await journal.send(emit, MessageStart(message=message, span=span, field="text"))
    for token in range(tokens):
        await journal.send(emit, Token(message=message, delta=f"{step}.{token} "))
        await anyio.sleep(pause)
    text = "".join(f"{step}.{token} " for token in range(tokens))
    await journal.send(emit, MessageEnd(message=message, text=text))
    await journal.send(emit, ToolEnd(span=span, tool="tell", duration=0.0, result=step))
    await journal.send(emit, StatePatch(patch={"step": step}))


@registry.agent(max_concurrent=1_000)
async def teller(emit: Emitter, task: Task, steps: int = 10, tokens: int = 5, pause: float = 0.02) -> int:
    """Streams a story of some steps."""
    journal = Journal(task.run)
    for step in range(steps):
        await _step(journal, emit, step, tokens, pause)
    journal.note({"returned": steps})
    return steps


@registry.agent(max_concurrent=1_000)
async def waiter(emit: Emitter, task: Task) -> str:
    """Says something, and nothing more until it is cancelled."""
    await Journal(task.run).send(emit, Status(message="waiting"))
    await anyio.Event().wait()
    return "never"
