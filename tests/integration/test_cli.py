"""The command line as its users have it: real processes against a real hub; and a scripted one, for what a hub that is
well never does."""

import json
import os
import pty
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from pydantic import BaseModel, Field
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from agentcast.agents.base import Emitter
from agentcast.agents.events import MessageEnd, MessageStart, Status, Token
from tests.support.agents import agent
from tests.support.forking import open_agentcast, run_agentcast
from tests.support.hub import RunningHub, open_hub

Frame = dict[str, Any]


class Order(BaseModel):
    what: str = Field(description="the article")
    count: int = 1
    pace: Literal["fast", "slow"] = "fast"
    tags: list[str] = []
    gift: bool = False


@agent("shop", input=Order)
async def shop(order: Order, emit: Emitter) -> dict[str, Any]:
    await emit.send(Status(message=f"looking for {order.what}"))
    await emit.send(MessageStart(message="m", span="s", field="answer"))
    await emit.send(Token(message="m", delta="here you "))
    await emit.send(Token(message="m", delta="are"))
    await emit.send(MessageEnd(message="m", text="here you are"))
    return {"answer": "here you are", "order": order.model_dump()}


@agent("broken")
async def broken(_: Any, emit: Emitter) -> None:
    raise ValueError("out of order")


@agent("endless")
async def endless(_: Any, emit: Emitter) -> None:
    await anyio.sleep_forever()


@dataclass
class Finished:
    code: int
    out: str
    err: str

    @property
    def frames(self) -> list[Frame]:
        return [json.loads(line) for line in self.out.splitlines()]


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AGENTCAST_")}
    return {**kept, "NO_COLOR": "1", "COLUMNS": "100", **variables}


async def agentcast(*args: str, stdin: str | None = None, **variables: str) -> Finished:
    """Run a command to its end."""
    with anyio.fail_after(45):
        done = await run_agentcast(*args, env=environment(**variables), input=stdin or "")
    return Finished(done.returncode, done.stdout, done.stderr)


class Running:
    """A command that runs with `--json`: its frames as they come."""

    def __init__(self, process: Process) -> None:
        assert process.stdout is not None
        self.process = process
        self.frames: list[Frame] = []
        self._lines = BufferedByteReceiveStream(process.stdout)

    async def until(self, wanted: str) -> Frame:
        """The next frame of this type, or the next event of this name."""
        with anyio.fail_after(30):
            while True:
                frame = json.loads(await self._lines.receive_until(b"\n", 1_000_000))
                self.frames.append(frame)
                if wanted in (frame["type"], frame.get("event")):
                    return frame  # type: ignore[no-any-return]

    async def code(self) -> int:
        """Its exit code, once it has printed all that it has to say."""
        with anyio.fail_after(30):
            try:
                while True:
                    self.frames.append(json.loads(await self._lines.receive_until(b"\n", 1_000_000)))
            except (anyio.EndOfStream, anyio.IncompleteRead):
                return await self.process.wait()


@asynccontextmanager
async def running(url: str, *args: str) -> AsyncIterator[Running]:
    async with await open_agentcast("run", *args, "--json", "--url", url, env=environment(), stderr=2) as process:
        try:
            yield Running(process)
        finally:
            if process.returncode is None:
                process.kill()


def events(frames: list[Frame]) -> list[str]:
    return [frame["event"] for frame in frames if frame["type"] == "event"]


@pytest.fixture
async def hub() -> AsyncIterator[RunningHub]:
    async with open_hub(shop, broken, endless) as hub:
        yield hub


# -- agents --------------------------------------------------------------------------------------------------------


async def test_agents_shows_names_descriptions_and_what_they_take(hub: RunningHub) -> None:
    done = await agentcast("agents", "--url", hub.url)
    assert done.code == 0, done.err
    words = " ".join(done.out.split())
    assert f"3 agents at {hub.url}" in words
    assert "shop shop of a test" in words
    assert "what string required the article" in words
    assert "count integer default 1" in words
    assert "pace fast | slow default" in words
    assert "tags list of string" in words
    assert "\x1b" not in done.out


async def test_agents_as_json_is_what_the_hub_says(hub: RunningHub) -> None:
    done = await agentcast("agents", "--json", AGENTCAST_URL=hub.url)
    async with hub.http() as http:
        assert json.loads(done.out) == (await http.get("/v1/agents")).json()


