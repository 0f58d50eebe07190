"""Describing MCP servers, in code and in a file: wrong descriptions say what to do, secrets stay secret (G9)."""

import json
from pathlib import Path
from typing import Any

import dspy
import pytest
from mcp_types import Tool

from agentcast.agents import base
from agentcast.agents.base import AgentSpec, redact
from agentcast.agents.mcp import McpConfigError, load_servers, mcp_server, servers_of
from agentcast.agents.mcp.sources import Http, Stdio
from agentcast.agents.mcp.tools import McpTool, make_tools, with_distinct_names
from agentcast.agents.react import ReAct
from agentcast.agents.registry import Registry, RegistryError, add_assistant, servers_used


@pytest.fixture(autouse=True)
def own_secrets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "_kept", set())


# -- In code -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"command": "x", "url": "http://x"}, "either of command and url"),
        ({"command": "x", "headers": {"A": "b"}}, "headers and token go with url"),
        ({"url": "http://x", "args": ["a"]}, "args, env and cwd go with command"),
        ({"token": "t"}, "headers and token go with url"),
        ({"url": "example.org/mcp"}, "must begin with http:// or https://"),
        ({"command": "x", "timeout": 0}, "timeout is 0"),
    ],
)
def test_wrong_description_says_what_does_not_go_together(options: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=problem) as caught:
        mcp_server("files", **options)
    assert "'files'" in str(caught.value)


def test_wrong_name_is_refused():
    with pytest.raises(ValueError, match="must be of letters"):
        mcp_server("my files", command="x")


def test_nothing_that_may_be_secret_is_in_a_repr_and_everything_that_is_gets_redacted():
    secrets = ["key-value-1", "bearer-token-2", "header-value-3", "pass-word-4", "query-value-5"]
    url = "https://me:pass-word-4@example.org/mcp?k=query-value-5"
    http = mcp_server("a", url=url, token="bearer-token-2", headers={"X-Key": "header-value-3"})
    stdio = mcp_server("b", command="run", args=["--all"], env={"API_KEY": "key-value-1", "MODE": "quiet-mode"})
    shown = f"{http!r} {http._source!r} {stdio!r} {stdio._source!r} {http.status} {stdio.status}"
    assert not [secret for secret in [*secrets, "example.org", "--all"] if secret in shown]
    assert redact(" ".join(secrets)) == " ".join(["[redacted]"] * 5)
    assert redact("quiet-mode") == "quiet-mode"


def test_secrets_among_arguments_and_in_addresses_are_redacted():
    args = [
        "--mode",
        "quiet-mode",
        "--api-key",
        "flag-value-1",
        "--auth-token=equal-value-2",
        "-e",
        "SECRET=env-value-3",
    ]
    args += ["--header", "Authorization: Bearer header-value-4", "postgres://me:pass-value-5@db.example.org/data"]
    args += ["--no-token", "--verbose-mode"]
    mcp_server("a", command="run", args=args, env={"DATABASE": "postgres://me:pass-value-6@db.example.org/data"})
    mcp_server("b", url="https://me:pass%2Fvalue-7@example.org/u/0123456789abcdefghij/mcp?k=query%2Fvalue-8")
    secrets = ["flag-value-1", "equal-value-2", "env-value-3", "header-value-4", "pass-value-5", "pass-value-6"]
    secrets += ["pass%2Fvalue-7", "pass/value-7", "query%2Fvalue-8", "query/value-8", "0123456789abcdefghij"]
    assert redact(" ".join(secrets)) == " ".join(["[redacted]"] * len(secrets))
    harmless = "quiet-mode --verbose-mode db.example.org"
    assert redact(harmless) == harmless


# -- Agents and their servers --------------------------------------------------------------------------------------


class Pair(dspy.Module):  # type: ignore[misc]
    def __init__(self, *parts: ReAct) -> None:
        super().__init__()
        self.parts = dict(enumerate(parts))

    async def aforward(self, question: str) -> dspy.Prediction:
        return dspy.Prediction(answer=question)


def test_servers_of_all_parts_of_an_agent_are_found_once():
    one, two = mcp_server("one", command="x"), mcp_server("two", command="x")
    registry = Registry()
    registry.add("pair", Pair(ReAct("question -> answer", [one, two]), ReAct("question -> answer", [two])))
    registry.mcp("other", "question -> answer", servers=[one])
    assert servers_used(registry) == (one, two)


