"""Messages that are too large: never put together nor parsed; of the result in one only the beginning is kept.

To parse 20 MB of JSON takes the event loop half a second, on whatever thread it is done (G3). Sans-I/O.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jiter
import orjson
from mcp_types import JSONRPCResponse, RequestId

from agentcast.agents.values import VALUE_BYTES, cut_text

MAX_BYTES = 4 * 1024 * 1024
"""Size of a message up to which it is parsed."""
HEAD_BYTES = 2 * VALUE_BYTES
TAIL_BYTES = 256

BLANK = b" \t\r\n\0\xef\xbb\xbf"
"""What may stand around a message: blanks, NUL bytes, a byte order mark."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_ID_AT_END = re.compile(rb'"id"\s*:\s*(-?\d+|"[^"\\]*")\s*(?:,\s*"jsonrpc"\s*:\s*"2\.0"\s*)?\}\s*\Z')


@dataclass(frozen=True)
class Oversize:
    """A message that was too large: its beginning, its end, and how many bytes it has in all."""

    head: bytes
    tail: bytes
    size: int


class Bounded:
    """Collects one message piece by piece, holding `limit` bytes at most."""

    def __init__(self, limit: int = MAX_BYTES) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        self._size = 0
        self._tail = b""

    def add(self, part: bytes) -> None:
        before, self._size = self._size, self._size + len(part)
        if self._size <= self._limit:
            self._parts.append(part)
        elif before <= self._limit:
            whole = b"".join([*self._parts, part])
            self._parts, self._tail = [whole[:HEAD_BYTES]], whole[-TAIL_BYTES:]
        else:
            self._tail = (self._tail + part)[-TAIL_BYTES:]

    def take(self) -> bytes | Oversize:
        """The message; a new one starts."""
        whole, size, tail = b"".join(self._parts), self._size, self._tail
        self._parts, self._size, self._tail = [], 0, b""
        return whole if size <= self._limit else Oversize(whole, tail, size)


class Lines:
    """Parts bytes into lines, of which each is a message."""

    def __init__(self, limit: int = MAX_BYTES) -> None:
        self._line = Bounded(limit)

    def feed(self, data: bytes) -> Iterator[bytes | Oversize]:
        """The lines that are whole now, without their ends."""
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            self._line.add(data[start:end])
            yield self._line.take()
            start = end + 1
        self._line.add(data[start:])


def completed(head: bytes) -> Any:
    """The document that begins with `head`, as far as it goes; `None` if it cannot be read."""
    for text in (head, _SURROGATE.sub(rb"\\ufffd", head.decode(errors="replace").encode())):
        with suppress(ValueError):
            return jiter.from_json(text, partial_mode="trailing-strings")
    return None


def salvage(message: Oversize, answered: RequestId | None = None) -> JSONRPCResponse | None:
    """The beginning of the result that `message` holds, as a message; `None` if it answers nothing.

    `answered` is the id of the request that it answers, where that is known.
    """
    head = completed(message.head.lstrip(BLANK))
    head = head if isinstance(head, dict) else {}
    if "method" in head:
        return None
    id = head.get("id") if answered is None else answered
    if id is None and (match := _ID_AT_END.search(message.tail)):
        id = orjson.loads(match[1])
    if not isinstance(id, int | str):
        return None
    mark = f"… [cut, the result has {message.size:,} bytes]"
    text = cut_text("\n".join(_texts(head)), VALUE_BYTES - 2 * len(mark.encode())).partition("… [cut, ")[0]
    result = head.get("result")
    cut = {
        "content": [{"type": "text", "text": text + mark}],
        "isError": bool(head.get("error")) or (isinstance(result, dict) and bool(result.get("isError"))),
        "resultType": "complete",
    }
    return JSONRPCResponse(jsonrpc="2.0", id=id, result=cut)


def _texts(head: Mapping[str, Any]) -> list[str]:
    """The texts in a result, or what an error says."""
    error, result = head.get("error"), head.get("result")
    if isinstance(error, dict):
        return [str(error.get("message", ""))]
    content = result.get("content") if isinstance(result, dict) else None
    blocks = content if isinstance(content, list) else []
    return [block["text"] for block in blocks if isinstance(block, dict) and isinstance(block.get("text"), str)]
