"""Halves of surrogate pairs: two that belong together become their character, wherever a text was split; one that is
alone becomes a question mark. UTF-8, and so JSON on the wire, has no place for either."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import dspy
import orjson
import pytest
from dspy.streaming import StreamListener, StreamResponse
from hypothesis import given
from hypothesis import strategies as st

from agentcast.agents.base import Emitter
from agentcast.agents.channel import Channel
from agentcast.agents.events import (
    AgentEvent,
    MessageEnd,
    MessageRetracted,
    MessageStart,
    RunQueued,
    Status,
    Token,
    ToolEnd,
)
from agentcast.agents.fields import Messages, Piece
from agentcast.agents.fields.messages import DELTA_CHARS
from agentcast.agents.llm import as_model
from agentcast.agents.registry import Registry
from agentcast.agents.streaming import run_program, streamify
from agentcast.agents.values import (
    COUNT_BYTES,
    HEAD_CHARS,
    VALUE_BYTES,
    Pieces,
    clean_text,
    cut_text,
    first_chars,
    plain,
    plain_fields,
)
from agentcast.server.bus.base import NewRun, Origin
from agentcast.server.bus.memory import MemoryBus
from agentcast.server.client import connect
from agentcast.server.runs import recorder as module
from agentcast.server.runs.publisher import SummaryPublisher
from agentcast.server.runs.recorder import Recorder
from agentcast.server.runs.snapshots import Snapshots
from agentcast.server.state import RunState
from tests.support.agents import agent
from tests.support.hub import open_hub
from tests.support.lms import chat, lm_of
from tests.support.openai import Say, provider

HIGH, LOW, PAIR = "\ud83d", "\ude00", "\ud83d\ude00"
LOST = "?"
units = st.lists(st.sampled_from([HIGH, LOW, "\udbff", "\udfff", "a", "é", "😀", "\n"]), max_size=12).map("".join)


def halves(text: str) -> str:
    """`text` with each character beyond 16 bits as its two halves."""
    return "".join(
        char if char < "\U00010000" else "".join(map(chr, memoryview(char.encode("utf-16-le")).cast("H")))
        for char in text
    )


# -- Cleaning and cutting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (PAIR, "😀"),
        (HIGH, LOST),
        (LOW, LOST),
        (LOW + HIGH, LOST * 2),
        (HIGH + PAIR + LOW, f"{LOST}😀{LOST}"),
        (f"a{HIGH}b{LOW}", f"a{LOST}b{LOST}"),
        (f"{HIGH}😀", f"{LOST}😀"),
        (PAIR * 3, "😀😀😀"),
        (halves("🌍 and 👩‍🚀"), "🌍 and 👩‍🚀"),
    ],
)
def test_pairs_are_put_together_and_halves_replaced(text: str, clean: str) -> None:
    assert clean_text(text) == clean
    assert cut_text(text) == clean
    assert plain(text) == clean
    assert plain([text, {text: text}]) == [clean, {clean: clean}]
    assert plain_fields({text: text}) == {clean: clean}
    assert Status(message=text).message == clean
    assert Token(message="m", delta=text).wire()["delta"] == clean
    assert (
        ToolEnd(span="1", tool=text, duration=0, result=text).wire() | {"tool": clean, "result": clean}
        == ToolEnd(span="1", tool=clean, duration=0, result=clean).wire()
    )


@given(units)
def test_clean_text_has_no_surrogates_and_pairs_are_those_that_json_knows(text: str) -> None:
    clean = clean_text(text)

    assert orjson.loads(orjson.dumps(clean)) == clean
    assert clean == "".join("?" if "\ud800" <= char < "\ue000" else char for char in json.loads(json.dumps(text)))
    assert clean_text(clean) == clean


@given(units, st.lists(st.integers(1, 4), min_size=1))
def test_however_a_text_is_split_its_pieces_are_the_text(text: str, sizes: list[int]) -> None:
    pieces, rest, turn = Pieces(), text, 0
    cleaned = []
    while rest:
        piece, rest = rest[: sizes[turn % len(sizes)]], rest[sizes[turn % len(sizes)] :]
        cleaned.append(pieces.push(piece))
        turn += 1

    assert "".join(cleaned) + pieces.end() == clean_text(text)
    assert pieces.end() == ""


@pytest.mark.parametrize("before", ["", "a"])
def test_no_cut_leaves_half_a_pair(before: str) -> None:
    for text in (before + PAIR * VALUE_BYTES, before + "a" * (VALUE_BYTES - 2) + PAIR * 100):
        assert LOST not in cut_text(text)
        assert LOST not in plain(text)
        assert LOST not in first_chars(text, HEAD_CHARS)
        assert LOST not in plain([text] * (COUNT_BYTES // len(text) + 1))["head"]


@given(units, st.integers(0, 12))
def test_the_first_characters_are_the_beginning_of_the_text(text: str, count: int) -> None:
    assert clean_text(text).startswith(first_chars(text, count).removesuffix(LOST))
    assert len(first_chars(halves("😀") * 6, count)) == count // 2


# -- Splitters and messages ----------------------------------------------------------------------------------------

SAID = "ab 😀c\n\n🌍😀 d"
ANSWERS: list[tuple[Any, str]] = [
    (dspy.ChatAdapter, chat(answer=SAID)),
    (dspy.JSONAdapter, json.dumps({"answer": SAID}, ensure_ascii=False)),
    (dspy.JSONAdapter, json.dumps({"answer": SAID})),
    (dspy.XMLAdapter, f"<answer>\n{SAID}\n</answer>"),
]


def streamed_text(events: Sequence[AgentEvent]) -> str:
    """The joined deltas of the only message, which end as they should, each of them fit for the wire."""
    assert not [event for event in events if isinstance(event, MessageRetracted)]
    (end,) = [event for event in events if isinstance(event, MessageEnd)]
    deltas = [orjson.loads(orjson.dumps(event.wire()))["delta"] for event in events if isinstance(event, Token)]
    assert "".join(deltas) == end.text
    return end.text


@pytest.mark.parametrize(("adapter", "answer"), ANSWERS)
def test_deltas_are_the_text_wherever_the_chunks_are_split(adapter: Any, answer: str) -> None:
    whole = halves(answer)
    for size in (1, 2, 3, 5, len(whole)):
        messages = Messages("s", None, lambda: "m")
        messages.expect(adapter, {"answer": str})
        events = messages.begin()
        for at in range(0, len(whole), size):
            events += messages.feed(Piece(whole[at : at + size]))
        events += messages.finish()
        streamed = [event for event in events if isinstance(event, Token)]
        events += messages.settle({"answer": halves(SAID)})

        assert streamed_text(events) == SAID
        assert streamed == [event for event in events if isinstance(event, Token)]  # nothing was left to the end


@pytest.mark.parametrize(("answer", "value"), [(f"a{HIGH}", f"a{HIGH}"), (f"a{LOW}b", f"a{LOW}b"), (HIGH, HIGH)])
def test_half_a_pair_in_an_answer_is_replaced(answer: str, value: str) -> None:
    messages = Messages("s", None, lambda: "m")
    messages.expect(dspy.ChatAdapter, {"answer": str})
    events = [*messages.begin(), *messages.feed(Piece(f"[[ ## answer ## ]]\n{answer}")), *messages.finish()]

    assert streamed_text([*events, *messages.settle({"answer": value})]) == clean_text(value)


def test_half_a_pair_of_one_attempt_does_not_reach_the_next() -> None:
    messages = Messages("s", None, lambda: "m")
    messages.expect(dspy.ChatAdapter, {"answer": str})
    messages.begin()
    messages.feed(Piece(f"[[ ## answer ## ]]\na{HIGH}"))
    events = [*messages.begin(), *messages.feed(Piece(f"[[ ## answer ## ]]\n{LOW}b")), *messages.finish()]
    events = [event for event in events if not isinstance(event, MessageRetracted)]

    assert streamed_text([*events, *messages.settle({"answer": f"{LOW}b"})]) == f"{LOST}b"


def test_a_text_of_many_deltas_is_cut_between_characters() -> None:
    messages = Messages("s", None, lambda: "m")
    text = "a" + "😀" * (2 * DELTA_CHARS)

    assert streamed_text(messages.settle({"answer": halves(text)})) == text


# -- Programs ------------------------------------------------------------------------------------------------------


class TwoSteps(dspy.Module):  # type: ignore[misc]
    """The answer of one step is the question of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict("question -> answer")
        self.second = dspy.Predict("question -> answer")

    async def aforward(self, question: str) -> Any:
        first = await self.first.acall(question=question)
        return await self.second.acall(question=first.answer)


