"""The zoo: each module of DSPy that needs nothing installed, and what a language model says when each is called.

A script is a list of what the model answers, one after another, each as the output fields that it is asked for (name →
type and value), so that it can be written in the form of any adapter.
"""

import enum
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal, Optional, Union
from uuid import UUID

import dspy
from dspy.lm15 import Request
from pydantic import BaseModel, TypeAdapter

from tests.support.lms import AsyncEngine, Engine, pieces

Answer = dict[str, tuple[Any, Any]]


# -- Types of outputs --------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Place(BaseModel):
    name: str
    heights: list[int] = []


class Trip(BaseModel):
    title: str
    stops: list[Place]
    on: date | None = None


TYPES: dict[str, tuple[Any, Any]] = {
    "str": (str, "It is <b>forty</b> [[two]], {so} to say."),
    "int": (int, 42),
    "bool": (bool, True),
    "Optional": (Optional[str], "so it is"),  # noqa: UP045 -- as users write it
    "Optional, none": (Optional[int], None),  # noqa: UP045
    "Union": (Union[int, list[str]], ["a", "b"]),  # noqa: UP007
    "Literal": (Literal["high", "low"], "low"),
    "Enum": (Colour, Colour.BLUE),
    "date": (date, date(2024, 2, 29)),
    "UUID": (UUID, UUID("12345678-1234-5678-1234-567812345678")),
    "list of models": (list[Place], [Place(name="Alp", heights=[1, 2]), Place(name="Alm")]),
    "dict of models": (dict[str, Place], {"first": Place(name="Alp"), "second": Place(name="Alm", heights=[3])}),
    "nested models": (Trip, Trip(title="Up", stops=[Place(name="Alp")], on=date(2024, 2, 29))),
    "Code": (dspy.Code["python"], dspy.Code["python"](code="print('[[ ## x')\nif 1 < 2: pass")),
    "Reasoning": (dspy.Reasoning, dspy.Reasoning(content="Because it is so.")),
    "ToolCalls": (
        dspy.ToolCalls,
        dspy.ToolCalls.from_dict_list([{"name": "look", "args": {"topic": "x"}}, {"name": "stop", "args": {}}]),
    ),
}


FEW = ("str", "Enum", "nested models")


# -- Language models ---------------------------------------------------------------------------------------------------


class Scripted(Engine):
    """An engine that says `replies`, one after another, each in small pieces."""

    def __init__(self, replies: list[str]) -> None:
        rest = iter(replies)
        super().__init__(lambda _: pieces(next(rest), 7))
        self.prompts: list[Any] = []

    def answer(self, request: Request) -> Any:
        self.prompts.append([request.system, *(message.text for message in request.messages)])
        return super().answer(request)


def scripted(replies: list[str]) -> Any:
    engine = Scripted(replies)
    return dspy.LM("test/scripted", engine=engine, async_engine=AsyncEngine(engine), cache=False, num_retries=0)


def written(adapter: Any, answer: Answer) -> str:
    """`answer` as `adapter` wants it."""
    if isinstance(adapter, dspy.XMLAdapter):
        return "\n".join(_element(adapter, name, *field) for name, field in answer.items())
    return _formatted(adapter, answer)


def _formatted(adapter: Any, answer: Answer) -> str:
    signature = dspy.Signature({name: (kind, dspy.OutputField()) for name, (kind, _) in answer.items()}, "")
    return str(
        adapter.format_assistant_message_content(signature, {name: value for name, (_, value) in answer.items()})
    )


def _element(adapter: Any, name: str, kind: Any, value: Any) -> str:
    """DSPy's own way escapes only some of what must be."""
    if isinstance(value, BaseModel) and not isinstance(value, dspy.Type):
        return _formatted(adapter, {name: (kind, value)})
    if isinstance(value, list | dict) and kind != dict[str, Any]:
        return _formatted(adapter, {name: (kind, value)})
    text = _formatted(dspy.ChatAdapter(), {name: (kind, value)})
    return f"<{name}>{html.escape(text.split(']]', 1)[1].rsplit('[[', 1)[0].strip(), quote=False)}</{name}>"


ADAPTERS = ("ChatAdapter", "JSONAdapter", "XMLAdapter", "TwoStepAdapter")


def settings_for(adapter: str, script: list[Answer]) -> dict[str, Any]:
    """DSPy's settings for one call of a program: adapter and language model."""
    if adapter == "TwoStepAdapter":
        extracted = [written(dspy.ChatAdapter(), answer) for answer in script]
        said = [f"Let me see, number {number}." for number, _ in enumerate(script)]
        return {"adapter": dspy.TwoStepAdapter(scripted(extracted)), "lm": scripted(said)}
    made = getattr(dspy, adapter)()
    return {"adapter": made, "lm": scripted([written(made, answer) for answer in script])}


# -- Modules -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Species:
    """A module of DSPy. `make(kind)` makes one whose output `result` is of type `kind`; `script(kind, value)` is what
    the model says so that it is `value`."""

    make: Callable[[Any], Any]
    script: Callable[[Any, Any], list[Answer]]
    inputs: dict[str, Any] = field(default_factory=lambda: {"question": "What is it?"})
    signature: bool = False
    """Whether the registry needs the signature."""
    types: Sequence[str] = tuple(TYPES)
    """Those that are tried: all, but for modules that start a process for each call."""


def signature(kind: Any) -> Any:
    return dspy.Signature({"question": (str, dspy.InputField()), "result": (kind, dspy.OutputField())}, "Answer.")


