"""`streamify`: what `dspy.streamify` promises, without what it does wrong. See docs/streaming-dspy.md.

A run's `Relay` turns DSPy's callbacks into status messages, and LM chunks into what listeners hear of them.

Each (listener, LM call) has a state of its own, made as the call starts and thrown away at its end, and advanced where
the chunk is produced; so neither runs nor calls can mix (G8). It must not be known here how chunks travel.

The text of a plain `StreamListener` comes out of the splitters (`agentcast.agents.fields`), not out of DSPy's own
parsing, which loses what follows `[[` in a text, and whole answers that arrive in one chunk. Where DSPy's listener cuts
is kept:

- Each LM chunk makes one chunk, and a field's last one says so (`is_last_chunk`).
- Text that arrives while it is open whether the field ends waits for that to be known, and may then be the last chunk.
  If nothing is left for it, the last chunk is empty: the only empty one.
- Text that arrives in one LM chunk with the field's name waits for the next LM chunk.
- With the JSON adapter the text is the JSON of the value, with its quotes and escapes.

DSPy's listeners know only the predictors' own fields. These hear the outputs of a `dspy.ReActV2` program, too: as the
arguments of its tool `submit`, unescaped, whatever the adapter.

Calls of one predictor that go on at once differ in the attribute `call` of their chunks, which DSPy's lack.

A listener of a class of the user's own is copied for each LM call, its state renewed, and asked as DSPy would ask it.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import dspy
from dspy.streaming import StatusMessage, StatusMessageProvider, StreamListener, StreamResponse

from agentcast.agents._dspy.names import (
    StatusStreamingCallback,
    find_predictor_for_stream_listeners,
    is_lm_chunk,
    streams,
)
from agentcast.agents.fields import Piece, Reader, piece_of
from agentcast.agents.streaming.bridge import Bridge
from agentcast.agents.streaming.calls import annotations, call_in_thread, decides, ending_tool, submits
from agentcast.agents.streaming.stream import BlockingStream, Stream

FINISH = "finish"
COMPLETED = "Completed."
"""The tool with which ReAct loops end, and what it returns: no statuses, as in DSPy. Nor are there any for `submit`."""


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
        value = await relay.conduct(call, {}, stream_listeners=listeners)
        heard = listening is not None and listening.heard
        if include_final_prediction_in_output_stream or not heard or not isinstance(value, dspy.Prediction):
            await channel.send(value)

    def stream(*args: Any, **inputs: Any) -> Stream[Any]:
        return Stream(functools.partial(play, args=args, inputs=inputs), name, threaded=threaded)

    def blocking_stream(*args: Any, **inputs: Any) -> BlockingStream:
        return BlockingStream(functools.partial(stream, *args, **inputs))

    return stream if async_streaming else blocking_stream


def _find_predictors(program: Any, listeners: Sequence[Any]) -> None:
    """Give each listener the predictor that it listens to, unless it has one."""
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


# -- Statuses and chunks -----------------------------------------------------------------------------------------------


class Relay(Bridge):
    """One run of one streamified program: DSPy's callbacks and LM chunks in, items of the stream out. Not events.

    The listeners hear the LM calls of their predictors. Without listeners LM chunks pass as they are, and so does
    always what is no LM chunk: custom LMs and programs send items of their own.
    """

    def __init__(self, emit: Any, provider: StatusMessageProvider, listening: "Listening | None") -> None:
        super().__init__(emit)
        # A status callback of DSPy's own that is configured sends the messages then, and these would double them.
        has_own = any(isinstance(each, StatusStreamingCallback) for each in dspy.settings.callbacks)
        self._provider = None if has_own else provider
        self._listening = listening
        self._endings: set[str] = set()
        """Calls of the tools with which loops end."""

    def read(self, chunk: Any) -> Iterable[Any]:
        if self._listening is None or not is_lm_chunk(chunk):
            return [chunk]
        call = self.here()
        return call.hear(chunk) if isinstance(call, HeardCall) else []

    @property
    def _statuses(self) -> StatusMessageProvider | None:
        return self._provider if self.is_innermost else None

    def _status(self, message: str | None, exception: BaseException | None = None) -> None:
        if message:
            self.report([StatusMessage(message)], exception)
            self.emit.hand_over()  # what announces a tool is out before the tool begins

    # -- Modules ---------------------------------------------------------------------------------------------------

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if statuses := self._statuses:
            self._status(statuses.module_start_status_message(instance, inputs))
        is_muted = isinstance(instance, dspy.Predict) and decides(instance)
        self.enter(call_id, _Answer(), streams=not is_muted)

    def on_module_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self.leave(call_id)
        if statuses := self._statuses:
            self._status(statuses.module_end_status_message(outputs), exception)

    # -- Adapters: no statuses, but LM calls may be inside ------------------------------------------------------------

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        answer = self.here()
        if isinstance(answer, _Answer) and "signature" in inputs:
            answer.expected = type(instance), annotations(inputs["signature"])

    def on_adapter_format_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self.clean(outputs)

    on_adapter_parse_end = on_adapter_format_end

    # -- LMs -------------------------------------------------------------------------------------------------------

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if statuses := self._statuses:
            self._status(statuses.lm_start_status_message(instance, inputs))
        call, can_stream = self.here(), streams(instance)
        if can_stream and self._listening is not None and dspy.settings.send_stream is self.sink:
            reader = call.reader() if isinstance(call, _Answer) else None
            call = self._listening.begin(call_id, dspy.settings.caller_predict, reader)
        self.enter(call_id, call, streams=can_stream)

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self.clean(outputs)
        call = self.leave(call_id)
        if isinstance(call, HeardCall) and exception is None:
            self.report(call.finish())
        if statuses := self._statuses:
            self._status(statuses.lm_end_status_message(outputs), exception)

    # -- Tools -----------------------------------------------------------------------------------------------------

    def on_tool_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if instance.name in (FINISH, ending_tool(_caller(-1))):
            self._endings.add(call_id)
        elif statuses := self._statuses:
            self._status(statuses.tool_start_status_message(instance, inputs))

    def on_tool_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        if call_id in self._endings:
            self._endings.remove(call_id)
        elif not (isinstance(outputs, str) and outputs == COMPLETED) and (statuses := self._statuses):
            self._status(statuses.tool_end_status_message(outputs), exception)


# -- What listeners hear -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Answer:
    """A module that is running, and what its next LM call is to answer."""

    expected: tuple[type, Mapping[str, Any]] | None = None
    """The adapter, and the output fields that it asks for."""

    def reader(self) -> Reader | None:
        """Reads the next LM call; None: nothing of it can be read."""
        if self.expected is None:
            return None
        adapter, fields = self.expected
        return Reader(adapter, fields, raw=True, answer=_submitted(fields))


class Listening:
    """The listeners of one run."""

    def __init__(self, listeners: Sequence[Any]) -> None:
        self.heard = False
        """Whether any of them has heard anything."""
        self._listeners = listeners
        self._owners: dict[int, str] = {}

    def begin(self, call: str, predictor: Any, reader: Reader | None) -> "HeardCall":
        """An LM call of `predictor` starts. `call` is its id, `reader` reads it."""
        listeners = [listener for listener in self._listeners if listener.predict is predictor]
        return HeardCall(self, call, listeners, reader)

    def admits(self, listener: Any, call: str) -> bool:
        """Whether `listener` has an ear for `call`: it hears but one call in a run unless it allows reuse."""
        self.heard = True
        return listener.allow_reuse or self._owners.setdefault(id(listener), call) == call


class HeardCall:
    """The state of all listeners in one LM call."""

    def __init__(self, run: Listening, call: str, listeners: Iterable[Any], reader: Reader | None) -> None:
        self._run = run
        self._call = call
        self._plain: dict[str, list[Any]] = {}
        self._own: list[tuple[Any, Any]] = []
        self._reader = reader
        self._held: dict[str, str] = {}
        self._said: set[str] = set()
        self._open: str | None = None
        self._over = False
        for listener in listeners:
            if type(listener) is StreamListener:
                self._plain.setdefault(listener.signature_field_name, []).append(listener)
            else:
                self._own.append((listener, _renewed(listener)))

    def hear(self, chunk: Any) -> list[Any]:
        """What the listeners make of `chunk`. Of several candidates only the first one is heard."""
        piece = piece_of(chunk)
        if self._over or piece is None:
            return []
        heard = [*self._native(chunk), *self._split(piece)]
        for listener, state in self._own:
            response = state.receive(chunk)
            if response and self._run.admits(listener, self._call):
                heard.append(response)
        if piece.is_last:
            heard += self.finish()
        return heard

    def finish(self) -> list[Any]:
        """The LM call's text is whole; more text would be of another candidate, and is not heard."""
        if self._over:
            return []
        self._over = True
        heard = []
        if self._reader is not None:
            for field, text in chain(*self._reader.finish()):
                self._held[field] = self._held.get(field, "") + text
            if self._open is not None:
                heard += self._end(self._open, self._held.pop(self._open, ""))
        for listener, state in self._own:
            response = state.finalize()
            if response and self._run.admits(listener, self._call):
                heard.append(response)
        return heard

    def _native(self, chunk: Any) -> Iterable[Any]:
        """What the LM's own features stream: reasoning, citations and other types that parse chunks themselves."""
        for field, listeners in self._plain.items():
            for listener in listeners:
                kind = _output_type(listener)
                if kind is not None and (value := kind.parse_stream_chunk(chunk)):
                    yield from self._say(field, value, last=False, listeners=[listener])

    def _split(self, piece: Piece) -> list[Any]:
        reader = self._reader
        if reader is None:
            return []
        before = self._open
        new: dict[str, str] = {} if before is None else {before: ""}
        for field, delta in chain(*reader.feed(piece)):
            new[field] = new.get(field, "") + delta
        self._open = reader.field if reader.field in self._plain else None
        heard: list[Any] = []
        for field, delta in new.items():
            if field in self._plain:
                heard += self._cut(field, delta, ended=field != self._open, began=field != before)
        return heard

    def _cut(self, field: str, text: str, *, ended: bool, began: bool) -> list[Any]:
        text = self._held.pop(field, "") + text
        if ended:
            return self._end(field, text)
        if began or (self._reader is not None and self._reader.undecided):
            self._held[field] = text
            return []
        return self._say(field, text, last=False) if text else []

    def _end(self, field: str, text: str) -> list[Any]:
        return self._say(field, text, last=True) if text or field in self._said else []

    def _say(self, field: str, text: Any, *, last: bool, listeners: Sequence[Any] | None = None) -> list[Any]:
        self._said.add(field)
        heard = []
        for listener in self._plain[field] if listeners is None else listeners:
            if self._run.admits(listener, self._call):
                response = StreamResponse(listener.predict_name, field, text, is_last_chunk=last)
                response.call = self._call
                heard.append(response)
        return heard


def _renewed(listener: Any) -> Any:
    """A copy with a new state of DSPy's; what a subclass adds is shared."""
    state = copy.copy(listener)
    if isinstance(state, StreamListener):
        name, predict, path = listener.signature_field_name, listener.predict, listener.predict_name
        StreamListener.__init__(state, name, predict, path)
    return state


def _output_type(listener: Any) -> Any:
    """The type of the field, if it parses chunks itself."""
    info = listener.predict.signature.output_fields.get(listener.signature_field_name)
    kind: Any = None if info is None else info.annotation
    if not isinstance(kind, type) or not issubclass(kind, dspy.Type):
        return None
    streamable: Any = kind
    return streamable if streamable.is_streamable() else None


def _caller(position: int) -> Any:
    """The module at `position` among those whose calls go on, or None. The innermost one is at -1."""
    callers = dspy.settings.caller_modules or []
    return callers[position] if len(callers) >= -position else None


def _submitted(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """The outputs of the loop around the predictor that is being called, if its answer is submitted; without `fields`,
    which are the predictor's own."""
    loop = _caller(-2)
    if not submits(loop):
        return None
    return {name: annotation for name, annotation in annotations(loop.signature).items() if name not in fields}
