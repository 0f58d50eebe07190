"""What an MCP server says, as it may be shown to clients and LMs: results as bounded data, errors without tracebacks,
paths and secrets (G9).

This module must not know connections.
"""

import re
from collections.abc import Iterable
from typing import Any

import orjson
from mcp_types import AudioContent, CallToolResult, EmbeddedResource, ImageContent, ResourceLink, TextContent

from agents.base import ToolError, redact
from agents.values import HEAD_CHARS, VALUE_BYTES, cut_text, first_chars, plain

ERROR_CHARS = 2_000
_COMPARED = 256 * 1024
"""Characters of text up to which it is looked whether it says the same as the structured content."""

_TRACE_LINE = re.compile(r"^\s*(?:File \".*\", line \d+|at .+:\d+(?::\d+)?\)?\s*$|\^+\s*$|~*\^+~*\s*$)")
_TRACE_START = "Traceback (most recent call last)"
_PATH = re.compile(r"(?<![\w/:.~-])(?:~?/(?:[^/\s'\":,;()\[\]<>]+/)+|[A-Za-z]:\\(?:[^\\\s'\":,;]+\\)+)")


def observation(result: CallToolResult, args: Any) -> Any:
    """`result` as plain data for a prompt: structured content where there is some, text otherwise; images and
    resources are named. `args` are those of the call: paths in them are no news.

    :raises ToolError: the tool failed; the text is what the server says, cleaned.
    """
    text = "\n".join(_block(block) for block in result.content)
    if result.is_error:
        raise ToolError(clean_error(text, str(plain(args))) or "it gave no reason")
    if result.structured_content is None:
        return redact(cut_text(text))
    structured = result.structured_content
    if isinstance(structured, dict) and set(structured) == {"result"}:  # how the SDK wraps what is no object
        structured = structured["result"]
    data = _redacted(plain(structured))
    if not text or _says_the_same([block.text for block in result.content if isinstance(block, TextContent)], data):
        return data
    return {"text": redact(cut_text(text, VALUE_BYTES // 2)), "data": _redacted(plain(structured, VALUE_BYTES // 2))}


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


def _says_the_same(texts: list[str], data: Any) -> bool:
    """Whether the text is but the structured content once more, as the SDK sends it for older clients."""
    whole = "\n".join(texts)
    if len(whole) > _COMPARED:
        return isinstance(data, str) or (isinstance(data, dict) and data.get("truncated") is True)
    if redact(whole) == data:
        return True
    if isinstance(data, list) and len(texts) == len(data):
        return all(_read(text) == item or text == item for text, item in zip(texts, data, strict=True))
    return bool(_read(whole) == data)


def _read(text: str) -> Any:
    try:
        return plain(orjson.loads(redact(text)))
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
