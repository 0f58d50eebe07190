"""What programs and functions take and give: input models and JSON Schemas, out of DSPy signatures and of types.

Input that earlier turns of a thread fill is not asked for: fields of type `dspy.History`, and `history` of type `str`.

This module must not know registries or runs.
"""

import inspect
import types
import typing
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Protocol, get_args, get_origin, runtime_checkable

import dspy
import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, create_model
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from agentcast.agents.base import Emitter, Task, public_message
from agentcast.agents.inputs.checking import RejectedInput, read_input
from agentcast.agents.inputs.media import MediaModel, holds_media, media_validator

HISTORY = "history"
"""The name of an input field of type `str` that earlier turns fill."""


class SchemaError(Exception):
    """Types are missing or unusable. `problem` says what is wrong, `remedy` what to do."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy


@dataclass(frozen=True)
class Contract:
    """What an agent takes and gives."""

    input_model: type[BaseModel]
    outputs: Mapping[str, TypeAdapter[Any]] | None = None
    """Serialisers of the output fields, or `None` if there is no signature that names them."""
    result: TypeAdapter[Any] | None = None
    """Serialiser of the result as a whole, for a compiled graph that has a model of it."""
    output_schema: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, type] = field(default_factory=dict)
    """The fields that earlier turns fill, each `dspy.History` or `str`."""
    graph: Mapping[str, Any] | None = None


class _Input(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), arbitrary_types_allowed=False)


class _MediaInput(MediaModel, _Input):
    pass


@runtime_checkable
class TypedProgram(Protocol):
    """A program that has models of what it takes and gives: a compiled graph."""

    @property
    def input_model(self) -> type[BaseModel]: ...

    @property
    def output_model(self) -> type[BaseModel] | None: ...

    def describe(self) -> dict[str, Any]: ...


def input_model(name: str, fields: Mapping[str, tuple[Any, Any]]) -> type[BaseModel]:
    """A model that takes exactly `fields` (annotation, and default or `FieldInfo`).

    :raises SchemaError: a type is none that pydantic can check, or a name is none that a field can have.
    """
    title = "".join(part.capitalize() for part in name.split("_")) + "Input"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a field may well be called "schema" or "copy"
            definitions: dict[str, Any] = dict(fields)
            base = _MediaInput if any(holds_media(annotation) for annotation, _ in fields.values()) else _Input
            model: type[BaseModel] = create_model(title, __base__=base, **definitions)
            model.model_json_schema()
            if base is _MediaInput:
                model.__pydantic_validator__ = media_validator(model)
    except Exception as error:
        raise SchemaError(
            f"its inputs make no JSON Schema: {_first_line(error)}", "use types that pydantic knows"
        ) from error
    return model


def signature_contract(name: str, signature: Any) -> Contract:
    """The contract of a `dspy.Signature` class.

    :raises SchemaError: a field's type has no JSON Schema.
    """
    inputs = signature.input_fields
    history = _history({key: info.annotation for key, info in inputs.items()})
    fields = {key: (_constrained(info), _field(key, info)) for key, info in inputs.items() if key not in history}
    outputs = {key: TypeAdapter(info.annotation) for key, info in signature.output_fields.items()}
    try:
        schema = _outputs_schema(signature.output_fields, outputs)
    except Exception as error:
        problem = f"its outputs make no JSON Schema: {_first_line(error)}"
        raise SchemaError(problem, "use types that pydantic knows") from error
    return Contract(input_model(name, fields), outputs, output_schema=schema, history=history)


def module_contract(name: str, program: Any) -> Contract:
    """The contract of a `dspy.Module`: by the models of a compiled graph, by its signature, or else by the typed
    parameters of `aforward` or `forward`.

    :raises SchemaError: it has neither.
    """
    if isinstance(program, TypedProgram):
        return _graph_contract(name, program)
    if isinstance(program, dspy.BestOfN | dspy.Refine):  # they take and give what the module inside does
        return module_contract(name, program.module)
    signature = signature_of(program)
    if signature is not None:
        return signature_contract(name, signature)
    method = _method(program, "aforward") or _method(program, "forward")
    if method is None:
        raise SchemaError(f"{type(program).__name__} has no forward method", "write one with typed parameters")
    where = f"{type(program).__name__}.{method.__name__}"
    fields = parameter_fields(method, where, "pass signature=…")
    history = _history({key: hint for key, (hint, _) in fields.items()})
    asked = {key: each for key, each in fields.items() if key not in history}
    return Contract(input_model(name, asked), history=history, output_schema={"type": "object"})


def _graph_contract(name: str, program: TypedProgram) -> Contract:
    taken, given = program.input_model, program.output_model
    result = None if given is None else TypeAdapter[Any](given)
    try:
        taken.model_json_schema()
        schema = {"type": "object"} if result is None else _result_schema(result, by_alias=False)
    except Exception as error:
        problem = f"its models make no JSON Schema: {_first_line(error)}"
        raise SchemaError(problem, "use types that pydantic knows") from error
    history = [key for key, info in taken.model_fields.items() if is_history(info.annotation)]
    strict = _derived(taken, {"model_config": ConfigDict(extra="forbid")}, history)
    filled = dict.fromkeys(history, dspy.History)
    return Contract(strict, result=result, output_schema=schema, history=filled, graph=program.describe())


def _derived(model: type[BaseModel], attributes: dict[str, Any], history: Collection[str] = ()) -> type[BaseModel]:
    """A subclass of `model` whose input takes media as JSON has them, without the fields `history`."""
    unasked = dict.fromkeys(history, ClassVar[dspy.History])
    empty = {key: dspy.History(messages=[]) for key in history}
    bases = (MediaModel, model) if holds_media(model) else (model,)
    names = {"__module__": model.__module__, "__annotations__": unasked, **empty, **attributes}
    derived: type[BaseModel] = type(model.__name__, bases, names)
    if issubclass(derived, MediaModel):
        derived.__pydantic_validator__ = media_validator(derived)
    return derived


def _method(program: Any, name: str) -> Any:
    """The method of that name, if there is one. DSPy logs a warning when somebody takes `forward` off a module."""
    try:
        return object.__getattribute__(program, name)
    except AttributeError:
        return None


def signature_of(program: Any) -> Any:
    """The signature that a program has, or None."""
    if isinstance(program, dspy.MultiChainComparison):
        return _comparison(program)
    for holder in (program, getattr(program, "predict", None) if isinstance(program, dspy.ChainOfThought) else None):
        signature = getattr(holder, "signature", None)
        if isinstance(signature, type) and issubclass(signature, dspy.Signature):
            return signature
    return None


def _comparison(program: Any) -> Any:
    """The signature of a `dspy.MultiChainComparison`: the attempts are given to it as one field, `completions`."""
    signature = program.predict.signature
    for number in range(program.M):
        signature = signature.delete(f"reasoning_attempt_{number + 1}")
    desc = f"{program.M} attempts, each with its `reasoning` and `{program.last_key}`"
    attempts = dspy.InputField(desc=desc, min_length=program.M, max_length=program.M)
    return signature.append("completions", attempts, list[dict[str, Any]])


def read_inputs(name: str, contract: Contract, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that `inputs`, given in Python, make for the program called `name`. What earlier turns fill may be
    given, too; otherwise there are none.

    :raises ValueError: they do not fit the contract; it names each field.
    """
    history = {key: inputs.get(key, "" if kind is str else {"messages": []}) for key, kind in contract.history.items()}
    asked = {key: value for key, value in inputs.items() if key not in history}
    try:
        model = _read(contract.input_model, asked)
        filled: dict[str, Any] = {
            key: TypeAdapter[Any](kind).validate_python(history[key]) for key, kind in contract.history.items()
        }
    except (RejectedInput, ValueError) as error:
        problem = public_message(error) if isinstance(error, ValueError) else str(error)
        raise ValueError(f"invalid input for {name}: {problem}") from error
    return {**filled, **{key: getattr(model, key) for key in type(model).model_fields}}