class Heard:
    def __init__(self) -> None:
        self.events: list[AgentEvent] = []

    async def send(self, event: AgentEvent) -> None:
        self.events.append(event)

    def nowait(self, event: AgentEvent) -> None:
        self.events.append(event)


@pytest.mark.parametrize(("adapter", "answer"), ANSWERS)
async def test_a_program_is_given_whole_characters(adapter: Any, answer: str) -> None:
    heard = Heard()
    with dspy.context(lm=lm_of(lambda _: list(halves(answer))), adapter=adapter()):
        outcome = await run_program(TwoSteps(), {"question": "q"}, heard)

    assert outcome.prediction.answer == SAID
    texts = [event.text for event in heard.events if isinstance(event, MessageEnd)]
    assert texts == [SAID, SAID]
    assert "".join(event.delta for event in heard.events if isinstance(event, Token)) == SAID * 2


async def test_a_tool_is_called_without_halves_of_pairs() -> None:
    called: list[Any] = []

    def look(text: str, more: list[str]) -> str:
        called.append((text, more))
        return halves("😀")

    step = {"next_thought": HIGH, "next_tool_name": "look", "next_tool_args": {"text": HIGH, "more": [LOW]}}
    done = {"next_thought": "done", "next_tool_name": "finish", "next_tool_args": {}}
    answers = iter([step, done, {"reasoning": "r", "answer": SAID}])
    with dspy.context(lm=lm_of(lambda _: json.dumps(next(answers))), adapter=dspy.JSONAdapter()):
        outcome = await run_program(dspy.ReAct("question -> answer", tools=[look]), {"question": "q"}, Heard())

    assert called == [(LOST, [LOST])]
    assert outcome.prediction.answer == SAID


