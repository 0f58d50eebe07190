"""Input for an agent out of command line arguments: `key=value` texts, typed by the agent's input JSON Schema.

Texts stay texts where the schema wants a string; numbers, booleans, lists and objects are parsed. What does not fit is
reported with the name of the field and the form that it takes. Only the outer type is checked here; the hub checks
everything. This module must not know where the schema comes from.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]

_FORMS = {
    "string": "text",
    "integer": "a whole number such as 5",
    "number": "a number such as 0.5",
    "boolean": "true or false",
    "array": 'a JSON list such as ["a", "b"]',
    "object": 'a JSON object such as {"a": 1}',
    "null": "null",
}
_BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}
_INTEGER = re.compile(r"[+-]?\d{1,300}")
_UNFIT = object()


class BadArgument(Exception):
    """An argument does not fit. `field` is None if the input as a whole does not."""

    def __init__(self, problem: str, field: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.field = field

    def __str__(self) -> str:
        return self.problem if self.field is None else f"{self.field}: {self.problem}"


def typed_input(schema: Schema, pairs: Sequence[str], document: str | None = None) -> dict[str, Any]:
    """The input made of `document`, a JSON object, and of `key=value` pairs, which win over it.

    :raises BadArgument: something is no pair, unknown, given twice, missing, or not of the field's type.
    """
    given = {} if document is None else _object(document)
    keys = set()
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not _is_text(pair):
            raise BadArgument("it is not valid UTF-8", key.encode(errors="replace").decode())
        if not sign or not key:
            raise BadArgument(f"{pair!r} is no key=value; {_fields(schema)}")
        if key in keys:
            raise BadArgument("it is given twice", key)
        keys.add(key)
        given[key] = _typed(schema, key, text)
    for key in given:
        _property(schema, key)
    for name in schema.get("required", ()):
        if name not in given:
            raise BadArgument(f"it is required: {name}=… with {describe(schema, _property(schema, name))}", name)
    return given


def describe(schema: Schema, field: Schema) -> str:
    """What the field takes, in a few words: `a whole number such as 5`, `one of fast, slow`."""
    forms = [_form(branch) for branch in _branches(schema, field)]
    return " or ".join(dict.fromkeys(forms)) or "text or JSON"


def type_name(schema: Schema, field: Schema) -> str:
    """The field's type, short: `integer`, `string or null`, `fast | slow`, `list of string`."""
    names = []
    for branch in _branches(schema, field):
        choices = _choices(branch)
        if choices is not None:
            names.append(" | ".join(map(_shown, choices)))
        elif branch.get("type") == "array":
            items = branch.get("items", {})
            names.append(f"list of {type_name(schema, items)}" if items else "list")
        else:
            names.append(str(branch.get("type", "any")))
    return " or ".join(dict.fromkeys(names)) or "any"


def _object(document: str) -> dict[str, Any]:
    try:
        value = json.loads(document, parse_constant=_refuse)
    except ValueError as error:
        raise BadArgument(f"--input is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadArgument("--input must be one JSON object")
    return value


def _typed(schema: Schema, key: str, text: str) -> Any:
    field = _property(schema, key)
    branches = _branches(schema, field)
    for branch in sorted(branches, key=lambda branch: branch.get("type") == "string"):  # a string takes anything: last
        value = _parse(branch, text)
        if value is not _UNFIT:
            return value
    raise BadArgument(f"expected {describe(schema, field)}, got {_clip(text)!r}", key)


def _property(schema: Schema, key: str) -> Schema:
    properties: Mapping[str, Schema] = schema.get("properties", {})
    if key in properties:
        return properties[key]
    additional = schema.get("additionalProperties", False)
    if additional is False:
        raise BadArgument(f"there is no such field; {_fields(schema)}", key)
    return additional if isinstance(additional, Mapping) else {}


def _fields(schema: Schema) -> str:
    required = schema.get("required", ())
    fields = [
        f"{name} ({type_name(schema, field)}{', required' if name in required else ''})"
        for name, field in schema.get("properties", {}).items()
    ]
    return f"the agent takes {', '.join(fields)}" if fields else "the agent takes no input"


def _branches(schema: Schema, field: Schema, depth: int = 0) -> list[Schema]:
    """The alternatives that a field allows, each with one type at most. References are followed, not for ever."""
    if depth > 8:
        return [{}]
    if "$ref" in field:
        target = schema.get("$defs", {}).get(str(field["$ref"]).removeprefix("#/$defs/"), {})
        return _branches(schema, target, depth + 1)
    for keyword in ("anyOf", "oneOf", "allOf"):
        if keyword in field:
            return [branch for part in field[keyword] for branch in _branches(schema, part, depth + 1)]
    if isinstance(field.get("type"), list):
        return [{**field, "type": name} for name in field["type"]]
    return [field]


def _choices(branch: Schema) -> Sequence[Any] | None:
    return [branch["const"]] if "const" in branch else branch.get("enum")


def _form(branch: Schema) -> str:
    choices = _choices(branch)
    if choices is not None:
        return ("one of " if len(choices) > 1 else "") + ", ".join(map(_shown, choices))
    return _FORMS.get(branch.get("type", ""), "text or JSON")


def _parse(branch: Schema, text: str) -> Any:
    """`text` as a value of the branch's type, or `_UNFIT`."""
    choices = _choices(branch)
    if choices is not None:
        return next((choice for choice in choices if _shown(choice) == text), _UNFIT)
    match branch.get("type"):
        case "string":
            return text
        case "integer":
            return int(text) if _INTEGER.fullmatch(text) else _UNFIT
        case "boolean":
            return _BOOLEANS.get(text.lower(), _UNFIT)
        case "number" | "array" | "object" | "null" as kind:
            return _parse_json(kind, text)
    value = _parse_json(None, text)
    return text if value is _UNFIT else value


def _parse_json(kind: str | None, text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_refuse)
    except ValueError:
        return _UNFIT
    fits = {
        "number": isinstance(value, int | float) and not isinstance(value, bool),
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
        "null": value is None,
        None: True,
    }
    return value if fits[kind] else _UNFIT


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON value")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _is_text(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _clip(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"