@pytest.mark.parametrize("command", [["agents"], ["run", "shop", "what=tea"]])
async def test_without_a_hub_the_url_and_the_remedy_are_named(command: list[str], free_tcp_port: int) -> None:
    url = f"http://127.0.0.1:{free_tcp_port}"
    done = await agentcast(*command, "--url", url)
    assert (done.code, done.out) == (4, "")
    assert f"no hub answers at {url}: connection refused" in done.err
    assert "agentcast serve" in done.err


async def test_a_server_that_is_no_hub_is_reported_as_such(free_tcp_port: int) -> None:
    async def hello(connection: ServerConnection, request: Request) -> Response:
        return connection.respond(200, "welcome\n")

    async with serve(_unused, "127.0.0.1", free_tcp_port, process_request=hello):
        done = await agentcast("agents", "--url", f"127.0.0.1:{free_tcp_port}")
    assert done.code == 4
    assert "no agentcast hub" in done.err


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "http://127.0.0.1:port", "http://"])
async def test_a_wrong_url_is_wrong_usage(url: str) -> None:
    done = await agentcast("agents", "--url", url)
    assert done.code == 2
    assert url in done.err


async def test_a_hub_that_refuses_says_why(hub: RunningHub) -> None:
    done = await agentcast("agents", "--url", f"http://foreign.localhost:{hub.port}")
    assert done.code == 4
    assert "refused" in done.err or "no hub answers" in done.err


# -- run -----------------------------------------------------------------------------------------------------------


async def test_run_shows_steps_texts_and_the_result_in_plain_lines(hub: RunningHub) -> None:
    values = ["what=green tea", "count=2", "pace=slow", 'tags=["a"]', "gift=true"]
    done = await agentcast("run", "shop", *values, "--url", hub.url)
    assert (done.code, done.err) == (0, "")
    lines = [line.strip() for line in done.out.splitlines()]
    assert lines[0].startswith("run ")
    assert lines[1:3] == ["· looking for green tea", "answer: here you are"]
    assert done.out.count("here you are") == 1, "a text that was shown is not repeated in the result"
    assert '"what": "green tea"' in lines[lines.index("{") + 1]
    assert '"count": 2,' in lines
    assert '"gift": true' in lines
    assert lines[-1].startswith("✓ done in ")


async def test_at_detail_progress_the_texts_are_still_shown(hub: RunningHub) -> None:
    done = await agentcast("run", "shop", "what=tea", "--detail", "progress", "--url", hub.url)
    assert done.code == 0, done.err
    assert "here you are" in done.out


async def test_a_failed_run_exits_with_1_and_says_why(hub: RunningHub, log: Any) -> None:
    log.expect("broken failed")
    done = await agentcast("run", "broken", "--url", hub.url)
    assert done.code == 1
    assert "out of order" in done.out.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "messages"),
    [
        (["nobody"], ["no agent 'nobody'", "known are: shop, broken, endless"]),
        (["shop"], ["what: it is required"]),
        (["shop", "tea"], ["'tea' is no key=value", "what (string, required)"]),
        (["shop", "what=a", "what=b"], ["what: it is given twice"]),
        (["shop", "what=tea", "size=1"], ["size: there is no such field", "count (integer)"]),
        (["shop", "what=tea", "count=two"], ["count: expected a whole number such as 5, got 'two'"]),
        (["shop", "what=tea", "pace=warp"], ["pace: expected one of fast, slow"]),
        (["shop", "what=tea", "gift=1"], ["gift: expected true or false"]),
        (["shop", "what=tea", "tags=a"], ['tags: expected a JSON list such as ["a", "b"]']),
        (["shop", "what=tea", "tags=[1]"], ["tags.0", "valid string"]),
        (["shop", "--input", "{"], ["--input is no JSON"]),
        (["shop", "--input", "[]"], ["one JSON object"]),
        (["shop", "--input", "@missing.json"], ["missing.json", "No such file"]),
        (["shop", "what=tea", "--detail", "all"], ["--detail"]),
    ],
)
async def test_wrong_input_exits_with_2_and_names_field_and_form(
    hub: RunningHub, args: list[str], messages: list[str]
) -> None:
    done = await agentcast("run", *args, "--url", hub.url)
    assert (done.code, done.out) == (2, "")
    for message in messages:
        assert message in done.err


