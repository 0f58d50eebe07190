"""One run of one program: DSPy's callbacks and LM chunks in, events out.

This module must not know how programs are called or how events travel.
"""

import functools
import itertools
import re
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import dspy
from dspy.adapters.types.base_type import Type as CustomType
from dspy.utils.callback import ACTIVE_CALL_ID
from dspy.utils.exceptions import AdapterParseError, LMError

from agentcast.agents.base import Emitter, public_message
from agentcast.agents.events import (
    AgentEvent,
    Failure,
    LmEnd,
    LmStart,
    MessageEnd,
    NodeEnd,
    NodeError,
    NodeStart,
    ToolEnd,
    ToolStart,
    Usage,
)
from agentcast.agents.failures import failure_of, is_failure
from agentcast.agents.fields import Messages
from agentcast.agents.observations import holds_types
from agentcast.agents.streaming.bridge import Bridge
from agentcast.agents.streaming.dspy_calls import can_stream, decides
from agentcast.agents.streaming.usage import Meter


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
    parts: frozenset[int] = frozenset()
    """Ids of modules whose calls are this node's own work and no spans of their own."""
    spoken: list[str] | None = None
    """Messages that have ended in the attempt of the node around."""


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
    """One run of one program: DSPy's callbacks and LM chunks in, events out.

    Keyed by DSPy's call ids. In a start as in an end callback ACTIVE_CALL_ID is the id of the call around; in the sink
    it is that of the LM call. The state of a call is touched by its own, sequential, flow of control only.
    """

    joins = True

    def __init__(
        self, program: Any, emit: Emitter, shown: Collection[str] | None, name: str | None, *, root: bool = True
    ) -> None:
        super().__init__(emit)
        self.meter = Meter(self.call_here)
        self.calls: dict[str | None, _Call] = {}
        self._program = program
        self._root = root
        self._shown = shown
        self._names = {id(part): _display_name(path) for path, part in program.named_sub_modules()}
        self._names[id(program)] = name or type(program).__name__
        self._spans = itertools.count(1)
        self._message_ids = itertools.count(1)

    def call_here(self) -> _Call | None:
        """The call that the calling code is in; in a callback, the one around the call that starts or ends."""
        return self.calls.get(ACTIVE_CALL_ID.get())

    def read(self, chunk: Any) -> Iterable[AgentEvent]:
        """A chunk in the shape of OpenAI's. Of several candidates only the first one is told."""
        call = self.call_here()
        if call is None or call.messages is None:
            return
        for choice in getattr(chunk, "choices", None) or ():
            if getattr(choice, "index", 0):
                continue
            text = getattr(getattr(choice, "delta", None), "content", None)
            if isinstance(text, str) and text:
                yield from call.messages.feed(text)
            if getattr(choice, "finish_reason", None) is not None:
                yield from call.messages.finish()

    # -- Modules ---------------------------------------------------------------------------------------------------

    @_handler
    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        around = self.call_here()
        if around is None and instance is self._program and not self._root:
            return
        parent = None if around is None else around.span
        if around is not None and id(instance) in around.parts:
            call = self.calls[call_id] = replace(around, started=time.monotonic(), messages=None, told=False)
        else:
            call, parent = self._open(call_id, self._names.get(id(instance)) or type(instance).__name__)
        call.module = instance
        if isinstance(instance, dspy.Predict):
            call.messages = Messages(call.span, self._shown, lambda: f"m{next(self._message_ids)}")
            if decides(instance):
                self.mute(call_id)
        if not call.told:
            return
        kind: Literal["agent", "module"] = "agent" if instance is self._program and parent is None else "module"
        self.tell([NodeStart(span=call.span, parent=parent, node=call.name, kind=kind)])

    @_handler
    def on_module_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        call = self.calls.pop(call_id, None)
        if call is None:
            return
        self.unmute(call_id)
        span, node, duration = call.span, call.name, _since(call)
        events: list[AgentEvent] = []
        if exception is not None:
            failure = _failure(exception)
            events += call.messages.retract(failure.message) if call.messages else []
            end: AgentEvent = NodeError(span=span, node=node, duration=duration, error=failure)
        else:
            if call.messages is not None and isinstance(outputs, dspy.Prediction):
                fields = [field for field in outputs.keys() if field != "logprobs"]
                events += call.messages.settle({field: outputs[field] for field in fields})
            end = NodeEnd(span=span, node=node, duration=duration)
        if call.spoken is not None:
            call.spoken += [event.message for event in events if isinstance(event, MessageEnd)]
        self.tell([*events, end] if call.told else events, exception)

    # -- Nodes of graphs: spans that are told of by `nodes` ----------------------------------------------------------

    def open_node(self, call_id: str, name: str, parts: Iterable[Any]) -> tuple[_Call, str | None]:
        """A new span for a node whose own work is done by the modules `parts`, and the span around it."""
        call, parent = self._open(call_id, name)
        call.parts, call.spoken = frozenset(map(id, parts)), []
        return call, parent

    def close_node(self, call_id: str) -> None:
        """The node's span has ended; its messages are the attempt's of a node around it."""
        call, around = self.calls.pop(call_id, None), self.call_here()
        if call is not None and around is not None and around.spoken is not None:
            around.spoken += call.spoken or ()

    def node_error(self, call: _Call, error: BaseException) -> NodeError:
        code = "timeout" if isinstance(error, TimeoutError) else "error"
        return NodeError(span=call.span, node=call.name, error=_failure(error, code), duration=_since(call))

    # -- Adapters, and whatever else has call ids: no spans, but LM calls may be inside -----------------------------

    @_handler
    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        around = self.call_here()
        if around is not None and around.messages is not None and "signature" in inputs:  # nested calls: the inner one
            fields = inputs["signature"].output_fields
            around.messages.expect(type(instance), {field: info.annotation for field, info in fields.items()})
        self._pass_through(call_id)

    @_handler
    def _start_pass_through(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._pass_through(call_id)

    def _end_pass_through(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self.calls.pop(call_id, None)

    def on_adapter_format_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self.clean(outputs)
        self.calls.pop(call_id, None)

    on_adapter_parse_end = on_adapter_format_end
    on_adapter_parse_start = on_evaluate_start = on_compile_start = _start_pass_through
    on_interpreter_execute_start = on_interpreter_tool_call_start = _start_pass_through
    on_evaluate_end = on_compile_end = _end_pass_through
    on_interpreter_execute_end = on_interpreter_tool_call_end = _end_pass_through

    # -- LMs -------------------------------------------------------------------------------------------------------

    @_handler
    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        around = self.call_here()
        model = str(getattr(instance, "model", type(instance).__name__))
        call, parent = self._open(call_id, model)
        call.messages = around.messages if around else None
        events: list[AgentEvent] = [LmStart(span=call.span, parent=parent, model=model)]
        if call.messages is not None:
            events += call.messages.begin()
        if call.messages is None or not call.messages.can_stream or not can_stream(instance):
            # A call that shows nothing keeps the retries and fallbacks that DSPy gives up for streams.
            self.mute(call_id)
        self.tell(events)

    @_handler
    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self.clean(outputs)
        call = self._close(call_id)
        if call is None:
            return
        error = None if exception is None else _failure(exception)
        events: list[AgentEvent] = []
        if call.messages is not None:
            events += call.messages.finish() if error is None else call.messages.retract(error.message)
        events.append(LmEnd(span=call.span, duration=_since(call), usage=call.usage, error=error))
        self.tell(events, exception)

    # -- Tools -----------------------------------------------------------------------------------------------------

    @_handler
    def on_tool_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        around = self.call_here()
        if instance.name == "finish" and around is not None and isinstance(around.module, dspy.ReAct):
            self._pass_through(call_id)  # not a tool, but how the loop ends
            return
        call, parent = self._open(call_id, instance.name)
        args, server = inputs.get("kwargs", {}), getattr(instance, "server", None)
        self.tell([ToolStart(span=call.span, parent=parent, tool=call.name, args=args, server=server)])

    @_handler
    def on_tool_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        call = self._close(call_id)
        if call is None:
            return
        error = None if exception is None else _failure(exception, "tool_error")
        end = ToolEnd(span=call.span, tool=call.name, duration=_since(call), result=_shown(outputs), error=error)
        self.tell([end], exception)

    # -- What they share -------------------------------------------------------------------------------------------

    def _open(self, call_id: str, name: str) -> tuple[_Call, str | None]:
        """A new span, and the one around it."""
        around = self.call_here()
        call = self.calls[call_id] = _Call(str(next(self._spans)), name, time.monotonic())
        if around is not None:
            call.spoken = around.spoken
        return call, None if around is None else around.span

    def _pass_through(self, call_id: str) -> None:
        """Take what is called inside this call as called by the one around it."""
        around = self.call_here()
        if around is not None:
            self.calls[call_id] = _Call(around.span, around.name, around.started, messages=around.messages, told=False)

    def _close(self, call_id: str) -> _Call | None:
        """The call that ends, if it is a span."""
        call = self.calls.pop(call_id, None)
        if call is None or not call.told:
            return None
        self.unmute(call_id)
        return call


def _since(call: _Call) -> float:
    return time.monotonic() - call.started


def _display_name(path: str) -> str:
    """The name of a part, by its path; in a compiled graph, that in its node."""
    return re.sub(r"^(steps\[[^]]*\]\.?)+", "", path.removeprefix("self."))


def _shown(result: Any) -> Any:
    """Images and the like as the data that they hold, not as the text that stands for them in a prompt."""
    if isinstance(result, CustomType):
        return dict(result)
    return [dict(item) if isinstance(item, CustomType) else item for item in result] if holds_types(result) else result


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
