"""Whatever a tool returns, or ends with, the run goes on, and model and watchers see the same of it."""

import asyncio
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime
import decimal
import enum
import functools
import math
import pathlib
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import anyio
import dspy
import orjson
import pytest
from pydantic import BaseModel

from agentcast.agents.base import ToolError
from agentcast.agents.context import within
from agentcast.agents.events import NodeError, ToolEnd
from agentcast.agents.react import ReAct
from agentcast.agents.streaming import run_program
from agentcast.agents.values import plain
from tests.support.lms import chat, lm_of
from tests.unit.test_react import ANSWER, FINISH, Heard, Script, called, outside, play, script_outside, turn

pytestmark = pytest.mark.anyio


@dataclasses.dataclass
class Point:
    x: int
    y: Any = None


class Model(BaseModel):
    name: str
    more: Any = None


class Pair(collections.namedtuple("Pair", "left right")):
    __slots__ = ()


class Colour(enum.Enum):
    RED = "red"


class Shade(str, enum.Enum):  # noqa: UP042 -- its `str` is not its value
    DARK = "dark"


class Money:
    def __init__(self, amount: int) -> None:
        self.amount = amount

    def __str__(self) -> str:
        return f"{self.amount} EUR"


class Table:
    """As numpy's and pandas' objects: no JSON, a text of its own, and no truth."""

    def __repr__(self) -> str:
        return "   a\n0  1"

    def __bool__(self) -> bool:
        raise ValueError("The truth value of a Table is ambiguous")

    def __eq__(self, other: object) -> bool:
        raise ValueError("ambiguous")

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        raise TypeError("len() of unsized object")


class Thing:
    pass


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class BrokenMapping(Mapping[str, int]):
    def __getitem__(self, key: str) -> int:
        raise RuntimeError("no item")

    def __iter__(self) -> Iterator[str]:
        yield "a"

    def __len__(self) -> int:
        return 1


# A dataclass of which a field may not be set.
Partly = dataclasses.make_dataclass("Partly", [("x", int)], slots=True)


def looped_list() -> list[Any]:
    items: list[Any] = ["a"]
    items.append(items)
    return items


def looped_model() -> Model:
    model = Model(name="a")
    model.more = model
    return model


def generated() -> Iterator[int]:
    yield from (1, 2)


def endless() -> Iterator[int]:
    while True:
        yield 1


def failing() -> Iterator[int]:
    yield 1
    raise ToolError("no more")


Case = tuple[Callable[[], Any], Any, str | None]
"""What the tool returns; the observation in the trajectory; its text in the prompt, or None: that of DSPy."""