async def test_input_that_is_too_big_is_not_even_sent(hub: RunningHub) -> None:
    done = await agentcast("run", "shop", "--input", "-", "--url", hub.url, stdin=json.dumps({"what": "x" * 300_000}))
    assert done.code == 2
    assert "262,144" in done.err


async def test_input_comes_from_a_file_or_stdin_and_values_win_over_it(hub: RunningHub, tmp_path: Path) -> None:
    document = json.dumps({"what": "tea", "count": 3})
    (tmp_path / "order.json").write_text(document)
    for source, stdin in ((f"@{tmp_path / 'order.json'}", None), ("-", document), (document, None)):
        done = await agentcast("run", "shop", "count=4", "--json", "--input", source, "--url", hub.url, stdin=stdin)
        assert done.frames[-1]["result"]["order"]["what"] == "tea"
        assert done.frames[-1]["result"]["order"]["count"] == 4


async def test_json_prints_the_frames_and_nothing_else(hub: RunningHub) -> None:
    done = await agentcast("run", "shop", "what=tea", "--json", "--url", hub.url)
    assert (done.code, done.err) == (0, "")
    hello, reply, *frames = done.frames
    assert (hello["type"], reply["type"]) == ("hello", "reply")
    page = await hub.core.bus.read(reply["result"]["run"], reply["result"]["epoch"], 0)
    assert page is not None
    assert done.out.splitlines()[2:] == [frame.data.decode() for frame in page.frames]
    assert frames[-1]["event"] == "run_end"


async def test_the_same_key_gives_the_same_run_and_another_input_a_conflict(hub: RunningHub) -> None:
    runs = set()
    for _ in range(2):
        done = await agentcast("run", "shop", "what=tea", "--key", "k", "--json", "--url", hub.url)
        runs.add(done.frames[-1]["run"])
    assert len(runs) == 1
    done = await agentcast("run", "shop", "what=coffee", "--key", "k", "--url", hub.url)
    assert done.code == 2
    assert "key" in done.err


async def test_the_thread_is_passed_on(hub: RunningHub) -> None:
    done = await agentcast("run", "shop", "what=tea", "--thread", "t1", "--json", "--url", hub.url)
    assert done.frames[2]["thread"] == "t1"


async def test_a_reader_that_has_enough_ends_the_command_quietly(capfd: pytest.CaptureFixture[str]) -> None:
    enough = anyio.Event()

    @agent("talker")
    async def talker(_: Any, emit: Emitter) -> None:
        await enough.wait()
        await emit.send(Status(message="still here"))
        await anyio.sleep_forever()

    ours, theirs = os.pipe()
    async with open_hub(talker) as other:
        command = ["run", "talker", "--url", other.url]
        async with await open_agentcast(*command, env=environment(), stdout=theirs, stderr=2) as process:
            os.close(theirs)
            await _read_until(ours, b"run ")
            os.close(ours)
            enough.set()
            with anyio.fail_after(30):
                assert await process.wait() == 1
    assert capfd.readouterr().err == ""


