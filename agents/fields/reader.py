"""One LM call's chunks → deltas of output fields. Sans-I/O."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import dspy
from dspy import ChatAdapter, JSONAdapter, XMLAdapter

from agentcast.agents.fields.calls import CallFragment, CallSplitter
from agentcast.agents.fields.chat import ChatSplitter
from agentcast.agents.fields.json import JsonSplitter, RawJsonSplitter
from agentcast.agents.fields.splitter import Delta, Splitter
from agentcast.agents.fields.xml import XmlSplitter
from agentcast.agents.values import Pieces

ADAPTERS = (ChatAdapter, JSONAdapter, XMLAdapter)
"""The adapters whose texts can be read, known by their exact class: a subclass may parse by rules of its own."""

SUBMIT = "submit"
"""The tool that is called with the answer of a `dspy.ReActV2` loop."""


def splitter_for(adapter: type, fields: Mapping[str, Any], *, raw: bool = False) -> Splitter | None:
    """A new splitter for output `fields` (name → annotation), or None: no field is known before the end.

    `raw` asks for the text as the LM writes it, which for JSON is not the field's value, and never for a `Restart`.
    """
    if adapter is ChatAdapter:
        return ChatSplitter(fields)
    if adapter is JSONAdapter:
        return RawJsonSplitter(fields) if raw else JsonSplitter(fields)
    return XmlSplitter(fields, restarts=not raw) if adapter is XMLAdapter else None


class Piece(NamedTuple):
    """What a chunk has of the first candidate's answer."""

    text: str = ""
    thought: str = ""
    """Of a model that reasons by itself."""
    calls: tuple[CallFragment, ...] = ()
    is_last: bool = False


def piece_of(chunk: Any) -> Piece | None:
    """Read a chunk in the shape of OpenAI's; None if it has nothing of the first candidate."""
    for choice in _get(chunk, "choices") or ():
        if not _get(choice, "index"):
            delta = _get(choice, "delta")
            calls = tuple(map(_fragment, _get(delta, "tool_calls") or ()))
            is_last = _get(choice, "finish_reason") is not None
            return Piece(_text(delta, "content"), _text(delta, "reasoning_content"), calls, is_last)
    return None


def _fragment(call: Any) -> CallFragment:
    function = _get(call, "function")
    name, identity = _text(function, "name") or None, _text(call, "id") or None
    return CallFragment(_get(call, "index") or 0, identity, name, _text(function, "arguments"))


def _get(holder: Any, name: str) -> Any:
    """DSPy's own chunks are dicts, LiteLLM's are objects."""
    return holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)


def _text(holder: Any, name: str) -> str:
    value = _get(holder, name)
    return value if isinstance(value, str) else ""


class Read(NamedTuple):
    """Deltas of the predictor's own fields, and of what `submit` is called with."""

    own: list[Delta]
    answer: list[Delta]


class Reader:
    """Reads one LM call by `adapter` for output `fields` (name → annotation).

    `thoughts` names the fields that a model's own reasoning goes to, whatever its text says. `answer` (name →
    annotation) are the parameters of the tool `submit`, called natively or in a field of type `dspy.ToolCalls`.
    """

    def __init__(
        self,
        adapter: type,
        fields: Mapping[str, Any],
        *,
        raw: bool = False,
        thoughts: Iterable[str] = (),
        answer: Mapping[str, Any] | None = None,
    ) -> None:
        self._splitter = splitter_for(adapter, fields, raw=raw)
        self._calls = None if answer is None else CallSplitter(SUBMIT, answer)
        self._calls_field = calls_field(fields)
        self._thoughts = frozenset(thoughts)
        self._has_thought = False
        self._text_pieces = Pieces()
        self._thought_pieces = Pieces()

    @property
    def field(self) -> str | None:
        """The field, or parameter of `submit`, that is being written, so far as is known."""
        if self._calls is not None and self._calls.begun:
            return self._calls.field
        return self._splitter.field if self._splitter else None

    @property
    def undecided(self) -> bool:
        """Whether text is withheld that may turn out to be the end of the field."""
        return self._splitter is not None and self._splitter.undecided

    def feed(self, piece: Piece) -> Read:
        """What became certain with `piece`."""
        own = self._think(self._thought_pieces.push(piece.thought)) if piece.thought else []
        answer: list[Delta] = []
        if piece.text and self._splitter is not None:
            read = self._divide(self._splitter.feed(self._text_pieces.push(piece.text)))
            own, answer = own + read.own, read.answer
        if self._calls is not None:
            for fragment in piece.calls:
                answer = answer + self._calls.feed_native(fragment)
        return Read(own, answer)

    def finish(self) -> Read:
        """What becomes certain since nothing more comes."""
        own = self._think(self._thought_pieces.end())
        if self._splitter is None:
            return Read(own, [])
        read = self._divide([*self._splitter.feed(self._text_pieces.end()), *self._splitter.finish()])
        return Read(own + read.own, read.answer)

    def _think(self, text: str) -> list[Delta]:
        self._has_thought = self._has_thought or bool(text)
        return [Delta(field, text) for field in self._thoughts] if text else []

    def _divide(self, deltas: list[Delta]) -> Read:
        answer: list[Delta] = []
        if self._calls is not None:
            for field, text in deltas:
                if field == self._calls_field:
                    answer += self._calls.feed(text)
        if self._has_thought:
            deltas = [delta for delta in deltas if delta.field not in self._thoughts]
        return Read(deltas, answer)


def calls_field(fields: Mapping[str, Any]) -> str | None:
    """The field that tool calls are in, if there is one."""
    return next((name for name, annotation in fields.items() if annotation is dspy.ToolCalls), None)


def thought_fields(fields: Mapping[str, Any]) -> list[str]:
    """The fields that a model's own reasoning is the value of."""
    return [name for name, annotation in fields.items() if annotation is dspy.Reasoning]
