"""The stream of a program: each event's exact keys, how it ends, and that leaving it stops what runs."""

import gc
import threading
from collections.abc import Callable
from typing import Any

import anyio
import dspy
import pytest
from pydantic import BaseModel, Field

from agentcast.agents.channel import HIGH_WATER
from agentcast.agents.transpiler import AgentTranspiler
from tests.support.graphs import Empty, Script, Text, Topic, events_of, graph_of, node, of, outline, program_of
from tests.support.lms import chat, lm_of

pytestmark = pytest.mark.anyio

KEYS = {
    "node_start": {"span", "node", "kind", "inputs"},
    "node_end": {"span", "node", "patch", "duration"},
    "validation_error": {"span", "node", "attempt", "max_retries", "error", "failed_fields"},
    "node_error": {"span", "node", "error", "duration"},
    "lm_start": {"span", "parent", "model"},
    "lm_end": {"span", "duration", "usage"},
    "tool_start": {"span", "parent", "tool", "args"},
    "tool_end": {"span", "tool", "duration", "result"},
    "message_start": {"message", "span", "field"},
    "token": {"message", "delta"},
    "message_end": {"message", "text"},
    "message_retracted": {"message", "reason"},
    "step_limit": {"max_steps", "message"},
    "finished": {"prediction", "metadata"},
    "error": {"node", "error"},
}


class Wide(BaseModel):
    topic: str
    unused: int
    more: list[str]


class Loud(BaseModel):
    text: str
    size: int = Field(le=5)


async def test_events_have_exactly_their_keys():
    def fail(given: Text) -> Any:
        raise ValueError("no")

    def look(name: str) -> str:
        """Look it up."""
        return name

    graph = graph_of(
        node("ask", Topic, Loud),
        node("act", Topic, Text, tools=[look]),
        node("again", Text, Empty, lambda _: {}),
        node("fail", Text, Text, fail),
        input_model=Wide,
        edges=[("ask", "act"), ("act", "again")],
        max_steps=4,
        on_loop_limit="return",
    )
    graph.add_conditional_edges("again", lambda _: 1, {1: "again", 2: "fail"})
    program = AgentTranspiler.compile(graph)
    finish = chat(next_thought="t", next_tool_name="finish", next_tool_args="{}")
    use = chat(next_thought="t", next_tool_name="look", next_tool_args='{"name": "x"}')
    acting = [use, finish, chat(reasoning="r", text="t")]
    script = Script(chat(text="x", size="9"), chat(text="x", size="1"), *acting, *[chat(text="x", size="1")], *acting)
    with script.use():
        events = await events_of(program.astream(topic="x", unused=1, more=[]))
        graph.routes.clear()
        graph.add_edge("again", "fail")
        events += await events_of(AgentTranspiler.compile(graph).astream(topic="x", unused=1, more=[]))
    seen = {event["event"] for event in events}
    assert seen == {*KEYS, "raised"}
    for event in events[:-1]:
        assert event.keys() == {"event", *KEYS[event["event"]]}, event
    start, end = of("node_start", events)[0], of("node_end", events)[0]
    assert (start["node"], start["kind"], start["inputs"]) == ("ask", "graph", {"topic": "x"})
    assert end["patch"] == {"text": "x", "size": 1}
    assert end["duration"] >= 0
    assert type(of("validation_error", events)[0]["failed_fields"]) is list
    assert of("error", events) == [{"event": "error", "node": "fail", "error": "no"}]
    assert events[-1]["exception"].args == ("no",)


async def test_events_are_no_aliases_of_the_state():
    program = program_of(*(node(name, Rows, Rows, rows) for name in ("a", "b", "c")), output=Rows)
    async for event in program.astream(rows=[[0]]):
        for name in ("inputs", "patch"):
            if name in event:
                event[name]["rows"][0].append("mine")
                event[name]["rows"].clear()
        if event["event"] == "finished":
            assert event["prediction"] == Rows(rows=[[0], [1], [2], [3]])


class Rows(BaseModel):
    rows: list[list[int]]


def rows(given: Rows) -> dict[str, Any]:
    return {"rows": [*given.rows, [len(given.rows)]]}


async def test_stream_of_a_program_that_cannot_start_is_an_error_too():
    events = await events_of(program_of(node("a", Topic, Text, lambda _: {})).astream())
    assert events[0] == {"event": "error", "error": "topic: Field required"}
    assert events[1]["event"] == "raised"
    events = await events_of(program_of(node("a", Topic, Text, lambda _: {})).astream(x=1))
    assert events[0] == {"event": "error", "error": "the program takes no 'x'; it takes topic"}


async def test_stream_that_has_ended_stays_so():
    stream = program_of(node("a", Topic, Text, lambda _: {"text": "x"})).astream(topic="x")
    assert [event["event"] for event in await events_of(stream)] == ["node_start", "node_end", "finished"]
    assert await events_of(stream) == []
    stream = program_of(node("a", Topic, Text, lambda _: {})).astream(topic="x")
    assert (await events_of(stream))[-1]["event"] == "raised"
    assert await events_of(stream) == []