RESULTS: dict[str, Case] = {
    "text": (lambda: "a\nb", "a\nb", None),
    "none": (lambda: None, None, None),
    "true": (lambda: True, True, None),
    "number": (lambda: 1.5, 1.5, None),
    "not a number": (lambda: math.nan, "nan", None),
    "huge number": (lambda: 10**400, str(10**400), None),
    "tuple": (lambda: (1, 2), (1, 2), None),
    "tuple of texts": (lambda: ("a", "b"), ("a", "b"), None),
    "named tuple": (lambda: Pair(1, "b"), (1, "b"), None),
    "set": (lambda: {1, 2}, (1, 2), None),
    "frozen set": (lambda: frozenset({"a"}), ("a",), None),
    "deque": (lambda: collections.deque([1, 2]), (1, 2), None),
    "list of texts": (lambda: ["a", "b\nc"], ["a", "b\nc"], None),
    "list of objects": (lambda: [{"a": 1}, {"b": [2]}], [{"a": 1}, {"b": [2]}], None),
    "empty list": (list, [], None),
    "list of numbers": (lambda: [1, 2], [1, 2], "[1, 2]"),
    "list of one": (lambda: [1], [1], "[1]"),
    "mixed list": (lambda: ["a", 1, None], ["a", 1, None], '["a", 1, null]'),
    "list of an object with odd keys": (lambda: [{"\n": 1}], [{"\n": 1}], '[{"\\n": 1}]'),
    "nested": (lambda: {"a": [(1, {2})], "b": None}, {"a": [[1, [2]]], "b": None}, None),
    "dataclass": (lambda: Point(1, [2]), {"x": 1, "y": [2]}, None),
    "model": (lambda: Model(name="a", more={"b": 1}), {"name": "a", "more": {"b": 1}}, None),
    "enum": (lambda: Colour.RED, "red", None),
    "keys": (
        lambda: {Colour.RED: 1, Shade.DARK: 2, 3: 3, (4, "b"): 4},
        {"red": 1, "dark": 2, "3": 3, "4,b": 4},
        None,
    ),
    "decimal": (lambda: decimal.Decimal("1.50"), "1.50", None),
    "uuid": (lambda: uuid.UUID(int=1), str(uuid.UUID(int=1)), None),
    "date": (lambda: datetime.date(2024, 2, 29), "2024-02-29", None),
    "object with a text": (lambda: Money(3), "3 EUR", None),
    "objects with a text": (lambda: {"price": Money(3)}, {"price": "3 EUR"}, None),
    "model of objects": (lambda: Model(name="a", more=Money(3)), {"name": "a", "more": "3 EUR"}, None),
    "table": (Table, "   a\n0  1", None),
    "bytes": (lambda: "naïve".encode(), "naïve", None),
    # Better than DSPy, which shows addresses and paths, or fails.
    "other bytes": (lambda: b"\xff\x00", "<2 bytes>", "<2 bytes>"),
    "path": (lambda: pathlib.Path("/srv/secret"), "<PosixPath>", "<PosixPath>"),
    "object": (Thing, "<Thing>", "<Thing>"),
    "class": (lambda: Thing, "<type>", "<type>"),
    "function": (lambda: looped_list, "<function>", "<function>"),
    "module": (lambda: dataclasses, "<module>", "<module>"),
    "exception": (lambda: ValueError("no such month"), "no such month", "no such month"),
    "exceptions": (lambda: [KeyError("/srv")], ["KeyError"], "«KeyError»"),
    "object without a text": (Broken, "<Broken>", "<Broken>"),
    "mapping that fails": (BrokenMapping, "<BrokenMapping>", "<BrokenMapping>"),
    "unset dataclass": (lambda: object.__new__(Partly), "<Partly>", "<Partly>"),
    "model in itself": (looped_model, "<Model>", "<Model>"),
    "generator": (generated, [1, 2], "[1, 2]"),
    "map": (lambda: map(str, (1, 2)), ["1", "2"], "[1] «1»\n[2] «2»"),
}


def observed(prompt: str) -> str:
    """The text of the first observation in a prompt."""
    return (
        prompt.partition("[[ ## observation_0 ## ]]\n")[2]
        .partition("\n\n[[ ## thought_1")[0]
        .partition("\n\nRespond")[0]
    )


def tool_of(make: Callable[[], Any], kind: str) -> Any:
    def look() -> Any:
        return make()

    async def alook() -> Any:
        await anyio.lowlevel.checkpoint()
        return make()

    return dspy.Tool(look if kind == "sync" else alook, name="look")


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("name", RESULTS)
async def test_whatever_a_tool_returns_is_an_observation(name: str, kind: str):
    make, expected, text = RESULTS[name]
    agent = ReAct("question -> answer", [tool_of(make, kind)])
    prediction, heard, script = await play(agent, turn("t", "look", {}), FINISH)
    observation = prediction.trajectory["observation_0"]
    assert (type(observation), observation) == (type(expected), expected)
    assert prediction.answer == "a"
    (end,) = heard.of(ToolEnd)
    assert (end.error, end.result) == (None, plain(expected))
    assert observed(script.prompts[1]) == (dspys_text(make()) if text is None else text)


def dspys_text(result: Any) -> str:
    stock = dspy.ReAct("question -> answer", [tool_of(lambda: None, "sync")])
    with dspy.context(adapter=dspy.ChatAdapter()):
        shown: str = stock._format_trajectory({"observation_0": result})
    return shown.partition("\n")[2]


@pytest.mark.parametrize(
    "adapter",
    [dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter(), dspy.TwoStepAdapter(dspy.LM("x/y"))],
    ids=type,
)
def test_trajectory_is_formatted_by_every_adapter(adapter: Any):
    ours, theirs = ReAct("question -> answer", [generated]), dspy.ReAct("question -> answer", [generated])
    with dspy.context(adapter=adapter):
        for _, observation, _ in RESULTS.values():
            trajectory = {"thought_0": "t", "tool_args_0": {}, "observation_0": observation}
            try:
                expected = theirs._format_trajectory(trajectory)
            except (TypeError, AttributeError):
                assert orjson.dumps(observation).decode() in ours._format_trajectory(trajectory).replace(
                    ", ", ","
                ).replace(": ", ":")
            else:
                assert ours._format_trajectory(trajectory) == expected


def test_results_are_the_same_from_sync_code():
    for name, (make, expected, _) in RESULTS.items():
        assert called(tool_of(make, "sync"), {}) == expected, name


