"""The run that code is part of, for code that is not handed an `Emitter`: tools, above all.

A context variable, so it is right in every task and thread that carries its run's context.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from agents.base import Emitter
from agents.events import AgentEvent, Status

_emitter: ContextVar[Emitter | None] = ContextVar("agentcast_emitter", default=None)


@contextlib.contextmanager
def emitting(emit: Emitter) -> Iterator[None]:
    """Inside, `emit_event` and `status` go to `emit`."""
    token = _emitter.set(emit)
    try:
        yield
    finally:
        _emitter.reset(token)


def emit_event(event: AgentEvent) -> None:
    """Emit `event` in the run that calls, from a coroutine, a callback or a thread; outside of any run, do nothing.

    :raises Stopped: the run has ended, or is to end now.
    """
    if (emit := _emitter.get()) is not None:
        emit.nowait(event)


def status(message: str) -> None:
    """Tell whoever watches the run what is going on, in words: `status("Reading guide.md")`.

    :raises Stopped: as `emit_event`.
    """
    emit_event(Status(message=message))
