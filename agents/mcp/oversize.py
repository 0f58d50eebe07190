"""Messages that are too large: never put together nor parsed; of the result in one only the beginning is kept.

To parse 20 MB of JSON takes the event loop half a second, on whatever thread it is done (G3). Sans-I/O.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jiter
import orjson
from mcp_types import JSONRPCResponse

from agents.values import VALUE_BYTES, cut_text

MAX_BYTES = 4 * 1024 * 1024
"""Size of a message up to which it is parsed."""
HEAD_BYTES = 2 * VALUE_BYTES
TAIL_BYTES = 256

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
        """The message, and begin anew."""
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


def salvage(message: Oversize) -> JSONRPCResponse | None:
    """The beginning of the result that `message` holds, as a message; `None` if it answers nothing."""
    head: Any = {}
    with suppress(ValueError):
        head = jiter.from_json(message.head, partial_mode="trailing-strings")
    if not isinstance(head, dict) or "method" in head:
        return None
    id = head.get("id")
    if id is None and (match := _ID_AT_END.search(message.tail)):
        id = orjson.loads(match[1])
    if not isinstance(id, int | str):
        return None
    result = head.get("result")
    result = result if isinstance(result, dict) else {}
    content = result.get("content")
    blocks = content if isinstance(content, list) else []
    texts = [block["text"] for block in blocks if isinstance(block, dict) and isinstance(block.get("text"), str)]
    mark = f"… [cut, the result has {message.size:,} bytes]"
    text = cut_text("\n".join(texts), VALUE_BYTES - 2 * len(mark.encode())).partition("… [cut, ")[0]
    cut = {
        "content": [{"type": "text", "text": text + mark}],
        "isError": bool(result.get("isError")),
        "resultType": "complete",
    }
    return JSONRPCResponse(jsonrpc="2.0", id=id, result=cut)
