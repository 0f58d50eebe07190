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
async def flooder(emit: Emitter) -> str:
    """Says far more than sockets and queues hold."""
    for _ in range(20_000):
        await emit.send(Status(message="x" * 500))
    return "said"
