"""`streamify`, as a drop-in for `dspy.streamify`: its items, and that none is lost, late, empty or somebody else's.

What `dspy.streamify` does in the same scenarios is in test_streamify_dspy.py.
"""

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import dspy
import pytest
from dspy._vendor.lm15.types import ThinkingDelta
from dspy.clients.engines.streaming import EngineChunk
from dspy.lm15 import TextDelta
from dspy.streaming import StatusMessage, StatusMessageProvider, StreamListener, StreamResponse
from dspy.utils.callback import BaseCallback

from agentcast.agents.context import carrying
from agentcast.agents.streaming import Stream, streamify
from tests.support.lms import chat, lm_of, pieces, question_of

pytestmark = pytest.mark.anyio

START = "Calling tool look..."
END = "Tool calling finished! Querying the LLM with tool calling results..."


async def items_of(stream: Stream[Any]) -> list[Any]:
    with anyio.fail_after(10):
        return [item async for item in stream]


def statuses(items: Iterable[Any]) -> list[str]:
    return [item.message for item in items if isinstance(item, StatusMessage)]


def responses(items: Iterable[Any]) -> list[Any]:
    return [item for item in items if isinstance(item, StreamResponse)]


def texts(items: Iterable[Any]) -> dict[str, str]:
    """Field → joined chunks. Asserts that none but a last one is empty, and that each field has one last one."""
    joined: dict[str, str] = {}
    ended = set()
    for item in responses(items):
        assert item.chunk or item.is_last_chunk
        assert item.signature_field_name not in ended
        joined[item.signature_field_name] = joined.get(item.signature_field_name, "") + item.chunk
        if item.is_last_chunk:
            ended.add(item.signature_field_name)
    assert ended == set(joined)
    return joined


def listening(*fields: str, **options: Any) -> list[Any]:
    return [StreamListener(field, **options) for field in fields]


class Sync(dspy.Module):  # type: ignore[misc]
    """Makes a synchronous program of a function."""

    def __init__(self, function: Callable[..., Any], *parts: Any) -> None:
        self.function = function
        self.ask = dspy.Predict("question -> answer")

    def forward(self, **inputs: Any) -> Any:
        return self.function(self.ask, **inputs)


