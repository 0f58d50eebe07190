"""Programs that run: every kind of node and router, joins, conflicts, loops, failures, many runs at once."""

import asyncio
import operator
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, assert_type

import anyio
import dspy
import pytest
from dspy.utils.exceptions import LMRateLimitError
from pydantic import BaseModel, ValidationError

from agentcast.agents.graph import END, Graph, StatefulNode
from agentcast.agents.graph.errors import (
    ConflictError,
    InputError,
    NodeCancelled,
    NodeTimeout,
    OutputError,
    ResultError,
    RouteError,
    StepError,
    StepLimitError,
)
from agentcast.agents.registry import Registry
from agentcast.agents.streaming import streamify
from agentcast.agents.transpiler import AgentTranspiler, Program
from tests.support.graphs import Empty, Script, Text, Topic, events_of, graph_of, node, of, outline, program_of
from tests.support.lms import chat, lm_of

pytestmark = pytest.mark.anyio


class Count(BaseModel):
    n: int


class Notes(BaseModel):
    notes: Annotated[list[str], operator.add]


class Read(BaseModel):
    notes: list[str]


class Good(BaseModel):
    good: bool


def up(given: Count) -> dict[str, int]:
    return {"n": given.n + 1}


# -- The seed ----------------------------------------------------------------------------------------------------------


async def test_the_seed_works_as_written(capsys: pytest.CaptureFixture[str]):
    class Query(BaseModel):
        query: str

    class TargetSchema(BaseModel):
        solution: str
        confidence: float

    graph = Graph()
    graph.add_node(StatefulNode(name="solve", input_model=Query, output_model=TargetSchema))
    graph.add_edge("solve", "END")
    graph.set_entry_point("solve")

    program = AgentTranspiler.compile(graph, output_model=TargetSchema)

    async def handle_request(query_str: str) -> dict[str, Any]:
        result = await program.aforward(query=query_str)
        return {"status": "success", "data": result.model_dump()}

    script = Script(
        *[chat(solution="42", confidence="0.5")] * 2, chat(solution="42"), chat(solution="x", confidence="1")
    )
    with script.use():
        assert await handle_request("?") == {"status": "success", "data": {"solution": "42", "confidence": 0.5}}
        result = await program.aforward(query="...")
        print(result.solution)  # noqa: T201
        print(result.confidence)  # noqa: T201

        async for event in program.astream(query="Find details on topic X"):
            event_type = event["event"]
            node_name = event.get("node")

            if event_type == "node_start":
                print(f"[*] Starting execution of node: {node_name}")  # noqa: T201

            elif event_type == "node_end":
                print(f"[+] Completed node {node_name} with state patch: {event['patch']}")  # noqa: T201

            elif event_type == "validation_error":
                print(f"[!] Validation failed at {node_name}: {event['error']}")  # noqa: T201
    assert capsys.readouterr().out.splitlines() == [
        "42",
        "0.5",
        "[*] Starting execution of node: solve",
        "[!] Validation failed at solve: confidence: Field required",
        "[+] Completed node solve with state patch: {'solution': 'x', 'confidence': 1.0}",
    ]


# -- Results -----------------------------------------------------------------------------------------------------------


async def test_result_is_typed():
    program = AgentTranspiler.compile(graph_of(node("up", Count, Count, up)), output_model=Count)
    assert_type(program, Program[Count])
    result = await program.aforward(n=1)
    assert_type(result, Count)
    assert_type(await program.acall(n=1), Count)
    assert_type(program(n=1), Count)
    assert result == Count(n=2)
    with pytest.raises(AttributeError):
        _ = result.nothing  # type: ignore[attr-defined]


TYPED = """
from typing import Any, assert_type
from pydantic import BaseModel
from agentcast.agents.graph import Graph
from agentcast.agents.transpiler import AgentTranspiler

class Text(BaseModel):
    text: str

typed = AgentTranspiler.compile(Graph(), output_model=Text)
assert_type(typed(topic="x"), Text)

async def main() -> None:
    assert_type(await typed.aforward(topic="x"), Text)
    assert_type(await typed.acall(topic="x"), Text)
    assert_type(await AgentTranspiler.compile(Graph()).aforward(topic="x"), Any)
"""


