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

Public: `run_program`, `Outcome`, `is_async`, `current_span`, `current_emitter`.
"""

import asyncio
import functools
import inspect
import itertools
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, NoReturn

import anyio
import anyio.from_thread
import anyio.to_thread
import dspy
from dspy.experimental import Choice, Noul, Score
from dspy.utils.callback import ACTIVE_CALL_ID, BaseCallback
from dspy.utils.exceptions import AdapterParseError, LMError
from dspy.utils.usage_tracker import UsageTracker

from agents.base import Emitter, Stopped, public_message
from agents.events import (
    AgentEvent,
    Failure,
    LmEnd,
    LmStart,
    NodeEnd,
    NodeError,
    NodeStart,
    ToolEnd,
    ToolStart,
    Usage,
)
from agents.fields import Messages

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
    run = _Run(program, emit, messages, name)
    outer = dspy.settings.usage_tracker
    settings = {
        "callbacks": [*dspy.settings.callbacks, run],
        "send_stream": _Sink(run),
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
    except BaseException as error:
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
    call = None if run is None else run.calls.get(ACTIVE_CALL_ID.get())
    return None if call is None else call.span


def current_emitter() -> Emitter | None:
    """The emitter of the run that the calling code belongs to; None outside of a run."""
    run = dspy.settings.get(_SETTING)
    return None if run is None else run.emit


@dataclass(slots=True, eq=False)
class _Call:
    """A DSPy call that has not ended."""

    span: str
    name: str
    started: float
    module: Any = None
    messages: Messages | None = None
    """Of a predictor, and of its LM calls."""
    usage: Usage | None = None
    told: bool = True
    """Whether the call is a span of its own; otherwise `span` is the one around it."""
    _muted: AbstractContextManager[Any] | None = None

    def mute(self) -> None:
        """Have DSPy not stream inside this call, until `unmute`. Both run in the call's own context."""
        self._muted = dspy.context(send_stream=None)
        self._muted.__enter__()

    def unmute(self) -> None:
        if self._muted is not None:
            self._muted.__exit__(None, None, None)


def _handler(method: Callable[..., None]) -> Callable[..., None]:
    """A DSPy callback whose own errors end the run. DSPy logs and swallows an `Exception`."""

    @functools.wraps(method)
    def guarded(self: "_Run", *args: Any, **named: Any) -> None:
        try:
            method(self, *args, **named)
        except Exception as error:  # noqa: BLE001 -- kept, and raised by run_program
            self.fail(error)

    return guarded


