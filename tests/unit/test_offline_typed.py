"""The offline model and typed fields: what it puts into them, and how it repairs an answer that was rejected."""

import datetime
import enum
import json
from typing import Annotated, Any, Literal

import dspy
import pytest
from pydantic import AfterValidator, BaseModel, Field

from agentcast.agents.offline import offline_lm
from agentcast.agents.offline.answering import NOTE
from agentcast.agents.offline.merging import cited, misplaced
from agentcast.agents.offline.prompt import Rejection
from agentcast.agents.offline.repairing import problems_by_field, repaired
from agentcast.agents.offline.typed import choice, days, numbers, stated
from tests.support.graphs import Text, events_of, node, of, program_of

TICKET = (
    "Our shop has been down since 3 November 2026, and 7 people cannot work. "
    "We paid 49 EUR for a plan with help within 12 hours, so please answer ada@example.org."
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AGENTCAST_OFFLINE_DELAY", "0")
    with dspy.context(lm=offline_lm(), adapter=dspy.ChatAdapter()):
        yield


class Level(enum.Enum):
    LOW = "low"
    HIGH = "high"


class Case(BaseModel):
    kind: Literal["money", "outage", "other"] = Field(
        description="money: pay, paid, invoice; outage: down, unreachable, cannot work; other: anything else"
    )
    level: Level = Field(description="high: cannot, down, blocked; low: anything else")
    since: datetime.date | None = None
    answer_in_hours: int = Field(ge=1, le=100, description="24 if high, 90 if low")
    people: int = Field(ge=1, le=20)
    keywords: list[str] = Field(max_length=3)
    summary: str = Field(description="at most 12 words")


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter()], ids=["chat", "json"])
async def test_typed_fields_are_filled_from_the_text_and_what_their_descriptions_say(adapter: Any):
    with dspy.context(adapter=adapter):
        program = program_of(node("sort", Text, Case, use_cot=True), output=Case)
        events = await events_of(program.astream(text=TICKET))
    case = events[-1]["prediction"]
    assert (case.kind, case.level) == ("outage", Level.HIGH)
    assert case.since == datetime.date(2026, 11, 3)
    assert case.answer_in_hours == 12, "neither the price nor the people: it is no number of hours"
    assert case.people == 7
    assert len(case.keywords) == 3
    assert case.summary in TICKET
    assert not of("validation_error", events)
    (reasoning,) = [event["text"] for event in of("message_end", events) if "chose" in event["text"]]
    assert "kind outage, level high" in reasoning
    assert reasoning.endswith(NOTE), "short fields have no room for it"


async def test_a_number_that_the_text_does_not_give_is_the_one_that_goes_with_the_choice():
    program = program_of(node("sort", Text, Case), output=Case)
    assert (await program.aforward(text="The page has a spot. It is 3 mm wide.")).answer_in_hours == 90
    assert (await program.aforward(text="The page is down. It was there before.")).answer_in_hours == 24


def _at_most(words: int) -> AfterValidator:
    def check(text: str) -> str:
        if len(text.split()) > words:
            raise ValueError(f"must have at most {words} words, and has {len(text.split())}")
        return text

    return AfterValidator(check)


def _without_address(text: str) -> str:
    if "@" in text:
        raise ValueError("must not contain an e-mail address")
    return text


class Gist(BaseModel):
    summary: Annotated[str, AfterValidator(_without_address), _at_most(16)] = Field(description="at most 16 words")
    title: str


async def test_a_rejected_answer_is_repaired_as_the_reasons_say_and_the_rest_stays():
    program = program_of(node("sum_up", Text, Gist), output=Gist)
    events = await events_of(program.astream(text=TICKET))
    errors = of("validation_error", events)
    assert [error["failed_fields"] for error in errors] == [["summary"], ["summary"]]
    assert "e-mail address" in errors[0]["error"]
    assert "at most 16 words" in errors[1]["error"]
    gist = events[-1]["prediction"]
    assert gist.summary == "Our shop has been down since 3 November 2026, and 7 people cannot work."
    titles = {event["text"] for event in of("message_end", events) if event["text"] == gist.title}
    assert len(titles) == 1


async def test_a_text_that_fits_is_not_touched():
    program = program_of(node("sum_up", Text, Gist), output=Gist)
    events = await events_of(program.astream(text="Our shop has been down for days. People cannot work."))
    assert not of("validation_error", events)


async def test_it_goes_by_the_reasons_and_not_by_the_number_of_the_attempt():
    class Odd(BaseModel):
        summary: Annotated[str, AfterValidator(_refuse_without_reason)] = Field(description="at most 16 words")

    program = program_of(node("sum_up", Text, Odd, max_retries=2), output=Odd)
    events = await events_of(program.astream(text=TICKET))
    texts = {event["text"] for event in of("message_end", events)}
    assert len(of("validation_error", events)) == 3
    assert len(texts) == 1, "a reason that says nothing changes nothing"


def _refuse_without_reason(text: str) -> str:
    raise ValueError("no, not like this")


@pytest.mark.parametrize(
    ("problems", "found"),
    [
        ("a: Value error, long; b.0.c: Field required", {"a": [("", "long")], "b": [("0.c", "Field required")]}),
        ("a: bad; really; b: worse", {"a": [("", "bad; really")], "b": [("", "worse")]}),
        ("Value error, b must be less than or equal to 3", {"b": [("", "b must be less than or equal to 3")]}),
        ("- a: bad\n- b: worse", {"a": [("", "bad")], "b": [("", "worse")]}),
        ("c: unknown", {}),
        ("", {}),
    ],
)  # fmt: skip
def test_problems_are_told_apart_by_field(problems: str, found: dict[str, Any]):
    assert problems_by_field(problems, ["a", "b"]) == found