def test_result_is_typed_for_those_who_have_installed_the_package(tmp_path: Path):
    (tmp_path / "mine.py").write_text(TYPED)
    command = [sys.executable, "-m", "mypy", "--strict", "mine.py"]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


async def test_result_without_a_model_is_a_prediction_of_what_nodes_set():
    program = program_of(
        node("up", Count, Count, up), node("say", Count, Text, lambda c: {"text": "x" * c.n}), edges=None
    )
    result = await program.aforward(n=1)
    assert isinstance(result, dspy.Prediction)
    assert dict(result.items()) == {"n": 2, "text": "xx"}


def test_called_from_synchronous_code():
    program = program_of(node("ask", Topic, Text), output=Text)
    with Script(chat(text="hi")).use():
        assert program(topic="x") == Text(text="hi")


async def test_called_synchronously_where_a_loop_runs():
    program = program_of(node("ask", Topic, Text), output=Text)
    with Script(chat(text="hi")).use():
        assert program(topic="x") == Text(text="hi")


async def test_result_that_the_state_does_not_make():
    program = AgentTranspiler.compile(graph_of(node("a", Count, Empty, lambda _: {})), output_model=Count)
    assert await program.aforward(n=1) == Count(n=1)

    class Small(BaseModel):
        n: Literal[1]

    program = program_of(node("up", Count, Count, up), output=Small)
    with pytest.raises(ResultError, match="the result is no Small: n: Input should be 1"):
        await program.aforward(n=1)


async def test_wrong_inputs_are_named():
    program = program_of(node("up", Count, Count, up))
    with pytest.raises(ValueError, match=r"the program takes no 'm', 'k'; it takes n$"):
        await program.aforward(m=1, k=2, n=1)
    with pytest.raises(ValidationError, match=r"n\n.*Field required"):
        await program.aforward()
    with pytest.raises(ValidationError, match="valid integer"):
        await program.aforward(n="many")


# -- Kinds of nodes ----------------------------------------------------------------------------------------------------


async def test_function_nodes_sync_async_and_callable_objects():
    threads = []

    def sync(given: Count) -> dict[str, int]:
        threads.append(threading.current_thread().name)
        assert isinstance(given, Count)
        return up(given)

    async def later(given: Count) -> Count:
        await anyio.lowlevel.checkpoint()
        return Count(n=given.n + 1)

    class Adder:
        async def __call__(self, given: Count) -> dict[str, int]:
            return up(given)

    async def inner(given: Count) -> dict[str, int]:
        return up(given)

    names = ["sync", "later", "adder", "wrapped"]
    functions: list[Callable[[Any], Any]] = [sync, later, Adder(), lambda given: inner(given)]
    program = program_of(
        *(node(name, Count, Count, fn) for name, fn in zip(names, functions, strict=True)), output=Count
    )
    assert await program.aforward(n=0) == Count(n=4)
    assert threads == ["node sync"]


def give(value: Any, _: Any) -> Any:
    return value


async def test_function_that_returns_something_else():
    for returned, problem in (
        (None, "Input should be a valid dictionary or instance of Count"),
        ({"n": "x"}, "n: Input should be a valid integer"),
        ({}, "n: Field required"),
        ({"n": 1, "m": 2}, "m: Extra inputs are not permitted"),
    ):
        with pytest.raises(OutputError, match=problem) as error:
            await program_of(node("a", Count, Count, partial(give, returned))).aforward(n=1)
        assert (error.value.node, error.value.attempts) == ("a", 1)


async def test_only_what_is_returned_is_set_and_defaults_where_there_is_nothing():
    class Two(BaseModel):
        a: int = 1
        b: int = 2

    program = program_of(
        node("one", Empty, Two, lambda _: {"a": 5}), node("two", Two, Two, lambda _: {"b": 6}), output=Two
    )
    events = await events_of(program.astream())
    assert [event["patch"] for event in of("node_end", events)] == [{"a": 5, "b": 2}, {"b": 6}]
    assert events[-1]["prediction"] == Two(a=5, b=6)


