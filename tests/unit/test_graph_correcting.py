"""Self-correction: what a model learns of its own wrong answer, what watchers see, and what DSPy learns of it."""

import enum
from pathlib import Path
from typing import Any, Literal

import anyio
import dspy
import pytest
from dspy.teleprompt import BootstrapFewShot
from dspy.utils.exceptions import AdapterParseError
from pydantic import BaseModel, Field, ValidationError, model_validator

from agentcast.agents.base import ToolError
from agentcast.agents.graph import StatefulNode
from agentcast.agents.graph.errors import OutputError
from agentcast.agents.transpiler import AgentTranspiler
from tests.support.graphs import Script, Text, Topic, events_of, graph_of, node, of, outline, program_of
from tests.support.lms import chat, lm_of, pieces

pytestmark = pytest.mark.anyio


class Color(enum.Enum):
    RED = "red"


class Triage(BaseModel):
    category: Literal["bug", "question"]
    priority: int = Field(ge=1, le=5, description="1 is the most urgent.")
    tags: list[str] = []


class Short(BaseModel):
    text: str = Field(max_length=2)


GOOD = chat(category="bug", priority="2", tags="[]")
BAD = chat(category="bug", priority="9", tags="[]")


async def test_model_is_shown_its_answer_and_the_problems_and_asked_to_repair_them():
    program = program_of(node("triage", Topic, Triage, instructions="Sort the ticket."), output=Triage)
    script = Script(chat(category="bad", priority="9", tags='["a"]'), GOOD)
    with script.use():
        events = await events_of(program.astream(topic="It crashes"))
    assert events[-1]["prediction"] == Triage(category="bug", priority=2)
    (failed,) = of("validation_error", events)
    problem = "category: Input should be 'bug' or 'question'; priority: Input should be less than or equal to 5"
    assert failed == {
        "event": "validation_error",
        "span": failed["span"],
        "node": "triage",
        "attempt": 1,
        "max_retries": 3,
        "error": problem,
        "failed_fields": ["category", "priority"],
    }
    first, second = script.prompts
    assert "It crashes" in second
    assert "[[ ## category ## ]]\nbad" in second
    assert f"[[ ## problems ## ]]\n{problem}" in second
    assert "repair every problem" in script.systems[1]
    assert "Sort the ticket." in script.systems[1]
    assert "previous_answer" not in first + script.systems[0]
    assert "less than or equal to: 5" in script.systems[0]


async def test_value_that_is_readable_but_breaks_the_model():
    class Checked(Text):
        @model_validator(mode="after")
        def check(self) -> "Checked":
            if "!" not in self.text:
                raise ValueError("it must be loud")
            return self

    program = program_of(node("say", Topic, Checked, refine_instructions="Louder."), output=Text)
    script = Script(chat(text="hello"), chat(text="hello!"))
    with script.use():
        events = await events_of(program.astream(topic="x"))
    assert events[-1]["prediction"] == Text(text="hello!")
    (failed,) = of("validation_error", events)
    assert failed["error"] == "Value error, it must be loud"
    assert failed["failed_fields"] == []
    assert '"text": "hello"' in script.prompts[1]
    assert "Louder." in script.systems[1]
    assert "repair every problem" not in script.systems[1]


@pytest.mark.parametrize(
    ("answer", "problem", "fields"),
    [
        ("I have no idea", "category: Field required; priority: Field required", ["category", "priority"]),
        (chat(category="bug", tags="[]"), "priority: Field required", ["priority"]),
        (chat(category="bug", priority="many", tags="[1]"), None, ["priority", "tags"]),
    ],
)
async def test_answer_that_cannot_be_read(answer: str, problem: str | None, fields: list[str]):
    program = program_of(node("triage", Topic, Triage), output=Triage)
    script = Script(answer, GOOD)
    with script.use():
        events = await events_of(program.astream(topic="x"))
    assert events[-1]["prediction"].priority == 2
    (failed,) = of("validation_error", events)
    assert failed["failed_fields"] == fields
    assert problem is None or failed["error"] == problem
    assert answer.strip().splitlines()[0] in script.prompts[1]
    assert len(script.prompts) == 2, "DSPy does not ask again by itself"


class OwnAdapter(dspy.ChatAdapter):  # type: ignore[misc]
    pass


class Unreading(dspy.ChatAdapter):  # type: ignore[misc]
    """Finds fault with the first answer, in which the fields can be read."""

    read = 0

    def parse(self, signature: Any, completion: str) -> Any:
        self.read += 1
        if self.read == 1:
            raise AdapterParseError("Unreading", signature, completion)
        return super().parse(signature, completion)


