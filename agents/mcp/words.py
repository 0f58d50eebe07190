"""What an MCP server says, as it may be shown to clients and LMs: results as bounded data, errors without tracebacks,
paths and secrets (G9).

This module must not know connections.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import orjson
from mcp_types import AudioContent, CallToolResult, EmbeddedResource, ImageContent, ResourceLink, TextContent

from agentcast.agents.base import ToolError, redact
from agentcast.agents.values import HEAD_CHARS, VALUE_BYTES, cut_text, first_chars, plain

ERROR_CHARS = 2_000
_COMPARED = 1024 * 1024
"""Characters of JSON that are compared with structured content."""
_WRAPPINGS = 4
"""Keys, one in another, that structured content may be wrapped in."""

_TRACE_LINE = re.compile(r"^\s*(?:File \".*\", line \d+|at .+:\d+(?::\d+)?\)?\s*$|\^+\s*$|~*\^+~*\s*$)")
_TRACE_START = "Traceback (most recent call last)"
_PATH = re.compile(r"(?<![\w/:.~-])(?:~?/(?:[^/\s'\":,;()\[\]<>]+/)+|[A-Za-z]:\\(?:[^\\\s'\":,;]+\\)+)")


def observation(result: CallToolResult, args: Any) -> Any:
    """`result` as plain data for a prompt: structured content where there is some, text otherwise; images and
    resources are named. Text that is but the structured content once more is left out. `args` are those of the call:
    paths in them are known anyway.

    :raises ToolError: the tool failed; the text is what the server says, cleaned.
    """
    text = "\n".join(_block(block) for block in result.content)
    if result.is_error:
        if not text.strip() and result.structured_content is not None:
            text = orjson.dumps(plain(result.structured_content)).decode()
        raise ToolError(clean_error(text, str(plain(args))) or "it gave no reason")
    if result.structured_content is None:
        return redact(cut_text(text))
    structured = result.structured_content
    rest, copy = _apart(result.content, structured)
    if isinstance(structured, dict) and set(structured) == {"result"}:  # how the SDK wraps what is no object
        structured = structured["result"]
    beside = "\n".join(_block(block) for block in rest)
    if not beside:
        return _data(structured, copy, VALUE_BYTES)
    half = VALUE_BYTES // 2
    return {"text": redact(cut_text(beside, half)), "data": _data(structured, copy, half)}


def _data(structured: Any, copy: str, limit: int) -> Any:
    """`structured` in at most `limit` bytes; if it is larger, the beginning of `copy`, the same as a text."""
    shown = _redacted(plain(structured, limit))
    is_cut = isinstance(shown, dict) and shown.get("truncated") is True and "head" in shown
    return redact(cut_text(copy, limit)) if is_cut and copy else shown


def clean_error(text: str, known: str = "") -> str:
    """`text` without traceback, secrets, and the folders of paths that are not in `known`."""
    lines = cut_text(text, 8 * ERROR_CHARS).splitlines()
    kept: list[str] = []
    in_trace = False
    for line in lines:
        in_trace = _TRACE_START in line or (in_trace and (line.startswith(" ") or not line.strip()))
        if not in_trace and not _TRACE_LINE.match(line):
            kept.append(line)
    shown = _PATH.sub(lambda match: match[0] if match[0] in known else "", "\n".join(kept))
    return cut_text(redact(shown).strip(), ERROR_CHARS)


def last_error_line(lines: Iterable[str]) -> str:
    """The last line that says something, cleaned."""
    cleaned = clean_error("\n".join(lines)).splitlines()
    return next((line.strip()[:300] for line in reversed(cleaned) if line.strip()), "")


def _block(block: Any) -> str:
    match block:
        case TextContent():
            return block.text
        case ImageContent() | AudioContent():
            return f"[{block.type}, {block.mime_type}, {len(block.data) * 3 // 4:,} bytes]"
        case ResourceLink():
            parts = (block.title or block.name, str(block.uri), block.mime_type, block.description)
            return f"[resource {', '.join(part for part in parts if part)}]"
        case EmbeddedResource():
            return _resource(block.resource)
        case _:
            return f"[{type(block).__name__}]"


def _resource(resource: Any) -> str:
    """The name of an embedded resource, and how a text begins."""
    text = getattr(resource, "text", None)
    size = f"{len(text):,} characters" if text is not None else f"{len(resource.blob) * 3 // 4:,} bytes"
    name = f"[resource {', '.join(part for part in (str(resource.uri), resource.mime_type, size) if part)}]"
    return name if text is None else f"{name}\n{first_chars(text, HEAD_CHARS)}"


# -- Text and structure --------------------------------------------------------------------------------------------


def _apart(content: Sequence[Any], structured: Any) -> tuple[list[Any], str]:
    """The blocks that do not just say what `structured` does, and the text of those that do."""
    texts = [block.text for block in content if isinstance(block, TextContent)]
    if _same(texts, structured):
        return [block for block in content if not isinstance(block, TextContent)], "\n".join(texts)
    copies = [text for text in texts if len(texts) > 1 and _same([text], structured)]
    rest = [block for block in content if not (isinstance(block, TextContent) and block.text in copies)]
    return rest, copies[0] if copies else ""


def _same(texts: Sequence[str], structured: Any) -> bool:
    """Whether `texts` say the same as `structured`, as it is or without keys that it is wrapped in: as a text, as JSON
    in any form, or as one text, or line, for each item of a list."""
    whole = "\n".join(texts).strip()
    levels = list(_unwrapped(structured))
    for level in levels:
        if isinstance(level, str) and level.strip() == whole:
            return True
        if isinstance(level, list) and (_are_items(texts, level) or _are_items(whole.splitlines(), level)):
            return True
    if len(whole) > _COMPARED:
        return whole.startswith(("{", "["))  # most likely: to find out would take too long (G3)
    said = list(_unwrapped(_read(whole)))
    return any(_equal(said[0], level) for level in levels) or any(_equal(level, structured) for level in said)


def _unwrapped(value: Any) -> Iterator[Any]:
    """`value`, and what it holds under one key after another."""
    yield value
    for _ in range(_WRAPPINGS):
        if not isinstance(value, dict) or len(value) != 1:
            return
        [value] = value.values()
        yield value


def _are_items(texts: Sequence[str], items: Sequence[Any]) -> bool:
    if not items or len(texts) != len(items) or sum(map(len, texts)) > _COMPARED:
        return False
    pairs = zip(texts, items, strict=True)
    return all(
        (isinstance(item, str) and text.strip() == item.strip()) or _equal(_read(text), item) for text, item in pairs
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, bool) is not isinstance(other, bool):  # which Python takes for numbers
        return False
    try:
        return bool(one == other)
    except RecursionError:
        return False


def _read(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return _NOTHING


_NOTHING = object()


def _redacted(data: Any) -> Any:
    """Bounded plain `data`, its texts redacted."""
    if isinstance(data, str):
        return redact(data)
    if isinstance(data, list):
        return [_redacted(item) for item in data]
    if isinstance(data, dict):
        return {redact(key): _redacted(value) for key, value in data.items()}
    return data
