"""MCP servers that die, hang, flood, write rubbish or will not start: runs learn of it, and the hub goes on."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentcast.agents.base import ToolError
from agentcast.agents.events import AgentEvent, ToolEnd, ToolProgress
from agentcast.agents.mcp import McpServer, connection, mcp_server, running, stdio
from agentcast.agents.mcp import server as server_module
from agentcast.agents.mcp.calls import PROGRESS_BYTES, WAITING_PROGRESS, Call
from agentcast.agents.react import ReAct
from agentcast.agents.registry import Registry
from agentcast.agents.values import VALUE_BYTES, text_bytes
from tests.support.hub import open_hub
from tests.support.log import Log
from tests.support.mcp import FAULTY, PATIENCE, Played, failing_at_first, faulty, faulty_http, legacy_http, play, until


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch):
    """Pauses are short, so that nothing waits in vain."""
    monkeypatch.setattr(server_module, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(server_module, "LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(stdio, "EXIT_PATIENCE", 0.5)


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def status_of(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text()


async def pid_of(server: McpServer) -> int:
    """Also waits until it is there again."""
    with anyio.fail_after(PATIENCE):
        while True:
            try:
                return int(await server.call("pid", {}))
            except ToolError:
                await anyio.sleep(0.02)


# -- Dying ---------------------------------------------------------------------------------------------------------


async def test_server_that_dies_in_a_call_is_an_observation_and_the_next_call_finds_it_again():
    server = faulty()
    agent = ReAct("question -> answer", [server])
    async with running(server):
        first = await pid_of(server)
        with anyio.fail_after(PATIENCE):
            played = await play(agent, [("die", {}), ("pid", {}), ("add", {"a": 1})])
        assert played.observations[0] == "Tool die failed: the connection to its server was lost"
        assert played.observations[1] != first
        assert played.observations[2] == 3
        assert server.unavailable is None


async def test_killed_server_takes_only_the_calls_in_progress_with_it():
    server = faulty()
    async with running(server):
        process = await pid_of(server)
        failed: list[str] = []

        async def call(pause: float) -> None:
            try:
                await server.call("echo", {"text": "x", "pause": pause})
            except ToolError as error:
                failed.append(str(error))

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                for _ in range(5):
                    tasks.start_soon(call, 1_000)
                await call(0)
                os.kill(process, signal.SIGKILL)
            assert failed == ["the connection to its server was lost"] * 5
            assert await pid_of(server) != process


async def test_http_server_that_goes_away_comes_back(log: Log, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "PING_EVERY", 0.1)
    async with faulty_http() as (url, process):
        port = url.split(":")[2].partition("/")[0]
        server = mcp_server("web", url=url)
        async with running(server):
            first = await pid_of(server)
            process.kill()
            await process.wait()
            await until(lambda: server.unavailable == "MCP server web: nobody answers at its address")
            with pytest.raises(ToolError, match="nobody answers"):
                await server.call("add", {"a": 1})
            async with faulty_http("--port", port):
                assert await pid_of(server) != first
                assert server.unavailable is None


async def test_server_that_has_forgotten_its_session_is_reconnected_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "PING_EVERY", 1_000)
    async with legacy_http() as url:
        server = mcp_server("legacy", url=url)
        async with running(server):
            assert await server.call("grow", {"loud": 1, "forget": True}) == "grow!"
            with pytest.raises(ToolError, match="Session not found"):
                await server.call("grow", {})
            with anyio.fail_after(PATIENCE):
                while True:
                    with suppress(ToolError):
                        assert await server.call("grow", {}) == "grow"
                        break
                    await anyio.sleep(0.02)


# -- Hanging -------------------------------------------------------------------------------------------------------


async def test_hung_server_ends_the_call_in_time_and_is_restarted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "PING_EVERY", 1_000)  # it is the call that raises the doubt
    monkeypatch.setattr(connection, "PING_TIMEOUT", 0.2)
    server = faulty(timeout=1.0)
    agent = ReAct("question -> answer", [server])
    async with running(server):
        first = await pid_of(server)
        with anyio.fail_after(PATIENCE):
            played = await play(agent, [("hang", {})])
        assert played.observations == ["Tool hang failed: it gave no answer within 1 s; the call was cancelled"]
        await until(lambda: gone(first))
        assert await pid_of(server) != first


async def test_slow_tool_is_cut_off_but_its_server_that_answers_is_not_restarted(tmp_path: Path):
    server = faulty(timeout=0.5)
    async with running(server):
        first = await pid_of(server)
        file = tmp_path / "state"
        with anyio.fail_after(PATIENCE):
            with pytest.raises(ToolError, match="no answer within"):
                await server.call("wait", {"file": str(file)})
            await until(lambda: file.read_text() == "cancelled")
        assert await pid_of(server) == first


async def test_idle_server_that_hangs_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "PING_EVERY", 0.05)
    monkeypatch.setattr(connection, "PING_TIMEOUT", 0.5)
    server = faulty()
    async with running(server):
        first = await pid_of(server)
        os.kill(first, signal.SIGSTOP)
        await until(lambda: gone(first))
        assert await pid_of(server) != first


async def test_server_that_does_not_read_stops_nobody(monkeypatch: pytest.MonkeyPatch):
    """Its pipe is full: even the call itself cannot be sent."""
    monkeypatch.setattr(connection, "PING_TIMEOUT", 0.2)
    server = faulty(timeout=0.5)
    async with running(server):
        first = await pid_of(server)
        os.kill(first, signal.SIGSTOP)
        with anyio.fail_after(PATIENCE), pytest.raises(ToolError):
            await server.call("echo", {"text": "x" * 10**6})
        await until(lambda: gone(first))
        assert await server.call("echo", {"text": "there"}) == "there"


# -- Too much ------------------------------------------------------------------------------------------------------


class Slow(Played):
    """Played to somebody who takes his time with each event."""

    def __init__(self) -> None:
        super().__init__()
        heard = self.heard

        async def send(event: AgentEvent) -> None:
            await anyio.sleep(0.005)
            heard.nowait(event)

        heard.send = send  # type: ignore[method-assign]


async def test_flood_of_progress_is_thinned_out_in_order():
    server = faulty()
    async with running(server):
        with anyio.fail_after(PATIENCE):
            played = await play(ReAct("question -> answer", [server]), [("steps", {"count": 5_000})], Slow())
    reported = [event.progress for event in played.heard.of(ToolProgress)]
    assert reported == sorted(set(reported))
    assert reported[-1] == 4_999
    assert WAITING_PROGRESS <= len(reported) < 4_000
    kinds = [type(event) for event in played.heard.events]
    assert ToolProgress not in kinds[kinds.index(ToolEnd) :]


async def test_flood_of_progress_does_not_end_a_run_on_the_hub():
    registry = Registry()

    @registry.agent
    async def flooded() -> str:
        """Call a tool that floods."""
        played = await play(ReAct("question -> answer", [server]), [("steps", {"count": 12_000})])
        return str(played.observations[0])

    server = faulty()
    agents: Any = list(registry)
    async with running(server), open_hub(*agents) as hub, hub.client() as client:
        hub.core.watchdog._blocked_after = PATIENCE  # a slow machine does not look like a blocked loop
        with anyio.fail_after(PATIENCE):
            run = await client.start("flooded")
            view = await client.view(run)
    assert view.document["result"] == "done"


async def test_message_of_progress_is_bounded_before_it_waits():
    class Chatty:
        async def call_tool(self, tool: str, args: Any, timeout: Any, report: Any) -> Any:
            await report(1.0, 2.0, "m" * 1_000_000)

    chatty: Any = Chatty()
    call = Call("talk", {}, PATIENCE)
    await call.make(chatty)
    (reported,) = [progress async for progress in call.progress()]
    assert reported.progress == 1
    assert reported.message is not None
    assert reported.message.startswith("mmm")
    assert text_bytes(reported.message) <= PROGRESS_BYTES


async def test_rubbish_on_stdout_is_dropped_and_logged_once(log: Log):
    server = faulty()
    async with running(server):
        with anyio.fail_after(PATIENCE):
            for _ in range(3):
                assert await server.call("rubbish", {"lines": 1_000}) == "said"
            assert await server.call("add", {"a": 1}) == 3
    assert sum("writes to stdout what is no message" in line for line in log.lines) == 1


async def test_line_without_end_costs_its_server_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "PING_TIMEOUT", 0.5)
    server = faulty(timeout=2.0)
    async with running(server):
        first = await pid_of(server)
        with anyio.fail_after(PATIENCE), pytest.raises(ToolError, match="no answer within"):
            await server.call("endless", {"size": 50_000_000})
        await until(lambda: gone(first))
        assert await pid_of(server) != first


@pytest.mark.parametrize("kind", ["stdio", "http"])
async def test_result_of_20_mb_reaches_model_and_events_cut(kind: str):
    async with faulty_http() as (url, _):
        server = faulty() if kind == "stdio" else mcp_server("faulty", url=url)
        moves: list[Any] = [("big", {"size": 20_000_000}), ("table", {"rows": 300_000}), ("add", {"a": 1})]
        async with running(server):
            with anyio.fail_after(PATIENCE):
                played = await play(ReAct("question -> answer", [server]), moves)
    text, table, after = played.observations
    assert text.startswith("xxx")
    assert "0,225 bytes]" in text or "cut, the result has 40,000," in text
    assert text_bytes(text) <= VALUE_BYTES
    assert '"rows"' in table
    assert "cut, the result has 19,355,8" in table
    assert after == 3
    assert max(map(len, played.prompts)) < 4 * VALUE_BYTES
    assert all(text_bytes(end.result) <= VALUE_BYTES for end in played.heard.of(ToolEnd)[:2])


async def test_hundred_calls_at_once_get_their_own_answers():
    server = faulty()
    answers: dict[int, str] = {}

    async def call(number: int) -> None:
        answers[number] = await server.call("echo", {"text": f"n{number}", "pause": 0.05 * (number % 3)})

    async with running(server):
        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                for number in range(100):
                    tasks.start_soon(call, number)
    assert answers == {number: f"n{number}" for number in range(100)}


async def test_server_with_a_thousand_tools():
    server = faulty("faulty", "--many", "1000")
    agent = ReAct("question -> answer", [server])
    async with running(server):
        with anyio.fail_after(PATIENCE):
            played = await play(agent, [("tool_999", {}), ("tool_0", {})])
            assert played.observations == ["number 999", "number 0"]
            made = await agent._toolset()
            assert await agent._toolset() is made  # a new one is made only when the tools have changed
    assert len(made.tools) > 1_000


async def test_server_with_too_many_tools_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "MAX_TOOLS", 10)
    server = faulty()
    async with running(server):
        assert server.unavailable == "MCP server faulty: it has more than 10 tools"


# -- Starting and ending -------------------------------------------------------------------------------------------


async def test_start_that_fails_ten_times_works_at_last(tmp_path: Path):
    attempts = tmp_path / "attempts"
    server = failing_at_first("late", attempts, 10)
    async with running(server):
        reason = server.unavailable
        assert reason == "MCP server late: it exited with code 3: no luck with TOKEN-abcdefgh at data"
        with anyio.fail_after(PATIENCE):
            while server.unavailable is not None:
                await server.tried()
        assert await server.call("add", {"a": 1}) == 3
    assert attempts.read_text().strip() == "11"


async def test_run_waits_for_a_server_that_is_starting():
    server = faulty()
    async with running(server, within=0):
        assert server.status.state == "starting"
        assert server.unavailable is None
        with anyio.fail_after(PATIENCE):
            played = await play(ReAct("question -> answer", [server]), [("add", {"a": 1})])
    assert played.observations == [3]
    assert played.heard.events[1].message == "Waiting for MCP server faulty"  # type: ignore[union-attr]


async def test_server_that_is_no_mcp_server_is_reported_as_such(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_module, "START_TIMEOUT", 1.0)
    chatter = "import time\nfor _ in range(3): print('hello')\ntime.sleep(100)"
    server = mcp_server("chatter", command=sys.executable, args=["-uc", chatter])
    async with running(server):
        assert server.unavailable is not None
        assert "did not start within 1 s; it wrote 3 lines to stdout that are no messages" in server.unavailable


async def test_no_process_is_left_behind(tmp_path: Path):
    """Not the server, nor one that it has started itself, also if they do not listen."""
    file = tmp_path / "pid"
    script = f"sleep 1000 & echo $! > {file}; trap '' TERM; exec {sys.executable} -P {FAULTY}"
    server = mcp_server("wrapped", command="sh", args=["-c", script])
    async with running(server):
        process = await pid_of(server)
        child = int(file.read_text())
        assert not gone(child)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.call, "hang", {})
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
    assert gone(process)
    assert gone(child) or " Z " in status_of(child)  # an orphan that nobody has collected yet