async def test_answer_that_its_adapter_does_not_take_though_it_fits():
    script = Script(GOOD, GOOD)
    with script.use(), dspy.context(adapter=Unreading(use_json_adapter_fallback=False)):
        events = await events_of(program_of(node("triage", Topic, Triage)).astream(topic="x"))
    assert of("validation_error", events)[0]["error"] == "The answer does not have the form that was asked for"
    assert events[-1]["event"] == "finished"


XML = "<category>bug</category><priority>2</priority><tags>[]</tags>"


@pytest.mark.parametrize(
    ("adapter", "good"), [(None, GOOD), (OwnAdapter(), GOOD), (dspy.XMLAdapter(), XML)], ids=["none", "own", "XML"]
)
async def test_adapter_does_not_ask_again_by_itself(adapter: Any, good: str):
    """It would do so in JSON, without saying what was wrong."""
    script = Script("no fields at all", good)
    with script.use(), dspy.context(adapter=adapter):
        events = await events_of(program_of(node("triage", Topic, Triage)).astream(topic="x"))
    assert [event["attempt"] for event in of("validation_error", events)] == [1]
    assert "no fields at all" in script.prompts[1]
    assert len(script.prompts) == 2


async def test_answer_without_its_reasoning_is_asked_for_again():
    program = program_of(node("say", Topic, Text, use_cot=True), output=Text)
    with Script(chat(text="x"), chat(reasoning="r", text="y")).use():
        events = await events_of(program.astream(topic="x"))
    assert events[-1]["prediction"] == Text(text="y")
    assert of("validation_error", events)[0]["failed_fields"] == ["reasoning"]


async def test_other_adapters_correct_themselves_too():
    class Out(BaseModel):
        color: Color
        n: int

    program = program_of(node("a", Topic, Out), output=Out)
    script = Script('{"color": "blue", "n": "x"}', '{"color": "red", "n": 1}')
    with script.use(), dspy.context(adapter=dspy.JSONAdapter()):
        events = await events_of(program.astream(topic="x"))
    assert events[-1]["prediction"] == Out(color=Color.RED, n=1)
    assert events[-1]["metadata"] == {"steps": 1, "retries": 1}
    assert of("validation_error", events)[0]["failed_fields"] == ["color", "n"]
    assert (
        "color: Input should be 'red'; n: Input should be a valid integer" in of("validation_error", events)[0]["error"]
    )


async def test_when_all_attempts_fail():
    program = program_of(node("triage", Topic, Triage, max_retries=2), output=Triage)
    script = Script(BAD, BAD, chat(category="bug", priority="8", tags="[]"))
    with script.use():
        events = await events_of(program.astream(topic="x"))
    failed = of("validation_error", events)
    assert [(event["attempt"], event["max_retries"]) for event in failed] == [(1, 2), (2, 2), (3, 2)]
    problem = "node 'triage': its output is wrong, after 3 attempts: priority: Input should be less than or equal to 5"
    assert events[-2] == {"event": "error", "node": "triage", "error": problem}
    assert outline(events)[-1] == ("node_error", "triage")
    error = events[-1]["exception"]
    assert isinstance(error, OutputError)
    assert (error.node, error.attempts) == ("triage", 3)
    assert '"priority": 8' in error.last_output
    assert isinstance(error.__cause__, ValidationError)
    assert script.replies == []


async def test_no_retries():
    program = program_of(node("triage", Topic, Triage, max_retries=0))
    with Script(BAD).use(), pytest.raises(OutputError, match="it was asked for once") as error:
        await program.aforward(topic="x")
    assert error.value.attempts == 1


async def test_the_formatter_says_what_is_wrong():
    def formatter(error: ValidationError) -> str:
        return f"{error.error_count()} of {error.title} are wrong"

    program = AgentTranspiler.compile(graph_of(node("triage", Topic, Triage)), Triage, error_formatter=formatter)
    script = Script(BAD, GOOD)
    with script.use():
        events = await events_of(program.astream(topic="x"))
    assert of("validation_error", events)[0]["error"] == "1 of Triage are wrong"
    assert "1 of Triage are wrong" in script.prompts[1]


async def test_what_a_formatter_says_is_a_text_without_secrets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_API_KEY", "sk-0123456789")
    graph = graph_of(node("a", Topic, Short, lambda _: {"text": "sk-0123456789"}))
    events = await events_of(AgentTranspiler.compile(graph, error_formatter=str).astream(topic="x"))
    (failed,) = of("validation_error", events)
    assert "input_value='[redacted]'" in failed["error"]
    program = AgentTranspiler.compile(graph, error_formatter=lambda error: error.error_count())  # type: ignore[arg-type,return-value]
    assert of("validation_error", await events_of(program.astream(topic="x")))[0]["error"] == "1"