def test_copy_of_a_program_uses_the_same_server():
    server = mcp_server("one", command="x")
    program = ReAct("question -> answer", [server])
    assert servers_of(program.deepcopy()) == (server,)


def test_two_servers_of_one_name_are_refused_wherever_they_meet():
    one, other = mcp_server("files", command="x"), mcp_server("files", command="y")
    problem = "there are two MCP servers named 'files'"
    with pytest.raises(ValueError, match=problem):
        ReAct("question -> answer", [one, other])
    registry = Registry()
    with pytest.raises(RegistryError, match=problem):
        registry.mcp("agent", "question -> answer", servers=[one, other])
    with pytest.raises(RegistryError, match=problem):
        registry.add("pair", Pair(*(ReAct("question -> answer", [server]) for server in (one, other))))
    registry.mcp("a", "question -> answer", servers=[one])
    registry.mcp("b", "question -> answer", servers=[other])
    with pytest.raises(RegistryError, match=problem):
        servers_used(registry)


def test_server_known_by_name_only_is_refused_with_the_remedy():
    registry = Registry()
    registry.mcp("reader", "question -> answer", servers=[mcp_server("nobody-defines-it")])
    with pytest.raises(RegistryError, match=r"agent 'reader': .*'nobody-defines-it'.*--mcp-config"):
        servers_used(registry)


@pytest.mark.parametrize("servers", [[], ["files"], "files"])
def test_registry_takes_servers_only(servers: Any):
    with pytest.raises(RegistryError, match="Make them with mcp_server"):
        Registry().mcp("reader", "question -> answer", servers=servers)


def test_agent_with_servers_cannot_be_called_without_await():
    agent = ReAct("question -> answer", [mcp_server("one", command="x")])
    with pytest.raises(ValueError, match=r"await agent\.acall"):
        agent(question="q")


# -- Tools ---------------------------------------------------------------------------------------------------------


class Caller:
    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[Any] = []

    async def call(self, tool: str, args: dict[str, Any]) -> Any:
        self.calls.append((tool, args))
        return "ok"


def tool(name: str, schema: dict[str, Any] | None = None, description: str | None = None) -> Tool:
    return Tool(name=name, description=description, input_schema=schema or {"type": "object"})


async def test_tools_of_two_servers_and_own_ones_get_distinct_names():
    one = await make_tools(Caller("one"), [tool("read"), tool("search"), tool("finish")])
    two = await make_tools(Caller("two"), [tool("read"), tool("one_read"), tool("calculate")])
    names = [found.name for found in with_distinct_names(["calculate", "finish"], [one, two])]
    assert names == ["one_read", "search", "one_finish", "two_read", "one_read_", "two_calculate"]
    assert [found.server for found in with_distinct_names([], [one, two])] == ["one"] * 3 + ["two"] * 3


async def test_renamed_tool_is_called_by_the_name_that_its_server_knows():
    caller = Caller("one")
    [made] = await make_tools(caller, [tool("odd name/ü\n")])
    assert made.name == "odd_name/ü_"
    await made.named("other").acall()
    assert caller.calls == [("odd name/ü\n", {})]


async def test_prompt_shows_which_arguments_may_be_left_out_and_null_for_them_is_not_sent():
    caller = Caller("one")
    properties = {"query": {"type": "string"}, "limit": {"type": "integer", "title": "Limit"}, "all": {"default": True}}
    [made] = await make_tools(caller, [tool("find", {"properties": properties, "required": ["query"]})])
    assert made.args == {
        "query": {"type": "string"},
        "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
        "all": {"default": True},
    }
    await made.acall(query="x", limit=None, all=None)
    assert caller.calls == [("find", {"query": "x", "all": None})]


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"$ref": "#/$defs/Missing"}}, "$defs": {"Other": {}}},
        {"properties": {"a": True, "b": 3}},
        {"properties": [1]},
        {"properties": {"in": {"type": "string"}, "not a name": {}}, "required": ["in"]},
        {},
    ],
)
async def test_odd_schema_does_not_take_the_server_away(schema: dict[str, Any]):
    made = await make_tools(Caller("one"), [tool("odd", schema), tool("good"), tool("good")])
    assert [found.name for found in made] == ["odd", "good"]
    assert isinstance(made[0], McpTool)


async def test_long_description_is_cut():
    [made] = await make_tools(Caller("one"), [tool("wordy", description="w" * 10**5)])
    assert len(made.desc) <= 4096


