"""The registry that hubs started as processes load: `--agents tests.support.served:registry`."""

import asyncio
import threading

import anyio

from agentcast.agents.base import Emitter
from agentcast.agents.events import MessageEnd, MessageStart, Status, Token
from agentcast.agents.registry import Registry

registry = Registry()


@registry.agent
async def counter(emit: Emitter, n: int = 3, pause: float = 0.01) -> str:
    """Counts up to n, a number every `pause` seconds."""
    await emit.send(MessageStart(message="m", span="s", field="answer"))
    for number in range(n):
        await emit.send(Token(message="m", delta=f"{number} "))
        await anyio.sleep(pause)
    text = "".join(f"{number} " for number in range(n))
    await emit.send(MessageEnd(message="m", text=text))
    return text


@registry.agent
async def holder(emit: Emitter) -> str:
    """Runs until it is stopped."""
    await emit.send(Status(message="holding"))
    await anyio.Event().wait()
    return "never"


@registry.agent
async def careless(emit: Emitter) -> str:
    """Ends at once when it is cancelled, but leaves a thread behind that never does."""
    await emit.send(Status(message="stuck"))
    await asyncio.to_thread(threading.Event().wait)
    return "never"


@registry.agent
async def stubborn(emit: Emitter) -> str:
    """Sits in a thread that nobody can stop."""
    await emit.send(Status(message="stuck"))
    await anyio.to_thread.run_sync(threading.Event().wait)
    return "never"


@registry.agent
async def exiting(emit: Emitter, interrupt: bool = False) -> str:
    """A task of it calls `sys.exit`, or raises as Ctrl-C would."""

    async def child() -> None:
        await emit.send(Status(message="in the child"))
        raise KeyboardInterrupt if interrupt else SystemExit(3)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(child)
    return "never"


@registry.agent
async def deaf(emit: Emitter) -> str:
    """Leaves a task behind that ignores its cancellation."""

    async def child() -> None:
        while True:
            try:
                await anyio.sleep(0.01)
            except asyncio.CancelledError:
                pass

    left.append(asyncio.get_running_loop().create_task(child()))
    return "done"


left: list[asyncio.Task[None]] = []


@registry.agent
async def flooder(emit: Emitter) -> str:
    """Says far more than sockets and queues hold."""
    for _ in range(20_000):
        await emit.send(Status(message="x" * 500))
    return "said"
