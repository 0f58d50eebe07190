"""`streamify`: what `dspy.streamify` promises, without what it does wrong. See docs/streaming-dspy.md."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import dspy
from dspy.streaming.messages import StatusMessageProvider
from dspy.streaming.streaming_listener import find_predictor_for_stream_listeners

from agentcast.agents.streaming.blocking import BlockingStream
from agentcast.agents.streaming.dspy_calls import call_in_thread, submits
from agentcast.agents.streaming.listening import Listening
from agentcast.agents.streaming.relay import Relay
from agentcast.agents.streaming.stream import Stream


def streamify(
    program: Any,
    status_message_provider: StatusMessageProvider | None = None,
    stream_listeners: Sequence[Any] | None = None,
    include_final_prediction_in_output_stream: bool = True,
    is_async_program: bool = False,
    async_streaming: bool = True,
) -> Callable[..., Any]:
    """Make of `program` a function that takes the same arguments and streams: a drop-in for `dspy.streamify`.

    What it returns when called is a `Stream`, to iterate over with `async for`, or with `async_streaming=False` a
    `BlockingStream` for `for`. The items are those of DSPy: `StatusMessage`; for each listener's field
    `StreamResponse`; without listeners the LMs' own chunks; whatever the program itself sends to
    `dspy.settings.send_stream`; at the end the prediction. With listeners the prediction may be left out
    (`include_final_prediction_in_output_stream=False`); it comes all the same if they heard nothing, as when the answer
    was cached. Settings and callbacks are those of where the stream is started, that is, first asked for an item.

    :raises ValueError: a listener's field is of no predictor, or of several.
    """
    listeners = list(stream_listeners or ())
    _find_predictors(program, listeners)
    provider = status_message_provider or StatusMessageProvider()
    name = getattr(program, "__name__", type(program).__name__)
    threaded = not is_async_program and not inspect.iscoroutinefunction(program)
    function = program.acall if is_async_program else program

    async def play(channel: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        listening = Listening(listeners) if listeners else None
        relay = Relay(channel, provider, listening)
        call = functools.partial(function, *args, **inputs)
        if threaded:
            call = functools.partial(call_in_thread, call, f"program {name}")
        value = await relay.conduct(call, stream_listeners=listeners)
        told = listening is not None and listening.heard
        if include_final_prediction_in_output_stream or not told or not isinstance(value, dspy.Prediction):
            await channel.send(value)

    def stream(*args: Any, **inputs: Any) -> Stream[Any]:
        return Stream(functools.partial(play, args=args, inputs=inputs), name, threaded=threaded)

    def blocking_stream(*args: Any, **inputs: Any) -> BlockingStream:
        return BlockingStream(functools.partial(stream, *args, **inputs))

    return stream if async_streaming else blocking_stream


def _find_predictors(program: Any, listeners: Sequence[Any]) -> None:
    """Tell each listener which predictor it listens to, unless it knows."""
    searching = [listener for listener in listeners if not listener.predict]
    if not searching:
        return
    parts = [(path.removeprefix("self").removeprefix("."), part) for path, part in program.named_sub_modules()]
    loops = [(f"{path}.react".removeprefix("."), part) for path, part in parts if submits(part)]
    known = {field for _, part in program.named_predictors() for field in part.signature.output_fields}
    for listener in searching:
        name = listener.signature_field_name
        found = [(path, loop.react) for path, loop in loops if name in loop.signature.output_fields]
        if len(found) + (name in known) > 1:
            raise ValueError(f"Signature field {name} is of several predictors; give the listener the one to listen to")
        if found:
            ((listener.predict_name, listener.predict),) = found
        elif name not in known:
            raise ValueError(f"Signature field {name} is not a field of any predictor")
    find_predictor_for_stream_listeners(program, searching)
