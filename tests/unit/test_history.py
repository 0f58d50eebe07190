"""`dspy.History` as input: filled from the thread, not asked for, and seen by whatever predictor is asked."""

from types import SimpleNamespace
from typing import Annotated, Any, Literal, Optional

import anyio
import dspy
import pytest
from pydantic import BaseModel

from agentcast.agents.base import Emitter, Task, Turn
from agentcast.agents.graph import END, Graph, StatefulNode
from agentcast.agents.inputs.history import HISTORY_TURNS
from agentcast.agents.react import ReAct
from agentcast.agents.registry import Registry
from agentcast.agents.streaming import stream_events
from agentcast.agents.transpiler import AgentTranspiler
from tests.support.lms import chat
from tests.unit.test_react import FINISH, Heard, Script, turn

pytestmark = pytest.mark.anyio


class Chat(dspy.Signature):  # type: ignore[misc]  # dspy is untyped
    """Talk."""

    question: str = dspy.InputField()
    history: dspy.History = dspy.InputField()
    answer: str = dspy.OutputField()


def look(word: str = "x") -> str:
    """Look it up."""
    return f"looked {word}"


ANSWER = chat(reasoning="r", answer="Berlin", text="Berlin", reply="Berlin")
STEPS = (turn("t", "look", {"word": "y"}), FINISH)
TURNS = (
    Turn({"question": "Capital of France?"}, {"answer": "Paris"}),
    Turn({"question": "And of Spain?"}, {"answer": "Madrid"}),
)
SAID = ("Capital of France?", "Paris", "And of Spain?", "Madrid")


class Custom(dspy.Module):  # type: ignore[misc]
    def __init__(self, kind: Any = dspy.Predict, signature: Any = Chat) -> None:
        super().__init__()
        self.answer = kind(signature)

    async def aforward(self, question: str, history: dspy.History) -> Any:
        prediction: Any = await self.answer.acall(question=question, history=history)
        return prediction


class Asked(BaseModel):
    question: str
    history: dspy.History


class Text(BaseModel):
    text: str


def graph(**work: Any) -> Any:
    graph = Graph()
    graph.add_node(StatefulNode("a", Asked, Text, **work))
    graph.add_edge("a", END)
    graph.set_entry_point("a")
    return AgentTranspiler.compile(graph, output_model=Text)


