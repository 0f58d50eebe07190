"""The writer of one run's log: coalescing, sealing, retrying, rebasing, snapshots (G1, G5, G7, G10)."""

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import orjson
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from agentcast.agents.channel import Channel
from agentcast.agents.events import (
    AgentEvent,
    CancelRequested,
    Custom,
    Failure,
    LmEnd,
    MessageEnd,
    MessageRetracted,
    MessageStart,
    NodeEnd,
    NodeError,
    NodeStart,
    RunEnd,
    RunQueued,
    RunStart,
    StatePatch,
    Status,
    Token,
    ToolEnd,
    ToolProgress,
    ToolStart,
    Usage,
    ValidationFailed,
)
from agentcast.agents.values import VALUE_BYTES, text_bytes
from agentcast.server.bus.base import APPEND_BYTES, Frame, Head, NewRun, Origin, Snapshot, append_size
from agentcast.server.bus.base import Status as RunStatus
from agentcast.server.bus.memory import MemoryBus
from agentcast.server.errors import Ended, Fenced, NotFound, Unavailable
from agentcast.server.runs import recorder as module
from agentcast.server.runs.publisher import SummaryPublisher
from agentcast.server.runs.recorder import Recorder
from agentcast.server.runs.snapshots import Snapshots
from agentcast.server.state import RunState
from tests.contract.support import Mail

NEVER = 1_000.0


