"""An agent's input: JSON in, an instance of its model out, or what is wrong with it, by field (G9).

Input is JSON, so it is validated as JSON: a strict model takes a date as text and a set as a list, since JSON has no
other form of them. (What a validator of mode "before" or "wrap" hands on is a Python value, which pydantic validates as
one.) This module must not know where input comes from or what is done with it.
"""

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import orjson
from pydantic import BaseModel, ValidationError
from pydantic_core import SchemaValidator

from agentcast.agents.base import public_message, redact
from agentcast.agents.values import cut_text

MAX_PROBLEMS = 50
PROBLEM_BYTES = 2_000


class RejectedInput(Exception):
    """The input does not fit. `problems` lists `loc`, `msg` and `type` of each problem; an empty `loc` is the whole.

    Its cause is what a validator raised, if that is not for raising: a `TypeError`, say.
    """

    def __init__(self, problems: list[dict[str, Any]]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "; ".join(f"{'.'.join(map(str, item['loc'])) or 'input'}: {item['msg']}" for item in self.problems)


def read_input(model: type[BaseModel], input: Mapping[str, Any]) -> BaseModel:
    """`input`, plain JSON data, as an instance of `model`. Each field is taken under its alias and under its name.

    :raises RejectedInput: it does not fit, or a validator raised something.
    """
    try:
        document = orjson.dumps(input)
    except orjson.JSONEncodeError as error:
        raise RejectedInput([_problem([], str(error), "json_invalid")]) from None
    try:
        instance: BaseModel = _validated(model.model_validate_json, document)
        return instance
    except (RejectedInput, KeyboardInterrupt):
        raise
    except BaseException as error:  # a validator is anybody's code, and nothing here awaits
        message = f"it could not be checked: {public_message(error)}"
        raise RejectedInput([_problem(_where(model, input, document, error), message, "unchecked")]) from error


def problems(error: ValidationError) -> list[dict[str, Any]]:
    """Pydantic's error list as `loc`, `msg` and `type`: no echo of the input, no URLs, no secrets."""
    items = error.errors(include_url=False, include_context=False, include_input=False)
    return [_problem(item["loc"], item["msg"], item["type"]) for item in items[:MAX_PROBLEMS]]


def _problem(where: Any, message: str, kind: str) -> dict[str, Any]:
    return {"loc": list(where), "msg": cut_text(redact(message), PROBLEM_BYTES), "type": kind}


def _validated(validate: Callable[..., Any], document: bytes) -> Any:
    try:
        return validate(document, by_alias=True, by_name=True)
    except ValidationError as error:
        raise RejectedInput(problems(error)) from None


def _where(model: type[BaseModel], input: Mapping[str, Any], document: bytes, error: BaseException) -> list[str | int]:
    """The field whose validator, or default, raised `error`; empty if that was not a field's.

    Fields are validated in their order, until one raises: it is the last one of the shortest beginning of that order
    that raises the same.
    """
    schema, definitions, config = _fields_of(model)
    for count, (name, field) in enumerate(schema["fields"].items() if schema else (), 1):
        beginning = {**schema, "fields": dict(islice(schema["fields"].items(), count))}
        whole: Any = {"type": "definitions", "schema": beginning, "definitions": definitions}
        try:
            _validated(SchemaValidator(whole, config).validate_json, document)
        except RejectedInput:
            continue
        except BaseException as again:  # noqa: BLE001 -- as above
            return _public_name(name, field.get("validation_alias"), input) if type(again) is type(error) else []
    return []


def _fields_of(model: type[BaseModel]) -> tuple[Any, list[Any], Any]:
    """The schema of a model's fields, without the validators of the model as a whole, or None if it has no fields; the
    definitions that it refers to, and its configuration."""
    schema: Any = model.__pydantic_core_schema__
    definitions: list[Any] = []
    config = None
    while schema is not None and schema["type"] != "model-fields":
        definitions, config = schema.get("definitions", definitions), schema.get("config", config)
        ref = schema.get("schema_ref")
        schema = schema.get("schema") if ref is None else next((d for d in definitions if d["ref"] == ref), None)
    return schema, definitions, config


def _public_name(name: str, alias: Any, input: Mapping[str, Any]) -> list[str | int]:
    """Where a field stands in the input: pydantic's aliases are a name, a path, or several paths."""
    if not isinstance(alias, list):
        return [alias or name]
    paths = alias if isinstance(alias[0], list) else [alias]
    return next((path for path in paths if path[0] in input), [name] if name in input else paths[0])
