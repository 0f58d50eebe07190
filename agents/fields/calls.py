"""What one tool is called with, while the model still writes the call. Sans-I/O.

A `dspy.ReActV2` loop has its answer submitted that way: the arguments of its tool `submit` are the outputs.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from agentcast.agents.fields.json import JsonSplitter
from agentcast.agents.fields.splitter import Delta, Restart
from agentcast.agents.values import Pieces

_NAME = "name"
_ARGUMENTS = ("args", "arguments")
_AROUND = ("tool_calls", "function")
"""Members with the calls, or a call, inside."""


class CallFragment(NamedTuple):
    """A piece of a native tool call. Those of one call have the same number, and its first one has the name."""

    number: int
    id: str | None
    name: str | None
    arguments: str


class CallSplitter:
    """Reads all calls of one LM call, and gives the arguments `fields` (name → annotation) of that of `tool`.

    Strings are unescaped, other values as they are written, as with `JsonSplitter`. If `tool` is called again, which of
    the calls counts is known at the end only, and what was streamed of the first is void.
    """

    def __init__(self, tool: str, fields: Mapping[str, Any]) -> None:
        self._tool = tool
        self._arguments = JsonSplitter(fields)
        self._streamed: set[str] = set()
        self._native: dict[int, _NativeCall] = {}
        self._chosen: Any = None
        self._text = _WrittenCalls(self)

    @property
    def field(self) -> str | None:
        """The argument that is being written, so far as is known."""
        return self._arguments.field

    @property
    def begun(self) -> bool:
        return self._chosen is not None

    def feed(self, text: str) -> list[Delta]:
        """A chunk of calls written as text, in one of the forms in which `dspy.ToolCalls` takes them."""
        self._text.feed(text)
        return self._text.take()

    def feed_native(self, fragment: CallFragment) -> list[Delta]:
        call = self._native.get(fragment.number)
        if call is None or (fragment.id and call.id and fragment.id != call.id):
            call = self._native[fragment.number] = _NativeCall()
        call.id = call.id or fragment.id
        call.name = call.name or fragment.name
        call.waiting += call.pieces.push(fragment.arguments)
        if call.name is None:
            return []
        text, call.waiting = call.waiting, ""
        return self.arguments_of(call, call.name, text)

    def arguments_of(self, call: object, name: str, text: str) -> list[Delta]:
        """More of the arguments of `call`, of the tool `name`."""
        if name != self._tool:
            return []
        if self._chosen not in (None, call):
            void, self._streamed, self._arguments = self._streamed, set(), JsonSplitter({})
            return [Restart(field, "") for field in sorted(void)]
        self._chosen = call
        deltas = self._arguments.feed(text)
        self._streamed |= {delta.field for delta in deltas}
        return deltas


class _NativeCall:
    def __init__(self) -> None:
        self.id: str | None = None
        self.name: str | None = None
        self.waiting = ""
        """Arguments that came before the name."""
        self.pieces = Pieces()


class _WrittenCalls(JsonSplitter):
    """Finds the calls in `{"tool_calls": [{"name": …, "args": {…}}, …]}`, in the list or a call alone, and as providers
    write them: `{"function": {"name": …, "arguments": "{…}"}}`. A name must come before its arguments."""

    def __init__(self, calls: CallSplitter) -> None:
        super().__init__({})
        self._calls = calls
        self._deltas: list[Delta] = []
        self._call = object()
        self._name = ""

    def take(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def _preamble(self) -> bool:
        self._fields = dict.fromkeys((_NAME, *_ARGUMENTS, *_AROUND), Any)
        self._call, self._name = object(), ""
        return super()._preamble()

    def _after(self) -> bool:
        self._state = self._preamble
        return True

    def _value(self) -> bool:
        if self.field in _AROUND and self._next() in ("[", "{"):
            self._state = self._preamble
            return True
        return super()._value()

    def _add(self, text: str, end: int) -> None:
        self._at = end
        if self.field == _NAME:
            self._name += text
        elif self.field in _ARGUMENTS:
            self._deltas += self._calls.arguments_of(self._call, self._name, text)
