"""What is kept from call to call: found by what it is, dropped with it, bounded, equal in every thread (G8)."""

import asyncio
import functools
import gc
import inspect
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import anyio
import dspy
import jsonschema
import pydantic
import pytest
from dspy.lm15 import StreamDeltaEvent, StreamEndEvent, StreamStartEvent, TextDelta, ToolCallDelta
from dspy.utils.exceptions import LMError

from agentcast.agents import turns
from agentcast.agents._dspy import in_runs, memos
from agentcast.agents._dspy.in_runs import ChunkJoiner
from agentcast.agents._dspy.memos import Recent, call_args, is_valid, text_of, type_adapter, wrapper_model
from agentcast.agents.base import Stopped
from agentcast.agents.events import LmEnd, MessageEnd, MessageRetracted
from agentcast.agents.streaming import run_program
from agentcast.agents.streaming.bridge import Sink
from tests.support.lms import AsyncEngine, Engine, chat, lm_of, pieces

# -- Memos -------------------------------------------------------------------------------------------------------------


def test_recent_keeps_what_was_used_last():
    recent: Recent[int] = Recent(most=3)
    for number in range(3):
        recent.put(number, number * 10)
    assert recent.get(0) == 0
    recent.put(3, 30)
    assert [recent.get(number) for number in range(4)] == [0, None, 20, 30]
    assert len(recent) == 3


def test_types_are_distinguished_by_identity():
    """Equal ones may have their members in another order, which error messages and choices show."""
    one, other = Literal["a", "b"], Literal["b", "a"]
    assert one == other
    assert type_adapter(one).json_schema() == {"enum": ["a", "b"], "type": "string"}
    assert type_adapter(other).json_schema() == {"enum": ["b", "a"], "type": "string"}
    left, right = int | str, str | int
    assert [choice["type"] for choice in type_adapter(left).json_schema()["anyOf"]] == ["integer", "string"]
    assert [choice["type"] for choice in type_adapter(right).json_schema()["anyOf"]] == ["string", "integer"]
    assert type_adapter(left) is type_adapter(left)
    assert wrapper_model(left) is not wrapper_model(right)


def test_a_type_that_is_not_complete_is_not_kept():
    class Later(pydantic.BaseModel):
        other: "NotThereYet"

    with pytest.raises(pydantic.errors.PydanticUserError):
        type_adapter(Later).validate_python({"other": {"n": 1}})

    class NotThereYet(pydantic.BaseModel):
        n: int

    Later.model_rebuild(_types_namespace={"NotThereYet": NotThereYet})
    assert type_adapter(Later).validate_python({"other": {"n": 1}}).other.n == 1


def test_all_memos_are_bounded():
    for number in range(memos.MOST + 50):
        type_adapter(Literal[number])
        wrapper_model(Literal[number])
        is_valid(number, {"const": number})
    for recent in (memos._adapters, memos._wrappers, memos._validators):
        assert len(recent) <= memos.MOST


def test_what_is_kept_of_a_signature_goes_with_it():
    signature = dspy.Signature("question -> answer", "Once.")
    assert text_of(signature, "key", lambda: "text") == "text"
    assert text_of(signature, "key", lambda: "other") == "text"
    gone = weakref.ref(signature)
    assert signature in memos._texts
    count = len(memos._texts)
    del signature
    gc.collect()
    assert gone() is None
    assert len(memos._texts) < count


def test_signatures_that_are_equal_do_not_share_texts():
    one, other = (dspy.Signature("question -> answer", "Same.") for _ in range(2))
    assert [text_of(one, "k", lambda: "1"), text_of(other, "k", lambda: "2")] == ["1", "2"]


def test_threads_find_the_same():
    annotation, signature = dict[str, list[int]], dspy.Signature("question -> answer")
    found: list[Any] = []
    gate = threading.Barrier(8)

    def use() -> None:
        gate.wait(10)
        for number in range(200):
            text = text_of(signature, number % 5, functools.partial(str, number % 5))
            valid = is_valid(number % 7, {"maximum": number % 5})
            found.append((text == str(number % 5), valid == (number % 7 <= number % 5)))
            found.append((type_adapter(annotation).validate_python({"a": ["1"]}) == {"a": [1]}, True))
            found.append((type_adapter(Literal[number]).validate_python(number) == number, True))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 8 * 200 * 3
    assert set(found) == {(True, True)}


@pytest.mark.parametrize(
    ("instance", "schema"),
    [
        (3, {"type": "integer"}),
        ("3", {"type": "integer"}),
        (True, {"type": "integer"}),
        (1.0, {"type": "integer"}),
        ({"a": [1, "x"]}, {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}}),
        (5, {"type": "integer", "maximum": 4, "title": "n"}),
        ("x", {"type": "string", "enum": ["y"]}),
    ],
)
def test_arguments_are_valid_where_jsonschema_takes_them(instance: Any, schema: dict[str, Any]):
    try:
        jsonschema.validate(instance, schema)
        expected = True
    except jsonschema.ValidationError:
        expected = False
    for _ in range(2):
        assert is_valid(instance, schema) is expected


