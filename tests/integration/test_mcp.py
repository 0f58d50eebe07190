"""MCP servers in use: real processes over stdio and HTTP, a published one, a hub that keeps them (G6, G8, G9)."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import dspy
import pytest
from mcp.server.mcpserver import Context, MCPServer
from pydantic import BaseModel

from agentcast.agents.events import ToolEnd, ToolProgress, ToolStart
from agentcast.agents.graph import END, Graph, StatefulNode
from agentcast.agents.mcp import McpServer, McpUnavailable, check, mcp_server, running, servers_of
from agentcast.agents.mcp import server as server_module
from agentcast.agents.react import ReAct
from agentcast.agents.registry import Registry
from agentcast.agents.transpiler import AgentTranspiler
from tests.support.forking import run_agentcast
from tests.support.hub import open_hub
from tests.support.lms import chat, lm_of
from tests.support.mcp import LEGACY, PATIENCE, Move, Played, failing_at_first, faulty, faulty_http, play, until
from tests.support.process import environment, refused, serve


@asynccontextmanager
async def served(kind: str, *options: str, **settings: Any) -> AsyncIterator[McpServer]:
    """The faulty server, running, by `kind` of transport."""
    if kind == "stdio":
        server = faulty("faulty", *options, **settings)
        async with running(server):
            yield server
    else:
        async with faulty_http(*options) as (url, _):
            server = mcp_server("faulty", url=url, **settings)
            async with running(server):
                yield server


TRANSPORTS = pytest.mark.parametrize("kind", ["stdio", "http"])


async def test_a_server_runs_inside_of_async_with():
    server = mcp_server("faulty", command=sys.executable, args=["-m", "tests.support.mcp_faulty"])
    with anyio.fail_after(PATIENCE):
        async with server as entered:
            assert entered is server
            assert await server.call("add", {"a": 1}) == 3
        assert server.status.state == "stopped"


# -- Tools in runs -------------------------------------------------------------------------------------------------


@TRANSPORTS
async def test_agent_calls_tools_of_a_server(kind: str):
    async with served(kind) as server:
        agent = ReAct("question -> answer", [server])
        moves: list[Move] = [
            ("add", {"a": 3}),
            ("echo", {"text": "hé"}),
            ("add", {}),
            ("add", {"a": "x"}),
            ("nope", {}),
        ]
        with anyio.fail_after(PATIENCE):
            played = await play(agent, moves)
    assert played.observations[:2] == [5, "hé"]
    assert played.observations[2] == "Tool add failed: missing a required argument: 'a'"
    assert "'x' is not of type 'integer'" in played.observations[3]
    assert played.observations[4].startswith("Tool nope failed: there is no such tool")
    assert [(start.tool, start.server) for start in played.heard.of(ToolStart)[:2]] == [
        ("add", "faulty"),
        ("echo", "faulty"),
    ]
    assert played.heard.of(ToolEnd)[0].result == 5


@TRANSPORTS
async def test_progress_comes_in_order_and_before_the_end(kind: str):
    async with served(kind) as server:
        with anyio.fail_after(PATIENCE):
            played = await play(ReAct("question -> answer", [server]), [("steps", {"count": 100})])
    calls = [event for event in played.heard.events if isinstance(event, ToolStart | ToolProgress | ToolEnd)]
    assert isinstance(calls[0], ToolStart)
    assert isinstance(calls[-1], ToolEnd)
    steps = [(event.progress, event.total, event.message) for event in calls if isinstance(event, ToolProgress)]
    assert steps == [(number, 100, f"step {number}") for number in range(100)]
    assert {event.span for event in calls} == {calls[0].span}


@TRANSPORTS
async def test_cancelling_a_run_cancels_the_call_at_the_server(kind: str, tmp_path: Path):
    """G6."""
    file = tmp_path / "state"
    async with served(kind) as server:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(play, ReAct("question -> answer", [server]), [("wait", {"file": str(file)})])
            await until(lambda: file.exists() and file.read_text() == "started")
            tasks.cancel_scope.cancel()
        await until(lambda: file.read_text() == "cancelled")
        with anyio.fail_after(PATIENCE):
            assert await server.call("add", {"a": 1}) == 3


@TRANSPORTS
async def test_failures_are_observations_without_paths_and_images_are_named(kind: str):
    """G9."""
    async with served(kind) as server:
        with anyio.fail_after(PATIENCE):
            played = await play(ReAct("question -> answer", [server]), [("trip", {}), ("media", {})])
    failed, media = played.observations
    assert failed == "Tool trip failed: Error executing tool trip: boom\nKeyError: 'x'"
    assert played.heard.of(ToolEnd)[0].error.message == failed.partition(": ")[2]
    lines = media.splitlines()
    assert lines[:4] == [
        "Look:",
        "[image, image/png, 3,000 bytes]",
        "[resource plan, file:///plan.pdf, application/pdf]",
        "[resource file:///notes.txt, text/plain, 5,000 characters]",
    ]
    assert len(media) < 1_500


@TRANSPORTS
async def test_new_tools_are_there_for_the_next_run(kind: str):
    async with served(kind) as server:
        agent = ReAct("question -> answer", [server])
        with anyio.fail_after(PATIENCE):
            played = await play(agent, [("grow", {"name": "grown"}), ("grown", {})])
            assert played.observations[0] == "grown"
            assert "there is no such tool" in played.observations[1]  # of this run, which began without it
            await until(lambda: any(tool.name == "grown" for tool in server.tools))
            played = await play(agent, [("grown", {})])
    assert played.observations == ["I am grown"]


async def test_server_of_an_older_protocol_works_and_announces_new_tools(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("agentcast.agents.mcp.connection.PING_EVERY", 0.05)  # it is asked, and answers, all the while
    server = mcp_server("legacy", command=sys.executable, args=["-P", LEGACY])
    async with running(server):
        with anyio.fail_after(PATIENCE):
            assert await server.call("grow", {}) == "grow"
            await until(lambda: [tool.name for tool in server.tools] == ["grow", "grown_1"])
            large = await server.call("grow", {"loud": 10**7})
            assert large.startswith("grow!!!")
            assert "[cut, the result has 10,000,0" in large
        assert server.status.state == "up"


async def test_concurrent_runs_share_one_process_and_hear_only_of_themselves():
    """G8."""
    async with served("stdio") as server:
        agent = ReAct("question -> answer", [server])
        plays = [Played() for _ in range(20)]
        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                for number, played in enumerate(plays):
                    moves: list[Move] = [
                        ("pid", {}),
                        ("steps", {"count": number + 1}),
                        ("echo", {"text": f"run {number}"}),
                    ]
                    tasks.start_soon(play, agent, moves, played)
    assert len({played.observations[0] for played in plays}) == 1
    for number, played in enumerate(plays):
        assert played.observations[2] == f"run {number}"
        assert [event.progress for event in played.heard.of(ToolProgress)] == list(range(number + 1))


async def test_tools_of_two_servers_get_distinct_names():
    async with served("stdio") as one, served("http") as other:
        other.name = "other"
        for tool in other.tools:
            tool._server = "other"
        agent = ReAct("question -> answer", [one, other, lambda_tool])
        moves: list[Any] = [("faulty_echo", {"text": "a"}), ("other_echo", {"text": "b"}), ("lambda_tool", {"x": 1})]
        with anyio.fail_after(PATIENCE):
            played = await play(agent, moves)
    assert played.observations == ["a", "b", 2]
    assert [start.server for start in played.heard.of(ToolStart)] == ["faulty", "other", None]


def lambda_tool(x: int) -> int:
    """Double."""
    return 2 * x


class Question(BaseModel):
    question: str


class Answer(BaseModel):
    answer: str


async def test_node_of_a_graph_uses_a_server():
    async with served("stdio") as server:
        graph = Graph(description="Answer.")
        graph.add_node(StatefulNode("ask", Question, Answer, tools=[server, lambda_tool]))
        graph.add_edge("ask", END)
        graph.set_entry_point("ask")
        program = AgentTranspiler.compile(graph)
        assert servers_of(program) == (server,)
        replies = [
            chat(next_thought="t", next_tool_name="echo", next_tool_args='{"text": "seen"}'),
            chat(next_thought="t", next_tool_name="finish", next_tool_args="{}"),
            chat(reasoning="r", answer="a"),
        ]
        with dspy.context(lm=lm_of(lambda _: replies.pop(0)), adapter=dspy.ChatAdapter()):
            with anyio.fail_after(PATIENCE):
                events = [event async for event in program.astream(question="q")]
    assert [(event["tool"], event["server"]) for event in events if event["event"] == "tool_start"] == [
        ("echo", "faulty")
    ]
    assert [event["result"] for event in events if event["event"] == "tool_end"] == ["seen"]


async def test_server_object_in_this_process():
    mine = MCPServer("mine")

    @mine.tool()
    async def count(ctx: Context, to: int) -> str:
        """Count."""
        for number in range(to):
            await ctx.report_progress(number, to)
        return "counted"

    server = mcp_server("mine", server=mine)
    async with running(server):
        with anyio.fail_after(PATIENCE):
            played = await play(ReAct("question -> answer", [server]), [("count", {"to": 3})])
    assert played.observations == ["counted"]
    assert [event.progress for event in played.heard.of(ToolProgress)] == [0, 1, 2]


async def test_published_server_works():
    """One that was not written here: mcp-server-time."""
    server = mcp_server("time", command=sys.executable, args=["-m", "mcp_server_time", "--local-timezone=UTC"])
    async with running(server):
        assert server.status.reason is None
        given = {"source_timezone": "UTC", "time": "12:00", "target_timezone": "Asia/Tokyo"}
        agent = ReAct("question -> answer", [server])
        with anyio.fail_after(PATIENCE):
            played = await play(agent, [("convert_time", given), ("convert_time", given | {"time": "noon"})])
    converted, refused_ = played.observations
    converted = json.loads(converted) if isinstance(converted, str) else converted
    assert converted["target"]["datetime"].endswith("T21:00:00+09:00")
    assert refused_.startswith("Tool convert_time failed: ")


# -- Keeping them --------------------------------------------------------------------------------------------------


async def test_server_that_nobody_keeps_says_so():
    server = faulty()
    agent = ReAct("question -> answer", [server])
    with anyio.fail_after(PATIENCE), pytest.raises(McpUnavailable, match="is not running: use `async with`"):
        await play(agent, [])


async def test_check_reports_the_state_of_each_server():
    async with faulty_http("--token", "right") as (url, _):
        given = [
            faulty("good"),
            mcp_server("missing", command="/nowhere/no-such-program"),
            mcp_server("failing", command=sys.executable, args=["-c", "import no_such_module"]),
            mcp_server("mute", command=sys.executable, args=["-c", "import sys; sys.stdin.read()"]),
            mcp_server("nobody", url="http://127.0.0.1:9/mcp"),
            mcp_server("refusing", url=url, token="wrong"),
            mcp_server("granting", url=url, token="right"),
            mcp_server("unheard-of"),
        ]
        with anyio.fail_after(PATIENCE):
            found = {status.name: status for status in await check(given, within=6)}
    assert {name: status.state for name, status in found.items()} == {
        "good": "up",
        "missing": "down",
        "failing": "down",
        "mute": "starting",
        "nobody": "down",
        "refusing": "down",
        "granting": "up",
        "unheard-of": "stopped",
    }
    assert found["good"].tools == found["granting"].tools > 10
    assert found["missing"].reason == "cannot run 'no-such-program': No such file or directory"
    assert found["failing"].reason == "it exited with code 1: ModuleNotFoundError: No module named 'no_such_module'"
    assert found["nobody"].reason == "nobody answers at its address"
    assert found["refusing"].reason == "it refuses us (HTTP 401): check its token and headers"
    assert all(server.status.state == "stopped" for server in given)


def registry_of(server: McpServer) -> Registry:
    registry = Registry()
    registry.mcp("reader", "question -> answer", servers=[server])
    return registry


async def test_agent_is_unavailable_while_its_server_cannot_start_and_comes_back_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(server_module, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(server_module, "LONGEST_PAUSE", 0.1)
    monkeypatch.setenv("SOME_TOKEN", "TOKEN-abcdefgh")
    attempts = tmp_path / "attempts"
    agents: Any = list(registry_of(failing_at_first("slow", attempts, 1_000_000)))
    async with open_hub(*agents) as hub, hub.http() as http, hub.client() as client:

        async def described() -> dict[str, Any]:
            [agent] = (await http.get("/v1/agents")).json()["agents"]
            return dict(agent)

        with anyio.fail_after(PATIENCE):
            while (agent := await described())["available"]:  # noqa: ASYNC110 -- it has to be polled
                await anyio.sleep(0.02)
            reason = "MCP server slow: it exited with code 3: no luck with [redacted] at data"
            assert agent["reason"] == reason
            assert await client.refused("start", agent="reader", input={"question": "q"}) == {
                "code": "unavailable",
                "message": f"agent reader is not available: {reason}",
                "retryable": True,
            }
            assert (await http.get("/readyz")).status_code == 200
            attempts.write_text("1000000")
            while not (agent := await described())["available"]:  # noqa: ASYNC110
                await anyio.sleep(0.02)
            assert "reason" not in agent


async def test_hub_ends_its_servers(tmp_path: Path):
    agents: Any = list(registry_of(faulty()))
    async with open_hub(*agents) as hub:
        server = hub.core.mcp_servers[0]
        with anyio.fail_after(PATIENCE):
            await server.tried()
            process = await server.call("pid", {})
        os.kill(process, 0)
    assert server.status.state == "stopped"
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


async def test_two_hubs_in_one_process_take_turns():
    server = faulty()
    async with running(server):
        with anyio.fail_after(PATIENCE):
            first = await server.call("pid", {})
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(server.keep)
                await anyio.wait_all_tasks_blocked()
                assert await server.call("pid", {}) == first
                tasks.cancel_scope.cancel()
            assert await server.call("pid", {}) == first


# -- The hub as a process ------------------------------------------------------------------------------------------


async def test_config_file_gives_an_assistant_with_all_tools_and_its_secrets_are_nowhere(tmp_path: Path):
    """G9."""
    secret = "tok-secret-0123456789"
    config = tmp_path / "mcp.json"
    entry = {
        "command": sys.executable,
        "args": ["-P", str(Path(__file__).parents[1] / "support" / "mcp_faulty.py")],
        "env": {"FAULTY_TOKEN": "${THE_TOKEN}", "FAULTY_KEY": "written-out-key"},
    }
    broken = {"command": "no-such-program-here", "disabled": True}
    config.write_text(json.dumps({"mcpServers": {"faulty": entry, "broken": broken}}))
    os.environ["THE_TOKEN"] = secret
    try:
        async with serve("--mcp-config", str(config), "--log-level", "debug", offline_delay="0") as hub:
            async with hub.client() as client:
                with anyio.fail_after(PATIENCE):
                    run = await client.start("assistant", {"request": "Call environment: what is in the environment?"})
                    events = (await client.view(run)).events
            log = "".join(hub.log)
    finally:
        del os.environ["THE_TOKEN"]
    starts = [event for event in events if event["event"] == "tool_start"]
    assert ("environment", "faulty") in [(start["tool"], start["server"]) for start in starts]
    assert events[-1]["event"] == "run_end"
    everything = json.dumps(events) + log
    assert "[redacted]" in everything
    assert secret not in everything
    assert "written-out-key" not in everything


async def test_wrong_config_stops_the_start_with_the_reason(tmp_path: Path):
    config = tmp_path / "mcp.json"
    config.write_text('{"mcpServers": {"files": {"cmd": "x"}}}')
    code, error = await refused("--port", "0", "--mcp-config", str(config))
    assert code == 2
    assert f"{config}: mcpServers.files.cmd: this key is not known. Remove it; known are" in error
    assert "Traceback" not in error


async def test_command_line_says_why_an_agent_is_unavailable(tmp_path: Path):
    config = tmp_path / "mcp.json"
    config.write_text('{"mcpServers": {"files": {"command": "no-such-program-here"}}}')

    async def agentcast(*words: str) -> tuple[int, str]:
        done = await run_agentcast(*words, "--url", hub.url, env=environment())
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    async with serve("--mcp-config", str(config)) as hub:
        reason = "MCP server files: cannot run 'no-such-program-here': No such file or directory"
        with anyio.fail_after(PATIENCE):
            while f"not available at the moment: {reason}" not in (await agentcast("agents"))[1]:  # noqa: ASYNC110
                await anyio.sleep(0.1)
            code, output = await agentcast("run", "assistant", "request=x")
    assert (code, output) == (1, f"agentcast: agent assistant is not available: {reason}; try again later")


async def test_librarian_answers_through_its_server():
    async with serve(agents="agentcast.agents.demo:registry", offline_delay="0") as hub, hub.client() as client:
        with anyio.fail_after(PATIENCE):
            run = await client.start("librarian", {"question": "What happens to a slow client?"})
            looked_up = (await client.view(run)).events
            run = await client.start("librarian", {"question": "Make an index of the library"})
            indexed = (await client.view(run)).events
    tools = [(event["tool"], event.get("server")) for event in looked_up if event["event"] == "tool_start"]
    assert tools == [("search", "library"), ("read", "library")]
    assert "A slow client hurts only itself" in looked_up[-1]["result"]["answer"]
    progress = [event for event in indexed if event["event"] == "tool_progress"]
    assert [event["progress"] for event in progress] == list(range(len(progress)))
    assert progress[-1]["total"] == len(progress) - 1 >= 4
    [index] = [event for event in indexed if event["event"] == "tool_end" and event["tool"] == "index"]
    assert index["result"].startswith(f"The index has {len(progress) - 1} files.\n- ")
    assert indexed[-1]["event"] == "run_end"


def test_librarian_server_needs_no_agents():
    code = "import sys, agents.demo.librarian_server; print('dspy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
