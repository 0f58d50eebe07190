"""The arguments of a tool, as its input schema has them: shown to a model, and checked before they are sent.

Schemas come from others and may be anything. Arguments are checked against the schema itself, compiled once (see
`validation`). What cannot be checked is left to the server, which checks best.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

from jsonschema.exceptions import best_match

from agentcast.agents.base import ToolError
from agentcast.agents.mcp.validation import ERROR_CHARS, MAX_DEPTH, Unchecked, errors_of, loose_end, said, validator_of
from agentcast.agents.values import cut_text, plain, plain_fields

SCHEMA = "agentcast/inputSchema"
"""In the metadata of a tool: its input schema, where the SDK's models would not let it through."""

_ROUNDS = 4
"""Conversions of texts that are tried: one may show that another is needed."""
_SAID_BY_ARGUMENTS = ("$comment", "$id", "$schema", "description", "id", "properties", "required", "title", "type")
_log = logging.getLogger(__name__)


class Arguments:
    """The arguments that `schema`, the input schema of a tool, describes."""

    def __init__(self, schema: Any) -> None:
        self.schema: dict[str, Any] = schema if isinstance(schema, dict) else {}
        self.problem: str | None = None
        """Why they are not checked, or not wholly."""
        found = dict(_found(self.schema, self.schema, set()))
        required = _required(self.schema, self.schema, {})
        self._required = required
        self._optional = {name for name, arg in found.items() if name not in required and "default" not in arg}
        self.shown: dict[str, Any] = plain_fields(
            {name: _nullable(arg) if name in self._optional else arg for name, arg in found.items()}
        )
        """The JSON Schema of each. Those that may be left out have a default: a prompt shows no more than this."""
        self.rest: Any = plain(_rest(self.schema))
        """What the schema says besides: references, alternatives, conditions, other names."""
        self._validator: Any = None
        try:
            self._validator = validator_of(schema)
            self.problem = loose_end(self.schema)
        except Unchecked as error:
            self.problem = str(error)
        except Exception as error:  # noqa: BLE001 -- schemas come from others, and may be anything
            self.problem = f"its schema cannot be used ({type(error).__name__})"

    def fit(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given` as it is to be sent: without null for what may be left out, and with numbers, truth values, lists and
        objects in place of texts that hold such, where the schema takes no text.

        :raises ToolError: it does not fit the schema; the text names the arguments and what is expected of them.
        """
        args = {name: value for name, value in given.items() if value is not None or name not in self._optional}
        for _ in range(_ROUNDS):
            if not (errors := self._errors(args)):
                return args
            converted = self._converted(args, errors)
            if converted == args:
                break
            args = converted
        raise ToolError("; ".join(_explained(errors, list(self.shown))))

    def _errors(self, args: dict[str, Any]) -> list[Any]:
        try:
            return errors_of(self._validator, args) if self._validator is not None else []
        except Exception as error:  # noqa: BLE001 -- as above
            _log.debug("arguments are not checked", exc_info=error)
            return []

    def _converted(self, args: dict[str, Any], errors: Iterable[Any]) -> dict[str, Any]:
        """A copy of `args` in which wrong texts are replaced by what they hold."""
        copy = deepcopy(args)
        for error in errors:
            *path, last = error.absolute_path or [None]
            place: Any = copy
            for key in path:
                place = place[key]
            if last is None or error.instance is None:
                if last in copy and not path and last not in self._required:
                    del copy[last]
            elif isinstance(error.instance, str) and (meant := _meant(error.instance, _types(error))) is not None:
                place[last] = meant
        return copy


# -- Showing -------------------------------------------------------------------------------------------------------


def _found(schema: Any, root: dict[str, Any], seen: set[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The arguments that `schema` names, wherever it does, each once."""
    variants: dict[str, list[Any]] = {}
    for part in _parts(schema, root, seen):
        properties = part.get("properties")
        for name, arg in properties.items() if isinstance(properties, dict) else ():
            if arg not in variants.setdefault(str(name), []):
                variants[str(name)].append(arg)
    for name, args in variants.items():
        described = [_described(name, arg) for arg in args]
        yield name, described[0] if len(described) == 1 else {"anyOf": described}


def _described(name: str, arg: Any) -> dict[str, Any]:
    """The schema of one argument, without a title that is but its name once more."""
    if not isinstance(arg, dict):
        return {"not": {}} if arg is False else {}
    title = arg.get("title")
    if isinstance(title, str) and _letters(title) == _letters(name):
        return {key: value for key, value in arg.items() if key != "title"}
    return arg


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text)).lower()


def _parts(schema: Any, root: dict[str, Any], seen: set[int]) -> Iterator[dict[str, Any]]:
    """`schema`, and the schemas in it that are about the same value."""
    if not isinstance(schema, dict) or id(schema) in seen or len(seen) > MAX_DEPTH:
        return
    seen.add(id(schema))
    yield schema
    for part in [_target(schema, root), *_alternatives(schema, "allOf", "anyOf", "oneOf")]:
        yield from _parts(part, root, seen)
    for key in ("if", "then", "else"):
        yield from _parts(schema.get(key), root, seen)
    dependent = schema.get("dependentSchemas")
    for part in dependent.values() if isinstance(dependent, dict) else ():
        yield from _parts(part, root, seen)


def _required(schema: Any, root: dict[str, Any], known: dict[int, set[str]]) -> set[str]:
    """The arguments that have to be there, whatever the others are. `known` holds what was found of other parts."""
    if not isinstance(schema, dict) or len(known) > MAX_DEPTH:
        return set()
    if id(schema) not in known:
        own = schema.get("required")
        names = known[id(schema)] = {name for name in own if isinstance(name, str)} if isinstance(own, list) else set()
        for part in [_target(schema, root), *_alternatives(schema, "allOf")]:
            names |= _required(part, root, known)
        for key in ("anyOf", "oneOf"):
            if ways := [_required(part, root, known) for part in _alternatives(schema, key)]:
                names |= set.intersection(*ways)
    return known[id(schema)]


def _alternatives(schema: dict[str, Any], *keys: str) -> list[Any]:
    return [part for key in keys if isinstance(schema.get(key), list) for part in schema[key]]


def _target(schema: dict[str, Any], root: dict[str, Any]) -> Any:
    """What `$ref` of `schema` refers to, within the same document."""
    ref = schema.get("$ref")
    if not isinstance(ref, str) or not ref.startswith("#"):
        return None
    place: Any = root
    for step in ref.removeprefix("#").split("/")[1:]:
        place = place.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(place, dict) else None
    return place


def _nullable(arg: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [arg, {"type": "null"}], "default": None}


def _rest(schema: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in schema.items() if key not in _SAID_BY_ARGUMENTS}
    if rest.get("additionalProperties") is False:
        del rest["additionalProperties"]
    return rest


# -- What is wrong -------------------------------------------------------------------------------------------------


def _types(error: Any) -> set[str]:
    """The types of which one was expected where `error` is."""
    if error.validator == "type":
        wanted = error.validator_value
        return {wanted} if isinstance(wanted, str) else set(wanted)
    same = [part for part in error.context or () if part.absolute_path == error.absolute_path]
    return set().union(*map(_types, same))


def _meant(text: str, types: set[str]) -> Any:
    """The value of one of `types` that `text` holds; `None` if it holds none, or may stand for itself."""
    try:
        value = json.loads(text.lower() if text in ("True", "False") else text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, bool):
        return value if "boolean" in types else None
    if isinstance(value, float) and value.is_integer() and "number" not in types:
        value = int(value)
    kinds: tuple[tuple[type, set[str]], ...] = (
        (int, {"integer", "number"}),
        (float, {"number"}),
        (list, {"array"}),
        (dict, {"object"}),
    )
    return value if any(isinstance(value, kind) and names & types for kind, names in kinds) else None


def _explained(errors: Iterable[Any], names: list[str]) -> list[str]:
    """The first of `errors` as sentences for a model, missing arguments first."""
    missing: dict[str, None] = {}
    others: dict[str, None] = {}
    for error in errors:
        at_root = not error.absolute_path
        if at_root and error.validator == "required":
            missing.update((f"missing a required argument: {name!r}", None) for name in _missing(error))
        elif error.validator == "additionalProperties" and len(error.absolute_path) == 1:
            others[f"it has no argument {error.absolute_path[0]!r}; it takes {', '.join(names) or 'none'}"] = None
        else:
            leaf = best_match([error])
            others[f"{_place(leaf.absolute_path)}{said(leaf)}"] = None
    return [cut_text(text, 2 * ERROR_CHARS) for text in [*missing, *others][:3]]


def _missing(error: Any) -> list[str]:
    return [name for name in error.validator_value if name not in error.instance]


def _place(path: Iterable[Any]) -> str:
    first, *others = [*path] or [None]
    if first is None:
        return ""
    where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in others)
    return f"argument {first!r}{f' at {where}' if where else ''}: "
