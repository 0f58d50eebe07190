"""Arguments of a tool call, filled from the question by name and type.

A required argument that nothing in the prompt can fill makes the call impossible; nothing is invented for it.
"""

import re
from typing import Any

from agentcast.agents.offline.prompt import Prompt, Tool
from agentcast.agents.words import stem

_NAMES: dict[str, tuple[str, ...]] = {
    "expression": ("expression", "formula", "equation", "expr"),
    "query": ("query", "q", "keywords", "terms", "search", "text", "topic"),
    "file": ("file", "path", "filename", "document", "url", "page", "name", "source"),
    "line": ("line", "start", "start_line", "around", "offset"),
}
"""Names under which tools commonly take what a rule gives."""
_WHOLE_TEXT = ("text", "content", "message", "input", "question", "prompt", "sentence", "body", "request")

_QUOTED = re.compile(r"[\"“'`]([^\"”'’`]{1,80})[\"”'’`]")
_FILE = re.compile(r"\b[\w./-]+\.[a-z]{1,5}\b")
_IS_FILE = re.compile(r"\w\.(?:md|txt|rst|py|toml|json|ya?ml|csv|html?|log)$")
_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_URL = re.compile(r"https?://[^\s)>\]\"']+")
_DATE = re.compile(r"\b\d{4}-\d{2}-\d{2}\b")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.]*\w)")
_NAME = re.compile(r"(?<![.!?] )(?<!^)\b[A-Z][\w'’-]*(?: [A-Z][\w'’-]*)*")
_PATTERNS = (
    (re.compile(r"mail"), _EMAIL),
    (re.compile(r"ur[li]|link|website"), _URL),
    (re.compile(r"date|day"), _DATE),
    (re.compile(r"file|path|document"), _FILE),
)


def required(tool: Tool) -> list[str]:
    """The arguments that `tool` cannot do without."""
    return [name for name, schema in tool.args.items() if "default" not in schema]


def takes(tool: Tool, names: tuple[str, ...]) -> bool:
    """Whether `tool` has an argument of one of these names."""
    return any(name.lower() in names for name in tool.args)


def named_places(text: str) -> list[str]:
    """The web addresses, and the files with a usual ending, that `text` names."""
    places = [place.rstrip(".,?!") for place in _URL.findall(text)]
    files = [place for place in _FILE.findall(_URL.sub(" ", text)) if _IS_FILE.search(place)]
    return list(dict.fromkeys(places + files))


def fill(tool: Tool, prompt: Prompt, words: list[str], given: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Arguments for `tool`, or `None` if a required one has no value. `given` comes first, under any usual name."""
    args: dict[str, Any] = {}
    for kind, value in (given or {}).items():
        name = _named(tool, kind, value)
        if name is not None:
            args[name] = value
    text = "\n".join(value for name, value in prompt.values.items() if name != "history")
    numbers = _NUMBER.findall(text)
    for name, schema in tool.args.items():
        if name in args:
            continue
        value = prompt.values.get(name)
        if value is None and "default" not in schema:
            value = _guess(name, schema, text, words, numbers)
            if value is None:
                return None
        if value is not None:
            args[name] = value
    return args


def _named(tool: Tool, kind: str, value: Any) -> str | None:
    """The argument of `tool` that takes `value`: one of a usual name, else the only required one of its type."""
    wanted = "string" if isinstance(value, str) else "integer"
    fitting = [name for name, schema in tool.args.items() if schema.get("type", wanted) in (wanted, "number")]
    for usual in _NAMES[kind]:
        for name in fitting:
            if name.lower() == usual:
                return name
    needed = [name for name in required(tool) if name in fitting]
    return needed[0] if len(needed) == 1 and wanted == "string" else None


def _guess(name: str, schema: dict[str, Any], text: str, words: list[str], numbers: list[str]) -> Any:
    if "enum" in schema:
        return _choice(schema["enum"], text)
    match schema.get("type"):
        case "integer":
            whole = next((number for number in numbers if "." not in number), None)
            if whole is None:
                return None
            numbers.remove(whole)
            return int(whole)
        case "number":
            return float(numbers.pop(0)) if numbers else None
        case "boolean":
            return bool({stem(part) for part in re.split(r"_", name)} & {stem(word) for word in words})
        case "array":
            return _items(schema.get("items", {}), text, numbers)
        case "object":
            return None
        case _:
            return _text(name.lower(), text, words)


def _choice(options: list[Any], text: str) -> Any:
    lower = text.lower()
    return next((option for option in options if str(option).lower() in lower), None)


def _items(schema: dict[str, Any], text: str, numbers: list[str]) -> list[Any] | None:
    if schema.get("type") in ("integer", "number"):
        kind = int if schema["type"] == "integer" and not any("." in number for number in numbers) else float
        return [kind(number) for number in numbers] or None
    return _QUOTED.findall(text) or _NAME.findall(text) or None


def _text(name: str, text: str, words: list[str]) -> str | None:
    for names, pattern in _PATTERNS:
        if names.search(name):
            match = pattern.search(text)
            return match.group().rstrip(".,") if match else None
    if name in _NAMES["query"] and words:
        return " ".join(words)
    if name in _WHOLE_TEXT:
        return text.strip() or None
    quoted, names_ = _QUOTED.findall(text), _NAME.findall(text)
    if quoted or names_:
        return str((quoted or names_)[0])
    return " ".join(words) or None
