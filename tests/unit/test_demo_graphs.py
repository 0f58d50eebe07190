"""The demo graphs: what fails does so for a reason and is corrected for it, and what is cited really stands there."""

import datetime
import re
from pathlib import Path
from typing import Any

import dspy
import pytest

from agentcast.agents.base import ToolError
from agentcast.agents.demo import registry
from agentcast.agents.demo.report import MAX_STEPS, Draft, Evidence, report, verify
from agentcast.agents.demo.triage import REPLY_WORDS, SUMMARY_WORDS, Category, Severity, triage
from agentcast.agents.offline import NOTE, offline_lm
from tests.support.graphs import Script, events_of, of, outline

LONG = (
    "Hello, since 3 November 2026 the CSV export fails with error 500 in our production account, and all our users are "
    "blocked because they cannot send their monthly reports to the tax office. We expect a fix in 48 hours. Ada"
)
ADDRESS = "I cannot log in to my account, please mail ada@example.org about it."
STATED = "Category: bug\nSeverity: high\nArea: export\n\nSince 2026-11-03 the export fails with error 500."

TROUBLE = """\
# Troubleshooting

## What the press prints when it fails

press.ini:12: the roller pressure is too high, so the paper tears.
press.ini:40: the ink valve is shut, so the pages stay white.
"""
PAPER = "# Paper\n\nStore the paper in a dry room.\nDamp paper tears\nunder any pressure.\n"


@pytest.fixture(autouse=True)
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "trouble.md").write_text(TROUBLE)
    (tmp_path / "paper.md").write_text(PAPER)
    monkeypatch.setenv("AGENTCAST_DOCS", str(tmp_path))
    monkeypatch.setenv("AGENTCAST_OFFLINE_DELAY", "0")
    with dspy.context(lm=offline_lm(), adapter=dspy.ChatAdapter()):
        yield tmp_path


# -- triage --------------------------------------------------------------------------------------------------------


async def test_ticket_without_stated_values_is_unknown_and_handed_over_after_a_correction():
    events = await events_of(triage.astream(ticket=LONG))
    result = events[-1]["prediction"]
    assert outline(events) == [
        ("node_start", "classify"),
        ("validation_error", "classify"),
        ("node_end", "classify"),
        ("node_start", "hand_over"),
        ("node_end", "hand_over"),
        ("node_start", "answer"),
        ("node_end", "answer"),
    ]
    assert (result.category, result.severity, result.area) == (Category.UNKNOWN, Severity.UNKNOWN, "unknown")
    assert (result.since, result.respond_in_hours) == (None, None)
    assert result.escalated_to == "a person at the support desk"
    (failed,) = of("validation_error", events)
    assert failed["failed_fields"] == ["summary"]
    assert f"must have at most {SUMMARY_WORDS} words, and has 33" in failed["error"]
    assert len(result.summary.split()) <= SUMMARY_WORDS
    assert result.summary in LONG
    assert result.summary in result.reply
    assert result.reply.endswith(NOTE)
    assert len(result.reply.split()) <= REPLY_WORDS


async def test_values_that_the_ticket_states_are_taken_and_what_is_urgent_is_escalated():
    events = await events_of(triage.astream(ticket=STATED))
    assert not of("validation_error", events)
    assert [name for kind, name in outline(events) if kind == "node_end"] == ["classify", "escalate", "answer"]
    result = events[-1]["prediction"]
    assert (result.category, result.severity, result.area) == (Category.BUG, Severity.HIGH, "export")
    assert result.since == datetime.date(2026, 11, 3)
    assert result.escalated_to == "engineering"
    assert result.summary == "Since 2026-11-03 the export fails with error 500."


@pytest.mark.parametrize("adapter", [dspy.JSONAdapter(), dspy.XMLAdapter()], ids=["json", "xml"])
async def test_graphs_work_with_other_adapters(adapter: Any):
    with dspy.context(adapter=adapter):
        result = await triage.aforward(ticket=f"{STATED} {LONG}")
        written = await report.aforward(topic="Where do I store the paper? When does damp paper tear?")
    assert (result.category, result.severity) == (Category.BUG, Severity.HIGH)
    assert "“Damp paper tears under any pressure.” [paper.md:4]" in written.report
    assert written.wrong == []


async def test_what_was_rejected_is_retracted():
    events = await events_of(triage.astream(ticket=LONG))
    error = next(at for at, event in enumerate(events) if event["event"] == "validation_error")
    first = {event["message"] for event in events[:error] if event["event"] == "message_end"}
    assert {event["message"] for event in of("message_retracted", events)} == first


async def test_an_address_is_corrected():
    events = await events_of(triage.astream(ticket=ADDRESS))
    assert [event["failed_fields"] for event in of("validation_error", events)] == [["summary"], ["reply"]]
    result = events[-1]["prediction"]
    assert result.summary == "I cannot log in to my account, please mail […] about it."
    assert "@" not in result.reply
    assert result.reply.count(NOTE) == 1


