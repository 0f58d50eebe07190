"""What one call of a program can choose, what its result says of the run, and what it is given for later nodes."""

import copy
import enum
from typing import Any, Literal

import anyio
import dspy
import pytest
from pydantic import BaseModel, Field

from agentcast import END, AgentTranspiler, StatefulNode
from agentcast.agents.graph.errors import OutputError, RouteError, StepLimitError
from agentcast.agents.registry import Registry
from agentcast.agents.transpiler import Program
from tests.support.graphs import Empty, Script, Text, Topic, events_of, graph_of, node, of, program_of
from tests.support.hub import open_hub
from tests.support.lms import chat

pytestmark = pytest.mark.anyio


class Count(BaseModel):
    n: int


class Short(BaseModel):
    text: str = Field(max_length=2)


def up(given: Count) -> dict[str, int]:
    return {"n": given.n + 1}


def counting(**options: Any) -> Any:
    """Counts to ten."""
    graph = graph_of(node("up", Count, Count, up), edges=[], **options)
    graph.add_conditional_edges("up", lambda state: state.n >= 10, {True: END, False: "up"})
    return AgentTranspiler.compile(graph, output_model=Count)


# -- Options of a call -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["aforward", "acall", "forward", "__call__"])
async def test_steps_are_limited_by_the_call(way: str):
    program = counting(max_steps=3)

    async def call(**given: Any) -> Any:
        result = getattr(program, way)(**given)
        return await result if way in ("aforward", "acall") else result

    with pytest.raises(StepLimitError, match="no end after 3 steps"):
        await call(n=0)
    assert await call(n=0, max_steps=10) == Count(n=10)
    with pytest.raises(StepLimitError, match="no end after 2 steps"):
        await call(n=0, max_steps=2)
    assert await call(n=0, on_loop_limit="return") == Count(n=3)
    assert await call(n=0, max_steps=2, on_loop_limit="return") == Count(n=2)
    with pytest.raises(StepLimitError):
        await call(n=0)


async def test_stream_takes_the_options_too():
    events = await events_of(counting().astream(n=0, max_steps=2, on_loop_limit="return"))
    assert of("step_limit", events)[0]["max_steps"] == 2
    assert events[-1]["prediction"] == Count(n=2)
    events = await events_of(counting(on_loop_limit="return").astream(n=0, max_steps=2, on_loop_limit="raise"))
    assert isinstance(events[-1]["exception"], StepLimitError)


async def test_retries_of_a_call_are_those_of_nodes_that_have_none_of_their_own():
    calls = 0

    def function(given: Short) -> dict[str, str]:
        nonlocal calls
        calls += 1
        return {}

    own = program_of(node("ask", Topic, Short, max_retries=1))
    default = program_of(node("ask", Topic, Short))
    long = chat(text="long")
    for program, retries, attempts in [(own, 0, 2), (default, 0, 1), (default, 1, 2), (default, None, 4)]:
        script = Script(*[long] * 5)
        with script.use(), pytest.raises(OutputError) as error:
            await program.aforward(topic="x", max_retries=retries)
        assert error.value.attempts == len(script.prompts) == attempts
    with pytest.raises(OutputError):
        await program_of(node("f", Short, Text, function)).aforward(text="x", max_retries=5)
    assert calls == 1, "functions are not called again"


async def test_retries_of_a_call_in_its_events():
    with Script(chat(text="long"), chat(text="ok")).use():
        events = await events_of(program_of(node("ask", Topic, Short)).astream(topic="x", max_retries=1))
    assert [(event["attempt"], event["max_retries"]) for event in of("validation_error", events)] == [(1, 1)]


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ({"max_steps": 0}, "max_steps is 0; it must be 1 or more"),
        ({"max_steps": "many"}, "max_steps is 'many'; it must be 1 or more"),
        ({"max_retries": -1}, "max_retries is -1; it must be 0 or more"),
        ({"on_loop_limit": "stop"}, "on_loop_limit is 'stop'; it must be 'raise' or 'return'"),
    ],
)
async def test_options_out_of_range(option: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=f"^{problem}$"):
        await counting().aforward(n=0, **option)


