"""ReAct agents: tools that block, fail or are called wrongly hurt neither the loop nor the run, and leak nothing."""

import functools
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import dspy
import pytest
from dspy.lm15 import Message, Request, Response, Usage
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError

from agentcast.agents.base import Stopped, ToolError
from agentcast.agents.context import status, within
from agentcast.agents.events import AgentEvent, Status, StepLimit, ToolEnd, ToolStart
from agentcast.agents.offline import offline_lm
from agentcast.agents.react import ReAct
from agentcast.agents.streaming import run_program
from agentcast.agents.threads import abandoned_threads, in_thread
from tests.support.lms import lm_of


class Heard:
    """An emitter that keeps what it is sent."""

    def __init__(self) -> None:
        self.events: list[AgentEvent] = []

    async def send(self, event: AgentEvent) -> None:
        self.events.append(event)

    def nowait(self, event: AgentEvent) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


class Script:
    """An engine that gives the replies it was made with, one after another, and keeps the prompts."""

    def __init__(self, *replies: str | Exception) -> None:
        self.replies = list(replies)
        self.prompts: list[str] = []

    async def complete(self, request: Request) -> Response:
        self.prompts.append("\n".join(message.text or "" for message in request.messages))
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return Response(
            id=None, model=request.model, message=Message.assistant(reply), finish_reason="stop", usage=Usage()
        )

    def lm(self) -> Any:
        return dspy.LM("script/lm", engine=_NoSync(), async_engine=self, cache=False, num_retries=0)


class _NoSync:
    def complete(self, request: Request) -> Response:
        raise NotImplementedError


def turn(thought: str, tool: str, args: Any) -> str:
    text = args if isinstance(args, str) else json.dumps(args)
    return (
        f"[[ ## next_thought ## ]]\n{thought}\n\n[[ ## next_tool_name ## ]]\n{tool}\n\n"
        f"[[ ## next_tool_args ## ]]\n{text}\n\n[[ ## completed ## ]]"
    )


ANSWER = "[[ ## reasoning ## ]]\nr\n\n[[ ## answer ## ]]\na\n\n[[ ## completed ## ]]"
FINISH = turn("done", "finish", {})


async def play(agent: Any, *replies: str | Exception) -> tuple[Any, Heard, Script]:
    """Run `agent` with scripted replies of the model; the last one, the answer, is added."""
    script, heard = Script(*replies, ANSWER), Heard()
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
    with dspy.context(lm=script.lm(), adapter=adapter), within(emitter=heard):
        outcome = await run_program(agent, {"question": "q"}, heard)
    return outcome.prediction, heard, script


def called(tool: Any, args: dict[str, Any]) -> Any:
    """What `ReAct` observes of `tool` outside of a run, when it is called."""
    with script_outside(tool, args):
        return ReAct("question -> answer", [tool])(question="q").trajectory["observation_0"]


async def outside(tool: Any, args: dict[str, Any]) -> Any:
    """What `ReAct` observes of `tool` outside of a run, when it is awaited."""
    with script_outside(tool, args):
        return (await ReAct("question -> answer", [tool]).acall(question="q")).trajectory["observation_0"]


def script_outside(tool: Any, args: dict[str, Any]) -> Any:
    name = (tool if isinstance(tool, dspy.Tool) else dspy.Tool(tool)).name
    replies = iter([turn("t", name, args), FINISH, ANSWER])
    return dspy.context(lm=lm_of(lambda _: next(replies)), adapter=dspy.ChatAdapter())


@pytest.fixture
def errors_in_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING)
    return caplog


# -- Failing tools -------------------------------------------------------------------------------------------------


class Refused(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ToolError("the index is empty"), "Tool look failed: the index is empty"),
        (ValueError("no such month"), "Tool look failed: no such month"),
        (OSError(2, "No such file or directory", "/etc/secret"), "Tool look failed: No such file or directory"),
        (Refused("at /srv/app.py with sk-123456"), "Tool look failed: Refused"),
        (TimeoutError(), "Tool look failed: TimeoutError"),
    ],
    ids=["tool error", "value error", "os error", "other", "timeout"],
)
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_tool_error_is_an_observation_without_traceback_and_an_error_in_the_stream(
    error: Exception, text: str, kind: str
):
    def look(query: str) -> str:
        raise error

    async def alook(query: str) -> str:
        raise error

    tool = dspy.Tool(look if kind == "sync" else alook, name="look")
    agent = ReAct("question -> answer", [tool])
    prediction, heard, script = await play(agent, turn("t", "look", {"query": "x"}), FINISH)
    assert prediction.trajectory["observation_0"] == text
    (end,) = heard.of(ToolEnd)
    assert end.tool == "look"
    assert end.error is not None
    assert f"Tool look failed: {end.error.message}" == text
    everything = "\n".join(script.prompts) + str([event.wire() for event in heard.events])
    for leak in ("Traceback", 'File "', __file__, "/etc/secret", "/srv", "sk-123456", "site-packages"):
        assert leak not in everything
    assert prediction.answer == "a"