class Async(dspy.Module):  # type: ignore[misc]
    """Makes an asynchronous program of a coroutine function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.ask = dspy.Predict("question -> answer")

    async def aforward(self, **inputs: Any) -> Any:
        return await self.function(self.ask, **inputs)


# -- Items -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
async def test_without_listeners_the_chunks_of_the_lm_come_as_they_are(is_async: bool):
    text = chat(answer="yes")
    with dspy.context(lm=lm_of(lambda _: pieces(text, 7))):
        program = streamify(dspy.Predict("question -> answer"), is_async_program=is_async)
        items = await items_of(program(question="?"))
    *chunks, prediction = items
    assert all(isinstance(chunk, EngineChunk) for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert prediction.answer == "yes"


@pytest.mark.parametrize("is_async", [False, True])
async def test_listeners_hear_their_fields_in_the_chunks_of_the_lm(is_async: bool):
    answer = ["[[ ## answer", " ## ]]\n\n", "To", " get", " there", "!\n\n[[ ##", " completed", " ## ]]"]
    with dspy.context(lm=lm_of(lambda _: answer)):
        program = streamify(
            dspy.Predict("question -> answer"), stream_listeners=listening("answer"), is_async_program=is_async
        )
        items = await items_of(program(question="?"))
    heard = [(item.predict_name, item.chunk, item.is_last_chunk) for item in responses(items)]
    assert heard == [
        ("self", "To", False),
        ("self", " get", False),
        ("self", " there", False),
        ("self", "!", True),
    ]
    assert isinstance(items[-1], dspy.Prediction)


async def test_the_prediction_can_be_left_out_unless_nothing_was_heard():
    lm = lm_of(lambda _: pieces(chat(answer="yes"), 5), cache=True)
    program = streamify(
        dspy.Predict("question -> answer"),
        stream_listeners=listening("answer"),
        include_final_prediction_in_output_stream=False,
        is_async_program=True,
    )
    with dspy.context(lm=lm):
        question = f"asked at {anyio.current_time()}"
        first = await items_of(program(question=question))
        second = await items_of(program(question=question))  # cached
    assert texts(first) == {"answer": "yes"}
    assert not any(isinstance(item, dspy.Prediction) for item in first)
    assert [item.answer for item in second] == ["yes"]


def reply_in(adapter: Any) -> Callable[[str], list[str]]:
    """Answers with the question, in chunks whose length depends on it, with brackets and quotes at their ends."""

    def reply(prompt: str) -> list[str]:
        question = question_of(prompt)
        fields = {"reasoning": f"[{question}] [[ " * 4 + "]", "answer": f'{question}[ [" \\' * 6 + "["}
        if isinstance(adapter, dspy.JSONAdapter):
            text = json.dumps(fields)
        elif isinstance(adapter, dspy.XMLAdapter):
            text = "".join(f"<{name}>\n{value}\n</{name}>" for name, value in fields.items())
        else:
            text = chat(**fields)
        return pieces(text, 1 + int(question[2:-2]) % 9)

    return reply


@pytest.mark.parametrize(
    "adapter", [dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter()], ids=["chat", "json", "xml"]
)
@pytest.mark.parametrize("is_async", [False, True])
async def test_two_hundred_runs_of_one_program_never_mix_whatever_their_chunks(adapter: Any, is_async: bool):
    """Each is compared with its own prediction; the sizes of chunks and the starts differ."""

    async def one(number: int) -> None:
        for _ in range(number % 7):
            await anyio.lowlevel.checkpoint()
        items = [item async for item in program(question=f"Q-{number}-Z")]
        prediction = items[-1]
        heard = texts(items)
        if isinstance(adapter, dspy.JSONAdapter):  # as with DSPy, the JSON of the value
            heard = {field: json.loads(text) for field, text in heard.items()}
        assert heard == {"reasoning": prediction.reasoning, "answer": prediction.answer}
        assert f"Q-{number}-Z" in prediction.answer
        assert len(responses(items)) > 5
        done.append(number)

    done: list[int] = []
    runs = 200 if is_async else 30
    program = streamify(
        dspy.ChainOfThought("question -> answer"),
        stream_listeners=listening("answer", "reasoning"),
        is_async_program=is_async,
    )
    with dspy.context(lm=lm_of(reply_in(adapter)), adapter=adapter), anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            for number in range(runs):
                group.start_soon(one, number)
    assert len(done) == runs


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_tokens_that_look_like_the_end_of_a_field_are_text(size: int):
    answer = "see [[link]] and [ [[ ## and\n[[ ## not a header\nx ["
    with dspy.context(lm=lm_of(lambda _: pieces(chat(answer=answer), size))):
        program = streamify(dspy.Predict("question -> answer"), None, listening("answer"), True, True)
        items = await items_of(program(question="?"))
    assert texts(items) == {"answer": items[-1].answer} == {"answer": answer}


async def test_text_in_one_chunk_with_the_name_of_its_field_waits_for_the_next_as_with_dspy():
    answer = ['{"answer": "To', " get", ' there!"', "}"]
    with dspy.context(lm=lm_of(lambda _: answer), adapter=dspy.JSONAdapter()):
        program = streamify(dspy.Predict("question -> answer"), None, listening("answer"), is_async_program=True)
        items = await items_of(program(question="?"))
    assert [(item.chunk, item.is_last_chunk) for item in responses(items)] == [('"To get', False), (' there!"', True)]


async def test_of_several_candidates_the_first_is_heard():
    replies = iter([pieces(f"[[ ## answer ## ]]\n{text}", 3) for text in ("first", "second")])
    with dspy.context(lm=lm_of(lambda _: next(replies))):
        program = streamify(dspy.Predict("question -> answer", n=2), None, listening("answer"), is_async_program=True)
        items = await items_of(program(question="?"))
    assert texts(items) == {"answer": "first"}


@pytest.mark.parametrize("listeners", [[], ["question_is_fair"]], ids=["raw", "listeners"])
async def test_decision_outputs_which_dspy_refuses_to_stream_still_work(listeners: list[str]):
    from dspy.experimental import Noul

    fields = {"question": (str, dspy.InputField()), "question_is_fair": (Noul, dspy.OutputField(desc="Is it?"))}
    reply = chat(question_is_fair='{"noul": 0.75}')
    with dspy.context(lm=lm_of(lambda _: reply)):
        program = streamify(dspy.Predict(dspy.Signature(fields)), None, listening(*listeners), is_async_program=True)
        (prediction,) = await items_of(program(question="?"))
    assert prediction.question_is_fair.probability == 0.75


async def test_the_extraction_of_a_two_step_adapter_is_heard():
    lm = lm_of(lambda _: pieces(chat(answer="extracted"), 3))
    with dspy.context(lm=lm, adapter=dspy.TwoStepAdapter(lm)):
        listeners = listening("answer", allow_reuse=True)
        program = streamify(dspy.Predict("question -> answer"), None, listeners, is_async_program=True)
        items = await items_of(program(question="?"))
    assert "".join(item.chunk for item in responses(items)) == "extracted"


async def test_an_empty_field_makes_no_chunk():
    with dspy.context(lm=lm_of(lambda _: pieces(chat(reasoning="", answer="yes"), 4))):
        program = streamify(dspy.ChainOfThought("question -> answer"), None, listening("reasoning", "answer"))
        items = await items_of(program(question="?"))
    assert texts(items) == {"answer": "yes"}


async def test_a_streamified_program_streams_again():
    with dspy.context(lm=lm_of(lambda _: pieces(chat(answer="again"), 3))):
        program = streamify(dspy.Predict("question -> answer"), None, listening("answer"), is_async_program=True)
        for _ in range(3):
            assert texts(await items_of(program(question="?"))) == {"answer": "again"}


async def twice(ask: Any, **inputs: Any) -> Any:
    answers = {}

    async def one(number: int) -> None:
        answers[number] = (await ask.acall(question=f"Q-{number}-Z")).answer

    async with anyio.create_task_group() as group:
        for number in (3, 4):
            group.start_soon(one, number)
    return dspy.Prediction(answers=answers)


async def test_a_predictor_that_is_called_twice_at_once_is_heard_once():
    with dspy.context(lm=lm_of(lambda prompt: pieces(chat(answer=question_of(prompt) * 3), 2))):
        program = streamify(Async(twice), None, listening("answer"), is_async_program=True)
        items = await items_of(program())
    assert texts(items)["answer"] in items[-1].answers.values()


async def test_a_listener_that_may_be_reused_hears_both_calls_and_distinguishes_them():
    with dspy.context(lm=lm_of(lambda prompt: pieces(chat(answer=question_of(prompt) * 3), 2))):
        listeners = listening("answer", allow_reuse=True)
        items = await items_of(streamify(Async(twice), None, listeners, is_async_program=True)())
    calls: dict[str, str] = {}
    for item in responses(items):
        calls[item.call] = calls.get(item.call, "") + item.chunk
    assert sorted(calls.values()) == sorted(items[-1].answers.values())


async def test_custom_chunks_pass_from_wherever_they_are_sent():
    def send(ask: Any, **_: Any) -> Any:
        async def send_it() -> None:
            await dspy.settings.send_stream.send({"mine": 1})

        anyio.from_thread.run(send_it)
        anyio.from_thread.check_cancelled()
        return dspy.Prediction(answer="sent")

    first, last = await items_of(streamify(Sync(send))())
    assert first == {"mine": 1}
    assert last.answer == "sent"


async def test_reasoning_that_the_model_streams_by_itself_is_heard():
    class Thinking(dspy.Signature):  # type: ignore[misc]
        question: str = dspy.InputField()
        reasoning: dspy.Reasoning = dspy.OutputField()
        answer: str = dspy.OutputField()

    thoughts = ["First, ", "then."]
    deltas = [ThinkingDelta(text=thought) for thought in thoughts]
    text = [TextDelta(text=piece, part_index=1) for piece in pieces(chat(reasoning="r", answer="yes"), 6)]
    lm = lm_of(lambda _: [*deltas, *text])
    with dspy.context(lm=lm):
        program = streamify(dspy.Predict(Thinking), None, listening("reasoning", "answer"), is_async_program=True)
        items = await items_of(program(question="?"))
    heard = [item.chunk for item in responses(items) if item.signature_field_name == "reasoning"]
    assert heard[:2] == thoughts
    assert "".join(item.chunk for item in responses(items) if item.signature_field_name == "answer") == "yes"


async def test_a_listener_of_the_users_own_class_is_asked_and_starts_over_for_each_call():
    class Loud(StreamListener):  # type: ignore[misc]
        def receive(self, chunk: Any) -> Any:
            response = super().receive(chunk)
            if response:
                response.chunk = response.chunk.upper()
            return response

    with dspy.context(
        lm=lm_of(lambda _: ["[[ ##", " answer ## ]]\n", "quiet", " please", "\n\n[[ ## completed ## ]]"])
    ):
        program = streamify(dspy.Predict("question -> answer"), None, [Loud("answer")], is_async_program=True)
        for _ in range(2):
            items = await items_of(program(question="?"))
            assert "".join(item.chunk for item in responses(items)) == "QUIET PLEASE"


async def test_an_adapter_that_is_not_known_gives_the_prediction_only():
    class Mine(dspy.ChatAdapter):  # type: ignore[misc]
        pass

    with dspy.context(lm=lm_of(lambda _: pieces(chat(answer="yes"), 4)), adapter=Mine()):
        program = streamify(dspy.Predict("question -> answer"), None, listening("answer"), False, True)
        (prediction,) = await items_of(program(question="?"))
    assert prediction.answer == "yes"


async def test_a_listener_for_a_field_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="nowhere"):
        streamify(
            dspy.Predict("question -> answer"), stream_listeners=[StreamListener("answer"), *listening("nowhere")]
        )


# -- Statuses and callbacks --------------------------------------------------------------------------------------------


def look(thing: str = "it") -> str:
    """Looks."""
    return thing


async def look_up(thing: str = "it") -> str:
    """Looks, asynchronously."""
    await anyio.lowlevel.checkpoint()
    return thing


def make_tool(function: Callable[..., Any] = look) -> Any:
    return dspy.Tool(function, name="look")


class All(StatusMessageProvider):  # type: ignore[misc]
    """Has a message for everything."""

    def lm_start_status_message(self, instance: Any, inputs: Any) -> str:
        return "lm"

    def lm_end_status_message(self, outputs: Any) -> str:
        return "lm end"

    def module_start_status_message(self, instance: Any, inputs: Any) -> str:
        return type(instance).__name__

    def module_end_status_message(self, outputs: Any) -> str:
        return "end"


async def test_listeners_on_one_predictor_do_not_silence_the_others():
    class Two(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.first = dspy.Predict("question -> answer")
            self.second = dspy.Predict("answer -> verdict")

        async def aforward(self, question: str) -> Any:
            return await self.second.acall(answer=(await self.first.acall(question=question)).answer)

    replies = iter([chat(answer="a"), chat(verdict="v")])
    with dspy.context(lm=lm_of(lambda _: pieces(next(replies), 5))):
        items = await items_of(streamify(Two(), All(), listening("answer"), is_async_program=True)(question="?"))
    assert statuses(items) == ["Two", "Predict", "lm", "lm end", "end", "Predict", "lm", "lm end", "end", "end"]
    assert texts(items) == {"answer": "a"}


async def test_a_tool_may_return_what_cannot_be_compared():
    class Array:
        def __eq__(self, other: object) -> Any:
            raise ValueError("the truth value of an array is ambiguous")

        __ne__ = __eq__
        __hash__ = None  # type: ignore[assignment]

    async def look() -> Any:
        await dspy.Tool(Array, name="look", args={}).acall()

    assert statuses(await items_of(streamify(look)())) == [START, END]


async def test_a_predictor_without_a_listener_keeps_its_fallback_adapter():
    """DSPy does not fall back once it has streamed; what nobody hears is therefore not streamed."""

    class Two(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.first = dspy.Predict("question -> answer")
            self.second = dspy.Predict("answer -> verdict")

        async def aforward(self) -> Any:
            return await self.second.acall(answer=(await self.first.acall(question="?")).answer)

    replies = iter([chat(answer="a"), "nonsense", '{"verdict": "rescued"}'])
    with dspy.context(lm=lm_of(lambda _: next(replies))):
        items = await items_of(streamify(Two(), None, listening("answer"), is_async_program=True)())
    assert items[-1].verdict == "rescued"


async def test_callbacks_of_the_call_are_honoured_and_users_own_keep_working():
    class Mine(BaseCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seen: list[str] = []

        def on_tool_start(self, call_id: str, instance: Any, inputs: Any) -> None:
            self.seen.append(instance.name)

    async def call(ask: Any) -> Any:
        await make_tool(look_up).acall()
        return dspy.Prediction()

    early, late = Mine(), Mine()
    with dspy.context(callbacks=[early]):
        program = streamify(Async(call), is_async_program=True)
        with dspy.context(callbacks=[early, late]):
            items = await items_of(program())
    assert statuses(items) == [START, END]
    assert early.seen == late.seen == ["look"]


@pytest.mark.parametrize("foreign", [False, True], ids=["on the loop", "in foreign threads"])
async def test_dspys_own_status_callback_speaks_instead_without_freezing(foreign: bool):
    from dspy.streaming.messages import StatusStreamingCallback

    class Polite(StatusMessageProvider):  # type: ignore[misc]
        def tool_start_status_message(self, instance: Any, inputs: Any) -> str:
            return "please"

    async def call(ask: Any) -> Any:
        if foreign:
            pairs: list[Any] = [(lambda **_: make_tool()(), {})] * 100
            await asyncio.to_thread(dspy.Parallel(num_threads=2, disable_progress_bar=True), pairs)
        else:
            for _ in range(100):  # more than any stream holds
                await make_tool(look_up).acall()
        return dspy.Prediction()

    with dspy.context(callbacks=[StatusStreamingCallback(Polite())]):
        items = await items_of(streamify(Async(call), is_async_program=True)())
    assert sorted(statuses(items)) == sorted(["please", END] * 100)


async def test_an_error_in_a_status_provider_is_logged_and_the_rest_goes_on(caplog: pytest.LogCaptureFixture):
    class Broken(StatusMessageProvider):  # type: ignore[misc]
        def tool_start_status_message(self, instance: Any, inputs: Any) -> str:
            raise ValueError("no words")

    async def call(ask: Any) -> Any:
        await make_tool(look_up).acall()
        return dspy.Prediction(answer="ok")

    items = await items_of(streamify(Async(call), Broken(), is_async_program=True)())
    assert statuses(items) == [END]
    assert items[-1].answer == "ok"


async def test_a_stream_inside_a_tool_of_another_keeps_its_statuses_to_itself():
    inside: list[Any] = []

    async def nested() -> str:
        async def call(ask: Any) -> Any:
            await make_tool(look_up).acall()
            return dspy.Prediction()

        inside.extend(await items_of(streamify(Async(call), is_async_program=True)()))
        return "done"

    async def call(ask: Any) -> Any:
        await dspy.Tool(nested, name="outer").acall()
        return dspy.Prediction()

    items = await items_of(streamify(Async(call), is_async_program=True)())
    assert statuses(inside) == [START, END]
    assert statuses(items) == ["Calling tool outer...", END]


# -- Threads ---------------------------------------------------------------------------------------------------------


def ask_and_look(ask: Any, question: str) -> Any:
    make_tool()()
    return ask(question=question)


def in_parallel(ask: Any, question: str) -> Any:
    pairs = [(ask, {"question": question})] * 2
    dspy.Parallel(num_threads=2, disable_progress_bar=True)([(lambda **_: make_tool()(), {})] * 2)
    return dspy.Parallel(num_threads=2, disable_progress_bar=True)(pairs)[0]


def in_pool(ask: Any, question: str) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(carrying(ask_and_look), ask, question).result()


def in_second_loop(ask: Any, question: str) -> Any:
    async def second() -> Any:
        await make_tool(look_up).acall()
        return await ask.acall(question=question)

    return asyncio.run(second())


async def in_asyncio_thread(ask: Any, question: str) -> Any:
    return await asyncio.to_thread(ask_and_look, ask, question)


async def in_anyio_thread(ask: Any, question: str) -> Any:
    return await anyio.to_thread.run_sync(ask_and_look, ask, question)


async def in_parallel_on_the_loop(ask: Any, question: str) -> Any:
    return in_parallel(ask, question)


async def in_pool_from_the_loop(ask: Any, question: str) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return await asyncio.wrap_future(pool.submit(carrying(ask_and_look), ask, question))


async def on_the_loop(ask: Any, question: str) -> Any:
    return ask_and_look(ask, question)


async def in_second_loop_from_the_loop(ask: Any, question: str) -> Any:
    return await asyncio.to_thread(in_second_loop, ask, question)


PLACES = [
    ask_and_look, in_parallel, in_pool, in_second_loop,
    in_asyncio_thread, in_anyio_thread, in_parallel_on_the_loop, in_pool_from_the_loop, on_the_loop,
    in_second_loop_from_the_loop,
]  # fmt: skip


@pytest.mark.parametrize("raw", [False, True], ids=["listeners", "raw"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
async def test_tokens_and_statuses_come_from_wherever_the_program_works(place: Callable[..., Any], raw: bool):
    is_async = asyncio.iscoroutinefunction(place)
    program = streamify(
        Async(place) if is_async else Sync(place), None, [] if raw else listening("answer"), is_async_program=is_async
    )
    long = "from afar " * 40 + "!"  # more chunks than a channel holds
    with dspy.context(lm=lm_of(lambda _: pieces(chat(answer=long), 3))):
        items = await items_of(program(question="?"))
    assert items[-1].answer == long
    calls = 2 if "parallel" in place.__name__ else 1
    assert sorted(statuses(items)) == sorted([START, END] * calls)
    if raw:
        chunks = [item for item in items if isinstance(item, EngineChunk)]
        assert len("".join(chunk.choices[0].delta.content or "" for chunk in chunks)) == len(chat(answer=long)) * calls
    else:
        assert texts(items) == {"answer": long}
        assert len(responses(items)) > 100


async def test_a_synchronous_programs_asynchronous_tool_is_reported_at_once_while_the_loop_is_idle():
    """The tool waits until its own status has been received, so a late one would be none."""
    received = threading.Event()

    async def wait_for_it() -> str:
        assert await anyio.to_thread.run_sync(received.wait, 5)
        inner = dspy.Predict("question -> answer")
        return str((await inner.acall(question="?")).answer)

    def call(ask: Any) -> Any:
        with dspy.context(allow_tool_async_sync_conversion=True):
            return dspy.Prediction(answer=dspy.Tool(wait_for_it, name="look")())

    with dspy.context(lm=lm_of(lambda _: chat(answer="done"))):
        stream = streamify(Sync(call))()
        with anyio.fail_after(5):
            first = await anext(stream)
            received.set()
            *_, last = [item async for item in stream]
    assert first == StatusMessage(START)
    assert last.answer == "done"


# -- Ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
async def test_the_programs_own_exception_comes_as_itself_after_all_items(is_async: bool):
    class Mine(Exception):
        pass

    async def fail(ask: Any) -> Any:
        await make_tool(look_up).acall()
        raise Mine("yes")

    def fail_now(ask: Any) -> Any:
        make_tool()()
        raise Mine("yes")

    program = streamify(Async(fail) if is_async else Sync(fail_now), is_async_program=is_async)
    items: list[Any] = []

    async def consume() -> None:
        async for item in stream:
            items.append(item)
            await anyio.wait_all_tasks_blocked()  # in the middle of something as the program fails

    stream = program()
    with pytest.raises(Mine, match="yes"):
        await consume()
    assert statuses(items) == [START, END]
    assert [item async for item in stream] == []


@pytest.mark.parametrize("value", [7, None, "text", [1, 2]])
@pytest.mark.parametrize("is_async", [False, True])
async def test_a_program_that_returns_something_else_ends(is_async: bool, value: Any):
    async def give(ask: Any) -> Any:
        return value

    program = Async(give) if is_async else Sync(lambda ask: value)
    for listeners in ([], listening("answer")):
        stream = streamify(program, None, listeners, False, is_async_program=is_async)()
        assert await items_of(stream) == [value]


async def test_a_coroutine_function_is_a_program_too():
    async def answer(question: str) -> Any:
        await make_tool(look_up).acall()
        return dspy.Prediction(answer=question)

    items = await items_of(streamify(answer)("why"))
    assert statuses(items) == [START, END]
    assert items[-1].answer == "why"


# -- For code without an event loop ------------------------------------------------------------------------------------


def threads() -> set[threading.Thread]:
    return set(threading.enumerate())


def assert_none_is_left(before: set[threading.Thread]) -> None:
    for thread in threads() - before:
        thread.join(5)
        assert not thread.is_alive(), thread


def test_synchronous_streaming_gives_the_same_items():
    before = threads()
    with dspy.context(lm=lm_of(lambda _: pieces(chat(answer="blocking"), 4))):
        program = streamify(
            Sync(lambda ask, question: ask_and_look(ask, question)), None, listening("answer"), async_streaming=False
        )
        for _ in range(2):
            items = list(program(question="?"))
            assert statuses(items) == [START, END]
            assert texts(items) == {"answer": "blocking"}
            assert items[-1].answer == "blocking"
    assert_none_is_left(before)


def test_synchronous_streaming_raises_what_the_program_raised():
    def fail(ask: Any) -> Any:
        make_tool()()
        raise KeyError("mine")

    stream = streamify(Sync(fail), async_streaming=False)()
    items = [next(stream), next(stream)]
    assert statuses(items) == [START, END]
    with pytest.raises(KeyError, match="mine"):
        next(stream)
    assert list(stream) == []


@pytest.mark.parametrize("end", ["close", "drop", "with", "never started"])
def test_a_synchronous_stream_that_is_left_stops_its_program_and_its_thread(end: str):
    before = threads()
    lm = lm_of(lambda _: pieces(chat(answer="x" * 10_000), 1))
    with dspy.context(lm=lm):
        stream = streamify(dspy.Predict("question -> answer"), async_streaming=False)(question="?")
        if end == "with":
            with stream:
                next(stream)
        elif end != "never started":
            next(stream)
        if end == "close":
            stream.close()
            assert list(stream) == []
        if end in ("drop", "never started"):
            del stream
    assert_none_is_left(before)
    assert lm.engine.calls == (end != "never started")


# -- The page about it -------------------------------------------------------------------------------------------------


def test_the_example_in_the_docs_runs(capsys: pytest.CaptureFixture[str]):
    page = (Path(__file__).parents[2] / "docs" / "streaming-dspy.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(example, "streaming-dspy.md", "exec"), {"__name__": "example"})  # noqa: S102 -- our own page
    assert "Calling tool search..." in (printed := capsys.readouterr().out)
    assert "answer='42'" in printed
