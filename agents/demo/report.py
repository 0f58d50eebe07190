"""`report`: a topic, looked up from three sides at once, and a report whose every citation was checked. A graph with
parallel branches and a loop.

No model is asked whether a citation is right: a function looks it up in the files, and as long as one is wrong, the
writer learns which, and why.
"""

import bisect
import itertools
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field

from agentcast.agents.base import ToolError
from agentcast.agents.demo.corpus import Corpus, corpus
from agentcast.agents.demo.researcher import calculate, read, registry, search
from agentcast.agents.graph import END, Graph, StatefulNode
from agentcast.agents.transpiler import AgentTranspiler

MAX_STEPS = 10
"""The plan, three nodes side by side, and the report, written and checked up to three times."""
MAX_WRONG = 20
"""So many wrong citations are looked for at a time."""
NEAR = 2
"""A quote stands at its line if it starts at most so many lines away."""

PLAN = "Split a topic into three questions that can be looked up in texts, each without knowing the others."
RESEARCH = (
    "Look a question up in a folder of texts: search for the words that matter, read what looks best, and pick the "
    "sentences that answer it."
)
WRITE = (
    "Write a report on a topic, question by question, from the evidence and from nothing else; say which question has "
    "no answer. Quote word for word, each quote followed by its place, as in “The key is under the mat.” "
    "[home/keys.md:3]. Do without the citations that are named as wrong, or cite the place where they really stand."
)

_CITATION = re.compile(
    r"(?:(?:“(?P<curly>[^”]+)”|\"(?P<straight>[^\"]+)\")[,.;:]?\s*)?"
    r"\[`?(?P<file>[^\[\]:`\n]+):(?P<line>\d{1,7})(?:[-–]\d+)?`?\]"
)


class Topic(BaseModel):
    topic: str = Field(
        min_length=1,
        max_length=2_000,
        description="what the report is about",
        examples=["What happens to a slow client? How is a run cancelled? Which events end a run?"],
    )


class Question1(BaseModel):
    question_1: str = Field(min_length=1, description="a full sentence that names what it is about")


class Question2(BaseModel):
    question_2: str = Field(min_length=1, description="another side of the topic, again as a full sentence")


class Question3(BaseModel):
    question_3: str = Field(min_length=1, description="a third side of the topic, again as a full sentence")


QUESTIONS: tuple[type[BaseModel], ...] = (Question1, Question2, Question3)


class Plan(Question3, Question2, Question1):
    """The questions in their order: the fields of the last base come first."""


class Evidence(BaseModel):
    question: str = Field(description="the question that it answers")
    file: str
    line: int = Field(description="the line at which the sentence starts")
    text: str = Field(min_length=1, description="the sentence, word for word")


class Found(BaseModel):
    evidence: Annotated[list[Evidence], operator.add] = Field(
        description="the sentences of the files that answer the question; empty if none does"
    )


class Notes(Found, Plan, Topic):
    wrong: list[str] = Field(default=[], description="citations of your last report that are wrong, and why")


class Report(BaseModel):
    report: str = Field(min_length=1, description="question by question, each sentence cited as “quote” [file:line]")


class Draft(Found, Report):
    pass


class Verdict(BaseModel):
    wrong: list[str] = Field(description="citations that do not hold, and why")


class Checked(Verdict, Report):
    """The result. `wrong` is not empty only if there were still wrong citations after the last try."""


def verify(draft: Draft) -> dict[str, list[str]]:
    """Blocks: it reads the files."""
    texts = corpus()
    found = list(_CITATION.finditer(draft.report))
    problems = (problem for citation in found if (problem := _problem(texts, citation)))
    wrong = list(itertools.islice(problems, MAX_WRONG))
    if draft.evidence and not found:
        wrong.append("Nothing is cited, though there is evidence: cite each sentence as [file:line].")
    return {"wrong": list(dict.fromkeys(wrong))}


def _problem(texts: Corpus, citation: re.Match[str]) -> str | None:
    place, line = f"[{citation['file']}:{citation['line']}]", int(citation["line"])
    quote = _flat(citation["curly"] or citation["straight"] or "")
    try:
        _, lines = texts.open(citation["file"])
    except ToolError:
        return f"{place}: there is no such file; {_remedy(texts, quote)}"
    if not 1 <= line <= len(lines):
        return f"{place}: that file has {len(lines)} lines; {_remedy(texts, quote)}"
    if quote and all(abs(start - line) > NEAR for start in _starts(quote, lines)):
        return f"{place}: the quote does not stand there; {_remedy(texts, quote)}"
    return None


def _remedy(texts: Corpus, quote: str) -> str:
    for name in texts.files() if quote else ():
        _, lines = texts.open(name)
        if start := next(_starts(quote, lines), None):
            return f"it stands at [{name}:{start}]"
    return "leave it out"


def _starts(quote: str, lines: Sequence[str]) -> Iterator[int]:
    """The lines, from 1, at which `quote` starts; it may go on over line breaks."""
    kept = [(number, _flat(line)) for number, line in enumerate(lines, start=1) if line.strip()]
    offsets = [0, *itertools.accumulate(len(line) + 1 for _, line in kept)]
    for match in re.finditer(re.escape(quote), " ".join(line for _, line in kept)):
        yield kept[bisect.bisect_right(offsets, match.start()) - 1][0]


def _flat(text: str) -> str:
    return " ".join(text.split())


def verdict(state: Mapping[str, Any]) -> str:
    return "wrong" if state["wrong"] else "right"


def graph() -> Graph:
    made = Graph(
        description="Write a report on a topic out of a folder of texts: plan, look up three questions at once, write, "
        "and check every citation against the files.",
        max_steps=MAX_STEPS,
        on_loop_limit="return",
    )
    tools = (search, read, calculate)
    made.add_node(StatefulNode("plan", Topic, Plan, instructions=PLAN))
    for number, question in enumerate(QUESTIONS, start=1):
        name = f"research_{number}"
        made.add_node(StatefulNode(name, question, Found, instructions=RESEARCH, tools=tools))
        made.add_edge("plan", name)
        made.add_edge(name, "write")
    made.add_node(StatefulNode("write", Notes, Report, instructions=WRITE))
    made.add_node(StatefulNode("verify", Draft, Verdict, fn=verify))
    made.add_edge("write", "verify")
    made.add_conditional_edges("verify", verdict, {"right": END, "wrong": "write"})
    made.set_entry_point("plan")
    return made


report = AgentTranspiler.compile(graph(), output_model=Checked)
registry.add("report", report, messages=("next_thought", "reasoning", "report"))
