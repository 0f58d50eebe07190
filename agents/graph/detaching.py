"""Copies that share nothing that can be changed: `copy.deepcopy`, an order of magnitude faster for plain data and
pydantic models, which states consist of."""

import copy
import datetime
import decimal
import enum
import pathlib
import types
import uuid
from typing import Any

from pydantic import BaseModel

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
    """A copy of `value`. What cannot be copied, such as a connection, is shared."""
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
    except Exception:  # noqa: BLE001 -- whatever refuses to be copied, and however
        return value
