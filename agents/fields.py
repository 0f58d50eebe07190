"""Output fields out of raw LM text, while it is still arriving.

One splitter reads the chunks, of any length, of ONE LM call, and tells which text belongs to which output field. The
rules are those of DSPy's adapters: for a field of text the joined deltas are what the adapter's `parse` will return.
Where an adapter forgives what cannot be known in advance (JSON that has to be repaired, markup inside an XML field,
a field given twice) the splitter falls silent or is overruled: whoever ends a message compares with the parsed value.

Sans-I/O. This module must not know runs, events or callbacks. A splitter shared by two calls would mix their texts
(G8), so it is made for one call and thrown away.

Public: `splitter_for(adapter, fields)`, `Splitter.feed`, `Splitter.finish`, `is_text`.
"""

import json
import re
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, Union, get_args, get_origin
from xml.parsers import expat

from dspy.adapters import ChatAdapter, JSONAdapter, XMLAdapter


class Delta(NamedTuple):
    """More text of an output field; never empty."""

    field: str
    text: str


class Splitter(Protocol):
    """Reads the text of one LM call."""

    def feed(self, text: str) -> list[Delta]:
        """What became certain with `text`, the next chunk."""

    def finish(self) -> list[Delta]:
        """What becomes certain since no more text comes."""


def splitter_for(adapter: type, fields: Mapping[str, Any]) -> Splitter | None:
    """A new splitter for output `fields` (name → annotation), or None: no field can be told before the end.

    Adapters are known by their exact class, since a subclass may parse by rules of its own.
    """
    make = _SPLITTERS.get(adapter)
    return None if make is None else make(fields)


def is_text(annotation: Any) -> bool:
    """Whether a field of this type holds the text as the LM wrote it: `str`, or `str | None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        return set(get_args(annotation)) == {str, types.NoneType}
    return annotation is str


class _Output:
    """Collects deltas; those of one field in a row become one."""

    def __init__(self) -> None:
        self._parts: list[tuple[str, list[str]]] = []

    def add(self, field: str, text: str) -> None:
        if text:
            if not self._parts or self._parts[-1][0] != field:
                self._parts.append((field, []))
            self._parts[-1][1].append(text)

    def take(self) -> list[Delta]:
        parts, self._parts = self._parts, []
        return [Delta(field, "".join(texts)) for field, texts in parts]


class _Strip:
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


# -- Chat: `[[ ## name ## ]]` headers at the starts of lines ---------------------------------------------------------

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
        self._fields = set(fields)
        self._out = _Output()
        self._field: str | None = None
        self._strip = _Strip()
        self._start: _LineStart | None = _LineStart()
        self._on_header = False
        self._after_return = False

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
        self._field = name if name in self._fields else None
        self._fields.discard(name)
        self._strip = _Strip()
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
        if self._field is not None:
            self._out.add(self._field, self._strip.push(text))


# -- JSON: the members of the outermost object -----------------------------------------------------------------------

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

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = dict(fields)
        self._out = _Output()
        self._text = ""
        self._at = 0
        self._field: str | None = None
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
        self._field = name if name in self._fields else None
        self._of_text = is_text(self._fields.pop(name, None))
        self._state = self._colon
        return True

    def _colon(self) -> bool:
        return self._expect({":": self._value})

    def _comma(self) -> bool:
        return self._expect({",": self._key, "}": self._silent})

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
            self._field = None
        self._depth, self._quoted = 0, False
        self._state = self._container if char in "[{" else self._scalar
        return True

    def _string(self) -> bool:
        plain = _PLAIN.match(self._text, self._at)
        if plain is not None:
            self._emit(plain.end())
        char = self._text[self._at : self._at + 1]
        if char == '"':
            self._at += 1
            return self._end_value()
        return self._escape() if char else False

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
        if scalar.group() == "null":
            self._field = None
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
        self._field = None
        self._state = self._comma
        return True

    def _emit(self, end: int) -> None:
        self._add(self._text[self._at : end], end)

    def _add(self, text: str, end: int) -> None:
        if self._field is not None:
            self._out.add(self._field, text)
        self._at = end

    def _fall_silent(self) -> bool:
        self._state = self._silent
        return True


# -- XML: the elements at the top ------------------------------------------------------------------------------------


class XmlSplitter:
    """As `XMLAdapter.parse`, with the same parser: fields of text, stripped, up to markup inside them. Other fields
    may be trees of elements, so nothing is told of them."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = {name for name, annotation in fields.items() if is_text(annotation)}
        self._out = _Output()
        self._field: str | None = None
        self._strip = _Strip()
        self._depth = 0
        self._broken = False
        self._parser = expat.ParserCreate("utf-8", "}")  # names as ElementTree has them
        if hasattr(self._parser, "SetReparseDeferralEnabled"):  # else text waits for later chunks
            self._parser.SetReparseDeferralEnabled(False)
        self._parser.StartElementHandler = self._open
        self._parser.EndElementHandler = self._close
        self._parser.CharacterDataHandler = self._characters
        self._parse("<root>")

    def feed(self, text: str) -> list[Delta]:
        self._parse(text)
        return self._out.take()

    def finish(self) -> list[Delta]:
        return []  # an element that is not closed is an error

    def _parse(self, text: str) -> None:
        if not self._broken:
            try:
                self._parser.Parse(text, False)
            except (expat.ExpatError, UnicodeEncodeError):
                self._broken = True

    def _open(self, tag: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth == 2:
            name = attributes.get("key", tag) if tag == "entry" else tag
            self._field = name if name in self._fields else None
            self._fields.discard(name)
            self._strip = _Strip()
        else:
            self._field = None

    def _close(self, _tag: str) -> None:
        self._depth -= 1
        self._field = None

    def _characters(self, text: str) -> None:
        if self._field is not None:
            self._out.add(self._field, self._strip.push(text))


_SPLITTERS: dict[type, Callable[[Mapping[str, Any]], Splitter]] = {
    ChatAdapter: ChatSplitter,
    JSONAdapter: JsonSplitter,
    XMLAdapter: XmlSplitter,
}
