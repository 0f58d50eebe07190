"""What DSPy computes at each call although the result is the same: kept for the next call, and byte for byte equal.

Memos hold nothing of a run, and nothing is kept on the objects of users. What is kept of a signature is found by its
identity and dropped with it; what has changed in a signature or in a tool's schema meanwhile is noticed. All are
bounded, and may be used from any thread.

This module must not know where DSPy calls what, or what a run is.
"""

import inspect
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import dspy
import orjson
import pydantic
from jsonschema import validators

MOST = 256
"""Values that one memo keeps."""

T = TypeVar("T")


class Recent(Generic[T]):
    """Values by key, of which those that were used last are kept."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> T | None:
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def put(self, key: Hashable, value: T) -> T:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._most:
                self._values.popitem(last=False)
        return value


# -- Types -------------------------------------------------------------------------------------------------------------

_adapters: Recent[tuple[Any, Any]] = Recent()
"""Id of a type → the type, which so keeps its id, and its adapter. Types that are equal are not the same: the members
of a union or a literal may come in another order."""
_wrappers: Recent[tuple[Any, Any]] = Recent()


class _Adapter:
    """What DSPy uses of a `pydantic.TypeAdapter`. Nobody may change the schemas that it gives."""

    def __init__(self, adapter: Any) -> None:
        self.validate_python = adapter.validate_python
        self.dump_python = adapter.dump_python
        self._adapter = adapter
        self._schemas: dict[Any, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def json_schema(self, **options: Any) -> Any:
        key = tuple(options.items())
        if key not in self._schemas:
            self._schemas[key] = self._adapter.json_schema(**options)
        return self._schemas[key]


def type_adapter(annotation: Any) -> Any:
    """`pydantic.TypeAdapter(annotation)`."""
    known = _adapters.get(id(annotation))
    if known is None:
        adapter = pydantic.TypeAdapter(annotation, _parent_depth=3)
        if not adapter.pydantic_complete:  # what it refers to may be defined later
            return adapter
        known = _adapters.put(id(annotation), (annotation, _Adapter(adapter)))
    return known[1]


def wrapper_model(annotation: Any) -> Any:
    """The model with one field, `value`, in which DSPy parses an argument of a tool."""
    known = _wrappers.get(id(annotation))
    if known is None:
        known = _wrappers.put(id(annotation), (annotation, pydantic.create_model("Wrapper", value=(annotation, ...))))
    return known[1]


# -- Arguments of tools ------------------------------------------------------------------------------------------------

_validators: Recent[Any] = Recent()
"""JSON of a schema → its validator: a schema that was changed is another one."""


def is_valid(instance: Any, schema: Any) -> bool:
    """Whether `jsonschema.validate(instance, schema)` would raise nothing. False, too, where only that can tell."""
    try:
        key = orjson.dumps(schema)
    except TypeError:
        return False
    validator = _validators.get(key)
    if validator is None:
        schema = orjson.loads(key)
        kind = validators.validator_for(schema)
        kind.check_schema(schema)
        validator = _validators.put(key, kind(schema))
    return bool(validator.is_valid(instance))


# -- Texts about signatures --------------------------------------------------------------------------------------------


class _Texts:
    """Texts that adapters make of one signature, and what it was made of then."""

    def __init__(self, signature: Any) -> None:
        fields = signature.model_fields.items()
        self._instructions = signature.__doc__
        self._fields = [(name, info.annotation, dict(info.json_schema_extra or {})) for name, info in fields]
        kinds = (dspy.Type.extract_custom_type_from_annotation(info.rebuild_annotation()) for _, info in fields)
        self._described = [(kind, kind.description()) for found in kinds for kind in found]
        self.texts: dict[Hashable, str] = {}

    def still_fit(self, signature: Any) -> bool:
        """Whether `signature` is what it was: one may be changed where it stands, and types may describe themselves
        differently from call to call."""
        fields = signature.model_fields
        return (
            signature.__doc__ == self._instructions
            and len(fields) == len(self._fields)
            and all(map(_is_field, self._fields, fields.items()))
            and all(kind.description() == description for kind, description in self._described)
        )


def _is_field(known: tuple[str, Any, dict[str, Any]], field: tuple[str, Any]) -> bool:
    (name, annotation, extra), (its_name, info) = known, field
    # Types by identity: equal ones may have their members in another order.
    return name == its_name and info.annotation is annotation and (info.json_schema_extra or {}) == extra


_texts: weakref.WeakKeyDictionary[Any, _Texts] = weakref.WeakKeyDictionary()
_texts_lock = threading.Lock()


def text_of(signature: Any, key: Hashable, make: Callable[[], str]) -> str:
    """`make()`, a text that says what `signature` is, and nothing else; `key` tells such texts of a signature apart."""
    with _texts_lock:
        known = _texts.get(signature)
    if known is None or not known.still_fit(signature):
        known = _Texts(signature)
        with _texts_lock:
            _texts[signature] = known
    text = known.texts.get(key)
    if text is None:
        text = known.texts[key] = make()
    return text


_trajectories: Recent[Any] = Recent(most=128)  # each is a class with four fields for each step


def trajectory_signature(fields: tuple[str, ...]) -> Any:
    """The signature with which `dspy.ReAct` shows the `fields` of what was done so far."""
    return _trajectories.get(fields) or _trajectories.put(fields, dspy.Signature(f"{', '.join(fields)} -> x"))


# -- Calls -------------------------------------------------------------------------------------------------------------

_calls: weakref.WeakKeyDictionary[Any, "_Parameters"] = weakref.WeakKeyDictionary()
_handlers: weakref.WeakKeyDictionary[type, dict[Hashable, str]] = weakref.WeakKeyDictionary()
_ONE_KIND = (dspy.Module, dspy.BaseLM, dspy.Adapter, dspy.Tool)
SHORT = 65_536
"""Characters of a prompt up to which it is checked in far less than a millisecond."""


class _Parameters:
    """Those of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        spec = inspect.getfullargspec(function)
        self.positional = spec.args
        self.varargs, self.varkw = spec.varargs, spec.varkw
        self.names = frozenset((*spec.args, *spec.kwonlyargs))
        last = spec.args[len(spec.args) - len(spec.defaults or ()) :]
        self.defaults = dict(zip(last, spec.defaults or (), strict=True)) | (spec.kwonlydefaults or {})

    def bind(self, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any] | None:
        found = dict(zip(self.positional, args, strict=False))
        rest = {}
        for name, value in named.items():
            if name not in self.names:
                rest[name] = value
            elif name in found:
                return None
            else:
                found[name] = value
        found = {**self.defaults, **found}
        if len(found) < len(self.names) or not self._takes(len(args), rest):
            return None
        if self.varargs:
            found[self.varargs] = args[len(self.positional) :]
        if self.varkw:
            found[self.varkw] = rest
        return found

    def _takes(self, count: int, rest: dict[str, Any]) -> bool:
        return (self.varargs is not None or count <= len(self.positional)) and (self.varkw is not None or not rest)


def call_args(function: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any] | None:
    """`inspect.getcallargs(function, *args, **named)`, or None: only that can tell."""
    parameters = _calls.get(function)
    if parameters is None:
        parameters = _calls[function] = _Parameters(function)
    return parameters.bind(args, named)


class _Names:
    """A callback whose handlers are their names."""

    def __getattr__(self, name: str) -> str:
        return name


def handler_name(choose: Callable[..., Any], instance: Any, function: Callable[..., Any]) -> str:
    """The name of the handler that DSPy's `choose` takes for calls of `function` of `instance`."""
    if not isinstance(instance, _ONE_KIND):  # of these, the class alone decides
        return str(choose(_Names(), instance, function))
    names = _handlers.get(type(instance))
    if names is None:
        names = _handlers[type(instance)] = {}
    key = choose, function.__name__
    if key not in names:
        names[key] = str(choose(_Names(), instance, function))
    return names[key]


def is_short(messages: Any) -> bool:
    """Whether `messages` are a prompt of no more than `SHORT` characters."""
    if not isinstance(messages, list):
        return False
    room = SHORT
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str):
            return False
        room -= len(content)
    return room >= 0
