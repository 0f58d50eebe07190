"""Arguments of tools, whatever their schema is: shown as the schema has them, checked against it, sent as they are."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp_types import Tool

from agentcast.agents.base import ToolError
from agentcast.agents.mcp.arguments import SCHEMA, Arguments
from agentcast.agents.mcp.tools import McpTool, make_tools
from agentcast.agents.mcp.validation import ERROR_CHARS
from agentcast.agents.offline.prompt import tools_in

TEXT = {"type": "string"}
NODE = {"type": "object", "properties": {"name": TEXT, "next": {"$ref": "#/$defs/Node"}}, "required": ["name"]}


def schema(**keywords: Any) -> dict[str, Any]:
    return {"type": "object", **keywords}


class Caller:
    """Who calls a tool; keeps what would be sent."""

    name = "one"

    def __init__(self) -> None:
        self.sent: list[Any] = []

    async def call(self, tool: str, args: dict[str, Any]) -> Any:
        self.sent.append(args)
        return "ok"


async def made(given: Any, caller: Caller | None = None) -> McpTool:
    listed = Tool(name="odd", input_schema={"type": "object"}, _meta={SCHEMA: given})
    [tool] = await make_tools(caller or Caller(), [listed])
    return tool


KEYWORDS = [
    "from",
    "class",
    "def",
    "None",
    "self",
    "instance",
    "cls",
    "kwargs",
    "args",
    "func",
    "name",
    "not a name",
    "ü",
    "",
]
"""Names that Python, or DSPy, has a use of its own for."""

ODD: dict[str, tuple[Any, list[dict[str, Any]], list[tuple[dict[str, Any], str]]]] = {
    "keywords": (
        schema(properties=dict.fromkeys(KEYWORDS, TEXT), required=KEYWORDS),
        [dict.fromkeys(KEYWORDS, "x")],
        [({name: "x" for name in KEYWORDS if name != "self"}, "missing a required argument: 'self'")],
    ),
    "recursive definition": (
        schema(properties={"node": {"$ref": "#/$defs/Node"}}, **{"$defs": {"Node": NODE}}),
        [{"node": {"name": "a", "next": {"name": "b", "next": {"name": "c"}}}}, {}],
        [({"node": {"name": "a", "next": {"name": 5}}}, "argument 'node' at .next.name: 5 is not of type 'string'")],
    ),
    "recursive root": (
        schema(properties={"name": TEXT, "inner": {"$ref": "#"}}, required=["name"]),
        [{"name": "a", "inner": {"name": "b"}}],
        [({"name": "a", "inner": {}}, "argument 'inner': 'name' is a required property")],
    ),
    "definitions of draft 7": (
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "properties": {"color": {"$ref": "#/definitions/Color"}},
            "definitions": {"Color": {"enum": ["red", "green"]}},
        },
        [{"color": "red"}],
        [({"color": "blue"}, "argument 'color': 'blue' is not one of ['red', 'green']")],
    ),
    "draft 4": (
        {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "id": "http://example.org/tool",
            "type": "object",
            "properties": {"n": {"type": "integer", "minimum": 0, "exclusiveMinimum": True}},
        },
        [{"n": 1}],
        [({"n": 0}, "argument 'n': 0 is less than or equal to the minimum of 0")],
    ),
    "unknown dialect": (
        schema(properties={"a": TEXT}, **{"$schema": "https://example.org/my-schema"}),
        [{"a": "x"}],
        [({"a": 5}, "argument 'a': 5 is not of type 'string'")],
    ),
    "alternatives at the root": (
        schema(
            oneOf=[
                {"properties": {"path": TEXT}, "required": ["path"], "additionalProperties": False},
                {"properties": {"url": TEXT}, "required": ["url"], "additionalProperties": False},
            ]
        ),
        [{"path": "x"}, {"url": "x"}],
        [({"path": "x", "url": "y"}, ""), ({}, "")],
    ),
    "alternatives of one name": (
        schema(
            anyOf=[
                {"properties": {"kind": {"const": "a"}, "n": {"type": "integer"}}, "required": ["kind", "n"]},
                {"properties": {"kind": {"const": "b"}, "n": TEXT}, "required": ["kind", "n"]},
            ]
        ),
        [{"kind": "a", "n": 1}, {"kind": "b", "n": "x"}],
        [({"kind": "c", "n": 1}, "")],
    ),
    "all of them": (
        schema(allOf=[{"properties": {"a": TEXT}, "required": ["a"]}, {"$ref": "#/$defs/More"}])
        | {"$defs": {"More": {"properties": {"b": {"type": "integer"}}, "required": ["b"]}}},
        [{"a": "x", "b": 1}],
        [({"a": "x"}, "missing a required argument: 'b'"), ({"a": "x", "b": 1.5}, "argument 'b': 1.5 is not of type")],
    ),
    "condition": (
        schema(
            properties={"unit": {"enum": ["m", "ft"]}},
            **{
                "if": {"properties": {"unit": {"const": "ft"}}},
                "then": {"properties": {"feet": {}}, "required": ["feet"]},
            },
        ),
        [{"unit": "m"}, {"unit": "ft", "feet": 1}],
        [({"unit": "ft"}, "missing a required argument: 'feet'")],
    ),
    "reference at the root": (
        {"$ref": "#/$defs/Args", "$defs": {"Args": schema(properties={"a": TEXT}, required=["a"])}},
        [{"a": "x"}],
        [({}, "missing a required argument: 'a'")],
    ),
    "other names, whatever they are": (
        schema(properties={"a": TEXT}, additionalProperties={}),
        [{"a": "x", "b": 5, "c": [1]}],
        [({"a": 5}, "argument 'a': 5 is not of type 'string'")],
    ),
    "other names of one type": (
        schema(additionalProperties={"type": "integer"}),
        [{"a": 1, "b": 2}],
        [({"a": [1]}, "argument 'a': [1] is not of type 'integer'")],
    ),
    "no other names": (
        schema(properties={"a": TEXT}, additionalProperties=False),
        [{"a": "x"}],
        [({"b": 1}, "it has no argument 'b'; it takes a")],
    ),
    "no names at all": (schema(properties={}, additionalProperties=False), [{}], [({"b": 1}, "it takes none")]),
    "names by a pattern": (
        schema(patternProperties={"^x-": TEXT}, additionalProperties=False),
        [{"x-a": "y"}, {}],
        [({"x-a": 5}, "argument 'x-a': 5 is not of type 'string'"), ({"y": 1}, "it has no argument 'y'")],
    ),
    "nothing unevaluated": (
        schema(allOf=[{"properties": {"a": TEXT}}], unevaluatedProperties=False),
        [{"a": "x"}],
        [({"b": "x"}, "")],
    ),
    "true and false": (
        schema(properties={"any": True, "none": False}, required=["any"]),
        [{"any": [1]}, {"any": None}],
        [({"any": 1, "none": 1}, "argument 'none': it must be left out")],
    ),
    "pattern that Python has not": (
        schema(properties={"a": {"type": "string", "pattern": r"^\p{Lu}\p{Ll}+$"}}),
        [{"a": "Ünder"}],
        [({"a": "under"}, "argument 'a': 'under' does not match")],
    ),
    "pattern that is none": (schema(properties={"a": {"type": "string", "pattern": "("}}), [{"a": "x"}], []),
    "format": (schema(properties={"a": {"type": "string", "format": "uri"}}), [{"a": "no uri"}], []),
    "deep error": (
        schema(properties={"a": {"type": "array", "items": {"type": "object", "properties": {"b": TEXT}}}}),
        [{"a": [{"b": "x"}, {}]}],
        [({"a": [{}, {"b": 1}]}, "argument 'a' at [1].b: 1 is not of type 'string'")],
    ),
}
"""Schemas with arguments that fit, and such that do not with what is said of them."""

UNUSABLE: dict[str, tuple[Any, str]] = {
    "none": (None, "it has no inputSchema"),
    "true": (True, "its inputSchema is no object"),
    "a list": ([{"type": "object"}], "its inputSchema is no object"),
    "unknown type": (schema(properties={"a": {"type": "text"}}), "'text' is not valid under any of the given schemas"),
    "type that is a number": (schema(properties={"a": {"type": 5}}), "no valid JSON Schema"),
    "properties that are a list": (schema(properties=[1]), "[1] is not of type 'object'"),
    "property that is a text": (schema(properties={"a": "string"}), "'string' is not of type 'object', 'boolean'"),
    "required in the property": (
        schema(properties={"a": {"type": "string", "required": True}}),
        "is not of type 'array'",
    ),
    "required that is a text": (schema(properties={"a": {}}, required="a"), "'a' is not of type 'array'"),
    "minimum that is a text": (schema(properties={"a": {"minimum": "5"}}), "'5' is not of type 'number'"),
    "dialect that is a number": (schema(properties={"a": {}}, **{"$schema": 5}), "cannot be used"),
    "dialect that is a list": (schema(properties={"a": {}}, **{"$schema": []}), "cannot be used"),
    "loose end": (schema(properties={"a": {"$ref": "#/$defs/Gone"}}), "refers to '#/$defs/Gone', which is not in it"),
    "far end": (schema(properties={"a": {"$ref": "http://127.0.0.1:9/a"}}), "refers to 'http://127.0.0.1:9/a', which"),
    "reference that is a number": (schema(properties={"a": {"$ref": 5}}), "no valid JSON Schema"),
}


@pytest.mark.parametrize("case", ODD)
async def test_arguments_are_checked_against_the_schema_itself(case: str):
    given, fitting, wrong = ODD[case]
    caller = Caller()
    tool = await made(given, caller)
    assert tool.problem is None
    for args in fitting:
        assert await tool.acall(**args) == "ok"
        assert caller.sent[-1] == args
    for args, said in wrong:
        with pytest.raises(ToolError) as raised:
            await tool.acall(**args)
        assert said in str(raised.value)
    assert len(caller.sent) == len(fitting)


@pytest.mark.parametrize("case", ODD)
async def test_prompt_and_native_calls_show_all_of_the_schema(case: str):
    given, fitting, _ = ODD[case]
    tool = await made(given)
    shown = str(tool)
    assert shown.startswith("odd. It takes arguments {")
    for name in {name for args in fitting for name in args if repr(name) in str(given)}:
        assert repr(name) in shown
    for keyword in ("oneOf", "anyOf", "allOf", "$defs", "definitions", "if", "patternProperties"):
        assert not given.get(keyword) or str(given[keyword]) in shown
    assert tool.format_as_litellm_function_call()["function"] == {
        "name": "odd",
        "description": "",
        "parameters": {"type": "object", **given},
    }


@pytest.mark.parametrize("case", ODD)
async def test_offline_model_reads_the_arguments_out_of_the_prompt(case: str):
    tool = await made(ODD[case][0])
    assert [(found.name, found.args) for found in tools_in(f"Act.\n        (1) {tool}\n")] == [("odd", tool.args)]


@pytest.mark.parametrize("case", UNUSABLE)
async def test_tool_whose_schema_cannot_be_used_is_called_without_checks_and_named(case: str):
    given, problem = UNUSABLE[case]
    caller = Caller()
    tool = await made(given, caller)
    assert tool.problem is not None
    assert problem in tool.problem
    assert await tool.acall(a=5, self=None, instance=[1]) == "ok"
    assert caller.sent == [{"a": 5, "self": None, "instance": [1]}]
    assert str(tool).startswith("odd. It takes arguments {")


def nested(depth: int) -> dict[str, Any]:
    return schema(properties={"a": nested(depth - 1)} if depth else {})


@pytest.mark.parametrize(
    "given", [nested(300), schema(properties={f"p{number}": TEXT for number in range(20_000)})], ids=["deep", "wide"]
)
async def test_gigantic_schema_is_not_checked_and_bounded_in_the_prompt(given: dict[str, Any]):
    tool = await made(given)
    assert tool.problem == "its schema is too deep or too large"
    assert len(str(tool)) < 300_000


HOSTILE: dict[str, tuple[Any, dict[str, Any]]] = {
    "pattern": (schema(properties={"a": {"pattern": "^(a|aa)+$"}}), {"a": "a" * 50 + "b"}),
    "pattern of names": (schema(patternProperties={"^(a|a)*$": {}}, additionalProperties=False), {"a" * 50 + "b": 1}),
    "doubling": (
        schema(
            properties={"a": {"$ref": "#/$defs/0"}},
            **{"$defs": {"40": {}, **{str(n): {"allOf": [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(40)}}},
        ),
        {"a": 1},
    ),
    "doubling at the root": (
        {
            "$ref": "#/$defs/0",
            "$defs": {"40": {}, **{str(n): {"allOf": [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(40)}},
        },
        {"a": 1},
    ),
    "circle": (schema(properties={"a": {"$ref": "#/$defs/a"}}, **{"$defs": {"a": {"$ref": "#/$defs/a"}}}), {"a": 1}),
    "another dialect inside": (
        schema(
            properties={"a": {"$schema": "http://json-schema.org/draft-07/schema#", "pattern": "^(a|aa)+$"}},
        ),
        {"a": "a" * 50 + "b"},
    ),
    "unevaluated": (
        schema(patternProperties={"^(a|a)*$": {}}, unevaluatedProperties=False),
        {"a" * 50 + "b": 1},
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_schema_that_would_take_forever_is_given_up_on(case: str):
    """G3. The bound is generous: unbounded, each would take years."""
    given, args = HOSTILE[case]
    caller = Caller()
    started = time.monotonic()
    assert await (await made(given, caller)).acall(**args) == "ok"
    assert time.monotonic() - started < 20
    assert caller.sent == [args]


async def test_schema_is_compiled_once(monkeypatch: pytest.MonkeyPatch):
    tool = await made(schema(properties={"a": TEXT}))
    compiled: list[Any] = []
    monkeypatch.setattr("agentcast.agents.mcp.arguments.validator_of", compiled.append)
    monkeypatch.setattr("dspy.adapters.types.tool.validate", compiled.append)
    for _ in range(3):
        await tool.acall(a="x")
    assert compiled == []


# -- Conversions ---------------------------------------------------------------------------------------------------

INTEGER, NUMBER, BOOLEAN = {"type": "integer"}, {"type": "number"}, {"type": "boolean"}


@pytest.mark.parametrize(
    ("arg", "given", "sent"),
    [
        (INTEGER, "3", 3),
        (INTEGER, "3.0", 3),
        (INTEGER, 3.0, 3.0),
        (NUMBER, "3.5", 3.5),
        (BOOLEAN, "true", True),
        (BOOLEAN, "False", False),
        ({"type": "array"}, "[1, 2]", [1, 2]),
        ({"type": "object"}, '{"a": 1}', {"a": 1}),
        ({"type": ["integer", "null"]}, "3", 3),
        ({"anyOf": [INTEGER, {"type": "null"}]}, "3", 3),
        ({"$ref": "#/$defs/N"}, "3", 3),
        ({"type": "array", "items": INTEGER}, '["1", 2]', [1, 2]),
        ({"type": "array", "items": INTEGER}, ["1", "2"], [1, 2]),
        (TEXT, "3", "3"),
        ({"type": ["integer", "string"]}, "3", "3"),
        ({}, "3", "3"),
    ],
)
def test_text_that_holds_what_is_wanted_is_taken_for_it(arg: Any, given: Any, sent: Any):
    arguments = Arguments(schema(properties={"a": arg}, required=["a"], **{"$defs": {"N": INTEGER}}))
    assert arguments.fit({"a": given}) == {"a": sent}
    assert type(arguments.fit({"a": given})["a"]) is type(sent)


@pytest.mark.parametrize(
    ("arg", "given"),
    [
        (INTEGER, "x"),
        (INTEGER, "3.5"),
        (INTEGER, ""),
        (INTEGER, "null"),
        (INTEGER, None),
        (INTEGER, True),
        (INTEGER, "true"),
        (BOOLEAN, "1"),
        (BOOLEAN, "yes"),
        (TEXT, 3),
        ({"type": "array"}, "a, b"),
        ({"type": "array"}, "[" * 10_000),
        ({"type": "integer", "maximum": 2}, "3"),
    ],
)
def test_nothing_else_is_converted(arg: Any, given: Any):
    with pytest.raises(ToolError, match="argument 'a': "):
        Arguments(schema(properties={"a": arg}, required=["a"])).fit({"a": given})


def test_value_that_is_no_json_is_refused_like_any_other():
    with pytest.raises(ToolError, match=r"argument 'a': .* is not of type 'integer'"):
        Arguments(schema(properties={"a": INTEGER})).fit({"a": object()})


def test_required_by_every_alternative_is_required():
    ways = [{"$ref": "#/$defs/A"}, {"required": ["a", "b"]}, {"$ref": "#/$defs/A"}]
    given = schema(properties={"a": {}, "b": {}}, oneOf=ways, **{"$defs": {"A": {"required": ["a"]}}})
    assert Arguments(given).shown == {"a": {}, "b": {"anyOf": [{}, {"type": "null"}], "default": None}}


def test_null_for_what_may_be_left_out_is_left_out():
    arguments = Arguments(schema(properties={"a": TEXT, "b": INTEGER | {"default": 5}, "c": {}, "d": {"default": 1}}))
    assert arguments.fit({"a": None, "b": None, "c": None, "d": None}) == {"d": None}


def test_title_is_shown_only_if_it_says_more_than_the_name():
    properties = {"max_items": {"title": "Max Items"}, "n": {"title": "Number of items"}}
    assert Arguments(schema(properties=properties, required=["max_items", "n"])).shown == {
        "max_items": {},
        "n": {"title": "Number of items"},
    }


def test_error_is_bounded_and_keeps_what_is_expected():
    with pytest.raises(ToolError) as caught:
        Arguments(schema(properties={"a": INTEGER, "b": TEXT}, required=["a"])).fit(
            {"a": "x" * 100_000, "b": [1] * 9_999}
        )
    assert "is not of type 'integer'; argument 'b': [1, 1" in str(caught.value)
    assert len(str(caught.value)) < 4 * ERROR_CHARS


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=3)
    | st.sampled_from(["#", "#/$defs/a", "object", "string"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "type properties required $ref $defs a allOf oneOf if then not items enum pattern $id $schema".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)


@given(values, st.dictionaries(st.text(max_size=3), values, max_size=3))
def test_any_schema_makes_arguments(given: Any, args: dict[str, Any]):
    arguments = Arguments(given)
    assert isinstance(str(arguments.shown), str)
    try:
        arguments.fit(args)
    except ToolError as error:
        assert len(str(error)) < 10 * ERROR_CHARS
