"""Typing `key=value` by a JSON Schema: what fits, and what is said of what does not."""

from enum import Enum
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from agentcast.server.cli.arguments import BadArgument, describe, type_name, typed_input


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Address(BaseModel):
    street: str


class Model(BaseModel):
    text: str = ""
    whole: int = 0
    real: float = 0.0
    flag: bool = False
    names: list[str] = []
    address: Address | None = None
    colour: Colour = Colour.RED
    level: Literal[1, 2, "top"] = 1
    maybe: int | None = None
    maybe_text: str | None = None
    either: int | str = 0
    anything: Any = None
    table: dict[str, int] = {}


SCHEMA = Model.model_json_schema()


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("text=5", "5"),
        ("text=true", "true"),
        ("text=a=b", "a=b"),
        ("text=", ""),
        ("text=@file", "@file"),
        ("whole=5", 5),
        ("whole=-5", -5),
        ("real=0.5", 0.5),
        ("real=5", 5),
        ("real=1e3", 1000.0),
        ("flag=true", True),
        ("flag=No", False),
        ('names=["a", "b"]', ["a", "b"]),
        ('address={"street": "x"}', {"street": "x"}),
        ("address=null", None),
        ("colour=blue", "blue"),
        ("level=2", 2),
        ("level=top", "top"),
        ("maybe=null", None),
        ("maybe=7", 7),
        ("maybe_text=null", None),
        ("maybe_text=7", "7"),
        ("either=7", 7),
        ("either=seven", "seven"),
        ("anything=[1]", [1]),
        ("anything=word", "word"),
        ('table={"a": 1}', {"a": 1}),
    ],
)
def test_values_get_the_type_that_the_schema_wants(pair: str, value: Any) -> None:
    typed = typed_input(SCHEMA, [pair])[pair.partition("=")[0]]
    assert (typed, type(typed)) == (value, type(value))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("whole=a", "whole: expected a whole number such as 5, got 'a'"),
        ("whole=5.0", "whole: expected a whole number"),
        ("whole=", "whole: expected a whole number such as 5, got ''"),
        ("real=NaN", "real: expected a number such as 0.5, got 'NaN'"),
        ("real=true", "real: expected a number"),
        ("flag=1", "flag: expected true or false, got '1'"),
        ("names=a,b", 'names: expected a JSON list such as ["a", "b"], got \'a,b\''),
        ("address=x", 'address: expected a JSON object such as {"a": 1} or null'),
        ("colour=green", "colour: expected one of red, blue, got 'green'"),
        ("level=3", "level: expected one of 1, 2, top"),
        ("maybe=x", "maybe: expected a whole number such as 5 or null"),
        ("nothing=1", "nothing: there is no such field; the agent takes text (string), whole (integer)"),
        ("text", "'text' is no key=value"),
        ("=5", "'=5' is no key=value"),
        ("text=\udcff", "text: it is not valid UTF-8"),
    ],
)
def test_what_does_not_fit_is_reported_by_field_and_form(pair: str, message: str) -> None:
    with pytest.raises(BadArgument) as caught:
        typed_input(SCHEMA, [pair])
    assert message in str(caught.value)


def test_long_values_are_not_repeated_whole() -> None:
    with pytest.raises(BadArgument) as caught:
        typed_input(SCHEMA, ["whole=" + "x" * 10_000])
    assert len(str(caught.value)) < 200


def test_pairs_win_over_the_document() -> None:
    assert typed_input(SCHEMA, ["whole=2"], '{"whole": 1, "text": "t"}') == {"whole": 2, "text": "t"}


@pytest.mark.parametrize("document", ["{", "[]", "5", '{"real": NaN}'])
def test_the_document_must_be_a_json_object(document: str) -> None:
    with pytest.raises(BadArgument, match="--input"):
        typed_input(SCHEMA, [], document)


def test_unknown_fields_of_the_document_are_refused_too() -> None:
    with pytest.raises(BadArgument, match="nothing: there is no such field"):
        typed_input(SCHEMA, [], '{"nothing": 1}')


def test_required_fields_are_asked_for_with_their_form() -> None:
    class Strict(BaseModel):
        count: int = Field(description="how many")

    with pytest.raises(BadArgument, match=r"count: it is required: count=… with a whole number such as 5"):
        typed_input(Strict.model_json_schema(), [])


def test_an_open_schema_takes_any_field() -> None:
    class Open(BaseModel):
        model_config = ConfigDict(extra="allow")

    assert typed_input(Open.model_json_schema(), ["a=1", "b=x"]) == {"a": 1, "b": "x"}
    assert typed_input({"additionalProperties": {"type": "string"}}, ["a=1"]) == {"a": "1"}


def test_an_agent_without_input_says_so() -> None:
    with pytest.raises(BadArgument, match="takes no input"):
        typed_input({"type": "object", "properties": {}}, ["a=1"])


def test_types_are_named_short() -> None:
    fields = SCHEMA["properties"]
    named = {name: type_name(SCHEMA, fields[name]) for name in fields}
    assert named["names"] == "list of string"
    assert named["address"] == "object or null"
    assert named["colour"] == "red | blue"
    assert named["anything"] == "any"
    assert named["either"] == "integer or string"


def test_a_schema_that_refers_to_itself_ends() -> None:
    loop = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "properties": {"x": {"$ref": "#/$defs/a"}}}
    assert typed_input(loop, ["x=1"]) == {"x": 1}
    assert describe(loop, {"type": ["string", "null"]}) == "text or null"
