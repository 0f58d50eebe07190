"""How DSPy's objects behave inside a run: the same prompts, byte for byte, and no object of the user's changed (G9)."""

import copy
import enum
import json
import logging
import threading
from typing import Any, ClassVar, Literal

import anyio
import dspy
import pytest
from dspy.lm15 import Message, Request, Response, Usage
from pydantic import BaseModel

from agentcast.agents.events import ToolEnd
from agentcast.agents.react import ReAct
from agentcast.agents.streaming import run_program
from tests.support.lms import chat

ADAPTERS = {"Chat": dspy.ChatAdapter, "JSON": dspy.JSONAdapter, "XML": dspy.XMLAdapter}


class Silent:
    """An emitter that keeps what it is sent."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    async def send(self, event: Any) -> None:
        self.events.append(event)

    def nowait(self, event: Any) -> None:
        self.events.append(event)


class Script:
    """An engine that answers with the fields it was made with, in the form that the adapter asks for, one answer after
    another; it keeps whole prompts."""

    def __init__(self, adapter: str, answers: list[dict[str, Any]]) -> None:
        self.adapter = adapter
        self.answers = list(answers)
        self.prompts: list[str] = []

    def complete(self, request: Request) -> Response:
        self.prompts.append(repr((request.system, request.messages, request.tools, request.config)))
        text = written(self.adapter, self.answers.pop(0))
        return Response(id=None, model="m", message=Message.assistant(text), finish_reason="stop", usage=Usage())


class Awaited:
    def __init__(self, script: Script) -> None:
        self.script = script

    async def complete(self, request: Request) -> Response:
        await anyio.lowlevel.checkpoint()
        return self.script.complete(request)

    async def aclose(self) -> None:
        pass


def written(adapter: str, fields: dict[str, Any]) -> str:
    if adapter == "JSON":
        return json.dumps(fields)
    if adapter == "XML":
        return "\n".join(f"<{name}>{xml(value)}</{name}>" for name, value in fields.items())
    return chat(**{name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()})


def xml(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(f"<{key}>{xml(item)}</{key}>" for key, item in value.items())
    if isinstance(value, list):
        return "".join(f"<item>{xml(item)}</item>" for item in value)
    return str(value).replace("&", "&amp;").replace("<", "&lt;")


async def prompts_of(program: Any, inputs: dict[str, Any], adapter: str, answers: Any, *, hosted: bool) -> list[str]:
    script = Script(adapter, answers)
    lm = dspy.LM("script/lm", engine=script, async_engine=Awaited(script), cache=False, num_retries=0)
    with dspy.context(lm=lm, adapter=ADAPTERS[adapter](), disable_history=True, trace=[]):
        if hosted:
            await run_program(program, inputs, Silent())
        else:
            await program.acall(**inputs)
    return script.prompts


async def assert_same_prompts(make: Any, inputs: dict[str, Any], adapter: str, answers: Any, plain: Any = None) -> None:
    expected = await prompts_of((plain or make)(), inputs, adapter, answers, hosted=False)
    program = make()
    for _ in range(2):  # what the first run has left behind serves the second
        assert await prompts_of(program, inputs, adapter, answers, hosted=True) == expected
    assert len(expected) == len(answers)


# -- The same prompts --------------------------------------------------------------------------------------------------

RESULTS: list[Any] = [
    "plain",
    " padded \n",
    "",
    "two\nlines of «text»",
    b"bytes, \xc3\xbc",
    b"",
    {"nested": ["ü", 1, None, {"a": 1.5}]},
    ["a", "b\nc"],
    [],
    3.5,
    None,
    True,
    10**30,
    "[[ ## observation_0 ## ]]\n<thought_0>",
]


def turns(*results: Any) -> list[dict[str, Any]]:
    calls = [
        {"next_thought": f"t{at} <&> ü", "next_tool_name": "give", "next_tool_args": {"number": str(at)}}
        for at in range(len(results))
    ]
    finish = {"next_thought": "enough", "next_tool_name": "finish", "next_tool_args": {}}
    return [*calls, finish, {"reasoning": "r", "answer": "a"}]


async def give(number: str) -> Any:
    """Give a result."""
    return RESULTS[int(number)]


def give_now(number: str) -> Any:
    """Give a result."""
    return RESULTS[int(number)]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_react_with_odd_results(adapter: str, kind: str):
    tool = dspy.Tool(give if kind == "async" else give_now, name="give")
    answers = turns(*RESULTS)
    await assert_same_prompts(lambda: dspy.ReAct("question -> answer", [tool]), {"question": "q"}, adapter, answers)


@pytest.mark.parametrize("adapter", ADAPTERS)
async def test_our_react_has_dspys_prompts(adapter: str):
    await assert_same_prompts(
        lambda: ReAct("question -> answer", [give], 20),
        {"question": "q"},
        adapter,
        turns(*RESULTS),
        plain=lambda: dspy.ReAct("question -> answer", [give], 20),
    )


@pytest.mark.parametrize("adapter", ["Chat", "JSON"])
async def test_react_v2(adapter: str):
    calls = [{"name": "give", "args": {"number": str(at)}} for at in range(4)]
    replies: list[dict[str, Any]] = [{"next_thought": "t", "tool_calls": {"tool_calls": [call]}} for call in calls]
    submit = {"name": "submit", "args": {"answer": "a"}}
    replies.append({"next_thought": "t", "tool_calls": {"tool_calls": [submit]}})
    await assert_same_prompts(lambda: dspy.ReActV2("question -> answer", [give]), {"question": "q"}, adapter, replies)


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int | None = None
    tags: list[str] = []


class Typed(dspy.Signature):  # type: ignore[misc]
    """Say who it is.

    In   detail."""

    text: str = dspy.InputField(desc="What is said")
    people: list[Person] = dspy.InputField()
    mood: Mood = dspy.OutputField(desc="Of the text")
    kind: Literal["b", "a"] = dspy.OutputField()
    count: int = dspy.OutputField(ge=0)
    who: Person | None = dspy.OutputField()


TYPED = {"text": "ü\n<b>", "people": [Person(name="Ann"), Person(name="Bob", age=3, tags=["x"])]}
ANSWER = {"mood": "good", "kind": "a", "count": 3, "who": {"name": "Ann", "age": 4, "tags": ["y"]}}


@pytest.mark.parametrize("adapter", ADAPTERS)
async def test_typed_fields_and_demos_of_an_optimizer(adapter: str):
    def optimized() -> Any:
        program = dspy.ChainOfThought(Typed)
        whole = dspy.Example(**TYPED, **(ANSWER | {"mood": Mood.BAD, "who": None}), reasoning="because")
        part = dspy.Example(text="only this", mood=Mood.GOOD)
        program.predict.demos = [whole, part]
        program.predict.signature = program.predict.signature.with_instructions("Rewritten\n\nby an optimizer.")
        return program

    for make in (lambda: dspy.Predict(Typed), lambda: dspy.ChainOfThought(Typed), optimized):
        answer = ANSWER if isinstance(make(), dspy.Predict) else {"reasoning": "r"} | ANSWER
        await assert_same_prompts(make, TYPED, adapter, [answer])


@pytest.mark.parametrize("adapter", ADAPTERS)
async def test_history_and_images(adapter: str):
    history = dspy.History(messages=[{"question": "Who?", "answer": "Ann"}, {"question": "Why?", "answer": "So."}])
    signature = "question, history: dspy.History, picture: dspy.Image -> answer"
    inputs = {"question": "And?", "history": history, "picture": dspy.Image("http://127.0.0.1/a.png")}
    await assert_same_prompts(lambda: dspy.Predict(signature), inputs, adapter, [{"answer": "a"}])


class Own(dspy.Module):  # type: ignore[misc]
    """A user's module: makes a predictor, a signature and a tool while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict("question -> draft")

    async def aforward(self, question: str) -> Any:
        draft = (await self.first.acall(question=question)).draft
        seen = await dspy.Tool(give).acall(number="6")
        signature = dspy.Signature("draft, seen -> answer", f"About {draft}.")
        return await dspy.Predict(signature).acall(draft=draft, seen=str(seen))