def look(query: str, limit: int = 3, tags: list[int] | None = None) -> str:
    """Look it up."""
    return f"{query} {limit} {tags}"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"query": "x"}, "x 3 None"),
        ({"query": "x", "limit": 5, "tags": [1]}, "x 5 [1]"),
        ({}, "Tool look failed: missing a required argument: 'query'"),
        ({"query": 7}, "Tool look failed: Arg query is invalid: 7 is not of type 'string'"),
        ({"query": "x", "limit": "many"}, "Tool look failed: Arg limit is invalid: 'many' is not of type 'integer'"),
        ({"query": "x", "tags": ["a"]}, "Tool look failed: argument 'tags': Input should be a valid integer"),
        ({"question": "x"}, "Tool look failed: it has no argument 'question'; it takes query, limit, tags"),
        ({"self": "x"}, "Tool look failed: it has no argument 'self'; it takes query, limit, tags"),
        ({"instance": "x"}, "Tool look failed: it has no argument 'instance'; it takes query, limit, tags"),
    ],
)
async def test_wrong_arguments_are_named_to_the_model(args: dict[str, Any], text: str):
    prediction, _, _ = await play(ReAct("question -> answer", [look]), turn("t", "look", args), FINISH)
    assert prediction.trajectory["observation_0"].startswith(text)
    assert (await outside(look, args)).startswith(text)
    assert (await anyio.to_thread.run_sync(called, look, args)).startswith(text)


async def test_argument_may_be_called_as_the_first_parameter_of_a_method_is():
    def odd(self: str, instance: int) -> str:
        """Odd."""
        return f"{self} {instance}"

    args = {"self": "x", "instance": 3}
    prediction, heard, _ = await play(ReAct("question -> answer", [odd]), turn("t", "odd", args), FINISH)
    assert prediction.trajectory["observation_0"] == "x 3"
    assert [event.args for event in heard.events if isinstance(event, ToolStart)] == [args]


async def test_a_missing_argument_is_named_alike_by_all_versions_of_python():
    def compare(one: str, *, other: str, limit: int = 3, **options: Any) -> str:
        """Compare two."""
        return f"{one} {other} {limit} {options}"

    agent = ReAct("question -> answer", [compare])
    calls = [turn("t", "compare", args) for args in ({"one": "x"}, {"other": "y"}, {"one": "x", "other": "y"})]
    prediction, _, _ = await play(agent, *calls, FINISH)
    trajectory = prediction.trajectory
    assert trajectory["observation_0"] == "Tool compare failed: missing a required argument: 'other'"
    assert trajectory["observation_1"] == "Tool compare failed: missing a required argument: 'one'"
    assert trajectory["observation_2"] == "x y 3 {}"


async def test_unknown_tool_is_an_observation_that_names_the_tools():
    agent = ReAct("question -> answer", [look])
    prediction, heard, _ = await play(agent, turn("hm", "google", {"q": "x"}), FINISH)
    trajectory = prediction.trajectory
    assert (trajectory["thought_0"], trajectory["tool_name_0"]) == ("hm", "google")
    text = "there is no such tool; next_tool_name must be one of look, finish"
    assert trajectory["observation_0"] == f"Tool google failed: {text}"
    assert [event.tool for event in heard.of(ToolStart)] == ["google"]
    assert heard.of(ToolEnd)[0].error.message == text


async def test_unreadable_replies_are_observations_and_three_in_a_row_end_the_run():
    agent = ReAct("question -> answer", [look])
    bad_args = turn("t", "look", "[1, 2]")
    prediction, _, _ = await play(agent, bad_args, "I don't care", turn("t", "look", {"query": "x"}), FINISH)
    trajectory = prediction.trajectory
    assert trajectory["observation_0"] == "Your reply could not be read: next_tool_args must be a JSON object."
    assert trajectory["observation_1"] == "Your reply could not be read: next_tool_name must be one of look, finish."
    assert trajectory["observation_2"] == "x 3 None"
    with pytest.raises(AdapterParseError):
        await play(agent, bad_args, "no", "no")