async def test_each_attempt_is_given_the_same():
    class Items(BaseModel):
        items_: list[int]

    seen: list[list[int]] = []

    def fn(given: Items) -> dict[str, str]:
        seen.append(given.items_.copy())
        given.items_.clear()
        return {}

    class Module(dspy.Module):  # type: ignore[misc]
        async def aforward(self, items_: list[int]) -> dict[str, str]:
            return fn(Items.model_construct(items_=items_))

    for work in ({"fn": fn}, {"module": Module()}):
        seen.clear()
        await events_of(program_of(StatefulNode("a", Items, Text, max_retries=2, **work)).astream(items_=[1]))
        assert seen == [[1]] * 3


async def test_functions_and_modules_are_called_again_only_if_they_say_so():
    calls: list[Any] = []

    def fn(given: Topic) -> dict[str, str]:
        calls.append(given)
        return {"text": "ok"} if len(calls) > 2 else {}

    events = await events_of(program_of(node("a", Topic, Text, fn, max_retries=2)).astream(topic="x"))
    assert [event["attempt"] for event in of("validation_error", events)] == [1, 2]
    assert events[-1]["prediction"].text == "ok"
    module = dspy.Predict("topic -> text")

    with Script(chat(text="long"), chat(text="ok")).use():
        events = await events_of(program_of(node("a", Topic, Short, module=module, max_retries=1)).astream(topic="x"))
    assert events[-1]["prediction"].text == "ok"
    assert len(of("message_retracted", events)) == 1


# -- Messages ----------------------------------------------------------------------------------------------------------


async def test_text_of_a_failed_attempt_is_retracted():
    """Unreadable ones, and those that were read and then rejected; the accepted one stays."""
    replies = [chat(category="thing", priority="1", tags="[]"), BAD, GOOD]
    program = program_of(node("triage", Topic, Triage), output=Triage)
    with dspy.context(lm=lm_of(lambda _: pieces(replies.pop(0), 5))):
        events = await events_of(program.astream(topic="x"))
    (span,) = [event["span"] for event in of("node_start", events)]
    assert all(event["span"] == span for event in of("message_start", events))
    started = [event["message"] for event in of("message_start", events)]
    void = [event["message"] for event in of("message_retracted", events)]
    assert set(started) - set(void) == {event["message"] for event in of("message_end", events)[-3:]}
    assert len(void) == len(set(void)) == 6
    order = [
        event["event"] for event in events if event["event"] in ("message_retracted", "validation_error", "lm_start")
    ]
    attempt = ["lm_start", *["message_retracted"] * 3, "validation_error"]
    assert order == [*attempt, *attempt, "lm_start"]
    assert all(event["parent"] == span for event in of("lm_start", events))


async def test_text_of_a_program_inside_is_retracted_with_its_attempt():
    class Short(BaseModel):
        text: str = Field(max_length=2)

    inner = program_of(node("deep", Topic, Text), output=Text)
    program = program_of(node("outer", Topic, Short, module=inner, max_retries=1))
    with Script(chat(text="long"), chat(text="ok")).use():
        events = await events_of(program.astream(topic="x"))
    first, second = of("message_start", events)
    assert [event["message"] for event in of("message_retracted", events)] == [first["message"]]
    assert of("message_end", events)[-1]["message"] == second["message"]


# -- Tools -------------------------------------------------------------------------------------------------------------


def turn(tool: str, **args: Any) -> str:
    return chat(next_thought="hm", next_tool_name=tool, next_tool_args=str(args).replace("'", '"'))


async def test_tools_are_used_once_and_only_the_answer_is_corrected():
    looked: list[str] = []

    def look(name: str) -> str:
        """Look it up."""
        looked.append(name)
        if name == "nothing":
            raise ToolError("there is no such thing")
        return f"about {name}"

    program = program_of(node("triage", Topic, Triage, tools=[look]), output=Triage)
    bad, unreadable = (chat(reasoning="r", category=c, priority="9", tags="[]") for c in ("bug", "thing"))
    good = chat(reasoning="r", category="bug", priority="1", tags="[]")
    script = Script(turn("look", name="nothing"), turn("look", name="x"), turn("finish"), unreadable, bad, good)
    with script.use():
        events = await events_of(program.astream(topic="x"))
    assert events[-1]["prediction"] == Triage(category="bug", priority=1)
    assert looked == ["nothing", "x"]
    (span,) = [event["span"] for event in of("node_start", events)]
    assert [(event["tool"], event["parent"]) for event in of("tool_start", events)] == [("look", span)] * 2
    assert [event["attempt"] for event in of("validation_error", events)] == [1, 2]
    assert all(event["span"] == span for event in of("message_start", events))
    started = {event["message"]: event["field"] for event in of("message_start", events)}
    void = [started[event["message"]] for event in of("message_retracted", events)]
    assert sorted(void) == ["category", "priority", "reasoning", "tags"], "what was thought and done stands"
    assert "about x" in script.prompts[-1]
    assert "[[ ## previous_answer ## ]]" in script.prompts[-1]
    assert [name for name, _ in program.named_predictors()] == [
        "steps['triage'].react",
        "steps['triage'].extract.predict",
    ]


