"""Agents that misbehave end their own run, and nothing else (G3, G5, G6, G7, G9)."""

import sys
import threading
import time
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from pydantic import BaseModel, ValidationError

from agentcast.agents.base import Emitter, Stopped, ToolError
from agentcast.agents.events import MessageStart, NodeStart, Status, Token, ToolEnd, ToolStart
from tests.support.agents import Anything, FunctionAgent, agent
from tests.support.client import View
from tests.support.hub import open_hub
from tests.support.log import Log


@agent("healthy", timeout=30)
async def healthy(input: Anything, emit: Emitter) -> str:
    for number in range(30):
        await emit.send(Status(message=f"at {number}"))
        await anyio.sleep(0.001)
    return "healthy"


async def outcome(broken: FunctionAgent, **settings: Any) -> View:
    """What a client sees of a run of `broken`, while a healthy run goes on beside it, and another follows it."""
    async with open_hub(broken, healthy, **settings) as hub, hub.client() as client, hub.client() as other:
        beside = await other.start("healthy")
        await other.event("run_start", beside)
        run = await client.start(broken.spec.name)
        view = await client.view(run)
        seen = await other.view(beside)
        assert seen.document["result"] == "healthy"
        assert [event["seq"] for event in seen.events] == [*range(1, 34)]
        after = await other.view(await other.start("healthy"))
        assert after.document["status"] == "done"
        async with hub.http() as http:
            assert (await http.get(f"/v1/runs/{run}")).json()["state"] == view.document
            assert (await http.get("/readyz")).status_code == 200
        return view


class Inner(BaseModel):
    number: int


def _validation_error() -> ValidationError:
    try:
        Inner.model_validate({"number": "hunter2"})
    except ValidationError as error:
        return error
    raise AssertionError


RAISED: list[tuple[BaseException, str]] = [
    (ValueError("the date lies in the past"), "the date lies in the past"),
    (ToolError("no such document"), "no such document"),
    (ValueError(), "ValueError"),
    (RuntimeError("/srv/app/secret.py line 3"), "RuntimeError"),
    (KeyError("/etc/passwd"), "KeyError"),
    (FileNotFoundError(2, "No such file or directory", "/srv/private/file"), "No such file or directory"),
    (PermissionError(13, "Permission denied", "/srv/private/file"), "Permission denied"),
    (OSError("/srv/private/file"), "OSError"),
    (ExceptionGroup("/srv/private", [RuntimeError("/srv/private")]), "RuntimeError"),
    (_validation_error(), "number: Input should be a valid integer, unable to parse string as an integer"),
    (BaseException("/srv/private"), "BaseException"),
    (SystemExit(3), "SystemExit"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (GeneratorExit(), "GeneratorExit"),
    (StopAsyncIteration("/srv/private"), "StopAsyncIteration"),
    (RecursionError("/srv/private"), "RecursionError"),
    (MemoryError(), "MemoryError"),
]


async def test_what_an_agent_raises_ends_its_run_and_shows_only_public_text(log: Log) -> None:
    @agent("raising")
    async def raising(input: Anything, emit: Emitter) -> None:
        await emit.send(Status(message="about to fail"))
        raise RAISED[int(getattr(input, "which", 0))][0]

    log.expect("of agent raising failed")
    async with open_hub(raising, healthy) as hub, hub.client() as client, hub.client() as other:
        beside = await other.start("healthy")
        runs = [await client.start("raising", {"which": number}) for number in range(len(RAISED))]
        for run, (_, message) in zip(runs, RAISED, strict=True):
            view = await client.view(run)
            assert view.names == ["run_queued", "run_start", "status", "run_error"]
            assert view.document["status"] == "failed"
            assert view.document["error"] == {"code": "agent_error", "message": message, "retryable": False}
            for text in view.texts:
                assert "Traceback" not in text
                assert "/srv" not in text
                assert "/etc" not in text
                assert "hunter2" not in text
        assert (await other.view(beside)).document["result"] == "healthy"


async def test_what_a_task_of_an_agent_raises_ends_the_run_and_not_the_hub(log: Log) -> None:
    """`SystemExit` leaves the event loop: `test_process` has it."""

    @agent("spawning")
    async def spawning(input: Anything, emit: Emitter) -> None:
        async def child() -> None:
            await emit.send(Status(message="in the child"))
            raise RuntimeError("x")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)

    log.expect("of agent spawning failed")
    view = await outcome(spawning)
    assert view.document["status"] == "failed"
    assert view.document["error"]["code"] == "agent_error"