async def test_results_are_the_same_from_sync_code_in_a_run():
    for make, expected, _ in (RESULTS["list of numbers"], RESULTS["path"]):
        agent = ReAct("question -> answer", [tool_of(make, "sync")])

        class Sync(dspy.Module):  # type: ignore[misc]
            def forward(self, question: str, agent: Any = agent) -> Any:
                return agent(question=question)

        heard = Heard()
        with script_outside(agent.tools["look"], {}):
            outcome = await run_program(Sync(), {"question": "q"}, heard)
        assert outcome.prediction.trajectory["observation_0"] == expected
        assert [end.result for end in heard.of(ToolEnd)] == [plain(expected)]


async def test_list_that_contains_itself_and_endless_generator_are_bounded():
    for make in (looped_list, endless, lambda: [endless()], lambda: {"a": looped_list()}):
        agent = ReAct("question -> answer", [tool_of(make, "sync")])
        prediction, _, script = await play(agent, turn("t", "look", {}), FINISH)
        assert prediction.answer == "a"
        assert max(map(len, script.prompts)) < 80_000


def test_results_of_any_tool_fit_into_an_event():
    for make, _, _ in (*RESULTS.values(), (looped_list, None, None), (endless, None, None)):
        event = ToolEnd(span="1", tool="look", duration=0, result=make())
        assert len(orjson.dumps(event.wire())) < 70_000


async def test_any_other_module_goes_on_after_any_result():
    """As far as DSPy can show it: the events never end the run."""
    for make in (looped_list, BrokenMapping, Broken, lambda: object.__new__(Partly), lambda: [Table()]):

        class Calls(dspy.Module):  # type: ignore[misc]
            def __init__(self, make: Any = make) -> None:
                super().__init__()
                self.tool = tool_of(make, "sync")

            async def aforward(self) -> Any:
                await self.tool.acall()
                return dspy.Prediction(answer="a")

        heard = Heard()
        assert (await run_program(Calls(), {}, heard)).prediction.answer == "a"
        assert len(heard.of(ToolEnd)) == 1


LOOPS = ("ReAct", "ReActV2")


def looping(loop: str, tool: Any) -> tuple[Any, list[str]]:
    """One of DSPy's own loops with `tool`, and what the model says so that it is called once."""
    if loop == "ReAct":
        return dspy.ReAct("question -> answer", [tool]), [turn("t", tool.name, {}), FINISH]
    calls = [{"name": tool.name, "args": {}}, {"name": "submit", "args": {"answer": "a"}}]
    replies = [chat(next_thought="t", tool_calls=orjson.dumps({"tool_calls": [call]}).decode()) for call in calls]
    return dspy.ReActV2("question -> answer", [tool]), replies


@pytest.mark.parametrize("name", [*RESULTS, "list in itself", "endless"])
@pytest.mark.parametrize("loop", LOOPS)
async def test_dspys_own_loops_go_on_after_any_result(loop: str, name: str):
    make: Any = {"list in itself": looped_list, "endless": endless}.get(name) or RESULTS[name][0]
    agent, replies = looping(loop, tool_of(make, "sync"))
    prediction, heard, _ = await play(agent, *replies)
    assert prediction.answer == "a"
    assert [end.error for end in heard.of(ToolEnd) if end.tool == "look"] == [None]


class OwnTool(dspy.Tool):  # type: ignore[misc]
    """A user's own kind of tool."""


@pytest.mark.parametrize(
    ("loop", "kind", "name"), [*((loop, OwnTool, "look") for loop in LOOPS), ("ReAct", dspy.Tool, "submit")]
)
async def test_dspys_own_loops_go_on_whatever_the_tool_is_called(loop: str, kind: Any, name: str):
    """`submit` ends a ReActV2, and is any other tool to a ReAct."""
    agent, replies = looping(loop, kind(lambda: [1, 2], name=name, desc="", args={}))
    prediction, _, script = await play(agent, *replies)
    assert prediction.answer == "a"
    assert "[1, 2]" in script.prompts[1]


@pytest.mark.parametrize("how", ["called", "awaited"])
@pytest.mark.parametrize("loop", [*LOOPS, "our own"])
async def test_a_tool_that_calls_another_gets_what_that_returns(loop: str, how: str):
    """Also if that is a tool of the same loop."""
    numbers = dspy.Tool(lambda: [1, 2], name="numbers", desc="", args={})

    async def awaiting() -> int:
        return sum(await numbers.acall())

    def calling() -> int:
        return sum(numbers())

    adding = dspy.Tool(awaiting if how == "awaited" else calling, name="add", desc="", args={})
    agent, replies = looping("ReAct" if loop == "our own" else loop, adding)
    agent = ReAct("question -> answer", [adding, numbers]) if loop == "our own" else agent
    agent.tools.setdefault("numbers", numbers)
    _, heard, _ = await play(agent, *replies)
    assert [end.result for end in heard.of(ToolEnd) if end.tool in ("add", "numbers")] == [[1, 2], 3]