@pytest.mark.parametrize("name", ["max_retries", "max_steps", "on_loop_limit"])
def test_inputs_cannot_have_the_names_of_options(name: str):
    fields: dict[str, Any] = {"__annotations__": {name: int}}
    taking: Any = type("Taking", (BaseModel,), fields)
    problem = f"the program's input field '{name}' has the name of an option that every call takes: rename it"
    with pytest.raises(ValueError, match=problem):
        program_of(node("a", taking, Empty, lambda _: {}))
    program_of(node("a", Topic, taking, lambda _: {}), node("b", taking, Empty, lambda _: {}))
    with pytest.raises(ValueError, match=f"node 'b': the field name '{name}' of Taking is reserved"):
        program_of(node("a", Topic, taking, lambda _: {}), node("b", taking, Text, module=program_of(echo)))


echo = node("echo", Topic, Text, lambda t: {"text": t.topic})


async def test_clients_of_a_hub_cannot_set_options():
    agent: Any = Registry().add("counting", counting())
    async with open_hub(agent) as hub, hub.http() as http:
        for option in ({"max_steps": 1_000_000}, {"max_retries": 9}, {"on_loop_limit": "return"}):
            refused = await http.post("/v1/runs", json={"agent": "counting", "input": {"n": 0, **option}})
            assert refused.status_code == 422
    assert list(agent.spec.input_model.model_fields) == ["n"]


# -- Metadata ----------------------------------------------------------------------------------------------------------


async def test_result_has_its_steps_and_retries():
    program = program_of(node("ask", Topic, Short), node("end", Short, Text, dict), output=Text)
    with Script(chat(text="long"), chat(text="bad"), chat(text="ok")).use():
        result = await program.aforward(topic="x")
    assert (Program.metadata(result).steps, Program.metadata(result).retries) == (2, 2)
    with Script(chat(text="long"), chat(text="ok")).use():
        events = await events_of(program.astream(topic="x"))
    assert events[-1]["metadata"] == {"steps": 2, "retries": 1}
    assert program.metadata(events[-1]["prediction"]).retries == 1


@pytest.mark.parametrize("config", [{}, {"frozen": True}, {"extra": "forbid"}, {"extra": "allow"}])
async def test_metadata_is_no_part_of_the_value(config: Any):
    model: Any = type("Result", (Count,), {"model_config": config})

    class Holder(BaseModel):
        result: model | None

    result = await AgentTranspiler.compile(graph_of(node("up", Count, Count, up)), output_model=model).aforward(n=1)
    assert Program.metadata(result).steps == 1
    assert Program.metadata(copy.deepcopy(result)).steps == 1
    assert result == model(n=2)
    assert result.model_dump() == dict(result) == {"n": 2}
    assert result.model_dump_json() == '{"n":2}'
    assert Holder(result=result).model_dump(warnings="error") == {"result": {"n": 2}}
    assert "metadata" not in repr(result)


async def test_predictions_have_metadata_beside_their_fields():
    result = await program_of(node("up", Count, Count, up)).aforward(n=1)
    assert isinstance(result, dspy.Prediction)
    assert Program.metadata(result).steps == 1
    assert result.toDict() == dict(result.items()) == {"n": 2}


def test_what_no_run_has_returned_has_no_metadata():
    for value in (Count(n=1), {"n": 1}, None):
        with pytest.raises(ValueError, match="that no program of a graph has returned has no metadata"):
            Program.metadata(value)


async def test_each_of_many_runs_has_its_own_metadata():
    program = counting()
    steps: dict[int, int] = {}

    async def one(n: int) -> None:
        steps[n] = program.metadata(await program.aforward(n=n)).steps

    async with anyio.create_task_group() as group:
        for n in range(9):
            group.start_soon(one, n)
    assert steps == {n: 10 - n for n in range(9)}


async def test_programs_inside_count_for_themselves():
    inner = program_of(node("ask", Topic, Short), output=Short)
    program = program_of(node("outer", Topic, Text, module=inner), output=Text)
    with Script(chat(text="long"), chat(text="ok")).use():
        result = await program.aforward(topic="x")
    assert Program.metadata(result).steps == 1
    assert Program.metadata(result).retries == 0


# -- Inputs of later nodes ---------------------------------------------------------------------------------------------


class Tone(BaseModel):
    text: str
    tone: Literal["kind", "harsh"] = Field(description="How to say it.")
    length: int = Field(default=7, ge=1)


def say(given: Tone) -> dict[str, str]:
    return {"text": f"{given.text} {given.tone} {given.length}"}


