"""Language models that can only be called synchronously: wherever `dspy.Predict` can use one, so can graphs and agents,
from synchronous code and on an event loop, which goes on meanwhile (G3)."""

import operator
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated, Any

import anyio
import dspy
import pytest
from pydantic import BaseModel

from agentcast.agents.base import Task
from agentcast.agents.context import within
from agentcast.agents.events import LmEnd, LmStart, MessageEnd, NodeEnd, ToolEnd, ValidationFailed
from agentcast.agents.graph import END, Graph, StatefulNode
from agentcast.agents.inputs.contract import module_contract
from agentcast.agents.react import ReAct
from agentcast.agents.registry import Registry
from agentcast.agents.streaming import can_be_awaited, run_program, stream_events, streamify
from agentcast.agents.transpiler import AgentTranspiler
from tests.support.graphs import Script, Text, Topic, events_of, node, of, outline, program_of
from tests.support.lms import Engine, chat, lm_of
from tests.unit.test_react import FINISH, Heard, turn

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore:Implementing custom LMs:DeprecationWarning"),
]

Reply = Callable[[str], str]


class Legacy(dspy.BaseLM):  # type: ignore[misc]  # dspy is untyped
    """A language model with `forward` only, which counts its calls and keeps the threads that they were made in."""

    def __init__(self, reply: Reply) -> None:
        super().__init__("legacy/lm", cache=False)
        self.reply = reply
        self.calls = 0
        self.threads: set[int] = set()

    def forward(self, prompt: Any = None, messages: Any = None, **options: Any) -> Any:
        self.calls += 1
        self.threads.add(threading.get_ident())
        message = SimpleNamespace(content=self.reply(messages[-1]["content"]), tool_calls=None)
        usage = {"prompt_tokens": 3, "completion_tokens": 2}
        return SimpleNamespace(choices=[SimpleNamespace(message=message)], usage=usage, model="legacy/lm")


class Overridden(dspy.LM):  # type: ignore[misc]
    """A `dspy.LM` whose `forward` was replaced; what it inherits would call a provider."""

    def __init__(self, reply: Reply) -> None:
        super().__init__("openai/none", cache=False, num_retries=0)
        self._inner = Legacy(reply)

    def forward(self, *args: Any, **options: Any) -> Any:
        return self._inner.forward(*args, **options)


class Called(dspy.LM):  # type: ignore[misc]
    """One whose `__call__` was replaced."""

    def __init__(self, reply: Reply) -> None:
        super().__init__("openai/none", cache=False, num_retries=0)
        self.reply = reply

    def __call__(self, prompt: Any = None, *, messages: Any = None, **options: Any) -> Any:
        return [self.reply(messages[-1]["content"])]


def with_an_engine(reply: Reply) -> Any:
    return dspy.LM("test/model", engine=Engine(reply), cache=False, num_retries=0)


SYNC_ONLY: dict[str, Callable[[Reply], Any]] = {
    "legacy": Legacy,
    "forward replaced": Overridden,
    "call replaced": Called,
    "engine": with_an_engine,
}
every_lm = pytest.mark.parametrize("make", SYNC_ONLY.values(), ids=SYNC_ONLY)


class Awaited(Legacy):
    async def aforward(self, prompt: Any = None, messages: Any = None, **options: Any) -> Any:
        return self.forward(prompt, messages, **options)


@pytest.mark.parametrize(
    ("lm", "expected"),
    [
        *((make(str), False) for make in SYNC_ONLY.values()),
        (lm_of(str), True),
        (dspy.LM("openai/none"), True),
        (Awaited(str), True),
        (Script("x"), True),  # no LM of DSPy's: assumed to be awaitable
    ],
)
def test_which_models_can_be_awaited(lm: Any, expected: bool):
    assert can_be_awaited(lm) is expected


def hello(prompt: str) -> str:
    return chat(text="hi", reasoning="r")


# -- Graphs ------------------------------------------------------------------------------------------------------------