async def agenerated() -> AsyncIterator[int]:
    yield 1
    yield 2


@pytest.mark.parametrize("make", [generated, agenerated])
@pytest.mark.parametrize("loop", LOOPS)
async def test_dspys_own_loops_read_generators(loop: str, make: Any):
    """On the thread of the tool, since each item may take its time."""
    threads: list[threading.Thread] = []

    def noted() -> Any:
        threads.append(threading.current_thread())
        yield from generated()

    agent, replies = looping(loop, dspy.Tool(noted if make is generated else make, name="look", desc="", args={}))
    _, heard, script = await play(agent, *replies)
    assert [end.result for end in heard.of(ToolEnd) if end.tool == "look"] == [[1, 2]]
    assert "[1, 2]" in script.prompts[1]
    assert threading.current_thread() not in threads


async def test_generators_may_be_asynchronous_and_may_fail():
    for tool, expected in ((agenerated, [1, 2]), (failing, "Tool failing failed: no more")):
        assert await outside(tool, {}) == expected


@pytest.mark.filterwarnings("ignore:Implementing custom LMs:DeprecationWarning")
async def test_image_is_shown_to_the_model_as_an_image_and_to_people_as_data():
    image = dspy.Image("http://127.0.0.1/a.png")
    for result, shown in ((image, {"url": image.url}), ([image, "a cat"], [{"url": image.url}, "a cat"])):
        agent = ReAct("question -> answer", [tool_of(functools.partial(copy.copy, result), "sync")])
        parts: list[Any] = []

        def reply(messages: Any, parts: list[Any] = parts) -> str:
            parts.append(messages)
            return (
                turn("t", "look", {})
                if len(parts) == 1
                else FINISH
                if len(parts) == 2
                else chat(reasoning="r", answer="a")
            )

        heard = Heard()
        with dspy.context(lm=Messages(reply), adapter=dspy.ChatAdapter()), within(emitter=heard):
            await run_program(agent, {"question": "q"}, heard)
        assert {"type": "image_url", "image_url": {"url": image.url}} in parts[1][-1]["content"]
        assert heard.of(ToolEnd)[0].result == shown


class Messages(dspy.BaseLM):  # type: ignore[misc]
    """A language model of the old kind, which is given OpenAI's messages."""

    def __init__(self, reply: Callable[[Any], str]) -> None:
        super().__init__("messages", cache=False)
        self.reply = reply

    async def aforward(self, prompt: Any = None, messages: Any = None, **options: Any) -> Any:
        message = SimpleNamespace(content=self.reply(messages), tool_calls=None)
        return SimpleNamespace(choices=[SimpleNamespace(message=message)], usage={}, model="messages")


# -- Tools that cancel themselves ----------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[], Any]:
    def look() -> Any:
        raise error

    return look


async def cancels_inner_task() -> Any:
    task = asyncio.create_task(anyio.sleep_forever())  # noqa: TID251 -- as a library might
    await anyio.lowlevel.checkpoint()
    task.cancel()
    await task


async def waits_for_cancelled_future() -> Any:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


async def times_out_inside() -> Any:
    with anyio.fail_after(0):
        await anyio.sleep_forever()


async def leaks_its_own_scope() -> Any:
    """As a library does whose timeout forgets to say that it was one."""
    caught: list[BaseException] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await anyio.sleep_forever()
        except asyncio.CancelledError as error:
            caught.append(error)
            raise
    raise caught[0]


async def cancelled_in_a_group() -> Any:
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep_forever)
        raise asyncio.CancelledError


async def raises_cancelled() -> Any:
    raise asyncio.CancelledError


def exits() -> Any:
    sys.exit(2)


SELF_CANCELLING: dict[str, tuple[Callable[[], Any], str]] = {
    "on the loop": (raises_cancelled, "something that it waited for was cancelled"),
    "in a thread": (raising(asyncio.CancelledError()), "something that it waited for was cancelled"),
    "an inner task": (cancels_inner_task, "something that it waited for was cancelled"),
    "a future": (waits_for_cancelled_future, "something that it waited for was cancelled"),
    "a scope": (leaks_its_own_scope, "something that it waited for was cancelled"),
    "a group": (cancelled_in_a_group, "something that it waited for was cancelled"),
    "a future of a pool": (raising(concurrent.futures.CancelledError()), "CancelledError"),
    "a timeout": (times_out_inside, "TimeoutError"),
    "exit": (exits, "SystemExit"),
}