class _Run(BaseCallback):  # type: ignore[misc]  # dspy is untyped
    """One run of one program: DSPy's callbacks and LM chunks in, events out.

    Keyed by DSPy's call ids. In a start as in an end callback ACTIVE_CALL_ID is the id of the call around; in the sink
    it is that of the LM call. The state of a call is touched by its own, sequential, flow of control only.
    """

    def __init__(self, program: Any, emit: Emitter, shown: Collection[str] | None, name: str | None) -> None:
        self.emit = emit
        self.meter = _Meter(self)
        self.calls: dict[str | None, _Call] = {}
        self._program = program
        self._shown = shown
        self._names = {id(part): path.removeprefix("self.") for path, part in program.named_sub_modules()}
        self._names[id(program)] = name or type(program).__name__
        self._spans = itertools.count(1)
        self._message_ids = itertools.count(1)
        self._closed = False
        self._failure: Exception | None = None

    # -- Ending ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Nothing is emitted any more; what still runs in a thread is stopped by its next callback."""
        self._closed = True

    def fail(self, error: Exception) -> NoReturn:
        """End the run with `error`, which is ours, not the program's."""
        self._failure = self._failure or error
        self._closed = True
        raise Stopped from error

    def raise_cause(self, error: BaseException) -> NoReturn:
        """Raise what ended the run, given what came out of the program: task groups wrap it, threads rename it."""
        if self._failure is not None and not isinstance(error, asyncio.CancelledError):
            raise self._failure
        if isinstance(error, BaseExceptionGroup) and error.subgroup(Stopped):
            raise Stopped from error
        raise error

    # -- Modules ---------------------------------------------------------------------------------------------------

    @_handler
    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        call, parent = self._open(call_id, self._names.get(id(instance)) or type(instance).__name__)
        call.module = instance
        if isinstance(instance, dspy.Predict):
            call.messages = Messages(call.span, self._shown, lambda: f"m{next(self._message_ids)}")
            if _decides(instance):
                call.mute()
        kind: Literal["agent", "module"] = "agent" if instance is self._program and parent is None else "module"
        self._tell([NodeStart(span=call.span, parent=parent, node=call.name, kind=kind)])

    @_handler
    def on_module_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        call = self._close(call_id)
        if call is None:
            return
        ended, duration = {"span": call.span, "node": call.name}, _since(call)
        events: list[AgentEvent] = []
        if call.messages is not None and exception is not None:
            events += call.messages.retract(_failure(exception).message)
        elif call.messages is not None and isinstance(outputs, dspy.Prediction):
            events += call.messages.settle({field: outputs[field] for field in outputs.keys() if field != "logprobs"})
        if exception is None:
            events.append(NodeEnd(**ended, duration=duration))
        else:
            events.append(NodeError(**ended, duration=duration, error=_failure(exception)))
        self._tell(events, exception)

    # -- Adapters, and whatever else has call ids: no spans, but LM calls may be inside -----------------------------

    @_handler
    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._pass_through(call_id)
        messages = self.calls[call_id].messages
        if messages is not None and "signature" in inputs:  # not in the outer one of two nested calls
            fields = inputs["signature"].output_fields
            messages.expect(type(instance), {field: info.annotation for field, info in fields.items()})

    @_handler
    def on_adapter_parse_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._pass_through(call_id)

    @_handler
    def on_evaluate_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._pass_through(call_id)

    def _end_pass_through(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self.calls.pop(call_id, None)

    on_adapter_format_end = on_adapter_parse_end = on_evaluate_end = _end_pass_through

    # -- LMs -------------------------------------------------------------------------------------------------------

    @_handler
    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        around = self.calls.get(ACTIVE_CALL_ID.get())
        model = str(getattr(instance, "model", type(instance).__name__))
        call, parent = self._open(call_id, model)
        call.messages = around.messages if around else None
        events: list[AgentEvent] = [LmStart(span=call.span, parent=parent, model=model)]
        if call.messages is not None:
            events += call.messages.begin()
        if call.messages is None or not call.messages.can_stream or not _can_stream(instance):
            # A call that shows nothing keeps the retries and fallbacks that DSPy gives up for streams.
            call.mute()
        self._tell(events)

    @_handler
    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        call = self._close(call_id)
        if call is None:
            return
        events: list[AgentEvent] = []
        if call.messages is not None:
            failed = exception is not None
            events += call.messages.retract(_failure(exception).message) if failed else call.messages.finish()
        error = None if exception is None else _failure(exception)
        events.append(LmEnd(span=call.span, duration=_since(call), usage=call.usage, error=error))
        self._tell(events, exception)

    # -- Tools -----------------------------------------------------------------------------------------------------

    @_handler
    def on_tool_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        around = self.calls.get(ACTIVE_CALL_ID.get())
        if instance.name == "finish" and around is not None and isinstance(around.module, dspy.ReAct):
            self._pass_through(call_id)  # not a tool, but how the loop ends
            return
        call, parent = self._open(call_id, instance.name)
        self._tell([ToolStart(span=call.span, parent=parent, tool=call.name, args=inputs.get("kwargs", {}))])

    @_handler
    def on_tool_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        call = self._close(call_id)
        if call is None:
            return
        error = None if exception is None else _failure(exception, "tool_error")
        end = ToolEnd(span=call.span, tool=call.name, duration=_since(call), result=outputs, error=error)
        self._tell([end], exception)

    # -- What they share -------------------------------------------------------------------------------------------

    def _open(self, call_id: str, name: str) -> tuple[_Call, str | None]:
        """A new span, and the one around it."""
        around = self.calls.get(ACTIVE_CALL_ID.get())
        call = self.calls[call_id] = _Call(str(next(self._spans)), name, time.monotonic())
        return call, None if around is None else around.span

    def _pass_through(self, call_id: str) -> None:
        """Take what is called inside this call as called by the one around it."""
        around = self.calls.get(ACTIVE_CALL_ID.get())
        if around is not None:
            self.calls[call_id] = _Call(around.span, around.name, around.started, messages=around.messages, told=False)

    def _close(self, call_id: str) -> _Call | None:
        """The call that ends, if it is a span."""
        call = self.calls.pop(call_id, None)
        if call is None or not call.told:
            return None
        call.unmute()
        return call

    def _tell(self, events: Iterable[AgentEvent], exception: BaseException | None = None) -> None:
        """Emit, from whatever thread. Where the call ends by cancellation, that goes on rather than `Stopped`."""
        try:
            for event in events:
                self.check()
                self.emit.nowait(event)
        except Stopped:
            if exception is None or isinstance(exception, Exception):
                raise

    def check(self) -> None:
        """:raises Stopped: the run is over."""
        if self._closed:
            raise Stopped


class _Sink:
    """DSPy's `send_stream`: where an LM call, or a worker thread through anyio, awaits its chunks to be taken."""

    def __init__(self, run: _Run) -> None:
        self._run = run

    async def send(self, chunk: Any) -> None:
        run = self._run
        run.check()
        call = run.calls.get(ACTIVE_CALL_ID.get())
        if call is None or call.messages is None:
            return
        try:
            for event in _read(chunk, call.messages):
                await run.emit.send(event)
        except Exception as error:  # noqa: BLE001 -- kept, and raised by run_program; it is no failure of the LM
            run.fail(error)


class _Meter(UsageTracker):  # type: ignore[misc]  # dspy is untyped
    """What the LM calls of one run use, each and together."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self._run = run

    def __deepcopy__(self, memo: Any) -> "_Meter":
        return self  # `dspy.Parallel` copies trackers for its threads, and drops the copies

    def add_usage(self, lm: str, usage_entry: dict[str, Any]) -> None:
        super().add_usage(lm, usage_entry)
        call = self._run.calls.get(ACTIVE_CALL_ID.get())
        if call is not None and usage_entry:
            call.usage = _sum([usage_entry], call.usage)

    def total(self) -> Usage | None:
        return _sum(entry for entries in list(self.usage_data.values()) for entry in list(entries))

    def report(self, outer: Any) -> None:
        """Add it all to the tracker that was there before the run."""
        if outer is not None:
            for lm, entries in self.usage_data.items():
                outer.usage_data[lm].extend(entries)


def _read(chunk: Any, messages: Messages) -> Iterable[AgentEvent]:
    """A chunk in the shape of OpenAI's. Of several candidates only the first one is told."""
    for choice in getattr(chunk, "choices", None) or ():
        if getattr(choice, "index", 0):
            continue
        text = getattr(getattr(choice, "delta", None), "content", None)
        if isinstance(text, str) and text:
            yield from messages.feed(text)
        if getattr(choice, "finish_reason", None) is not None:
            yield from messages.finish()


def _can_stream(lm: Any) -> bool:
    """Whether the call of `lm` whose start callback is running can send chunks."""
    awaited = _is_awaited()
    engine = getattr(lm, "_async_engine_spec", None) if awaited else getattr(lm, "engine", None)
    if engine is not None and not isinstance(engine, str) and not callable(getattr(engine, "stream", None)):
        return False
    return awaited or _is_worker_thread()


def _is_awaited() -> bool:
    """Whether the call whose start callback is running is a coroutine. Callbacks are not told; but the wrapper in which
    DSPy runs them is a coroutine if the call is, and is on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals["__name__"] != BaseCallback.__module__:
        frame = frame.f_back
    while frame is not None and frame.f_globals["__name__"] == BaseCallback.__module__:
        if frame.f_code.co_flags & inspect.CO_COROUTINE:
            return True
        frame = frame.f_back
    return False


def _is_worker_thread() -> bool:
    """Whether this thread is anyio's, from which DSPy's synchronous streaming can reach the loop."""
    try:
        anyio.from_thread.check_cancelled()
    except anyio.NoEventLoopError:
        return False
    except asyncio.CancelledError:
        pass
    return True


def _decides(predictor: Any) -> bool:
    """Whether `predictor` has decision outputs, which DSPy refuses to make while streaming."""
    lm = predictor.lm or dspy.settings.lm
    if predictor.fields or getattr(lm, "supports_decision_requests", False) is True:
        return True
    fields = predictor.signature.output_fields.values()
    types = [annotation for info in fields for annotation in (info.annotation, *info.metadata)]
    return any(isinstance(each, type) and issubclass(each, Choice | Noul | Score) for each in types)


def _since(call: _Call) -> float:
    return time.monotonic() - call.started


def _failure(error: BaseException, code: str = "error") -> Failure:
    if not isinstance(error, Exception):
        return Failure(code="cancelled", message="cancelled")
    if isinstance(error, AdapterParseError):
        fields = ", ".join(error.signature.output_fields)
        return Failure(code="parse_error", message=f"the model's answer does not have the form asked for ({fields})")
    if isinstance(error, LMError):
        code = "lm_error"
    return Failure(code=code, message=public_message(error))


def _sum(entries: Iterable[Mapping[str, Any]], start: Usage | None = None) -> Usage | None:
    total = start
    for entry in entries:
        usage = _usage(entry)
        total = usage if total is None else total + usage
    return total


def _usage(entry: Mapping[str, Any]) -> Usage:
    """A provider's usage report. Names differ; what is no number is left out."""
    details = entry.get("prompt_tokens_details") or entry.get("input_tokens_details") or {}
    if hasattr(details, "model_dump"):
        details = details.model_dump()
    cached = _number(details, "cached_tokens")
    cost = _number(entry, "cost")
    return Usage(
        input_tokens=int(_number(entry, "prompt_tokens", "input_tokens") or 0),
        output_tokens=int(_number(entry, "completion_tokens", "output_tokens") or 0),
        cached_tokens=None if cached is None else int(cached),
        cost=cost,
    )


def _number(entry: Any, *names: str) -> float | None:
    values = [entry.get(name) for name in names] if isinstance(entry, Mapping) else []
    return next((value for value in values if isinstance(value, int | float) and not isinstance(value, bool)), None)
