"""The demo graphs on a hub as users start it: what an independent client sees of them, live."""

import json
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from tests.support.client import View
from tests.support.lms import chat
from tests.support.openai import Say, provider
from tests.support.process import serve

DEMO = "agentcast.agents.demo:registry"
TICKET = (
    "Category: bug\nSeverity: high\nSince: 2026-11-03\n\n"
    "Hello, since 3 November 2026 the CSV export fails with error 500 in our production account, and all our users are "
    "blocked because they cannot send their monthly reports to the tax office. We expect a fix in 48 hours. Ada"
)
TROUBLE = "# Prints\n\nThe roller pressure is too high, so the paper tears.\n"


def ended(view: View, node: str) -> list[dict[str, Any]]:
    return [event["patch"] for event in view.events if event["event"] == "node_end" and event["node"] == node]


async def test_triage_shows_attempts_retracted_texts_and_patches() -> None:
    async with serve(agents=DEMO, offline_delay="0") as hub, hub.client() as client:
        view = await client.view(await client.start("triage", {"ticket": TICKET}))
        async with httpx.AsyncClient(base_url=hub.url, trust_env=False) as http:
            listed = {agent["name"]: agent for agent in (await http.get("/v1/agents")).json()["agents"]}
    state = view.document
    assert state["status"] == "done"
    (failed,) = [event for event in view.events if event["event"] == "validation_error"]
    assert (failed["node"], failed["attempt"], failed["failed_fields"]) == (
        "classify",
        1,
        ["summary"],
    )
    summaries = [message for message in state["messages"] if message["field"] == "summary"]
    assert [message["status"] for message in summaries] == ["retracted", "done"]
    assert summaries[1]["text"] == state["result"]["summary"]
    assert len(summaries[1]["text"].split()) <= 25 < len(summaries[0]["text"].split())
    (classified,) = ended(view, "classify")
    assert classified["since"] == "2026-11-03"
    assert state["state"] == {**classified, **ended(view, "escalate")[0], **ended(view, "answer")[0]}
    assert state["result"] == state["state"]
    assert [node["name"] for node in listed["triage"]["graph"]["nodes"]] == [
        "classify",
        "escalate",
        "hand_over",
        "answer",
    ]
    assert {"urgent", "unclear", "can wait"} == {edge.get("label") for edge in listed["triage"]["graph"]["edges"]} - {
        None
    }


async def test_triage_is_cancelled_in_the_middle_of_a_node() -> None:
    async with serve(agents=DEMO, offline_delay="5") as hub, hub.client() as client:
        run = await client.start("triage", {"ticket": TICKET})
        await client.event("lm_start", run)
        await client.ask("cancel", run=run)
        view = await client.view(run)
    assert view.names[-1] == "run_cancelled"
    assert [span["name"] for span in view.document["spans"]] == ["triage", "classify", "offline/rules"]
    assert {span["error"]["code"] for span in view.document["spans"]} == {"cancelled"}


async def test_report_looks_three_questions_up_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "prints.md").write_text(TROUBLE)
    topic = "Why does the paper tear? Who reads this? How high is the roller pressure?"
    async with serve(agents=DEMO, offline_delay="0", docs=str(tmp_path)) as hub, hub.client() as client:
        with anyio.fail_after(60):
            view = await client.view(await client.start("report", {"topic": topic}))
    assert [patch["wrong"] for patch in ended(view, "verify")] == [[]]
    report = view.document["result"]["report"]
    assert "“The roller pressure is too high, so the paper tears.” [prints.md:3]" in report
    assert "Who reads this?\nNothing was found." in report
    spans = {span["span"]: span for span in view.document["spans"]}
    tools = [span for span in spans.values() if span["kind"] == "tool"]
    assert {spans[span["parent"]]["name"] for span in tools} == {"research_1", "research_2", "research_3"}
    assert str(tmp_path) not in "".join(view.texts)


async def test_report_goes_back_for_a_wrong_citation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real model's, whose provider speaks its API on loopback."""
    (tmp_path / "prints.md").write_text(TROUBLE)
    evidence = [{"question": "Why?", "file": "prints.md", "line": 3, "text": "The roller pressure is too high"}]
    plan = chat(question_1="Why?", question_2="How?", question_3="When?")
    turn = {"next_thought": "t", "next_tool_name": "finish", "next_tool_args": "{}"}
    researched = chat(**turn, reasoning="r", evidence=json.dumps(evidence))
    wrong, right = (
        chat(report=f"“The roller pressure is too high” [{place}]") for place in ("press.ini:12", "prints.md:3")
    )
    async with provider(*map(Say, [plan, *[researched] * 6, wrong, right])) as served:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{served.url}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-not-to-be-seen-anywhere")
        async with serve(agents=DEMO, lm="openai/gpt-5-mini", docs=str(tmp_path)) as hub, hub.client() as client:
            view = await client.view(await client.start("report", {"topic": "Why does the paper tear?"}))
    assert [patch["wrong"] for patch in ended(view, "verify")] == [
        ["[press.ini:12]: there is no such file; it stands at [prints.md:3]"],
        [],
    ]
    assert "[prints.md:3]" in view.document["result"]["report"]
    assert "there is no such file; it stands at [prints.md:3]" in str(served.requests[-1]["messages"])


@pytest.mark.parametrize(("agent", "field"), [("triage", "ticket"), ("report", "topic")])
async def test_an_empty_input_is_refused_with_the_field(agent: str, field: str) -> None:
    async with serve(agents=DEMO) as hub, hub.client() as client:
        error = await client.refused("start", agent=agent, input={field: ""})
    assert error["code"] == "invalid_input"
    assert error["details"][0]["loc"] == [field]


async def test_a_real_model_corrects_its_ticket_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing replaced but the provider, which speaks its API on loopback: it is asked again, with what was wrong."""
    fields = {"reasoning": "r", "category": "bug", "severity": "critical", "area": "api", "since": "2026-11-03"}
    right = fields | {"respond_in_hours": "4", "summary": "The API is down."}
    wrong = right | {"respond_in_hours": "48", "summary": "Write to ada@example.org"}
    async with provider(Say(chat(**wrong)), Say(chat(**right)), Say(chat(reply="We are at it."))) as served:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{served.url}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-not-to-be-seen-anywhere")
        async with serve(agents=DEMO, lm="openai/gpt-5-mini") as hub, hub.client() as client:
            view = await client.view(await client.start("triage", {"ticket": "The API is down!"}))
    assert view.document["result"] == {
        "category": "bug",
        "severity": "critical",
        "area": "api",
        "since": "2026-11-03",
        "respond_in_hours": 4,
        "summary": "The API is down.",
        "escalated_to": "engineering",
        "reply": "We are at it.",
    }
    assert [error["failed_fields"] for error in view.document["validation_errors"]] == [["respond_in_hours", "summary"]]
    assert len(served.requests) == 3
    asked_again = str(served.requests[1]["messages"])
    assert "must be at most 4 if the severity is critical, and is 48" in asked_again
    assert "must not contain an e-mail address" in asked_again
