"""`swarm`: one question, several researchers side by side, one answer.

It shows a program of several parts: a plan, researchers on the event loop, checks in the threads of `dspy.Parallel`,
and a merge. Nothing in it is there to be watched, save the statuses: spans, tools and tokens are seen by themselves.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import anyio
import dspy
from pydantic import BaseModel, Field

from agentcast.agents.base import public_message
from agentcast.agents.context import status
from agentcast.agents.demo.researcher import Researcher, calculate, read, registry, search
from agentcast.agents.react import ReAct
from agentcast.agents.threads import in_thread

MAX_RESEARCHERS = 5
QUESTIONS = "What happens to a slow client? How is a run cancelled? What is the offline model?"
STOP_GRACE = 2.0
"""Seconds that the checks of a cancelled run get to notice it."""


class Quote(BaseModel):
    file: str
    line: int | None = None
    text: str = Field(description="the sentence, word for word")

    def stands_in(self, passages: Sequence[str]) -> bool:
        return bool(self.text.strip()) and any(_flat(self.text) in _flat(passage) for passage in passages)


class Finding(BaseModel):
    """What became of one sub-question."""

    question: str
    answer: str = ""
    supported: bool | None = None
    """Whether a second look at the passages bears the answer out; None: nobody looked."""
    quotes: list[Quote] = []
    problem: str | None = None
    """Why there is no answer."""
    passages: list[str] = Field(default=[], exclude=True)
    """What the researcher's tools gave."""


class Plan(dspy.Signature):  # type: ignore[misc]
    """Split a question into sub-questions that researchers can look up in texts, each without knowing the others.

    Together they cover the question, and no two ask the same. If it has one side only, ask of its different aspects.
    """

    question: str = dspy.InputField()
    count: int = dspy.InputField(desc="how many sub-questions, at most")
    sub_questions: list[str] = dspy.OutputField(desc="each a full sentence that names what it is about")


class Check(dspy.Signature):  # type: ignore[misc]
    """Check a finding against the passages that it was drawn from: is all that it says in them?"""

    question: str = dspy.InputField()
    passages: list[str] = dspy.InputField(desc="all that was read, each passage under its file and line")
    finding: str = dspy.InputField()
    supported: bool | None = dspy.OutputField(desc="null: you cannot tell")
    quotes: list[Quote] = dspy.OutputField(desc="the sentences of the passages that answer the question")


class Merge(dspy.Signature):  # type: ignore[misc]
    """Answer a question from what several researchers found, and from nothing else.

    Say of each part which sub-question it comes from. Quote word for word, each quote with its file and line. Name the
    sub-questions that have no answer, with the problem, and the findings that are not supported.
    """

    question: str = dspy.InputField()
    findings: list[Finding] = dspy.InputField()
    answer: str = dspy.OutputField(desc="the answer, by sub-question, with verbatim quotes and their files")


class Swarm(dspy.Module):  # type: ignore[misc]
    """Send several researchers into a folder of texts at once, each with a part of the question; check and merge what
    they find."""

    def __init__(self, tools: Sequence[Callable[..., Any]] = (search, read, calculate)) -> None:
        super().__init__()
        numbers = range(1, MAX_RESEARCHERS + 1)
        self.plan = dspy.Predict(Plan)
        self.researchers = {number: ReAct(Researcher, tools, max_iters=8) for number in numbers}
        self.checks = {number: dspy.ChainOfThought(Check) for number in numbers}
        self.merge = dspy.Predict(Merge)

    async def aforward(
        self,
        question: Annotated[str, Field(description="what you want to know", examples=[QUESTIONS])],
        researchers: Annotated[int, Field(ge=2, le=MAX_RESEARCHERS, description="how many at once, at most")] = 3,
    ) -> dspy.Prediction:
        plan = await self.plan.acall(question=question, count=researchers)
        asked = [part for part in plan.sub_questions if part.strip()][:researchers] or [question]
        findings = {number: Finding(question=part) for number, part in enumerate(asked, start=1)}
        status(f"Plan: {len(asked)} questions")

        async with anyio.create_task_group() as group:
            for number, finding in findings.items():
                group.start_soon(self._research, number, finding)

        status("Checking what was found")
        await in_thread(functools.partial(self._check, findings), "checks of a swarm", linger=STOP_GRACE)

        status("Merging")
        merged = await self.merge.acall(question=question, findings=list(findings.values()))
        return dspy.Prediction(answer=merged.answer, findings=list(findings.values()))

    async def _research(self, number: int, finding: Finding) -> None:
        status(f"Researcher {number}: {finding.question}")
        try:
            found = await self.researchers[number].acall(question=finding.question, history="")
        except Exception as error:  # noqa: BLE001 -- one that fails must not stop the others
            finding.problem = public_message(error)
            status(f"Researcher {number} failed: {finding.problem}")
        else:
            finding.answer, finding.passages = found.answer, _observations(found.trajectory)
            status(f"Researcher {number} is done")

    def _check(self, findings: Mapping[int, Finding]) -> None:
        """Blocks. Of the quotes, those remain that really stand in what was read."""
        answered = {number: finding for number, finding in findings.items() if finding.problem is None}
        pairs = [
            (self.checks[number], {"question": item.question, "passages": item.passages, "finding": item.answer})
            for number, item in answered.items()
        ]
        parallel = dspy.Parallel(len(pairs), max_errors=len(pairs) + 1, disable_progress_bar=True, timeout=0)
        for item, proof in zip(answered.values(), parallel(pairs) if pairs else [], strict=True):
            if proof is not None:  # else it failed, which leaves the finding unchecked
                item.supported = proof.supported
                item.quotes = [quote for quote in proof.quotes if quote.stands_in(item.passages)]


def _observations(trajectory: Mapping[str, Any]) -> list[str]:
    return [str(value) for name, value in trajectory.items() if name.startswith("observation_")]


def _flat(text: str) -> str:
    return " ".join(text.split())


registry.add("swarm", Swarm(), messages=("next_thought", "reasoning", "answer"))
