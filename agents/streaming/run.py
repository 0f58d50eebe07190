"""One run of one program: DSPy's callbacks and LM chunks in, events out.

This module must not know how programs are called or how events travel, nor what a graph is.
"""

import functools
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import dspy
from dspy.utils.exceptions import AdapterParseError, LMError

from agentcast.agents._dspy.names import streams
from agentcast.agents.base import Emitter, public_message
from agentcast.agents.context import Numbers, current, within
from agentcast.agents.events import (
    AgentEvent,
    Failure,
    LmEnd,
    LmStart,
    MessageEnd,
    MessageRetracted,
    NodeEnd,
    NodeError,
    NodeStart,
    ToolEnd,
    ToolStart,
    Usage,
    ValidationFailed,
)
from agentcast.agents.failures import failure_of, is_failure
from agentcast.agents.fields import FieldMessages, Messages, piece_of
from agentcast.agents.observations import holds_types
from agentcast.agents.streaming.bridge import Bridge
from agentcast.agents.streaming.calls import annotations, decides, ending_tool, submits


@dataclass(slots=True, eq=False)
class Call:
    """A call that has not ended. Its state is touched by its own, sequential, flow of control only."""

    span: str
    name: str
    started: float
    parent: str | None = None
    module: Any = None
    messages: Messages | None = None
    """Of a predictor, and of its LM calls."""
    answer: FieldMessages | None = None
    """Of a loop whose answer is what its tool `submit` is called with."""
    usage: Usage | None = None
    flush: Callable[[], None] | None = None
    """Sends what is held back of an LM call's texts."""
    is_span: bool = True
    """Whether the call is a span of its own; otherwise `span` is the one around it."""
    parts: frozenset[int] = frozenset()
    """Ids of modules whose calls are this node's own work and no spans of their own."""
    spoken: list[str] | None = None
    """Messages that have ended in the attempt of the node around."""

    @property
    def duration(self) -> float:
        """Seconds since it started."""
        return time.monotonic() - self.started


def _handler(method: Callable[..., None]) -> Callable[..., None]:
    """A DSPy callback whose own errors end the run. DSPy logs and swallows an `Exception`."""

    @functools.wraps(method)
    def guarded(self: "Run", *args: Any, **named: Any) -> None:
        try:
            method(self, *args, **named)
        except Exception as error:  # noqa: BLE001 -- kept, and raised by run_program
            self.fail(error)

    return guarded