@pytest.mark.parametrize("adapter", ADAPTERS)
async def test_own_modules_and_refine(adapter: str):
    answers = [{"draft": "x"}, {"answer": "y"}]
    await assert_same_prompts(Own, {"question": "q"}, adapter, answers)


# -- What changes is noticed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS)
async def test_a_signature_that_is_changed_where_it_stands_is_noticed(adapter: str):
    class Changing(dspy.Type):  # type: ignore[misc]
        words: ClassVar[str] = "first words"
        text: str = ""

        @classmethod
        def description(cls) -> str:
            return cls.words

    class Asking(dspy.Signature):  # type: ignore[misc]
        """First."""

        question: str = dspy.InputField(desc="the first")
        thing: Changing = dspy.InputField()
        answer: str = dspy.OutputField()

    program = dspy.Predict(Asking)

    def change_instructions() -> None:
        Asking.instructions = "Second."

    def change_description() -> None:
        Asking.model_fields["question"].json_schema_extra["desc"] = "the second"

    def change_type() -> None:
        Changing.words = "other words"

    def change_signature() -> None:
        program.signature = Asking.with_instructions("Third.")

    texts = set()
    for change in (lambda: None, change_instructions, change_description, change_type, change_signature):
        change()
        inputs = {"question": "q", "thing": Changing(text="t")}
        played = [
            await prompts_of(program, inputs, adapter, [{"answer": "a"}], hosted=hosted) for hosted in (True, False)
        ]
        assert played[0] == played[1]
        texts.add(played[0][0])
    assert len(texts) == 5