async def test_a_terminal_shows_tokens_as_they_come() -> None:
    go_on = anyio.Event()

    @agent("slow")
    async def slow(_: Any, emit: Emitter) -> str:
        await emit.send(MessageStart(message="m", span="s", field="answer"))
        await emit.send(Token(message="m", delta="half of \x1b[2Jit"))
        await go_on.wait()
        await emit.send(MessageEnd(message="m", text="half of \x1b[2Jit, and the rest"))
        return "all"

    ours, theirs = pty.openpty()
    try:
        async with open_hub(slow) as hub:
            command = ["run", "slow", "--url", hub.url]
            env = environment(TERM="xterm")
            del env["NO_COLOR"]
            async with await open_agentcast(*command, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
                os.close(theirs)
                shown = await _read_until(ours, b"half of [2Jit")
                go_on.set()
                shown += await _read_until(ours, b"done in")
                with anyio.fail_after(30):
                    assert await process.wait() == 0
    finally:
        os.close(ours)
    assert b"Ctrl-C cancels" in shown
    assert b"\x1b[2J" not in shown, "what a run says must not steer the terminal"
    assert b"and the rest" in shown


# -- Ctrl-C --------------------------------------------------------------------------------------------------------


async def test_ctrl_c_cancels_the_run_and_waits_for_its_end(hub: RunningHub) -> None:
    async with running(hub.url, "endless") as command:
        await command.until("run_start")
        command.process.send_signal(signal.SIGINT)
        assert await command.code() == 3
    assert events(command.frames)[-2:] == ["cancel_requested", "run_cancelled"]


async def test_a_second_ctrl_c_leaves_at_once_and_the_run_ends_without_us() -> None:
    cleaned_up = anyio.Event()

    @agent("careful")
    async def careful(_: Any, emit: Emitter) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await cleaned_up.wait()

    async with open_hub(careful, cancel_grace=10.0) as hub, running(hub.url, "careful") as command:
        run = (await command.until("run_start"))["run"]
        command.process.send_signal(signal.SIGINT)
        await command.until("cancel_requested")
        command.process.send_signal(signal.SIGINT)
        assert await command.code() == 130
        assert "run_cancelled" not in events(command.frames)
        async with hub.client() as client:
            await client.ask("subscribe", to={"run": run})
            cleaned_up.set()
            await client.end(run)


# -- Reconnecting --------------------------------------------------------------------------------------------------


async def test_a_dropped_connection_is_replaced_without_losing_or_repeating_an_event() -> None:
    steps = [anyio.Event() for _ in range(3)]

    @agent("stepper")
    async def stepper(_: Any, emit: Emitter) -> str:
        for number, step in enumerate(steps):
            await emit.send(Status(message=f"step {number}"))
            await step.wait()
            await emit.send(Status(message=f"after {number}"))
        return "done"

    async with open_hub(stepper) as hub, running(hub.url, "stepper") as command:
        for step in steps:
            while (await command.until("status"))["message"].startswith("after"):
                pass
            for connection in list(hub.core.connections._open):
                connection._writer.abort()
            step.set()  # while nobody is connected, as a rule
        assert await command.code() == 0
    log = [frame for frame in command.frames if frame["type"] == "event"]
    assert [event["seq"] for event in log] == list(range(1, len(log) + 1))
    assert [event["message"] for event in log if event["event"] == "status"] == [
        f"{word} {number}" for number in range(3) for word in ("step", "after")
    ]
    assert sum(frame["type"] == "hello" for frame in command.frames) == 4
    assert all(frame["ok"] for frame in command.frames if frame["type"] == "reply")


Script = Callable[["Scripted", ServerConnection], Awaitable[None]]


@dataclass
class Scripted:
    """A hub that plays one script for each connection, in order. Then it is gone."""

    scripts: list[Script]
    commands: list[Frame] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def command(self, ws: ServerConnection, op: str) -> Frame:
        command: Frame = json.loads(await ws.recv())
        assert command["op"] == op, command
        self.commands.append(command)
        return command

    async def send(self, ws: ServerConnection, **frame: Any) -> None:
        await ws.send(json.dumps(frame))

    async def accept(self, ws: ServerConnection, op: str, **result: Any) -> None:
        command = await self.command(ws, op)
        await self.send(ws, type="reply", id=command["id"], ok=True, result=result)

    async def event(self, ws: ServerConnection, seq: int, event: str, **fields: Any) -> None:
        await self.send(
            ws, type="event", event=event, run="r", seq=seq, prev=seq - 1, ts=1.0, agent="a", duration=0.0, **fields
        )

    async def serve(self, ws: ServerConnection) -> None:
        await self.send(ws, type="hello", protocol=1, heartbeat=25, limits={"message_bytes": 1000})
        script = self.scripts.pop(0)
        await script(self, ws)
        ws.transport.abort()

    async def describe(self, ws: ServerConnection, request: Request) -> Response | None:
        if request.path != "/v1/agents":
            return None
        body = json.dumps({"agents": [{"name": "a", "input": {"properties": {}}}]}).encode()
        headers = Headers({"Content-Length": str(len(body)), "Connection": "close"})
        return Response(200, "OK", headers, body)


async def _unused(ws: ServerConnection) -> None:
    raise AssertionError


@asynccontextmanager
async def scripted(*scripts: Script) -> AsyncIterator[Scripted]:
    hub = Scripted(list(scripts))
    async with serve(hub.serve, "127.0.0.1", 0, process_request=hub.describe) as server:
        hub.port = next(iter(server.sockets)).getsockname()[1]
        yield hub


async def _end(hub: Scripted, ws: ServerConnection) -> None:
    await hub.accept(ws, "start", run="r", epoch="e")
    await hub.event(ws, 1, "run_queued", epoch="e", input={})
    await hub.event(ws, 2, "run_end", result=None)


async def test_a_start_whose_reply_was_lost_is_sent_again_under_the_same_key() -> None:
    async def lose_the_reply(hub: Scripted, ws: ServerConnection) -> None:
        await hub.command(ws, "start")

    async with scripted(lose_the_reply, _end) as hub:
        done = await agentcast("run", "a", "--url", hub.url)
    assert done.code == 0, done.err
    first, second = hub.commands
    assert first["key"] == second["key"]
    assert "the connection is lost" in done.out


async def test_a_start_that_the_hub_cannot_take_at_the_moment_is_tried_again() -> None:
    async def unavailable(hub: Scripted, ws: ServerConnection) -> None:
        command = await hub.command(ws, "start")
        error = {"code": "unavailable", "message": "shutting down", "retryable": True}
        await hub.send(ws, type="reply", id=command["id"], ok=False, error=error)

    async with scripted(unavailable, _end) as hub:
        done = await agentcast("run", "a", "--url", hub.url)
    assert done.code == 0, done.err


async def test_an_event_that_comes_twice_is_shown_once() -> None:
    async def repeat(hub: Scripted, ws: ServerConnection) -> None:
        await hub.accept(ws, "start", run="r", epoch="e")
        for seq in (1, 1, 2, 1, 2):
            fields = {"epoch": "e", "input": {}} if seq == 1 else {"message": "said once"}
            await hub.event(ws, seq, "run_queued" if seq == 1 else "status", **fields)
        await hub.event(ws, 3, "run_end", result=None)

    async with scripted(repeat) as hub:
        done = await agentcast("run", "a", "--url", hub.url)
    assert done.code == 0, done.err
    assert done.out.count("said once") == 1


async def test_a_hole_in_the_events_is_filled_from_the_last_position() -> None:
    async def skip_one(hub: Scripted, ws: ServerConnection) -> None:
        await hub.accept(ws, "start", run="r", epoch="e")
        await hub.event(ws, 1, "run_queued", epoch="e", input={})
        await hub.event(ws, 3, "run_end", result=None)

    async def go_on(hub: Scripted, ws: ServerConnection) -> None:
        await hub.accept(ws, "subscribe")
        await hub.event(ws, 2, "status", message="the missing one")
        await hub.event(ws, 3, "run_end", result=None)

    async with scripted(skip_one, go_on) as hub:
        done = await agentcast("run", "a", "--url", hub.url)
    assert done.code == 0, done.err
    assert hub.commands[1]["since"] == {"r": {"epoch": "e", "seq": 1}}
    assert "the missing one" in done.out


async def test_a_snapshot_replaces_what_was_known_and_may_be_the_end() -> None:
    state = {"run": "r", "agent": "a", "status": "done", "input": {}, "created": 1.0, "ended": 3.0, "spans": []}
    text = {"message": "m", "span": "s", "field": "answer", "text": "from afar", "status": "done"}
    state |= {"messages": [text], "validation_errors": [], "state": {}, "result": {"answer": "from afar"}}

    async def snapshot(hub: Scripted, ws: ServerConnection) -> None:
        await hub.accept(ws, "start", run="r", epoch="e")
        await hub.send(ws, type="gap", run="r", **{"from": 1, "to": 9}, reason="trimmed")
        await hub.send(ws, type="snapshot", run="r", epoch="e", seq=9, state=state)

    async with scripted(snapshot) as hub:
        done = await agentcast("run", "a", "--url", hub.url)
    assert done.code == 0, done.err
    assert "events 1–9 were skipped (trimmed)" in done.out
    assert done.out.count("from afar") == 1


@pytest.mark.parametrize("code", [4503, 4504, 4999, 1003, 1008, 1009])
async def test_after_a_final_close_code_nobody_comes_back(code: int) -> None:
    async def close(hub: Scripted, ws: ServerConnection) -> None:
        await hub.accept(ws, "start", run="r", epoch="e")
        await ws.close(code, "go away")

    async with scripted(close) as hub:
        done = await agentcast("run", "a", "--url", hub.url)
    assert done.code == 1
    assert f"{code} go away" in done.err


@pytest.mark.parametrize("code", [1001, 1011, 1012, 4001, 4002])
async def test_after_any_other_close_code_the_run_goes_on(code: int) -> None:
    async def close(hub: Scripted, ws: ServerConnection) -> None:
        await hub.accept(ws, "start", run="r", epoch="e")
        await ws.close(code, "come back")

    async def go_on(hub: Scripted, ws: ServerConnection) -> None:
        await hub.accept(ws, "subscribe")
        await hub.event(ws, 1, "run_end", result=None)

    async with scripted(close, go_on) as hub:
        done = await agentcast("run", "a", "--json", "--url", hub.url)
    assert done.code == 0, done.err


async def test_a_hub_that_stays_away_is_given_up_after_the_patience() -> None:
    left = anyio.Event()

    async def leave(hub: Scripted, ws: ServerConnection) -> None:
        await hub.accept(ws, "start", run="r", epoch="e")
        left.set()

    hub = Scripted([leave])
    async with anyio.create_task_group() as tasks, running_server(hub) as stop:

        async def close() -> None:
            await left.wait()
            stop()

        tasks.start_soon(close)
        done = await agentcast("run", "a", "--patience", "1", "--url", hub.url)
    assert done.code == 4
    assert "gave up after 1 s" in done.err
    assert "run r may go on there" in done.err


async def test_a_run_that_the_hub_has_lost_is_a_failure() -> None:
    async def drop(hub: Scripted, ws: ServerConnection) -> None:
        await hub.accept(ws, "start", run="r", epoch="e")

    async def restarted(hub: Scripted, ws: ServerConnection) -> None:
        command = await hub.command(ws, "subscribe")
        error = {"code": "not_found", "message": "there is no run 'r'", "retryable": False}
        await hub.send(ws, type="reply", id=command["id"], ok=False, error=error)
        await ws.wait_closed()

    async with scripted(drop, restarted) as hub:
        done = await agentcast("run", "a", "--url", hub.url)
    assert done.code == 1
    assert "the hub has lost run r" in done.err


async def test_a_cancel_asked_for_while_disconnected_is_sent_with_the_next_connection() -> None:
    asked = anyio.Event()

    async def drop(hub: Scripted, ws: ServerConnection) -> None:
        await hub.accept(ws, "start", run="r", epoch="e")
        await hub.event(ws, 1, "run_start", worker="w", attempt=1)
        await asked.wait()

    async def cancel(hub: Scripted, ws: ServerConnection) -> None:
        await hub.accept(ws, "subscribe")
        await hub.accept(ws, "cancel")
        await hub.event(ws, 2, "run_cancelled")

    async with scripted(drop, cancel) as hub, running(hub.url, "a") as command:
        await command.until("run_start")
        command.process.send_signal(signal.SIGINT)
        asked.set()
        assert await command.code() == 3


# -- serve, help ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--agents", "no_such_package:registry"], "no_such_package"),
        (["--log-level", "loud"], "loud"),
        (["--port", "99999"], "port"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
    ],
)
async def test_a_hub_that_cannot_start_says_why(args: list[str], message: str) -> None:
    done = await agentcast("serve", *args)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert "Traceback" not in done.err


