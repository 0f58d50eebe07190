"""Whatever the program, the adapter and the chunks: the messages shown are the fields of the predictions, and listeners
hear the same."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import anyio
import dspy
import pytest
from dspy.lm15 import ToolCallDelta

from agentcast.agents.events import AgentEvent, MessageEnd, MessageRetracted, MessageStart, Token
from agentcast.agents.react import ReAct
from agentcast.agents.streaming import stream_events, streamify
from tests.support.lms import lm_of, pieces
from tests.support.zoo import Answer, written

SIGNATURE = dspy.Signature(
    {
        "question": (str, dspy.InputField()),
        "answer": (str, dspy.OutputField()),
        "sources": (list[str], dspy.OutputField()),
        "note": (str, dspy.OutputField()),
    },
    "Answer.",
)
OUTPUTS: dict[str, Any] = {
    "answer": 'It is "so" [[ ## no ## ]]: <b>&amp; {x}\n\n\\u00e9 😀 é, ]]> to say the least',
    "sources": ["one [1]", 'two "2"'],
    "note": "Ask again,\n  [[later]] </answer> that is.",
}
TYPES = {"answer": str, "sources": list[str], "note": str, "reasoning": str}
THOUGHTS = ["I look <it> up: [[1]] {…} 😀", 'I "submit" &c.']


def look(topic: str) -> str:
    """Look a topic up."""
    return f"{topic} is here"


def reasoned(**values: Any) -> Answer:
    return {name: (TYPES[name], value) for name, value in values.items()}


def turn(thought: str, name: str, args: dict[str, Any]) -> Answer:
    names = Literal["look", "finish"]
    return {"next_thought": (str, thought), "next_tool_name": (names, name), "next_tool_args": (dict[str, Any], args)}


LOOP = [
    turn(THOUGHTS[0], "look", {"topic": "it"}),
    turn(THOUGHTS[1], "finish", {}),
    reasoned(reasoning="It was found.", **OUTPUTS),
]
CALLS: list[list[dict[str, Any]]] = [
    [{"name": "look", "args": {"topic": "it"}}, {"name": "look", "args": {"topic": "more"}}],
    [{"name": "look", "args": {"topic": "last"}}, {"name": "submit", "args": OUTPUTS}],
]
SUBMITTED: list[Answer] = [
    {"next_thought": (str, thought), "tool_calls": (dspy.ToolCalls, dspy.ToolCalls.from_dict_list(calls))}
    for thought, calls in zip(THOUGHTS, CALLS, strict=True)
]

PROGRAMS: dict[str, tuple[Any, list[Answer]]] = {
    "Predict": (lambda: dspy.Predict(SIGNATURE), [reasoned(**OUTPUTS)]),
    "ChainOfThought": (lambda: dspy.ChainOfThought(SIGNATURE), [reasoned(reasoning="I <think>.", **OUTPUTS)]),
    "dspy.ReAct": (lambda: dspy.ReAct(SIGNATURE, [look]), LOOP),
    "agentcast.ReAct": (lambda: ReAct(SIGNATURE, [look]), LOOP),
    "ReActV2 text": (lambda: dspy.ReActV2(SIGNATURE, [look]), SUBMITTED),
    "ReActV2 native": (lambda: dspy.ReActV2(SIGNATURE, [look]), SUBMITTED),
}
ADAPTERS = ("ChatAdapter", "JSONAdapter", "XMLAdapter")
CASES = [(program, adapter) for program in PROGRAMS for adapter in ADAPTERS]
CHUNKS = [1, 7, 100_000]


def native_calls(calls: Sequence[dict[str, Any]], size: int) -> list[ToolCallDelta]:
    """The calls in fragments, those of all calls by turns."""
    fragments: list[list[ToolCallDelta]] = []
    for number, call in enumerate(calls, 1):
        first = ToolCallDelta("", number, f"c{number}", call["name"])
        rest = [ToolCallDelta(text, number) for text in pieces(json.dumps(call["args"]), size)]
        fragments.append([first, *rest])
    longest = max(map(len, fragments))
    return [fragment[at] for at in range(longest) for fragment in fragments if at < len(fragment)]


class Case:
    """A program, an adapter, and what the LM says in chunks of `size` characters."""

    def __init__(self, program: str, adapter: str, size: int) -> None:
        self.make, script = PROGRAMS[program]
        self.native = program.endswith("native")
        self.submits = program.startswith("ReActV2")
        self.adapter = getattr(dspy, adapter)()
        self.adapter.use_native_function_calling = self.native
        self.replies = [self._reply(answer, size) for answer in script]
        said = [(field, value) for answer in script for field, (_, value) in answer.items()]
        self.fields = [field for field in said if field[0] != "tool_calls"] + [*OUTPUTS.items()] * self.submits
        """The fields of all predictions, in order."""

    def _reply(self, answer: Answer, size: int) -> list[Any]:
        if not self.native:
            return pieces(written(self.adapter, answer), size)
        thought = {"next_thought": answer["next_thought"]}
        calls = [{"name": call.name, "args": call.args} for call in answer["tool_calls"][1].tool_calls]
        return [*pieces(written(self.adapter, thought), size), *native_calls(calls, size)]

    def settings(self, *, streams: bool = True) -> Any:
        rest = iter(self.replies)
        lm = lm_of(lambda _: next(rest), native=self.native)
        lm.kwargs["reasoning_effort"] = None  # the thought comes as a field
        if not streams:
            lm = _silent(lm)
        return dspy.context(lm=lm, adapter=self.adapter)


def _silent(lm: Any) -> Any:
    """An LM like `lm` that answers at once, as from a cache."""
    engine, aengine = lm.engine, lm._async_engine_spec

    class Whole:
        supports_function_calling = engine.supports_function_calling
        complete = staticmethod(engine.complete)
        close = staticmethod(engine.close)

    class AsyncWhole:
        complete = staticmethod(aengine.complete)
        aclose = staticmethod(aengine.aclose)

    options = {"cache": False, "num_retries": 0, "engine": Whole(), "async_engine": AsyncWhole()}
    return dspy.LM("test/model", reasoning_effort=None, **options)


def messages_of(events: Iterable[AgentEvent]) -> list[tuple[str, str, int]]:
    """(field, text, number of deltas) of each message that ended; none may be retracted."""
    fields, deltas, ended = {}, {}, []
    for event in events:
        if isinstance(event, MessageStart):
            fields[event.message], deltas[event.message] = event.field, list[str]()
        elif isinstance(event, Token):
            deltas[event.message].append(event.delta)
        elif isinstance(event, MessageEnd):
            parts = deltas.pop(event.message)
            assert "".join(parts) == event.text
            ended.append((fields[event.message], event.text, len(parts)))
        assert not isinstance(event, MessageRetracted)
    assert deltas == {}
    return ended


def read(messages: Sequence[tuple[str, str, int]], fields: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """(field, value) of the messages, which are to be those of `fields`."""
    pairs = zip(messages, fields, strict=True)
    return [(field, text if isinstance(value, str) else json.loads(text)) for (field, text, _), (_, value) in pairs]


async def played(case: Case, *, streams: bool = True) -> tuple[Any, list[AgentEvent]]:
    with case.settings(streams=streams), anyio.fail_after(10):
        stream = stream_events(case.make(), {"question": "What is it?"})
        events = [event async for event in stream]
    assert stream.outcome is not None
    return stream.outcome.prediction, events


@pytest.mark.parametrize("size", CHUNKS)
@pytest.mark.parametrize(("program", "adapter"), CASES)
async def test_messages_are_the_fields_of_the_predictions(program: str, adapter: str, size: int):
    case = Case(program, adapter, size)
    prediction, events = await played(case)
    assert {name: prediction[name] for name in OUTPUTS} == OUTPUTS
    messages = messages_of(events)
    assert read(messages, case.fields) == case.fields
    for (field, text, deltas), (_, value) in zip(messages, case.fields, strict=True):
        if isinstance(value, str) and size < len(text) / 3:
            assert deltas > len(text) / size / 3, f"{field} did not stream"


@pytest.mark.parametrize(("program", "adapter"), CASES)
async def test_messages_are_the_same_when_nothing_streams(program: str, adapter: str):
    case = Case(program, adapter, 7)
    prediction, events = await played(case, streams=False)
    assert {name: prediction[name] for name in OUTPUTS} == OUTPUTS
    assert read(messages_of(events), case.fields) == case.fields


@pytest.mark.parametrize(("size", "is_async"), [(1, True), (7, False), (100_000, True)])
@pytest.mark.parametrize(("program", "adapter"), CASES)
async def test_listeners_hear_the_fields_of_the_prediction(program: str, adapter: str, size: int, is_async: bool):
    case = Case(program, adapter, size)
    names = [name for name, value in OUTPUTS.items() if isinstance(value, str)]
    listeners = [dspy.streaming.StreamListener(name) for name in names]
    with case.settings(), anyio.fail_after(10):
        stream = streamify(case.make(), stream_listeners=listeners, is_async_program=is_async)
        items = [item async for item in stream(question="What is it?")]
    assert {name: items[-1][name] for name in OUTPUTS} == OUTPUTS
    heard: dict[str, str] = {}
    ended = []
    for item in items:
        if isinstance(item, dspy.streaming.StreamResponse):
            assert item.signature_field_name not in ended
            heard[item.signature_field_name] = heard.get(item.signature_field_name, "") + item.chunk
            ended += [item.signature_field_name] if item.is_last_chunk else []
    assert ended == names
    quoted = adapter == "JSONAdapter" and not case.submits
    texts = {name: json.loads(text) if quoted else text for name, text in heard.items()}
    assert texts == {name: OUTPUTS[name] for name in names}
