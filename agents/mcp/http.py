"""Bodies of HTTP responses, changed on their way to the SDK so that it can read each message in them.

They are bounded as lines of stdio are (see `oversize`) and read as leniently (see `messages`). The answer in the
response to a request is the answer to that request, whatever its id says.
"""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import jiter
from mcp.shared.dispatcher import coerce_request_id
from mcp_types import RequestId

from agentcast.agents.mcp.messages import encoded, is_answer, no_answer, read
from agentcast.agents.mcp.oversize import Bounded, Lines, Oversize

_BOM = b"\xef\xbb\xbf"


def bounded(response: httpx2.Response) -> Any:
    """The body of `response` as the SDK is to see it."""
    kind = response.headers.get("content-type", "").lower()
    if response.headers.get("content-encoding", "identity") != "identity":  # which we do not ask for
        return _Body(_Document(None), response.stream) if kind.startswith("application/json") else response.stream
    requests = _requests(response.request)
    if kind.startswith("text/event-stream"):
        return _Body(_Events(requests), response.stream)
    if kind.startswith("application/json"):
        return _Body(_Document(requests if response.is_success else None), response.stream)
    return response.stream


def _requests(request: httpx2.Request) -> dict[RequestId, str]:
    """The request that `request` carries, with its method."""
    match jiter.from_json(request.content) if request.method == "POST" else None:
        case {"id": id, "method": method}:
            return {coerce_request_id(id): method}
        case _:
            return {}


class _Body(httpx2.AsyncByteStream):
    """A body that goes through `filter`."""

    def __init__(self, filter: "_Events | _Document", body: Any) -> None:
        self._filter = filter
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for data in self._body:
            if changed := b"".join(self._filter.feed(data)):
                yield changed
        yield b"".join(self._filter.end())

    async def aclose(self) -> None:
        await self._body.aclose()


class _Document:
    """A body that is one message. Without `requests` it may be anything, an error page or compressed, and is only
    bounded."""

    def __init__(self, requests: dict[RequestId, str] | None) -> None:
        self._requests = requests
        self._whole = Bounded()

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._whole.add(data)
        return iter(())

    def end(self) -> Iterator[bytes]:
        body = self._whole.take()
        if self._requests:
            [id] = self._requests
            answers = [message for message in read(body, self._requests, id) if is_answer(message)]
            yield encoded(answers[0] if answers else no_answer(id, body))
        else:
            yield b"null" if isinstance(body, Oversize) else body


class _Events:
    """A body of server-sent events, of which each is a message."""

    def __init__(self, requests: dict[RequestId, str]) -> None:
        self._requests = requests
        self._answered = next(iter(requests), None)
        self._lines = Lines()
        self._begun = self._after_cr = False
        self._fields: dict[bytes, bytes] = {}
        self._data = Bounded()
        self._large: Oversize | None = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The events that are whole now."""
        if self._after_cr:  # lines may end with CR, LF, or both
            data = data.removeprefix(b"\n")
        self._after_cr = data.endswith(b"\r")
        for line in self._lines.feed(data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")):
            if isinstance(line, Oversize):
                self._large = Oversize(line.head.removeprefix(b"data:"), line.tail, line.size)
            elif line:
                self._field(line if self._begun else line.removeprefix(_BOM))
            else:
                yield from self._event()
            self._begun = True

    def end(self) -> Iterator[bytes]:
        yield from self.feed(b"\n\n")  # the last event may lack its end

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.add(value + b"\n")
        else:
            self._fields[name] = value

    def _event(self) -> Iterator[bytes]:
        """The event whose fields have come, as one event for each message in it."""
        fields, data = self._fields, self._large or self._data.take()
        self._fields, self._large, self._data = {}, None, Bounded()
        kind = fields.get(b"event", b"message")
        messages = read(data, self._requests, self._answered) if data and kind == b"message" else []
        messages.sort(key=is_answer)  # which ends the stream
        for message in messages[:-1]:
            yield b"data: %b\n\n" % encoded(message)
        kept = [b"%b: %b\n" % (name, fields[name]) for name in (b"id", b"retry") if name in fields]
        if messages:
            kept.append(b"data: %b\n" % encoded(messages[-1]))
        if kept:
            yield b"".join([*kept, b"\n"])