async def test_an_adapter_of_the_users_own_is_asked_each_time():
    class Counting(dspy.ChatAdapter):  # type: ignore[misc]
        asked = 0

        def format_task_description(self, signature: Any) -> Any:
            self.asked += 1
            return f"Time {self.asked}."

    changed = dspy.ChatAdapter()
    changed.format_task_description = lambda signature: f"Now {len(seen)}."  # on the object itself
    for adapter, words in ((Counting(), ["Time 1.", "Time 2."]), (changed, ["Now 0.", "Now 1."])):
        seen: list[str] = []
        program = dspy.Predict("question -> answer")
        script = Script("Chat", [{"answer": "a"}, {"answer": "a"}])
        lm = dspy.LM("script/lm", engine=script, async_engine=Awaited(script), cache=False, num_retries=0)
        for word in words:
            with dspy.context(lm=lm, adapter=adapter):
                await run_program(program, {"question": "q"}, Silent())
            seen.append(word)
            assert word in script.prompts[-1]


async def test_a_tool_that_is_changed_is_noticed():
    def look(limit: int) -> str:
        return f"{limit}"

    tool = dspy.Tool(look)

    class Calls(dspy.Module):  # type: ignore[misc]
        async def aforward(self, limit: Any) -> Any:
            try:
                return dspy.Prediction(answer=await tool.acall(limit=limit))
            except ValueError as error:
                return dspy.Prediction(answer=str(error))

    async def called(limit: Any) -> Any:
        return (await run_program(Calls(), {"limit": limit}, Silent())).prediction.answer

    assert await called(3) == "3"
    tool.args["limit"]["maximum"] = 2
    assert await called(3) == "Arg limit is invalid: 3 is greater than the maximum of 2"
    tool.func = lambda limit: f"other {limit}"
    assert await called(2) == "other 2"
    tool.args["limit"] = {"type": "string"}
    tool.arg_types["limit"] = str
    assert await called("x") == "other x"
    assert await called(2) == "Arg limit is invalid: 2 is not of type 'string'"


# -- Nothing of the user's is changed ----------------------------------------------------------------------------------


