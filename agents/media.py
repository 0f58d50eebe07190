"""Images, audio and files in the input of agents, in the forms that JSON has for them.

DSPy makes a `dspy.Image` of a URL or a data URI, and a `dspy.Audio` or `dspy.File` of a data URI, where these are
called in Python; pydantic knows but the object. Nothing is fetched here, and no file is read: a URL is passed on to the
language model, which is why only an image can be one.

This module must not know what the input is for.
"""

import types
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args, get_origin

import dspy
from pydantic import BaseModel, model_validator

_TEXTS = {
    dspy.Image: "A URL, or a data URI such as data:image/png;base64,…",
    dspy.Audio: "A data URI such as data:audio/wav;base64,…",
    dspy.File: "A data URI such as data:application/pdf;base64,…",
}
MEDIA = tuple(_TEXTS)


class MediaModel(BaseModel):
    """A model whose media, at whatever depth, may be given as text, and whose schema says so."""

    @model_validator(mode="before")
    @classmethod
    def _read_media(cls, data: Any) -> Any:
        return _fields(cls, data) if isinstance(data, Mapping) else data

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


def holds_media(annotation: Any, seen: frozenset[Any] = frozenset()) -> bool:
    """Whether a value of the type `annotation` may have an image, audio or a file in it."""
    if not isinstance(annotation, type) or get_args(annotation):
        return any(holds_media(part, seen) for part in get_args(annotation))
    if issubclass(annotation, MEDIA):
        return True
    if not issubclass(annotation, BaseModel) or annotation in seen:
        return False
    return any(holds_media(info.annotation, seen | {annotation}) for info in annotation.model_fields.values())


def read_media(annotation: Any, value: Any) -> Any:
    """`value`, plain data for a field of the type `annotation`, with the text of each image as the object it stands
    for. Audio and files read theirs by themselves."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return read_media(parts[0], value)
    if origin in (Union, types.UnionType):
        return _first_changed(parts, value)
    if isinstance(value, str):
        return {"url": value} if isinstance(annotation, type) and issubclass(annotation, dspy.Image) else value
    if isinstance(value, Mapping):
        return _mapping(annotation, origin, parts, value)
    if isinstance(value, list | tuple) and parts:
        return [read_media(parts[0], item) for item in value]
    return value


def _first_changed(parts: tuple[Any, ...], value: Any) -> Any:
    if isinstance(value, str) and (str in parts or (_is_other_data(value) and {dspy.Audio, dspy.File} & {*parts})):
        return value
    return next((new for part in parts if (new := read_media(part, value)) != value), value)


def _is_other_data(text: str) -> bool:
    return text.startswith("data:") and not text.startswith("data:image/")


def _mapping(annotation: Any, origin: Any, parts: tuple[Any, ...], value: Mapping[Any, Any]) -> Any:
    if isinstance(annotation, type) and origin is None and issubclass(annotation, BaseModel):
        return _fields(annotation, value)
    if len(parts) == 2:
        return {key: read_media(parts[1], item) for key, item in value.items()}
    return value


def _fields(model: type[BaseModel], data: Mapping[str, Any]) -> dict[str, Any]:
    hints = {key: info.annotation for name, info in model.model_fields.items() for key in (name, info.alias)}
    return {key: read_media(hints.get(key), item) for key, item in data.items()}
