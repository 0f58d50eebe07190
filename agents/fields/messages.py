"""The messages of one predictor call: what its LM calls stream, made equal to what its adapter read.

Sans-I/O: every method returns the events that are due, in order. Its caller must emit them before the next call.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import orjson
from dspy import ChatAdapter, JSONAdapter, XMLAdapter

from agentcast.agents.events import AgentEvent, MessageEnd, MessageRetracted, MessageStart, Token
from agentcast.agents.fields.base import Delta, Splitter, is_text
from agentcast.agents.fields.chat import ChatSplitter
from agentcast.agents.fields.json import JsonSplitter, RawJsonSplitter
from agentcast.agents.fields.xml import XmlSplitter
from agentcast.agents.values import Pieces, clean_text, plain

DELTA_CHARS = 10_000
"""Longest delta of one event: even if JSON escapes each character with six bytes it stays under the cap of a text."""

_SPLITTERS: Mapping[type, Callable[[Mapping[str, Any]], Splitter]] = {
    ChatAdapter: ChatSplitter,
    JSONAdapter: JsonSplitter,
    XMLAdapter: XmlSplitter,
}


def splitter_for(adapter: type, fields: Mapping[str, Any], *, raw: bool = False) -> Splitter | None:
    """A new splitter for output `fields` (name → annotation), or None: no field can be told before the end.

    Adapters are known by their exact class, since a subclass may parse by rules of its own. `raw` asks for the text as
    the LM writes it, which for JSON is not the field's value.
    """
    make = RawJsonSplitter if raw and adapter is JSONAdapter else _SPLITTERS.get(adapter)
    return None if make is None else make(fields)


class Messages:
    """The messages of one predictor call, of the span `span`. `shown` names the fields to show, None all of them."""

    def __init__(self, span: str, shown: Collection[str] | None, new_id: Callable[[], str]) -> None:
        self._span = span
        self._shown = shown
        self._new_id = new_id
        self._adapter: type = type(None)
        self._fields: dict[str, Any] = {}
        self._splitter: Splitter | None = None
        self._pieces = Pieces()
        self._open: dict[str, _Message] = {}

    def expect(self, adapter: type, fields: Mapping[str, Any]) -> None:
        """The next LM call is made by `adapter` for output `fields` (name → annotation)."""
        self._adapter = adapter
        self._fields = dict(fields)

    @property
    def can_stream(self) -> bool:
        """Whether a shown field of the next LM call can be told before its end."""
        return any(map(self._is_shown, self._fields)) and self._adapter in _SPLITTERS

    def begin(self) -> list[AgentEvent]:
        """An LM call starts; what an earlier one streamed for the same predictor call is void."""
        events = self.retract("another attempt is made")
        self._splitter = splitter_for(self._adapter, self._fields)
        self._pieces = Pieces()
        return events

    def feed(self, text: str) -> list[AgentEvent]:
        """A chunk of the LM call."""
        return self._tell(self._splitter.feed(self._pieces.push(text))) if self._splitter else []

    def finish(self) -> list[AgentEvent]:
        """The LM call's text is whole; more text would be of another candidate, and is not read."""
        splitter, self._splitter = self._splitter, None
        return self._tell([*splitter.feed(self._pieces.end()), *splitter.finish()]) if splitter else []

    def retract(self, reason: str) -> list[AgentEvent]:
        """Whatever was told is void."""
        messages, self._open, self._splitter = self._open, {}, None
        return [MessageRetracted(message=message.id, reason=reason) for message in messages.values()]

    def settle(self, values: Mapping[str, Any]) -> list[AgentEvent]:
        """The predictor has answered with `values`: end what was streamed, tell what was not."""
        events: list[AgentEvent] = []
        for field, value in values.items():
            if self._is_shown(field):
                events += self._settle(field, value)
        return events + self.retract("the answer does not have this field")

    def _settle(self, field: str, value: Any) -> list[AgentEvent]:
        message = self._open.pop(field, None)
        text = _text(value)
        if message is None:
            return self._whole(field, text)
        told = message.text
        if not isinstance(value, str) or not is_text(self._fields.get(field)) or text == told:
            return [MessageEnd(message=message.id, text=told)]
        if text.startswith(told):
            return [*message.add(text[len(told) :]), MessageEnd(message=message.id, text=text)]
        retracted = MessageRetracted(message=message.id, reason="the answer was read differently in the end")
        return [retracted, *self._whole(field, text)]

    def _whole(self, field: str, text: str) -> list[AgentEvent]:
        if not text:
            return []
        message, start = self._start(field)
        return [start, *message.add(text), MessageEnd(message=message.id, text=text)]

    def _tell(self, deltas: list[Delta]) -> list[AgentEvent]:
        events: list[AgentEvent] = []
        for field, text in deltas:
            if not self._is_shown(field):
                continue
            if field not in self._open:
                self._open[field], start = self._start(field)
                events.append(start)
            events += self._open[field].add(clean_text(text))
        return events

    def _start(self, field: str) -> "tuple[_Message, MessageStart]":
        message = _Message(self._new_id())
        return message, MessageStart(message=message.id, span=self._span, field=field)

    def _is_shown(self, field: str) -> bool:
        return self._shown is None or field in self._shown


class _Message:
    """A text that has begun, and what was told of it."""

    def __init__(self, message_id: str) -> None:
        self.id = message_id
        self._told: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._told)

    def add(self, text: str) -> list[AgentEvent]:
        self._told.append(text)
        starts = range(0, len(text), DELTA_CHARS)
        return [Token(message=self.id, delta=text[at : at + DELTA_CHARS]) for at in starts]


def _text(value: Any) -> str:
    """A field's value as text; nothing for a field without a value."""
    if value is None:
        return ""
    if not isinstance(value, str):
        value = plain(value)
    return clean_text(value) if isinstance(value, str) else orjson.dumps(value).decode()