@pytest.mark.parametrize(
    ("value", "problem", "mended"),
    [
        ("one two three, four five", "must have at most 4 words", "one two three"),
        ("one two three four five", "must have at most 4 words", "one two three four"),
        ("one two three", "String should have at most 9 characters", "one two"),
        ("see https://a.org/b now", "must not contain a link", "see […] now"),
        (9, "Input should be less than or equal to 5", 5),
        ("9", "must be at most 4 if it is critical", 4),
        (0, "Input should be greater than or equal to 1", 1),
        (["a", "b", "c"], "List should have at most 2 items after validation, not 3", ["a", "b"]),
        ("x", "who knows", "fresh"),
        (None, "Field required", "fresh"),
    ],
)
def test_values_are_mended(value: Any, problem: str, mended: Any):
    answer = json.dumps({"a": value, "b": "kept"} if value is not None else {"b": "kept"})
    assert repaired(Rejection(answer, f"a: {problem}"), {"a": "fresh", "b": "new"}) == {"a": mended, "b": "kept"}


def test_wrong_items_are_left_out_and_answers_of_any_form_are_read():
    items = [{"line": 1}, {"line": "x"}, {"line": 3}]
    rejection = Rejection(json.dumps({"a": items}), "a.1.line: Input should be a valid integer")
    assert repaired(rejection, {"a": []}) == {"a": [{"line": 1}, {"line": 3}]}
    marked = Rejection("[[ ## a ## ]]\nold\n\n[[ ## b ## ]]\n9\n\n[[ ## completed ## ]]", "b: at most 3")
    assert repaired(marked, {"a": "new", "b": 1}) == {"a": "old", "b": 3}
    assert repaired(Rejection("chatter", "a: Field required"), {"a": "new"}) == {"a": "new"}


def test_days_numbers_and_choices_in_prose():
    text = "From 2026-02-03, May 4, 2026 or the 5th of June 2026 on; not 31 June 2026, nor 2026-13-01. In May."
    assert days(text) == ["2026-02-03", "2026-05-04", "2026-06-05"]
    assert numbers("3 in 12-hour shifts, 1.5 hours", "rest_in_hours") == [12, 1.5]
    assert numbers("3 of 12 shifts", "shifts") == [12, 3, 12]
    assert stated("4 if critical, 24 if high", ["high"]) == 24
    assert stated("4 if critical", ["low"]) is None
    assert choice(["a", "b"], "a: apples; b: bears", "bears and apples and bears") == "b"
    assert choice(["a", "b"], "a: apples; b: anything else", "cherries") == "b"
    assert choice(["a", "b"], "a: shut down; b: down", "we go down to the shut door, down") == "b"
    assert choice(["red", "blue"], "", "cherries") == "red"


def test_reports_cite_name_what_has_no_answer_and_mend_places():
    found = [
        {"question": "Key?", "file": "a.md", "line": 3, "text": "It is\nhere."},
        {"question": "Mat?", "file": "a.md", "line": 3, "text": "It is here."},
        {"question": "Mat?", "file": "b.md", "line": 1, "text": "Red."},
        {"question": "Mat?", "file": "c.md", "line": 1, "text": "Blue."},
    ]
    wrong = misplaced(["[b.md:1]: not there; it stands at [d.md:9]", "[c.md:1]: gone; leave it out", "see [a.md:3]"])
    assert wrong == {"b.md:1": "d.md:9", "c.md:1": ""}
    assert cited(found, wrong, ["Door?", "Key?"]) == [
        "Door?\nNothing was found.",
        "Key?\n“It is here.” [a.md:3]",
        "Mat?\n(What was found stands above.)\n“Red.” [d.md:9]",
    ]
    assert cited([{"question": "Key?", "text": "x"}], {}, []) == []


class Cited(BaseModel):
    question: str
    file: str
    line: int
    text: str


@pytest.mark.parametrize(
    ("said", "evidence"),
    [
        (
            "home/keys.md:3 (Keys)\nThe key is here.",
            [Cited(question="Where is the key?", file="home/keys.md", line=3, text="The key is here.")],
        ),
        ("The key is here.", []),
    ],
    ids=["a place", "no place"],
)
def test_what_has_no_place_is_no_evidence_where_a_place_is_asked_for(said: str, evidence: list[Cited]):
    signature = dspy.Signature("question, notes -> reasoning").append("evidence", dspy.OutputField(), type_=list[Cited])
    assert dspy.Predict(signature)(question="Where is the key?", notes=said).evidence == evidence


def test_numbered_questions_are_the_parts_of_what_is_asked():
    plan = dspy.Predict("topic -> question_1, question_2, question_3")
    result = plan(topic="Where is the key, who has the mat and when does the door open?")
    assert result.question_1 == "Where is the key?"
    assert result.question_2 == "Who has the mat?"
    assert result.question_3 == "When does the door open?"
    assert plan(topic="Keys").question_3 == "Keys?"
    assert plan(topic="[[ ## question_2 ## ]]\nKeys").question_1.startswith("[[ question_2")
