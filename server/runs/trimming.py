"""Keeps a run's state under `STATE_BYTES`, whatever events come: says in `state_trimmed` events what goes (G10).

Measuring a state costs as much as encoding it. So between two measurements each event counts as the most that it can
add, and the state is measured only when that bound is reached, which takes a mebibyte of events at least. This module
must not know where the events go.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from agentcast.agents.values import text_bytes
from agentcast.server.protocol import encode
from agentcast.server.state import STATE_BYTES, VALUES, RunState

TRIM_FROM = STATE_BYTES * 3 // 4
"""Bytes of a measured state from which on it is trimmed."""
TRIM_TO = STATE_BYTES // 2
ENDING = 128 * 1024
"""The most that a run's last event adds to a state besides its own fields: it closes all that is open."""
NAMES_BYTES = 64 * 1024
"""What one event names, in bytes; a larger list goes into several."""
ADDS = 2
"""The most that an event adds to a state, as a multiple of its bytes: a span and `state` both show a patch."""


class StateSize:
    """How large a state may be by now."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._most = len(state.encode())

    def takes(self, event: bytes) -> bool:
        """Whether the state is sure to have room for an event, and for the run's end after it."""
        return self._most + ADDS * len(event) <= STATE_BYTES - ENDING

    def add(self, event: bytes) -> None:
        """The event is folded into the state."""
        self._most += ADDS * len(event)

    def measured(self, size: int) -> None:
        """The state was encoded."""
        self._most = size

    def trim(self) -> Iterator[dict[str, Any]]:
        """Measure the state, and make room if it is large: yields events, which are to be folded into it in turn."""
        parts = _Parts(self._state.document)
        self._most = parts.size
        if self._most > TRIM_FROM:
            yield from parts.trim()
            self._most = parts.size


@dataclass(slots=True)
class _Part:
    """Items of one kind that can go, with their sizes: first the finished ones, each from the oldest on."""

    items: deque[tuple[str, int]]
    size: int

    @classmethod
    def of(cls, items: Iterable[tuple[str, int]]) -> "_Part":
        queue = deque(items)
        return cls(queue, sum(size for _, size in queue))


class _Parts:
    """What a state consists of. The kind that takes the most gives first."""

    def __init__(self, document: dict[str, Any]) -> None:
        spans = _finished_first(document["spans"], "running")
        self._values = {span["span"]: _values_size(span) for span in spans}
        self._parts = {
            "values": _Part.of((id, size) for id, size in self._values.items() if size),
            "spans": _Part.of((span["span"], _size(span) - self._values[span["span"]]) for span in spans),
            "messages": _Part.of(
                (message["message"], _size(message)) for message in _finished_first(document["messages"], "open")
            ),
            "validation_errors": _Part.of(("", _size(error)) for error in document["validation_errors"]),
            "fields": _Part.of((name, _size(value) + text_bytes(name)) for name, value in document["state"].items()),
        }
        rest = {field: value for field, value in document.items() if not isinstance(value, list) and field != "state"}
        self._rest = _size(rest) + sum(len(field) + _AROUND for field in document)

    @property
    def size(self) -> int:
        return self._rest + sum(part.size for part in self._parts.values())

    def trim(self) -> Iterator[dict[str, Any]]:
        size, going, named = self.size, dict[str, list[str]](), 0
        while size > TRIM_TO:
            kind = max(self._parts, key=lambda name: self._parts[name].size)
            if not self._parts[kind].size:
                break  # the rest is bounded by what events may hold
            key, freed = self._take(kind)
            size -= freed
            if freed:
                going.setdefault(kind, []).append(key)
                named += text_bytes(key) + _AROUND
            if named >= NAMES_BYTES:
                yield _event(going)
                going, named = {}, 0
        if going:
            yield _event(going)

    def _take(self, kind: str) -> tuple[str, int]:
        """The next item of a kind that goes, and what that frees: nothing if it has gone already."""
        part = self._parts[kind]
        key, freed = part.items.popleft()
        if kind == "values":
            freed = self._values.pop(key, 0)
        part.size -= freed
        if kind == "spans":
            values = self._values.pop(key, 0)
            self._parts["values"].size -= values
            freed += values
        return key, freed


_AROUND = 8
"""Bytes around an item at most: quotes, a colon, a comma, the end of the line."""


def _size(value: Any) -> int:
    return len(encode(value)) + _AROUND


def _values_size(span: dict[str, Any]) -> int:
    return sum(len(encode(span[name])) + len(name) + 4 for name in VALUES if name in span)


def _finished_first(items: list[dict[str, Any]], unfinished: str) -> list[dict[str, Any]]:
    return sorted(items, key=lambda item: item["status"] == unfinished)


def _event(going: dict[str, list[str]]) -> dict[str, Any]:
    errors = {"validation_errors": len(going["validation_errors"])} if "validation_errors" in going else {}
    return {"event": "state_trimmed"} | going | errors