def _read(model: type[BaseModel], asked: dict[str, Any]) -> BaseModel:
    """JSON data are read as a hub reads them; what holds objects is validated as it is."""
    try:
        orjson.dumps(asked, option=_NO_OBJECTS)
    except TypeError:
        return model.model_validate(asked, by_alias=True, by_name=True)
    return read_input(model, asked)


_NO_OBJECTS = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS


# -- History -------------------------------------------------------------------------------------------------------


def is_history(annotation: Any) -> bool:
    """Whether a field is a `dspy.History`, perhaps an optional one."""
    parts = get_args(annotation) if get_origin(annotation) in (Annotated, *_UNIONS) else ()
    return annotation is dspy.History or any(map(is_history, parts))


_UNIONS = (typing.Union, types.UnionType)


def _history(hints: Mapping[str, Any]) -> dict[str, type]:
    return {
        key: str if hint is str else dspy.History
        for key, hint in hints.items()
        if is_history(hint) or (key == HISTORY and hint is str)
    }


# -- Functions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """How an agent function is called."""

    input_model: type[BaseModel]
    whole: str | None
    """The parameter that takes the input model itself; `None`: one parameter takes each of its fields."""
    emit: str | None
    task: str | None
    history: Collection[str]
    """The parameters that take the earlier turns, as a `dspy.History`."""
    result: TypeAdapter[Any] | None
    """Validates and serialises what the function returns; `None`: it declares no type."""
    output_schema: Mapping[str, Any]