async def test_module_nodes_async_and_sync_ones():
    class Old(dspy.Module):  # type: ignore[misc]
        def forward(self, text: str) -> Any:
            assert threading.current_thread() is not threading.main_thread()
            return dspy.Prediction(text=f"{text}!", other=1)

    program = program_of(
        node("ask", Topic, Text, module=dspy.Predict("topic -> text")),
        node("old", Text, Text, module=Old()),
        node("cot", Text, Topic, module=dspy.ChainOfThought("text -> topic")),
        output=Topic,
    )
    with Script(chat(text="hi"), chat(reasoning="r", topic="end")).use():
        events = await events_of(program.astream(topic="x"))
    assert [event["patch"] for event in of("node_end", events) if event["node"] in ("ask", "old", "cot")] == [
        {"text": "hi"},
        {"text": "hi!"},
        {"topic": "end"},
    ]
    assert events[-1]["prediction"] == Topic(topic="end")


async def test_programs_inside_programs():
    inner = program_of(
        node("double", Count, Count, lambda c: {"n": c.n * 2}), node("up", Count, Count, up), output=Count
    )
    plain = program_of(node("triple", Count, Count, lambda c: {"n": c.n * 3}))
    program = program_of(node("a", Count, Count, module=inner), node("b", Count, Count, module=plain), output=Count)
    events = await events_of(program.astream(n=2))
    assert events[-1]["prediction"] == Count(n=15)
    assert outline(events, "node_start") == [("node_start", name) for name in ("a", "double", "up", "b", "triple")]
    spans = {event["node"]: event for event in of("node_start", events)}
    assert spans["double"]["parent"] == spans["up"]["parent"] == spans["a"]["span"]
    assert spans["triple"]["parent"] == spans["b"]["span"]
    assert "parent" not in spans["a"]


async def test_name_that_is_input_and_output_is_aliased_for_the_model():
    class Draft(BaseModel):
        draft: str
        current_draft: int

    class New(BaseModel):
        draft: str

    program = program_of(node("improve", Draft, New, instructions="Improve it."), output=New)
    script = Script(chat(draft="better"))
    with script.use():
        assert await program.aforward(draft="bad", current_draft=7) == New(draft="better")
    (signature,) = [predictor.signature for _, predictor in program.named_predictors()]
    assert list(signature.input_fields) == ["current_draft_", "current_draft"]
    assert list(signature.output_fields) == ["draft"]
    assert "[[ ## current_draft_ ## ]]\nbad" in script.prompts[0]


async def test_reasoning_comes_first_with_use_cot():
    program = program_of(node("ask", Topic, Text, use_cot=True), output=Text)
    script = Script(chat(reasoning="hm", text="hi"))
    with script.use():
        events = await events_of(program.astream(topic="x"))
    assert [event["field"] for event in of("message_start", events)] == ["reasoning", "text"]
    assert of("node_end", events)[0]["patch"] == {"text": "hi"}


# -- Parallel ----------------------------------------------------------------------------------------------------------


async def test_branches_run_in_parallel_and_join_once():
    both, joined = Meeting(2), []

    async def left(given: Topic) -> dict[str, list[str]]:
        await both.arrive()
        return {"notes": ["left"]}

    async def right(given: Topic) -> dict[str, list[str]]:
        await both.arrive()
        return {"notes": ["right"]}

    def join(given: Read) -> dict[str, str]:
        joined.append(given.notes)
        return {"text": " ".join(given.notes)}

    program = program_of(
        node("start", Topic, Empty, lambda _: {}),
        node("left", Topic, Notes, left),
        node("right", Topic, Notes, right),
        node("join", Read, Text, join),
        edges=[("start", "left"), ("start", "right"), ("left", "join"), ("right", "join")],
        output=Text,
    )
    with anyio.fail_after(10):
        assert await program.aforward(topic="x") == Text(text="left right")
    assert joined == [["left", "right"]]