def test_unreadable_replies_are_observations_from_sync_code_too():
    replies = iter([turn("t", "look", "[1, 2]"), turn("t", "google", {}), FINISH, ANSWER])
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
    with dspy.context(lm=lm_of(lambda _: next(replies)), adapter=adapter):
        trajectory = ReAct("question -> answer", [look])(question="q").trajectory
    assert trajectory["observation_0"] == "Your reply could not be read: next_tool_args must be a JSON object."
    text = "there is no such tool; next_tool_name must be one of look, finish"
    assert trajectory["observation_1"] == f"Tool google failed: {text}"
    assert trajectory["observation_2"] == "Completed."


async def test_finish_takes_whatever_the_model_gives_it_and_is_no_step():
    agent = ReAct("question -> answer", [look])
    prediction, heard, _ = await play(agent, turn("t", "finish", {"answer": "a", "self": 1}))
    assert prediction.trajectory["observation_0"] == "Completed."
    assert heard.of(ToolStart) == []


async def test_step_limit_is_reported_and_the_answer_comes_from_what_there_is():
    agent = ReAct("question -> answer", [look], max_iters=2)
    same = turn("t", "look", {"query": "x"})
    prediction, heard, _ = await play(agent, same, same)
    assert [event.max_steps for event in heard.of(StepLimit)] == [2]
    assert prediction.answer == "a"


async def test_full_context_ends_the_loop_not_the_run():
    class Full(ReAct):
        async def _async_call_with_potential_trajectory_truncation(self, module: Any, *args: Any, **inputs: Any):
            if module is self.react:
                raise ContextWindowExceededError(message="full")
            return await super()._async_call_with_potential_trajectory_truncation(module, *args, **inputs)

    prediction, _, _ = await play(Full("question -> answer", [look]))
    assert (prediction.answer, prediction.trajectory) == ("a", {})


async def test_results_are_bounded_plain_data():
    def big(kind: str) -> Any:
        """Give a lot."""
        return {"text": "x" * 500_000, "path": {Path("/srv")}, "list": list(range(300_000))}[kind]

    agent = ReAct("question -> answer", [big])
    moves = [turn("t", "big", {"kind": kind}) for kind in ("text", "path", "list")]
    prediction, _, script = await play(agent, *moves, FINISH)
    assert "[cut, 500000 characters in all]" in prediction.trajectory["observation_0"]
    assert "/srv" not in str(prediction.trajectory["observation_1"])
    assert prediction.trajectory["observation_2"]["truncated"] is True
    assert max(len(prompt) for prompt in script.prompts) < 80_000


# -- Threads -------------------------------------------------------------------------------------------------------


async def test_sync_tool_does_not_block_the_loop_and_carries_its_run():
    started, go_on = anyio.Event(), threading.Event()
    loop_thread = threading.get_ident()
    ran_in: list[int] = []
    loop_token = anyio.lowlevel.current_token()

    def wait(seconds: int) -> str:
        """Wait for the loop."""
        ran_in.append(threading.get_ident())
        status("waiting")
        anyio.from_thread.run_sync(started.set, token=loop_token)
        assert go_on.wait(5)
        return "waited"

    agent = ReAct("question -> answer", [wait])
    results: list[tuple[Any, Heard, Script]] = []

    async def run() -> None:
        results.append(await play(agent, turn("t", "wait", {"seconds": 1}), FINISH))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await started.wait()  # the loop turns while the tool is in the middle of its work
            go_on.set()
    prediction, heard, _ = results[0]
    assert prediction.trajectory["observation_0"] == "waited"
    assert ran_in[0] != loop_thread
    (sent,) = heard.of(Status)
    assert (sent.message, sent.span) == ("waiting", heard.of(ToolStart)[0].span)


async def test_sync_tool_does_not_block_the_loop_outside_of_runs_either():
    ran_in: list[int] = []

    def note(query: str) -> str:
        """Note the thread."""
        ran_in.append(threading.get_ident())
        return query

    assert await outside(note, {"query": "x"}) == "x"
    assert ran_in != [threading.get_ident()]


