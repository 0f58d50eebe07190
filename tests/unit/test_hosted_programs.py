"""Programs that users hand over: they run as DSPy runs them, block nobody, and are not changed."""

import copy
import functools
import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import dspy
import pytest
from anyio.lowlevel import checkpoint
from pydantic import BaseModel

from agentcast.agents.base import Task
from agentcast.agents.context import within
from agentcast.agents.graph import Graph, StatefulNode
from agentcast.agents.llm import Model, Retrying, as_model, close_connections
from agentcast.agents.llm.setup import configure
from agentcast.agents.registry import Registry, RegistryError
from agentcast.agents.streaming import stream_events, streamify
from agentcast.agents.transpiler import AgentTranspiler
from tests.support.lms import chat, lm_of, question_of


class Ignored:
    async def send(self, event: Any) -> None: ...

    def nowait(self, event: Any) -> None: ...


async def hosted(program: Any, lm: Any, **options: Any) -> Any:
    """The result of `program` as an agent."""
    agent: Any = Registry().add("hosted", program, **options)
    task = Task(run="r", input=agent.spec.input_model(question="Q-one-Z"))
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        return await agent.run(task, Ignored())


async def streamed(program: Any, lm: Any, **_: Any) -> Any:
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        events = stream_events(program, {"question": "Q-one-Z"})
        assert [event async for event in events]
    assert events.outcome is not None
    return dict(events.outcome.prediction.items())


async def in_a_graph(program: Any, lm: Any, **_: Any) -> Any:
    class Question(BaseModel):
        question: str

    class Answer(BaseModel):
        answer: str

    graph = Graph()
    graph.add_node(StatefulNode("only", Question, Answer, module=program))
    graph.set_entry_point("only")
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        items = [item async for item in AgentTranspiler.compile(graph).astream(question="Q-one-Z")]
    return dict(items[-1]["prediction"].items())


async def in_a_function(program: Any, lm: Any, **_: Any) -> Any:
    registry = Registry()

    @registry.agent
    async def calls(question: str) -> dict[str, Any]:
        result = await anyio.to_thread.run_sync(functools.partial(program, question=question))
        return dict(result.items())

    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        task = Task(run="r", input=registry["calls"].spec.input_model(question="Q-one-Z"))
        return await registry["calls"].run(task, Ignored())


WAYS = [hosted, streamed, in_a_graph, in_a_function]


def counting() -> Callable[[str], str]:
    """Replies that count: "one 1", "one 2", …; and advice, to a program that asks for it."""
    made = iter(range(1, 100))

    def reply(prompt: str) -> str:
        if "reward_code" in prompt:
            return chat(discussion="Too small.", advice='{"predict": "Say a larger number.", "self": "Say more."}')
        return chat(reasoning="r", answer=f"{question_of(prompt)} {next(made)}")

    return reply


def larger_than_two(_: Any, prediction: Any) -> float:
    return 1.0 if int(prediction.answer.split()[-1]) > 2 else 0.0


# -- The trace ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [dspy.BestOfN, dspy.Refine])
async def test_programs_that_use_the_trace_find_one(way: Any, kind: Any):
    program = kind(dspy.ChainOfThought("question -> answer"), N=4, reward_fn=larger_than_two, threshold=1.0)
    with dspy.context(trace=None):
        result = await way(program, lm_of(counting()), signature="question -> answer")
    assert result["answer"] == "Q-one-Z 3"


class ShowsTrace(dspy.Module):  # type: ignore[misc]
    """Answers with the questions in its trace; the runs of it go in step."""

    def __init__(self, at_once: int) -> None:
        self.ask = dspy.Predict("question -> answer")
        self.before, self.after = threading.Barrier(at_once), threading.Barrier(at_once)

    def forward(self, question: str) -> Any:
        self.before.wait(10)
        assert dspy.settings.trace == []
        self.ask(question=question)
        self.after.wait(10)
        return dspy.Prediction(answer=[inputs["question"] for _, inputs, _ in dspy.settings.trace])


async def test_each_run_has_a_trace_of_its_own():
    program = ShowsTrace(at_once=3)
    agent: Any = Registry().add("traced", program)
    answers: dict[str, Any] = {}

    async def ask(question: str) -> None:
        task = Task(run=question, input=agent.spec.input_model(question=question))
        answers[question] = await agent.run(task, Ignored())

    with dspy.context(lm=lm_of(lambda _: chat(answer="x")), adapter=dspy.ChatAdapter()):
        async with anyio.create_task_group() as tasks:
            for question in ("a", "b", "c"):
                tasks.start_soon(ask, question)
    assert answers == {question: {"answer": [question]} for question in ("a", "b", "c")}