class Meeting:
    """Lets its members go when all are there: they run at the same time."""

    def __init__(self, members: int) -> None:
        self._missing = members
        self._all = anyio.Event()

    async def arrive(self) -> None:
        self._missing -= 1
        if not self._missing:
            self._all.set()
        await self._all.wait()


@pytest.mark.parametrize("slow", ["left", "right"])
async def test_parallel_nodes_that_set_one_field_fail_whoever_is_first(slow: str):
    def branch(name: str) -> Callable[[Any], Any]:
        async def run(given: Topic) -> dict[str, str]:
            await anyio.sleep(0.02 if name == slow else 0)
            return {"text": name}

        return run

    program = program_of(
        node("start", Topic, Empty, lambda _: {}),
        node("left", Topic, Text, branch("left")),
        node("right", Topic, Text, branch("right")),
        edges=[("start", "left"), ("start", "right")],
    )
    with pytest.raises(ConflictError) as error:
        await program.aforward(topic="x")
    assert set(error.value.nodes) == {"left", "right"}
    assert error.value.node == slow
    assert "'text'" in str(error.value)


async def test_nodes_cannot_change_the_state_or_each_other():
    class Item(BaseModel):
        tags: list[str]

    class Items(BaseModel):
        items_: list[Item]
        extra: dict[str, list[int]]

    kept: list[Items] = []

    def vandal(given: Items) -> dict[str, Any]:
        kept.append(given)
        given.items_[0].tags.append("vandal")
        given.items_.clear()
        given.extra["x"].append(1)
        return {}

    def router(state: Any) -> str:
        state.items_[0].tags.append("router")
        state["extra"].clear()
        return "go"

    graph = graph_of(
        node("start", Items, Empty, vandal),
        node("left", Items, Empty, vandal),
        node("right", Items, Empty, vandal),
        node("end", Items, Text, lambda given: {"text": given.model_dump_json()}),
        edges=[("left", "end"), ("right", "end")],
    )
    graph.add_conditional_edges("start", router, {"go": "left"})
    graph.add_edge("start", "right")
    program = AgentTranspiler.compile(graph, output_model=Text)
    mine = Items(items_=[Item(tags=["a"])], extra={"x": []})
    result = await program.aforward(items_=mine.items_, extra=mine.extra)
    assert result.text == mine.model_dump_json() == '{"items_":[{"tags":["a"]}],"extra":{"x":[]}}'
    assert len(kept) == 3


# -- Routers -----------------------------------------------------------------------------------------------------------


class Kind(BaseModel):
    kind: Literal["x", "y"]


async def later(state: Any) -> str:
    await anyio.lowlevel.checkpoint()
    return str(state["topic"])


@pytest.mark.parametrize(
    "router",
    [
        lambda state: state.topic,
        later,
        lambda state: later(state),
        node("judge", Topic, Kind, lambda given: {"kind": given.topic}),
        node("judge", Topic, Kind),
    ],
    ids=["function", "coroutine", "function of a coroutine", "node", "model"],
)
@pytest.mark.parametrize(("topic", "goes"), [("x", "one"), ("y", None)])
async def test_routers(router: Any, topic: str, goes: str | None):
    graph = graph_of(
        node("start", Topic, Empty, lambda _: {}), node("one", Topic, Text, lambda _: {"text": "one"}), edges=[]
    )
    graph.add_conditional_edges("start", router, {"x": "one", "y": END})
    program = AgentTranspiler.compile(graph)
    with Script(forever=chat(kind=topic)).use():
        result = await program.aforward(topic=topic)
    assert result.toDict().get("text") == goes


async def test_router_that_chooses_several_runs_them_in_parallel():
    met = Meeting(2)

    async def meet(given: Topic) -> dict[str, Any]:
        await met.arrive()
        return {}

    graph = graph_of(*(node(name, Topic, Empty, meet) for name in ("a", "b")), edges=[])
    graph.add_node(node("start", Topic, Empty, lambda _: {}))
    graph.set_entry_point("start")
    graph.add_conditional_edges("start", lambda _: ["a", "b"], {"a": "a", "b": "b"})
    with anyio.fail_after(10):
        await AgentTranspiler.compile(graph).aforward(topic="x")