async def test_secrets_of_the_environment_are_redacted(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-very-secret-value")

    @agent("leaking")
    async def leaking(input: Anything, emit: Emitter) -> None:
        raise ValueError("cannot log in with sk-very-secret-value")

    log.expect("of agent leaking failed")
    view = await outcome(leaking)
    assert view.document["error"]["message"] == "cannot log in with [redacted]"


async def test_what_is_open_when_an_agent_fails_is_closed_as_failed(log: Log) -> None:
    @agent("breaking")
    async def breaking(input: Anything, emit: Emitter) -> None:
        await emit.send(NodeStart(span="n", node="n", kind="agent"))
        await emit.send(MessageStart(message="m", span="n", field="answer"))
        await emit.send(Token(message="m", delta="half a "))
        raise ValueError("broken")

    log.expect("of agent breaking failed")
    view = await outcome(breaking)
    assert view.document["spans"][0]["status"] == "error"
    assert view.document["messages"][0] | {"text": "half a ", "status": "error"} == view.document["messages"][0]


# -- Time ----------------------------------------------------------------------------------------------------------


async def test_an_agent_that_hangs_is_ended_by_its_timeout() -> None:
    @agent("hanging", timeout=0.3)
    async def hanging(input: Anything, emit: Emitter) -> None:
        await anyio.sleep_forever()

    view = await outcome(hanging)
    error = view.document["error"]
    assert (error["code"], error["retryable"]) == ("timeout", True)
    assert "0.3 s" in error["message"]
    assert 0.3 <= view.events[-1]["duration"] < 2


async def test_an_agent_may_clean_up_after_its_timeout() -> None:
    @agent("tidy", timeout=0.2)
    async def tidy(input: Anything, emit: Emitter) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0.05)
            await emit.send(Status(message="cleaned up"))

    view = await outcome(tidy)
    assert view.names[-2:] == ["status", "run_error"]
    assert view.document["error"]["code"] == "timeout"


async def test_an_agent_that_ignores_its_cancellation_is_left_behind_and_its_slot_is_free(log: Log) -> None:
    @agent("stubborn", timeout=30, max_concurrent=1)
    async def stubborn(input: Anything, emit: Emitter) -> str:
        if getattr(input, "polite", False):
            return "polite"
        while True:
            try:
                await anyio.sleep(0.02)
                await emit.send(Status(message="still here"))
            except BaseException:  # noqa: BLE001, S110 -- this is what is tested
                pass

    async with open_hub(stubborn, healthy, cancel_grace=0.3) as hub, hub.client() as client, hub.client() as other:
        beside = await other.start("healthy")
        run = await client.start("stubborn")
        waiting = await client.start("stubborn", {"polite": True})
        await client.event("status", run)
        await client.ask("cancel", run=run)
        view = await client.view(run)
        assert view.document["status"] == "cancelled"
        assert view.names[-1] == "run_cancelled"
        assert (await client.view(waiting)).document["result"] == "polite"
        assert (await other.view(beside)).document["status"] == "done"
        assert hub.core.runs.abandoned == 1
        assert any("ignored its cancellation" in line and run in line for line in log.lines)
        with anyio.move_on_after(0.3):  # longer than it sleeps: it would have gone on meanwhile
            await client.until(lambda frame: frame.get("run") == run)
            raise AssertionError("the run went on")


async def test_an_agent_stuck_in_a_thread_is_left_behind() -> None:
    release = threading.Event()

    @agent("stuck", timeout=0.2)
    async def stuck(input: Anything, emit: Emitter) -> None:
        await anyio.to_thread.run_sync(release.wait)

    try:
        view = await outcome(stuck, cancel_grace=0.2)
        assert view.document["error"]["code"] == "timeout"
    finally:
        release.set()


async def test_an_agent_that_blocks_the_loop_is_named_in_the_log(log: Log) -> None:
    @agent("blocking")
    async def blocking(input: Anything, emit: Emitter) -> str:
        await emit.send(Status(message="blocking"))
        await anyio.lowlevel.checkpoint()
        time.sleep(1.9)  # noqa: ASYNC251 -- this is what is tested
        return "done"

    log.expect("the event loop has been blocked")
    view = await outcome(blocking)
    assert view.document["status"] == "done"
    (line,) = [line for line in log.lines if "has been blocked" in line]
    assert f"run {view.run} of agent blocking" in line
    assert "time.sleep(1.9)" in line