async def test_slow_consumer_holds_the_run_back():
    """G5: bounded, whatever the program does."""
    steps = 0

    async def step(given: Topic) -> dict[str, Any]:
        nonlocal steps
        steps += 1
        return {}

    graph = graph_of(node("a", Topic, Empty, step), edges=[("a", "a")], max_steps=1_000, on_loop_limit="return")
    async with AgentTranspiler.compile(graph).astream(topic="x") as stream:
        await anext(stream)
        for _ in range(50):
            await anyio.wait_all_tasks_blocked()
        assert 0 < steps < HIGH_WATER + 10
        assert len(of("node_end", [event async for event in stream])) == 1_000


# -- Leaving -----------------------------------------------------------------------------------------------------------


class Hanging:
    """Something that hangs in each kind of node, and says so, and that it was cancelled."""

    def __init__(self) -> None:
        self.entered = anyio.Event()
        self.cancelled = anyio.Event()

    async def wait(self, *_: Any) -> Any:
        self.entered.set()
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            self.cancelled.set()
            raise

    def node(self, kind: str) -> Any:
        async def tool() -> str:
            """Hang."""
            return str(await self.wait())

        class Module(dspy.Module):  # type: ignore[misc]
            async def aforward(module, **_: Any) -> Any:
                return await self.wait()

        options: dict[str, dict[str, Any]] = {
            "function": {"fn": self.wait},
            "model": {},
            "tool": {"tools": [tool]},
            "module": {"module": Module()},
            "program": {"module": program_of(node("deep", Topic, Text, self.wait))},
        }
        return node("hang", Topic, Text, **options[kind])

    def script(self, kind: str) -> Script:
        if kind == "tool":
            return Script(chat(next_thought="t", next_tool_name="tool", next_tool_args="{}"))
        return Script(self.wait)


KINDS = ["function", "model", "tool", "module", "program"]


async def until_entered(stream: Any, hanging: Hanging) -> None:
    async with anyio.create_task_group() as group:

        async def take() -> None:
            async for _ in stream:
                pass

        group.start_soon(take)
        await hanging.entered.wait()
        group.cancel_scope.cancel()


@pytest.mark.parametrize("kind", KINDS)
async def test_cancelling_reaches_into_every_kind_of_node(kind: str):
    hanging = Hanging()
    program = program_of(hanging.node(kind))
    with hanging.script(kind).use(), anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: program.aforward(topic="x"))
            await hanging.entered.wait()
            group.cancel_scope.cancel()
        await hanging.cancelled.wait()


@pytest.mark.parametrize("kind", KINDS)
async def test_closing_the_stream_from_another_task_cancels_what_runs(kind: str):
    hanging = Hanging()
    with hanging.script(kind).use(), anyio.fail_after(10):
        stream = program_of(hanging.node(kind)).astream(topic="x")
        ended = anyio.Event()

        async def take() -> None:
            events = [event async for event in stream]
            assert outline(events, "node_start")[0] == ("node_start", "hang")
            ended.set()

        async with anyio.create_task_group() as group:
            group.start_soon(take)
            await hanging.entered.wait()
            await stream.aclose()
            await hanging.cancelled.wait()
            await ended.wait()


async def leave_by_break(stream: Any) -> None:
    async for event in stream:
        if event["event"] == "node_start":
            break


async def leave_by_exit(stream: Any) -> None:
    async with stream:
        await anext(stream)


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_exit])
async def test_leaving_the_stream_cancels_what_runs(leave: Callable[[Any], Any]):
    hanging = Hanging()
    with anyio.fail_after(10):
        await leave(program_of(hanging.node("function")).astream(topic="x"))
        gc.collect()
        await hanging.cancelled.wait()


async def test_waiting_for_an_event_can_be_cancelled():
    hanging = Hanging()
    with anyio.fail_after(10):
        await until_entered(program_of(hanging.node("function")).astream(topic="x"), hanging)
        await hanging.cancelled.wait()


async def test_sync_functions_do_not_block_the_loop():
    """G3"""
    go_on, started = threading.Event(), anyio.Event()
    token = anyio.lowlevel.current_token()

    def wait(given: Topic) -> dict[str, str]:
        anyio.from_thread.run_sync(started.set, token=token)
        go_on.wait()
        return {"text": "x"}

    program = program_of(node("wait", Topic, Text, wait), output=Text)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: program.aforward(topic="x"))
            await started.wait()
            go_on.set()


async def test_tokens_stream_as_they_come():
    arrived = anyio.Event()

    async def gate(number: int) -> None:
        if number == 3:
            await arrived.wait()

    program = program_of(node("ask", Topic, Text), output=Text)
    chunks = ["[[ ## text ## ]]\nfirst ", "second ", "third\n\n[[ ## completed ## ]]"]
    with dspy.context(lm=lm_of(lambda _: chunks, before_chunk=gate)), anyio.fail_after(10):
        async for event in program.astream(topic="x"):
            if event["event"] == "token":
                arrived.set()
            if event["event"] == "finished":
                assert event["prediction"].text == "first second third"