@pytest.mark.parametrize(("choice", "shown"), [("z", "'z'"), ({"a": 1}, "{'a': 1}"), (["x", None], "None")])
async def test_router_that_chooses_what_there_is_not(choice: Any, shown: str):
    graph = graph_of(node("start", Topic, Empty, lambda _: {}), edges=[])
    graph.add_conditional_edges("start", lambda _: choice, {"x": END, "y": END})
    with pytest.raises(RouteError, match="its router chose") as error:
        await AgentTranspiler.compile(graph).aforward(topic="x")
    assert error.value.node == "start"
    assert f"chose {shown}, which is none of 'x', 'y'" in str(error.value)


async def test_node_that_routes_and_returns_nothing_leaves_its_decision_as_it_was():
    class Decision(BaseModel):
        route: str = "on"

    given: list[dict[str, str]] = [{}, {"route": "back"}, {}, {"route": "on"}]
    router = node("judge", Topic, Decision, lambda _: given.pop(0))
    graph = graph_of(node("start", Topic, Empty, lambda _: {}), node("on", Topic, Empty, lambda _: {}), edges=[])
    graph.add_conditional_edges("start", router, {"on": "on", "back": "start"})
    graph.add_edge("on", "start")
    with pytest.raises(IndexError):  # it routes as long as there is something to return
        await AgentTranspiler.compile(graph).aforward(topic="x")
    assert given == []


async def test_what_a_router_chose_is_reported_without_its_representation():
    class Choice:
        def __repr__(self) -> str:
            return "the password"

    graph = graph_of(node("start", Topic, Empty, lambda _: {}), edges=[])
    for choice, shown in ((Choice(), "'<Choice>'"), ("y" * 100_000, "'yyy")):
        graph.routes.clear()
        graph.add_conditional_edges("start", partial(lambda choice, _: choice, choice), {"x": END})
        with pytest.raises(RouteError) as error:
            await AgentTranspiler.compile(graph).aforward(topic="x")
        assert f"its router chose {shown}" in str(error.value)
        assert len(str(error.value)) < 1_000


async def test_router_that_fails_fails_as_itself():
    graph = graph_of(node("start", Topic, Empty, lambda _: {}), edges=[])
    graph.add_conditional_edges("start", lambda state: state.nothing, {"x": END})
    with pytest.raises(AttributeError, match="the state has no field 'nothing' yet; it has topic"):
        await AgentTranspiler.compile(graph).aforward(topic="x")


# -- Loops -------------------------------------------------------------------------------------------------------------


def loop(**options: Any) -> Any:
    graph = graph_of(node("up", Count, Count, up), edges=[], **options)
    graph.add_conditional_edges("up", lambda state: state.n >= 10, {True: END, False: "up"})
    return AgentTranspiler.compile(graph, output_model=Count)


async def test_loop_ends_where_its_router_says():
    assert await loop().aforward(n=0) == Count(n=10)
    assert await loop(max_steps=10).aforward(n=0) == Count(n=10)


async def test_loop_limit_raises():
    events = await events_of(loop(max_steps=9).astream(n=0))
    assert events[-3] == {"event": "step_limit", "max_steps": 9, "message": "no end after 9 steps"}
    assert events[-2] == {"event": "error", "error": "no end after 9 steps"}
    assert isinstance(events[-1]["exception"], StepLimitError)
    with pytest.raises(StepLimitError, match="no end after 9 steps"):
        await loop(max_steps=9).aforward(n=0)


async def test_loop_limit_returns_what_there_is():
    events = await events_of(loop(max_steps=9, on_loop_limit="return").astream(n=0))
    assert events[-2] == {"event": "step_limit", "max_steps": 9, "message": "no end after 9 steps"}
    assert events[-1]["prediction"] == Count(n=9)
    assert events[-1]["metadata"] == {"steps": 9, "retries": 0}


