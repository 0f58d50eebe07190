"""`dspy.ReActV2`: the answer is what its tool `submit` is called with, natively or in a text, and streams."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import dspy
import pytest
from dspy.lm15 import ThinkingDelta, ToolCallDelta

from agentcast.agents.events import AgentEvent
from agentcast.agents.streaming import stream_events, streamify
from tests.support.lms import chat, lm_of, pieces


async def look(topic: str) -> str:
    """Look a topic up."""
    return f"{topic} is here"


def calling(*calls: tuple[str, dict[str, Any]], size: int = 5) -> list[Any]:
    """Native calls, one after another."""
    deltas: list[Any] = []
    for number, (name, args) in enumerate(calls, 1):
        deltas.append(ToolCallDelta("", number, f"c{number}", name))
        deltas += [ToolCallDelta(text, number) for text in pieces(json.dumps(args), size)]
    return deltas


def in_text(*calls: tuple[str, dict[str, Any]]) -> list[str]:
    made = json.dumps({"tool_calls": [{"name": name, "args": args} for name, args in calls]})
    return pieces(chat(next_thought="Hm.", tool_calls=made), 5)


async def events_of(
    replies: Sequence[Any],
    *,
    signature: Any = "question -> answer",
    native: bool = True,
    messages: Any = None,
    max_iters: int = 20,
    before_chunk: Callable[[int], Any] | None = None,
    effort: str | None = None,
) -> tuple[Any, list[AgentEvent]]:
    rest = iter(replies)
    lm = lm_of(lambda _: next(rest), native=native, before_chunk=before_chunk)
    lm.kwargs["reasoning_effort"] = effort
    program = dspy.ReActV2(signature, [look], max_iters=max_iters)
    adapter = dspy.ChatAdapter(use_native_function_calling=native)
    with dspy.context(lm=lm, adapter=adapter), anyio.fail_after(10):
        stream = stream_events(program, {"question": "?"}, messages=messages)
        events = [event async for event in stream]
    assert stream.outcome is not None
    return stream.outcome.prediction, events


def shape(events: Sequence[AgentEvent]) -> list[str]:
    """Messages and tools in short."""
    fields: dict[str, str] = {}
    lines: list[str] = []
    for event in events:
        match event.event:
            case "message_start":
                fields[event.message] = event.field
                lines.append(f"{event.field} of {event.span}")
            case "message_end":
                lines.append(f"{fields[event.message]}: {event.text}")
            case "message_retracted":
                lines.append(f"{fields[event.message]} retracted: {event.reason}")
            case "tool_start":
                lines.append(f"{event.tool} {event.args}")
            case _:
                pass
    return lines


async def test_the_answer_is_a_message_of_the_loop_and_submit_is_no_tool():
    replies = [
        [*pieces(chat(next_thought="Look."), 5), *calling(("look", {"topic": "a"}), ("look", {"topic": "b"}))],
        calling(("look", {"topic": "c"}), ("submit", {"answer": "yes \ud83d\ude00"})),
    ]
    prediction, events = await events_of(replies)
    assert prediction.answer == "yes 😀"
    assert shape(events) == [
        "next_thought of 2",
        "next_thought: Look.",
        "look {'topic': 'a'}",
        "look {'topic': 'b'}",
        "answer of 1",
        "look {'topic': 'c'}",
        "answer: yes 😀",
    ]


@pytest.mark.parametrize("native", [True, False])
async def test_the_answer_arrives_while_the_call_is_being_written(native: bool):
    heard, more = anyio.Event(), anyio.Event()
    call = ("submit", {"answer": "It is a long answer, as answers go."})
    reply: list[Any] = calling(call) if native else in_text(call)

    async def before_chunk(number: int) -> None:
        if number == len(reply) - 1:
            await more.wait()

    lm = lm_of(lambda _: reply, native=native, before_chunk=before_chunk)
    lm.kwargs["reasoning_effort"] = None
    adapter = dspy.ChatAdapter(use_native_function_calling=native)
    texts: list[str] = []

    async def play() -> None:
        with dspy.context(lm=lm, adapter=adapter):
            answers = set()
            async for event in stream_events(dspy.ReActV2("question -> answer", [look]), {"question": "?"}):
                if event.event == "message_start" and event.field == "answer":
                    answers.add(event.message)
                if event.event == "token" and event.message in answers:
                    texts.append(event.delta)
                    if "".join(texts).startswith("It is a long answer"):
                        heard.set()

    async with anyio.create_task_group() as group:
        group.start_soon(play)
        with anyio.fail_after(10):
            await heard.wait()
            more.set()
    assert "".join(texts) == call[1]["answer"]


async def test_an_answer_that_the_tool_refuses_is_retracted_when_the_model_tries_again():
    signature = dspy.Signature("question -> answer, count: int")
    replies = [
        calling(("submit", {"answer": "one", "count": "many"})),
        calling(("submit", {"answer": "two", "count": 2})),
    ]
    prediction, events = await events_of(replies, signature=signature)
    assert (prediction.answer, prediction.count) == ("two", 2)
    assert shape(events) == [
        "answer of 1",
        "count of 1",
        "answer retracted: another attempt is made",
        "count retracted: another attempt is made",
        "answer of 1",
        "count of 1",
        "answer: two",
        "count: 2",
    ]


@pytest.mark.parametrize("native", [True, False])
async def test_of_two_answers_the_last_is_the_programs_and_the_first_is_retracted(native: bool):
    calls = [("submit", {"answer": "one", "places": [1]}), ("submit", {"answer": "two", "places": [2, 3]})]
    prediction, events = await events_of(
        [(calling if native else in_text)(*calls)], signature="question -> answer, places: list[int]", native=native
    )
    assert (prediction.answer, prediction.places) == ("two", [2, 3])
    assert [line for line in shape(events) if "next_thought" not in line] == [
        "answer of 1",
        "places of 1",
        "answer retracted: the answer was read differently in the end",
        "places retracted: the answer was read differently in the end",
        "answer of 1",
        "answer: two",
        "places of 1",
        "places: [2,3]",
    ]


@pytest.mark.parametrize("native", [True, False])
async def test_a_forced_answer_streams(native: bool):
    calls = calling if native else in_text
    replies = [calls(("look", {"topic": "a"})), calls(("submit", {"answer": "so be it"}))]
    prediction, events = await events_of(replies, native=native, max_iters=1)
    assert (prediction.answer, prediction.termination_reason) == ("so be it", "forced_submit")
    assert [line for line in shape(events) if "answer" in line] == ["answer of 1", "answer: so be it"]
    assert sum(event.event == "token" for event in events) > 1


async def test_a_models_own_reasoning_streams_as_the_thought():
    replies = [[*map(ThinkingDelta, ["I ", "think", "."]), *calling(("submit", {"answer": "yes"}))]]
    prediction, events = await events_of(replies, effort="low")
    assert prediction.answer == "yes"
    assert shape(events) == ["next_thought of 2", "answer of 1", "next_thought: I think.", "answer: yes"]
    assert [event.delta for event in events if event.event == "token"][:3] == ["I ", "think", "."]


async def test_only_the_fields_that_were_asked_for_are_shown():
    call = ("submit", {"answer": "yes"})
    _, events = await events_of([in_text(call)], native=False, messages=["answer"])
    assert shape(events) == ["answer of 1", "answer: yes"]
    _, events = await events_of([in_text(call)], native=False, messages=["tool_calls"])
    assert [line.partition(" ")[0] for line in shape(events)] == ["tool_calls", "tool_calls:"]
    _, events = await events_of([calling(call)], messages=[])
    assert shape(events) == []


class Nested(dspy.Module):  # type: ignore[misc]
    """A loop in another program, beside a predictor with a tool named `submit` of its own making."""

    def __init__(self) -> None:
        self.loop = dspy.ReActV2("question -> answer", [look])
        self.judge = dspy.Predict("answer -> verdict")

    async def aforward(self, question: str) -> Any:
        found = await self.loop.acall(question=question)
        await dspy.Tool(look, name="submit").acall(topic="x")
        return await self.judge.acall(answer=found.answer)


async def test_listeners_hear_what_a_loop_inside_a_program_submits_and_statuses_leave_it_out():
    replies = iter(
        [
            in_text(("look", {"topic": "a"})),
            in_text(("submit", {"answer": "It is 😀 so."})),
            pieces(chat(verdict="fine"), 5),
        ]
    )
    listeners = [dspy.streaming.StreamListener(name, allow_reuse=True) for name in ("answer", "verdict")]
    with dspy.context(lm=lm_of(lambda _: next(replies))), anyio.fail_after(10):
        stream = streamify(Nested(), stream_listeners=listeners, is_async_program=True)(question="?")
        items = [item async for item in stream]
    heard = [item for item in items if isinstance(item, dspy.streaming.StreamResponse)]
    answers = [item.chunk for item in heard if item.signature_field_name == "answer"]
    assert "".join(answers) == "It is 😀 so."
    assert len(answers) > 2
    assert {(item.predict_name, item.signature_field_name) for item in heard} == {
        ("loop.react", "answer"),
        ("judge", "verdict"),
    }
    statuses = [item.message for item in items if isinstance(item, dspy.streaming.StatusMessage)]
    assert [text for text in statuses if text.startswith("Calling tool")] == [
        "Calling tool look...",
        "Calling tool submit...",
    ]
    assert len(statuses) == 4


class Twice(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        self.loop = dspy.ReActV2("question -> answer", [look])
        self.ask = dspy.Predict("question -> answer")


def test_a_listener_has_to_say_which_of_several_it_listens_to():
    with pytest.raises(ValueError, match="answer is of several predictors"):
        streamify(Twice(), stream_listeners=[dspy.streaming.StreamListener("answer")])
    loop = Twice().loop
    streamify(Twice(), stream_listeners=[dspy.streaming.StreamListener("answer", predict=loop.react)])
