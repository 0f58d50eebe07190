"""Images, audio and files in the input of agents, in the forms that JSON has for them.

DSPy makes a `dspy.Image` of a URL or a data URI, and a `dspy.Audio` or `dspy.File` of a data URI, where these are
called in Python; pydantic knows but the object. Nothing is fetched here, and no file is read: a URL is passed on to the
language model, which is why only an image can be one.

This module must not know what the input is for.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import dspy
from pydantic import BaseModel, TypeAdapter
from pydantic_core import SchemaValidator
from pydantic_core.core_schema import no_info_before_validator_function

_TEXTS = {
    dspy.Image: "A URL, or a data URI such as data:image/png;base64,…",
    dspy.Audio: "A data URI such as data:audio/wav;base64,…",
    dspy.File: "A data URI such as data:application/pdf;base64,…",
}
MEDIA = tuple(_TEXTS)


class MediaModel(BaseModel):
    """A model whose schema says of media, at whatever depth, that they may be given as text."""

    @classmethod
    def model_json_schema(cls, *args: Any, **options: Any) -> dict[str, Any]:
        schema = super().model_json_schema(*args, **options)
        described = {kind: kind.model_json_schema() for kind in MEDIA}
        for name, definition in schema.get("$defs", {}).items():
            kind = next((kind for kind in MEDIA if definition == described[kind]), None)
            if kind is not None:
                text = {"type": "string", "format": "uri", "description": _TEXTS[kind]}
                fields = {key: value for key, value in definition.items() if key != "description"}
                schema["$defs"][name] = {"title": kind.__name__, "anyOf": [text, fields]}
        return schema


def holds_media(annotation: Any) -> bool:
    """Whether a value of the type `annotation` may have an image, audio or a file in it."""
    return any(issubclass(_model(node, {}), MEDIA) for node in _nodes(TypeAdapter(annotation).core_schema))


def media_validator(annotation: Any) -> SchemaValidator:
    """Validates values of the type `annotation`, in which each image may be given as text. (Audio and files may be by
    themselves.) It is made of pydantic's own schema, and so differs in nothing else, and knows all kinds of types."""
    schema: Any = TypeAdapter(annotation).core_schema
    definitions = schema["definitions"] if schema["type"] == "definitions" else []
    models = {each["ref"]: _model(each, {}) for each in definitions}
    taking = _taking_texts(schema, models)
    if definitions:  # an image among them takes texts where it is referred to
        images = [ref for ref, model in models.items() if issubclass(model, dspy.Image)]
        taking["definitions"] = [each if each["ref"] in images else _taking_texts(each, models) for each in definitions]
    # Else the models in it would be validated by their own validators, which take no texts. (pydantic 2.14)
    return SchemaValidator(taking, _use_prebuilt=False)


_Models = Mapping[str, type]
"""Reference in a schema → the class of the model that it leads to."""


def _taking_texts(schema: Any, models: _Models, beside: bool = False) -> Any:
    """A copy of (a part of) pydantic's schema in which each image may be given as text. `beside` audio or files, a data
    URI of something else than an image is theirs."""
    if isinstance(schema, list | tuple):
        return type(schema)(_taking_texts(item, models, beside) for item in schema)
    if not isinstance(schema, Mapping):
        return schema
    if issubclass(_model(schema, models), dspy.Image):
        return no_info_before_validator_function(_read_image if beside else _read_text, dict(schema))
    choices = schema["choices"] if schema.get("type") == "union" else []
    beside = any(issubclass(_model(choice, models), dspy.Audio | dspy.File) for choice in choices)
    return dict(schema) | {key: _taking_texts(item, models, beside) for key, item in _parts(schema)}


def _read_text(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


def _read_image(value: Any) -> Any:
    is_other = isinstance(value, str) and value.startswith("data:") and not value.startswith("data:image/")
    return value if is_other else _read_text(value)


def _model(schema: Any, models: _Models) -> type:
    """The class of the model that a node of pydantic's schema is of, or refers to; else `object`."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    found: type = object
    if kind == "model":
        found = schema["cls"]
    elif kind == "definition-ref":
        found = models.get(schema["schema_ref"], object)
    return found


def _nodes(schema: Any) -> Iterator[Any]:
    yield schema
    parts = [item for _, item in _parts(schema)] if isinstance(schema, Mapping) else schema
    for part in parts if isinstance(parts, list | tuple) else ():
        yield from _nodes(part)


_NO_SCHEMAS = frozenset({"config", "default", "expected", "metadata", "serialization"})
"""What is in a node of pydantic's schema, and has no others in it."""


def _parts(schema: Mapping[str, Any]) -> list[tuple[str, Any]]:
    skipped = _NO_SCHEMAS if isinstance(schema.get("type"), str) else ()  # else it is a mapping of fields, of any names
    return [(key, item) for key, item in schema.items() if key not in skipped]
