"""`@self_correcting`: functions and modules whose result has its type, and whose attempts belong to the run around."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, assert_type

import anyio
import dspy
import pytest
from dspy.teleprompt import BootstrapFewShot
from pydantic import BaseModel, Field

from agentcast import StatefulNode
from agentcast.agents.base import Emitter
from agentcast.agents.graph.errors import OutputError
from agentcast.agents.registry import Registry
from agentcast.agents.streaming import stream_events
from agentcast.agents.transpiler import Program, self_correcting
from tests.support.graphs import Script, Text, Topic, events_of, node, of, outline, program_of
from tests.support.hub import open_hub
from tests.support.lms import chat, lm_of, pieces

pytestmark = pytest.mark.anyio


class Review(BaseModel):
    verdict: Literal["good", "bad"]
    score: int = Field(ge=1, le=5)


@self_correcting
async def review(text: str, language: str = "English") -> Review:
    """Review the text.

    Be short."""
    raise AssertionError("the body is never run")


@self_correcting(max_retries=1)
def judge(text: str) -> Review:
    """Judge the text."""
    raise AssertionError


BAD, GOOD = chat(verdict="fine", score="9"), chat(verdict="good", score="5")
READABLE = chat(verdict="bad", score="9")


# -- Functions ---------------------------------------------------------------------------------------------------------


async def test_parameters_docstring_and_return_type_make_the_prompt_and_errors_are_shown():
    script = Script(BAD, GOOD)
    with script.use():
        found = await review("It was good.", language="German")
    assert_type(found, Review)
    assert found == Review(verdict="good", score=5)
    first, second = script.prompts
    assert "It was good." in first
    assert "German" in first
    assert "Be short." in script.systems[0]
    assert "[[ ## previous_answer ## ]]" in second
    assert "verdict: Input should be 'good' or 'bad'; score: Input should be less than or equal to 5" in second
    assert "previous_answer" not in first + script.systems[0]


async def test_defaults_of_parameters_reach_the_model():
    script = Script(GOOD)
    with script.use():
        await review(text="x")
    assert "English" in script.prompts[0]


def test_synchronous_functions_are_called():
    with Script(BAD, GOOD).use():
        found = judge("x")
    assert_type(found, Review)
    assert found.score == 5


async def test_synchronous_functions_can_be_called_on_a_loop():
    with Script(GOOD).use():
        assert judge(text="x").score == 5


async def test_retries_are_bounded_by_the_decorator_or_the_call():
    script = Script(BAD, BAD, GOOD)
    with script.use(), pytest.raises(OutputError, match="node 'judge': its output is wrong, after 2 attempts"):
        judge("x")
    assert len(script.replies) == 1
    script = Script(*[BAD] * 4, GOOD)
    with script.use(), pytest.raises(OutputError, match="after 4 attempts"):
        await review("x")
    with Script(BAD, GOOD).use():
        assert judge("x").score == 5
    call: Any = judge
    with Script(BAD, GOOD).use(), pytest.raises(OutputError, match="it was asked for once"):
        call("x", max_retries=0)
    with Script(BAD, BAD, GOOD).use():
        assert (await judge.aforward(text="x", max_retries=2)).score == 5
    with Script(BAD, BAD, GOOD).use():
        failed = of("validation_error", await events_of(judge.astream(text="x")))
    assert [event["max_retries"] for event in failed] == [1, 1]


async def test_return_types_that_are_no_models():
    @self_correcting
    async def tags(text: str) -> Annotated[list[str], Field(max_length=2)]:
        """Give tags."""
        raise AssertionError

    @self_correcting
    def is_urgent(text: str) -> bool:
        """Say whether it is urgent."""
        raise AssertionError

    script = Script(chat(answer='["a", "b", "c"]'), chat(answer='["a"]'), chat(answer="True"))
    with script.use():
        assert await tags("x") == ["a"]
        assert is_urgent("x") is True


async def test_models_are_parameters_too_and_names_may_be_those_of_outputs():
    @self_correcting
    async def rewrite(draft: Text, text: str) -> Text:
        """Rewrite."""
        raise AssertionError

    script = Script(chat(text="new"))
    with script.use():
        assert await rewrite(Text(text="old"), "shorter") == Text(text="new")
    assert "[[ ## current_text ## ]]\nshorter" in script.prompts[0]


async def test_arguments_are_checked_as_in_any_call():
    call: Any = review
    with pytest.raises(TypeError, match="missing a required argument: 'text'"):
        await call()
    with pytest.raises(TypeError, match="unexpected keyword argument 'tone'"):
        await call("x", tone="kind")
    with pytest.raises(ValueError, match="text\n  Input should be a valid string"):
        await call(3)


def test_it_looks_like_the_function_and_is_a_program():
    assert isinstance(review, Program)
    found: Any = review
    assert (found.__name__, found.__doc__.partition("\n")[0]) == ("review", "Review the text.")
    assert [name for name, _ in review.named_predictors()] == ["steps['review']"]
    assert review.graph.description == "Review the text."


async def test_a_language_model_of_its_own():
    own = lm_of(lambda _: pieces(GOOD, 9))

    @self_correcting(lm=own)
    async def graded(text: str) -> Review:
        """Grade."""
        raise AssertionError

    with Script().use():
        assert (await graded("x")).score == 5


async def test_refine_instructions_replace_those_of_a_correction():
    graded: Any = self_correcting(refine_instructions="Only good or bad.")(judge.__wrapped__)
    script = Script(BAD, GOOD)
    with script.use():
        graded("x")
    assert "Only good or bad." in script.systems[1]


async def test_prompts_are_saved_and_loaded(tmp_path: Path):
    tuned = review.deepcopy()
    tuned.steps["review"].signature = tuned.steps["review"].signature.with_instructions("Tuned.")
    tuned.save_prompts(tmp_path / "prompts.json")
    fresh = review.deepcopy()
    fresh.load_prompts(tmp_path / "prompts.json")
    script = Script(GOOD, GOOD)
    with script.use():
        await fresh("x")
        await review("x")
    assert "Tuned." in script.systems[0]
    assert "Tuned." not in script.systems[1]


async def test_only_the_accepted_attempt_is_traced():
    with Script(BAD, GOOD).use(), dspy.context(trace=[]):
        await review("x")
        ((predictor, inputs, prediction),) = dspy.settings.trace
    assert predictor is review.steps["review"]
    assert inputs == {"text": "x", "language": "English"}
    assert prediction.score == 5


# -- Mistakes ----------------------------------------------------------------------------------------------------------


def no_return(text: str):
    """x"""


def returns_none(text: str) -> None:
    """x"""


def untyped(text) -> Review:
    raise AssertionError


def starred(*texts: str) -> Review:
    raise AssertionError


def positional(text: str, /) -> Review:
    raise AssertionError


def reserved(max_steps: int) -> Review:
    raise AssertionError


def taken(config: str) -> Review:
    raise AssertionError


def unfound(text: "Nowhere") -> Review:  # type: ignore[name-defined]  # noqa: F821
    raise AssertionError


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (no_return, r"no_return\(\) has no return type: annotate it with the model of its result"),
        (returns_none, r"returns_none\(\) has no return type"),
        (untyped, r"parameter 'text' of untyped\(\) has no type: annotate it"),
        (starred, r"cannot be inferred from starred\(\), which takes \*texts"),
        (positional, r"cannot be inferred from positional\(\), which takes text"),
        (unfound, "a type of unfound cannot be found"),
        (Review, "decorates a function or a dspy.Module class, not <class"),
        (3, "decorates a function or a dspy.Module class, not 3"),
    ],
)
def test_what_cannot_be_decorated(function: Any, problem: str):
    with pytest.raises(TypeError, match=problem):
        self_correcting(function)


@pytest.mark.parametrize(
    ("function", "problem"),
    [(reserved, "'max_steps' has the name of an option"), (taken, "the field name 'config' of TakenInput is reserved")],
)
def test_names_of_parameters_that_are_taken(function: Any, problem: str):
    with pytest.raises(ValueError, match=problem):
        self_correcting(function)


def test_negative_retries():
    with pytest.raises(ValueError, match="max_retries is -1; it must be 0 or more"):
        self_correcting(max_retries=-1)(judge.__wrapped__)
    with pytest.raises(ValueError, match="max_retries is -1; it must be 0 or more"):
        self_correcting(max_retries=-1)(Rater)


# -- Module classes ----------------------------------------------------------------------------------------------------


@self_correcting
class Reviewer(dspy.Module):  # type: ignore[misc]  # dspy is untyped
    """Reviews."""

    def __init__(self) -> None:
        super().__init__()
        self.think = dspy.Predict("text -> thought")
        self.rate = dspy.Predict("text, thought -> verdict, score: int")
        self.worked = 0

    async def aforward(self, text: str) -> Review:
        self.worked += 1
        thought = await self.think.acall(text=text)
        rated: Review = await self.rate.acall(text=text, thought=thought.thought)
        return rated


@self_correcting(schema=Review, max_retries=1)
class Rater(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.rate = dspy.ChainOfThought("text -> verdict, score: int")

    def forward(self, text):
        return self.rate(text=text)


THOUGHT = chat(thought="hm")


async def test_module_is_called_again_and_its_writers_are_shown_what_was_wrong():
    reviewer = Reviewer()
    script = Script(THOUGHT, BAD, THOUGHT, GOOD)
    with script.use():
        found = await reviewer.acall(text="It was good.")
    assert found == Review(verdict="good", score=5)
    assert isinstance(reviewer, Reviewer)
    assert (Reviewer.__name__, Reviewer.__doc__, len(Reviewer.__mro__)) == (
        "Reviewer",
        "Reviews.",
        len(dspy.Module.__mro__) + 2,
    )
    assert reviewer.worked == 2
    assert ["previous_answer" in prompt for prompt in script.prompts] == [False, False, False, True]
    assert "verdict: Input should be 'good' or 'bad'" in script.prompts[3]
    assert [name for name, _ in reviewer.named_predictors()] == ["think", "rate"]


@pytest.mark.filterwarnings("ignore:Implementing custom LMs:DeprecationWarning")
def test_synchronous_module():
    lm = lm_of(lambda prompt: pieces(chat(reasoning="r", verdict="good", score="5"), 9))
    with dspy.context(lm=lm):
        assert Rater()(text="x") == Review(verdict="good", score=5)
        assert Rater()("x") == Review(verdict="good", score=5)


async def test_module_whose_answer_cannot_be_read_or_stays_wrong():
    script = Script("what?", THOUGHT, chat(verdict="good"), THOUGHT, GOOD)
    with script.use(), dspy.context(adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        assert (await Reviewer().acall(text="x")).score == 5
    assert "thought: Field required" in script.prompts[1]
    assert "score: Field required" in script.prompts[4]
    assert "previous_answer" not in script.prompts[3]
    kind: Any = self_correcting(max_retries=0)(Reviewer)
    with Script(*[THOUGHT, BAD] * 4).use(), pytest.raises(OutputError, match="node 'Reviewer'"):
        await kind().acall(text="x")


async def test_predictors_are_shown_errors_of_fields_that_the_module_makes_itself():
    @self_correcting
    class Mapped(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.say = dspy.Predict("text -> word")

        async def aforward(self, text: str) -> Review:
            said = await self.say.acall(text=text)
            result: Any = {"verdict": said.word, "score": 1}
            return result  # type: ignore[no-any-return]

    script = Script(chat(word="fine"), chat(word="good"))
    with script.use():
        assert (await Mapped().acall(text="x")).verdict == "good"
    assert "verdict: Input should be" in script.prompts[1]


async def test_each_attempt_of_a_module_is_given_the_same():
    seen: list[list[str]] = []

    @self_correcting(max_retries=2)
    class Consuming(dspy.Module):  # type: ignore[misc]
        def forward(self, texts: list[str]) -> Review:
            seen.append(texts.copy())
            texts.clear()
            result: Any = {"verdict": "good", "score": 1 if len(seen) == 3 else 9}
            return result  # type: ignore[no-any-return]

    given = ["a"]
    assert Consuming()(given).score == 1
    assert seen == [["a"]] * 3
    assert given == ["a"]


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({}, "M has neither forward nor aforward"),
        ({"forward": lambda self, text: None}, r"M\.forward must return a pydantic model: annotate it, or pass schema"),
    ],
)
def test_classes_that_cannot_be_decorated(members: dict[str, Any], problem: str):
    with pytest.raises(TypeError, match=problem):
        self_correcting(type("M", (dspy.Module,), members))


def test_methods_whose_parameters_have_no_name():
    def forward(self: Any, *texts: str) -> Review:
        raise AssertionError

    with pytest.raises(TypeError, match=r"M\.forward takes parameters that cannot be named"):
        self_correcting(type("M", (dspy.Module,), {"forward": forward}))


# -- The run around ----------------------------------------------------------------------------------------------------


async def in_function_node() -> list[dict[str, Any]]:
    async def work(given: Topic) -> dict[str, str]:
        return {"text": (await review(given.topic)).verdict}

    return await events_of(program_of(node("outer", Topic, Text, work)).astream(topic="x"))


async def in_synchronous_function_node() -> list[dict[str, Any]]:
    @self_correcting
    def review(text: str) -> Review:
        """Review."""
        raise AssertionError

    def work(given: Topic) -> dict[str, str]:
        return {"text": review(given.topic).verdict}

    return await events_of(program_of(node("outer", Topic, Text, work)).astream(topic="x"))


async def in_module_of_ones_own() -> list[dict[str, Any]]:
    class Outer(dspy.Module):  # type: ignore[misc]
        async def aforward(self, topic: str) -> Any:
            return dspy.Prediction(text=(await review(topic)).verdict)

    async with stream_events(Outer(), {"topic": "x"}) as events:
        return [event.wire() async for event in events]


async def as_function_node() -> list[dict[str, Any]]:
    @self_correcting
    async def review(given: Topic) -> Review:
        """Review."""
        raise AssertionError

    return await events_of(program_of(node("outer", Topic, Review, review)).astream(topic="x"))


@pytest.mark.parametrize(
    "run", [in_function_node, in_synchronous_function_node, in_module_of_ones_own, as_function_node]
)
async def test_events_belong_to_the_run_that_calls(run: Callable[[], Any]):
    with Script(READABLE, GOOD).use():
        events = await run()
    outer, inner = of("node_start", events)
    assert inner["node"] == "review"
    assert inner["kind"] == "graph"
    assert inner["parent"] == outer["span"]
    (failed,) = of("validation_error", events)
    assert (failed["node"], failed["span"], failed["max_retries"]) == ("review", inner["span"], 3)
    assert list(failed["failed_fields"]) == ["score"]
    assert ("node_end", "review") in outline(events)
    started = [event["message"] for event in of("message_start", events)]
    assert len(started) == 4
    assert [event["message"] for event in of("message_retracted", events)] == started[:2]
    assert all(event["parent"] == inner["span"] for event in of("lm_start", events))


async def test_events_of_a_module():
    with Script(THOUGHT, BAD, THOUGHT, GOOD).use():
        async with stream_events(Reviewer(), {"text": "x"}) as stream:
            events = [event.wire() async for event in stream]
    assert stream.outcome is not None
    assert stream.outcome.prediction == Review(verdict="good", score=5)
    names = [event["node"] for event in of("node_start", events)]
    assert names == ["Reviewer", "Reviewer", "think", "rate", "think", "rate"]
    assert [event["attempt"] for event in of("validation_error", events)] == [1]
    assert len(of("message_retracted", events)) == 3
    (end,) = [event for event in of("node_end", events) if "patch" in event]
    assert end["patch"] == {"verdict": "good", "score": 5}


async def test_agent_function_shows_the_attempts_of_all_its_calls():
    registry: Any = Registry()
    rater: Any = Reviewer()

    @registry.agent
    async def twice(topic: str, emit: Emitter) -> str:
        """Review twice at once, and once more."""
        found = []

        async def one(text: str) -> None:
            found.append((await review(text)).verdict)

        async with anyio.create_task_group() as group:
            group.start_soon(one, topic)
            group.start_soon(one, topic)
        rated = await rater.acall(text=topic)
        judged = await anyio.to_thread.run_sync(judge, topic)
        return ",".join([*found, rated.verdict, judged.verdict])

    with dspy.context(lm=lm_of(lambda prompt: pieces(THOUGHT if "`[[ ## thought ## ]]`" in prompt else GOOD, 9))):
        async with open_hub(registry["twice"]) as hub, hub.client() as client:
            run = await client.start("twice", {"topic": "x"})
            events = (await client.view(run)).events
            messages = client.memory.view(run).document["messages"]
    assert events[-1]["result"] == "good,good,good,good"
    starts = of("node_start", events)
    assert [event["node"] for event in starts] == ["review", "review", "Reviewer", "think", "rate", "judge"]
    assert len({event["span"] for event in starts}) == 6
    assert [message["status"] for message in messages] == ["done"] * len(messages)
    assert len({message["message"] for message in messages}) == len(messages) == 9


async def test_it_can_be_an_agent():
    agent: Any = Registry().add("review", review)
    assert agent.spec.description == "Review the text."
    assert agent.spec.input_model.model_json_schema()["required"] == ["text"]
    replies = [BAD, GOOD]
    with dspy.context(lm=lm_of(lambda _: pieces(replies.pop(0), 9))):
        async with open_hub(agent) as hub, hub.client() as client:
            events = (await client.view(await client.start("review", {"text": "x"}))).events
    assert events[-1]["result"] == {"verdict": "good", "score": 5}
    assert len(of("validation_error", events)) == 1


async def test_module_can_be_an_agent():
    agent: Any = Registry().add("reviewer", Reviewer())
    replies = [THOUGHT, BAD, THOUGHT, GOOD]
    with dspy.context(lm=lm_of(lambda _: pieces(replies.pop(0), 9))):
        async with open_hub(agent) as hub, hub.client() as client:
            events = (await client.view(await client.start("reviewer", {"text": "x"}))).events
    assert events[-1]["result"] == {"verdict": "good", "score": 5}
    assert [event["failed_fields"] for event in of("validation_error", events)] == [["verdict", "score"]]


async def test_it_is_a_node_as_a_module():
    program = program_of(StatefulNode("outer", Text, Review, module=review), output=Review)
    with Script(BAD, GOOD).use():
        events = await events_of(program.astream(text="x"))
    assert events[-1]["prediction"] == Review(verdict="good", score=5)
    assert outline(events) == [
        ("node_start", "outer"),
        ("node_start", "review"),
        ("validation_error", "review"),
        ("node_end", "review"),
        ("node_end", "outer"),
    ]


async def test_many_calls_at_once_stay_apart():
    """G8"""
    numbers = range(1, 6)

    async def reply(prompt: str) -> dict[str, str]:
        await anyio.lowlevel.checkpoint()
        number = next(n for n in numbers if f"number {n}" in prompt)
        return {"verdict": "good", "score": str(number if "problems" in prompt else number + 10)}

    found: dict[int, int] = {}

    async def one(number: int) -> None:
        found[number] = (await review(f"number {number}")).score

    with Script(forever=reply).use():
        async with anyio.create_task_group() as group:
            for number in numbers:
                group.start_soon(one, number)
    assert found == {number: number for number in numbers}


async def test_function_inside_a_module_is_shown_its_own_answer():
    @self_correcting
    class Outer(dspy.Module):  # type: ignore[misc]
        async def aforward(self, text: str) -> Review:
            found = await review(text)
            result: Any = {"verdict": found.verdict, "score": found.score * 2 - 5}
            return result  # type: ignore[no-any-return]

    script = Script(chat(verdict="bad", score="1"), chat(verdict="bad", score="7"), chat(verdict="good", score="5"))
    with script.use():
        assert (await Outer().acall(text="x")).score == 5
    assert ['"score": -3' in prompt for prompt in script.prompts] == [False, True, False]
    assert ['"score": 7' in prompt for prompt in script.prompts] == [False, False, True]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_module_that_refines():
    """DSPy's Refine makes an adapter of its own from the one in use."""

    class Scored(BaseModel):
        score: int = Field(ge=1, le=5)

    @self_correcting
    class Refined(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            ask = dspy.Predict("text -> score: int")
            self.refine = dspy.Refine(ask, N=2, reward_fn=lambda *_: 0.0, threshold=1.0, fail_count=1)

        def forward(self, text: str) -> Scored:
            scored: Scored = self.refine(text=text)
            return scored

    prompts: list[str] = []

    def reply(prompt: str) -> str:
        prompts.append(prompt)
        if "advice" in prompt:
            return chat(discussion="d", advice='{"self": "Less."}')
        return chat(score="3" if "previous_answer" in prompt else "9")

    with dspy.context(lm=lm_of(lambda prompt: pieces(reply(prompt), 9))):
        assert Refined()(text="x") == Scored(score=3)
    assert ["previous_answer" in prompt for prompt in prompts if "advice" not in prompt] == [False, False, True, True]


async def test_function_is_tuned_like_any_program(tmp_path: Path):
    examples = [dspy.Example(text=f"t{n}", verdict="good", score=n).with_inputs("text") for n in (1, 2)]
    with Script(forever=GOOD).use():
        tuned = BootstrapFewShot(metric=lambda *_: True, max_labeled_demos=0).compile(judge, trainset=examples)
    tuned.save_prompts(tmp_path / "p.json")
    fresh = judge.deepcopy()
    fresh.load_prompts(tmp_path / "p.json")
    script = Script(GOOD)
    with script.use():
        assert fresh("new").score == 5
    assert [demo.text for demo in fresh.steps["judge"].demos] == ["t1", "t2"]