async def test_later_nodes_read_inputs_that_the_first_one_does_not():
    program = program_of(echo, node("say", Tone, Text, say), output=Text)
    assert await program.aforward(topic="x", tone="kind") == Text(text="x kind 7")
    assert await program.aforward(topic="x", tone="harsh", length=1) == Text(text="x harsh 1")
    schema = program.input_model.model_json_schema()
    assert list(schema["properties"]) == ["topic", "tone", "length"]
    assert schema["required"] == ["topic", "tone"]
    assert schema["properties"]["tone"]["description"] == "How to say it."
    assert schema["properties"]["length"]["minimum"] == 1
    assert Registry().add("say", program).spec.input_model.model_json_schema()["required"] == ["topic", "tone"]


async def test_inputs_of_later_nodes_are_checked_before_anything_runs():
    program = program_of(echo, node("say", Tone, Text, say))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"topic": "x"}, "tone: Field required"),
        ({"topic": "x", "tone": "loud"}, "tone: Input should be 'kind' or 'harsh'"),
        ({"topic": "x", "tone": "kind", "length": 0}, "length: Input should be greater than or equal to 1"),
        ({"topic": "x", "tone": "kind", "volume": 1}, "the program takes no 'volume'; it takes topic, tone, length"),
    ]
    for inputs, problem in cases:
        events = await events_of(program.astream(**inputs))
        assert events[0] == {"event": "error", "error": problem}


async def test_input_that_some_later_node_requires_is_required():
    class Asks(BaseModel):
        tone: str = "any"

    class Needs(BaseModel):
        tone: str

    program = program_of(echo, node("asks", Asks, Empty, lambda _: {}), node("needs", Needs, Empty, lambda _: {}))
    assert program.input_model.model_json_schema()["required"] == ["topic", "tone"]


async def test_default_of_one_node_is_not_that_of_another():
    class One(BaseModel):
        tone: str = "one"

    class Two(BaseModel):
        tone: str = "two"

    seen = []

    def see(given: Any) -> dict[str, Any]:
        seen.append(given.tone)
        return {}

    program = program_of(echo, node("one", One, Empty, see), node("two", Two, Empty, see))
    await program.aforward(topic="x")
    await program.aforward(topic="x", tone="mine")
    assert seen == ["one", "two", "mine", "mine"]


async def test_field_that_some_node_sets_is_no_input():
    class Feedback(BaseModel):
        text: str
        feedback: str = ""

    class Checked(BaseModel):
        feedback: str

    program = program_of(echo, node("write", Feedback, Text, lambda _: {}), node("check", Text, Checked, lambda _: {}))
    assert program.input_model is Topic


# -- Routers -----------------------------------------------------------------------------------------------------------


class Kind(enum.Enum):
    BUG = "bug"
    QUESTION = 2


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


def routed(choice: Any, *keys: Any) -> Any:
    graph = graph_of(echo, edges=[])
    for number, _ in enumerate(keys):
        graph.add_node(node(f"n{number}", Topic, Text, lambda _, number=number: {"text": str(number)}))  # type: ignore[misc]
    graph.add_conditional_edges("echo", lambda _: choice, {key: f"n{number}" for number, key in enumerate(keys)})
    return AgentTranspiler.compile(graph, output_model=Text)


@pytest.mark.parametrize(
    ("choice", "keys", "taken"),
    [
        (True, ("false", "true"), 1),
        (False, ("False", "True"), 0),
        ("true", (True, False), 0),
        ("True", (False, True), 1),
        ("true", (True, "true"), 1),
        (True, ("true", True), 1),
        (None, ("x", "None"), 1),
        ("null", ("x", None), 1),
        (3, ("2", "3"), 1),
        ("3", (2, 3), 1),
        (0.5, ("0.5",), 0),
        (1.0, (1, "1.0"), 0),
        (Kind.BUG, ("bug", "question"), 0),
        (Kind.BUG, ("BUG", "QUESTION"), 0),
        (Kind.QUESTION, ("bug", "2"), 1),
        (Kind.QUESTION, ("bug", 2), 1),
        ("QUESTION", (Kind.BUG, Kind.QUESTION), 1),
        ("bug", (Kind.BUG, Kind.QUESTION), 0),
        (2, (Kind.BUG, Kind.QUESTION), 1),
        (Level.HIGH, (1, 2), 1),
        ("HIGH", (Level.LOW, Level.HIGH), 1),
        (1, ("1", 1), 1),
    ],
)
async def test_texts_stand_for_keys(choice: Any, keys: tuple[Any, ...], taken: int):
    assert await routed(choice, *keys).aforward(topic="x") == Text(text=str(taken))


