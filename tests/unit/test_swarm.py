"""The swarm over real files: its researchers really work side by side, and nothing of one gets into another."""

import re
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import dspy
import pytest
from dspy.lm15 import Message, Request, Response, StreamDeltaEvent, StreamEndEvent, StreamStartEvent, TextDelta, Usage
from pydantic import ValidationError

from agentcast.agents.base import Task
from agentcast.agents.channel import Channel
from agentcast.agents.demo import Swarm, registry
from agentcast.agents.demo.researcher import calculate, read, search
from agentcast.agents.events import (
    AgentEvent,
    LmEnd,
    LmStart,
    MessageEnd,
    MessageStart,
    NodeEnd,
    NodeError,
    NodeStart,
    Status,
    Token,
    ToolEnd,
    ToolStart,
)
from agentcast.agents.execution import Execution, drive
from agentcast.agents.offline import NOTE, reply
from agentcast.agents.registry import Registry
from agentcast.agents.threads import abandoned_threads

QUESTION = "When should I cover the roses, how much water do the ferns need, and where is the gate key?"
PARTS = ("When should I cover the roses?", "How much water do the ferns need?", "Where is the gate key?")
FILES = {
    "guide.md": "# Watering\n\nThe ferns drink twice as much water,\nso give them 12 litres a day.\n\n"
    "# Winter\n\nCover the roses before the first frost. They break easily.\n",
    "notes.txt": "The gate key hangs in the shed.\n",
}
QUOTED = re.compile(r"^(\S+), line (\d+): “(.*)”$", re.M)

Answer = Callable[[str], str | Exception | None]
"""What the model replies to a prompt; None: what the offline model replies."""


class Engine:
    """The offline model, sync and async, with replies of a test's own. `pause` is called before each sync chunk."""

    def __init__(self, answer: Answer, pause: Callable[[], None]) -> None:
        self.answer = answer
        self.pause = pause
        self.calls = 0

    def text(self, request: Request) -> str:
        self.calls += 1
        own = self.answer("\n".join([str(request.system), *(message.text or "" for message in request.messages)]))
        if isinstance(own, Exception):
            raise own
        return reply(request).text or "" if own is None else own

    def complete(self, request: Request) -> Response:
        message = Message.assistant(self.text(request))
        return Response(id=None, model="m", message=message, finish_reason="stop", usage=Usage())

    def stream(self, request: Request) -> Iterator[Any]:
        yield StreamStartEvent(model="m")
        for piece in re.findall(r"\S+\s*|\s+", self.text(request)):
            self.pause()
            yield StreamDeltaEvent(delta=TextDelta(text=piece, part_index=0))
        yield StreamEndEvent(finish_reason="stop", usage=Usage())

    def close(self) -> None:
        pass


class AsyncEngine:
    def __init__(self, sync: Engine) -> None:
        self.sync = sync

    async def complete(self, request: Request) -> Response:
        await anyio.lowlevel.checkpoint()
        return self.sync.complete(request)

    async def stream(self, request: Request) -> AsyncIterator[Any]:
        stream = Engine(self.sync.answer, lambda: None).stream(request)
        self.sync.calls += 1
        for event in stream:
            await anyio.lowlevel.checkpoint()
            yield event

    async def aclose(self) -> None:
        pass


def model(answer: Answer = lambda prompt: None, pause: Callable[[], None] = lambda: None) -> Any:
    engine = Engine(answer, pause)
    return dspy.LM("m/m", engine=engine, async_engine=AsyncEngine(engine), cache=False, num_retries=0)


@dataclass
class Run:
    """A run as its events show it."""

    events: list[AgentEvent] = field(default_factory=list)
    result: Any = None

    def of(self, *kinds: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kinds)]

    @property
    def starts(self) -> dict[str, Any]:
        return {event.span: event for event in self.of(NodeStart, LmStart, ToolStart)}

    def node(self, name: str) -> Any:
        (found,) = [event for event in self.of(NodeStart) if event.node == name]
        return found

    def path(self, span: str) -> list[str]:
        """Names from the top down to `span`."""
        event = self.starts[span]
        name = getattr(event, "node", None) or getattr(event, "tool", None) or "lm"
        return [*(self.path(event.parent) if event.parent else []), name]

    def messages(self) -> list[tuple[list[str], str, str]]:
        """Path, field and text of each message, in the order in which they ended."""
        begun = {event.message: event for event in self.of(MessageStart)}
        tokens: dict[str, str] = dict.fromkeys(begun, "")
        for token in self.of(Token):
            tokens[token.message] += token.delta
        ends = self.of(MessageEnd)
        assert tokens == {end.message: end.text for end in ends}
        return [(self.path(begun[end.message].span), begun[end.message].field, end.text) for end in ends]

    def statuses(self) -> list[str]:
        return [event.message for event in self.of(Status)]