async def test_a_task_of_an_agent_that_blocks_the_loop_is_named_by_its_own_name_and_where_it_stands(log: Log) -> None:
    @agent("spawning")
    async def spawning(input: Anything, emit: Emitter) -> str:
        async def child() -> None:
            await anyio.lowlevel.checkpoint()
            time.sleep(1.9)  # noqa: ASYNC251 -- this is what is tested

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child, name="the child")
        return "done"

    log.expect("the event loop has been blocked")
    assert (await outcome(spawning)).document["status"] == "done"
    (line,) = [line for line in log.lines if "has been blocked" in line]
    assert "by the task 'the child'" in line
    assert "time.sleep(1.9)" in line


async def test_a_queued_run_does_not_time_out_while_it_waits() -> None:
    @agent("slow", timeout=0.4, max_concurrent=1)
    async def slow(input: Anything, emit: Emitter) -> str:
        await anyio.sleep(0.3)
        return "done"

    async with open_hub(slow) as hub, hub.client() as client:
        runs = [await client.start("slow") for _ in range(3)]
        for run in runs:
            assert (await client.view(run)).document["status"] == "done"


# -- Size ----------------------------------------------------------------------------------------------------------


async def test_a_hundred_thousand_events_arrive_and_others_hardly_notice() -> None:
    @agent("chatty", timeout=60)
    async def chatty(input: Anything, emit: Emitter) -> int:
        for number in range(100_000):
            await emit.send(Status(message=f"{number}"))
        return 100_000

    async with open_hub(chatty, healthy) as hub, hub.client() as client, hub.client() as other:
        run = await client.start("chatty", subscribe=False)
        beside = await other.start("healthy")
        await other.end(beside)
        assert not (await hub.core.bus.info([run]))[run].status == "done", "the long run holds up the short one"
        assert [event["seq"] for event in other.memory.view(beside).events] == [*range(1, 34)]
        with anyio.fail_after(30):
            await client.ask("subscribe", to={"run": run})
            await client.end(run)
        view = client.memory.view(run)
        assert view.seq == 100_003
        assert view.document["status_message"] == "99999"
        assert view.document["result"] == 100_000


async def test_a_client_that_keeps_up_gets_a_long_run_whole() -> None:
    @agent("long", timeout=60)
    async def long(input: Anything, emit: Emitter) -> None:
        for number in range(5_000):
            await emit.send(Status(message=f"{number}"))
            if number % 50 == 0:
                await anyio.sleep(0.002)

    async with open_hub(long) as hub, hub.client() as client:
        view = await client.view(await client.start("long"))
        assert [event["seq"] for event in view.events] == [*range(1, 5_004)]


BIG = 50_000_000