@pytest.mark.parametrize(
    ("choice", "keys", "problem"),
    [
        ("TRUE", (True, False), "its router chose 'TRUE', which is none of True, False"),
        ("1", (True,), "its router chose '1', which is none of True"),
        ("Bug", ("bug",), "its router chose 'Bug', which is none of 'bug'"),
        ("True", (True, "true", "True "), None),
        ({"a": 1}, ("a",), "its router chose {'a': 1}, which is none of 'a'"),
        ("True", ("False", True, "true"), None),
        (Kind.BUG, ("bug", "BUG"), "its router chose 'bug', which may be 'bug' or 'BUG'"),
        ("None", (None, "null"), None),
        (dspy, ("x",), None),
    ],
)
async def test_texts_that_stand_for_no_key_or_for_several(choice: Any, keys: tuple[Any, ...], problem: str | None):
    program = routed(choice, *keys)
    if problem is None and choice in ("True", "None"):
        assert await program.aforward(topic="x") == Text(text=str([str(key) for key in keys].index(choice)))
        return
    with pytest.raises(RouteError) as error:
        await program.aforward(topic="x")
    assert problem is None or str(error.value) == f"node 'echo': {problem}"


async def test_keys_that_mean_the_same_may_lead_to_the_same_node():
    graph = graph_of(echo, edges=[])
    graph.add_conditional_edges("echo", lambda _: Kind.BUG, {"bug": END, "BUG": "END"})
    await AgentTranspiler.compile(graph).aforward(topic="x")


class Step(BaseModel):
    next_step: str
    why: str = ""


async def test_field_of_a_node_decides():
    graph = graph_of(node("check", Topic, Step, lambda t: {"next_step": t.topic}), echo, edges=[])
    graph.add_conditional_edges("check", "next_step", {"say": "echo", "stop": END})
    program = AgentTranspiler.compile(graph)
    assert program.metadata(await program.aforward(topic="stop")).steps == 1
    assert program.metadata(await program.aforward(topic="say")).steps == 2
    with pytest.raises(RouteError, match="node 'check': its router chose 'x', which is none of 'say', 'stop'"):
        await program.aforward(topic="x")
    assert program.describe()["edges"] == [
        {"from": "echo", "to": "__end__"},
        {"from": "check", "to": "echo", "label": "say"},
        {"from": "check", "to": "__end__", "label": "stop"},
    ]


async def test_language_model_decides_by_a_field():
    class Decision(BaseModel):
        done: bool
        text: str

    graph = graph_of(StatefulNode("write", Topic, Decision), edges=[])
    graph.add_conditional_edges("write", "done", {"true": END, "false": "write"})
    program = AgentTranspiler.compile(graph, output_model=Text)
    with Script(chat(done="False", text="a"), chat(done="True", text="b")).use():
        assert await program.aforward(topic="x") == Text(text="b")


async def test_node_that_routes_does_so_by_its_field_next_step():
    graph = graph_of(echo, edges=[])
    router = node("judge", Text, Step, lambda t: {"next_step": t.text, "why": "so"})
    graph.add_conditional_edges("echo", router, {"again": "echo", "stop": END})
    program = AgentTranspiler.compile(graph)
    assert (await program.aforward(topic="stop")).why == "so"


def test_field_that_the_node_does_not_have():
    graph = graph_of(echo, edges=[])
    graph.add_conditional_edges("echo", "next_step", {"x": END})
    with pytest.raises(
        ValueError, match="node 'echo' routes by 'next_step', which is no field of its output_model; it has text"
    ):
        AgentTranspiler.compile(graph)


def test_two_fields_may_decide_but_one_field_only_once():
    class Two(BaseModel):
        a: bool
        b: bool

    graph = graph_of(node("both", Topic, Two, lambda _: {}), edges=[])
    graph.add_conditional_edges("both", "a", {True: END})
    graph.add_conditional_edges("both", "b", {True: END})
    graph.add_conditional_edges("both", "a", {True: END})
    AgentTranspiler.compile(graph)
    graph.add_conditional_edges("both", "a", {True: "both"})
    with pytest.raises(ValueError, match="node 'both' routes by two different path_maps"):
        AgentTranspiler.compile(graph)
