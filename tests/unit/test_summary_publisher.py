"""Publishing summaries: in rounds, latest wins, the first and the last always, nothing without a bound."""

import itertools
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest

from agentcast.server.bus.base import Summary
from agentcast.server.bus.memory import MemoryBus
from agentcast.server.errors import Unavailable
from agentcast.server.runs import publisher as module
from agentcast.server.runs.publisher import SummaryPublisher
from tests.contract.support import Log, Summaries, summary


class Bus(MemoryBus):
    """Notes what is published, and when; waits for `gate`, is away while `away`, broken for one call if `broken`."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.broken = False
        self.asked = anyio.Event()
        self.refused = anyio.Event()
        self.gate = anyio.Event()
        self.gate.set()
        self.times: dict[str, list[float]] = {}
        self.parts: list[int] = []

    async def publish_summaries(self, records: Sequence[Summary]) -> None:
        self.asked.set()
        await self.gate.wait()
        if self.away:
            self.refused.set()
            raise Unavailable("away")
        if self.broken:
            self.broken = False
            raise RuntimeError("broken")
        self.parts.append(len(records))
        for record in records:
            self.times.setdefault(record.run, []).append(anyio.current_time())
        await super().publish_summaries(records)


class Run:
    """A run whose summary is after event `seq`."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.run = log.run
        self.seq = 1
        self.made = 0

    def summarise(self) -> Summary:
        self.made += 1
        return summary(self.log, self.seq)


class Case:
    def __init__(self, bus: Bus, publisher: SummaryPublisher, watched: Summaries) -> None:
        self.bus = bus
        self.publisher = publisher
        self.watched = watched

    async def make(self) -> Run:
        return Run(await Log.create(self.bus))

    async def published(self, run: Run) -> list[int]:
        return [record.seq for record in self.watched.items if record is not None and record.run == run.run]


@asynccontextmanager
async def publishing() -> AsyncIterator[Case]:
    bus, watched = Bus(), Summaries()
    await bus.watch_summaries(watched.deliver)
    publisher = SummaryPublisher(bus)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(publisher.run)
            yield Case(bus, publisher, watched)
            tasks.cancel_scope.cancel()


@pytest.fixture
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0.0)
    monkeypatch.setattr(module, "_RETRY", 0.0)


async def test_first_record_goes_at_once_and_the_newest_of_many_in_the_next_round() -> None:
    async with publishing() as case:
        run = await case.make()
        case.publisher.due(run)
        await case.watched.take(1)
        for run.seq in range(2, 50):
            case.publisher.due(run)
            await anyio.wait_all_tasks_blocked()
        await case.publisher.published.wait()

        assert await case.published(run) == [1, 49]
        assert run.made == 2


async def test_a_run_is_published_four_times_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0.05)
    async with publishing() as case:
        runs = [await case.make() for _ in range(3)]
        while len(case.watched.items) < 15:
            for run in runs:
                run.seq += 1
                case.publisher.due(run)
            await anyio.sleep(0.002)  # events that come all the time

        for run in runs:
            times = case.bus.times[run.run]
            assert min(after - before for before, after in itertools.pairwise(times)) >= 0.05
    monkeypatch.undo()
    assert module.EVERY >= 1 / 4


async def test_last_record_is_that_of_the_end_and_nothing_keeps_the_run() -> None:
    async with publishing() as case:
        run = await case.make()
        case.publisher.due(run)
        await case.watched.take(1)
        run.seq = 2
        case.publisher.due(run)
        run.seq = 3
        case.publisher.ended(run)
        run.seq = 99
        await case.publisher.published.wait()

        assert await case.published(run) == [1, 3]


@pytest.mark.usefixtures("short_rounds")
async def test_bus_that_is_away_gets_the_newest_record_and_the_last_ones_once_it_is_back() -> None:
    async with publishing() as case:
        case.bus.away = True
        active, ended = await case.make(), await case.make()
        case.publisher.due(active)
        case.publisher.ended(ended)
        await case.bus.asked.wait()
        for active.seq in range(2, 9):
            case.bus.asked = anyio.Event()
            await case.bus.asked.wait()
        assert case.watched.items == []
        case.bus.away = False
        await case.publisher.published.wait()

        assert await case.published(active) == [8]
        assert await case.published(ended) == [1]


@pytest.mark.usefixtures("short_rounds")
async def test_record_that_the_bus_refused_is_published_later_though_nothing_changed() -> None:
    async with publishing() as case:
        case.bus.away = True
        run = await case.make()
        case.publisher.due(run)
        await case.bus.refused.wait()
        case.bus.away = False
        await case.publisher.published.wait()

        assert await case.published(run) == [1]


@pytest.mark.usefixtures("short_rounds")
async def test_run_that_ends_while_the_bus_is_away_has_its_last_record_published_once() -> None:
    async with publishing() as case:
        case.bus.away, case.bus.gate = True, anyio.Event()
        run = await case.make()
        case.publisher.due(run)
        await case.bus.asked.wait()
        run.seq = 5
        case.publisher.ended(run)
        case.bus.gate.set()
        case.bus.asked = anyio.Event()
        await case.bus.asked.wait()
        case.bus.away = False
        await case.publisher.published.wait()

        assert await case.published(run) == [5]


@pytest.mark.usefixtures("short_rounds")
async def test_last_records_that_wait_are_bounded_and_what_is_lost_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_ENDED", 3)
    async with publishing() as case:
        case.bus.away = True
        runs = [await case.make() for _ in range(5)]
        with caplog.at_level(logging.WARNING):
            for run in runs:
                case.publisher.ended(run)
        case.bus.away = False
        await case.publisher.published.wait()

        assert {record.run for record in case.watched.items if record} == {run.run for run in runs[2:]}
        assert case.publisher.lost == 2
        assert len(caplog.records) == 1


@pytest.mark.usefixtures("short_rounds")
async def test_what_cannot_be_published_harms_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Run):
        def summarise(self) -> Summary:
            raise TypeError("no")

    async with publishing() as case:
        broken, run = Broken(await Log.create(case.bus)), await case.make()
        case.bus.broken = True
        with caplog.at_level(logging.ERROR):
            case.publisher.due(broken)
            case.publisher.due(run)
            await case.publisher.published.wait()
            assert await case.published(run) == []
            case.publisher.due(run)
            await case.publisher.published.wait()

        assert await case.published(run) == [1]
        assert "cannot be summarised" in caplog.text


@pytest.mark.usefixtures("short_rounds")
async def test_forgotten_run_is_not_published() -> None:
    async with publishing() as case:
        run = await case.make()
        case.publisher.due(run)
        case.publisher.forget(run.run)
        await case.publisher.published.wait()

        assert run.made == 0


async def test_thousands_of_runs_are_published_in_slices_and_others_get_their_turn() -> None:
    async with publishing() as case:
        runs = [await case.make() for _ in range(2_000)]
        for run in runs:
            case.publisher.due(run)
        turns = 0
        while not case.publisher.published.is_set():
            await anyio.lowlevel.checkpoint()
            turns += 1

        assert max(case.bus.parts) <= module.SLICE
        assert turns >= 2_000 / module.SLICE
        assert len(case.watched.items) == 2_000


async def test_draining_does_not_wait_for_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 1_000.0)
    async with publishing() as case:
        run = await case.make()
        case.publisher.due(run)
        await case.publisher.published.wait()
        run.seq = 2
        case.publisher.ended(run)
        await case.publisher.drain()

        assert await case.published(run) == [1, 2]
