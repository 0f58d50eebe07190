"""What `dspy.streamify` streams: statuses, and LM chunks or what listeners hear of them. Not events.

This module must not know how programs are called or how items travel.
"""

from collections.abc import Iterable
from typing import Any

import dspy
from dspy.clients.engines.streaming import EngineChunk
from dspy.streaming.messages import StatusMessage, StatusMessageProvider, StatusStreamingCallback
from dspy.utils.callback import ACTIVE_CALL_ID

from agentcast.agents.streaming.bridge import Bridge
from agentcast.agents.streaming.dspy_calls import can_stream, decides
from agentcast.agents.streaming.listening import Expected, HeardCall, Listening

FINISH = "finish"
COMPLETED = "Completed."
"""The tool with which ReAct loops end, and what it returns: not told, as DSPy does not."""


class Relay(Bridge):
    """One run of one streamified program: DSPy's callbacks and LM chunks in, items of the stream out.

    The listeners hear the LM calls of their predictors. Without listeners LM chunks pass as they are, and so does
    always what is no LM chunk: custom LMs and programs send items of their own.
    """

    def __init__(self, emit: Any, provider: StatusMessageProvider, listening: Listening | None) -> None:
        super().__init__(emit)
        # Whoever has configured DSPy's own status callback wants that one's messages, not these.
        told = any(isinstance(each, StatusStreamingCallback) for each in dspy.settings.callbacks)
        self._provider = None if told else provider
        self._listening = listening
        self._roots: dict[str | None, str | None] = {}
        """Adapter call → the predictor call that it is part of."""
        self._expected: dict[str | None, Expected] = {}
        self._heard: dict[str | None, HeardCall] = {}

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
            fields = inputs["signature"].output_fields
            annotations = {field: info.annotation for field, info in fields.items()}
            self._expected[root] = Expected(type(instance), annotations)

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
            self._heard[call_id] = self._listening.begin(call_id, dspy.settings.caller_predict, expected)
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
        if instance.name != FINISH and (teller := self._teller):
            self._status(teller.tool_start_status_message(instance, inputs))

    def on_tool_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        if not (isinstance(outputs, str) and outputs == COMPLETED) and (teller := self._teller):
            self._status(teller.tool_end_status_message(outputs), exception)


def is_lm_chunk(value: Any) -> bool:
    """Whether `value` is a chunk as DSPy's LMs stream them, native or LiteLLM's."""
    kind = type(value)
    if isinstance(value, EngineChunk):
        return True
    return bool(kind.__name__ == "ModelResponseStream" and kind.__module__.startswith("litellm"))