def test_a_schema_that_is_none_is_left_to_jsonschema():
    with pytest.raises(jsonschema.SchemaError):
        is_valid(1, {"type": "no such"})
    assert is_valid(1, {"enum": {1, 2}}) is False  # no JSON: only jsonschema can decide


def plain(self: Any, a: int, b: int = 2, *rest: int, c: int, d: int = 4, **more: int) -> None: ...
def keywords(self: Any, **kwargs: Any) -> None: ...
def both(instance: Any, *args: Any, **kwargs: Any) -> None: ...
def none(self: Any) -> None: ...


@pytest.mark.parametrize("function", [plain, keywords, both, none, dspy.Tool.acall, dspy.ChatAdapter.parse])
@pytest.mark.parametrize(
    ("args", "named"),
    [
        ((0,), {}),
        ((0, 1), {"c": 3}),
        ((0, 1, 5, 6, 7), {"c": 3, "e": 1}),
        ((0,), {"a": 1, "c": 2, "d": 9}),
        ((0, 1), {"a": 1, "c": 3}),
        ((0,), {"x": 1, "kwargs": 2}),
        ((0, "s", "t"), {}),
        ((0,), {"signature": 1, "completion": 2}),
    ],
)
def test_arguments_of_calls_are_bound_as_inspect_does(
    function: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]
):
    try:
        expected = inspect.getcallargs(function, *args, **named)
    except TypeError:
        assert call_args(function, args, named) is None
    else:
        assert call_args(function, args, named) == expected


# -- Private names -----------------------------------------------------------------------------------------------------

RUN = """
import asyncio, importlib, logging, sys
logging.basicConfig(stream=sys.stdout, format="%(name)s %(message)s")
import dspy
from agentcast.agents._dspy import in_runs
from agentcast.agents.streaming import run_program, view
del view._REPLACEMENTS["BaseLM", "acall"]  # so that only the private names count
class Nothing:
    async def send(self, event): pass
    def nowait(self, event): pass
class Look(dspy.Module):
    async def aforward(self):
        look = dspy.Tool(lambda n: n, name="look", arg_types={"n": int}, args={"n": {"type": "integer"}})
        return dspy.Prediction(answer=await look.acall(n=3))
def owner(entry):
    *parents, name = entry.name.split(".")
    found = importlib.import_module(entry.module)
    for parent in parents:
        found = getattr(found, parent)
    return found, name
CHANGE
before = {entry: getattr(*owner(entry), None) for entry in in_runs.IN_RUNS}
for _ in range(2):
    assert asyncio.run(run_program(Look(), {}, Nothing())).prediction.answer == 3
replaced = [entry.name for entry in in_runs.IN_RUNS if getattr(*owner(entry), None) is not before[entry]]
print("replaced", len(replaced), "of", len(in_runs.IN_RUNS))
"""


def first_run(change: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", RUN.replace("CHANGE", change)], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_private_name_is_there_and_the_first_run_replaces_it():
    count = len(in_runs.IN_RUNS)
    assert first_run("") == f"replaced {count} of {count}\n"


def test_names_that_are_missing_are_reported_once_and_dspys_own_stay():
    output = first_run("import dspy.predict.react; del dspy.predict.react.format_error_for_lm")
    count = len(in_runs.IN_RUNS)
    assert output.splitlines()[-1] == f"replaced {count - 1} of {count}"
    assert output.count("agentcast.agents._dspy.in_runs") == 1
    assert "dspy.predict.react.format_error_for_lm" in output
    needed = first_run("import dspy.clients.execution; del dspy.clients.execution.prepare")
    assert needed.splitlines()[-1] == f"replaced {count - 1} of {count}"


def test_in_another_version_of_dspy_nothing_is_replaced():
    output = first_run("dspy.__version__ = '3.9.0'")
    assert output.splitlines()[-1] == f"replaced 0 of {len(in_runs.IN_RUNS)}"
    assert "DSPy 3.9.0 is not as agentcast knows it" in output


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "uuid": (),
    "inspect": (len,),
    "ReAct._format_trajectory": (None, {}),
    "TypeAdapter": (int,),
    "validate": (1, {}),
    "create_model": ("Wrapper",),
    "serialize_for_json": ("x",),
    "format_error_for_lm": (ValueError(),),
    "SignatureMeta._get_fields_with_type": (None, "input"),
    "_get_on_start_handler": (None, 1, len),
    "_get_on_end_handler": (None, 1, len),
    "ListenerBridge": ("m",),
}
"""What those of the names are called with that are no coroutine functions."""


