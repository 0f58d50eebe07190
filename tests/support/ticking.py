"""The registry of hubs whose runs are taken from them: agents that show in a file, outside of the hub, that they go on.

A run's file grows by a byte for each tick, and ends with `!` once its agent has cleaned up.
"""

import os
import time
from pathlib import Path

import anyio

from agentcast.agents.base import Emitter, Task
from agentcast.agents.events import StatePatch, Status
from agentcast.agents.registry import Registry

registry = Registry()
TICK = 0.02


class Ticks:
    def __init__(self, run: str) -> None:
        self._file = os.open(Path(os.environ["AGENTCAST_JOURNAL"]) / run, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, mark: bytes = b".") -> None:
        os.write(self._file, mark)


async def _tick(task: Task, emit: Emitter) -> None:
    ticks = Ticks(task.run)
    try:
        while True:
            ticks.write()
            await anyio.sleep(TICK)
    finally:
        await anyio.sleep(TICK)
        await emit.send(Status(message="cleaned up"))
        ticks.write(b"!")


@registry.agent
async def silent(emit: Emitter, task: Task) -> str:
    """Goes on without a word, as in a long call of a model."""
    await _tick(task, emit)
    return "never"


@registry.agent(max_concurrent=1)
async def single(emit: Emitter, task: Task) -> str:
    """The same, one at a time."""
    await _tick(task, emit)
    return "never"


@registry.agent
async def talker(emit: Emitter, task: Task) -> str:
    """Says something with each tick."""
    ticks = Ticks(task.run)
    while True:
        ticks.write()
        await emit.send(Status(message="tick"))
        await anyio.sleep(TICK)


@registry.agent
async def heavy(emit: Emitter, fields: int = 480) -> str:
    """Has a state of 60 KB for each field, and waits."""
    for field in range(fields):
        await emit.send(StatePatch(patch={f"field {field}": "x" * 60_000}))
    await emit.send(Status(message="built"))
    await anyio.sleep_forever()
    return "never"


@registry.agent
async def deaf(emit: Emitter, task: Task) -> str:
    """Swallows its cancellation, and goes on."""
    ticks = Ticks(task.run)
    while True:
        try:
            ticks.write()
            await anyio.sleep(TICK)
        except anyio.get_cancelled_exc_class():
            pass


@registry.agent
async def threaded(emit: Emitter, task: Task) -> str:
    """Waits in a thread, which nobody can stop, and goes on after it."""

    def wait() -> None:
        time.sleep(TICK)  # the thread of a synchronous tool

    ticks = Ticks(task.run)
    while True:
        ticks.write()
        await anyio.to_thread.run_sync(wait)
