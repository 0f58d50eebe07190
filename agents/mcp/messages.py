"""Bytes of a server, read as JSON-RPC messages that the SDK takes.

The SDK rejects a message as a whole for any detail that it does not know, and over stdio the request that the message
answers then waits until its timeout. So bytes are read leniently here, and whatever can be recognised as the answer to
a request becomes one: a result as the method's result has to be (see `results`), or an error that says what is wrong.
Sans-I/O; nothing in here raises.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import jiter
from mcp.shared.dispatcher import coerce_request_id
from mcp_types import INTERNAL_ERROR, RequestId
from pydantic_core import to_json

from agentcast.agents.mcp.oversize import BLANK, Oversize, completed, salvage
from agentcast.agents.mcp.results import UNREADABLE, error_data, fitted
from agentcast.agents.values import clean_text

Message = dict[str, Any]

MAX_DEPTH = 64
"""Levels of nesting that are read of a message that nests too deeply for the parser."""
_ATTEMPTS = 8
"""Places in a line of text at which a message is looked for."""
_DIGITS = 4_000
"""Digits of an integer up to which it is read as one: Python converts no more than 4,300."""

_OPENING = re.compile(r"[{\[]")
_ID = re.compile(r'"id"\s*:\s*(-?\d{1,18}|"[^"\\]{0,100}")')
_KIND = re.compile(r'(?P<method>"method")|"result"|"error"')
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[{\[]+|[}\]]+', re.S)
_NO_ANSWER = "its answer holds neither a result nor an error"
_NO_JSON = "its answer could not be read: it is no valid JSON"


def read(data: bytes | Oversize, requests: Mapping[RequestId, str], answered: RequestId | None = None) -> list[Message]:
    """The messages in `data`: none, one, or several (a batch).

    `requests` are those that wait for an answer, with their methods. Whatever answers anything in `data` answers the
    request `answered`, if there is one.
    """
    if isinstance(data, Oversize):
        return _beginning(data, requests, answered)
    found = []
    for document in _documents(data):
        for item in document if isinstance(document, list) else [document]:
            message = _message(item, requests, answered) if isinstance(item, dict) else None
            if message is not None:
                found.append(message)
    return found


def is_answer(message: Message) -> bool:
    return "method" not in message


def no_answer(id: RequestId, body: bytes | Oversize) -> Message:
    """The answer to a request whose response, `body`, holds none."""
    is_json = isinstance(body, bytes) and body.strip(BLANK).startswith((b"{", b"["))
    return _error(id, _NO_ANSWER if is_json else _NO_JSON)


def encoded(message: Message) -> bytes:
    """`message` as JSON on one line."""
    return to_json(message, inf_nan_mode="constants")


# -- Messages ------------------------------------------------------------------------------------------------------


def _message(document: Message, requests: Mapping[RequestId, str], answered: RequestId | None) -> Message | None:
    id = _request_id(document.get("id"))
    waited_for = answered if answered is not None else id
    holds_answer = "result" in document or "error" in document
    if isinstance(document.get("method"), str) and not (holds_answer and waited_for in requests):
        return _call(document, id)
    if holds_answer and ("jsonrpc" in document or waited_for is not None):
        return _answer(document, waited_for, requests)
    if waited_for in requests and ("jsonrpc" in document or document.keys() == {"id"}):
        return _error(waited_for, _NO_ANSWER)
    return None


def _beginning(data: Oversize, requests: Mapping[RequestId, str], answered: RequestId | None) -> list[Message]:
    """The answer that begins in `data`; nothing else is worth being read in part."""
    answer = salvage(data, answered)
    if answer is None:
        return []
    id = coerce_request_id(answer.id)
    if requests.get(id) != "tools/call":
        return [_error(id, f"its answer has {data.size:,} bytes, which is too much")]
    return [{"jsonrpc": "2.0", "id": id, "result": answer.result}]


def _request_id(id: Any) -> RequestId | None:
    if isinstance(id, float) and id.is_integer():
        return int(id)
    if isinstance(id, int | str) and not isinstance(id, bool):
        return coerce_request_id(id)
    return None


def _call(document: Message, id: RequestId | None) -> Message | None:
    """A request, if it has an id that can be answered to, or a notification that is listened to here."""
    method, params = document["method"], document.get("params")
    params = params if isinstance(params, dict) else {}
    if id is not None:
        id = document["id"] if isinstance(document["id"], str) else id
        return {"jsonrpc": "2.0", "id": id, "method": method, "params": params}
    listens = _NOTIFICATIONS.get(method)
    if listens is None or (heard := listens(params)) is None:
        return None
    return {"jsonrpc": "2.0", "method": method, "params": heard}


def _progress(params: Message) -> Message | None:
    token, progress, total, message = (params.get(key) for key in ("progressToken", "progress", "total", "message"))
    if _request_id(token) is None or not _is_number(progress):
        return None
    heard = {"progressToken": token, "progress": progress}
    return (
        heard
        | ({"total": total} if _is_number(total) else {})
        | ({"message": message} if isinstance(message, str) else {})
    )


def _cancelled(params: Message) -> Message | None:
    id = _request_id(params.get("requestId"))
    return None if id is None else {"requestId": params["requestId"]}


def _subscribed(params: Message) -> Message:
    return {key: value for key, value in params.items() if isinstance(value, dict)}


_NOTIFICATIONS: Mapping[str, Callable[[Message], Message | None]] = {
    "notifications/progress": _progress,
    "notifications/cancelled": _cancelled,
    "notifications/tools/list_changed": _subscribed,
    "notifications/subscriptions/acknowledged": _subscribed,
}
"""Those that the SDK is given, each with what of its parameters is used."""


def _is_number(value: Any) -> bool:
    """Whether `value` is one that is a float, too: the SDK makes it one."""
    with suppress(OverflowError):
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return False


def _answer(document: Message, id: RequestId | None, requests: Mapping[RequestId, str]) -> Message:
    method = requests.get(id, "") if id is not None else ""
    error, result = document.get("error"), document.get("result")
    if error or "result" not in document:
        return {"jsonrpc": "2.0", "id": id, "error": error_data(error)}
    fitting = fitted(method, result)
    if fitting is None or id is None:
        return _error(id, "its answer is of no known form")
    return {"jsonrpc": "2.0", "id": id, "result": fitting}


def _error(id: RequestId | None, text: str) -> Message:
    return {"jsonrpc": "2.0", "id": id, "error": {"code": INTERNAL_ERROR, "message": text}}


# -- Documents -----------------------------------------------------------------------------------------------------


def _documents(data: bytes) -> list[Any]:
    data = data.strip(BLANK)
    try:
        return [jiter.from_json(data)]
    except ValueError:
        return list(_leniently(data)) if b"{" in data else []


def _leniently(data: bytes) -> Iterator[Any]:
    """The documents in what is no JSON document.

    There may be several on one line, or one behind words that its server has written without an end of the line; behind
    words only answers count. Of a document that is cut off, the beginning is used.
    """
    text = _shallow(data).decode(errors="replace")
    at, words, answered = 0, False, False
    for _ in range(_ATTEMPTS):
        if (opening := _OPENING.search(text, at)) is None:
            break
        words = words or bool(text[at : opening.start()].strip())
        at = opening.start() + 1
        document = None
        with suppress(ValueError, RecursionError):
            document, at = _DECODER.raw_decode(text, opening.start())
        if document is None and not words:
            document = _cut_off(text[opening.start() :])
        if not words or _is_answer(document):
            answered = answered or _is_answer(document)
            yield _cleaned(document)
    if not answered and (id := _id_in_garble(text)) is not None:
        yield _error(id, _NO_JSON)


def _id_in_garble(text: str) -> RequestId | None:
    """The id in what seems to be an answer, and no request that its server has written into its log."""
    kind, id = _KIND.search(text), _ID.search(text)
    if id is None or (kind["method"] if kind is not None else '"jsonrpc"' not in text):
        return None
    return json.loads(id[1])  # type: ignore[no-any-return]


def _is_answer(document: Any) -> bool:
    items = document if isinstance(document, list) else [document]
    return any(isinstance(item, dict) and "jsonrpc" in item and "method" not in item for item in items)


def _cut_off(text: str) -> Any:
    """The beginning of a tool's answer that is cut off or garbled; `None` if nothing in it can be used."""
    match completed(text.encode(errors="replace")):
        case {"result": {"content": [*_] as content}} as document if any(_says_something(block) for block in content):
            content.append({"type": "text", "text": UNREADABLE})
            return document
    return None


def _says_something(block: Any) -> bool:
    return isinstance(block, dict) and isinstance(block.get("text"), str) and bool(block["text"].strip())


def _shallow(data: bytes) -> bytes:
    """`data` with a mark in place of whatever lies deeper in it than `MAX_DEPTH`."""
    kept: list[bytes] = []
    depth = start = 0
    for token in _BRACKETS.finditer(data):
        size = len(token[0])
        match token[0][:1]:
            case b"{" | b"[":
                if depth <= MAX_DEPTH < depth + size:
                    kept += (data[start : token.start() + MAX_DEPTH - depth], '"…"'.encode())
                depth += size
            case b"}" | b"]":
                depth -= size
                if depth <= MAX_DEPTH < depth + size:
                    start = token.end() - (MAX_DEPTH - depth)
    return b"".join([*kept, data[start:]]) if depth <= MAX_DEPTH else b"".join(kept)


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) <= _DIGITS else f"{digits[:20]}… [{len(digits)} digits]"


_DECODER = json.JSONDecoder(strict=False, parse_int=_integer)


def _cleaned(value: Any) -> Any:
    """`value` without lone surrogates, which JSON cannot carry on."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, dict):
        return {clean_text(key): _cleaned(item) for key, item in value.items()}
    return value