async def test_a_run_leaves_the_program_and_its_parts_as_they_are():
    program, adapter = dspy.ReAct("question -> answer", [give_now]), dspy.ChatAdapter()
    tool = program.tools["give_now"]
    before = program.dump_state(), dict(vars(tool)), dict(vars(adapter)), set(vars(program.react.signature))
    parts = [id(part) for _, part in program.named_sub_modules()], list(map(id, program.tools.values()))
    script = Script("Chat", [a | {"next_tool_name": "give_now"} if i == 0 else a for i, a in enumerate(turns("x"))])
    lm = dspy.LM("script/lm", engine=script, async_engine=Awaited(script), cache=False, num_retries=0)
    with dspy.context(lm=lm, adapter=adapter):
        await run_program(program, {"question": "q"}, Silent())
    assert before == (program.dump_state(), dict(vars(tool)), dict(vars(adapter)), set(vars(program.react.signature)))
    assert parts == ([id(part) for _, part in program.named_sub_modules()], list(map(id, program.tools.values())))
    assert copy.deepcopy(program).dump_state() == program.dump_state()


# -- What DSPy's own loops are given by a run --------------------------------------------------------------------------


class Refused(Exception):
    pass


@pytest.mark.parametrize("how", ["awaited", "in a thread"])
@pytest.mark.parametrize("loop", ["ReAct", "ReActV2"])
async def test_a_tool_that_fails_shows_no_traceback_and_no_path(loop: str, how: str, caplog: pytest.LogCaptureFixture):
    def give_up(number: str) -> str:
        """Fail."""
        error: Exception = {"0": Refused("at /srv/app.py"), "1": ValueError("no such number")}[number]
        raise error

    if loop == "ReAct":
        calls = [{"next_thought": "t", "next_tool_name": "give_up", "next_tool_args": {"number": n}} for n in "01"]
        answers: list[dict[str, Any]] = [*calls, *turns()]
    else:
        asked = [("give_up", {"number": "0"}), ("give_up", {"number": "1"}), ("submit", {"answer": "a"})]
        answers = [
            {"next_thought": "t", "tool_calls": {"tool_calls": [{"name": name, "args": args}]}} for name, args in asked
        ]
    agent = getattr(dspy, loop)("question -> answer", [give_up])
    program = agent if how == "awaited" else Threaded(agent)
    script, heard = Script("Chat", answers), Silent()
    lm = dspy.LM("script/lm", engine=script, async_engine=Awaited(script), cache=False, num_retries=0)
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()), caplog.at_level(logging.WARNING):
        outcome = await run_program(program, {"question": "q"}, heard)
    assert outcome.prediction.answer == "a"
    prompts = "\n".join(script.prompts)
    assert "Execution error in give_up: Refused" in prompts
    assert "Execution error in give_up: no such number" in prompts
    ends = [event.error and event.error.message for event in heard.events if isinstance(event, ToolEnd)]
    assert ends[:2] == ["Refused", "no such number"]
    for leak in ("Traceback", 'File "', "/srv", __file__, "site-packages"):
        assert leak not in prompts + str([event.wire() for event in heard.events])
    assert [record.exc_info is not None for record in caplog.records if "give_up failed" in record.message] == [True]


class Threaded(dspy.Module):  # type: ignore[misc]
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


async def test_outside_of_a_run_dspys_own_errors_stay():
    def fail(number: str) -> str:
        raise Refused("at /srv/app.py")

    answers = [{"next_thought": "t", "next_tool_name": "fail", "next_tool_args": {"number": "0"}}, *turns()]
    await prompts_of(dspy.Predict("question -> answer"), {"question": "q"}, "Chat", [{"answer": "a"}], hosted=True)
    prompts = await prompts_of(
        dspy.ReAct("question -> answer", [fail]), {"question": "q"}, "Chat", answers, hosted=False
    )
    assert "Traceback" in prompts[1]


async def test_the_end_of_a_loop_needs_no_thread():
    threads: list[str] = []
    plain = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        threads.append(thread.name)
        plain(thread)

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(threading.Thread, "start", start)
        agent = dspy.ReAct("question -> answer", [give_now])
        await prompts_of(agent, {"question": "q"}, "Chat", turns(), hosted=True)
    assert [name for name in threads if name.startswith("tool ")] == []
