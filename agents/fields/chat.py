"""`[[ ## name ## ]]` headers at the starts of lines, as `ChatAdapter.parse` reads them. Sans-I/O."""

from collections.abc import Mapping
from typing import Any

from agentcast.agents.fields.splitter import Delta, Output, Strip

_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
"""Where `str.splitlines` breaks lines, and so the adapter; it joins them with a newline."""
_OPEN, _CLOSE = "[[ ## ", " ## ]]"


class _LineStart:
    """The start of a line, kept until it is certain whether it is a header. Linear in its length."""

    def __init__(self) -> None:
        self._chars: list[str] = []
        self._indent = 0
        self._matched = 0
        self._name: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._chars)

    @property
    def header(self) -> str | None:
        """The name in the header, once it is complete."""
        complete = len(_OPEN) + len(_CLOSE)
        return "".join(self._name) if self._matched == complete else None

    @property
    def begun(self) -> bool:
        return self._matched > 0

    def push(self, char: str) -> bool:
        """Add a character; whether the line may still be a header, or has just become one."""
        self._chars.append(char)
        if self._matched == 0 and char.isspace():
            self._indent += 1
            return True
        at = self._matched
        if at == len(_OPEN) and (char == "_" or char.isalnum()):
            self._name.append(char)
            return True
        if at == len(_OPEN) and not self._name:
            return False
        if char != (_OPEN + _CLOSE)[at]:
            return False
        self._matched += 1
        return True

    def remainder(self) -> str:
        """What of this text the adapter takes as content: it cuts the indented line where the header ends in the line
        without its indent."""
        text = self.text
        return text[len(text) - self._indent :]


class ChatSplitter:
    """As `ChatAdapter.parse`: the first section of each name, stripped; text on a header's line belongs to it."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.field: str | None = None
        self._fields = set(fields)
        self._out = Output()
        self._strip = Strip()
        self._start: _LineStart | None = _LineStart()
        self._on_header = False
        self._after_return = False

    @property
    def undecided(self) -> bool:
        return self._start is not None and self._start.begun

    def feed(self, text: str) -> list[Delta]:
        if self._after_return and text.startswith("\n"):
            text = text[1:]
            self._after_return = False
        if text:
            self._after_return = text.endswith("\r")
        for line in text.splitlines(keepends=True):
            self._text(line.rstrip(_BREAKS))
            if line[-1] in _BREAKS:
                self._break()
        return self._out.take()

    def finish(self) -> list[Delta]:
        if self._start is not None:
            self._push(self._start.text)
            self._start = None
        return self._out.take()

    def _text(self, text: str) -> None:
        at = 0
        while self._start is not None and at < len(text):
            possible = self._start.push(text[at])
            at += 1
            if not possible:
                self._push(self._start.text)
                self._start = None
            elif self._start.header is not None:
                self._begin(self._start.header, self._start.remainder())
        if at < len(text):
            self._push(text[at:])

    def _begin(self, name: str, remainder: str) -> None:
        self.field = name if name in self._fields else None
        self._fields.discard(name)
        self._strip = Strip()
        self._start = None
        self._on_header = True
        self._push(remainder)

    def _break(self) -> None:
        if self._start is not None:
            self._push(self._start.text)
        if self._on_header:  # what follows the header on its line is stripped by itself
            self._strip.drop_held()
            self._on_header = False
        self._push("\n")
        self._start = _LineStart()

    def _push(self, text: str) -> None:
        if self.field is not None:
            self._out.add(self.field, self._strip.push(text))
