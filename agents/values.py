"""Plain, bounded JSON data out of anything an agent hands over.

An event must not alias live state, must encode without error and must not grow without bound (a tool may return
50 MB). So whatever enters an event is copied into plain JSON data here, and cut where it is too large. The work is
bounded too: a nested value is walked only as far as `COUNT_BYTES`, so cutting never stalls the loop (G3).

This module must not know events, agents or DSPy.
"""

import dataclasses
import datetime
import decimal
import enum
import ipaddress
import math
import re
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson
from pydantic import BaseModel

VALUE_BYTES = 64 * 1024
"""Cap of one value or text inside an event, in bytes of JSON."""

FIELDS_BYTES = 3 * VALUE_BYTES
"""Cap of one mapping of named values (`args`, `inputs`, `patch`), so that its event stays under 256 KiB."""

COUNT_BYTES = 4 * VALUE_BYTES
"""How far a nested value is walked, by a rough count. A larger one reports this as its size: finding out more would
take the time that the bound is there to save."""

HEAD_CHARS = 1_000
_MARK = re.compile(r"… \[cut, \d+ characters in all\]\Z")
_MAX_DEPTH = 64
_INT64 = 2**63
_ITEM = 8

_KEYS = (str, int, float, bool, type(None), datetime.date)
_ATOMS = (
    datetime.date,
    datetime.time,
    datetime.timedelta,
    decimal.Decimal,
    uuid.UUID,
    ipaddress.IPv4Address,
    ipaddress.IPv6Address,
)


def text_bytes(text: str) -> int:
    """Bytes that `text` takes inside a JSON document, quotes left out."""
    return len(orjson.dumps(text)) - 2


def clean_text(text: str) -> str:
    """`text` without surrogates, which UTF-8, and so JSON on the wire, cannot carry: a pair of them becomes the
    character that it stands for, one that is alone a question mark."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return joined.encode("utf-8", "replace").decode()
    return text


def clean_texts(value: Any) -> Any:
    """`value` with all texts clean that are in its lists and dicts."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, list):
        return [clean_texts(item) for item in value]
    if isinstance(value, dict):
        return type(value)({clean_texts(key): clean_texts(item) for key, item in value.items()})
    return value


class Pieces:
    """A text that comes in pieces, cleaned. Half of a surrogate pair at the end of a piece waits for the next one."""

    def __init__(self) -> None:
        self._half = ""

    def push(self, piece: str) -> str:
        """What is certain with `piece`."""
        text = self._half + piece
        self._half = text[-1:] if _is_high(text[-1:]) else ""
        return clean_text(text.removesuffix(self._half))

    def end(self) -> str:
        """What is certain since no more pieces come."""
        half, self._half = self._half, ""
        return clean_text(half)


def first_chars(text: str, count: int) -> str:
    """The first `count` characters, cleaned. A surrogate pair at the cut is left out."""
    end = count - 1 if _is_high(text[count - 1 : count]) and _is_low(text[count : count + 1]) else count
    return clean_text(text[:end])


def _is_high(char: str) -> bool:
    return "\ud800" <= char < "\udc00"


def _is_low(char: str) -> bool:
    return "\udc00" <= char < "\ue000"


def cut_piece(text: str) -> str:
    """As `cut_text`, for a piece of a text: half of a surrogate pair at an end of it is kept, since the piece before or
    after may have the other half."""
    first = text[:1] if _is_low(text[:1]) else ""
    last = text[-1:] if _is_high(text[-1:]) else ""
    return first + cut_text(text.removeprefix(first).removesuffix(last)) + last


