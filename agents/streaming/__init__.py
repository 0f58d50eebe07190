"""The bridge from DSPy: what a program does while it runs, as typed events, in order, never blocking.

    outcome = await run_program(program, inputs, emit, messages={"reasoning", "answer"})
    outcome.prediction, outcome.usage

The caller drives this coroutine with `agents.channel.drive`, which holds it and its child tasks back while `emit` is
congested. DSPy tells what happens through two seams that every run gets for itself: a callback object and a
`send_stream` sink, both closed over the run's emitter. Nothing of a run is kept on programs, LMs or in globals (G8).
Nothing here waits on the event loop (G3); LM chunks are awaited into the emitter, which is how back-pressure reaches
the LM stream (G5). A synchronous program has a thread of its own and is stopped by its next callback (G6).

Spans. The program is a node of kind `agent`; modules and predictors in it are nodes of kind `module`, by their dotted
name in the program; LM and tool calls are spans, too. Nodes carry neither `inputs` nor `patch`: in a loop these would
repeat the whole trajectory at each step, and what matters of them arrives as messages.

Messages. The output fields of each predictor call, told of the predictor's span: start, deltas, end. An empty text
makes no message. What cannot be streamed comes whole at the predictor's end: cached answers, engines without `stream`,
adapters that are not known, synchronous LM calls on the loop or in a thread that is not anyio's. The text of a `str`
field is the value that the program gets; should the deltas turn out to be something else, they are retracted, and the
value follows as a new message. A field of another type has the text that the LM wrote, or else its value's JSON.

An error in making an event fails the run with that error; DSPy would log and forget it. It must not be known here
how events travel, what a run is called, or that there is a server.

Public: `run_program`, `Outcome`, `is_async`, `current_span`.
"""

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread
import dspy

from agents.base import Emitter
from agents.events import Usage
from agents.streaming.run import Run

__all__ = ["Outcome", "current_span", "is_async", "run_program"]

_SETTING = "agentcast_run"
"""Key of the run in DSPy's settings, which DSPy also carries into the threads of `dspy.Parallel`."""


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
) -> Outcome:
    """Call the `dspy.Module` `program` with `inputs`, emitting what happens in it.

    `messages` names the output fields to show, by default all. `name` is the program's own, by default its class's.
    A synchronous program runs in a thread, by default one of its own, else one of `limiter`'s. When this coroutine is
    cancelled that thread is left behind; it ends at the program's next callback or LM chunk.

    :raises Stopped: `emit` takes no more events.
    :raises Exception: whatever the program raises, as it is.
    """
    run = Run(program, emit, messages, name)
    outer = dspy.settings.usage_tracker
    settings = {
        "callbacks": [*dspy.settings.callbacks, run],
        "send_stream": run.sink,
        "stream_listeners": [],
        "usage_tracker": run.meter,
        "track_usage": True,  # else streaming LMs do not ask for it
        "disable_history": True,
        "trace": None,
        _SETTING: run,
    }
    try:
        with dspy.context(**settings):
            if is_async(program):
                prediction = await program.acall(**inputs)
            else:
                prediction = await anyio.to_thread.run_sync(
                    functools.partial(program, **inputs),
                    abandon_on_cancel=True,
                    limiter=limiter or anyio.CapacityLimiter(1),
                )
    except BaseException as error:  # noqa: BLE001 -- raised again, or what caused it
        run.raise_cause(error)
    finally:
        run.close()
        run.meter.report(outer)
    return Outcome(prediction, run.meter.total())


def is_async(program: Any) -> bool:
    """Whether `program` has an `aforward` that does what its `forward` does: one that is not inherited from a class
    above the one that defines its `forward`."""
    for namespace in (vars(program), *map(vars, type(program).__mro__)):
        if "aforward" in namespace:
            return True
        if "forward" in namespace:
            return False
    return False


def current_span() -> str | None:
    """The span that the calling code is in, for instance a tool's; None outside of a run."""
    run = dspy.settings.get(_SETTING)
    call = None if run is None else run.call_here()
    return None if call is None else call.span
