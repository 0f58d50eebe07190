"""One run of a program, awaited: its typed events go to an emitter.

The caller drives `run_program` with `agentcast.agents.gate.drive`, which holds it and its child tasks back while the
emitter is congested (G5). LM chunks are awaited into the emitter, which is how back-pressure reaches the LM stream. A
synchronous program has a thread of its own and is stopped by its next callback (G6). How events travel is not known
here.
"""

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import anyio
import dspy

from agentcast.agents.base import Emitter
from agentcast.agents.events import Usage
from agentcast.agents.streaming.bridge import innermost
from agentcast.agents.streaming.dspy_calls import call_in_thread, is_async
from agentcast.agents.streaming.run import Run
from agentcast.agents.streaming.turns import take_turn
from agentcast.agents.streaming.usage import Meter
from agentcast.agents.streaming.view import EMITTER_SETTING


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a program returned, and what its LM calls used (None: none of them said)."""

    prediction: Any
    usage: Usage | None


async def run_program(
    program: Any,
    inputs: Mapping[str, Any],
    emit: Emitter,
    *,
    messages: Collection[str] | None = None,
    name: str | None = None,
    limiter: anyio.CapacityLimiter | None = None,
    root: bool = True,
) -> Outcome:
    """Call the `dspy.Module` `program` with `inputs`, emitting what happens in it.

    `messages` names the output fields to show, by default all. `name` is the program's own, by default its class's.
    A synchronous program runs in a thread, by default one of its own, else one of `limiter`'s. When this coroutine is
    cancelled that thread is left behind; it ends at the program's next callback or LM chunk. Without `root` the program
    itself is no span, only what is in it.

    DSPy's trace is the run's own; that of a run around it gets what is in it at the end.

    :raises Stopped: `emit` takes no more events.
    :raises Exception: whatever the program raises, as it is.
    """
    await take_turn()
    run = Run(program, emit, messages, name, root=root)
    outer = dspy.settings.usage_tracker
    trace: list[Any] = []
    around = None if innermost() is None else dspy.settings.trace
    settings = {
        "stream_listeners": [],
        "usage_tracker": run.meter,
        "track_usage": True,  # else streaming LMs do not ask for it
        "disable_history": True,
        "trace": trace,
        EMITTER_SETTING: emit,
    }
    if is_async(program):
        call = functools.partial(program.acall, **inputs)
    else:
        thread = f"program {name or type(program).__name__}"
        call = functools.partial(call_in_thread, functools.partial(program, **inputs), thread, limiter)
    try:
        prediction = await run.conduct(call, **settings)
    finally:
        run.meter.report(outer)
        if around is not None:
            around.extend(trace)
    return Outcome(prediction, run.meter.total())


def current_span() -> str | None:
    """The span that the calling code is in, for instance a tool's; None outside of a run."""
    run = innermost()
    call = run.call_here() if isinstance(run, Run) else None
    return None if call is None else call.span


def can_retract() -> bool:
    """Whether text that an LM call streams here is void once the call fails, so that the call may be made again."""
    stream = dspy.settings.send_stream
    run = innermost()
    return stream is None or (isinstance(run, Run) and stream is run.sink)


def add_cost(model: str, dollars: float) -> None:
    """What the LM call costs that the calling code is in, unless the provider's usage has told it."""
    meter = dspy.settings.usage_tracker
    if isinstance(meter, Meter):
        meter.add_cost(model, dollars)