async def test_the_trace_of_a_run_in_a_run_becomes_part_of_it():
    class Outer(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ask = dspy.Predict("question -> answer")

        async def aforward(self, question: str) -> Any:
            await self.ask.acall(question="before")
            events = stream_events(self.ask, {"question": question})
            assert [event async for event in events]
            return dspy.Prediction(answer=[inputs["question"] for _, inputs, _ in dspy.settings.trace])

    result = await hosted(Outer(), lm_of(lambda _: chat(answer="x")))
    assert result == {"answer": ["before", "Q-one-Z"]}


def test_the_trace_of_the_process_keeps_nothing_and_is_a_list(monkeypatch: pytest.MonkeyPatch):
    given: dict[str, Any] = {}
    monkeypatch.setattr("agentcast.agents.llm.setup._configured", None)
    monkeypatch.setattr(dspy, "configure", given.update)
    monkeypatch.setattr(dspy, "configure_cache", lambda **_: None)
    configure("offline")
    best = dspy.BestOfN(dspy.ChainOfThought("question -> answer"), N=4, reward_fn=larger_than_two, threshold=1.0)
    with dspy.context(lm=lm_of(counting()), adapter=dspy.ChatAdapter(), trace=given["trace"]):
        assert best(question="Q-one-Z").answer == "Q-one-Z 3"
        assert dspy.settings.trace == []
        assert isinstance(dspy.settings.trace, list)


# -- Modules of any class ----------------------------------------------------------------------------------------------


@dataclass
class Compared(dspy.Module):  # type: ignore[misc]
    """Equal to all others of its kind, and so without a hash."""

    number: int = 1

    def __post_init__(self) -> None:
        super().__init__()
        self.ask = dspy.Predict("question -> answer")

    def forward(self, question: str) -> Any:
        return self.ask(question=question)


@pytest.mark.parametrize("way", WAYS)
async def test_modules_need_no_hash(way: Any):
    assert (await way(Compared(), lm_of(lambda _: chat(answer="a"))))["answer"] == "a"


# -- Synchronous tools -------------------------------------------------------------------------------------------------


class HoldsTools(dspy.Module):  # type: ignore[misc]
    """A module of a user's own that calls its tools as DSPy's do, all of them at once."""

    def __init__(self, tools: list[Any]) -> None:
        self.tools = [tool if isinstance(tool, dspy.Tool) else dspy.Tool(tool) for tool in tools]

    async def aforward(self, question: str) -> Any:
        seen: list[Any] = []

        async def call(tool: Any) -> None:
            seen.append(await tool.acall(topic=question))

        async with anyio.create_task_group() as tasks:
            for tool in self.tools:
                tasks.start_soon(call, tool)
        return dspy.Prediction(answer=", ".join(seen))


class InACall(dspy.Module):  # type: ignore[misc]
    """Makes its tool only when it is called."""

    def __init__(self, tools: list[Any]) -> None:
        self.functions = [getattr(tool, "func", tool) for tool in tools]

    async def aforward(self, question: str) -> Any:
        tool = dspy.Tool(self.functions[0], name="look", args={"topic": {"type": "string"}}, arg_types={"topic": str})
        return dspy.Prediction(answer=await tool.acall(topic=question))


def react_replies() -> list[str]:
    return [
        chat(next_thought="t", next_tool_name="look", next_tool_args='{"topic": "Q-one-Z"}'),
        chat(next_thought="t", next_tool_name="finish", next_tool_args="{}"),
        chat(reasoning="r", answer="found"),
    ]


def react_v2_replies() -> list[str]:
    calls = [{"name": "look", "args": {"topic": "Q-one-Z"}}, {"name": "submit", "args": {"answer": "found"}}]
    return [chat(next_thought="t", tool_calls=json.dumps({"tool_calls": [call]})) for call in calls]


async def drop_in(program: Any, lm: Any) -> Any:
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        items = [item async for item in streamify(program, is_async_program=True)(question="Q-one-Z")]
    return dict(items[-1].items())


async def in_an_async_function(program: Any, lm: Any) -> Any:
    registry = Registry()

    @registry.agent
    async def calls(question: str) -> dict[str, Any]:
        return dict((await program.acall(question=question)).items())

    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        task = Task(run="r", input=registry["calls"].spec.input_model(question="Q-one-Z"))
        return await registry["calls"].run(task, Ignored())


PROGRAMS: dict[str, tuple[Callable[[list[Any]], Any], Callable[[], list[str]]]] = {
    "ReAct": (lambda tools: dspy.ReAct("question -> answer", tools), react_replies),
    "ReActV2": (lambda tools: dspy.ReActV2("question -> answer", tools), react_v2_replies),
    "a user's own": (HoldsTools, list),
    "made when called": (InACall, list),
}


@pytest.mark.parametrize("way", [hosted, streamed, in_a_graph, drop_in, in_an_async_function])
@pytest.mark.parametrize("kind", ["function", "partial", "object", "dspy.Tool"])
@pytest.mark.parametrize("name", PROGRAMS)
async def test_a_synchronous_tool_does_not_stop_the_event_loop(way: Any, kind: str, name: str):
    """The tool returns only what the event loop does meanwhile."""
    moving, called = threading.Event(), []

    def look(topic: str) -> str:
        """Look a topic up."""
        called.append(threading.current_thread())
        return f"{topic} was seen" if moving.wait(5) else "the loop stood still"

    class Look:
        __name__ = "look"

        def __call__(self, topic: str) -> str:
            return look(topic)

    tools = {
        "function": look,
        "partial": dspy.Tool(functools.partial(look), name="look", args={"topic": {"type": "string"}}, arg_types={}),
        "object": dspy.Tool(Look(), name="look"),
        "dspy.Tool": dspy.Tool(look),
    }

    async def move() -> None:
        while not called:
            await checkpoint()
        moving.set()

    make, replies = PROGRAMS[name]
    program, said = make([tools[kind]]), iter(replies())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(move)
        with anyio.fail_after(20):
            result = await way(program, lm_of(lambda _: next(said)))
    assert result["answer"] in ("found", "Q-one-Z was seen")
    assert called[0] is not threading.current_thread()


# -- Nothing is changed ------------------------------------------------------------------------------------------------


MODEL = "openai/gpt-5-mini"


def fingerprint(program: Any) -> Any:
    """All that a user could see of a program: its attributes and those of its parts, and of their LMs."""
    parts = {
        path: {
            key: (id(value), copy.copy(value) if isinstance(value, dict | list) else repr(type(value)))
            for key, value in vars(part).items()
        }
        for path, part in program.named_sub_modules()
    }
    lms = [predictor.lm for predictor in program.predictors() if predictor.lm is not None]
    return parts, [(id(lm), type(lm), copy.deepcopy(lm.kwargs), lm.num_retries, list(lm.history)) for lm in lms]


def nobody(model: str = MODEL) -> Any:
    """An LM of a provider that does not answer."""
    return dspy.LM(model, api_base="http://127.0.0.1:9", api_key="sk-some-key", cache=False)


def look(topic: str) -> str:
    """Look a topic up."""
    return topic


MAKE: dict[str, Callable[[], Any]] = {
    "Predict": lambda: dspy.Predict("question -> answer"),
    "ChainOfThought": lambda: dspy.ChainOfThought("question -> answer"),
    "ReAct": lambda: dspy.ReAct("question -> answer", [look]),
    "ReActV2": lambda: dspy.ReActV2("question -> answer", [look]),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
async def test_a_program_is_left_as_it_was(make: Callable[[], Any], tmp_path: Path):
    """Added, run with failing calls of its own LM, saved and loaded."""
    program = make()
    program.set_lm(nobody())
    before = fingerprint(program)
    program.save(tmp_path / "before.json")
    agent: Any = Registry().add("mine", program)
    assert fingerprint(program) == before
    task = Task(run="r", input=agent.spec.input_model(question="q"))
    with dspy.context(adapter=dspy.ChatAdapter()), within(retrying=Retrying(attempts=1)):
        with pytest.raises(dspy.utils.exceptions.LMError):
            await agent.run(task, Ignored())
    await close_connections()
    assert fingerprint(program) == before
    program.save(tmp_path / "after.json")
    assert (tmp_path / "after.json").read_text() == (tmp_path / "before.json").read_text()
    restored = make()
    restored.load(tmp_path / "after.json", allow_unsafe_lm_state=True)
    assert type(restored.predictors()[0].lm) is dspy.LM


@pytest.mark.parametrize("kind", [dspy.BestOfN, dspy.Refine])
async def test_the_failures_of_one_run_do_not_count_in_the_next(kind: Any):
    """DSPy counts them on the module: after three of them it would give up at once, for ever."""
    attempts = iter(range(100))

    def fails_half_of_the_time(_: Any, prediction: Any) -> float:
        if next(attempts) % 2 == 0:
            raise ValueError("no reward")
        return 1.0

    program = kind(dspy.Predict("question -> answer"), N=2, reward_fn=fails_half_of_the_time, threshold=1.0)
    before = fingerprint(program)
    for _ in range(5):
        assert (await hosted(program, lm_of(lambda _: chat(answer="x"))))["answer"] == "x"
    assert fingerprint(program) == before


async def test_a_predictors_own_lm_is_called_as_all_others_are():
    """Whatever way it got there: given before or after the program was added, or in the middle of a run."""
    called: list[Any] = []

    class Hears(dspy.utils.callback.BaseCallback):  # type: ignore[misc]
        def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            called.append(instance)

    class Asks(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ask = dspy.Predict("question -> answer")

        async def aforward(self, question: str) -> Any:
            return await self.ask.acall(question=question, lm=nobody("openai/third"))

    before, after = dspy.Predict("question -> answer"), dspy.Predict("question -> answer")
    before.lm = nobody("openai/first")
    registry = Registry()
    registry.add("before", before)
    registry.add("after", after)
    registry.add("during", Asks())
    after.lm = nobody("openai/second")
    settings = {
        "callbacks": [Hears()],
        "adapter": dspy.ChatAdapter(),
    }
    with dspy.context(**settings), within(retrying=Retrying(attempts=2, backoff=0)):
        for agent in registry:
            task = Task(run="r", input=agent.spec.input_model(question="q"))
            with pytest.raises(dspy.utils.exceptions.LMError):
                await agent.run(task, Ignored())
    await close_connections()
    assert [lm.model for lm in called] == [f"openai/{name}" for name in ("first", "second", "third") for _ in range(2)]
    assert all(type(lm) is Model and lm.num_retries == 0 for lm in called)


async def test_an_lm_without_a_timeout_gets_none_of_ours():
    lm = as_model(nobody())
    before = dict(lm.kwargs)
    with within(retrying=Retrying(attempts=1)), pytest.raises(dspy.utils.exceptions.LMError):
        await lm.acall("Hello")
    await close_connections()
    assert lm.kwargs == before


# -- What cannot run ---------------------------------------------------------------------------------------------------


class RunsCode(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        self.act = dspy.CodeAct("question -> answer", tools=[look])

    def forward(self, question: str) -> Any:
        return self.act(question=question)


@pytest.mark.filterwarnings("ignore:CodeAct is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: dspy.RLM("question -> answer"), "RLM runs code"),
        (lambda: dspy.CodeAct("question -> answer", tools=[look]), "CodeAct runs code"),
        (lambda: dspy.Flex("question -> answer"), "Flex runs code"),
        (RunsCode, r"CodeAct \(act\) runs code"),
    ],
    ids=["RLM", "CodeAct", "Flex", "inside"],
)
def test_a_program_that_needs_what_is_not_installed_is_refused(
    make: Callable[[], Any], named: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setitem(sys.modules, "deno", None)
    with pytest.raises(RegistryError, match=f"{named} with Deno, which is not installed. Install it .pip install"):
        Registry().add("coder", make())
    with dspy.context(interpreter_factory=dspy.LocalInterpreter):
        Registry().add("coder", make())
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/deno")
    Registry().add("coder", make())


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        (dspy.Predict, "the class Predict is not a dspy.Module"),
        (dspy.Parallel(), "a Parallel is not a dspy.Module"),
        (dspy.majority, "a function is not a dspy.Module"),
        (dspy.Module(), "Module has no forward method"),
        (dspy.Ensemble().compile([dspy.Predict("a -> b")]), "the inputs cannot be inferred"),
        (dspy.LM(MODEL), "a LM is not a dspy.Module"),
    ],
    ids=["class", "Parallel", "majority", "empty", "Ensemble", "LM"],
)
def test_what_is_no_program_or_takes_nobody_knows_what_is_refused(program: Any, problem: str):
    with pytest.raises(RegistryError, match=problem):
        Registry().add("thing", program)