async def test_a_port_that_is_taken_is_named(hub: RunningHub) -> None:
    done = await agentcast("serve", "--port", str(hub.port))
    assert done.code == 2
    assert f"cannot listen on 127.0.0.1:{hub.port}" in done.err


@pytest.mark.parametrize("command", ["serve", "agents", "run"])
async def test_help_has_examples(command: str) -> None:
    done = await agentcast(command, "--help")
    assert done.code == 0
    assert f"agentcast {command}" in done.out


async def test_help_of_run_lists_the_exit_codes() -> None:
    done = await agentcast("run", "--help")
    for code in ("0: the run is done", "1: it failed", "2: wrong", "3: it was cancelled", "4: no hub"):
        assert code in done.out


# -- Helpers -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def running_server(hub: Scripted) -> AsyncIterator[Callable[[], None]]:
    """Serve `hub`; what it gives stops that for good."""
    async with serve(hub.serve, "127.0.0.1", 0, process_request=hub.describe) as server:
        hub.port = next(iter(server.sockets)).getsockname()[1]
        yield server.close


async def _read_until(descriptor: int, text: bytes) -> bytes:
    """What comes out of a terminal, up to `text`."""
    shown = b""
    with anyio.fail_after(30):
        while text not in shown:
            await anyio.wait_readable(descriptor)
            shown += os.read(descriptor, 65_536)
    return shown
