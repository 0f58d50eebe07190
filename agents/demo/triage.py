"""`triage`: a support ticket as typed fields, and an answer to it. A graph with a condition, which corrects itself.

The fields' models define what they may hold, "unknown" included. What a language model gives is checked against them;
it is shown what is wrong, and asked again.
"""

import enum
import re
from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo, field_validator

from agentcast.agents.demo.researcher import registry
from agentcast.agents.graph import END, Graph, StatefulNode
from agentcast.agents.transpiler import AgentTranspiler

EXAMPLE = """\
Category: bug
Severity: high
Since 2026-11-03 the export fails with error 500, and nobody can send the monthly reports to the tax office. All of us \
wait for it, so please call us!
"""
SUMMARY_WORDS = 25
REPLY_WORDS = 150

_ADDRESS = re.compile(r"[\w.+-]+@[\w-]+\.\w")


class Category(enum.StrEnum):
    BUG = "bug"
    BILLING = "billing"
    ACCESS = "access"
    FEATURE = "feature"
    QUESTION = "question"
    UNKNOWN = "unknown"


class Severity(enum.StrEnum):
    CRITICAL = "critical"
    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"
    UNKNOWN = "unknown"


HOURS = {Severity.CRITICAL: 4, Severity.HIGH: 24, Severity.NORMAL: 72, Severity.LOW: 240, Severity.UNKNOWN: 24}
"""How long a customer may wait for us."""
TEAMS = {Category.BILLING: "accounting", Category.ACCESS: "security"}
"""Who takes what cannot wait; the engineers take the rest."""


def _short(most: int) -> AfterValidator:
    """Of at most `most` words."""

    def check(text: str) -> str:
        count = len(text.split())
        if count > most:
            raise ValueError(f"must have at most {most} words, and has {count}")
        return text

    return AfterValidator(check)


def _private(text: str) -> str:
    if _ADDRESS.search(text):
        raise ValueError("must not contain an e-mail address: others get to read it")
    return text


class Ticket(BaseModel):
    ticket: str = Field(
        min_length=1,
        max_length=20_000,
        description="what the customer wrote",
        examples=[EXAMPLE],
    )


class Classified(BaseModel):
    """What a ticket is about."""

    category: Category = Field(
        description="bug: something fails; billing: invoices and payments; access: logging in and permissions; "
        "feature: a wish; question: anything else; unknown: you cannot tell"
    )
    severity: Severity = Field(
        description="critical: an outage, data loss or a security problem; high: the customer cannot work; "
        "low: a wish, or something cosmetic; normal: anything else; unknown: you cannot tell"
    )
    area: Literal["export", "dashboard", "api", "mobile", "account", "other", "unknown"] = Field(
        description="the part of the product that it is about; unknown: you cannot tell"
    )
    since: date | None = Field(default=None, description="the day since which it is so, if the ticket names one")
    respond_in_hours: int | None = Field(
        default=None,
        ge=1,
        description="how soon the customer hears from us: within 4 if critical, 24 if high or unknown, 72 if normal, "
        "240 if low; null: you cannot tell",
    )
    summary: Annotated[str, _short(SUMMARY_WORDS), AfterValidator(_private)] = Field(
        description=f"what is the matter, in at most {SUMMARY_WORDS} words and without e-mail addresses"
    )

    @field_validator("respond_in_hours")
    @classmethod
    def _is_soon_enough(cls, hours: int | None, info: ValidationInfo) -> int | None:
        severity = info.data.get("severity")
        if severity is not None and hours is not None and hours > HOURS[severity]:
            raise ValueError(f"must be at most {HOURS[severity]} if the severity is {severity}, and is {hours}")
        return hours


class Case(Ticket, Classified):
    pass


class Escalation(BaseModel):
    escalated_to: str | None = Field(default=None, description="who was called, if it cannot wait, or is unclear")


class Answer(BaseModel):
    reply: Annotated[str, _short(REPLY_WORDS), AfterValidator(_private)] = Field(
        description=f"a polite reply to the customer, in at most {REPLY_WORDS} words: what we have understood, and "
        "when they hear from us; without promises, and without e-mail addresses"
    )


class Triaged(Answer, Escalation, Classified):
    """The result."""


def escalate(case: Classified) -> dict[str, str]:
    return {"escalated_to": TEAMS.get(case.category, "engineering")}


def hand_over(case: Classified) -> dict[str, str]:
    return {"escalated_to": "a person at the support desk"}


def urgency(state: Mapping[str, Any]) -> str:
    if state["severity"] is Severity.UNKNOWN:
        return "unclear"
    return "urgent" if state["severity"] in (Severity.CRITICAL, Severity.HIGH) else "can wait"


def graph() -> Graph:
    made = Graph(
        description="Classify a support ticket into typed fields, escalate it if it is urgent, hand it over to a "
        "person if that is unclear, and draft a reply."
    )
    made.add_node(StatefulNode("classify", Ticket, Classified, instructions="Classify a support ticket.", use_cot=True))
    made.add_node(StatefulNode("escalate", Classified, Escalation, fn=escalate))
    made.add_node(StatefulNode("hand_over", Classified, Escalation, fn=hand_over))
    made.add_node(StatefulNode("answer", Case, Answer, instructions="Draft a reply to a support ticket."))
    made.add_conditional_edges(
        "classify", urgency, {"urgent": "escalate", "unclear": "hand_over", "can wait": "answer"}
    )
    made.add_edge("escalate", "answer")
    made.add_edge("hand_over", "answer")
    made.add_edge("answer", END)
    made.set_entry_point("classify")
    return made


triage = AgentTranspiler.compile(graph(), output_model=Triaged)
registry.add("triage", triage, messages=("reasoning", "summary", "reply"))