@pytest.mark.parametrize(
    "entry",
    [entry for entry in in_runs.IN_RUNS if entry.name in ARGUMENTS],
    ids=lambda entry: f"{entry.module}.{entry.name}",
)
def test_outside_of_runs_dspys_own_are_called(entry: Any):
    calls: list[str] = []

    class Original:
        uuid4 = getcallargs = lambda self, *args, **named: calls.append("own")

        def __call__(self, *args: Any, **named: Any) -> None:
            calls.append("own")

    made = entry.made(Original(), lambda: False)
    attribute = {"uuid": "uuid4", "inspect": "getcallargs"}.get(entry.name)
    (getattr(made, attribute) if attribute else made)(*ARGUMENTS[entry.name])
    assert calls == ["own"]


# -- Joining chunks ----------------------------------------------------------------------------------------------------


class Reading:
    """What a sink hands texts to; `full` makes all chunks that are no texts."""

    joins = True

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.stopped = False
        self.congested = False
        self.emit = self
        self.flush: Any = None
        self.joiner = ChunkJoiner(self, Sink(self))  # type: ignore[arg-type]

    def here(self) -> Any:
        return self

    def check(self) -> None:
        if self.stopped:
            raise Stopped

    def read(self, chunk: Any) -> Any:
        yield chunk.choices[0].delta.content

    def nowait(self, item: Any) -> None:
        self.items.append(item)

    def fail(self, error: Exception) -> Any:
        raise error

    def chunk(self, event: Any) -> Any:
        return event.type

    def text(self, *texts: str) -> None:
        for text in texts:
            sent = self.joiner.chunk(StreamDeltaEvent(delta=TextDelta(text=text)))
            if sent is not None:
                self.items.append(sent.choices[0].delta.content)


async def turn() -> None:
    await asyncio.sleep(0)


async def test_texts_of_one_turn_of_the_loop_are_joined_and_the_first_goes_at_once():
    reading = Reading()
    reading.text("a", "b", "c")
    assert reading.items == ["a"]
    await turn()
    assert reading.items == ["a", "bc"]
    reading.text("d")
    assert reading.items == ["a", "bc"]
    await turn()
    assert reading.items == ["a", "bc", "d"]


async def test_while_the_run_is_held_back_nothing_is_joined_so_that_each_text_waits():
    reading = Reading()
    reading.text("a", "b")
    reading.congested = True
    reading.text("c", "d")
    assert reading.items == ["a", "bc", "d"]
    await turn()
    assert reading.items == ["a", "bc", "d"]


async def test_what_is_no_text_comes_after_the_texts_before_it():
    reading = Reading()
    reading.text("a", "b")
    assert reading.joiner.chunk(StreamDeltaEvent(delta=ToolCallDelta(input="{}"))) == "delta"
    assert reading.items == ["a", "b"]
    reading.text("c", "d")
    assert reading.joiner.chunk(StreamEndEvent(finish_reason="stop")) == "end"
    assert "".join(reading.items) == "abcd"
    await turn()
    assert "".join(reading.items) == "abcd"


async def test_while_runs_wait_for_a_turn_texts_of_several_turns_are_joined(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns.Turns, "is_crowded", True)
    for seconds, ending in ((60.0, True), (0.0, False)):
        monkeypatch.setattr(in_runs, "CROWDED", seconds)
        reading = Reading()
        reading.text("a", "b")
        await turn()
        reading.text("c")
        assert reading.items == ["a"]
        if ending:
            reading.joiner.chunk(StreamEndEvent(finish_reason="stop"))
        with anyio.fail_after(5):
            while len(reading.items) < 2:
                await turn()
        assert reading.items == ["a", "bc"]


async def test_a_loop_is_crowded_while_somebody_waits_for_a_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns, "SHARE", 0.0)
    assert not turns.this_loops_turns().is_crowded
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(turns.take_turn)
        await turn()
        assert turns.this_loops_turns().is_crowded
    assert not turns.this_loops_turns().is_crowded


async def test_an_engine_that_never_waits_is_given_something_to_wait_for():
    reading = Reading()
    reading.text(*"x" * 1_000)
    assert "".join(reading.items).count("x") >= 1_000 - 64
    assert max(map(len, reading.items)) <= 64


async def test_a_run_that_is_over_stops_the_call():
    reading = Reading()
    reading.text("a", "b")
    reading.stopped = True
    await turn()
    with pytest.raises(Stopped):
        reading.text("c")
    with pytest.raises(Stopped):
        reading.joiner.chunk(StreamEndEvent(finish_reason="stop"))