@pytest.mark.parametrize(("adapter", "answer"), ANSWERS)
async def test_listeners_hear_whole_characters(adapter: Any, answer: str) -> None:
    program = dspy.Predict("question -> answer")
    stream = streamify(program, stream_listeners=[StreamListener("answer")], is_async_program=True)
    with dspy.context(lm=lm_of(lambda _: list(halves(answer))), adapter=adapter()), anyio.fail_after(10):
        items = [item async for item in stream(question="q")]

    chunks = "".join(item.chunk for item in items if isinstance(item, StreamResponse))
    assert (json.loads(chunks) if adapter is dspy.JSONAdapter else chunks) == SAID
    assert items[-1].answer == SAID


async def test_a_real_provider_may_split_pairs_and_send_halves() -> None:
    answer = json.dumps({"answer": f"{SAID}{HIGH}"})  # the half as an escape inside of the answer's own JSON
    async with provider(Say(answer, size=1), Say(halves(chat(answer=SAID)), size=1)) as served:
        lm = as_model(dspy.LM("openai/gpt-5-mini", api_base=f"{served.url}/v1", api_key="k", cache=False))
        heard = Heard()
        program = TwoSteps()
        with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
            first = await run_program(program.first, {"question": "q"}, heard)
        with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
            second = await run_program(program.second, {"question": first.prediction.answer}, heard)

    assert (first.prediction.answer, second.prediction.answer) == (SAID + LOST, SAID)
    assert [event.text for event in heard.events if isinstance(event, MessageEnd)] == [SAID + LOST, SAID]
    assert SAID + LOST in served.requests[1]["messages"][-1]["content"]


# -- The recorder: tokens of agents themselves ---------------------------------------------------------------------


@asynccontextmanager
async def recording() -> AsyncIterator[tuple[Channel, MemoryBus]]:
    bus, channel = MemoryBus(), Channel()
    recorder = Recorder(
        bus, "r", Origin("echo", "ann", None, 1.0), "e", fence=1, snapshots=Snapshots(), summaries=SummaryPublisher(bus)
    )
    first = recorder.first_frame(1.0, RunQueued(epoch="e", input={}))
    await bus.create(NewRun(run="r", epoch="e", agent="echo", principal="ann", thread=None, created=1.0, first=first))
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(recorder.record_from, channel)
            yield channel, bus
            channel.close()


async def logged(bus: MemoryBus) -> list[dict[str, Any]]:
    page = await bus.read("r", "e", 0)
    assert page is not None
    return [orjson.loads(frame.data) for frame in page.frames]