async def test_loop_limit_lets_running_nodes_end_and_is_reported_once():
    go_on = anyio.Event()

    async def slow(given: Count) -> dict[str, str]:
        await go_on.wait()
        return {"text": "slow"}

    def loop(given: Count) -> dict[str, int]:
        return up(given)

    graph = graph_of(
        node("start", Count, Empty, lambda _: {}),
        node("loop", Count, Count, loop),
        node("slow", Count, Text, slow),
        node("after", Text, Empty, lambda _: {}),
        edges=[("start", "loop"), ("loop", "loop"), ("start", "slow"), ("slow", "after")],
        max_steps=5,
        on_loop_limit="return",
    )
    events = []
    with anyio.fail_after(10):
        async for event in AgentTranspiler.compile(graph).astream(n=0):
            events.append(event)
            if event["event"] == "step_limit":
                go_on.set()
    assert len(of("step_limit", events)) == 1
    assert events[-1]["prediction"].toDict() == {"n": 3, "text": "slow"}


async def test_default_limit_is_15_steps():
    with pytest.raises(StepLimitError, match="15 steps"):
        await loop().aforward(n=-10)


# -- Failing -----------------------------------------------------------------------------------------------------------


class Odd(Exception):
    __slots__ = ()


async def test_exceptions_arrive_as_themselves_and_say_where():
    error = KeyError("mine")

    def fail(given: Topic) -> Any:
        raise error

    program = program_of(node("a", Topic, Text, fail))
    with pytest.raises(KeyError) as raised:
        await program.aforward(topic="x")
    assert raised.value is error
    assert raised.value.node == "a"  # type: ignore[attr-defined]
    assert raised.value.__notes__ == ["in node 'a' of a graph"]
    with pytest.raises(KeyError) as raised:
        program(topic="x")
    assert raised.value is error


def test_exception_in_synchronous_code_brings_no_other_one():
    def fail(given: Topic) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError) as raised:
        program_of(node("a", Topic, Text, fail))(topic="x")
    assert raised.value.__context__ is None


async def test_exception_of_an_inner_program_names_the_inner_node():
    def fail(given: Topic) -> Any:
        raise ValueError("no")

    inner = program_of(node("deep", Topic, Text, fail))
    program = program_of(node("outer", Topic, Text, module=inner))
    events = await events_of(program.astream(topic="x"))
    assert events[-2] == {"event": "error", "node": "deep", "error": "no"}
    assert outline(events, "node_error") == [("node_error", "deep"), ("node_error", "outer")]


async def test_failing_branch_cancels_the_others_and_is_reported_once():
    cancelled = []
    waiting = anyio.Event()

    async def wait(given: Topic) -> Any:
        try:
            waiting.set()
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            cancelled.append("wait")
            raise

    async def fail(given: Topic) -> Any:
        await waiting.wait()
        raise OSError(5, "it broke", "/secret/path")

    program = program_of(
        node("start", Topic, Empty, lambda _: {}),
        node("wait", Topic, Text, wait),
        node("fail", Topic, Notes, fail),
        edges=[("start", "wait"), ("start", "fail")],
    )
    events = await events_of(program.astream(topic="x"))
    assert cancelled == ["wait"]
    errors = {event["node"]: event["error"] for event in of("node_error", events)}
    assert errors == {
        "fail": {"code": "error", "message": "it broke"},
        "wait": {"code": "cancelled", "message": "cancelled"},
    }
    assert of("error", events) == [{"event": "error", "node": "fail", "error": "it broke"}]
    assert isinstance(events[-1]["exception"], OSError)


async def test_state_that_does_not_fit_a_node_is_its_input_error():
    class Strict(BaseModel):
        text: Literal["a"]

    program = program_of(node("say", Topic, Text, lambda _: {"text": "b"}), node("strict", Strict, Empty, lambda _: {}))
    with pytest.raises(InputError, match="node 'strict': its input is wrong: text: Input should be 'a'") as error:
        await program.aforward(topic="x")
    assert error.value.node == "strict"
    events = await events_of(program.astream(topic="x"))
    assert outline(events)[-1] == ("node_error", "strict")


