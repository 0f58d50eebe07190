"""The state of one run: which step set what, and who sees it.

A step sees what the steps that it follows on have set, and nothing else: what goes on in a parallel branch reaches it
where the branches join, never earlier, so results do not depend on timing.

Values are owned: what enters is copied, and what is handed out is a copy (`detached`), so no node can change the state
but by what it returns.
"""

import copy
import datetime
import decimal
import enum
import pathlib
import types
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from agentcast.agents.graph.building import Reducer
from agentcast.agents.graph.errors import ConflictError
from agentcast.agents.graph.flow import START, Step

ALL = -1
"""The sight that sees every step."""


class _Version(NamedTuple):
    writer: int
    node: str
    rank: tuple[int, int, int]
    value: Any
    total: Any
    """The field's value for a step that sees this version and all before it."""
    seen: int


class State:
    """Fields with their versions."""

    def __init__(self, reducers: Mapping[str, Reducer], inputs: Mapping[str, Any]) -> None:
        self._reducers = reducers
        self._fields: dict[str, list[_Version]] = {
            name: [_Version(START, "", (0, 0, 0), value, value, 1 << START)]
            for name, value in ((name, detached(value)) for name, value in inputs.items())
        }

    def set(self, step: Step, patch: Mapping[str, Any]) -> None:
        """Set the fields of `patch`.

        :raises ConflictError: a step in parallel has set one that does not merge. Then nothing is set.
        """
        for name in patch:
            versions = self._fields.get(name)
            if versions and name not in self._reducers and not step.past >> versions[-1].writer & 1:
                raise ConflictError(name, versions[-1].node, step.node)
        for name, value in patch.items():
            owned = detached(value)
            total = owned
            if name in self._reducers and self.has(name, step.past):
                total = self._merge(name, self.value(name, step.past), owned)
            version = _Version(step.id, step.node, step.rank, owned, total, step.sight)
            self._fields.setdefault(name, []).append(version)

    def has(self, name: str, sight: int) -> bool:
        return any(sight >> version.writer & 1 for version in self._fields.get(name, ()))

    def value(self, name: str, sight: int) -> Any:
        """The value of a field that there is; the state's own, not to be handed out."""
        visible = [version for version in self._fields[name] if sight >> version.writer & 1]
        last = visible[-1]
        if all(last.seen >> version.writer & 1 for version in visible):
            return last.total
        visible.sort(key=lambda version: version.rank)
        total = visible[0].value
        for version in visible[1:]:
            total = self._merge(name, total, version.value)
        return total

    def values(self, names: "Iterator[str] | list[str] | None" = None, sight: int = ALL) -> dict[str, Any]:
        """The fields that there are, out of `names`; the state's own values."""
        wanted = self._fields if names is None else names
        return {name: self.value(name, sight) for name in wanted if self.has(name, sight)}

    def _merge(self, name: str, before: Any, new: Any) -> Any:
        return detached(self._reducers[name](detached(before), detached(new)))


class View(Mapping[str, Any]):
    """The state as a router is given it: `state["field"]` or `state.field`. Every value is a copy."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getitem__(self, name: str) -> Any:
        return detached(self._values[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the state has no field {name!r} yet; it has {', '.join(self) or 'none'}") from None

    def __repr__(self) -> str:
        return f"View({dict(self._values)!r})"


# -- Copies --------------------------------------------------------------------------------------------------------

_ATOMS = frozenset(
    {
        *(str, int, float, bool, complex, bytes, types.NoneType, type, types.FunctionType, types.BuiltinFunctionType),
        *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID),
        *(pathlib.Path, pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, frozenset),
    }
)

# The slots of a model, past its own `__setattr__`, which validates.
_set_dict: Any = BaseModel.__dict__["__dict__"].__set__
_set_names: Any = BaseModel.__dict__["__pydantic_fields_set__"].__set__
_set_extra: Any = BaseModel.__dict__["__pydantic_extra__"].__set__
_set_private: Any = BaseModel.__dict__["__pydantic_private__"].__set__


def detached(value: Any) -> Any:
    """A copy of `value` that shares nothing with it that can be changed, except what cannot be copied, such as a
    connection.

    As `copy.deepcopy`, an order of magnitude faster for plain data and pydantic models, which states consist of."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is list:
        return [item if type(item) in _ATOMS else detached(item) for item in value]
    if kind is dict:
        return _fields(value)
    if BaseModel in kind.__mro__:  # several times as fast as `isinstance`, which pydantic has overridden
        new = object.__new__(kind)
        _set_dict(new, _fields(value.__dict__))
        _set_names(new, value.__pydantic_fields_set__.copy())
        extra, private = value.__pydantic_extra__, value.__pydantic_private__
        _set_extra(new, None if extra is None else _fields(extra))
        _set_private(new, None if private is None else _fields(private))
        return new
    return _other(value)


def _fields(fields: dict[Any, Any]) -> dict[Any, Any]:
    new = fields.copy()
    for name, item in fields.items():
        if type(item) not in _ATOMS:
            new[name] = detached(item)
    return new


def _other(value: Any) -> Any:
    if type(value) is tuple:
        return tuple(map(detached, value))
    if isinstance(value, enum.Enum | type):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 -- an object may refuse to be copied in any way
        return value