def cut_text(text: str, limit: int = VALUE_BYTES) -> str:
    """`text`, or as much of it as fits into `limit` bytes of JSON together with a mark that says how long it was."""
    if len(text) * 6 <= limit:  # six bytes is the longest escape of one character
        return clean_text(text)
    head = first_chars(text, limit)
    if len(text) <= limit and text_bytes(head) <= limit:
        return head
    mark = f"… [cut, {len(text)} characters in all]"
    room = limit - text_bytes(mark)
    while head and (size := text_bytes(head)) > room:
        head = head[: max(0, min(len(head) - 1, len(head) * room // size))]
    return head + mark


def was_cut(value: Any) -> bool:
    """Whether `value` is a text that `cut_text` has cut."""
    return isinstance(value, str) and _MARK.search(value) is not None


def plain(
    value: Any, limit: int = VALUE_BYTES, other: Callable[[Any], str] | None = None, *, strict: bool = False
) -> Any:
    """A copy of `value` as plain JSON data of at most `limit` bytes.

    Models, dataclasses, dates, enums, sets and bytes are converted; what has no JSON form becomes `<its type>`, never
    its `repr` (which may hold addresses or secrets), unless `other` gives a text for it. What raises when it is read
    becomes `<its type>`, too, or if `strict` is raised. NaN and infinities, and integers beyond 64 bits, become text.
    Too much text is cut with a mark; any other value that is too large becomes
    `{"truncated": true, "bytes": n, "head": "…"}`.
    """
    if isinstance(value, str) and not isinstance(value, enum.Enum):
        return cut_text(value, limit)
    walk = _Walk(max(limit, COUNT_BYTES), other or _name_type, strict)
    try:
        copy = walk.copy(value, 0)
    except _Full:
        return {"truncated": True, "bytes": max(limit, COUNT_BYTES), "head": walk.head()}
    if walk.used <= limit // 6:
        return copy
    encoded = orjson.dumps(copy)
    if len(encoded) <= limit:
        return copy
    return {"truncated": True, "bytes": len(encoded), "head": encoded[:HEAD_CHARS].decode(errors="ignore")}


def plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Named values as plain JSON data: each capped by `VALUE_BYTES`, all together by `FIELDS_BYTES`."""
    result: dict[str, Any] = {}
    left = FIELDS_BYTES
    for key, value in fields.items():
        name = cut_text(str(key), 256)
        copy = plain(value, max(4 * HEAD_CHARS, min(VALUE_BYTES, left)))
        left -= text_bytes(name) + len(orjson.dumps(copy))
        if left < 0:
            result["…"] = {"truncated": True, "bytes": FIELDS_BYTES, "head": f"{len(fields) - len(result)} more fields"}
            break
        result[name] = copy
    return result


class _Full(Exception):
    """The walk has used up its budget."""


class _Walk:
    """One bounded copy. `used` counts a byte for each character and eight for each number, constant or item."""

    def __init__(self, budget: int, other: Callable[[Any], str], strict: bool) -> None:
        self.budget = budget
        self._other = other
        self._strict = strict
        self.used = 0
        self._texts: list[str] = []

    def head(self) -> str:
        return " ".join(self._texts)[:HEAD_CHARS]

    def _use(self, size: int) -> None:
        self.used += size
        if self.used > self.budget:
            raise _Full

    def _text(self, text: str) -> str:
        if self.used < HEAD_CHARS:
            self._texts.append(first_chars(text, HEAD_CHARS))
        self._use(len(text) + 2)
        return clean_text(text)

    def copy(self, value: Any, depth: int) -> Any:
        if value is None or isinstance(value, bool):
            self._use(_ITEM)
            return value
        if isinstance(value, enum.Enum):
            return self.copy(value.value, depth)
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, int | float):
            return self._number(value)
        if depth >= _MAX_DEPTH:
            return self._text("…")
        return self._object(value, depth)

    def _object(self, value: Any, depth: int) -> Any:
        """Anything whose methods have to be called, which may do whatever they like."""
        try:
            return self._container(value, depth)
        except _Full:
            raise
        except Exception as error:
            contains_itself = isinstance(value, BaseModel) and isinstance(error, ValueError)
            if self._strict and not contains_itself:
                raise
            return self._text(_name_type(value))

    def _number(self, value: int | float) -> Any:
        if isinstance(value, float):
            self._use(_ITEM)
            return float(value) if math.isfinite(value) else self._text(str(value))
        if -_INT64 <= value < _INT64:
            self._use(_ITEM)
            return int(value)
        if value.bit_length() > 4096:  # the decimal form of a huge integer takes quadratic time
            return self._text(f"<integer of {value.bit_length()} bits>")
        return self._text(str(value))

    def _container(self, value: Any, depth: int) -> Any:
        if isinstance(value, BaseModel):
            dumped = value.model_dump(mode="json", fallback=self._other, warnings=False)
            return self.copy(dumped, depth)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return self._mapping(value, depth)
        if isinstance(value, list | tuple | set | frozenset | deque):
            return self._items(value, depth)
        if isinstance(value, bytes | bytearray | memoryview):
            return self._text(f"<{len(value)} bytes>")
        if isinstance(value, _ATOMS):
            return self._text(str(value))
        return self._text(self._other(value))

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        result = {}
        for key, item in value.items():
            name = self._text(_key(key))
            result[name] = self.copy(item, depth + 1)
        return result

    def _items(self, value: Iterable[Any], depth: int) -> list[Any]:
        result = []
        for item in value:
            self._use(_ITEM)
            result.append(self.copy(item, depth + 1))
        return result


def _key(key: Any) -> str:
    """A key's text, as pydantic has it."""
    if isinstance(key, enum.Enum):
        return _key(key.value)
    if isinstance(key, tuple):
        return ",".join(map(_key, key))
    return str(key) if isinstance(key, _KEYS) else _name_type(key)


def _name_type(value: Any) -> str:
    return f"<{type(value).__name__}>"