@pytest.mark.parametrize(
    "ticket",
    [
        "The server is NOT down … this is not urgent.",
        "This is far from critical.",
        "Thank you for fixing the outage so quickly!",
        "How do I change the address on my invoice?",
        "I would like dark mode, some day.",
        "Good morning.",
        "Unser Server steht seit gestern still!",
        "?",
    ],
)
async def test_what_a_ticket_does_not_state_is_unknown(ticket: str):
    events = await events_of(triage.astream(ticket=ticket))
    assert not of("validation_error", events)
    result = events[-1]["prediction"]
    assert (result.category, result.severity, result.area) == ("unknown", "unknown", "unknown")
    assert (result.since, result.respond_in_hours) == (None, None)
    assert result.escalated_to == "a person at the support desk"


async def test_what_can_wait_is_not_escalated():
    result = await triage.aforward(ticket="Severity: low. I would like dark mode.")
    assert (result.severity, result.escalated_to) == ("low", None)


async def test_security_takes_what_is_urgent_and_about_access():
    result = await triage.aforward(ticket="Category: access\nSeverity: critical\nThe login is down for everybody!")
    assert (result.category, result.severity, result.escalated_to) == ("access", "critical", "security")


CLASSIFIED = {
    "reasoning": "r",
    "category": "bug",
    "severity": "critical",
    "area": "api",
    "since": "null",
    "respond_in_hours": "4",
    "summary": "The API is down.",
}


async def test_any_model_learns_what_was_wrong():
    script = Script(
        CLASSIFIED | {"category": "crash", "respond_in_hours": "8", "summary": "Write to ada@example.org"},
        CLASSIFIED,
        {"reply": "Dear Ada, we are at it."},
    )
    with script.use():
        result = await triage.aforward(ticket="The API is down!")
    assert (result.summary, result.reply, result.escalated_to) == (
        "The API is down.",
        "Dear Ada, we are at it.",
        "engineering",
    )
    _, second, third = script.prompts
    assert "category: Input should be 'bug', 'billing', 'access', 'feature', 'question' or 'unknown'" in second
    assert "respond_in_hours: Value error, must be at most 4 if the severity is critical, and is 8" in second
    assert "must not contain an e-mail address" in second
    assert "ada@example.org" not in second.partition("[[ ## problems ## ]]")[2]
    assert "The API is down." in third


def test_an_empty_ticket_is_refused_before_anything_runs():
    model = registry["triage"].spec.input_model
    assert model.model_json_schema()["required"] == ["ticket"]
    with pytest.raises(ValueError, match="at least 1 character"):
        model(ticket="")


# -- report --------------------------------------------------------------------------------------------------------

TOPIC = "Why does the paper tear, why do pages stay white, and where do I store paper?"
RESEARCH = ("research_1", "research_2", "research_3")


async def test_three_questions_are_looked_up_at_once_and_what_is_cited_stands_there(docs: Path):
    events = await events_of(
        report.astream(topic="Where do I store paper, when does damp paper tear and who reads this?")
    )
    names = [name for kind, name in outline(events, "node_start", "node_end") if name in RESEARCH]
    assert set(names[:3]) == set(RESEARCH), "all have started before one has ended"
    assert {event["tool"] for event in of("tool_start", events)} == {"search", "read"}
    result = events[-1]["prediction"]
    assert result.wrong == []
    cited = re.findall(r"^“(.*)” \[(\S+):(\d+)\]$", result.report, re.M)
    assert ("Store the paper in a dry room.", "paper.md", "3") in cited
    assert ("Damp paper tears under any pressure.", "paper.md", "4") in cited
    for text, file, line in cited:
        assert text in " ".join("\n".join((docs / file).read_text().splitlines()[int(line) - 1 :]).split())
    assert "Who reads this?\nNothing was found." in result.report


async def test_a_text_that_looks_like_a_place_is_no_place():
    result = await report.aforward(topic=TOPIC)
    assert result.wrong == []
    assert re.search(
        r"Why do pages stay white\?\n“press.ini:12: .*, so the pages stay white.” \[trouble.md:5\]", result.report
    )


@pytest.mark.parametrize("topic", ["Zebras, unicorns and fairies", "Paper", "What is 2 + 3?"])
async def test_topics_that_the_texts_hardly_know_make_a_report_too(topic: str):
    result = await report.aforward(topic=topic)
    assert result.wrong == []
    assert NOTE in result.report