async def recorded(*events: AgentEvent) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Message → text, by folding the log of a run that emits `events`; and the log."""
    async with recording() as (channel, bus):
        for event in events:
            await channel.send(event)
    log = await logged(bus)
    state = RunState.new("r", "echo")
    for document in log:
        state.apply(document)
    return {message["message"]: message["text"] for message in state.document["messages"]}, log


def start(message: str) -> MessageStart:
    return MessageStart(message=message, span="s", field="text")


def tokens(message: str, text: str) -> list[Token]:
    return [Token(message=message, delta=char) for char in text]


async def test_pairs_split_between_tokens_are_put_together() -> None:
    texts, log = await recorded(start("m"), *tokens("m", halves(SAID)), MessageEnd(message="m", text=halves(SAID)))

    assert texts == {"m": SAID}
    assert "".join(event["delta"] for event in log if event["event"] == "token") == SAID


async def test_halves_of_two_messages_are_not_put_together() -> None:
    texts, _ = await recorded(
        start("a"),
        start("b"),
        Token(message="a", delta=f"1{HIGH}"),
        Token(message="b", delta=f"{LOW}2"),
        Token(message="b", delta=HIGH),
        Token(message="a", delta=LOW),
        Token(message="b", delta=LOW),
    )

    assert texts == {"a": "1😀", "b": f"{LOST}2😀"}


@pytest.mark.parametrize(
    ("end", "text"),
    [
        ([], f"a{LOST}"),
        ([MessageEnd(message="m", text=f"a{HIGH}")], f"a{LOST}"),
        ([MessageEnd(message="m", text=f"a{PAIR}b")], "a😀b"),
        ([MessageEnd(message="m", text="a")], "a"),
        ([MessageEnd(message="m", text="something else")], f"a{LOST}"),
        ([Token(message="m", delta="b"), MessageEnd(message="m", text="")], f"a{LOST}b"),
    ],
)
async def test_half_a_pair_is_sent_at_the_end(end: list[AgentEvent], text: str) -> None:
    texts, log = await recorded(start("m"), Token(message="m", delta="a"), Token(message="m", delta=HIGH), *end)

    assert texts == {"m": text}
    assert "".join(event["delta"] for event in log if event["event"] == "token") == text


async def test_half_a_pair_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_AFTER", 1_000.0)
    async with recording() as (channel, bus):
        await channel.send(start("m"))
        await channel.send(Token(message="m", delta=f"a{HIGH}"))
        await channel.send(Status(message="on"))
        await anyio.wait_all_tasks_blocked()
        log = await logged(bus)

    assert [event["event"] for event in log] == ["run_queued", "message_start", "token", "status"]
    assert log[2]["delta"] == "a"


@given(st.lists(st.tuples(st.sampled_from("ab"), units), max_size=8))
def test_messages_are_their_joined_tokens(pieces: list[tuple[str, str]]) -> None:
    async def run() -> dict[str, str]:
        texts, _ = await recorded(
            start("a"), start("b"), *(Token(message=message, delta=text) for message, text in pieces)
        )
        return texts

    assert anyio.run(run) == {
        message: clean_text("".join(text for each, text in pieces if each == message)) for message in "ab"
    }


# -- Through the hub -----------------------------------------------------------------------------------------------


@agent("writer")
async def writer(_: Any, emit: Emitter) -> Any:
    await emit.send(Status(message=f"{PAIR} begins {HIGH}"))
    await emit.send(start("m"))
    for token in tokens("m", halves(SAID)):
        await emit.send(token)
    await emit.send(MessageEnd(message="m", text=halves(SAID)))
    return {"text": halves(SAID), "half": HIGH}


async def test_what_a_function_emits_and_returns_is_whole_for_clients() -> None:
    async with open_hub(writer) as hub, hub.client() as client:
        view = await client.view(await client.start("writer"))

    assert view.document["status_message"] == f"😀 begins {LOST}"
    assert view.document["messages"][0]["text"] == SAID
    assert "".join(event["delta"] for event in view.events if event["event"] == "token") == SAID
    assert view.document["result"] == {"text": SAID, "half": LOST}


async def test_results_of_typed_functions_and_programs_are_whole() -> None:
    registry = Registry()

    @registry.agent
    async def typed() -> dict[str, list[str]]:
        return {"texts": [halves(SAID), HIGH]}

    (written,) = registry
    async with open_hub(written) as hub, hub.client() as client:  # type: ignore[arg-type]
        view = await client.view(await client.start("typed"))
    assert view.document.get("result") == {"texts": [SAID, LOST]}, view.document


async def test_the_client_sends_whole_characters() -> None:
    @agent("echo")
    async def echo(input: Any, emit: Emitter) -> Any:
        return input.model_dump()

    async with open_hub(echo) as hub, connect(hub.url).start("echo", {"text": f"{PAIR}{HIGH}"}) as run:
        with anyio.fail_after(10):
            result = await run.result()
    assert result == {"text": f"😀{LOST}"}
