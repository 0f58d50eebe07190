"""Prompts of a compiled graph in a file: instructions and demos, and nothing else."""

import datetime
import enum
import json
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt import BootstrapFewShot, LabeledFewShot
from pydantic import BaseModel

from agentcast import AgentTranspiler
from tests.support.graphs import Script, Text, Topic, graph_of, node, program_of
from tests.support.lms import chat

pytestmark = pytest.mark.anyio


class Mood(enum.Enum):
    GOOD = "good"


class Place(BaseModel):
    city: str
    since: datetime.date


class Rich(BaseModel):
    topic: str
    mood: Mood
    places: list[Place]


def look(name: str) -> str:
    """Look it up."""
    return name


def many() -> Any:
    return program_of(
        node("plain", Topic, Text, instructions="Be plain."),
        node("think", Text, Text, use_cot=True),
        node("up", Text, Text, lambda t: {"text": t.text.upper()}),
        node("act", Text, Text, tools=[look]),
        node("inner", Text, Text, module=program_of(node("deep", Text, Text))),
    )


def prompts(program: Any) -> dict[str, Any]:
    return {name: (each.signature.instructions, each.demos) for name, each in program.named_predictors()}


def tune(program: Any) -> None:
    for number, (_, predictor) in enumerate(program.named_predictors()):
        predictor.signature = predictor.signature.with_instructions(f"Tuned {number}: “ü”.")
        predictor.demos = [dspy.Example(text=f"t{number}", augmented=True), {"text": "plain dict"}]


def test_round_trip(tmp_path: Path):
    program, fresh = many(), many()
    tune(program)
    program.save_prompts(tmp_path / "prompts.json")
    before = {name: each.dump_state() for name, each in fresh.named_predictors()}
    fresh.load_prompts(str(tmp_path / "prompts.json"))
    assert prompts(fresh).keys() == prompts(program).keys()
    for name, (instructions, demos) in prompts(program).items():
        assert prompts(fresh)[name][0] == instructions
        assert [dict(demo.items()) for demo in prompts(fresh)[name][1]] == [dict(demo.items()) for demo in demos]
    for name, predictor in fresh.named_predictors():
        after = predictor.dump_state()
        after["signature"]["instructions"] = before[name]["signature"]["instructions"]
        assert {**after, "demos": []} == before[name], "nothing else has changed"
    found = json.loads((tmp_path / "prompts.json").read_text("utf-8"))
    assert found["agentcast_prompts"] == 1
    assert {node: list(names) for node, names in found["nodes"].items()} == {
        "plain": ["predict"],
        "think": ["predict"],
        "act": ["react", "extract.predict"],
        "inner": ["steps['deep']"],
    }
    assert "“ü”" in (tmp_path / "prompts.json").read_text("utf-8")


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter()])
async def test_loaded_prompts_are_those_that_were_saved_to_the_letter(adapter: Any, tmp_path: Path):
    def make() -> Any:
        return program_of(node("ask", Rich, Text))

    program, fresh = make(), make()
    place = Place(city="Köln", since=datetime.date(2020, 1, 2))
    program.steps["ask"].demos = [
        dspy.Example(topic="a", mood=Mood.GOOD, places=[place], text="b"),
        dspy.Example(topic="a", mood="good", places=[place.model_dump()], text=3),
        dspy.Example(topic=None, mood="awful", places="none", text={"x": [1, None, True, 0.5]}),
    ]
    program.save_prompts(tmp_path / "p.json")
    fresh.load_prompts(tmp_path / "p.json")
    script = Script(*[{"text": "x"}] * 2)
    formatted = []
    with script.use(), dspy.context(adapter=adapter):
        for each in (program, fresh):
            predictor = each.steps["ask"]
            inputs = {"topic": "t", "mood": Mood.GOOD, "places": [place]}
            formatted.append(adapter.format(predictor.signature, predictor.demos, inputs))
    assert formatted[0] == formatted[1]


async def test_what_an_optimizer_found_is_saved(tmp_path: Path):
    program = program_of(node("ask", Topic, Text, instructions="Ask."), output=Text)
    examples = [dspy.Example(topic=f"t{n}", text=f"x{n}").with_inputs("topic") for n in range(3)]
    with Script(forever=chat(text="found")).use():
        tuned = BootstrapFewShot(metric=lambda *_: True, max_bootstrapped_demos=2).compile(
            LabeledFewShot(k=2).compile(program, trainset=examples), trainset=examples
        )
    tuned.save_prompts(tmp_path / "p.json")
    program.load_prompts(tmp_path / "p.json")
    script = Script(chat(text="y"))
    with script.use():
        assert await program.aforward(topic="new") == Text(text="y")
    assert len(program.steps["ask"].demos) == len(tuned.steps["ask"].demos) > 0


def test_file_of_another_graph(tmp_path: Path):
    path = tmp_path / "p.json"
    other = program_of(node("plan", Topic, Text), node("act", Text, Text, tools=[look]), node("ask", Text, Text))
    program = program_of(node("write", Topic, Text), node("act", Text, Text), node("ask", Text, Text, use_cot=True))
    tune(other)
    other.save_prompts(path)
    before = prompts(program)
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- its text is compared below
        program.load_prompts(path)
    assert str(error.value) == (
        f"{path} has the prompts of another graph: it lacks node 'write'; the program has no node 'plan'; "
        "it lacks node 'act': predictor 'predict'; the program has no node 'act': predictor 'react'; "
        "the program has no node 'act': predictor 'extract.predict'"
    )
    assert prompts(program) == before, "nothing is changed by half"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is no file of prompts: Expecting value"),
        ("\udcff", "is no file of prompts: 'utf-8' codec can't decode"),
        ("[]", "is no file of prompts: Input should be"),
        ("[" * 100_000, "is no file of prompts: maximum recursion depth exceeded"),
        ("{}", "is no file of prompts: agentcast_prompts: Field required; nodes: Field required"),
        ('{"agentcast_prompts": 2, "nodes": {}}', "is no file of prompts: agentcast_prompts: Input should be 1"),
        (
            '{"agentcast_prompts": 1, "nodes": {"ask": {"predict": {"instructions": 3, "demos": [1], "lm": {}}}}}',
            "nodes.ask.predict.instructions: Input should be a valid string; nodes.ask.predict.demos.0: Input should",
        ),
    ],
)
def test_file_that_is_none_of_prompts(text: str, problem: str, tmp_path: Path):
    path = tmp_path / "p.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    program = program_of(node("ask", Topic, Text))
    with pytest.raises(ValueError, match=f"^{path} .*{problem}"):
        program.load_prompts(path)
    with pytest.raises(FileNotFoundError):
        program.load_prompts(tmp_path / "none.json")


def test_demo_that_json_cannot_hold(tmp_path: Path):
    program = AgentTranspiler.compile(graph_of(node("ask", Topic, Text)))
    program.steps["ask"].demos = [dspy.Example(topic=object(), text="x")]
    with pytest.raises(ValueError, match="node 'ask': JSON cannot hold 'topic' of a demo, which is of type object"):
        program.save_prompts(tmp_path / "p.json")
    assert not (tmp_path / "p.json").exists()