class Run(Bridge):
    """One run of one program. Calls of adapters, evaluators and interpreters are no spans: what they call is called by
    the call around them."""

    retracts = True
    joins = True

    def __init__(
        self, program: Any, emit: Emitter, shown: Collection[str] | None, name: str | None, *, root: bool = True
    ) -> None:
        super().__init__(emit)
        self._program = program
        self._root = root
        self._shown = shown
        self._names = {id(part): _display_name(path) for path, part in program.named_sub_modules()}
        self._names[id(program)] = name or type(program).__name__
        context = current()
        is_part = context.emitter is emit  # of a run that may run several programs, all into one emitter
        self.numbers = context.numbers if is_part else Numbers()
        self.parent = context.span if is_part else None

    def read(self, chunk: Any) -> Iterable[AgentEvent]:
        """A chunk in the shape of OpenAI's. Of several candidates only the first one is shown."""
        call, piece = self.here(), piece_of(chunk)
        if call is not None and call.messages is not None and piece is not None:
            yield from call.messages.feed(piece)
            if piece.is_last:
                yield from call.messages.finish()

    # -- Modules ---------------------------------------------------------------------------------------------------

    @_handler
    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        around = self.here()
        if around is None and instance is self._program and not self._root:
            return
        if around is not None and id(instance) in around.parts:
            call = replace(around, started=time.monotonic(), messages=None, answer=None, is_span=False)
        else:
            call = self._new(self._names.get(id(instance)) or type(instance).__name__)
        call.module = instance
        is_predictor = isinstance(instance, dspy.Predict)
        if is_predictor:
            fields, answer = annotations(instance.signature), None if around is None else around.answer
            call.messages = Messages(call.span, self._shown, self._new_message, fields, answer)
        elif submits(instance):
            fields = annotations(instance.signature)
            call.answer = FieldMessages(call.span, self._shown, self._new_message, fields)
        if call.is_span:
            kind: Literal["agent", "module"] = "agent" if instance is self._program and around is None else "module"
            self.report([NodeStart(span=call.span, parent=call.parent, node=call.name, kind=kind)])
        self.enter(call_id, call, span=call.span, streams=not (is_predictor and decides(instance)))

    @_handler
    def on_module_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        call = self.leave(call_id)
        if call is None:
            return
        messages = call.messages or call.answer
        events: list[AgentEvent] = []
        if exception is not None:
            failure = _failure(exception)
            events += messages.retract(failure.message) if messages else []
            end: AgentEvent = NodeError(span=call.span, node=call.name, duration=call.duration, error=failure)
        else:
            if messages is not None and isinstance(outputs, dspy.Prediction):
                fields = call.answer.fields if call.answer else [each for each in outputs.keys() if each != "logprobs"]
                events += messages.settle({field: outputs[field] for field in fields})
            end = NodeEnd(span=call.span, node=call.name, duration=call.duration)
        if call.spoken is not None:
            call.spoken += [event.message for event in events if isinstance(event, MessageEnd)]
        self.report([*events, end] if call.is_span else events, exception)

    # -- Adapters --------------------------------------------------------------------------------------------------

    @_handler
    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        call = self.here()
        if call is not None and call.messages is not None and "signature" in inputs:  # nested calls: the inner one
            call.messages.expect(type(instance), annotations(inputs["signature"]))

    def on_adapter_format_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self.clean(outputs)

    on_adapter_parse_end = on_adapter_format_end

    # -- LMs -------------------------------------------------------------------------------------------------------

    @_handler
    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        around = self.here()
        model = str(getattr(instance, "model", type(instance).__name__))
        call = self._new(model)
        call.messages = messages = around.messages if around else None
        events: list[AgentEvent] = [LmStart(span=call.span, parent=call.parent, model=model)]
        if messages is not None:
            events += messages.begin()
        self.report(events)
        is_shown = messages is not None and messages.can_stream and streams(instance)
        self.enter(call_id, call, span=call.span, streams=is_shown)

    @_handler
    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self.clean(outputs)
        call = self.here()
        if call is not None and call.flush is not None:
            call.flush()  # before the call's end, also where it breaks off
        call = self.leave(call_id)
        if call is None:
            return
        error = None if exception is None else _failure(exception)
        events: list[AgentEvent] = []
        if call.messages is not None:
            events += call.messages.finish() if error is None else call.messages.retract(error.message)
        events.append(LmEnd(span=call.span, duration=call.duration, usage=call.usage, error=error))
        self.report(events, exception)

    # -- Tools -----------------------------------------------------------------------------------------------------

    @_handler
    def on_tool_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        around = self.here()
        if around is not None and instance.name == ending_tool(around.module):
            return  # not a tool, but how the loop ends
        call = self._new(instance.name)
        args, server = inputs.get("kwargs", {}), getattr(instance, "server", None)
        self.report([ToolStart(span=call.span, parent=call.parent, tool=call.name, args=args, server=server)])
        self.enter(call_id, call, span=call.span)

    @_handler
    def on_tool_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        call = self.leave(call_id)
        if call is None:
            return
        error = None if exception is None else _failure(exception, "tool_error")
        end = ToolEnd(span=call.span, tool=call.name, duration=call.duration, result=_shown(outputs), error=error)
        self.report([end], exception)

    # -- What they share -------------------------------------------------------------------------------------------

    def _new_message(self) -> str:
        return f"m{next(self.numbers.messages)}"

    def _new(self, name: str) -> Call:
        """A call that is a span inside the one around it."""
        around = self.here()
        call = Call(str(next(self.numbers.spans)), name, time.monotonic(), self.parent)
        if around is not None:
            call.parent, call.spoken = around.span, around.spoken
        return call

    # -- Nodes of graphs -------------------------------------------------------------------------------------------

    @contextmanager
    def node(self, name: str, inputs: Mapping[str, Any], parts: Iterable[Any]) -> Iterator["NodeSpan"]:
        """See `node_span`."""
        around, call = self.here(), self._new(name)
        call.parts, call.spoken = frozenset(map(id, parts)), []
        span = NodeSpan(self, call)
        self.report([NodeStart(span=call.span, parent=call.parent, node=name, kind="graph", inputs=dict(inputs))])
        try:
            with within(calls={**current().calls, self: call}, span=call.span):
                yield span
        except BaseException as error:
            span.fail(error)
            raise
        finally:
            if around is not None and around.spoken is not None:  # its messages are the attempt's of a node around it
                around.spoken += call.spoken


