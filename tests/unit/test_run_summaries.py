"""What is published of a run while it is recorded: with the epoch and fence of now, and no end before it is logged."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import orjson
import pytest

from agentcast.agents.channel import Channel
from agentcast.agents.events import AgentEvent, Event, MessageStart, RunEnd, RunQueued, RunStart, Status, Token
from agentcast.server.bus.base import Bus, Frame, NewRun, Origin, Summary
from agentcast.server.bus.base import Status as RunStatus
from agentcast.server.bus.memory import MemoryBus
from agentcast.server.errors import HeadMismatch
from agentcast.server.runs.ownership import end_orphans
from agentcast.server.runs.publisher import SummaryPublisher
from agentcast.server.runs.recorder import Recorder
from agentcast.server.runs.snapshots import Snapshots
from tests.contract.support import Summaries

END = RunEnd(result=1, duration=1.0)
TOKENS = [Token(message="m", delta="x"), Token(message="m", delta="y")]


class Case:
    """A run that is recorded, and the summaries of it."""

    def __init__(self, bus: Bus, summaries: SummaryPublisher) -> None:
        self.bus = bus
        self.summaries = summaries
        self.watched = Summaries()

    async def create(self, run: str = "r") -> Recorder:
        origin = Origin("echo", "ann", "t", 1.0)
        recorder = Recorder(self.bus, run, origin, "e", snapshots=Snapshots(), summaries=self.summaries)
        first = recorder.first_frame(1.0, RunQueued(epoch="e", input={"q": 1}))
        new = NewRun(run=run, epoch="e", agent="echo", principal="ann", thread="t", created=1.0, first=first)
        created = await self.bus.create(new)
        assert created.fence is not None
        recorder.begin(created.fence)
        return recorder

    async def stored(self, run: str = "r") -> Summary:
        return (await self.bus.summaries([run]))[run]

    async def record(self, recorder: Recorder, *events: Event) -> dict[str, Any]:
        """Record events; the record that is stored of them."""
        await recorder.record(2.0, *events)
        await self.summaries.drain()
        document: dict[str, Any] = orjson.loads((await self.stored(recorder.run)).data)
        return document


@asynccontextmanager
async def publishing(bus: Bus | None = None) -> AsyncIterator[Case]:
    bus = bus or MemoryBus()
    case = Case(bus, SummaryPublisher(bus))
    await bus.watch_summaries(case.watched.deliver)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(case.summaries.run)
            yield case
            tasks.cancel_scope.cancel()


async def test_created_run_is_published_with_all_that_serves_routing() -> None:
    async with publishing() as case:
        recorder = await case.create()
        await case.summaries.drain()

        assert await case.stored() == Summary(
            run="r",
            epoch="e",
            seq=1,
            fence=recorder.fence,
            principal="ann",
            agent="echo",
            thread="t",
            status="queued",
            created=1.0,
            data=(await case.stored()).data,
        )


async def test_record_follows_the_log() -> None:
    async with publishing() as case:
        recorder = await case.create()

        document = await case.record(recorder, RunStart(worker="w"), Status(message="one"))
        assert (document["status"], document["status_message"], document["counts"]["events"]) == ("running", "one", 3)
        document = await case.record(recorder, END)
        assert (document["status"], document["counts"]["events"], (await case.stored()).status) == ("done", 4, "done")


async def test_tokens_publish_nothing_but_are_counted() -> None:
    async with publishing() as case:
        recorder, channel = await case.create(), Channel()
        await case.summaries.drain()
        made = len(case.watched.items)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(recorder.record_from, channel)
            events: list[AgentEvent] = [MessageStart(message="m", span="s", field="f"), *TOKENS]
            for event in events:
                await channel.send(event)
            channel.close()

        assert case.summaries.published.is_set()
        assert len(case.watched.items) == made
        document = await case.record(recorder, Status(message="x"))
        assert document["counts"]["events"] == (await case.bus.info(["r"]))["r"].head > 4


class Holding(MemoryBus):
    """Holds appends while `gate` is not set; takes no log for what it was if `lost`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = anyio.Event()
        self.gate.set()
        self.asked = anyio.Event()
        self.lost = False

    async def append(self, run: str, fence: int, frames: Sequence[Frame], status: RunStatus) -> None:
        self.asked.set()
        await self.gate.wait()
        if self.lost:
            self.lost = False
            raise HeadMismatch(run, "e", 0)
        await super().append(run, fence, frames, status)


async def test_end_is_not_published_before_it_is_in_the_log() -> None:
    bus = Holding()
    async with publishing(bus) as case, anyio.create_task_group() as tasks:
        recorder = await case.create()
        await case.summaries.drain()
        bus.gate = anyio.Event()
        tasks.start_soon(recorder.record, 2.0, END)
        await bus.asked.wait()
        case.summaries.due(recorder)
        await case.summaries.drain()
        assert (await case.stored()).status == "queued"
        bus.gate.set()
        await anyio.wait_all_tasks_blocked()
        await case.summaries.drain()

        assert (await case.stored()).status == "done"


async def test_records_are_of_the_epoch_after_a_rebase() -> None:
    bus = Holding()
    async with publishing(bus) as case:
        recorder = await case.create()
        await case.record(recorder, RunStart(worker="w"))
        bus.lost = True
        document = await case.record(recorder, Status(message="after"))

        assert (await case.stored()).epoch == recorder.epoch != "e"
        assert document["status_message"] == "after"


async def test_rebase_by_itself_publishes_a_record_of_the_new_epoch() -> None:
    bus = Holding()
    async with publishing(bus) as case:
        recorder = await case.create()
        await case.record(recorder, RunStart(worker="w"))
        bus.lost = True
        await recorder.verify()
        await case.summaries.drain()

        assert (await case.stored()).epoch == recorder.epoch != "e"


class Orphaning(MemoryBus):
    """Names runs as orphans, once."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[str] = []

    async def orphans(self, mine: Any) -> Sequence[str]:
        left, self.left = self.left, []
        return left


async def test_run_that_is_ended_as_an_orphan_has_a_last_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentcast.server.runs.ownership.CHECK_EVERY", 0.0)
    bus = Orphaning()
    async with publishing(bus) as case, anyio.create_task_group() as tasks:
        recorder = await case.create()
        await case.record(recorder, RunStart(worker="w"), Status(message="working"))
        fence = recorder.fence
        bus.left = ["r"]
        tasks.start_soon(end_orphans, bus, {}, Snapshots(), case.summaries)
        await case.watched.until(lambda items: any(item and item.status == "failed" for item in items))
        tasks.cancel_scope.cancel()

        stored = await case.stored()
        assert (stored.fence, stored.thread, stored.principal) == (fence + 1, "t", "ann")
        document = orjson.loads(stored.data)
        assert (document["error"]["code"], document["status_message"]) == ("worker_lost", "working")