def look(topic: str) -> str:
    """Look a topic up."""
    return f"{topic} is here"


def direct(kind: Any, value: Any) -> list[Answer]:
    return [{"result": (kind, value)}]


def reasoned(kind: Any, value: Any) -> list[Answer]:
    return [{"reasoning": (str, "I think."), "result": (kind, value)}]


def turn(name: str, args: dict[str, Any]) -> Answer:
    names = Literal["look", "finish"]
    return {"next_thought": (str, "Hm."), "next_tool_name": (names, name), "next_tool_args": (dict[str, Any], args)}


def looped(kind: Any, value: Any) -> list[Answer]:
    return [turn("look", {"topic": "it"}), turn("finish", {}), *reasoned(kind, value)]


def submitted(kind: Any, value: Any) -> list[Answer]:
    calls = [
        {"name": "look", "args": {"topic": "it"}},
        {"name": "submit", "args": {"result": TypeAdapter(kind).dump_python(value, mode="json", by_alias=True)}},
    ]
    made = [dspy.ToolCalls.from_dict_list([call]) for call in calls]
    return [{"next_thought": (dspy.Reasoning, "Hm."), "tool_calls": (dspy.ToolCalls, call)} for call in made]


def refined(kind: Any, value: Any) -> list[Answer]:
    advice = {"discussion": (str, "Too short."), "advice": (dict[str, str], {"predict": "Longer."})}
    (answer,) = reasoned(kind, value)
    return [answer, advice, answer, advice, answer]


def never(_: Any, prediction: Any) -> float:
    return 0.5


class InParallel(dspy.Module):  # type: ignore[misc]
    """Asks twice at once."""

    def __init__(self, kind: Any) -> None:
        self.ask = dspy.Predict(signature(kind))

    def forward(self, question: str) -> Any:
        pairs = [(self.ask, {"question": question})] * 2
        first, second = dspy.Parallel(num_threads=2, disable_progress_bar=True)(pairs)
        assert first.result == second.result
        return first


class ByMajority(dspy.Module):  # type: ignore[misc]
    """Asks three times, and takes what was said most often."""

    def __init__(self, kind: Any) -> None:
        self.ask = dspy.Predict(signature(kind), n=3)

    def forward(self, question: str) -> Any:
        return dspy.majority(self.ask(question=question), normalize=str)


def ensemble(kind: Any) -> Any:
    programs = [dspy.Predict(signature(kind)), dspy.ChainOfThought(signature(kind))]
    return dspy.Ensemble(reduce_fn=lambda outputs: outputs[-1]).compile(programs)


def coded(kind: Any, value: Any) -> list[Answer]:
    code = "seen = 1 + 1\nprint(seen)"
    return [{"reasoning": (str, "I code."), "generated_code": (str, f"```python\n{code}\n```")}, *reasoned(kind, value)]


def explored(kind: Any, value: Any) -> list[Answer]:
    data = TypeAdapter(kind).dump_python(value, mode="json")
    codes = ["print(question, look(topic='it'))", f"SUBMIT(result={data!r})"]
    return [{"reasoning": (str, "I code."), "code": (str, f"```python\n{code}\n```")} for code in codes]


def acted(kind: Any, value: Any) -> list[Answer]:
    code = "print(look(topic='it'))"
    act = {"generated_code": (str, f"```python\n{code}\n```"), "finished": (bool, True)}
    return [act, *reasoned(kind, value)]


ZOO: dict[str, Species] = {
    "Predict": Species(lambda kind: dspy.Predict(signature(kind)), direct),
    "ChainOfThought": Species(lambda kind: dspy.ChainOfThought(signature(kind)), reasoned),
    "ReAct": Species(lambda kind: dspy.ReAct(signature(kind), [look]), looped),
    "ReActV2": Species(lambda kind: dspy.ReActV2(signature(kind), [look]), submitted),
    "BestOfN": Species(
        lambda kind: dspy.BestOfN(dspy.ChainOfThought(signature(kind)), N=2, reward_fn=never, threshold=1.0),
        lambda kind, value: reasoned(kind, value) * 2,
    ),
    "Refine": Species(
        lambda kind: dspy.Refine(dspy.ChainOfThought(signature(kind)), N=3, reward_fn=never, threshold=1.0), refined
    ),
    "MultiChainComparison": Species(
        lambda kind: dspy.MultiChainComparison(signature(kind), M=2),
        lambda kind, value: [{"rationale": (str, "Both are right."), "result": (kind, value)}],
        {
            "question": "What is it?",
            "completions": [{"reasoning": "One.", "result": "x"}, {"rationale": "Two.", "result": "y"}],
        },
    ),
    "Parallel": Species(InParallel, lambda kind, value: direct(kind, value) * 2),
    "majority": Species(ByMajority, lambda kind, value: direct(kind, value) * 3),
    "Ensemble": Species(ensemble, lambda kind, value: [*direct(kind, value), *reasoned(kind, value)], signature=True),
    "ProgramOfThought": Species(
        lambda kind: dspy.ProgramOfThought(signature(kind), interpreter_factory=dspy.LocalInterpreter),
        coded,
        types=FEW,
    ),
    "CodeAct": Species(
        lambda kind: dspy.CodeAct(signature(kind), tools=[look], interpreter_factory=dspy.LocalInterpreter),
        acted,
        types=FEW,
    ),
    "RLM": Species(
        lambda kind: dspy.RLM(signature(kind), tools=[look], interpreter_factory=dspy.LocalInterpreter),
        explored,
        types=FEW,
    ),
}