@pytest.mark.parametrize("name", SELF_CANCELLING)
async def test_tool_that_cancels_itself_has_failed_and_the_run_goes_on(name: str):
    function, text = SELF_CANCELLING[name]
    agent = ReAct("question -> answer", [dspy.Tool(function, name="look")])
    with anyio.fail_after(10):
        prediction, heard, _ = await play(agent, turn("t", "look", {}), FINISH)
    assert prediction.trajectory["observation_0"] == f"Tool look failed: {text}"
    (end,) = heard.of(ToolEnd)
    assert (end.error.code, end.error.message) == ("tool_error", text)
    assert prediction.answer == "a"


@pytest.mark.parametrize("name", SELF_CANCELLING)
def test_tool_that_cancels_itself_has_failed_in_sync_code_too(name: str):
    function, text = SELF_CANCELLING[name]
    with dspy.context(allow_tool_async_sync_conversion=True):
        assert called(dspy.Tool(function, name="look"), {}) == f"Tool look failed: {text}"


@pytest.mark.parametrize("name", SELF_CANCELLING)
@pytest.mark.parametrize("how", ["awaited", "in a thread"])
async def test_tool_of_any_other_module_that_cancels_itself_has_failed(name: str, how: str):
    function, text = SELF_CANCELLING[name]
    tool = dspy.Tool(function, name="look")

    class Sync(dspy.Module):  # type: ignore[misc]
        def forward(self, question: str) -> Any:
            try:
                return tool()
            except Exception as error:  # noqa: BLE001 -- as DSPy's own modules
                return dspy.Prediction(answer=str(error) or type(error).__name__)

    heard = Heard()
    lm = Script(turn("t", "look", {}), FINISH, ANSWER).lm()
    options = {"lm": lm, "adapter": dspy.ChatAdapter(), "allow_tool_async_sync_conversion": True}
    with anyio.fail_after(10), dspy.context(**options):
        program = Sync() if how == "in a thread" else dspy.ReAct("question -> answer", [tool])
        outcome = await run_program(program, {"question": "q"}, heard)
    assert outcome.prediction.answer == ("a" if how == "awaited" else text)
    (end,) = heard.of(ToolEnd)
    assert (end.error.code, end.error.message) == ("tool_error", text)


@pytest.mark.parametrize("cancel", ["scope", "task", "timeout"])
async def test_run_that_is_cancelled_in_a_tool_is_cancelled(cancel: str):
    started, cleaned = anyio.Event(), anyio.Event()
    ended: list[Any] = []

    async def look() -> str:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            cleaned.set()
        return ""

    async def run() -> None:
        ended.append(await play(ReAct("question -> answer", [look]), turn("t", "look", {}), FINISH))

    async def run_until_a_timeout() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None) as limit, anyio.create_task_group() as group:
                group.start_soon(run)
                await started.wait()
                limit.reschedule(0)

    async def run_until_cancelled() -> None:
        task = asyncio.create_task(run())  # noqa: TID251 -- to be cancelled as asyncio does it
        await started.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon({"scope": run, "task": run_until_cancelled, "timeout": run_until_a_timeout}[cancel])
            await started.wait()
            if cancel == "scope":
                group.cancel_scope.cancel()
    assert cleaned.is_set()
    assert ended == []


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_module_that_cancels_itself_has_failed_in_the_events(kind: str):
    class Inner(dspy.Module):  # type: ignore[misc]
        async def aforward(self, **_: Any) -> Any:
            raise asyncio.CancelledError

    class Sync(dspy.Module):  # type: ignore[misc]
        def forward(self, **_: Any) -> Any:
            raise asyncio.CancelledError

    class Outer(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner() if kind == "async" else Sync()

        async def aforward(self, **inputs: Any) -> Any:
            return await (self.inner.acall(**inputs) if kind == "async" else asyncio.to_thread(self.inner, **inputs))

    heard = Heard()
    with pytest.raises(asyncio.CancelledError), dspy.context(lm=lm_of(lambda _: chat(answer="a"))):
        await run_program(Outer(), {}, heard)
    text = "something that it waited for was cancelled"
    assert [(error.node, error.error.message) for error in heard.of(NodeError)] == [("inner", text), ("Outer", text)]
    assert {error.error.code for error in heard.of(NodeError)} == {"error"}