async def collect(channel: Channel, run: Run) -> None:
    while items := await channel.receive():
        run.events.extend(item.event for item in items)


async def ask(question: str = QUESTION, agent: Any = None, **inputs: Any) -> Run:
    """As the hub runs it: driven by hand, its events taken out at the other end of a channel."""
    agent, channel, run = agent or registry["swarm"], Channel("test"), Run()
    task = Task(run="r1", input=agent.spec.input_model(question=question, **inputs))
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(collect, channel, run)
            try:
                run.result = await drive(agent.run(task, channel), channel)
            finally:
                channel.close()
    return run


def swarm_with(*tools: Callable[..., Any]) -> Any:
    return Registry().add("swarm", Swarm(tools), messages=("next_thought", "reasoning", "answer"))


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("AGENTCAST_DOCS", str(tmp_path))
    monkeypatch.setenv("AGENTCAST_OFFLINE_DELAY", "0")
    with dspy.context(lm=model(), adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        yield tmp_path


def flat(text: str) -> str:
    return " ".join(text.split())


# -- What is seen --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("docs")
async def test_every_step_is_in_the_span_tree_under_what_made_it():
    run = await ask()
    paths = Counter("/".join(run.path(span)) for span in run.starts)
    expected = {"swarm": 1, "swarm/plan": 1, "swarm/plan/lm": 1, "swarm/merge": 1, "swarm/merge/lm": 1}
    for number in (1, 2, 3):
        researcher = f"swarm/researchers[{number}]"
        react, extract = f"{researcher}/researchers[{number}].react", f"{researcher}/researchers[{number}].extract"
        predict = f"{extract}/researchers[{number}].extract.predict"
        expected |= {researcher: 1, react: 3, f"{react}/lm": 3, f"{researcher}/search": 1, f"{researcher}/read": 1}
        expected |= {extract: 1, predict: 1, f"{predict}/lm": 1}
        check = f"swarm/checks[{number}]"
        expected |= {check: 1, f"{check}/checks[{number}].predict": 1, f"{check}/checks[{number}].predict/lm": 1}
    assert paths == expected
    ended = [event.span for event in run.of(NodeEnd, LmEnd, ToolEnd)]
    assert sorted(ended) == sorted(run.starts)
    assert run.node("swarm").kind == "agent"


@pytest.mark.usefixtures("docs")
async def test_statuses_say_what_goes_on():
    run = await ask()
    own = [event.message for event in run.of(Status) if event.span == run.node("swarm").span]
    assert own[:4] == ["Plan: 3 questions", *(f"Researcher {at}: {part}" for at, part in enumerate(PARTS, start=1))]
    assert sorted(own[4:7]) == [f"Researcher {number} is done" for number in (1, 2, 3)]
    assert own[7:] == ["Checking what was found", "Merging"]
    of_tools = {tuple(run.path(event.span)): event.message for event in run.of(Status) if event.message not in own}
    assert of_tools["swarm", "researchers[3]", "read"] == "Reading notes.txt"
    assert of_tools["swarm", "researchers[1]", "read"] == "Reading guide.md"


@pytest.mark.usefixtures("docs")
async def test_messages_of_each_researcher_are_its_own_fields():
    run = await ask()
    messages = run.messages()
    for number, finding in enumerate(run.result["findings"], start=1):
        own = [(name, text) for path, name, text in messages if f"researchers[{number}]" in path]
        assert [name for name, _ in own] == ["next_thought"] * 3 + ["reasoning", "answer"]
        assert own[-1] == ("answer", finding["answer"])
        assert finding["question"] == PARTS[number - 1]
        checked = [name for path, name, _ in messages if f"checks[{number}]" in path]
        assert checked == ["reasoning"]
    assert messages[-1] == (["swarm", "merge"], "answer", run.result["answer"])


# -- Side by side --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("docs")
async def test_researchers_work_at_the_same_time():
    inside, all_in = 0, anyio.Event()

    async def look(query: str) -> str:
        """Search the files for words."""
        nonlocal inside
        inside += 1
        if inside == len(PARTS):
            all_in.set()
        await all_in.wait()  # would wait for ever if they went one after another
        return search(query)

    run = await ask(agent=swarm_with(dspy.Tool(look, name="search"), read, calculate))
    steps = [type(event) for event in run.of(ToolStart, ToolEnd) if event.tool == "search"]
    assert steps == [ToolStart] * 3 + [ToolEnd] * 3
    writers = [path[1] for path in (run.path(run_start.span) for run_start in message_order(run))]
    first, last = writers.index("researchers[3]"), len(writers) - writers[::-1].index("researchers[1]")
    assert first < last


def message_order(run: Run) -> list[Any]:
    """The message of each token."""
    begun = {event.message: event for event in run.of(MessageStart)}
    return [begun[token.message] for token in run.of(Token)]


async def test_checks_stream_side_by_side_out_of_their_threads(docs: Path):
    together = threading.Barrier(3, timeout=5)
    waited = threading.local()

    def pause() -> None:
        if not getattr(waited, "once", False):
            waited.once = True
            together.wait()

    with dspy.context(lm=model(pause=pause)):
        run = await ask()
    assert not together.broken
    nodes = [run.path(event.span)[1] for event in run.of(NodeStart, NodeEnd) if "checks" in event.node]
    assert set(nodes) == {"checks[1]", "checks[2]", "checks[3]"}
    tokens = Counter(run.path(start.span)[1] for start in message_order(run))
    assert all(tokens[f"checks[{number}]"] > 5 for number in (1, 2, 3))


async def test_twenty_swarms_at_once_never_mix(docs: Path):
    names = [f"{letter}{letter}orb" for letter in "abcdefghijklmnopqrst"]
    for name in names:
        (docs / f"{name}.md").write_text(f"{name}wing {name}beak {name}tail.\n\n{name}root {name}leaf {name}seed.\n")
    runs: dict[str, Run] = {}

    async def one(name: str) -> None:
        runs[name] = await ask(f"What is {name}beak, and what is {name}leaf?")

    async with anyio.create_task_group() as group:
        for name in names:
            group.start_soon(one, name)
    for name, run in runs.items():
        assert {file for file, _, _ in QUOTED.findall(run.result["answer"])} == {f"{name}.md"}
        assert len(run.result["findings"]) == 2
        run.messages()
        seen = str([event.wire() for event in run.events])
        assert f"{name}root" in seen
        assert not [other for other in names if other != name and other in seen]


# -- What comes out ------------------------------------------------------------------------------------------------


async def test_answer_quotes_the_files_word_for_word_by_sub_question(docs: Path):
    run = await ask()
    answer = run.result["answer"]
    sections = answer.split("\n\n")
    assert [section.splitlines()[0] for section in sections[:3]] == list(PARTS)
    assert "“Cover the roses before the first frost.”" in sections[0]
    assert "“The ferns drink twice as much water, so give them 12 litres a day.”" in sections[1]
    assert "“The gate key hangs in the shed.”" in sections[2]
    assert answer.count(NOTE) == 1
    quotes = QUOTED.findall(answer)
    assert quotes
    for file, line, text in quotes:
        assert text in flat("\n".join((docs / file).read_text().splitlines()[int(line) - 1 :]))
    for finding in run.result["findings"]:
        assert finding["supported"] is None, "the offline model cannot tell"
        assert all(quote["text"] in flat((docs / quote["file"]).read_text()) for quote in finding["quotes"])
        assert finding["quotes"]
        assert "passages" not in finding


async def test_failing_researcher_is_reported_and_the_others_answer(docs: Path):
    def answer(prompt: str) -> Exception | None:
        broken = "[[ ## question ## ]]\nHow much water do the ferns need?" in prompt and "`next_thought`" in prompt
        return RuntimeError("at /srv/model.py with sk-secret") if broken else None

    with dspy.context(lm=model(answer)):
        run = await ask()
    first, second, third = run.result["findings"]
    assert second["answer"] == ""
    assert second["supported"] is None
    problem = second["problem"]
    assert problem
    sections = run.result["answer"].split("\n\n")
    assert sections[1] == f"{PARTS[1]}\nNot answered: {problem}"
    assert "first frost" in sections[0]
    assert "gate key hangs" in sections[2]
    assert first["supported"] is third["supported"] is None
    assert f"Researcher 2 failed: {problem}" in run.statuses()
    assert [event.node for event in run.of(NodeError)] == ["researchers[2].react", "researchers[2]"]
    assert {event.node for event in run.of(NodeStart) if "checks" in event.node and "." not in event.node} == {
        "checks[1]",
        "checks[3]",
    }
    assert "sk-secret" not in str([event.wire() for event in run.events]) + str(run.result)


async def test_quotes_that_stand_nowhere_are_dropped(docs: Path):
    made_up = '{"file": "guide.md", "text": "Roses are blue."}'
    real = '{"file": "guide.md", "line": 8, "text": "They break\\neasily."}'

    def answer(prompt: str) -> str | None:
        if "`supported`" not in prompt:
            return None
        fields = {"reasoning": "r", "supported": "False", "quotes": f"[{made_up}, {real}]"}
        return "\n".join(f"[[ ## {name} ## ]]\n{text}\n" for name, text in fields.items())

    with dspy.context(lm=model(answer)):
        run = await ask("When should I cover the roses?")
    finding = run.result["findings"][0]
    assert [quote["text"] for quote in finding["quotes"]] == ["They break\neasily."]
    assert "(supported: no)" in run.result["answer"]


async def test_check_that_fails_leaves_its_finding_unchecked(docs: Path):
    def answer(prompt: str) -> Exception | None:
        return RuntimeError("out of order") if "`supported`" in prompt and PARTS[0] in prompt else None

    with dspy.context(lm=model(answer)):
        run = await ask()
    assert [bool(finding["quotes"]) for finding in run.result["findings"]] == [False, True, True]
    assert "first frost" in run.result["answer"]


@pytest.mark.parametrize(
    ("planned", "asked"),
    [
        ('["One?", "Two?", "Three?", "Four?"]', ["One?", "Two?"]),
        ('["", " ", "One?"]', ["One?"]),
        ("[]", ["Where is the gate key?"]),
    ],
    ids=["too many", "empty ones", "none"],
)
async def test_plan_of_a_model_is_taken_as_far_as_it_is_of_use(docs: Path, planned: str, asked: list[str]):
    def answer(prompt: str) -> str | None:
        return f"[[ ## sub_questions ## ]]\n{planned}\n" if "`sub_questions`" in prompt else None

    with dspy.context(lm=model(answer)):
        run = await ask("Where is the gate key?", researchers=2)
    assert [finding["question"] for finding in run.result["findings"]] == asked


def test_input_is_a_question_and_how_many_researchers():
    spec = registry["swarm"].spec
    assert spec.input_model(question="q").model_dump() == {"question": "q", "researchers": 3}
    for wrong in (1, 6):
        with pytest.raises(ValidationError):
            spec.input_model(question="q", researchers=wrong)
    assert spec.description.startswith("Send several researchers into a folder of texts at once")


# -- Stopping ------------------------------------------------------------------------------------------------------


async def cancelled(run: Run, channel: Channel, execution: Execution) -> int:
    """Cancel, and give the number of events that were there when all had ended."""
    with anyio.fail_after(5):
        execution.cancel()
        await execution.done.wait()
        channel.close()
    return len(run.events)


@pytest.mark.usefixtures("docs")
async def test_cancelling_reaches_every_researcher():
    started: list[str] = []
    stopped: list[str] = []
    all_in = anyio.Event()

    async def look(query: str) -> str:
        """Search the files for words."""
        started.append(query)
        if len(started) == len(PARTS):
            all_in.set()
        try:
            await anyio.sleep_forever()
        finally:
            stopped.append(query)
        raise AssertionError

    agent, channel, run = swarm_with(dspy.Tool(look, name="search")), Channel("test"), Run()
    lm = model()
    async with anyio.create_task_group() as group:
        group.start_soon(collect, channel, run)
        with dspy.context(lm=lm), anyio.fail_after(5):
            task = Task(run="r1", input=agent.spec.input_model(question=QUESTION))
            execution = Execution(agent.run(task, channel), channel)
            await all_in.wait()
        calls = lm.engine.calls
        await cancelled(run, channel, execution)
    assert sorted(stopped) == sorted(started)
    assert lm.engine.calls == calls
    assert "Checking what was found" not in run.statuses()


@pytest.mark.usefixtures("docs")
async def test_cancelling_stops_the_checks_in_their_threads():
    agent, channel, run = registry["swarm"], Channel("test"), Run()
    checking, go_on = threading.Barrier(len(PARTS) + 1), threading.Event()

    def pause() -> None:
        if not go_on.is_set():
            checking.wait(20)
        assert go_on.wait(20)

    lm = model(pause=pause)
    async with anyio.create_task_group() as group:
        group.start_soon(collect, channel, run)
        with dspy.context(lm=lm), anyio.fail_after(30):
            task = Task(run="r1", input=agent.spec.input_model(question=QUESTION))
            execution = Execution(agent.run(task, channel), channel)
            await anyio.to_thread.run_sync(checking.wait, 20)
        count = await cancelled(run, channel, execution)
        calls = lm.engine.calls
        go_on.set()
        for thread in threading.enumerate():
            if thread.name == "checks of a swarm":
                await anyio.to_thread.run_sync(thread.join, 5)
                assert not thread.is_alive()
    assert lm.engine.calls == calls
    assert len(run.events) == count
    assert "Merging" not in run.statuses()
    assert not abandoned_threads()