# -- In a file -----------------------------------------------------------------------------------------------------


def write(folder: Path, document: Any) -> Path:
    file = folder / "mcp.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return file


def servers(entry: Any) -> dict[str, Any]:
    return {"mcpServers": {"files": entry}}


def test_file_defines_servers_that_code_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_TOKEN", "tok-0123456789")
    monkeypatch.delenv("MY_ROOT", raising=False)
    document = {
        "mcpServers": {
            "cfg-files": {"command": "run-files", "args": ["${MY_ROOT:-/srv}"], "env": {"A": "b"}, "cwd": "/tmp"},
            "cfg-web": {
                "type": "http",
                "url": "https://example.org/mcp",
                "headers": {"Authorization": "Bearer ${MY_TOKEN}"},
                "timeout": 5,
            },
            "cfg-off": {"command": "x", "disabled": True},
        }
    }
    named = mcp_server("cfg-files")
    assert not named.defined
    files, web = load_servers(write(tmp_path, document))
    assert files is named
    assert files._source == Stdio("run-files", ("/srv",), {"A": "b"}, "/tmp")
    assert web._source == Http("https://example.org/mcp", {"Authorization": "Bearer tok-0123456789"})
    assert web._timeout == 5


@pytest.mark.parametrize(
    ("document", "where", "problem", "remedy"),
    [
        ("{,}", "", "not valid JSON", "line 1, column 2"),
        ({"servers": {}}, "mcpServers", "missing", "mcpServers"),
        ({"mcpServers": {}, "inputs": []}, "inputs", "not known", "known are mcpServers"),
        (servers({"command": "x", "arg": []}), "mcpServers.files.arg", "not known", "known are type, command, args"),
        (servers({"command": "x", "args": "a b"}), "mcpServers.files.args", "list", "fix"),
        (servers({"command": "x", "env": {"A": 1}}), "mcpServers.files.env.A", "string", "fix"),
        (servers({"args": []}), "mcpServers.files", "neither command nor url", "add one"),
        (servers({"command": "x", "url": "http://x"}), "mcpServers.files", "either of", "fix"),
        (servers({"url": "nowhere"}), "mcpServers.files", "http://", "fix"),
        (servers({"type": "sse", "url": "http://x"}), "mcpServers.files.type", "not supported", "use one of stdio"),
        (servers({"type": "http", "command": "x"}), "mcpServers.files", "needs 'url'", "add"),
        (servers({"command": "x", "timeout": -1}), "mcpServers.files.timeout", "greater than 0", "fix"),
        (
            servers({"command": "x", "env": {"K": "${UNSET_VARIABLE}"}}),
            "mcpServers.files.env.K",
            "variable UNSET_VARIABLE is not set",
            "set it",
        ),
        ({"mcpServers": {"my files": {"command": "x"}}}, "mcpServers.my files", "must be of letters", "fix"),
    ],
)
def test_wrong_file_is_refused_with_place_and_remedy(
    tmp_path: Path, document: Any, where: str, problem: str, remedy: str
):
    file = write(tmp_path, document)
    with pytest.raises(McpConfigError) as caught:
        load_servers(file)
    text = str(caught.value)
    assert text.startswith(f"{file}{f': {where}' if where else ''}: ")
    assert caught.value.where == where
    assert problem in text
    assert remedy.lower() in text.lower()


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(McpConfigError, match=r"nowhere.json: cannot be read: No such file"):
        load_servers(tmp_path / "nowhere.json")


def test_servers_of_a_file_get_an_assistant_unless_there_is_one(tmp_path: Path):
    loaded = load_servers(write(tmp_path, {"mcpServers": {"cfg-a": {"command": "x"}, "cfg-b": {"command": "x"}}}))
    registry = Registry()

    @registry.agent
    async def greeter(name: str) -> str:
        """Greet."""
        return name

    extended = add_assistant(registry, loaded)
    assert extended.names == ["greeter", "assistant"]
    spec: AgentSpec = extended["assistant"].spec
    assert "cfg-a, cfg-b" in spec.description
    assert list(spec.input_model.model_fields) == ["request"]
    assert servers_used(extended) == tuple(loaded)
    assert add_assistant(registry, []).names == ["greeter"]
    own = Registry()
    own.register(extended["assistant"])
    assert add_assistant(own, loaded)["assistant"] is extended["assistant"]