async def test_field_that_a_branch_not_taken_would_have_set():
    graph = graph_of(
        node("start", Topic, Empty, lambda _: {}),
        node("set", Topic, Text, lambda _: {"text": "x"}),
        node("use", Text, Empty, lambda _: {}),
        edges=[("set", "use")],
    )
    graph.add_conditional_edges("start", lambda state: state.topic, {"set": "set", "skip": "use"})
    program = AgentTranspiler.compile(graph)
    await program.aforward(topic="set")
    with pytest.raises(InputError, match="text: Field required"):
        await program.aforward(topic="skip")


async def cancelled_inside(_: Any) -> Any:
    """Waits for work of somebody else, who cancels it."""
    work = asyncio.get_running_loop().create_future()
    work.cancel()
    await work


def cancelled_in_a_thread(_: Any) -> Any:
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    "where", ["function", "function with a timeout", "function in a thread", "module", "model", "router"]
)
async def test_cancellation_that_comes_from_inside_of_a_node_is_an_error(where: str):
    class Module(dspy.Module):  # type: ignore[misc]
        async def aforward(self, **_: Any) -> Any:
            await cancelled_inside(None)

    work: dict[str, Any] = {"fn": lambda _: {}} if where == "router" else {"fn": cancelled_inside}
    if where == "module":
        work = {"module": Module()}
    elif where == "model":
        work = {}
    elif where == "function in a thread":
        work = {"fn": cancelled_in_a_thread}
    graph = graph_of(StatefulNode("a", Topic, Empty, **work, timeout=60 if "timeout" in where else None), edges=[])
    graph.add_conditional_edges("a", cancelled_inside if where == "router" else lambda _: "x", {"x": END})
    program = AgentTranspiler.compile(graph)
    with Script(forever=cancelled_inside).use():
        with anyio.fail_after(10), pytest.raises(NodeCancelled) as error:
            await program.aforward(topic="x")
        events = await events_of(program.astream(topic="x"))
    assert error.value.node == "a"
    text = "node 'a': something that it waited for was cancelled"
    assert events[-2] == {"event": "error", "node": "a", "error": text}
    assert isinstance(events[-1]["exception"], NodeCancelled)
    assert [event["error"] for event in of("node_error", events)] == (
        [] if where == "router" else [{"code": "error", "message": text}]
    )


async def never(given: Topic) -> Any:
    await anyio.sleep_forever()


async def test_node_that_takes_too_long():
    stuck = threading.Event()
    for fn in (never, lambda _: stuck.wait()):
        program = program_of(node("slow", Topic, Text, fn, timeout=0.05))
        with anyio.fail_after(10), pytest.raises(NodeTimeout, match=r"^node 'slow' took longer than 0.05 s$") as error:
            await program.aforward(topic="x")
        assert error.value.node == "slow"
        events = await events_of(program.astream(topic="x"))
        assert of("node_error", events)[0]["error"] == {
            "code": "timeout",
            "message": "node 'slow' took longer than 0.05 s",
        }
        assert of("error", events) == [
            {"event": "error", "node": "slow", "error": "node 'slow' took longer than 0.05 s"}
        ]
    stuck.set()


def test_errors_are_of_one_family():
    assert all(issubclass(kind, StepError) for kind in (InputError, OutputError, RouteError, ConflictError))


# -- Many at once ------------------------------------------------------------------------------------------------------