def kinds() -> dict[str, StatefulNode]:
    def look(word: str = "x") -> str:
        """Look."""
        return word

    inner = program_of(node("inner", Topic, Text), output=Text)

    class Custom(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.ask = dspy.Predict("topic -> text")

        async def aforward(self, topic: str) -> Any:
            return await self.ask.acall(topic=topic)

    class Sync(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.ask = dspy.Predict("topic -> text")

        def forward(self, topic: str) -> Any:
            return self.ask(topic=topic)

    return {
        "model": node("a", Topic, Text),
        "reasoning": node("a", Topic, Text, use_cot=True),
        "tools": node("a", Topic, Text, tools=[look]),
        "predict": node("a", Topic, Text, module=dspy.Predict("topic -> text")),
        "chain of thought": node("a", Topic, Text, module=dspy.ChainOfThought("topic -> text")),
        "react": node("a", Topic, Text, module=dspy.ReAct("topic -> text", [look])),
        "async module": node("a", Topic, Text, module=Custom()),
        "sync module": node("a", Topic, Text, module=Sync()),
        "graph": node("a", Topic, Text, module=inner),
    }


def answering(prompt: str) -> str:
    if "next_tool_name" not in prompt:
        return hello(prompt)
    return FINISH if "observation_0" in prompt else turn("t", "look", {"word": "y"})


every_kind = pytest.mark.parametrize("kind", kinds())


@every_kind
@every_lm
def test_graph_called_from_sync_code(make: Callable[[Reply], Any], kind: str):
    program = program_of(kinds()[kind], output=Text)
    with dspy.context(lm=make(answering), adapter=dspy.ChatAdapter()):
        assert program(topic="x") == Text(text="hi")


@every_kind
async def test_graph_called_on_a_loop_and_awaited_and_streamed(kind: str):
    lm = Legacy(answering)
    program = program_of(kinds()[kind], output=Text)
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        assert program(topic="x") == Text(text="hi")
        assert await program.aforward(topic="x") == Text(text="hi")
        events = await events_of(program.astream(topic="x"))
    assert events[-1]["prediction"] == Text(text="hi")
    assert threading.get_ident() not in lm.threads
    texts = {event["text"] for event in of("message_end", events)}
    assert "hi" in texts
    assert len(of("lm_end", events)) == lm.calls // 3
    assert {event["usage"]["input_tokens"] for event in of("lm_end", events)} == {3}


class Number(BaseModel):
    number: int


@pytest.mark.parametrize("how", ["sync", "async"])
async def test_model_corrects_itself(how: str):
    replies = iter([chat(number="many"), chat(number="7")])
    prompts: list[str] = []

    def reply(prompt: str) -> str:
        prompts.append(prompt)
        return next(replies)

    program = program_of(node("count", Topic, Number), output=Number)
    with dspy.context(lm=Legacy(reply), adapter=dspy.ChatAdapter()):
        if how == "sync":
            assert await anyio.to_thread.run_sync(lambda: program(topic="x")) == Number(number=7)
        else:
            events = await events_of(program.astream(topic="x"))
            assert events[-1]["prediction"] == Number(number=7)
            assert outline(events, "validation_error") == [("validation_error", "count")]
    assert "many" in prompts[1]


class Notes(BaseModel):
    notes: Annotated[list[str], operator.add]


@pytest.mark.parametrize("how", ["sync", "async"])
async def test_parallel_nodes_stay_parallel(how: str):
    meeting = threading.Barrier(3)

    def reply(prompt: str) -> str:
        meeting.wait(10)  # all three are being asked at the same time
        return chat(notes='["x"]')

    graph = Graph()
    graph.add_node(StatefulNode("start", Topic, Topic, fn=lambda given: {"topic": given.topic}))
    for name in ("a", "b", "c"):
        graph.add_node(StatefulNode(name, Topic, Notes))
        graph.add_edge("start", name)
        graph.add_edge(name, END)
    graph.set_entry_point("start")
    program = AgentTranspiler.compile(graph, output_model=Notes)
    with dspy.context(lm=Legacy(reply), adapter=dspy.ChatAdapter()):
        if how == "sync":
            result = await anyio.to_thread.run_sync(lambda: program(topic="x"))
        else:
            result = await program.aforward(topic="x")
    assert result == Notes(notes=["x"] * 3)


def test_model_of_a_predictor_of_its_own():
    program = program_of(node("a", Topic, Text), output=Text)
    program.steps["a"].lm = own = Legacy(hello)
    with Script().use():
        assert program(topic="x") == Text(text="hi")
    assert own.calls == 1
    assert program.steps["a"].lm is own


def test_model_with_an_async_side_only_is_awaited_as_before():
    with Script(chat(text="hi")).use():
        assert program_of(node("a", Topic, Text), output=Text)(topic="x") == Text(text="hi")


def test_trace_and_history_are_kept_as_by_predict():
    program = program_of(node("a", Topic, Text), output=Text)
    lm = Legacy(hello)
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter(), trace=[]):
        program(topic="x")
        assert [predictor for predictor, _, _ in dspy.settings.trace] == [program.steps["a"]]
    assert len(lm.history) == 1


# -- Everything else ---------------------------------------------------------------------------------------------------


def look(word: str = "x") -> str:
    """Look."""
    return word


@pytest.mark.parametrize(
    "program",
    [
        dspy.Predict("topic -> text"),
        dspy.ChainOfThought("topic -> text"),
        dspy.ReAct("topic -> text", [look]),
        ReAct("topic -> text", [look]),
    ],
    ids=lambda program: type(program).__module__,
)
@every_lm
async def test_programs_run_as_agents_and_in_streams(make: Callable[[Reply], Any], program: Any):
    heard = Heard()
    with dspy.context(lm=make(answering), adapter=dspy.ChatAdapter()), within(emitter=heard):
        result = await Registry().add("asker", program).run(task_of(program), heard)
        assert result["text"] == "hi"
        async with stream_events(program, {"topic": "x"}) as events:
            streamed = [event async for event in events]
        assert events.outcome is not None
        assert events.outcome.prediction.text == "hi"
        items = [item async for item in streamify(program)(topic="x")]
        assert items[-1].text == "hi"
    assert [event.text for event in streamed if isinstance(event, MessageEnd) and event.text == "hi"] == ["hi"]
    assert len(heard.of(LmStart)) == len(heard.of(LmEnd))
    assert bool(heard.of(LmStart)) == (make is not Called)  # DSPy reports no call that it does not make
    assert heard.of(NodeEnd)[-1].node == "asker"
    if hasattr(program, "tools"):
        assert [event.result for event in heard.of(ToolEnd)] == ["y"]
    assert heard.of(ValidationFailed) == []


def task_of(program: Any) -> Any:
    return Task(run="r", input=module_contract("asker", program).input_model(topic="x"))


async def test_loop_goes_on_while_a_synchronous_model_answers():
    asked, go_on = threading.Event(), threading.Event()

    def reply(prompt: str) -> str:
        asked.set()
        assert go_on.wait(10)
        return hello(prompt)

    results: list[Any] = []

    async def run(program: Any) -> None:
        results.append((await run_program(program, {"topic": "x"}, Heard())).prediction.text)

    for program in (dspy.Predict("topic -> text"), program_of(node("a", Topic, Text), output=Text)):
        asked.clear()
        go_on.clear()
        with anyio.fail_after(10), dspy.context(lm=Legacy(reply), adapter=dspy.ChatAdapter()):
            async with anyio.create_task_group() as group:
                group.start_soon(run, program)
                while not asked.is_set():
                    await anyio.lowlevel.checkpoint()
                go_on.set()  # by the loop
    assert results == ["hi", "hi"]


async def test_two_step_adapter_with_a_synchronous_extraction_model():
    main, extraction = lm_of(lambda _: "the text is hi"), Legacy(hello)
    with dspy.context(lm=main, adapter=dspy.TwoStepAdapter(extraction)):
        outcome = await run_program(dspy.Predict("topic -> text"), {"topic": "x"}, Heard())
    assert outcome.prediction.text == "hi"


async def test_error_of_a_synchronous_model_is_the_runs():
    def reply(prompt: str) -> str:
        raise ValueError("no answer")

    program = program_of(node("a", Topic, Text), output=Text)
    with dspy.context(lm=Legacy(reply), adapter=dspy.ChatAdapter()), pytest.raises(ValueError, match="no answer"):
        await program.aforward(topic="x")
