"""The run that code is part of, for code that is not handed an `Emitter`: tools, above all.

The emitter travels in DSPy's settings, since these reach further than a context variable would: DSPy carries them
into the threads of `dspy.Parallel` too.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import dspy

from agentcast.agents.base import Emitter
from agentcast.agents.events import AgentEvent, Status
from agentcast.agents.streaming import EMITTER_SETTING, current_span


@contextmanager
def emitting(emit: Emitter) -> Iterator[None]:
    """Inside, `emit_event` and `status` go to `emit`."""
    with dspy.context(**{EMITTER_SETTING: emit}):
        yield


def emit_event(event: AgentEvent) -> None:
    """Emit `event` in the run that calls, from a coroutine, a callback or a thread; outside of any run, do nothing.

    :raises Stopped: the run has ended, or is to end now.
    """
    emit = current_emitter()
    if emit is not None:
        emit.nowait(event)


def current_emitter() -> Emitter | None:
    """Where the events of the run that calls go; `None` outside of any run."""
    emit: Emitter | None = dspy.settings.get(EMITTER_SETTING)
    return emit


def status(message: str) -> None:
    """Tell whoever watches the run what is going on, in words: `status("Reading guide.md")`.

    :raises Stopped: as `emit_event`.
    """
    emit_event(Status(message=message, span=current_span()))
