"""What `dspy.streamify` streams: statuses, and LM chunks or what listeners hear of them. Not events.

This module must not know how programs are called or how items travel.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import dspy
from dspy.clients.engines.streaming import EngineChunk
from dspy.streaming.messages import StatusMessage, StatusMessageProvider, StatusStreamingCallback
from dspy.utils.callback import ACTIVE_CALL_ID

from agentcast.agents.fields import Reader
from agentcast.agents.streaming.bridge import Bridge
from agentcast.agents.streaming.dspy_calls import annotations, can_stream, decides, ending_tool, submits
from agentcast.agents.streaming.listening import HeardCall, Listening

FINISH = "finish"
COMPLETED = "Completed."
"""The tool with which ReAct loops end, and what it returns: no statuses, as in DSPy. Nor are there any for `submit`."""


class Relay(Bridge):
    """One run of one streamified program: DSPy's callbacks and LM chunks in, items of the stream out.

    The listeners hear the LM calls of their predictors. Without listeners LM chunks pass as they are, and so does
    always what is no LM chunk: custom LMs and programs send items of their own.
    """

    def __init__(self, emit: Any, provider: StatusMessageProvider, listening: Listening | None) -> None:
        super().__init__(emit)
        # Where DSPy's own status callback is configured, that one's messages are wanted, not these.
        has_own = any(isinstance(each, StatusStreamingCallback) for each in dspy.settings.callbacks)
        self._provider = None if has_own else provider
        self._listening = listening
        self._roots: dict[str | None, str | None] = {}
        """Adapter call → the predictor call that it is part of."""
        self._expected: dict[str | None, tuple[type, dict[str, Any]]] = {}
        """Predictor call → adapter of its next LM call, and the output fields in the LM's text."""
        self._heard: dict[str | None, HeardCall] = {}
        self._endings: set[str] = set()
        """Calls of the tools with which loops end."""

    def read(self, chunk: Any) -> Iterable[Any]:
        if self._listening is None or not is_lm_chunk(chunk):
            return [chunk]
        call = self._heard.get(ACTIVE_CALL_ID.get())
        return [] if call is None else call.hear(chunk)

    @property
    def _teller(self) -> StatusMessageProvider | None:
        return self._provider if self.is_innermost else None

    def _status(self, message: str | None, exception: BaseException | None = None) -> None:
        if message:
            self.tell([StatusMessage(message)], exception)
            self.emit.hand_over()  # what announces a tool is out before the tool begins

    # -- Modules ---------------------------------------------------------------------------------------------------

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if isinstance(instance, dspy.Predict) and decides(instance):
            self.mute(call_id)
        if teller := self._teller:
            self._status(teller.module_start_status_message(instance, inputs))

    def on_module_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self._expected.pop(call_id, None)
        self.unmute(call_id)
        if teller := self._teller:
            self._status(teller.module_end_status_message(outputs), exception)

    # -- Adapters: no statuses, but LM calls may be inside ------------------------------------------------------------

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        root = self._enter(call_id)
        if "signature" in inputs:
            self._expected[root] = type(instance), annotations(inputs["signature"])

    def on_adapter_parse_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._enter(call_id)

    def on_adapter_format_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self.clean(outputs)
        self._roots.pop(call_id, None)

    on_adapter_parse_end = on_adapter_format_end

    def _enter(self, call_id: str) -> str | None:
        around: str | None = ACTIVE_CALL_ID.get()
        self._roots[call_id] = root = self._roots.get(around, around)
        return root

    # -- LMs -------------------------------------------------------------------------------------------------------

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if not can_stream(instance):
            self.mute(call_id)
        elif self._listening is not None and dspy.settings.send_stream is self.sink:
            around = ACTIVE_CALL_ID.get()
            expected = self._expected.get(self._roots.get(around, around))
            reader = None if expected is None else Reader(*expected, raw=True, answer=_submitted(expected[1]))
            self._heard[call_id] = self._listening.begin(call_id, dspy.settings.caller_predict, reader)
        if teller := self._teller:
            self._status(teller.lm_start_status_message(instance, inputs))

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self.clean(outputs)
        heard = self._heard.pop(call_id, None)
        self.unmute(call_id)
        if heard is not None and exception is None:
            self.tell(heard.finish())
        if teller := self._teller:
            self._status(teller.lm_end_status_message(outputs), exception)

    # -- Tools -----------------------------------------------------------------------------------------------------

    def on_tool_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if instance.name in (FINISH, ending_tool(_caller(-1))):
            self._endings.add(call_id)
        elif teller := self._teller:
            self._status(teller.tool_start_status_message(instance, inputs))

    def on_tool_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        if call_id in self._endings:
            self._endings.remove(call_id)
        elif not (isinstance(outputs, str) and outputs == COMPLETED) and (teller := self._teller):
            self._status(teller.tool_end_status_message(outputs), exception)


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


def is_lm_chunk(value: Any) -> bool:
    """Whether `value` is a chunk as DSPy's LMs stream them, native or LiteLLM's."""
    kind = type(value)
    if isinstance(value, EngineChunk):
        return True
    return bool(kind.__name__ == "ModelResponseStream" and kind.__module__.startswith("litellm"))