def programs() -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Program, and the replies before the last one."""
    return {
        "predict": (dspy.Predict(Chat), ()),
        "chain of thought": (dspy.ChainOfThought(Chat), ()),
        "react": (ReAct(Chat, [look]), STEPS),
        "stock react": (dspy.ReAct(Chat, [look]), STEPS),
        "module": (Custom(), ()),
        "module of react": (Custom(lambda signature: ReAct(signature, [look])), STEPS),
        "module of stock react": (Custom(lambda signature: dspy.ReAct(signature, [look])), STEPS),
        "graph": (graph(), ()),
        "graph that reasons": (graph(use_cot=True), ()),
        "graph with tools": (graph(tools=[look]), STEPS),
        "graph of predict": (graph(module=dspy.Predict("question, history: dspy.History -> text")), ()),
        "graph of react": (graph(module=ReAct("question, history: dspy.History -> text", [look])), STEPS),
    }


async def ask(
    program: Any, *replies: str, turns: tuple[Turn, ...] = TURNS, adapter: Any = None, **inputs: Any
) -> tuple[Any, Script]:
    """A run of `program` as an agent, with scripted replies of the model."""
    agent = Registry().add("chat", program)
    script = Script(*replies)
    adapter = adapter or dspy.ChatAdapter(use_json_adapter_fallback=False)
    given = agent.spec.input_model(**(inputs or {"question": "And of Germany?"}))
    with dspy.context(lm=script.lm(), adapter=adapter):
        result = await agent.run(Task(run="r", input=given, history=turns), Heard())
    assert script.replies == []
    return result, script


@pytest.mark.parametrize("name", programs())
async def test_every_prompt_shows_what_was_said(name: str):
    program, steps = programs()[name]
    result, script = await ask(program, *steps, ANSWER)
    assert len(script.prompts) == len(steps) + 1
    for prompt in script.prompts:
        at = [prompt.find(text) for text in SAID]
        assert sorted(at) == at, prompt
        assert -1 not in at, prompt
        assert "\nNone\n" not in prompt  # what is shown of a field that a turn has not
    assert "Berlin" in str(result)


@pytest.mark.parametrize("name", programs())
def test_it_is_not_asked_for(name: str):
    program, _ = programs()[name]
    spec = Registry().add("chat", program).spec
    assert list(spec.input_model.model_fields) == ["question"]
    assert list(spec.input_model.model_json_schema()["properties"]) == ["question"]
    assert "History" not in str(spec.input_model.model_json_schema())
    with pytest.raises(ValueError, match="history"):
        spec.input_model.model_validate({"question": "x", "history": {"messages": []}})


@pytest.mark.parametrize("name", programs())
async def test_first_turn_has_an_empty_one(name: str):
    program, steps = programs()[name]
    _, script = await ask(program, *steps, ANSWER, turns=())
    assert all("Paris" not in prompt for prompt in script.prompts)


async def test_result_of_a_module_may_be_a_text():
    seen: list[Any] = []

    class Echo(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.answer = dspy.Predict(Chat)

        async def aforward(self, question: str, history: dspy.History) -> str:
            seen.append(history.messages)
            return str((await self.answer.acall(question=question, history=history)).answer)

    turns = (Turn({"question": "Capital of France?"}, "Paris"), Turn({"question": "And of Spain?"}, "Madrid"))
    _, script = await ask(Echo(), ANSWER, turns=turns)
    assert [message["answer"] for message in seen[0]] == ["Paris", "Madrid"]
    assert all(text in script.prompts[0] for text in SAID)


RESULTS: list[tuple[Any, str]] = [
    ("Paris", "Paris"),
    ({"text": "Paris", "score": 1}, "text: Paris\nscore: 1"),
    (["Paris", "Lyon"], "['Paris', 'Lyon']"),
    ({"answer": ["Paris"]}, '["Paris"]'),
    ({"answer": [1, 2]}, "[1, 2]"),
    ({"answer": {"city": "Paris"}}, '{"city": "Paris"}'),
    (None, "None"),
    (3.5, "3.5"),
]


@pytest.mark.parametrize(("result", "text"), RESULTS)
async def test_turns_of_other_agents_and_shapes_are_shown(result: Any, text: str):
    _, script = await ask(dspy.Predict(Chat), ANSWER, turns=(Turn({"topic": "Towns of France"}, result),))
    (prompt,) = script.prompts
    assert "[[ ## question ## ]]\nTowns of France" in prompt
    assert f"[[ ## answer ## ]]\n{text}\n\n[[ ## completed ## ]]" in prompt


async def test_every_predictor_of_a_module_sees_all_of_it():
    class Searching(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.rewrite = dspy.Predict("question, history: dspy.History -> query")
            self.answer = dspy.Predict("query, history: dspy.History -> answer, score: float")

        async def aforward(self, question: str, history: dspy.History) -> Any:
            rewritten = await self.rewrite.acall(question=question, history=history)
            return await self.answer.acall(query=rewritten.query, history=history)

    _, script = await ask(Searching(), chat(query="Germany?"), chat(answer="Berlin", score="1"))
    for prompt in script.prompts:
        assert all(text in prompt for text in SAID)


class Talk(dspy.Signature):  # type: ignore[misc]
    question: str = dspy.InputField()
    earlier: Annotated[dspy.History, "of this thread"] = dspy.InputField()
    answer: str = dspy.OutputField()


class Perhaps(dspy.Signature):  # type: ignore[misc]
    question: str = dspy.InputField()
    history: dspy.History | None = dspy.InputField(default=None)
    answer: str = dspy.OutputField()


class Maybe(dspy.Signature):  # type: ignore[misc]
    question: str = dspy.InputField()
    conversation: Optional[dspy.History] = dspy.InputField()  # noqa: UP045 -- as people write it
    answer: str = dspy.OutputField()


class Two(dspy.Signature):  # type: ignore[misc]
    history: str = dspy.InputField()
    turns: dspy.History = dspy.InputField()
    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


@pytest.mark.parametrize("signature", [Talk, Perhaps, Maybe, Two])
@pytest.mark.parametrize("kind", ["predict", "react"])
async def test_any_name_and_optional_types(signature: Any, kind: str):
    program = dspy.Predict(signature) if kind == "predict" else ReAct(signature, [look])
    steps = () if kind == "predict" else STEPS
    spec = Registry().add("chat", program).spec
    assert list(spec.input_model.model_fields) == ["question"]
    _, script = await ask(program, *steps, ANSWER)
    for prompt in script.prompts:
        assert all(text in prompt for text in SAID)


async def test_text_field_named_history_stays_text():
    _, script = await ask(dspy.Predict("history, question -> answer"), ANSWER)
    text = "question: Capital of France?\nanswer: Paris\n\nquestion: And of Spain?\nanswer: Madrid"
    assert f"[[ ## history ## ]]\n{text}\n\n[[ ## question ## ]]\nAnd of Germany?" in script.prompts[0]


async def test_several_inputs_and_outputs_and_defaults():
    class Translate(dspy.Signature):  # type: ignore[misc]
        text: str = dspy.InputField()
        language: str = dspy.InputField()
        history: dspy.History = dspy.InputField()
        tone: Literal["formal", "casual"] = dspy.OutputField()
        translation: str = dspy.OutputField()

    turns = (
        Turn({"text": "Hello", "language": "French"}, {"tone": "casual", "translation": "Salut"}),
        Turn({"text": "Bye"}, {"tone": "formal", "translation": "Au revoir"}),
    )
    inputs = {"text": "Yes", "language": "German"}
    _, script = await ask(dspy.Predict(Translate), chat(tone="casual", translation="Ja"), turns=turns, **inputs)
    history = dspy.History(messages=[{**one.input, **one.result} for one in turns])
    assert script.prompts == [await plain_prompt(dspy.Predict(Translate), history=history, **inputs)]


async def plain_prompt(program: Any, **inputs: Any) -> str:
    """What plain DSPy asks."""
    script = Script(chat(tone="casual", translation="Ja", answer="Berlin"))
    with dspy.context(lm=script.lm(), adapter=dspy.ChatAdapter()):
        await program.acall(**inputs)
    return script.prompts[0]


async def test_prompt_is_that_of_dspy_given_the_same_history():
    history = dspy.History(messages=[{**one.input, **one.result} for one in TURNS])
    _, script = await ask(dspy.Predict(Chat), ANSWER)
    assert script.prompts == [await plain_prompt(dspy.Predict(Chat), question="And of Germany?", history=history)]


@pytest.mark.parametrize("adapter", [dspy.JSONAdapter(), dspy.XMLAdapter()], ids=lambda each: type(each).__name__)
async def test_other_adapters(adapter: Any):
    if isinstance(adapter, dspy.XMLAdapter):
        fields = {"next_thought": "t", "next_tool_name": "finish", "next_tool_args": "{}"}
        step = "".join(f"<{name}>{text}</{name}>" for name, text in fields.items())
        answer = "<reasoning>r</reasoning><answer>Berlin</answer>"
    else:
        step = '{"next_thought": "t", "next_tool_name": "finish", "next_tool_args": {}}'
        answer = '{"reasoning": "r", "answer": "Berlin"}'
    for program in (ReAct(Chat, [look]), dspy.ReAct(Chat, [look])):
        result, script = await ask(program, step, answer, adapter=adapter)
        assert result == {"answer": "Berlin"}
        for prompt in script.prompts:
            assert all(text in prompt for text in SAID)


async def test_only_the_last_turns_and_not_too_much_of_them():
    turns = tuple(Turn({"question": f"Q{number:03}"}, {"answer": "x" * 100_000}) for number in range(50))
    _, script = await ask(dspy.Predict(Chat), ANSWER, turns=turns)
    assert f"Q{50 - HISTORY_TURNS:03}" in script.prompts[0]
    assert f"Q{49 - HISTORY_TURNS:03}" not in script.prompts[0]
    assert len(script.prompts[0]) < HISTORY_TURNS * 5_000


async def test_function_takes_the_turns_too():
    registry = Registry()
    seen: list[Any] = []

    @registry.agent
    async def talk(question: str, before: dspy.History, emit: Emitter) -> str:
        """Talk."""
        seen.append(before.messages)
        return "x"

    assert list(registry["talk"].spec.input_model.model_fields) == ["question"]
    given = registry["talk"].spec.input_model(question="x")
    await registry["talk"].run(Task(run="r", input=given, history=TURNS), Heard())
    assert seen == [[{**one.input, **one.result} for one in TURNS]]


async def test_input_model_that_asks_for_it_is_asked():
    class Mine(BaseModel):
        question: str
        history: dspy.History

    agent = Registry().add("chat", dspy.Predict(Chat), input_model=Mine)
    script = Script(ANSWER)
    given = Mine.model_validate({"question": "q", "history": {"messages": [{"question": "mine", "answer": "own"}]}})
    with dspy.context(lm=script.lm(), adapter=dspy.ChatAdapter()):
        await agent.run(Task(run="r", input=given, history=TURNS), Heard())
    assert "mine" in script.prompts[0]
    assert "Paris" not in script.prompts[0]


# -- Without a hub -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [dspy.History, lambda messages: {"messages": messages}], ids=["object", "data"])
async def test_stream_events_takes_a_history_and_needs_none(given: Any):
    messages = [{**one.input, **one.result} for one in TURNS]
    for history, shown in (({"history": given(messages=messages)}, True), ({}, False)):
        script = Script(*STEPS, ANSWER)
        with dspy.context(lm=script.lm(), adapter=dspy.ChatAdapter()):
            async with stream_events(ReAct(Chat, [look]), {"question": "And of Germany?", **history}) as events:
                async for _ in events:
                    pass
        assert [all(text in prompt for text in SAID) for prompt in script.prompts] == [shown] * 3


@pytest.mark.filterwarnings("ignore:Implementing custom LMs:DeprecationWarning")
async def test_loop_called_from_sync_code_sees_it_too():
    prompts: list[str] = []
    replies = iter([*STEPS, ANSWER])

    class Legacy(dspy.BaseLM):  # type: ignore[misc]
        def forward(self, prompt: Any = None, messages: Any = None, **options: Any) -> Any:
            prompts.append("\n".join(message["content"] for message in messages))
            message = SimpleNamespace(content=next(replies), tool_calls=None)
            return SimpleNamespace(choices=[SimpleNamespace(message=message)], usage={}, model="legacy")

    history = dspy.History(messages=[{**one.input, **one.result} for one in TURNS])
    with dspy.context(lm=Legacy("legacy"), adapter=dspy.ChatAdapter()):
        await anyio.to_thread.run_sync(lambda: ReAct(Chat, [look])(question="And of Germany?", history=history))
    assert [all(text in prompt for text in SAID) for prompt in prompts] == [True] * 3


async def test_step_without_earlier_turns_is_that_of_dspy():
    prompts = []
    for program in (ReAct(Chat, [look]), dspy.ReAct(Chat, [look])):
        script = Script(*STEPS, ANSWER)
        with dspy.context(lm=script.lm(), adapter=dspy.ChatAdapter()):
            await program.acall(question="q", history=dspy.History(messages=[]))
        prompts.append(script.prompts)
    assert prompts[0] == prompts[1]