class NodeSpan:
    """A node of a graph that is running. In no run, all its methods do nothing.

    A node reports what it is given, each failed attempt, and what it sets. What goes on inside, LM and tool calls and
    messages, becomes part of its span by the run.
    """

    def __init__(self, run: Run | None = None, call: Any = None) -> None:
        self._run = run
        self._call = call

    def attempt(self) -> None:
        """An attempt begins: what its calls say from here on is void if it is rejected."""
        if self._run is not None:
            self._call.spoken.clear()

    def reject(self, attempt: int, max_retries: int, error: str, failed_fields: Iterable[str]) -> None:
        """The attempt has failed. `attempt` counts from 1."""
        if self._run is None:
            return
        reason = "the output was rejected"
        retracted = [MessageRetracted(message=message, reason=reason) for message in self._call.spoken]
        self._call.spoken.clear()
        failed = ValidationFailed(
            span=self._call.span,
            node=self._call.name,
            attempt=attempt,
            max_retries=max_retries,
            error=error,
            failed_fields=tuple(failed_fields),
        )
        self._run.report([*retracted, failed])

    def end(self, patch: Callable[[], Mapping[str, Any]]) -> None:
        """The node has set the fields of `patch()`."""
        if self._run is not None:
            call = self._call
            self._run.report([NodeEnd(span=call.span, node=call.name, patch=dict(patch()), duration=call.duration)])

    def fail(self, error: BaseException) -> None:
        """The node has failed, or is cancelled."""
        if self._run is not None:
            call = self._call
            failure = _failure(error, "timeout" if isinstance(error, TimeoutError) else "error")
            end = NodeError(span=call.span, node=call.name, error=failure, duration=call.duration)
            self._run.report([end], error)


@contextmanager
def node_span(name: str, inputs: Callable[[], Mapping[str, Any]], parts: Iterable[Any] = ()) -> Iterator[NodeSpan]:
    """Inside, the node `name` is running, and what is called is called by it. `parts` are the modules that do its own
    work: their calls are no spans beside it.

    To be left after `NodeSpan.end`, or by an exception, which is reported.
    """
    run = current().observer
    if isinstance(run, Run):
        with run.node(name, inputs(), parts) as span:
            yield span
    else:
        yield NodeSpan()


def _display_name(path: str) -> str:
    """The name of a part, by its path; in a compiled graph, that in its node."""
    return re.sub(r"^(steps\[[^]]*\]\.?)+", "", path.removeprefix("self."))


def _shown(result: Any) -> Any:
    """Images and the like as the data that they hold, not as the text that stands for them in a prompt."""
    if isinstance(result, dspy.Type):
        return dict(result)
    return [dict(item) if isinstance(item, dspy.Type) else item for item in result] if holds_types(result) else result


def _failure(error: BaseException, code: str = "error") -> Failure:
    if not is_failure(error):
        return Failure(code="cancelled", message="cancelled")
    if isinstance(error, AdapterParseError):
        fields = ", ".join(error.signature.output_fields)
        return Failure(code="parse_error", message=f"the model's answer does not have the form asked for ({fields})")
    if isinstance(error, LMError):
        failure = failure_of(error)
        return Failure(code=failure.code, message=failure.message)
    return Failure(code=code, message=public_message(error))
