"""What splitters are, and what they are made of.

Sans-I/O. This module must not know adapters, runs or events.
"""

import types
from typing import Any, NamedTuple, Protocol, Union, get_args, get_origin

import dspy


class Delta(NamedTuple):
    """More text of an output field; never empty, unless it is a `Restart`."""

    field: str
    text: str


class Restart(Delta):
    """What was streamed of an output field is void, and its text so far is this. Empty: it cannot be streamed."""


class Splitter(Protocol):
    """Reads the text of one LM call."""

    @property
    def field(self) -> str | None:
        """The output field that the text is in, so far as is known."""

    @property
    def undecided(self) -> bool:
        """Whether text is withheld that may turn out to be the end of the field."""

    def feed(self, text: str) -> list[Delta]:
        """What became certain with `text`, the next chunk."""

    def finish(self) -> list[Delta]:
        """What becomes certain since no more text comes."""


def is_text(annotation: Any) -> bool:
    """Whether a field of this type holds the text as the LM wrote it: `str` or `dspy.Reasoning`, optional or not."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = set(get_args(annotation)) - {types.NoneType}
        return len(kinds) == 1 and is_text(kinds.pop())
    return annotation in (str, dspy.Reasoning)


class Output:
    """Collects deltas; those of one field in a row become one."""

    def __init__(self) -> None:
        self._parts: list[tuple[type[Delta], str, list[str]]] = []

    def add(self, field: str, text: str) -> None:
        if text:
            if not self._parts or self._parts[-1][1] != field:
                self._parts.append((Delta, field, []))
            self._parts[-1][2].append(text)

    def restart(self, field: str, text: str) -> None:
        self._parts.append((Restart, field, [text]))

    def take(self) -> list[Delta]:
        parts, self._parts = self._parts, []
        return [kind(field, "".join(texts)) for kind, field, texts in parts]


class Strip:
    """`str.strip` by instalments: whitespace waits until something follows it."""

    def __init__(self) -> None:
        self._started = False
        self._held: list[str] = []

    def push(self, text: str) -> str:
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        body = text.rstrip()
        if not body:
            if text:
                self._held.append(text)
            return ""
        ready = "".join(self._held) + body
        self._held = [text[len(body) :]] if len(body) < len(text) else []
        return ready

    def drop_held(self) -> None:
        self._held = []
