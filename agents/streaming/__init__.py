"""The bridge from DSPy: what a program does while it runs, in order, never blocking, never mixed up.

    stream = streamify(program, stream_listeners=[…])        # DSPy's items; a drop-in for dspy.streamify
    async for item in stream(question="…"): …

    async with stream_events(program, inputs) as events:     # typed events, without a hub
        async for event in events: …
    events.outcome.prediction

    outcome = await run_program(program, inputs, emit)       # typed events to an emitter; what the hub uses

Spans. The program is a node of kind `agent`; modules and predictors in it are nodes of kind `module`, by their dotted
name in the program; LM and tool calls are spans, too. Nodes carry neither `inputs` nor `patch`: in a loop these would
repeat the whole trajectory at each step, and what matters of them arrives as messages.

Messages. The output fields of each predictor call, on the predictor's span: start, deltas, end. An empty text
makes no message. What cannot be streamed comes whole at the predictor's end: cached answers, engines without `stream`,
adapters that are not known. The text of a `str` field is the value that the program gets; should the deltas turn out to
be something else, they are retracted, and the value follows as a new message. A field of another type has the text that
the LM wrote, or else its value's JSON.

Threads. What a program does in `dspy.Parallel`, `asyncio.to_thread`, `anyio.to_thread`, and on a second event loop in a
thread is streamed like the rest; a bare pool or thread takes the run along with `agents.context.carrying`.

An error in making an event fails the run with that error; DSPy would log and forget it. It must not be known here what
a run is called, or that there is a server.
"""

from agentcast.agents.streaming.calls import call_in_thread, can_be_awaited, is_async
from agentcast.agents.streaming.program import EventStream, Outcome, add_cost, run_program, stream_events
from agentcast.agents.streaming.run import NodeSpan, node_span
from agentcast.agents.streaming.stream import Stream, StreamError
from agentcast.agents.streaming.streamify import streamify
from agentcast.agents.streaming.view import replace_methods

__all__ = [
    "EventStream",
    "NodeSpan",
    "Outcome",
    "Stream",
    "StreamError",
    "add_cost",
    "call_in_thread",
    "can_be_awaited",
    "is_async",
    "node_span",
    "replace_methods",
    "run_program",
    "stream_events",
    "streamify",
]
