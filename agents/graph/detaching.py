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

_set_dict: Any = BaseModel.__dict__["__dict__"].__set__ if "__dict__" in BaseModel.__dict__ else None
_set_fields: Any = BaseModel.__dict__["__pydantic_fields_set__"].__set__
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
        return {key: item if type(item) in _ATOMS else detached(item) for key, item in value.items()}
    if isinstance(value, BaseModel):
        return _model(value)
    if kind is tuple:
        return tuple(map(detached, value))
    if isinstance(value, enum.Enum | type):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 -- whatever refuses to be copied, and however
        return value


def _model(value: BaseModel) -> BaseModel:
    new = object.__new__(type(value))
    fields = value.__dict__
    _set_dict(new, {name: item if type(item) in _ATOMS else detached(item) for name, item in fields.items()})
    _set_fields(new, value.__pydantic_fields_set__.copy())
    extra, private = value.__pydantic_extra__, value.__pydantic_private__
    _set_extra(new, extra if extra is None else detached(extra))
    _set_private(new, private if private is None else detached(private))
    return new
