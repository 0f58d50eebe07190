"""The messages of a span: what LM calls stream of its output fields, made equal to the values that it has in the end.

Sans-I/O: every method returns the events that are due, in order. Its caller must emit them before the next call.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import orjson

from agentcast.agents.events import AgentEvent, MessageEnd, MessageRetracted, MessageStart, Token
from agentcast.agents.fields.reader import ADAPTERS, Piece, Read, Reader, calls_field, thought_fields
from agentcast.agents.fields.splitter import Delta, Restart, is_text
from agentcast.agents.values import clean_text, plain

DELTA_CHARS = 10_000
"""Longest delta of one event: even if JSON escapes each character with six bytes it stays under the cap of a text."""

_READ_DIFFERENTLY = "the answer was read differently in the end"


class FieldMessages:
    """The messages of the span `span`, one for each of the output `fields` (name → annotation) that has a text.

    `shown` names the fields to show, None all of them.
    """

    def __init__(
        self, span: str, shown: Collection[str] | None, new_id: Callable[[], str], fields: Mapping[str, Any]
    ) -> None:
        self.fields = dict(fields)
        self._span = span
        self._shown = shown
        self._new_id = new_id
        self._open: dict[str, _Message] = {}

    @property
    def shows_any(self) -> bool:
        return any(map(self.shows, self.fields))

    def shows(self, field: str) -> bool:
        return self._shown is None or field in self._shown

    def extend(self, deltas: Iterable[Delta]) -> list[AgentEvent]:
        """More was streamed."""
        events: list[AgentEvent] = []
        for delta in deltas:
            if self.shows(delta.field):
                events += self._extend(delta)
        return events

    def retract(self, reason: str) -> list[AgentEvent]:
        """All that was streamed is void."""
        messages, self._open = self._open, {}
        return [MessageRetracted(message=message.id, reason=reason) for message in messages.values()]

    def settle(self, values: Mapping[str, Any]) -> list[AgentEvent]:
        """The span has ended with `values`: end what was streamed, add what was not."""
        events: list[AgentEvent] = []
        for field, value in values.items():
            if self.shows(field):
                events += self._settle(field, value)
        return events + FieldMessages.retract(self, "the answer does not have this field")

    def _settle(self, field: str, value: Any) -> list[AgentEvent]:
        message = self._open.pop(field, None)
        text = _text(value)
        if message is None:
            return self._whole(field, text)
        streamed = message.text
        if not is_text(self.fields.get(field)) or text == streamed:
            return [MessageEnd(message=message.id, text=streamed)]
        if text.startswith(streamed):
            return [*message.add(text[len(streamed) :]), MessageEnd(message=message.id, text=text)]
        retracted = MessageRetracted(message=message.id, reason=_READ_DIFFERENTLY)
        return [retracted, *self._whole(field, text)]

    def _whole(self, field: str, text: str) -> list[AgentEvent]:
        if not text:
            return []
        message, start = self._start(field)
        return [start, *message.add(text), MessageEnd(message=message.id, text=text)]

    def _extend(self, delta: Delta) -> list[AgentEvent]:
        events: list[AgentEvent] = []
        if isinstance(delta, Restart) and (void := self._open.pop(delta.field, None)):
            events.append(MessageRetracted(message=void.id, reason=_READ_DIFFERENTLY))
        if delta.text:
            if delta.field not in self._open:
                self._open[delta.field], start = self._start(delta.field)
                events.append(start)
            events += self._open[delta.field].add(clean_text(delta.text))
        return events

    def _start(self, field: str) -> "tuple[_Message, MessageStart]":
        message = _Message(self._new_id())
        return message, MessageStart(message=message.id, span=self._span, field=field)


class Messages(FieldMessages):
    """The messages of one predictor call with output `fields`, and of its LM calls.

    `answer` are those of the loop that the predictor decides for, if that is one with a tool `submit`: what the tool is
    called with is streamed as theirs. The tool calls themselves are then shown only if `shown` names them.
    """

    def __init__(
        self,
        span: str,
        shown: Collection[str] | None,
        new_id: Callable[[], str],
        fields: Mapping[str, Any] | None = None,
        answer: FieldMessages | None = None,
    ) -> None:
        super().__init__(span, shown, new_id, fields or {})
        self._answer = answer
        self._adapter: type = type(None)
        self._expected: dict[str, Any] = {}
        self._reader: Reader | None = None

    def shows(self, field: str) -> bool:
        if self._shown is None and self._answer is not None and field == calls_field(self.fields):
            return False
        return super().shows(field)

    def expect(self, adapter: type, fields: Mapping[str, Any]) -> None:
        """The next LM call is made by `adapter` for output `fields` (name → annotation) in its text. Thoughts and tool
        calls that are not among them are asked for by other means."""
        self._adapter = adapter
        self._expected = dict(fields)
        self.fields |= fields

    @property
    def can_stream(self) -> bool:
        """Whether something that is shown of the next LM call is known before its end."""
        if self._answer is not None and self._answer.shows_any and self._can_read(calls_field(self.fields)):
            return True
        return any(self.shows(field) and self._can_read(field) for field in [*self._expected, *self._own_thoughts()])

    def begin(self) -> list[AgentEvent]:
        """An LM call starts; what an earlier one streamed for the same predictor call is void."""
        events = self.retract("another attempt is made")
        answer = None if self._answer is None else self._answer.fields
        thoughts = thought_fields(self.fields)
        self._reader = Reader(self._adapter, self._expected, thoughts=thoughts, answer=answer)
        return events

    def feed(self, piece: Piece) -> list[AgentEvent]:
        """A chunk of the LM call."""
        return self._read(self._reader.feed(piece)) if self._reader else []

    def finish(self) -> list[AgentEvent]:
        """The LM call's answer is whole; what else comes would be of another candidate, and is not read."""
        reader, self._reader = self._reader, None
        return self._read(reader.finish()) if reader else []

    def retract(self, reason: str) -> list[AgentEvent]:
        self._reader = None
        return super().retract(reason) + (self._answer.retract(reason) if self._answer else [])

    def _read(self, read: Read) -> list[AgentEvent]:
        return self.extend(read.own) + (self._answer.extend(read.answer) if self._answer else [])

    def _own_thoughts(self) -> list[str]:
        return [field for field in thought_fields(self.fields) if field not in self._expected]

    def _can_read(self, field: str | None) -> bool:
        return field not in self._expected or self._adapter in ADAPTERS


class _Message:
    """A text that has begun, and what was streamed of it."""

    def __init__(self, message_id: str) -> None:
        self.id = message_id
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def add(self, text: str) -> list[AgentEvent]:
        self._parts.append(text)
        starts = range(0, len(text), DELTA_CHARS)
        return [Token(message=self.id, delta=text[at : at + DELTA_CHARS]) for at in starts]


def _text(value: Any) -> str:
    """A field's value as text; nothing for a field without a value."""
    if value is None:
        return ""
    if not isinstance(value, str):
        value = plain(value)
    return clean_text(value) if isinstance(value, str) else orjson.dumps(value).decode()