class Breaking(AsyncEngine):
    """Its first answer breaks off after texts that are joined; they come in the middle of its second one."""

    broken = False
    flushed: asyncio.Event

    async def middle(self, number: int) -> None:
        if number == 2:
            await self.flushed.wait()

    async def stream(self, request: Any) -> Any:
        if not self.broken:
            self.broken = True
            yield StreamStartEvent(model="test")
            for text in (
                "[[ ## answer ## ]]\nfirst answer, long enough",
                " to be shown,",
                " and more, and more, and more",
            ):
                yield StreamDeltaEvent(delta=TextDelta(text=text))
            raise ConnectionError
        async for event in super().stream(request):
            yield event


class Again(dspy.LM):  # type: ignore[misc]
    async def acall(self, *args: Any, **named: Any) -> Any:
        try:
            return await super().acall(*args, **named)
        except LMError:
            return await super().acall(*args, **named)


async def test_texts_of_an_attempt_that_broke_off_are_not_in_the_next_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns.Turns, "is_crowded", True)
    monkeypatch.setattr(in_runs, "CROWDED", 0.01)
    engine = Engine(lambda _: pieces(chat(answer="the second answer, which is longer"), 40))
    breaking = Breaking(engine)
    breaking.before_chunk, breaking.flushed = breaking.middle, asyncio.Event()
    lm = Again("test/model", cache=False, num_retries=0, engine=engine, async_engine=breaking)
    events: list[Any] = []
    send_nowait = Sink.send_nowait

    def flush(sink: Sink, chunk: Any) -> None:
        send_nowait(sink, chunk)
        breaking.flushed.set()

    async def send(event: Any) -> None:
        events.append(event)

    monkeypatch.setattr(Sink, "send_nowait", flush)
    channel = SimpleNamespace(nowait=events.append, send=send, congested=False)
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        await run_program(dspy.Predict("question -> answer"), {"question": "?"}, channel)
    kept = [event.text for event in events if isinstance(event, MessageEnd)]
    void = [event.message for event in events if isinstance(event, MessageRetracted)]
    assert (kept, void) == (["the second answer, which is longer"], ["m1"])


# -- Turns -------------------------------------------------------------------------------------------------------------


async def test_runs_that_are_woken_together_compute_in_turns_in_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns, "SHARE", 0.0)  # a task that computes has used up the turn
    turn_of_loop = 0
    order: list[tuple[int, int]] = []

    async def compute(number: int) -> None:
        await turns.take_turn()
        order.append((number, turn_of_loop))

    async def count() -> None:
        nonlocal turn_of_loop
        while True:
            await asyncio.sleep(0)
            turn_of_loop += 1

    with anyio.fail_after(10):
        async with anyio.create_task_group() as counting:
            counting.start_soon(count)
            async with anyio.create_task_group() as group:
                for number in range(50):
                    group.start_soon(compute, number)
            counting.cancel_scope.cancel()
    numbers, turns_taken = zip(*order, strict=True)
    assert list(numbers) == list(range(50))
    assert len(set(turns_taken)) >= 49  # never two of those who waited in one turn


async def test_runs_whose_lm_calls_end_together_go_on_in_turns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns, "SHARE", 0.0)
    turn_of_loop, waiting = 0, 0
    all_wait, together = anyio.Event(), anyio.Event()
    ends: list[int] = []

    class Noting:
        async def send(self, event: Any) -> None:
            self.nowait(event)

        def nowait(self, event: Any) -> None:
            if isinstance(event, LmEnd):
                ends.append(turn_of_loop)

    async def before_chunk(number: int) -> None:
        nonlocal waiting
        if number == 1:
            waiting += 1
            if waiting == 20:
                all_wait.set()
            await together.wait()

    async def count() -> None:
        nonlocal turn_of_loop
        while True:
            await asyncio.sleep(0)
            turn_of_loop += 1

    program = dspy.Predict("question -> answer")
    lm = lm_of(lambda _: chat(answer="x"), before_chunk=before_chunk)
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()), anyio.fail_after(10):
        async with anyio.create_task_group() as counting:
            counting.start_soon(count)
            async with anyio.create_task_group() as group:
                for _ in range(20):
                    group.start_soon(run_program, program, {"question": "?"}, Noting())
                await all_wait.wait()
                together.set()
            counting.cancel_scope.cancel()
    assert len(ends) == 20
    assert len(set(ends)) >= 19


async def test_a_turn_that_is_cancelled_goes_to_the_next_in_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns, "SHARE", 0.0)
    done: list[int] = []
    scopes = [anyio.CancelScope() for _ in range(10)]

    async def compute(number: int) -> None:
        with scopes[number]:
            await turns.take_turn()
            done.append(number)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            for number in range(10):
                group.start_soon(compute, number)
            await turn()
            for number in (3, 4, 8):
                scopes[number].cancel()
    assert set(done) >= {0, 1, 2, 5, 6, 7, 9}
    assert len(done) <= 9