async def test_thread_that_outlives_its_run_is_named_counted_and_does_not_hold_a_place(
    errors_in_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("agentcast.agents.threads.MAX_THREADS", 1)
    started, go_on = anyio.Event(), threading.Event()
    loop_token = anyio.lowlevel.current_token()

    def stuck(query: str) -> str:
        """Never ends by itself."""
        anyio.from_thread.run_sync(started.set, token=loop_token)
        go_on.wait(10)
        return "late"

    agent = ReAct("question -> answer", [stuck])
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(play, agent, turn("t", "stuck", {"query": "x"}), FINISH)
            await started.wait()
            group.cancel_scope.cancel()
        assert abandoned_threads() == ["tool stuck"]
        assert "tool stuck did not return when its run was stopped" in errors_in_log.text
        assert await in_thread(lambda: "next", "other") == "next"  # the one place is free again
        thread = next(thread for thread in threading.enumerate() if thread.name == "tool stuck")
        assert thread.daemon
        go_on.set()
        thread.join(5)
    assert abandoned_threads() == []


async def test_threads_raise_what_was_raised_and_may_run_loops_of_their_own():
    def stop() -> None:
        raise Stopped

    async def one() -> int:
        return 1

    def iterate() -> None:
        raise StopIteration

    with pytest.raises(Stopped):
        await in_thread(stop, "stop")
    with pytest.raises(RuntimeError):  # as a coroutine that lets StopIteration out
        await in_thread(iterate, "iterate")
    assert await in_thread(lambda: anyio.run(one), "loop") == 1


async def test_stopped_in_a_tool_ends_the_program():
    def stop(query: str) -> str:
        """Stop."""
        raise Stopped

    with pytest.raises(Stopped):
        await play(ReAct("question -> answer", [stop]), turn("t", "stop", {"query": "x"}))


# -- As DSPy's own -------------------------------------------------------------------------------------------------

VALUES: list[Any] = ["text", " padded \n", "", "two\nlines", {"q": ["x", 1, None]}, ["a", "b\nc"], [], 3.5, None, True]


def test_prompts_are_those_of_dspy():
    ours, theirs = ReAct("question -> answer", [look]), dspy.ReAct("question -> answer", [look])
    assert ours.react.signature.instructions == theirs.react.signature.instructions
    trajectory: dict[str, Any] = {}
    with dspy.context(adapter=dspy.ChatAdapter()):
        assert ours._format_trajectory(trajectory) == theirs._format_trajectory(trajectory)
        for at, value in enumerate(VALUES):
            trajectory |= {f"thought_{at}": "t", f"tool_name_{at}": "look", f"tool_args_{at}": {"query": "ü"}}
            trajectory[f"observation_{at}"] = value
            assert ours._format_trajectory(trajectory) == theirs._format_trajectory(trajectory)
    with dspy.context(adapter=dspy.XMLAdapter()):
        assert ours._format_trajectory(trajectory) == theirs._format_trajectory(trajectory)


def test_works_from_sync_code_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AGENTCAST_OFFLINE_DELAY", "0")

    def search(query: str) -> str:
        """Search."""
        raise Refused("at /srv/app.py")

    with dspy.context(lm=offline_lm(), adapter=dspy.ChatAdapter()):
        result = ReAct("question -> answer", [search])(question="Where is it, the key?")
    assert result.trajectory["observation_0"] == "Tool search failed: Refused"


class Callable_:
    """Adds."""

    def __call__(self, a: int, b: int = 1) -> int:
        return a + b


async def alook(query: str) -> str:
    """Look it up, slowly."""
    return query


def tools() -> Iterator[tuple[Any, dict[str, Any], Any]]:
    yield look, {"query": "x"}, "x 3 None"
    yield alook, {"query": "x"}, "x"
    yield functools.partial(look, limit=9), {"query": "x"}, "x 9 None"
    yield dspy.Tool(lambda query: alook(query), name="lazy"), {"query": "x"}, "x"
    yield Callable_(), {"a": 2}, 3
    yield dspy.Tool(lambda **rest: sorted(rest), name="any"), {"b": 1, "a": 2}, ["a", "b"]


@pytest.mark.parametrize(
    ("tool", "args", "result"), list(tools()), ids=["sync", "async", "partial", "lazy", "object", "any"]
)
async def test_every_kind_of_tool_can_be_called(tool: Any, args: dict[str, Any], result: Any):
    assert await outside(tool, args) == result
    with dspy.context(allow_tool_async_sync_conversion=True):
        assert await anyio.to_thread.run_sync(called, tool, args) == result


def takes_callable(x: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        ([look, look], "there are two tools named 'look'"),
        ([dspy.Tool(look, name="finish")], "there are two tools named 'finish'"),
        (["look"], "a tool must be a function or a dspy.Tool, not str"),
        ([takes_callable], "takes_callable cannot be a tool"),
    ],
)
def test_unusable_tools_are_refused(tools: list[Any], problem: str):
    with pytest.raises(ValueError, match=problem):
        ReAct("question -> answer", tools)


def test_at_least_one_step():
    with pytest.raises(ValueError, match="max_iters is 0; it must be 1 or more"):
        ReAct("question -> answer", [look], max_iters=0)


def test_message_fields_are_the_texts_worth_reading():
    agent = ReAct("question -> answer, score: float, note: str", [look])
    assert set(agent.message_fields) == {"next_thought", "reasoning", "answer", "note"}
