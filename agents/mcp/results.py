"""Results and errors of a server, made to fit the SDK's models of every protocol version.

Of each result is kept what agents use, as far as it has the right form; the models cannot reject the rest then. What
does not fit is replaced by what can be used of it, or named: unknown blocks by their type, tools that cannot be used in
the listing's metadata (`LEFT_OUT`).
"""

from collections.abc import Mapping
from typing import Any

import orjson
from mcp.shared.inbound import find_invalid_x_mcp_header
from mcp_types import INTERNAL_ERROR, InputRequiredResult
from mcp_types.version import LATEST_HANDSHAKE_VERSION
from pydantic import ValidationError

from agentcast.agents.mcp.arguments import SCHEMA
from agentcast.agents.values import cut_text, plain

LEFT_OUT = "agentcast/leftOut"
"""In the metadata of a listing: its entries that may not be there, as names with reasons."""

UNREADABLE = "[the rest of the answer cannot be read]"
_MESSAGE_BYTES = 8 * 1024


def fitted(method: str, result: Any) -> dict[str, Any] | None:
    """`result` of a request for `method`, as the SDK takes it; `None` if nothing of it can be used."""
    match method:
        case "tools/call":
            return _call_result(result)
        case "tools/list":
            return _listing(result)
        case "initialize":
            return _handshake(result) if isinstance(result, dict) else None
        case "ping":
            return {}
        case _:
            return result if isinstance(result, dict) else None


def error_data(error: Any) -> dict[str, Any]:
    """`error` of an answer, with a code and a message."""
    if not isinstance(error, dict):
        return {"code": INTERNAL_ERROR, "message": _words(error)}
    code, message = error.get("code"), error.get("message")
    data = {"data": error["data"]} if "data" in error else {}
    return {"code": _code(code), "message": _words(message), **data}


def _code(code: Any) -> int:
    try:
        return int(code)
    except (TypeError, ValueError, OverflowError):
        return INTERNAL_ERROR


def _words(value: Any) -> str:
    """Bounded text that says what `value` does."""
    if value is None:
        return ""
    return cut_text(value if isinstance(value, str) else orjson.dumps(plain(value)).decode(), _MESSAGE_BYTES)


# -- Calls ---------------------------------------------------------------------------------------------------------


def _call_result(result: Any) -> dict[str, Any]:
    given = result if isinstance(result, dict) else _as_call_result(result)
    if _asks_for_input(given):
        return given
    if given.keys().isdisjoint(("content", "structuredContent", "isError")):
        rest = {name: value for name, value in given.items() if name not in ("_meta", "resultType")}
        given = {"structuredContent": rest} if rest else {}
    content, structured, failed = given.get("content"), given.get("structuredContent"), given.get("isError")
    blocks = content if isinstance(content, list) else [] if content is None else [content]
    fitting = {
        "content": [_block(block) for block in blocks],
        "isError": bool(failed) and failed != "false",
        "resultType": "complete",
    }
    if structured is not None:  # protocols before 2026 have objects only
        fitting["structuredContent"] = structured if isinstance(structured, dict) else {"result": structured}
    return fitting


def _asks_for_input(given: dict[str, Any]) -> bool:
    """Whether the server asks for something before it answers, in a form that the SDK takes."""
    try:
        InputRequiredResult.model_validate(given, by_name=False)
    except ValidationError:
        return False
    return given.get("resultType") == "input_required"


def _as_call_result(result: Any) -> dict[str, Any]:
    if isinstance(result, str):
        return {"content": [result]}
    if isinstance(result, list) and result and all(isinstance(item, dict) and "type" in item for item in result):
        return {"content": result}
    return {"structuredContent": result}


