"""What a field is for, by its name and its JSON Schema."""

import re
from typing import Any

from agentcast.agents.offline.prompt import Field

_KINDS = (
    ("reasoning", re.compile(r"^(?:reasoning|rationale|thoughts?|justification|analysis)$")),
    ("sources", re.compile(r"source|file|citation|reference")),
    ("quotes", re.compile(r"quote|evidence|excerpt|passage|snippet|fact")),
    ("keywords", re.compile(r"keyword|tag|topic|entit")),
    ("title", re.compile(r"title|headline|subject|heading")),
    ("summary", re.compile(r"summary|abstract|tldr|gist|overview")),
    ("email", re.compile(r"mail")),
    ("url", re.compile(r"ur[li]$|link|website")),
    ("date", re.compile(r"date$|^day$|deadline")),
)
_PART = re.compile(r"^(?:.*_)?(?:question|query|aspect|topic|problem|task)_\d+$")


def kind_of(name: str) -> str | None:
    return next((kind for kind, pattern in _KINDS if pattern.search(name.lower())), None)


def is_part(name: str) -> bool:
    """Whether it is one of several fields, such as `question_2`, that are for parts of what is asked."""
    return bool(_PART.match(name))


def options_of(output: Field) -> list[Any]:
    """What a field may be, if it is a choice."""
    schema = resolved(output.schema)
    return schema.get("enum") or ([schema["const"]] if "const" in schema else [])


def resolved(schema: dict[str, Any], root: dict[str, Any] | None = None) -> dict[str, Any]:
    """`schema`, or what it refers to."""
    definitions = (root or schema).get("$defs", {})
    reference = schema.get("$ref") or next((part.get("$ref") for part in schema.get("allOf", [])), None)
    if reference is None:
        return schema
    target = definitions.get(str(reference).rpartition("/")[2], {})
    return {**target, "$defs": definitions}