# -- DSPy --------------------------------------------------------------------------------------------------------------


def example(topic: str) -> Any:
    return dspy.Example(topic=topic, category="bug", priority=2, tags=[]).with_inputs("topic")


def test_optimizer_tunes_the_program_and_learns_from_accepted_attempts_only():
    program = program_of(node("triage", Topic, Triage), output=Triage)
    script = Script(BAD, chat(category="nothing", priority="2", tags="[]"), GOOD, BAD, GOOD)
    optimizer = BootstrapFewShot(
        metric=lambda example, result, trace: result.priority == 2, max_bootstrapped_demos=2, max_labeled_demos=0
    )
    with script.use():
        tuned = optimizer.compile(program, trainset=[example("one"), example("two")])
    assert script.replies == []
    (predictor,), (original,) = tuned.predictors(), program.predictors()
    assert [dict(demo.items()) for demo in predictor.demos] == [
        {"augmented": True, "topic": topic, "category": "bug", "priority": 2, "tags": []} for topic in ("one", "two")
    ]
    assert original.demos == []
    script = Script(GOOD, GOOD)
    with script.use():
        tuned(topic="three")
        seen = script.systems[0] + script.prompts[0]
        program(topic="three")
    assert len(script.prompts) == 2
    assert seen


async def test_demos_reach_the_prompt(tmp_path: Path):
    program = program_of(node("triage", Topic, Triage, instructions="Sort."), output=Triage)
    (predictor,) = program.predictors()
    predictor.demos = [example("a demo")]
    predictor.signature = predictor.signature.with_instructions("Sort well.")
    program.save(tmp_path / "program.json")
    other = program_of(node("triage", Topic, Triage, instructions="Sort."), output=Triage)
    other.load(tmp_path / "program.json")
    asked: list[Any] = []

    class Keep(Script):
        async def complete(self, request: Any) -> Any:
            asked.append(" ".join(message.text or "" for message in request.messages) + str(request.system))
            return await super().complete(request)

    with Keep(BAD, GOOD).use():
        await other.acall(topic="x")
    assert len(asked) == 2
    for prompt in asked:
        assert "a demo" in prompt
        assert "Sort well." in prompt
    assert other.predictors()[0] is other.steps["triage"], "no copies"


def test_copies_have_predictors_of_their_own_and_run():
    program = program_of(
        node("ask", Topic, Text, use_cot=True), node("up", Text, Text, lambda t: {"text": t.text.upper()}), output=Text
    )
    copy = program.reset_copy()
    assert [name for name, _ in copy.named_predictors()] == ["steps['ask'].predict"]
    assert copy.predictors()[0] is not program.predictors()[0]
    copy.predictors()[0].demos = [1]
    assert program.predictors()[0].demos == []
    with Script(chat(reasoning="r", text="hi")).use():
        assert program.deepcopy()(topic="x") == Text(text="HI")


async def test_usage_is_tracked(caplog: pytest.LogCaptureFixture):
    program = program_of(node("triage", Topic, Triage), output=Triage)
    with Script(BAD, GOOD).use(), dspy.track_usage() as tracker:
        await program.aforward(topic="x")
    assert tracker.get_total_tokens()["script/lm"]["prompt_tokens"] == 20
    plain = program_of(node("triage", Topic, Triage))
    with Script(BAD, GOOD, BAD, GOOD).use(), dspy.context(track_usage=True):
        prediction = await plain.aforward(topic="x")
        assert prediction.get_lm_usage()["script/lm"]["prompt_tokens"] == 20
        await program.acall(topic="x")
    assert caplog.records == []


async def test_set_lm_and_callbacks_work_as_with_any_module():
    class Calls(dspy.utils.callback.BaseCallback):  # type: ignore[misc]
        seen: list[str]

        def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            self.seen.append(type(instance).__name__)

    program = program_of(node("ask", Topic, Text), output=Text)
    calls = Calls()
    calls.seen = []
    program.set_lm(lm_of(lambda _: chat(text="own")))
    with Script().use(), dspy.context(callbacks=[calls]):
        assert (await program.aforward(topic="x")).text == "own"
    assert calls.seen == ["Program", "Predict"]


async def test_cancelled_in_a_correction():
    asked = anyio.Event()

    async def hang(_: str) -> str:
        asked.set()
        await anyio.sleep_forever()
        return ""

    program = program_of(node("triage", Topic, Triage))
    with Script(BAD, hang).use():
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: program.aforward(topic="x"))
            with anyio.fail_after(10):
                await asked.wait()
            group.cancel_scope.cancel()
