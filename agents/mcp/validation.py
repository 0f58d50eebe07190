"""JSON Schemas of others, compiled so that checking against them does no harm.

`jsonschema` checks, in the dialect that the schema names. Nothing is ever fetched, the work of one check is bounded,
and patterns, which can take forever, have a time limit (G3). Formats are not checked.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import islice
from typing import Any

import regex
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.validators import Draft202012Validator, extend, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from agentcast.agents.values import cut_text

MAX_DEPTH = 64
MAX_NODES = 5_000
"""Levels, and objects and lists, of a schema up to which it is used for checks."""
MAX_STEPS = 10_000
"""Keywords that are looked at in one check."""
MAX_ERRORS = 100
PATTERN_SECONDS = 0.05

ERROR_CHARS = 300
"""Characters of what is said of one error."""

_work = threading.local()


class Unchecked(Exception):
    """It cannot be found out whether a value fits; the text says why."""


def errors_of(validator: Any, value: Any) -> list[Any]:
    """What is wrong with `value`, as `jsonschema` says it.

    :raises Exception: it cannot be found out. The schema may be at fault in any way.
    """
    _work.left = MAX_STEPS
    return list(islice(validator.iter_errors(value), MAX_ERRORS))


def said(error: Any) -> str:
    """What `error` says. In the middle stands the value, which may be long."""
    text: str = error.message
    return text if len(text) <= ERROR_CHARS else f"{text[: ERROR_CHARS // 2]} … {text[-ERROR_CHARS // 2 :]}"


def validator_of(schema: Any) -> Any:
    """A validator of arguments.

    :raises Unchecked: there can be none.
    """
    if not isinstance(schema, dict):
        raise Unchecked("it has no inputSchema" if schema is None else "its inputSchema is no object")
    kind = validator_for(schema, default=Draft202012Validator)
    checked = _Checked(schema).copy()
    meta = validator_for(kind.META_SCHEMA, default=kind)(kind.META_SCHEMA)
    if (error := next(meta.iter_errors(schema), None)) is not None:
        error = best_match([error])
        where = "".join(f"{step}: " for step in [".".join(map(str, error.absolute_path))] if step)
        raise Unchecked(f"its schema is no valid JSON Schema: {where}{said(error)}")
    return _bounded(kind)(checked, registry=Registry())


class _Checked:
    """A copy of a schema for a validator that keeps to our keywords: whatever would make it another's is left out."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._nodes = 0
        self._patterns = False

    def copy(self) -> Any:
        copied = self._copy(self._schema, 0)
        return self._copy(self._schema, 0, "unevaluatedProperties") if self._patterns else copied

    def _copy(self, value: Any, depth: int, without: str = "") -> Any:
        if isinstance(value, dict | list):
            self._nodes += not without
            if depth > MAX_DEPTH or self._nodes > MAX_NODES:
                raise Unchecked("its schema is too deep or too large")
        if isinstance(value, list):
            return [self._copy(item, depth + 1, without) for item in value]
        if not isinstance(value, dict):
            return value
        self._patterns = self._patterns or "patternProperties" in value
        return {
            key: self._copy(item, depth + 1, without)
            for key, item in value.items()
            if key != without and not (key == "$schema" and isinstance(item, str))
        }


@cache
def _bounded(kind: Any) -> Any:
    """`kind`, a class of validators, with bounds on its work."""
    own = {
        "properties": _properties,
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
    }
    keywords = {name: _counted(own.get(name, check)) for name, check in kind.VALIDATORS.items()}
    return extend(kind, keywords)


def _counted(check: Callable[..., Any]) -> Callable[..., Any]:
    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        _work.left -= 1
        if _work.left < 0:
            raise Unchecked("it takes too long")
        return check(validator, value, instance, schema)

    return counted


def _matches(pattern: str, text: str) -> bool | None:
    """Whether `pattern` is found in `text`; `None` if it is no pattern.

    :raises TimeoutError: it takes too long to find out.
    """
    try:
        return regex.search(pattern, text, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        raise
    except Exception:  # noqa: BLE001 -- there are many dialects of patterns
        return None


def _properties(validator: Any, properties: Mapping[str, Any], instance: Any, schema: Any) -> Iterator[Any]:
    for name, part in properties.items() if isinstance(instance, dict) else ():
        if name not in instance:
            continue
        if part is False:
            yield ValidationError("it must be left out", path=[name])
        else:
            yield from validator.descend(instance[name], part, path=name, schema_path=name)


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    if isinstance(instance, str) and _matches(pattern, instance) is False:
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Mapping[str, Any], instance: Any, schema: Any) -> Iterator[Any]:
    for pattern, part in patterns.items() if isinstance(instance, dict) else ():
        for name, value in instance.items():
            if _matches(pattern, name):
                yield from validator.descend(value, part, path=name, schema_path=pattern)


def _additional_properties(validator: Any, others: Any, instance: Any, schema: Mapping[str, Any]) -> Iterator[Any]:
    named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name in instance if isinstance(instance, dict) else ():
        if name in named or any(_matches(pattern, name) is not False for pattern in patterns):
            continue
        if others is False:
            yield ValidationError(
                f"there is no {name!r}; there are {', '.join(map(repr, named)) or 'none'}", path=[name]
            )
        else:
            yield from validator.descend(instance[name], others, path=name)


def loose_end(schema: dict[str, Any]) -> str | None:
    """A reference that leads nowhere: nothing is fetched."""
    resolver = Registry().with_resource("", DRAFT202012.create_resource(schema)).resolver()
    for ref in _references(schema):
        try:
            resolver.lookup(ref)
        except Unresolvable:
            return f"its schema refers to {cut_text(ref, ERROR_CHARS)!r}, which is not in it"
    return None


def _references(value: Any) -> Iterator[str]:
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _references(item)
    if isinstance(value, dict) and isinstance(value.get("$ref"), str):
        yield value["$ref"]