class FlakyBus(MemoryBus):
    """Is away `away` times; with `late`, what it refuses has been written all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.away = 0
        self.late = False
        self.attempts: list[tuple[Frame, ...]] = []
        self.attempted = anyio.Event()
        self.snapshots: list[Snapshot] = []

    def _refuse(self) -> None:
        if self.away > 0:
            self.away -= 1
            raise Unavailable("away")

    async def append(self, run: str, fence: int, frames: Sequence[Frame], status: RunStatus) -> None:
        self.attempts.append(tuple(frames))
        self.attempted.set()
        if self.late:
            await super().append(run, fence, frames, status)
        self._refuse()
        await super().append(run, fence, frames, status)

    async def rebase(
        self, run: str, fence: int, seq: int, state: bytes, status: RunStatus, origin: Origin | None = None
    ) -> str:
        self._refuse()
        return await super().rebase(run, fence, seq, state, status, origin)

    async def save_snapshot(self, fence: int, snapshot: Snapshot) -> None:
        self._refuse()
        await super().save_snapshot(fence, snapshot)
        self.snapshots.append(snapshot)


class Case:
    """A run on a bus, its recorder, and what is delivered of it."""

    def __init__(self, bus: FlakyBus, recorder: Recorder, snapshots: Snapshots) -> None:
        self.bus = bus
        self.recorder = recorder
        self.snapshots = snapshots
        self.mail = Mail()
        self.channel = Channel()

    @classmethod
    async def make(cls) -> "Case":
        bus = FlakyBus()
        snapshots, summaries = Snapshots(), SummaryPublisher(bus)
        recorder = Recorder(
            bus, "r", Origin("echo", "ann", None, 1.0), "e", fence=1, snapshots=snapshots, summaries=summaries
        )
        first = recorder.first_frame(1.0, RunQueued(epoch="e", input={"q": 1}))
        await bus.create(
            NewRun(run="r", epoch="e", agent="echo", principal="ann", thread=None, created=1.0, first=first)
        )
        case = cls(bus, recorder, snapshots)
        await bus.open({"r": case.mail.deliver})
        return case

    @asynccontextmanager
    async def recording(self) -> AsyncIterator[Channel]:
        """Record what goes into the channel; closes it at the end and waits until it is drained."""
        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.recorder.record_from, self.channel)
                yield self.channel
                self.channel.close()

    async def save_due(self) -> None:
        """Save what is due until nothing is."""
        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.snapshots.run)
                await self.snapshots.saved.wait()
                tasks.cancel_scope.cancel()

    async def delivered(self, count: int) -> list[dict[str, Any]]:
        return [orjson.loads(item.data) for item in await self.mail.take(count) if isinstance(item, Frame)]

    async def log(self) -> list[dict[str, Any]]:
        """The whole log of the epoch of now, which must hold it all."""
        documents: list[dict[str, Any]] = []
        while page := await self.bus.read("r", self.recorder.epoch, len(documents)):
            if not page.frames:
                break
            documents += [orjson.loads(frame.data) for frame in page.frames]
        return documents


def brief(documents: Sequence[dict[str, Any]]) -> list[str]:
    """Each event as its name, tokens and ends with their text."""
    return [
        " ".join([item["event"], *(str(item[field]) for field in ("message", "delta", "text") if field in item)])
        for item in documents
    ]


@pytest.fixture
async def case() -> Case:
    return await Case.make()


@pytest.fixture
def never_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_AFTER", NEVER)


@pytest.fixture
def retry_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETRY_FIRST", 0.0)
    monkeypatch.setattr(module, "_RETRY_MOST", 0.0)
    monkeypatch.setattr("agentcast.server.runs.snapshots._RETRY", 0.0)


# -- Coalescing ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("never_flush")
async def test_first_token_of_each_message_goes_at_once(case: Case) -> None:
    async with case.recording() as channel:
        await channel.send(MessageStart(message="a", span="s", field="f"))
        await channel.send(Token(message="a", delta="1"))
        assert brief(await case.delivered(2))[1:] == ["token a 1"]
        await channel.send(Token(message="a", delta="2"))
        await anyio.wait_all_tasks_blocked()
        assert len(case.mail.items) == 2
        await channel.send(MessageStart(message="b", span="s", field="f"))
        await channel.send(Token(message="b", delta="3"))

        assert brief(await case.delivered(5))[2:] == ["token a 2", "message_start b", "token b 3"]


@pytest.mark.usefixtures("never_flush")
async def test_first_token_goes_at_once_also_when_the_start_of_its_message_went_before(case: Case) -> None:
    async with case.recording() as channel:
        for name in "ab":
            await channel.send(MessageStart(message=name, span="s", field="f"))
        await case.mail.take(2)
        await channel.send(Token(message="a", delta="1"))
        await case.mail.take(3)
        await channel.send(Token(message="a", delta="2"))
        await anyio.wait_all_tasks_blocked()
        assert len(case.mail.items) == 3
        await channel.send(Token(message="b", delta="3"))

        assert brief(await case.delivered(5))[2:] == ["token a 1", "token a 2", "token b 3"]


async def test_later_tokens_are_joined_after_a_short_while(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_AFTER", 0.05)
    async with case.recording() as channel:
        await channel.send(MessageStart(message="a", span="s", field="f"))
        await channel.send(Token(message="a", delta="0"))
        await case.mail.take(2)
        for n in range(1, 5):
            await channel.send(Token(message="a", delta=str(n)))
            for _ in range(5):
                await checkpoint()

        assert brief(await case.delivered(3))[2:] == ["token a 1234"]


async def test_flow_of_tokens_does_not_put_the_flush_off(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_AFTER", 0.005)
    async with case.recording() as channel:
        await channel.send(MessageStart(message="a", span="s", field="f"))
        with anyio.fail_after(5):
            while len(case.mail.items) < 6:
                await channel.send(Token(message="a", delta="x"))
                await checkpoint()


@pytest.mark.usefixtures("never_flush")
@pytest.mark.parametrize(
    "event",
    [
        Status(message="x"),
        ToolProgress(span="s", progress=1.0),
        MessageStart(message="b", span="s", field="f"),
        MessageEnd(message="a", text="123"),
        MessageRetracted(message="a", reason="x"),
        Custom(name="x"),
    ],
    ids=lambda event: event.event,
)
async def test_buffers_are_flushed_before_any_other_event(case: Case, event: AgentEvent) -> None:
    async with case.recording() as channel:
        await channel.send(MessageStart(message="a", span="s", field="f"))
        for delta in "123":
            await channel.send(Token(message="a", delta=delta))
        await channel.send(event)

        documents = await case.delivered(4)

    assert brief(documents)[1:3] == ["token a 1", "token a 23"]
    assert documents[3]["event"] == event.event


@pytest.mark.usefixtures("never_flush")
async def test_what_the_hub_records_comes_after_the_buffered_tokens(case: Case) -> None:
    async with case.recording() as channel:
        await channel.send(MessageStart(message="a", span="s", field="f"))
        for delta in "12":
            await channel.send(Token(message="a", delta=delta))
        await anyio.wait_all_tasks_blocked()
        await case.recorder.record(5.0, CancelRequested(reason="why"))

        assert brief(await case.delivered(4))[2:] == ["token a 2", "cancel_requested"]


@pytest.mark.usefixtures("never_flush")
async def test_recording_goes_on_after_the_hub_has_recorded_all_that_waited(case: Case) -> None:
    """The recorder is woken for what the hub then takes itself."""
    async with case.recording() as channel:
        await anyio.wait_all_tasks_blocked()
        channel.nowait(Status(message="1"))
        await case.recorder.record(5.0, CancelRequested(reason="why"))
        await anyio.wait_all_tasks_blocked()
        channel.nowait(Status(message="2"))

        assert brief(await case.delivered(3)) == ["status 1", "cancel_requested", "status 2"]


@pytest.mark.usefixtures("never_flush")
async def test_tokens_that_wait_wake_nobody_until_the_agent_is_to_be_held_back(case: Case) -> None:
    async with case.recording() as channel:
        await channel.send(START)
        await channel.send(Token(message="a", delta="x"))
        await case.mail.take(2)
        for _ in range(63):
            channel.nowait(Token(message="a", delta="x"))
            await anyio.wait_all_tasks_blocked()
        assert len(channel) == 63
        await channel.send(Token(message="a", delta="x"))

        assert brief(await case.delivered(3))[2:] == ["token a " + 64 * "x"]


@pytest.mark.usefixtures("never_flush")
async def test_closing_the_channel_flushes_and_drains_it(case: Case) -> None:
    async with case.recording() as channel:
        await channel.send(MessageStart(message="a", span="s", field="f"))
        for delta in "123":
            await channel.send(Token(message="a", delta=delta))

    assert brief(await case.log())[2:] == ["token a 1", "token a 23"]


async def test_burst_is_recorded_whole_and_in_order(case: Case) -> None:
    async with case.recording() as channel:
        for n in range(3 * module.BATCH_EVENTS + 5):
            channel.nowait(Status(message=str(n)))

    assert [item["message"] for item in (await case.log())[1:]] == [str(n) for n in range(3 * module.BATCH_EVENTS + 5)]
    assert max(len(batch) for batch in case.bus.attempts) <= module.BATCH_EVENTS


# -- Messages ------------------------------------------------------------------------------------------------------


async def emit(case: Case, *events: AgentEvent) -> list[str]:
    async with case.recording() as channel:
        for event in events:
            await channel.send(event)
    return brief(await case.log())[1:]


START = MessageStart(message="a", span="s", field="f")


@pytest.mark.parametrize(
    ("said", "text", "expected"),
    [
        (["x", "y"], "xy", ["token a x", "token a y", "message_end a xy"]),
        (["x"], "xyz", ["token a x", "token a yz", "message_end a xyz"]),
        ([], "xyz", ["token a xyz", "message_end a xyz"]),
        ([], "", ["message_end a "]),
        (["x", "y"], "something else", ["token a x", "token a y", "message_end a xy"]),
        (["x", "y"], "x", ["token a x", "token a y", "message_end a xy"]),
        (["", "x", ""], "x", ["token a x", "message_end a x"]),
    ],
)
async def test_end_of_a_message_says_what_its_tokens_said(
    case: Case, said: list[str], text: str, expected: list[str]
) -> None:
    tokens = [Token(message="a", delta=delta) for delta in said]

    assert await emit(case, START, *tokens, MessageEnd(message="a", text=text)) == ["message_start a", *expected]


async def test_events_of_a_message_that_is_not_open_are_left_out(case: Case) -> None:
    events: list[AgentEvent] = [
        Token(message="a", delta="early"),
        MessageEnd(message="a", text="early"),
        START,
        Token(message="a", delta="x"),
        MessageEnd(message="a", text="x"),
        Token(message="a", delta="late"),
        MessageEnd(message="a", text="late"),
    ]

    assert await emit(case, *events) == ["message_start a", "token a x", "message_end a x"]


async def test_retracted_message_takes_no_more(case: Case) -> None:
    events: list[AgentEvent] = [
        START,
        Token(message="a", delta="x"),
        MessageRetracted(message="a", reason="no"),
        Token(message="a", delta="y"),
        MessageEnd(message="a", text="xy"),
    ]

    assert await emit(case, *events) == ["message_start a", "token a x", "message_retracted a"]


async def test_message_that_begins_again_goes_on(case: Case) -> None:
    events: list[AgentEvent] = [
        START,
        Token(message="a", delta="x"),
        START,
        Token(message="a", delta="y"),
        MessageEnd(message="a", text="xy"),
    ]

    assert await emit(case, *events) == ["message_start a", "token a x", "token a y", "message_end a xy"]


@pytest.mark.parametrize("delta", ["x" * 1_000, "é" * 50_000, "☃\x00" * 20_000, "x" * 10 * VALUE_BYTES])
async def test_message_that_grows_too_large_is_cut_once_and_says_so(case: Case, delta: str) -> None:
    async with case.recording() as channel:
        await channel.send(START)
        for _ in range(100):
            await channel.send(Token(message="a", delta=delta))
        await channel.send(MessageEnd(message="a", text=delta * 100))

    log = await case.log()
    text = log[-1]["text"]
    assert text == "".join(item["delta"] for item in log if item["event"] == "token")
    assert "[cut" in text[-50:]
    assert text_bytes(text) <= 2 * VALUE_BYTES
    assert all(text_bytes(item["delta"]) <= VALUE_BYTES + 200 for item in log if item["event"] == "token")
    assert case.recorder.state.document["messages"][0]["text"] == text


async def test_text_that_never_streamed_is_cut_too(case: Case) -> None:
    await emit(case, START, MessageEnd(message="a", text="x" * 10 * VALUE_BYTES))

    *_, token, end = await case.log()
    assert token["delta"] == end["text"]
    assert text_bytes(end["text"]) <= VALUE_BYTES
    assert end["text"].endswith("characters in all]")


async def test_more_open_messages_than_a_state_shows_stay_consistent(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentcast.server.runs.tokens.MAX_MESSAGES", 2)
    names = "abc"
    starts: list[AgentEvent] = [MessageStart(message=name, span="s", field="f") for name in names]
    tokens: list[AgentEvent] = [Token(message=name, delta=name) for name in names]
    ends: list[AgentEvent] = [MessageEnd(message=name, text=name) for name in names]

    lines = await emit(case, *itertools.chain(*zip(starts, tokens, strict=True)), *ends)

    assert [line for line in lines if line.startswith("message_end")] == ["message_end b b", "message_end c c"]


# -- Stamping ------------------------------------------------------------------------------------------------------


async def test_prev_is_the_newest_earlier_event_that_progress_shows(case: Case) -> None:
    events: list[AgentEvent] = [
        Status(message="2"),
        START,
        Token(message="a", delta="x"),
        ToolStart(span="t", tool="t", args={}),
        ToolProgress(span="t", progress=1.0),
        Status(message="7"),
    ]
    await emit(case, *events)

    assert [(item["seq"], item["prev"]) for item in await case.log()] == [
        (1, 0),
        (2, 1),
        (3, 2),
        (4, 2),
        (5, 2),
        (6, 5),
        (7, 5),
    ]


async def test_events_carry_what_the_hub_adds(case: Case) -> None:
    await case.recorder.record(7.5, RunStart(worker="w"))

    assert (await case.log())[1] == {
        "type": "event",
        "event": "run_start",
        "run": "r",
        "seq": 2,
        "prev": 1,
        "ts": 7.5,
        "agent": "echo",
        "worker": "w",
        "attempt": 1,
    }


async def test_time_never_goes_back(case: Case) -> None:
    for ts in (5.0, 3.0, 6.0):
        await case.recorder.record(ts, Status(message="x"))

    assert [item["ts"] for item in await case.log()] == [1.0, 5.0, 5.0, 6.0]


async def test_usage_is_summed(case: Case) -> None:
    calls: list[AgentEvent] = [
        LmEnd(span="a", duration=1.0, usage=Usage(input_tokens=1, output_tokens=2, cost=0.5)),
        LmEnd(span="b", duration=1.0),
        LmEnd(span="c", duration=1.0, usage=Usage(input_tokens=10, output_tokens=20, cached_tokens=5)),
    ]
    await emit(case, *calls)

    assert case.recorder.usage == Usage(input_tokens=11, output_tokens=22, cached_tokens=5, cost=0.5)


async def test_frames_mark_progress_and_end(case: Case) -> None:
    await case.recorder.record(1.0, START, RunEnd(result=None, duration=1.0))

    page = await case.bus.read("r", "e", 0)
    assert page is not None
    assert [(frame.progress, frame.terminal) for frame in page.frames] == [(True, False), (False, False), (True, True)]
    assert (await case.bus.info(["r"]))["r"].status == "done"


# -- A bus that is away --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("retry_at_once")
@pytest.mark.parametrize("late", [False, True], ids=["refused", "written, but the answer was lost"])
async def test_sealed_batch_is_retried_as_it_is(case: Case, late: bool) -> None:
    case.bus.away, case.bus.late = 3, late

    await emit(case, Status(message="x"), Status(message="y"))

    assert len(case.bus.attempts) >= 4
    assert len(set(case.bus.attempts[:4])) == 1
    assert brief(await case.log())[1:] == ["status x", "status y"]
    assert case.recorder.epoch == "e"


async def test_agent_is_held_back_while_the_bus_is_away(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETRY_FIRST", 0.001)
    monkeypatch.setattr(module, "_RETRY_MOST", 0.001)
    case.bus.away = 1_000_000
    case.channel = Channel(high_water=4)
    sent = 0

    async def agent(channel: Channel) -> None:
        nonlocal sent
        for n in range(50):
            await channel.send(Status(message=str(n)))
            sent += 1

    async with case.recording() as channel, anyio.create_task_group() as tasks:
        tasks.start_soon(agent, channel)
        await case.bus.attempted.wait()
        for _ in range(20):
            case.bus.attempted = anyio.Event()
            await case.bus.attempted.wait()
        held_at = sent
        case.bus.away = 0

    assert held_at <= 8
    assert [item["message"] for item in (await case.log())[1:]] == [str(n) for n in range(50)]


@pytest.mark.usefixtures("retry_at_once")
async def test_snapshot_is_retried_too(case: Case) -> None:
    await case.recorder.record(1.0, RunStart(worker="w"))

    original = case.bus.save_snapshot
    failures = iter([Unavailable("away")] * 3)

    async def save(fence: int, snapshot: Snapshot) -> None:
        for failure in failures:
            raise failure
        await original(fence, snapshot)

    case.bus.save_snapshot = save  # type: ignore[method-assign]
    await case.recorder.record(2.0, RunEnd(result=1, duration=1.0))
    await case.save_due()

    assert [snapshot.seq for snapshot in case.bus.snapshots] == [3]


# -- Large batches -------------------------------------------------------------------------------------------------

BIG = "x" * VALUE_BYTES
LARGEST: list[AgentEvent] = [
    Status(message=BIG),
    NodeStart(span="s", node=BIG, kind="module", inputs=dict.fromkeys("abcdef", BIG)),
    NodeEnd(span="s", node=BIG, patch=dict.fromkeys("abcdef", "\x00" * VALUE_BYTES), duration=1.0),
    NodeError(span="s", node=BIG, error=Failure(code=BIG, message=BIG), duration=1.0),
    ValidationFailed(span="s", node=BIG, attempt=1, max_retries=1, error=BIG, failed_fields=(BIG,) * 1_000),
    LmEnd(span="s", duration=1.0, error=Failure(code=BIG, message=BIG)),
    ToolStart(span="s", tool=BIG, server=BIG, args={f"{n}" * 1_000: [n] * 10_000 for n in range(1_000)}),
    ToolEnd(span="s", tool=BIG, duration=1.0, result=[{"☃" * 1_000: 1e15}] * 1_000),
    ToolProgress(span="s", progress=1, message=BIG),
    StatePatch(patch=dict.fromkeys("abcdef", [1e15] * 30_000)),
    Custom(name=BIG, value=["é"] * 30_000),
]


@pytest.mark.parametrize("event", LARGEST, ids=lambda event: event.event)
async def test_no_event_takes_more_than_a_quarter_of_an_append(case: Case, event: AgentEvent) -> None:
    await case.recorder.record(1.0, event)
    assert len(case.bus.attempts[-1][0].data) <= APPEND_BYTES // 4


@pytest.mark.parametrize("away", [0, 3])
@pytest.mark.parametrize("high_water", [8, 1_000])
@pytest.mark.usefixtures("retry_at_once")
async def test_no_append_is_larger_than_a_mebibyte(case: Case, high_water: int, away: int) -> None:
    case.channel, case.bus.away = Channel(high_water=high_water), away
    async with case.recording() as channel:
        for n in range(200):
            await channel.send(ToolStart(span=str(n), tool="t", args=dict.fromkeys("abc", BIG)))
    log = await case.delivered((await case.bus.info(["r"]))["r"].head - 1)
    assert [item["span"] for item in log if item["event"] == "tool_start"] == [*map(str, range(200))]
    assert [(item["seq"], item["prev"]) for item in log] == [(n + 2, n + 1) for n in range(len(log))]
    assert max(append_size(batch) for batch in case.bus.attempts) <= APPEND_BYTES
    assert len(case.bus.attempts) - away < 100, "several to an append"


@pytest.mark.usefixtures("never_flush")
async def test_tokens_of_many_messages_are_flushed_in_parts(case: Case) -> None:
    async with case.recording() as channel:
        for n in range(40):
            await channel.send(MessageStart(message=str(n), span="s", field="f"))
            await channel.send(Token(message=str(n), delta="x"))
            await channel.send(Token(message=str(n), delta="y" * 60_000))
    await case.recorder.record(2.0, RunEnd(result=1, duration=1.0))
    assert max(append_size(batch) for batch in case.bus.attempts) <= APPEND_BYTES
    check_texts(await case.log())
    assert fold(await case.log()).encode() == case.recorder.state.encode()


async def test_a_part_of_a_batch_never_shows_the_status_after_it(case: Case) -> None:
    statuses: list[tuple[str, bool]] = []
    append = case.bus.append

    async def watched(run: str, fence: int, frames: Sequence[Frame], status: RunStatus) -> None:
        await append(run, fence, frames, status)
        info = (await case.bus.info([run]))[run]
        statuses.append((info.status, info.ended is not None))

    case.bus.append = watched  # type: ignore[method-assign]
    await case.recorder.record(1.0, RunStart(worker="w"))
    async with case.recording() as channel:
        for n in range(40):
            await channel.send(MessageStart(message=str(n), span="s", field="f"))
            await channel.send(Token(message=str(n), delta="x"))
            await channel.send(Token(message=str(n), delta="y" * 60_000))
        await anyio.wait_all_tasks_blocked()
        await case.recorder.record(2.0, CancelRequested())
    await case.recorder.record(2.0, RunEnd(result=1, duration=1.0))
    assert statuses[-1] == ("done", True)
    assert {ended for status, ended in statuses[:-1]} == {False}
    assert "done" not in {status for status, _ in statuses[:-1]}


@pytest.mark.usefixtures("retry_at_once")
async def test_a_log_that_is_lost_between_two_parts_is_rebased_once(case: Case) -> None:
    append = case.bus.append
    calls = 0

    async def losing(run: str, fence: int, frames: Sequence[Frame], status: RunStatus) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            del case.bus._logs[run]
        await append(run, fence, frames, status)

    case.bus.append = losing  # type: ignore[method-assign]
    events = [ToolStart(span=str(n), tool="t", args=dict.fromkeys("abc", BIG)) for n in range(20)]
    await case.recorder.record(1.0, *events)
    await case.recorder.record(2.0, RunEnd(result=1, duration=1.0))
    assert calls == 3
    info = (await case.bus.info(["r"]))["r"]
    assert (info.epoch, info.head, info.status) == (case.recorder.epoch, 22, "done")


async def test_log_that_is_not_what_the_owner_thinks_is_rebased(case: Case) -> None:
    await case.recorder.record(1.0, Status(message="kept"))
    log = case.bus._logs["r"]
    log.frames.pop()
    log.info = type(log.info)(**{name: getattr(log.info, name) for name in log.info.__slots__} | {"head": 1})

    await case.recorder.record(2.0, Status(message="new"), Status(message="newer"))

    assert case.recorder.epoch != "e"
    saved = await case.bus.load_snapshot("r")
    assert saved is not None
    assert (saved.epoch, saved.seq) == (case.recorder.epoch, 4)
    assert orjson.loads(saved.state)["status_message"] == "newer"
    assert (await case.bus.info(["r"]))["r"].head == 4
    assert case.mail.items[-1] == Head("r", case.recorder.epoch, 4)

    await case.recorder.record(3.0, RunEnd(result=None, duration=1.0))
    page = await case.bus.read("r", case.recorder.epoch, 4)
    assert page is not None
    assert [(frame.seq, frame.epoch) for frame in page.frames] == [(5, case.recorder.epoch)]


@pytest.mark.parametrize("rebased", [False, True])
async def test_verifying_a_log_that_is_whole_changes_nothing(case: Case, rebased: bool) -> None:
    await case.recorder.record(2.0, RunStart(worker="w"))
    if rebased:
        del case.bus._logs["r"]
        await case.recorder.verify()
    before = (await case.bus.info(["r"]))["r"]
    case.bus.away = 1
    await case.recorder.verify()
    assert (await case.bus.info(["r"]))["r"] == before
    assert case.recorder.epoch == before.epoch


async def test_verifying_a_log_that_is_lost_restores_it_where_it_was(case: Case) -> None:
    await case.recorder.record(2.0, RunStart(worker="w"))
    del case.bus._logs["r"]
    await case.recorder.verify()
    info = (await case.bus.info(["r"]))["r"]
    assert (info.epoch, info.head, info.agent, info.status) == (case.recorder.epoch, 2, "echo", "running")
    saved = await case.bus.load_snapshot("r")
    assert saved is not None
    assert (saved.seq, RunState.decode(saved.state).document) == (2, case.recorder.state.document)
    await case.recorder.record(3.0, RunEnd(result=1, duration=1.0))
    assert (await case.bus.info(["r"]))["r"].head == 3


@pytest.mark.usefixtures("retry_at_once")
async def test_rebase_is_retried_while_the_bus_is_away(case: Case) -> None:
    await case.bus.rebase("r", 1, 1, b"{}", "running")
    case.bus.away = 3

    await case.recorder.record(1.0, RunEnd(result=None, duration=1.0))

    info = (await case.bus.info(["r"]))["r"]
    assert (info.epoch, info.status) == (case.recorder.epoch, "done")
    assert info.ended is not None


@pytest.mark.parametrize(("claim", "error"), [(True, Fenced), (False, Ended)])
async def test_run_that_is_not_ours_any_more_is_not_written(case: Case, claim: bool, error: type[Exception]) -> None:
    if claim:
        await case.bus.claim("r")
    else:
        ending = Frame("r", "e", 2, b"{}", terminal=True)
        await case.bus.append("r", 1, [ending, Frame("r", "e", 3, b"{}", terminal=True)], "done")
        case.recorder._seq = 3

    with pytest.raises(error):
        await case.recorder.record(1.0, Status(message="x"))

    assert len(await case.log()) == (1 if claim else 3)


# -- Snapshots -----------------------------------------------------------------------------------------------------


async def test_snapshot_is_saved_as_the_log_grows_and_at_the_end(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SNAPSHOT_GROWTH", 2_000)
    for n in range(100):
        await case.recorder.record(float(n), Status(message=f"{n} " + "x" * 100))
        await case.save_due()
    await case.recorder.record(100.0, RunEnd(result=None, duration=1.0))
    await case.save_due()

    assert 5 <= len(case.bus.snapshots) <= 20
    assert case.bus.snapshots[-1].seq == 102
    for snapshot in case.bus.snapshots:
        assert snapshot.state == fold((await case.log())[: snapshot.seq]).encode()


async def test_large_states_are_saved_less_often(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear cost: a snapshot is saved when the log has grown by its size, so all together take what the log does."""
    monkeypatch.setattr(module, "SNAPSHOT_GROWTH", 1_000)
    for n in range(300):
        await case.recorder.record(float(n), ToolStart(span=str(n), tool="t", args={"x": "x" * 100}))
        await case.save_due()

    written = sum(len(snapshot.state) for snapshot in case.bus.snapshots)
    assert written <= 2 * sum(len(batch[0].data) for batch in case.bus.attempts) + 2_000
    assert len(case.bus.snapshots) >= 5