async def test_the_guide(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AGENTCAST_DOCS")
    result = await report.aforward(
        topic="What happens to a slow client? How is a run cancelled? Which events end a run?"
    )
    assert result.wrong == []
    assert len(re.findall(r"\.md:\d+\]", result.report)) >= 4


async def test_missing_folder_is_a_clear_error_without_its_path(docs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AGENTCAST_DOCS", str(docs / "gone"))
    events = await events_of(report.astream(topic=TOPIC))
    assert isinstance(events[-1]["exception"], ToolError)
    assert events[-2]["node"] == "verify"
    assert str(docs) not in str(events)


class Writer:
    """A model that plans and researches by the book, and writes the reports of a test."""

    def __init__(self, *reports: str) -> None:
        self.reports = list(reports)
        self.asked: list[str] = []
        self.script = Script(forever=self.reply)

    def reply(self, prompt: str) -> dict[str, str]:
        fields = re.findall(r"`\[\[ ## (\w+) ## \]\]`", prompt)
        if "question_1" in fields:
            return {f"question_{number}": f"Question {number}?" for number in (1, 2, 3)}
        if "next_thought" in fields:
            return {"next_thought": "t", "next_tool_name": "finish", "next_tool_args": "{}"}
        if "evidence" in fields:
            item = Evidence(question="Question?", file="paper.md", line=3, text="Store the paper in a dry room.")
            return {"reasoning": "r", "evidence": f"[{item.model_dump_json()}]"}
        self.asked.append(prompt)
        return {"report": self.reports.pop(0) if len(self.reports) > 1 else self.reports[0]}


async def test_the_writer_learns_which_citation_is_wrong_and_writes_again():
    writer = Writer("“Store it outside.” [paper.md:3]", "“Store the paper in a dry room.” [paper.md:3]")
    with writer.script.use():
        result = await report.aforward(topic="Paper")
    assert result.report == "“Store the paper in a dry room.” [paper.md:3]"
    first, second = writer.asked
    assert "does not stand there" not in first
    assert "[paper.md:3]: the quote does not stand there; leave it out" in second
    assert first.count('"file": "paper.md"') == 3, "the evidence of all three, merged"


async def test_a_writer_that_never_gets_it_right_is_stopped_and_the_result_says_what_is_wrong():
    writer = Writer("“Store it outside.” [paper.md:3]")
    with writer.script.use():
        events = await events_of(report.astream(topic="Paper"))
    assert len(writer.asked) == 3
    assert [event["max_steps"] for event in of("step_limit", events)] == [MAX_STEPS]
    assert events[-1]["prediction"].wrong == ["[paper.md:3]: the quote does not stand there; leave it out"]


THERE = "the quote does not stand there; it stands at"
NO_FILE = "there is no such file; leave it out"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("“Store the paper in a dry room.” [paper.md:3]", []),
        ("“Damp paper tears under any pressure.” [paper.md:4-5]", []),
        ('It says: "Damp paper tears", [`paper.md:4`]', []),
        ("Keep it dry [paper.md:3].", []),
        ("“Store the paper” [paper.md:1]", []),
        ("“Store the paper” [paper.md:9]", ["[paper.md:9]: that file has 5 lines; it stands at [paper.md:3]"]),
        ("“Store the paper in a dry room. Damp paper tears” [paper.md:5]", []),
        ("“the pages stay white” [trouble.md:1]", [f"[trouble.md:1]: {THERE} [trouble.md:6]"]),
        ("“Store the paper” [trouble.md:1]", [f"[trouble.md:1]: {THERE} [paper.md:3]"]),
        ("“Damp paper burns.” [paper.md:4]", ["[paper.md:4]: the quote does not stand there; leave it out"]),
        ("A [../x.md:1] [/etc/passwd:1]", [f"[../x.md:1]: {NO_FILE}", f"[/etc/passwd:1]: {NO_FILE}"]),
        (f"[paper.md:{'9' * 5_000}] [x.md:1]", [f"[x.md:1]: {NO_FILE}"]),
        ("[paper.md:0]", ["[paper.md:0]: that file has 5 lines; leave it out"]),
        ("No place at all.", ["Nothing is cited, though there is evidence: cite each sentence as [file:line]."]),
        ("[x.md:1] and again [x.md:1]", [f"[x.md:1]: {NO_FILE}"]),
    ],
)
def test_citations_are_held_against_the_files(text: str, wrong: list[str]):
    evidence = [Evidence(question="?", file="paper.md", line=3, text="Store the paper in a dry room.")]
    assert verify(Draft(report=text, evidence=evidence)) == {"wrong": wrong}


def test_nothing_to_cite_is_no_mistake_and_the_list_of_mistakes_is_bounded():
    assert verify(Draft(report="Nothing was found.", evidence=[])) == {"wrong": []}
    many = " ".join(f"[gone.md:{number}]" for number in range(1_000))
    assert len(verify(Draft(report=many, evidence=[]))["wrong"]) == 20


# -- Both ----------------------------------------------------------------------------------------------------------


def test_they_are_offered_with_their_graphs():
    graphs = {name: registry[name].spec.graph or {} for name in ("triage", "report")}
    assert {node["name"]: node["kind"] for node in graphs["report"]["nodes"]} == {
        "plan": "lm",
        **dict.fromkeys(RESEARCH, "react"),
        "write": "lm",
        "verify": "function",
    }
    labels = {
        (edge["from"], edge["to"]): edge["label"]
        for graph in graphs.values()
        for edge in graph["edges"]
        if "label" in edge
    }
    assert labels == {
        ("classify", "escalate"): "urgent",
        ("classify", "hand_over"): "unclear",
        ("classify", "answer"): "can wait",
        ("verify", "__end__"): "right",
        ("verify", "write"): "wrong",
    }
    for name in graphs:
        properties = registry[name].spec.input_model.model_json_schema()["properties"]
        assert all(field["description"] and field["examples"] for field in properties.values())
        assert registry[name].spec.description