def function_call(name: str, function: Callable[..., Any]) -> Call:
    """Read a function's annotations: an `Emitter` and a `Task` are recognised; of the other parameters, a single one
    that is a pydantic model is the input, or else each is a field of it.

    :raises SchemaError: a parameter has no type, or one that has no JSON Schema.
    """
    hints = _hints(function)
    special = {kind: next((key for key, hint in hints.items() if hint is kind), None) for kind in (Emitter, Task)}
    history = [key for key, hint in hints.items() if key != "return" and is_history(hint)]
    skip = {*special.values(), *history}
    fields = parameter_fields(function, f"{function.__name__}()", "annotate it", skip=skip)
    whole = None
    if len(fields) == 1:
        (key, (hint, _)), *_ = fields.items()
        is_model = isinstance(hint, type) and issubclass(hint, BaseModel)
        whole = key if is_model and not issubclass(hint, dspy.Type) else None  # an image is a model, too
    model = hints[whole] if whole else input_model(name, fields)
    if whole and holds_media(model):
        model = _derived(model, {})
    result, schema = _result(function, hints)
    return Call(model, whole, special[Emitter], special[Task], history, result, schema)


def parameter_fields(
    function: Callable[..., Any], where: str, remedy: str, skip: Collection[str | None] = ()
) -> dict[str, tuple[Any, Any]]:
    """The parameters of `function` as fields of a model.

    :raises SchemaError: one has no type or cannot be given by name; the text names it.
    """
    hints = _hints(function)
    fields: dict[str, tuple[Any, Any]] = {}
    for key, parameter in inspect.signature(function).parameters.items():
        if key in skip:
            continue
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise SchemaError(
                f"the inputs cannot be inferred from {where}, which takes {parameter}",
                f"name and type its parameters, or {remedy}",
            )
        if key not in hints:
            hint = " (write `emit: Emitter`)" if key == "emit" else " (write `task: Task`)" if key == "task" else ""
            raise SchemaError(f"parameter {key!r} of {where} has no type{hint}", remedy)
        fields[key] = hints[key], ... if parameter.default is parameter.empty else parameter.default
    return fields


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception as error:
        name = getattr(function, "__qualname__", type(function).__name__)
        problem = f"a type of {name} cannot be found: {_first_line(error)}"
        raise SchemaError(problem, "define it at the top of its module") from error


def _result(function: Callable[..., Any], hints: Mapping[str, Any]) -> tuple[TypeAdapter[Any] | None, dict[str, Any]]:
    if hints.get("return", Any) is Any:
        return None, {}
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hints["return"])
        return adapter, _result_schema(adapter, by_alias=True)
    except Exception as error:
        problem = f"what {function.__name__}() returns makes no JSON Schema: {_first_line(error)}"
        raise SchemaError(problem, "return a type that pydantic knows") from error


# -- Fields --------------------------------------------------------------------------------------------------------


def _constrained(info: FieldInfo) -> Any:
    annotation: Any = info.annotation
    for constraint in info.metadata:
        annotation = Annotated[annotation, constraint]
    return annotation


def _field(name: str, info: FieldInfo) -> Any:
    description = _description(name, info)
    if info.default_factory is not None:
        return Field(default_factory=info.default_factory, description=description)
    return Field(default=... if info.is_required() else info.default, description=description)


def _description(name: str, info: FieldInfo) -> str | None:
    extra = info.json_schema_extra
    desc = extra.get("desc") if isinstance(extra, dict) else None
    return desc if isinstance(desc, str) and desc and desc != f"${{{name}}}" else None


class _ResultSchema(GenerateJsonSchema):
    """The schema of what is serialised. Where a serialiser does not say what it gives, that may be anything; pydantic
    would describe what it takes. (Its own serialisers keep to what it describes.)"""

    def ser_schema(self, schema: Any) -> Any:
        described = super().ser_schema(schema)
        function = schema.get("function")
        is_opaque = described is None and function and not function.__module__.startswith("pydantic")
        return {} if is_opaque else described


def _result_schema(adapter: TypeAdapter[Any], *, by_alias: bool) -> dict[str, Any]:
    return adapter.json_schema(mode="serialization", by_alias=by_alias, schema_generator=_ResultSchema)


def _outputs_schema(fields: Mapping[str, FieldInfo], adapters: Mapping[str, TypeAdapter[Any]]) -> dict[str, Any]:
    """The schema of an object of all output fields; what they refer to stands at its root, where it is looked for."""
    schemas, shared = TypeAdapter.json_schemas(
        [(key, "serialization", adapter) for key, adapter in adapters.items()],
        by_alias=True,
        schema_generator=_ResultSchema,
    )
    properties = {key: schemas[key, "serialization"] for key in adapters}
    for key, info in fields.items():
        if description := _description(key, info):
            properties[key] = {**properties[key], "description": description}
    return {"type": "object", "properties": properties, "required": list(properties), **shared}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