def _block(block: Any) -> dict[str, Any]:
    """A block of content as the models have it, or a text that names it."""
    match block:
        case str() | {"type": "text", "text": str()}:
            return _text(block if isinstance(block, str) else block["text"])
        case {"type": "text", "text": value} if value is not None:
            return _text(_words(value))
        case {"type": "image" | "audio" as kind, "data": str() as data}:
            return {"type": kind, "data": data, "mimeType": _string(block.get("mimeType"), "of unknown type")}
        case {"type": "resource_link" as kind, "uri": str() as uri}:
            named = {"type": kind, "uri": uri, "name": _string(block.get("name"), uri)}
            return named | _strings(block, "title", "description", "mimeType")
        case {"type": "resource" as kind, "resource": {"text": str()} | {"blob": str()} as resource}:
            return {"type": kind, "resource": {"uri": _string(resource.get("uri"), "")} | _contents(resource)}
        case _:
            return _text(_named(block))


def _named(block: Any) -> str:
    """A block that is of no known form: its type, and the text in it."""
    block = block if isinstance(block, dict) else {}
    kind, text = block.get("type"), _string(block.get("text"), "")
    if kind is None and text:
        return text
    return f"[{cut_text(_string(kind, 'unknown'), 100)}] {text}".rstrip()


def _contents(resource: Mapping[str, Any]) -> dict[str, str]:
    found = _strings(resource, "text", "blob", "mimeType")
    if "text" in found:
        found.pop("blob", None)
    return found


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _string(value: Any, otherwise: str) -> str:
    return value if isinstance(value, str) else otherwise


def _strings(given: Mapping[str, Any], *names: str) -> dict[str, str]:
    return {name: given[name] for name in names if isinstance(given.get(name), str)}


# -- Listings ------------------------------------------------------------------------------------------------------


def _listing(result: Any) -> dict[str, Any]:
    given = result if isinstance(result, dict) else {"tools": result}
    entries, cursor = given.get("tools"), given.get("nextCursor")
    left_out: list[tuple[str, str]] = []
    if not isinstance(entries, list):
        entries, left_out = [], [("", "its list of tools is no list")]
    tools = [tool for number, entry in enumerate(entries, start=1) if (tool := _tool(number, entry, left_out))]
    fitting = {"tools": tools, "resultType": "complete", "ttlMs": 0, "cacheScope": "private"}
    if isinstance(cursor, str | int) and not isinstance(cursor, bool):
        fitting["nextCursor"] = str(cursor)
    return {**fitting, "_meta": {LEFT_OUT: left_out}} if left_out else fitting


def _tool(number: int, entry: Any, left_out: list[tuple[str, str]]) -> dict[str, Any] | None:
    if not isinstance(entry, dict):
        left_out.append(("", f"entry {number} of its list of tools is left out: it is no object"))
        return None
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip():
        left_out.append(("", f"entry {number} of its list of tools is left out: it has no name"))
        return None
    given = entry.get("inputSchema")
    schema = _input_schema(given)
    if (header := find_invalid_x_mcp_header(schema)) is not None:  # then the SDK leaves it out, since 2026
        left_out.append((name, f"tool {name!r} is left out: {header}"))
    tool = {"name": name, "inputSchema": schema, **_strings(entry, "title", "description")}
    return tool if schema == given else {**tool, "_meta": {SCHEMA: given}}


def _input_schema(schema: Any) -> dict[str, Any]:
    """`schema` as far as the models of all versions take it."""
    if not isinstance(schema, dict):
        return {"type": "object"}
    fitting = {**schema, "type": "object"}
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or not all(isinstance(value, dict | bool) for value in properties.values()):
        fitting.pop("properties", None)
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        fitting.pop("required", None)
    if not isinstance(schema.get("$schema"), str):
        fitting.pop("$schema", None)
    return fitting


# -- Handshakes ----------------------------------------------------------------------------------------------------


def _handshake(result: dict[str, Any]) -> dict[str, Any]:
    server, capabilities = result.get("serverInfo"), result.get("capabilities")
    server = server if isinstance(server, dict) else {}
    offers_tools = isinstance(capabilities, dict) and isinstance(capabilities.get("tools"), dict)
    changes = offers_tools and capabilities["tools"].get("listChanged") is True  # type: ignore[index]
    return {
        "protocolVersion": _string(result.get("protocolVersion"), LATEST_HANDSHAKE_VERSION),
        "capabilities": {"tools": {"listChanged": changes}},
        "serverInfo": {"name": _string(server.get("name"), ""), "version": _string(server.get("version"), "")},
    }