class SlowBus(FlakyBus):
    """Saves a snapshot once `go` is set; keeps what it is asked to save."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Snapshot] = []
        self.saving = 0
        self.go = anyio.Event()

    async def save_snapshot(self, fence: int, snapshot: Snapshot) -> None:
        self.asked.append(snapshot)
        self.saving += 1
        assert self.saving == 1, "one at a time"
        await self.go.wait()
        self.saving -= 1
        await super().save_snapshot(fence, snapshot)


async def test_no_append_waits_for_a_snapshot_and_the_newest_state_is_saved_next(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SNAPSHOT_GROWTH", 1)
    case.bus = case.recorder._bus = bus = SlowBus()
    first = case.recorder.first_frame(1.0, RunQueued(epoch="e", input={}))
    case.recorder._seq = 1
    await bus.create(NewRun(run="r", epoch="e", agent="echo", principal="ann", thread=None, created=1.0, first=first))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(case.snapshots.run)
        for n in range(20):
            await case.recorder.record(float(n), Status(message=str(n) * 100))
            await anyio.wait_all_tasks_blocked()
        assert (await bus.info(["r"]))["r"].head == 21
        assert [snapshot.seq for snapshot in bus.asked] == [2]
        assert not case.snapshots.saved.is_set()
        bus.go.set()
        with anyio.fail_after(5):
            await case.snapshots.saved.wait()
        assert [snapshot.seq for snapshot in bus.asked] == [2, 21]
        tasks.cancel_scope.cancel()


async def test_a_snapshot_never_says_more_than_the_log(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "APPEND_PATIENCE", 0.01)
    monkeypatch.setattr(module, "_RETRY_MOST", 0.01)
    await case.recorder.record(1.0, RunStart(worker="w"))
    case.bus.away = 1_000_000
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(case.recorder.record, 2.0, Status(message="not in the log yet"))
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(Unavailable):
            await case.recorder.save_snapshot()
        assert not case.bus.snapshots
        case.bus.away = 0
    await case.recorder.save_snapshot()
    assert [snapshot.seq for snapshot in case.bus.snapshots] == [3]


async def test_a_large_state_is_saved_in_slices_and_no_event_comes_between(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentcast.server.bus.slices.SLICE", 0.0)
    await case.recorder.record(1.0, *(StatePatch(patch={f"f{n}": n}) for n in range(50)))
    turns, saved = 0, len(case.bus.snapshots)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(case.recorder.save_snapshot)
        await checkpoint()
        tasks.start_soon(case.recorder.record, 2.0, StatePatch(patch={"f0": "new", "late": 1}))
        while len(case.bus.snapshots) == saved:
            await checkpoint()
            turns += 1

    (snapshot,) = case.bus.snapshots[saved:]
    document = orjson.loads(snapshot.state)
    assert turns > 50
    assert (snapshot.seq, document["state"]["f0"]) == (51, 0)
    assert "late" not in document["state"]


@pytest.mark.parametrize("error", [Fenced("r"), NotFound("r"), RuntimeError("broken"), Unavailable("away")])
@pytest.mark.usefixtures("retry_at_once")
async def test_a_snapshot_that_cannot_be_saved_holds_up_no_other(
    case: Case, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    other = await Case.make()
    other.recorder.run = "s"
    failures = [error] * 3

    async def fail(fence: int, snapshot: Snapshot) -> None:
        if failures:
            raise failures.pop()

    case.bus.save_snapshot = fail  # type: ignore[method-assign]
    for recorder in (case.recorder, other.recorder):
        case.snapshots.due(recorder)
    other.recorder.run = "r"
    await case.save_due()
    assert len(other.bus.snapshots) == 1
    assert len(failures) == (0 if isinstance(error, Unavailable) else 2)
    assert ("no snapshot of run r" in caplog.text) is isinstance(error, RuntimeError)


def fold(log: Sequence[dict[str, Any]]) -> RunState:
    state = RunState.new("r", "echo")
    for document in log:
        state.apply(document)
    return state


# -- Property ------------------------------------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "c"])
texts = st.text('ab é☃\\"\x00\ud800', max_size=6)
emissions = st.one_of(
    st.builds(MessageStart, message=names, span=st.just("s"), field=st.just("f")),
    st.builds(Token, message=names, delta=texts),
    st.builds(Token, message=names, delta=texts),
    st.builds(Token, message=names, delta=texts),
    st.builds(MessageEnd, message=names, text=texts),
    st.builds(MessageRetracted, message=names, reason=st.just("no")),
    st.builds(Status, message=texts),
    st.just(None),  # lets the recorder come to rest
)


@settings(deadline=None)
@given(emitted=st.lists(emissions, max_size=30), flush=st.sampled_from([0.0, NEVER]), away=st.integers(0, 2))
async def test_whatever_is_emitted_the_log_is_consistent(
    emitted: list[AgentEvent | None], flush: float, away: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FLUSH_AFTER", flush)
        patch.setattr(module, "_RETRY_FIRST", 0.0)
        case = await Case.make()
        case.bus.away = away
        async with case.recording() as channel:
            for event in emitted:
                if event is None:
                    for _ in range(10):
                        await checkpoint()
                else:
                    await channel.send(event)
    log = await case.log()

    assert [item["seq"] for item in log] == list(range(1, len(log) + 1))
    assert fold(log).encode() == case.recorder.state.encode()
    check_texts(log)


def check_texts(log: Sequence[dict[str, Any]]) -> None:
    """The text of each message is what its tokens said."""
    open: dict[str, str] = {}
    for item in log:
        match item["event"]:
            case "message_start":
                open[item["message"]] = ""
            case "token":
                open[item["message"]] += item["delta"]
            case "message_end":
                assert item["text"] == open.pop(item["message"])
            case "message_retracted":
                open.pop(item["message"], None)