async def test_50_runs_at_once_do_not_mix():
    """G8: neither states nor messages."""
    met = Meeting(50)

    async def wait(given: Topic) -> dict[str, Any]:
        await met.arrive()
        return {"notes": [given.topic]}

    program = program_of(
        node("ask", Topic, Text),
        node("left", Topic, Notes, wait),
        node("right", Topic, Notes, lambda given: {"notes": [given.topic.upper()]}),
        node("end", Read, Topic, lambda given: {"topic": "+".join(given.notes)}),
        edges=[("ask", "left"), ("ask", "right"), ("left", "end"), ("right", "end")],
    )

    def reply(prompt: str) -> list[str]:
        topic = prompt.partition("topic ## ]]\n")[2].partition("\n")[0]
        return [f"[[ ## text ## ]]\n{topic} ", "is ", f"{topic}", "\n\n[[ ## completed ## ]]"]

    async def one(number: int, into: dict[int, list[dict[str, Any]]]) -> None:
        into[number] = await events_of(program.astream(topic=f"t{number}"))

    found: dict[int, list[dict[str, Any]]] = {}
    with dspy.context(lm=lm_of(reply)):
        async with anyio.create_task_group() as group:
            for number in range(50):
                group.start_soon(one, number, found)
    for number, events in found.items():
        topic = f"t{number}"
        assert "".join(event["delta"] for event in of("token", events)) == f"{topic} is {topic}"
        assert events[-1]["prediction"].toDict() == {
            "text": f"{topic} is {topic}",
            "notes": [topic, topic.upper()],
            "topic": f"{topic}+{topic.upper()}",
        }


# -- Streamed as DSPy does ---------------------------------------------------------------------------------------------


async def test_streamify_over_a_program():
    program = program_of(
        node("ask", Topic, Text), node("up", Text, Text, lambda t: {"text": t.text.upper()}), output=Text
    )
    listener = dspy.streaming.StreamListener("text")
    stream = streamify(program, stream_listeners=[listener], is_async_program=True)
    with dspy.context(lm=lm_of(lambda _: ["[[ ## text ## ]]\nhe", "llo", " you\n\n[[ ## completed", " ## ]]"])):
        items = [item async for item in stream(topic="x")]
    chunks = [item.chunk for item in items if isinstance(item, dspy.streaming.StreamResponse)]
    assert "".join(chunks) == "hello you"
    assert items[-1] == Text(text="HELLO YOU")


async def test_streamify_of_dspy_itself_ends_too():
    program = program_of(node("ask", Topic, Text), output=Text)
    stream = dspy.streamify(program, is_async_program=True)
    with dspy.context(lm=lm_of(lambda _: chat(text="hi"))), anyio.fail_after(20):
        items = [item async for item in stream(topic="x")]
    assert items[-1].text == "hi"
    assert isinstance(items[-1], dspy.Prediction)


async def test_the_examples_of_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs/graphs.md").read_text()
    names: dict[str, Any] = {"__name__": "docs"}
    for code in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(code, names)  # noqa: S102 -- our own
    short, long = chat(text="short"), chat(text="This one is long enough.")
    with Script(short, long).use():
        result = await names["program"].aforward(topic="x")
    assert result.model_dump() == {"text": "This one is long enough.", "good": True}
    with Script(short, long).use():
        await names["main"]()
    with Script(chat(verdict="good", score="9"), chat(verdict="good", score="4")).use():
        await names["use"]()
    assert capsys.readouterr().out == "This one is long enough.\n4 steps, 0 retries\n4\n"
    with Script(chat(answer="True")).use():
        assert names["is_spam"]("Buy!") is True
    with Script(chat(thoughts="hm"), chat(verdict="good", score="4")).use():
        assert (await names["Reviewer"]().acall(text="x")).score == 4
    assert names["fresh"].steps["write"].signature.instructions == "Write a sentence."


async def test_failed_call_of_the_model_is_reported_in_words_and_retried_where_the_model_says_so():
    program = program_of(node("ask", Topic, Text), output=Text)
    script = Script(LMRateLimitError("slow down", retry_after=0.001), chat(text="hi"))
    with script.use():
        events = await events_of(program.astream(topic="x"))
        assert isinstance(events[-1]["exception"], LMRateLimitError)
        assert events[-2]["node"] == "ask"
        assert "too many requests" in events[-2]["error"]
        assert of("validation_error", events) == []
    script = Script(LMRateLimitError("slow down", retry_after=0.001), chat(text="hi"))
    with script.use():
        program.set_lm(dspy.settings.lm.copy(num_retries=1))
        registered = Registry().add("asker", program)
        assert registered.spec.name == "asker"
        assert await program.aforward(topic="x") == Text(text="hi")