@pytest.mark.parametrize(
    "make",
    [
        lambda: "x" * BIG,
        lambda: "é☃" * (BIG // 2),
        lambda: ["x" * 1_000] * (BIG // 1_000),
        lambda: {"a": {"b": [{"c": "x" * BIG}]}},
        lambda: {str(i): "x" * 100 for i in range(100_000)},
        lambda: [list(range(1_000)) for _ in range(1_000)],
        lambda: b"x" * BIG,
    ],
    ids=["text", "unicode", "list", "nested", "mapping", "numbers", "bytes"],
)
async def test_a_huge_result_is_cut_and_the_loop_goes_on(make: Any) -> None:
    huge = make()

    @agent("huge")
    async def returning(input: Anything, emit: Emitter) -> Any:
        await emit.send(ToolStart(span="t", tool="t", args={"value": huge}))
        await emit.send(ToolEnd(span="t", tool="t", duration=0.0, result=huge))
        return huge

    async with open_hub(returning) as hub, hub.client() as client:
        view = await client.view(await client.start("huge"))
        assert view.names == ["run_queued", "run_start", "tool_start", "tool_end", "run_end"]
        assert max(len(text) for text in view.texts) < 256 * 1024
        assert hub.core.watchdog.longest < 0.5


def _circular() -> Any:
    circular: list[Any] = []
    circular.append(circular)
    return circular


class _Hostile(dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError("/srv/private")


class _Exiting(dict[str, Any]):
    def items(self) -> Any:
        raise SystemExit("/srv/private")


ODD: dict[str, Any] = {
    "object": object(),
    "nan": float("nan"),
    "integer": 10**400,
    "keys": {1: "a", None: "b", (1, 2): "c"},
    "surrogate": "\ud800",
    "surrogates": {"\ud800": "\udfff"},
    "circular": _circular(),
    "none": None,
    "hostile": _Hostile(a=1),
    "exiting": _Exiting(a=1),
}


async def test_a_result_that_is_no_json_never_breaks_the_hub(log: Log) -> None:
    @agent("odd")
    async def odd(input: Anything, emit: Emitter) -> Any:
        return ODD[str(getattr(input, "which", ""))]

    log.expect("returned what cannot be shown")
    async with open_hub(odd) as hub, hub.client() as client:
        for which in ODD:
            view = await client.view(await client.start("odd", {"which": which}))
            if which in ("hostile", "exiting"):
                assert view.document["error"]["code"] == "invalid_result"
                assert "/srv" not in view.texts[-1]
            else:
                assert view.document["status"] == "done"
                assert "result" in view.document


async def test_a_storm_that_cannot_be_held_back_ends_as_overflow() -> None:
    @agent("storming")
    async def storming(input: Anything, emit: Emitter) -> None:
        while True:
            emit.nowait(Status(message="again"))

    view = await outcome(storming)
    assert view.document["error"]["code"] == "event_overflow"
    assert view.seq < 10_100


async def test_a_task_that_only_ever_emits_without_waiting_ends_as_overflow() -> None:
    """Only the agent's own coroutine can be held back where it does not wait."""

    @agent("storming")
    async def storming(input: Anything, emit: Emitter) -> None:
        async def child() -> None:
            for _ in range(20_000):
                emit.nowait(Status(message="again"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)

    view = await outcome(storming)
    assert view.document["error"] == {
        "code": "event_overflow",
        "message": "the agent emitted events faster than they could be recorded, without ever waiting",
        "retryable": False,
    }


async def test_a_storm_out_of_threads_is_held_back_and_loses_nothing() -> None:
    @agent("threaded", timeout=30)
    async def threaded(input: Anything, emit: Emitter) -> None:
        def work(name: str) -> None:
            for number in range(500):
                emit.nowait(Status(message=f"{name} {number}"))

        async with anyio.create_task_group() as tasks:
            for name in "abcd":
                tasks.start_soon(anyio.to_thread.run_sync, work, name)

    view = await outcome(threaded)
    assert view.document["status"] == "done"
    said = [event["message"] for event in view.events if event["event"] == "status"]
    for name in "abcd":
        assert [text for text in said if text.startswith(name)] == [f"{name} {number}" for number in range(500)]


async def test_an_agent_that_emits_after_its_end_harms_nobody() -> None:
    kept: list[Emitter] = []

    @agent("keeping")
    async def keeping(input: Anything, emit: Emitter) -> str:
        kept.append(emit)
        return "done"

    async with open_hub(keeping) as hub, hub.client() as client:
        run = await client.start("keeping")
        await client.end(run)
        with pytest.raises(Stopped):
            kept[0].nowait(Status(message="too late"))
        assert await client.quiet() == []


async def test_an_agent_that_cancels_itself_fails() -> None:
    import asyncio

    @agent("suicidal")
    async def suicidal(input: Anything, emit: Emitter) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await anyio.sleep_forever()

    view = await outcome(suicidal)
    assert view.document["error"] == {"code": "agent_error", "message": "the agent stopped itself", "retryable": False}


DEAF = """
import anyio
from agentcast.agents.channel import Channel
from agentcast.agents.execution import Execution

async def deaf():
    while True:
        try:
            started.set()
            await anyio.sleep_forever()
        except BaseException:
            pass

async def main():
    global started
    started = anyio.Event()
    execution = Execution(deaf(), Channel("deaf"))
    await started.wait()
    execution.abandon()
    await execution.done.wait()

anyio.run(main)
print("over")
"""


async def test_an_agent_that_swallows_everything_does_not_keep_the_interpreter_from_exiting() -> None:
    with anyio.fail_after(20):
        done = await anyio.run_process([sys.executable, "-c", DEAF], cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == b"over"
