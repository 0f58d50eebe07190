"""The members of the outermost object, as `JSONAdapter.parse` reads well-formed JSON. Sans-I/O."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from agentcast.agents.fields.splitter import Delta, Output, is_text

_SPACE = re.compile(r"[ \t\n\r]*")
_KEY = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_PLAIN = re.compile(r'[^"\\]+')
_SCALAR = re.compile(r"[^\s,}\]]+(?=[\s,}\]])")
_MARKS = re.compile(r'\\.|["\[\]{}]', re.DOTALL)
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_UNICODE = re.compile(r"\\u([0-9a-fA-F]{4})")
_UNICODE_START = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?$")


class JsonSplitter:
    """As `JSONAdapter.parse` reads well-formed JSON: strings unescaped, not stripped; other values as they are written.

    At the first thing that is not JSON it falls silent: how it will be repaired cannot be known before the end. So
    does a field of text whose value is no string.
    """

    _shows_null = False

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.field: str | None = None
        self.undecided = False
        self._fields = dict(fields)
        self._out = Output()
        self._text = ""
        self._at = 0
        self._of_text = False
        self._depth = 0
        self._quoted = False
        self._state: Callable[[], bool] = self._preamble

    def feed(self, text: str) -> list[Delta]:
        self._text = self._text[self._at :] + text
        self._at = 0
        while self._at < len(self._text) and self._state():
            pass
        return self._out.take()

    def finish(self) -> list[Delta]:
        return []  # whatever is incomplete is not JSON

    # Each state consumes from `_text` at `_at`, and returns whether to go on with what is there.

    def _preamble(self) -> bool:
        brace = self._text.find("{", self._at)
        if brace < 0:
            self._at = len(self._text)
            return False
        self._at = brace + 1
        self._state = self._key
        return True

    def _silent(self) -> bool:
        self._at = len(self._text)
        return False

    def _next(self) -> str:
        """The next character after white space, or an empty string."""
        space = _SPACE.match(self._text, self._at)
        self._at = space.end() if space else self._at
        return self._text[self._at : self._at + 1]

    def _key(self) -> bool:
        char = self._next()
        if char != '"':
            return self._fall_silent() if char else False
        key = _KEY.match(self._text, self._at)
        if key is None:
            return False
        try:
            name = json.loads(key.group())
        except ValueError:
            return self._fall_silent()
        self._at = key.end()
        self.field = name if name in self._fields else None
        self._of_text = is_text(self._fields.pop(name, None))
        self._state = self._colon
        return True

    def _colon(self) -> bool:
        return self._expect({":": self._value})

    def _comma(self) -> bool:
        return self._expect({",": self._key, "}": self._after})

    def _after(self) -> bool:
        """What follows the object."""
        return self._silent()

    def _expect(self, states: Mapping[str, Callable[[], bool]]) -> bool:
        char = self._next()
        if not char:
            return False
        self._at += 1
        self._state = states.get(char, self._silent)
        return True

    def _value(self) -> bool:
        char = self._next()
        if not char:
            return False
        if char == '"':
            self._at += 1
            self._state = self._string
            return True
        if self._of_text:
            self.field = None
        self._depth, self._quoted = 0, False
        self._state = self._container if char in "[{" else self._scalar
        return True

    def _string(self) -> bool:
        plain = _PLAIN.match(self._text, self._at)
        if plain is not None:
            self._emit(plain.end())
        char = self._text[self._at : self._at + 1]
        if char == '"':
            self._end_of_string()
            return self._end_value()
        return self._escape() if char else False

    def _end_of_string(self) -> None:
        self._at += 1

    def _escape(self) -> bool:
        if self._at + 1 >= len(self._text):
            return False
        kind = self._text[self._at + 1]
        if kind == "u":
            return self._unicode()
        if kind not in _ESCAPES:
            return self._fall_silent()
        self._add(_ESCAPES[kind], self._at + 2)
        return True

    def _unicode(self) -> bool:
        first = _UNICODE.match(self._text, self._at)
        if first is None:
            return self._fall_silent() if len(self._text) - self._at >= 6 else False
        code, end = int(first.group(1), 16), first.end()
        if 0xD800 <= code < 0xDC00:
            second = _UNICODE.match(self._text, end)
            if second is None and (end == len(self._text) or _UNICODE_START.match(self._text, end)):
                return False
            low = int(second.group(1), 16) if second else 0
            if second and 0xDC00 <= low < 0xE000:
                code, end = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00), second.end()
        self._add(chr(code), end)
        return True

    def _scalar(self) -> bool:
        scalar = _SCALAR.match(self._text, self._at)
        if scalar is None:
            return self._fall_silent() if self._text[self._at] in ",}]" else False
        if scalar.group() == "null" and not self._shows_null:
            self.field = None
        self._emit(scalar.end())
        return self._end_value()

    def _container(self) -> bool:
        seen = self._at
        for mark in _MARKS.finditer(self._text, self._at):
            char, seen = mark.group(), mark.end()
            if char == '"':
                self._quoted = not self._quoted
            elif not self._quoted and char in "[]{}":
                self._depth += 1 if char in "[{" else -1
                if self._depth == 0:
                    self._emit(mark.end())
                    return self._end_value()
        half_escape = seen < len(self._text) and self._text.endswith("\\")
        self._emit(len(self._text) - half_escape)
        return False

    def _end_value(self) -> bool:
        self.field = None
        self._state = self._comma
        return True

    def _emit(self, end: int) -> None:
        self._add(self._text[self._at : end], end)

    def _add(self, text: str, end: int) -> None:
        if self.field is not None:
            self._out.add(self.field, text)
        self._at = end

    def _fall_silent(self) -> bool:
        self._state = self._silent
        return True


class RawJsonSplitter(JsonSplitter):
    """All values as they are written, strings with their quotes and escapes, and whatever the types of the fields."""

    _shows_null = True

    def _value(self) -> bool:
        self._of_text = False
        if self._next() != '"':
            return super()._value()
        self._emit(self._at + 1)
        self._state = self._string
        return True

    def _end_of_string(self) -> None:
        self._emit(self._at + 1)

    def _escape(self) -> bool:
        if self._at + 1 >= len(self._text):
            return False
        self._emit(self._at + 2)
        return True
