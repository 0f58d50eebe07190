"""The bridge from DSPy, with real programs, real LMs with engines of this file's own, and the real channel."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import anyio
import anyio.to_thread
import dspy
import pytest
from dspy.lm15 import Request, Response
from dspy.utils.callback import BaseCallback
from dspy.utils.exceptions import AdapterParseError, LMError

from agentcast.agents import turns
from agentcast.agents.base import Stopped, ToolError
from agentcast.agents.channel import Channel
from agentcast.agents.context import current
from agentcast.agents.events import (
    AgentEvent,
    LmEnd,
    LmStart,
    MessageEnd,
    MessageRetracted,
    MessageStart,
    NodeEnd,
    NodeError,
    NodeStart,
    Status,
    Token,
    ToolEnd,
    ToolStart,
    Usage,
)
from agentcast.agents.execution import drive
from agentcast.agents.streaming import Outcome, is_async, run_program
from tests.support.lms import Engine, chat, lm_of, pieces

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def collect(channel: Channel, into: list[AgentEvent]) -> None:
    while items := await channel.receive():
        into.extend(item.event for item in items)


async def run(
    program: Any, inputs: dict[str, Any], events: list[AgentEvent], *, channel: Channel | None = None, **options: Any
) -> Outcome:
    """Run as the hub does: driven by hand, with a consumer beside it. `events` is complete also when it fails."""
    channel = channel or Channel("test")
    outcome: Outcome | Exception
    async with anyio.create_task_group() as group:
        group.start_soon(collect, channel, events)
        try:
            outcome = await drive(run_program(program, inputs, channel, **options), channel)
        except Exception as error:  # noqa: BLE001 -- raised below, outside of the group
            outcome = error
        finally:
            channel.close()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def of(kind: type, events: Iterable[AgentEvent]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def messages_of(events: Iterable[AgentEvent]) -> list[tuple[str, str]]:
    """(field, text) of each finished message; asserts that its deltas, none of them empty, are its text."""
    fields, deltas, finished = {}, {}, []
    for event in events:
        match event:
            case MessageStart():
                assert event.message not in fields
                fields[event.message], deltas[event.message] = event.field, ""
            case Token():
                assert event.delta
                deltas[event.message] += event.delta
            case MessageEnd():
                assert deltas.pop(event.message) == event.text
                finished.append((fields[event.message], event.text))
            case MessageRetracted():
                del deltas[event.message]
            case _:
                pass
    assert not deltas, "a message is still open"
    return finished


def shape(events: Iterable[AgentEvent]) -> list[str]:
    """Events in short: what a reader of the stream sees, in order, but for the tokens."""
    return [_line(event) for event in events if not isinstance(event, Token)]


def _line(event: AgentEvent) -> str:
    match event:
        case NodeStart():
            return f"{event.kind} {event.node} {event.span} in {event.parent}"
        case LmStart():
            return f"lm {event.span} in {event.parent}"
        case ToolStart():
            return f"tool {event.tool} {event.args} {event.span} in {event.parent}"
        case ToolEnd():
            return f"tool_end {event.span} {event.result}"
        case MessageStart():
            return f"message {event.field} of {event.span}"
        case MessageEnd():
            return f"message_end {event.text}"
        case _:
            return f"{event.event} {getattr(event, 'span', '')}"


# -- Order, spans, tools -------------------------------------------------------------------------------------------


def agent_reply(prompt: str) -> list[str]:
    """Calls `add`, then finishes, then answers."""
    if "`[[ ## next_thought ## ]]`" not in prompt:
        text = chat(reasoning="it was added", answer="five")
    elif "observation_0" in prompt:
        text = chat(next_thought="done", next_tool_name="finish", next_tool_args="{}")
    else:
        text = chat(next_thought="I add [", next_tool_name="add", next_tool_args='{"a": 2, "b": 3}')
    return pieces(text, 3)


def make_agent(tool: Callable[..., Any]) -> Any:
    return dspy.ReAct("question -> answer", tools=[dspy.Tool(tool, name="add")], max_iters=3)


async def test_everything_arrives_in_order_with_the_right_parents():
    spans: list[str | None] = []

    async def add(a: int, b: int) -> int:
        spans.append(current().span)
        return a + b

    events: list[AgentEvent] = []
    shown = {"next_thought", "reasoning", "answer"}
    with dspy.context(lm=lm_of(agent_reply)):
        outcome = await run(make_agent(add), {"question": "2+3"}, events, messages=shown)
    assert outcome.prediction.answer == "five"
    assert shape(events) == [
        "agent ReAct 1 in None",
        "module react 2 in 1",
        "lm 3 in 2",
        "message next_thought of 2",
        "lm_end 3",
        "message_end I add [",
        "node_end 2",
        "tool add {'a': 2, 'b': 3} 4 in 1",
        "tool_end 4 5",
        "module react 5 in 1",
        "lm 6 in 5",
        "message next_thought of 5",
        "lm_end 6",
        "message_end done",
        "node_end 5",
        "module extract 7 in 1",
        "module extract.predict 8 in 7",
        "lm 9 in 8",
        "message reasoning of 8",
        "message answer of 8",
        "lm_end 9",
        "message_end it was added",
        "message_end five",
        "node_end 8",
        "node_end 7",
        "node_end 1",
    ]
    assert spans == ["4"]
    assert current().span is None
    assert len(of(Token, events)) > 10
    assert all(end.usage == Usage(input_tokens=10, output_tokens=5, cached_tokens=4) for end in of(LmEnd, events))
    assert outcome.usage == Usage(input_tokens=30, output_tokens=15, cached_tokens=12)


async def test_the_first_token_arrives_before_the_lm_has_ended():
    more = anyio.Event()

    async def before_chunk(number: int) -> None:
        if number == 3:
            await more.wait()

    events: list[AgentEvent] = []
    text = pieces(chat(answer="It is so."), 24)
    with dspy.context(lm=lm_of(lambda _: text, before_chunk=before_chunk)):
        channel = Channel()
        async with anyio.create_task_group() as group:
            group.start_soon(run_silently, channel, dspy.Predict("question -> answer"))
            with anyio.fail_after(5):
                while not of(Token, events):
                    events += [item.event for item in await channel.receive()]
            assert not of(LmEnd, events)
            more.set()
            await collect(channel, events)
    assert messages_of(events) == [("answer", "It is so.")]


async def run_silently(channel: Channel, program: Any) -> None:
    await drive(run_program(program, {"question": "?"}, channel), channel)
    channel.close()


async def test_tool_errors_are_reported_without_secrets_and_the_program_goes_on():
    async def add(a: int, b: int) -> int:
        if a == 2:
            raise ToolError("no sums today")
        return a + b

    async def crash(a: int, b: int) -> int:
        raise OSError(2, "No such file", "/secret/path")

    for tool, message in ((add, "no sums today"), (crash, "No such file")):
        events: list[AgentEvent] = []
        with dspy.context(lm=lm_of(agent_reply)):
            outcome = await run(make_agent(tool), {"question": "2+3"}, events)
        (end,) = of(ToolEnd, events)
        assert end.error.code == "tool_error"
        assert end.error.message == message
        assert outcome.prediction.answer == "five"


async def test_only_the_named_fields_are_shown():
    events: list[AgentEvent] = []
    with dspy.context(lm=lm_of(lambda _: chat(reasoning="because", answer="yes"))):
        await run(
            dspy.ChainOfThought("question -> answer"), {"question": "?"}, events, messages=["answer"], name="asker"
        )
    assert messages_of(events) == [("answer", "yes")]
    assert [event.node for event in of(NodeStart, events)] == ["asker", "predict"]


# -- Adapters --------------------------------------------------------------------------------------------------------


class Typed(dspy.Signature):  # type: ignore[misc]
    question: str = dspy.InputField()
    reasoning: str = dspy.OutputField()
    score: int = dspy.OutputField()
    mood: Literal["good", "bad"] = dspy.OutputField()
    notes: str | None = dspy.OutputField()


ANSWERS = {
    "chat": (dspy.ChatAdapter(), chat(reasoning=" so\n[it] is ", score="42", mood="good", notes="")),
    "json": (dspy.JSONAdapter(), json.dumps({"reasoning": "so\n[it] is", "score": 42, "mood": "good", "notes": None})),
    "xml": (dspy.XMLAdapter(), "<reasoning>\nso\n[it] is\n</reasoning><score>42</score><mood>good</mood><notes/>"),
    "default": (None, chat(reasoning="so\n[it] is", score="42", mood="good", notes="")),
    "two steps": (dspy.TwoStepAdapter(dspy.LM("x")), chat(reasoning="so\n[it] is", score="42", mood="good", notes="")),
}


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize("name", list(ANSWERS))
async def test_each_adapter_streams_the_fields_that_the_program_gets(name: str, size: int):
    adapter, text = ANSWERS[name]
    lm = lm_of(lambda _: pieces(text, size))
    if name == "two steps":
        adapter = dspy.TwoStepAdapter(lm)
    events: list[AgentEvent] = []
    with dspy.context(lm=lm, adapter=adapter):
        outcome = await run(dspy.Predict(Typed), {"question": "?"}, events)
    assert outcome.prediction.reasoning == "so\n[it] is"
    assert messages_of(events) == [("reasoning", "so\n[it] is"), ("score", "42"), ("mood", "good")]


@pytest.mark.parametrize("threaded", [False, True])
async def test_lm_calls_that_an_adapter_makes_belong_to_its_predictor(threaded: bool):
    lm = lm_of(lambda _: pieces(chat(answer="extracted"), 3))
    program = dspy.Predict("question -> answer")
    events: list[AgentEvent] = []
    with dspy.context(lm=lm, adapter=dspy.TwoStepAdapter(lm)):
        await run(Threaded(program) if threaded else program, {"question": "?"}, events)
    span = of(NodeStart, events)[-1].span
    assert [start.parent for start in of(LmStart, events)] == [span, span]
    assert len(of(Token, events)) > 3
    assert messages_of(events) == [("answer", "extracted")]


async def test_an_unknown_adapter_gives_whole_fields():
    class Mine(dspy.ChatAdapter):  # type: ignore[misc]
        pass

    events: list[AgentEvent] = []
    with dspy.context(lm=lm_of(lambda _: pieces(chat(answer="whole"), 2)), adapter=Mine()):
        await run(dspy.Predict("question -> answer"), {"question": "?"}, events)
    assert messages_of(events) == [("answer", "whole")]
    assert len(of(Token, events)) == 1


async def test_what_json_repair_reads_otherwise_is_corrected():
    text = '{"answer": "one", "answer": "two"}'
    events: list[AgentEvent] = []
    with dspy.context(lm=lm_of(lambda _: pieces(text, 5)), adapter=dspy.JSONAdapter()):
        outcome = await run(dspy.Predict("question -> answer"), {"question": "?"}, events)
    assert outcome.prediction.answer == "two"
    assert messages_of(events) == [("answer", "two")]
    assert len(of(MessageRetracted, events)) == 1


async def test_what_json_repair_adds_follows_in_the_same_message():
    text = '{"answer": "he said "hi" twice"}'
    events: list[AgentEvent] = []
    with dspy.context(lm=lm_of(lambda _: pieces(text, 5)), adapter=dspy.JSONAdapter()):
        await run(dspy.Predict("question -> answer"), {"question": "?"}, events)
    assert messages_of(events) == [("answer", 'he said "hi" twice')]
    assert not of(MessageRetracted, events)


async def test_long_texts_and_half_characters_stay_whole():
    long = "é\n" * 100_000 + "x"
    events: list[AgentEvent] = []
    text = json.dumps({"reasoning": long, "answer": "half \ud83d!"})
    with dspy.context(lm=lm_of(lambda _: text), adapter=dspy.JSONAdapter()):
        await run(dspy.Predict("question -> reasoning, answer"), {"question": "?"}, events)
    assert messages_of(events) == [("reasoning", long), ("answer", "half ?!")]
    assert not of(MessageRetracted, events)


# -- Nothing streamed ------------------------------------------------------------------------------------------------


async def test_a_cached_answer_arrives_as_start_token_and_end():
    lm = lm_of(lambda _: pieces(chat(reasoning="because", answer="cached"), 2), cache=True)
    question = {"question": f"asked by {threading.get_ident()} at {anyio.current_time()}"}
    program = dspy.ChainOfThought("question -> answer")
    first: list[AgentEvent] = []
    second: list[AgentEvent] = []
    with dspy.context(lm=lm):
        await run(program, question, first)
        outcome = await run(program, question, second)
    assert lm.engine.calls == 1
    assert messages_of(first) == messages_of(second) == [("reasoning", "because"), ("answer", "cached")]
    assert len(of(Token, second)) == 2
    assert outcome.usage is None
    assert [end.usage for end in of(LmEnd, second)] == [None]


async def test_an_engine_without_stream_gives_whole_fields():
    class Complete:
        async def complete(self, request: Request) -> Response:
            return engine.complete(request)

    class SyncComplete:
        def complete(self, request: Request) -> Response:
            return engine.complete(request)

    engine = Engine(lambda _: chat(answer="whole"))
    lm = dspy.LM("test/model", cache=False, engine=SyncComplete(), async_engine=Complete())
    for program in (dspy.Predict("question -> answer"), SyncAsker()):
        events: list[AgentEvent] = []
        with dspy.context(lm=lm):
            outcome = await run(program, {"question": "?"}, events)
        assert messages_of(events) == [("answer", "whole")]
        assert outcome.usage == Usage(input_tokens=10, output_tokens=5, cached_tokens=4)


async def test_a_predictor_that_shows_nothing_keeps_its_fallback_adapter():
    """DSPy does not fall back once it has streamed; what nobody sees is therefore not streamed."""
    replies = iter(["nonsense", '{"answer": "rescued"}'])
    events: list[AgentEvent] = []
    with dspy.context(lm=lm_of(lambda _: next(replies))):
        outcome = await run(dspy.Predict("question -> answer"), {"question": "?"}, events, messages=["other"])
    assert outcome.prediction.answer == "rescued"
    assert messages_of(events) == []


async def test_a_call_that_does_not_stream_leaves_the_next_one_alone():
    class Direct(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ask = dspy.Predict("question -> answer")

        async def aforward(self, question: str) -> Any:
            await dspy.settings.lm.acall(question)
            return await self.ask.acall(question=question)

    events: list[AgentEvent] = []
    with dspy.context(lm=lm_of(lambda _: pieces(chat(answer="streamed"), 2))):
        await run(Direct(), {"question": "?"}, events)
    assert [start.parent for start in of(LmStart, events)] == ["1", "3"]
    assert len(of(Token, events)) > 3


async def test_decision_outputs_which_dspy_cannot_stream_still_work():
    from dspy.experimental import Noul

    fields = {"question": (str, dspy.InputField()), "sure": (Noul, dspy.OutputField(desc="Is it?"))}
    reply = chat(sure='{"noul": 0.75}')
    events: list[AgentEvent] = []
    with dspy.context(lm=lm_of(lambda _: reply)):
        outcome = await run(dspy.Predict(dspy.Signature(fields)), {"question": "?"}, events)
    assert outcome.prediction.sure.probability == 0.75


# -- Failures --------------------------------------------------------------------------------------------------------


async def test_an_answer_that_does_not_parse_is_retracted():
    events: list[AgentEvent] = []
    with (
        dspy.context(lm=lm_of(lambda _: pieces("[[ ## reasoning ## ]]\nbecause\n", 4))),
        pytest.raises(AdapterParseError),
    ):
        await run(dspy.ChainOfThought("question -> answer"), {"question": "?"}, events)
    (start,) = of(MessageStart, events)
    (retracted,) = of(MessageRetracted, events)
    assert retracted.message == start.message
    assert retracted.reason == "the model's answer does not have the form asked for (reasoning, answer)"
    assert [error.error.code for error in of(NodeError, events)] == ["parse_error", "parse_error"]


async def test_another_attempt_of_the_same_predictor_retracts_the_first():
    class Insistent(dspy.Predict):  # type: ignore[misc]
        async def aforward(self, **inputs: Any) -> Any:
            try:
                return await super().aforward(**inputs)
            except AdapterParseError:
                with dspy.context(adapter=dspy.JSONAdapter()):
                    return await super().aforward(**inputs)

    replies = iter([pieces("[[ ## reasoning ## ]]\nfirst\n", 5), pieces('{"reasoning": "second", "answer": "yes"}', 5)])
    events: list[AgentEvent] = []
    with dspy.context(lm=lm_of(lambda _: next(replies))):
        await run(Insistent("question -> reasoning, answer"), {"question": "?"}, events)
    assert messages_of(events) == [("reasoning", "second"), ("answer", "yes")]
    assert [event.reason for event in of(MessageRetracted, events)] == ["another attempt is made"]


async def test_a_failed_lm_call_retracts_what_it_had_streamed_and_keeps_its_text_to_itself():
    def reply(_: str) -> Iterator[str]:
        yield "[[ ## answer ## ]]\nHel"
        raise RuntimeError("key sk-123 refused")

    events: list[AgentEvent] = []
    with dspy.context(lm=lm_of(reply)), pytest.raises(LMError):
        await run(dspy.Predict("question -> answer"), {"question": "?"}, events)
    (end,) = of(LmEnd, events)
    assert end.error.code == "lm_error"
    assert "RuntimeError" in of(MessageRetracted, events)[0].reason
    assert "sk-123" not in str(events)


async def test_the_programs_own_exception_arrives_as_itself_after_its_events():
    class Broken(dspy.Module):  # type: ignore[misc]
        async def aforward(self, **_: Any) -> Any:
            raise KeyError("mine")

    events: list[AgentEvent] = []
    with pytest.raises(KeyError, match="mine"):
        await run(Broken(), {}, events)
    assert [event.event for event in events] == ["node_start", "node_error"]


async def test_a_program_may_return_anything():
    class Plain(dspy.Module):  # type: ignore[misc]
        async def aforward(self, **_: Any) -> Any:
            return 7

    assert await run(Plain(), {}, []) == Outcome(7, None)


class Picky:
    """An emitter that does not like one kind of event."""

    def __init__(self, kind: type, error: BaseException) -> None:
        self.kind = kind
        self.error = error
        self.events: list[AgentEvent] = []

    def nowait(self, event: AgentEvent) -> None:
        if isinstance(event, self.kind):
            raise self.error
        self.events.append(event)

    async def send(self, event: AgentEvent) -> None:
        await anyio.lowlevel.checkpoint()
        self.nowait(event)


@pytest.mark.parametrize("error", [Stopped(), TypeError("bad event")])
@pytest.mark.parametrize("kind", [NodeStart, LmStart, Token, LmEnd, MessageEnd, ToolStart, ToolEnd, NodeEnd])
async def test_neither_stopped_nor_an_error_in_an_event_is_swallowed(kind: type, error: BaseException):
    async def add(a: int, b: int) -> int:
        return a + b

    def add_now(a: int, b: int) -> int:
        return a + b

    for program in (make_agent(add), Threaded(make_agent(add_now))):
        emit = Picky(kind, error)
        lm = lm_of(agent_reply)
        with dspy.context(lm=lm), pytest.raises(type(error)) as caught:
            await run_program(program, {"question": "2+3"}, emit)
        assert caught.value is error
        assert lm.engine.calls <= 1 + (kind is ToolStart) + 2 * (kind is NodeEnd)


async def test_stopped_comes_out_of_task_groups_as_itself():
    class Group(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ask = dspy.Predict("question -> answer")

        async def aforward(self, question: str) -> Any:
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(self.call, question)

        async def call(self, question: str) -> None:
            await self.ask.acall(question=question)

    with dspy.context(lm=lm_of(lambda _: chat(answer="x"))), pytest.raises(Stopped):
        await run_program(Group(), {"question": "?"}, Picky(LmStart, Stopped()))


# -- Cancelling ------------------------------------------------------------------------------------------------------


async def test_a_cancelled_program_stays_cancelled_and_its_spans_are_reported_closed():
    async def before_chunk(number: int) -> None:
        if number == 3:
            scope.cancel()
            await anyio.sleep_forever()

    channel = Channel()
    with dspy.context(lm=lm_of(lambda _: pieces(chat(answer="never whole"), 8), before_chunk=before_chunk)):
        with anyio.CancelScope() as scope:
            await drive(run_program(dspy.Predict("question -> answer"), {"question": "?"}, channel), channel)
        assert scope.cancelled_caught
    assert shape(item.event for item in await channel.receive())[-2:] == ["lm_end 2", "node_error 1"]


async def test_cancelling_wins_over_a_channel_that_is_closed():
    async def before_chunk(number: int) -> None:
        if number == 3:
            channel.close()
            scope.cancel()
            await anyio.sleep_forever()

    channel = Channel()
    with dspy.context(lm=lm_of(lambda _: pieces(chat(answer="never whole"), 8), before_chunk=before_chunk)):
        with anyio.CancelScope() as scope:
            await drive(run_program(dspy.Predict("question -> answer"), {"question": "?"}, channel), channel)
        assert scope.cancelled_caught


async def test_a_predictor_that_is_given_up_after_a_time_is_reported_cancelled_and_the_program_goes_on():
    class Impatient(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ask = dspy.Predict("question -> answer")

        async def aforward(self, question: str) -> Any:
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                await self.ask.acall(question=question)
            return dspy.Prediction(answer="gave up")

    async def before_chunk(number: int) -> None:
        if number == 5:
            scopes[0].cancel()
            await anyio.sleep_forever()

    scopes: list[anyio.CancelScope] = []
    events: list[AgentEvent] = []
    with dspy.context(lm=lm_of(lambda _: pieces(chat(answer="never whole"), 8), before_chunk=before_chunk)):
        outcome = await run(Impatient(), {"question": "?"}, events)
    assert outcome.prediction.answer == "gave up"
    assert [event.reason for event in of(MessageRetracted, events)] == ["cancelled"]
    assert [event.error.code for event in of(NodeError, events)] == ["cancelled"]
    assert shape(events)[-1] == "node_end 1"


# -- Synchronous programs --------------------------------------------------------------------------------------------


class SyncAsker(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        self.ask = dspy.Predict("question -> answer")

    def forward(self, question: str) -> Any:
        return self.ask(question=question)


class Threaded(dspy.Module):  # type: ignore[misc]
    """Makes a synchronous program of one that could do both."""

    def __init__(self, program: Any) -> None:
        self.program = program

    def forward(self, **inputs: Any) -> Any:
        return self.program(**inputs)


async def test_a_synchronous_program_streams_from_a_thread_of_its_own():
    threads = set()

    def reply(_: str) -> Iterable[str]:
        threads.add(threading.current_thread())
        return pieces(chat(answer="from a thread ["), 3)

    events: list[AgentEvent] = []
    with dspy.context(lm=lm_of(reply)):
        outcome = await run(SyncAsker(), {"question": "?"}, events)
    assert outcome.prediction.answer == "from a thread ["
    assert outcome.usage == Usage(input_tokens=10, output_tokens=5, cached_tokens=4)
    assert threading.main_thread() not in threads
    assert messages_of(events) == [("answer", "from a thread [")]
    assert len(of(Token, events)) > 3
    assert [line for line in shape(events) if " in " in line] == [
        "agent SyncAsker 1 in None",
        "module ask 2 in 1",
        "lm 3 in 2",
    ]


async def test_more_synchronous_programs_than_default_threads_run_at_once():
    limit = int(anyio.to_thread.current_default_thread_limiter().total_tokens)
    together = threading.Barrier(limit + 2)

    class Meet(dspy.Module):  # type: ignore[misc]
        def forward(self) -> Any:
            together.wait(10)

    async def meet() -> None:
        await run_program(Meet(), {}, Picky(Status, ValueError()))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            for _ in range(limit + 2):
                group.start_soon(meet)


async def test_a_cancelled_synchronous_program_is_left_at_once_and_stops_at_its_next_callback(
    caplog: pytest.LogCaptureFixture,
):
    asked, answer_now, ended = anyio.Event(), threading.Event(), threading.Event()

    class Stubborn(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ask = dspy.Predict("question -> answer")

        def forward(self, question: str) -> Any:
            try:
                while True:
                    try:
                        self.ask(question=question)
                    except Exception:  # noqa: BLE001, S110 -- a program that never gives up
                        pass
            finally:
                ended.set()

    def reply(_: str) -> Iterable[str]:
        loop.call_soon_threadsafe(asked.set)
        answer_now.wait(10)
        return pieces(chat(answer="late"), 3)

    loop = asyncio.get_running_loop()
    lm = lm_of(reply)
    emit = Picky(Status, ValueError())
    with dspy.context(lm=lm), anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(run_program, Stubborn(), {"question": "?"}, emit)
            await asked.wait()
            group.cancel_scope.cancel()
        emitted = len(emit.events)
        answer_now.set()
        await anyio.to_thread.run_sync(ended.wait, 5)
    assert ended.is_set()
    assert not caplog.records, "it counts as left behind only if it does not end"
    assert lm.engine.calls == 1
    assert not of(Token, emit.events[emitted:])


async def test_threads_of_parallel_are_reported_with_the_right_parents_and_usage():
    class Both(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ask = dspy.Predict("question -> answer")

        def forward(self, question: str) -> Any:
            pairs = [(self.ask, {"question": f"{question}{number}"}) for number in range(4)]
            return dspy.Parallel(num_threads=2, disable_progress_bar=True)(pairs)

    events: list[AgentEvent] = []
    with dspy.context(lm=lm_of(lambda prompt: pieces(chat(answer="about " + prompt[24:26]), 3))):
        outcome = await run(Both(), {"question": "q"}, events)
    assert {prediction.answer for prediction in outcome.prediction} == {text for _, text in messages_of(events)}
    assert len(of(Token, events)) > 8
    assert [event.parent for event in of(NodeStart, events)] == [None, "1", "1", "1", "1"]
    assert outcome.usage == Usage(input_tokens=40, output_tokens=20, cached_tokens=16)


async def test_a_synchronous_lm_call_on_the_loop_streams_too():
    class Blocking(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ask = dspy.Predict("question -> answer")

        async def aforward(self, question: str) -> Any:
            return self.ask(question=question)

    events: list[AgentEvent] = []
    with dspy.context(lm=lm_of(lambda _: pieces(chat(answer="blocked"), 2))):
        await run(Blocking(), {"question": "?"}, events)
    assert messages_of(events) == [("answer", "blocked")]
    assert len(of(Token, events)) > 3


async def test_an_asynchronous_call_on_a_second_loop_in_a_thread_streams():
    class Second(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ask = dspy.Predict("question -> answer")

        def forward(self, question: str) -> Any:
            return asyncio.run(self.ask.acall(question=question))

    events: list[AgentEvent] = []
    with dspy.context(lm=lm_of(lambda _: pieces(chat(answer="second loop"), 2))):
        await run(Second(), {"question": "?"}, events)
    assert messages_of(events) == [("answer", "second loop")]
    assert len(of(Token, events)) > 3


def test_is_async_asks_for_an_aforward_that_belongs_to_the_forward():
    class OnlySync(dspy.Module):  # type: ignore[misc]
        def forward(self) -> None: ...

    class OnlyAsync(dspy.Module):  # type: ignore[misc]
        async def aforward(self) -> None: ...

    class Overridden(dspy.ChainOfThought):  # type: ignore[misc]
        def forward(self, **_: Any) -> None: ...

    patched = dspy.Predict("a -> b")
    patched.forward = lambda **_: None
    assert is_async(OnlyAsync())
    assert is_async(dspy.ReAct("a -> b", tools=[]))
    assert is_async(dspy.Predict("a -> b"))
    assert not any(map(is_async, [OnlySync(), Overridden("a -> b"), patched]))


# -- Isolation and back-pressure -------------------------------------------------------------------------------------


def echo(prompt: str) -> list[str]:
    """Answers with the question, many times, in chunks that end in brackets."""
    question = prompt.split("[[ ## question ## ]]\n")[1].split("\n\n")[0]
    text = chat(reasoning=f"[{question}] [[ " * 5, answer=f"{question}[ [" * 8)
    return pieces(text, 1 + len(question) % 5)


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter])
async def test_runs_of_one_program_never_mix(adapter: type, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns, "SHARE", 60.0)  # nobody waits for a turn, so that chunks are not joined

    def reply(prompt: str) -> list[str]:
        question = prompt.split("question", 1)[1].split("Q")[1].split("Z")[0]
        fields = {"reasoning": f"[{question}] [[ " * 5 + "]", "answer": f"{question}[ [" * 8}
        text = {
            dspy.ChatAdapter: chat(**fields),
            dspy.JSONAdapter: json.dumps(fields),
            dspy.XMLAdapter: "".join(f"<{name}>\n{text}\n</{name}>" for name, text in fields.items()),
        }[adapter]
        return pieces(text, 1 + int(question) % 7)

    async def one(number: int) -> None:
        for _ in range(number % 5):  # staggered: LM calls of different runs interleave chunk by chunk
            await anyio.lowlevel.checkpoint()
        events: list[AgentEvent] = []
        outcome = await run(program, {"question": f"Q{number}Z"}, events)
        texts = messages_of(events)
        assert texts == [("reasoning", outcome.prediction.reasoning), ("answer", outcome.prediction.answer)]
        assert outcome.prediction.answer == (f"{number}[ [" * 8).strip()
        assert not of(MessageRetracted, events), "the deltas were another run's, and had to be corrected"
        assert len(of(Token, events)) > 10
        assert outcome.usage == Usage(input_tokens=10, output_tokens=5, cached_tokens=4)

    program = dspy.ChainOfThought("question -> answer")
    with dspy.context(lm=lm_of(reply), adapter=adapter()):
        async with anyio.create_task_group() as group:
            for number in range(50):
                group.start_soon(one, number)


async def test_one_predictor_twice_at_once_within_a_run_never_mixes():
    class Twins(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ask = dspy.Predict("question -> reasoning, answer")

        async def aforward(self) -> Any:
            answers: dict[int, str] = {}

            async def call(number: int) -> None:
                answers[number] = (await self.ask.acall(question=f"n{number}" * number)).answer

            async with anyio.create_task_group() as group:
                for number in range(1, 21):
                    group.start_soon(call, number)
            return answers

    events: list[AgentEvent] = []
    with dspy.context(lm=lm_of(echo)):
        outcome = await run(Twins(), {}, events)
    assert not of(MessageRetracted, events)
    assert len(of(Token, events)) > 20 * 10
    texts = sorted(text for field, text in messages_of(events) if field == "answer")
    assert texts == sorted(outcome.prediction.values())


async def test_a_slow_consumer_holds_the_gathered_calls_back_and_nothing_else():
    class Many(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ask = dspy.Predict("question -> reasoning, answer")

        async def aforward(self) -> Any:
            async with anyio.create_task_group() as group:
                for number in range(50):
                    group.start_soon(self.call, number)

        async def call(self, number: int) -> None:
            await self.ask.acall(question=f"n{number}")

    channel = Channel(high_water=64)
    events: list[AgentEvent] = []
    deepest = 0
    with dspy.context(lm=lm_of(echo)), anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(run_to_close, Many(), channel)
            while items := await channel.receive():
                events += [item.event for item in items]
                for _ in range(50):  # all that the run can do while nobody receives; the loop turns all the while
                    await anyio.lowlevel.checkpoint()
                deepest = max(deepest, len(channel))
    assert len(messages_of(events)) == 100
    assert 64 <= deepest <= 64 + 50 * 5  # beyond the mark, what each task emits between two waits


class Twice(dspy.Module):  # type: ignore[misc]
    async def aforward(self, n: int) -> int:
        return 2 * n


async def twice(n: int) -> int:
    return 2 * n


CALLS: dict[str, Callable[[], Callable[[int], Any]]] = {
    "modules": lambda: lambda n: Twice().acall(n=n),
    "tools": lambda: lambda n: dspy.Tool(twice).acall(n=n),
    "LMs": lambda: lambda n: dspy.settings.lm.acall(f"n{n}"),
    "predictors": lambda: lambda n: dspy.Predict("question -> answer").acall(question=f"n{n}"),
}


@pytest.mark.parametrize("kind", CALLS)
async def test_fifty_tasks_that_call_again_and_again_are_held_back_between_calls(kind: str):
    class Many(dspy.Module):  # type: ignore[misc]
        async def aforward(self) -> Any:
            async with anyio.create_task_group() as group:
                for _ in range(50):
                    group.start_soon(self.calls)

        async def calls(self) -> None:
            call = CALLS[kind]()
            for number in range(20):
                await call(number)

    channel = Channel()
    count = deepest = 0
    with dspy.context(lm=lm_of(lambda _: chat(answer="x"))), anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(run_to_close, Many(), channel)
            while items := await channel.receive():
                count += len(items)
                await anyio.wait_all_tasks_blocked()
                deepest = max(deepest, len(channel))
    assert count >= 50 * 20 * 2
    assert deepest <= 64 + 50 * 4


async def run_to_close(program: Any, channel: Channel) -> None:
    await drive(run_program(program, {}, channel), channel)
    channel.close()


# -- Good manners ----------------------------------------------------------------------------------------------------


async def test_user_callbacks_and_trackers_keep_working_and_settings_are_left_as_they_were():
    seen: list[str] = []

    class Mine(BaseCallback):  # type: ignore[misc]
        def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            seen.append("lm")

        def on_module_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
            seen.append("module")

    lm = lm_of(lambda _: chat(answer="x"))
    program = dspy.Predict("question -> answer")
    events: list[AgentEvent] = []
    with dspy.context(lm=lm, callbacks=[Mine()], trace=[]), dspy.track_usage() as tracker:
        before = dict(dspy.settings.config)
        await run(program, {"question": "?"}, events)
        assert dict(dspy.settings.config) == before
        assert dspy.settings.trace == []
    assert seen == ["lm", "module"]
    assert tracker.get_total_tokens()["test/model"]["prompt_tokens"] == 10
    assert messages_of(events) == [("answer", "x")]
    assert not lm.history
    assert not program.history


async def test_a_run_inside_a_tool_of_another_run_streams_to_its_own_emitter():
    inner_events: list[AgentEvent] = []

    async def add(a: int, b: int) -> int:
        inner = Picky(Status, ValueError())
        with dspy.context(lm=lm_of(lambda _: pieces(chat(answer="inner"), 2))):
            await run_program(dspy.Predict("question -> answer"), {"question": "?"}, inner)
        inner_events.extend(inner.events)
        return a + b

    events: list[AgentEvent] = []
    with dspy.context(lm=lm_of(agent_reply)):
        outcome = await run(make_agent(add), {"question": "2+3"}, events, messages=["next_thought", "reasoning"])
    assert messages_of(inner_events) == [("answer", "inner")]
    assert len(of(Token, inner_events)) > 1
    assert messages_of(events) == [("next_thought", "I add ["), ("next_thought", "done"), ("reasoning", "it was added")]
    assert outcome.prediction.answer == "five"


async def test_of_several_candidates_the_first_is_streamed():
    replies = iter([pieces(f"[[ ## answer ## ]]\n{text}", 3) for text in ("first", "second")])
    events: list[AgentEvent] = []
    with dspy.context(lm=lm_of(lambda _: next(replies))):
        outcome = await run(dspy.Predict("question -> answer", n=2), {"question": "?"}, events)
    assert [completion.answer for completion in outcome.prediction.completions] == ["first", "second"]
    assert messages_of(events) == [("answer", "first")]
    assert not of(MessageRetracted, events)


@pytest.mark.parametrize("usage", [{"prompt_tokens": None, "cost": 0.5, "is_byok": True}, {"input_tokens": 3}, {}])
def test_usage_reports_of_any_shape(usage: dict[str, Any]):
    from agentcast.agents.streaming.program import Meter

    meter = Meter(lambda: None)
    meter.add_usage("a", usage)
    total = meter.total()
    assert (total is None) == (not usage)
    if total is not None:
        assert total == Usage(input_tokens=usage.get("input_tokens", 0), cost=usage.get("cost"))
