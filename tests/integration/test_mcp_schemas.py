"""Tools whose schemas are odd, listed by real servers: they are shown, called, and named where they cannot be used."""

import json
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp.server import Server
from mcp_types import CallToolResult, ListToolsResult, TextContent, Tool

from agentcast.agents.mcp import mcp_server, running
from agentcast.agents.mcp.server import MAX_PROBLEMS
from agentcast.agents.react import ReAct
from tests.support.log import Log
from tests.support.mcp import PATIENCE, Move, play, raw, until

TRANSPORTS = pytest.mark.parametrize("kind", ["stdio", "http"])
TEXT = {"type": "string"}
NODE = {"type": "object", "properties": {"name": TEXT, "next": {"$ref": "#/$defs/Node"}}}

GOOD: dict[str, tuple[Any, dict[str, Any]]] = {
    "keywords": (
        {"type": "object", "properties": {"from": TEXT, "class": TEXT}, "required": ["from", "class"]},
        {"from": "a", "class": "b"},
    ),
    "self": (
        {"type": "object", "properties": {"self": TEXT, "instance": TEXT}, "required": ["self", "instance"]},
        {"self": "a", "instance": "b"},
    ),
    "recursive": (
        {"type": "object", "properties": {"node": {"$ref": "#/$defs/Node"}}, "$defs": {"Node": NODE}},
        {"node": {"name": "a", "next": {"name": "b"}}},
    ),
    "definitions": (
        {"type": "object", "properties": {"a": {"$ref": "#/definitions/A"}}, "definitions": {"A": TEXT}},
        {"a": "x"},
    ),
    "root_one_of": ({"oneOf": [{"properties": {"a": TEXT}, "required": ["a"]}]}, {"a": "x"}),
    "root_all_of": (
        {"type": "object", "allOf": [{"properties": {"a": TEXT}}, {"properties": {"b": TEXT}}]},
        {"b": "x"},
    ),
    "root_if": ({"type": "object", "if": {"properties": {"a": TEXT}}, "then": {"properties": {"b": TEXT}}}, {"b": "x"}),
    "root_ref": ({"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"a": TEXT}}}}, {"a": "x"}),
    "open": ({"type": "object", "additionalProperties": {}}, {"anything": [1]}),
    "patterns": ({"type": "object", "patternProperties": {"^x": TEXT}, "additionalProperties": False}, {"x1": "y"}),
    "anything": ({"type": "object", "properties": {"a": True}}, {"a": {"b": [1]}}),
    "null_type": ({"type": ["object", "null"], "properties": {"a": TEXT}}, {"a": "x"}),
    "no_required": ({"type": "object", "properties": {"a": TEXT}, "required": []}, {"a": "x"}),
}
"""Schemas, each with arguments."""

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "without": ({}, "it has no inputSchema"),
    "null": ({"inputSchema": None}, "it has no inputSchema"),
    "text": ({"inputSchema": "object"}, "its inputSchema is no object"),
    "list": ({"inputSchema": {"type": "object", "properties": ["a"]}}, "is no valid JSON Schema: properties: ['a']"),
    "number": ({"inputSchema": {"type": "object", "properties": {"a": 5}}}, "is no valid JSON Schema: properties.a: 5"),
    "not_required": ({"inputSchema": {"type": "object", "required": None}}, "is no valid JSON Schema: required: None"),
    "far": ({"inputSchema": {"type": "object", "allOf": [{"$ref": "http://127.0.0.1:9/x"}]}}, "'http://127.0.0.1:9/x'"),
}
"""Tools that are called without checks, with the reason."""

ENTRIES: list[Any] = [
    None,
    "tool",
    {},
    {"name": 5, "inputSchema": {"type": "object"}},
    {"name": " ", "inputSchema": {"type": "object"}},
    *({"name": name, "inputSchema": schema} for name, (schema, _) in GOOD.items()),
    *({"name": name, **entry} for name, (entry, _) in BAD.items()),
    {"name": "annotated", "inputSchema": {"type": "object"}, "annotations": {"readOnlyHint": "maybe", "title": [1]}},
    {"name": "decorated", "inputSchema": {"type": "object"}, "icons": 5, "_meta": 5, "execution": [], "title": 5},
    {"name": "described", "inputSchema": {"type": "object"}, "description": ["a"], "outputSchema": {"type": "array"}},
]


@TRANSPORTS
async def test_odd_entries_of_a_listing_cost_no_other_and_are_named(kind: str, tmp_path: Path, log: Log):
    async with raw(kind, tmp_path / "script", tools=ENTRIES) as server:
        kept = [*GOOD, *BAD, "annotated", "decorated", "described"]
        assert [tool.name for tool in server.tools] == kept
        problems = server.status.problems
        assert len(problems) == 5 + len(BAD)
        assert [problem.partition(": ")[2] for problem in problems[:5]] == ["it is no object"] * 2 + [
            "it has no name"
        ] * 3
        assert problems[1].startswith("entry 2 of its list of tools is left out: ")
        for problem, (name, (_, reason)) in zip(problems[5:], BAD.items(), strict=True):
            assert problem.startswith(f"the arguments of tool {name!r} are not checked: ")
            assert reason in problem
        moves: list[Move] = [*((name, args) for name, (_, args) in GOOD.items()), *((name, {"a": 1}) for name in BAD)]
        agent = ReAct("question -> answer", [server], max_iters=len(moves) + 1)
        with anyio.fail_after(PATIENCE):
            played = await play(agent, moves)
            prompt = (await agent._toolset()).signature.instructions
    assert [json.loads(observation) for observation in played.observations] == [args for _, args in moves]
    for name, (_, args) in GOOD.items():
        [line] = [line for line in prompt.splitlines() if f") {name}. It takes arguments" in line]
        assert all(repr(argument) in line for argument in args if argument not in ("anything", "x1"))
    warned = [line for line in log.lines if "MCP server raw: " in line]
    assert len(warned) == len(problems)


@TRANSPORTS
@pytest.mark.parametrize(
    "listing", [None, [], {}, {"tools": None}, {"tools": {"a": {}}}, {"tools": [], "nextCursor": 7}]
)
async def test_listing_that_is_none_leaves_the_server_up(kind: str, listing: Any, tmp_path: Path):
    async with raw(kind, tmp_path / "script", results={"tools/list": listing}) as server:
        assert server.status.state == "up"
        assert server.status.tools == 0


async def test_only_some_of_many_bad_entries_are_named(tmp_path: Path):
    async with raw("stdio", tmp_path / "script", tools=[{}] * 500) as server:
        assert len(server.status.problems) == MAX_PROBLEMS + 1
        assert server.status.problems[-1] == f"and {500 - MAX_PROBLEMS} more of this kind"


async def test_server_that_cannot_list_its_tools_again_keeps_those_it_has(tmp_path: Path, log: Log):
    changed = '{"jsonrpc":"2.0","method":"notifications/tools/list_changed"}'
    done = '{"jsonrpc":"2.0","id":$ID,"result":{"content":[]}}'
    tools = [{"name": "forget", "inputSchema": {"type": "object"}}]
    async with raw("stdio", tmp_path / "script", tools=tools, replies={"forget": f"{changed}\n{done}"}) as server:
        before = server.tools
        with anyio.fail_after(PATIENCE):
            assert await server.call("forget", {}) == ""
            await until(lambda: any("does not list its tools again: Method not found" in line for line in log.lines))
            assert await server.call("echo", {"a": 1}) == '{"a": 1}'
        assert server.tools is before
        assert server.status.state == "up"


async def test_server_object_with_odd_schemas():
    async def listed(_: Any, __: Any) -> ListToolsResult:
        schemas = {name: schema for name, (schema, _) in GOOD.items() if schema.get("type") == "object"}
        return ListToolsResult(tools=[Tool(name=name, input_schema=schema) for name, schema in schemas.items()])

    async def called(_: Any, params: Any) -> CallToolResult:
        return CallToolResult(content=[TextContent(type="text", text=json.dumps(params.arguments))])

    server = mcp_server("mine", server=Server("mine", on_list_tools=listed, on_call_tool=called))
    async with running(server):
        moves: list[Move] = [(name, args) for name, (schema, args) in GOOD.items() if schema.get("type") == "object"]
        with anyio.fail_after(PATIENCE):
            played = await play(ReAct("question -> answer", [server], max_iters=len(moves) + 1), moves)
    assert [json.loads(observation) for observation in played.observations] == [args for _, args in moves]
