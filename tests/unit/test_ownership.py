"""Runs whose process is gone are ended: several at once, each apart from the others (G7)."""

import logging
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager

import anyio
import orjson
import pytest

from agentcast.agents.events import RunQueued
from agentcast.server.bus.base import NewRun, Origin, RunInfo
from agentcast.server.bus.memory import MemoryBus
from agentcast.server.errors import Unavailable
from agentcast.server.runs import ownership as module
from agentcast.server.runs.publisher import SummaryPublisher
from agentcast.server.runs.recorder import Recorder
from agentcast.server.runs.snapshots import Snapshots


class Bus(MemoryBus):
    """Names the runs in `left` that have not ended as orphans. Claims of `stuck` runs never return, those of `broken`
    ones raise, and all of them wait for `gate`."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[str] = []
        self.stuck: set[str] = set()
        self.broken: dict[str, Exception] = {}
        self.gate = anyio.Event()
        self.gate.set()
        self.claims: list[str] = []
        self.checks = 0

    async def orphans(self, mine: Collection[str]) -> Sequence[str]:
        self.checks += 1
        if self.checks == 1:
            raise Unavailable("away")
        return [run for run in self.left if (await self.info([run]))[run].ended is None]

    async def claim(self, run: str) -> int:
        self.claims.append(run)
        await self.gate.wait()
        if run in self.stuck:
            await anyio.sleep_forever()
        if run in self.broken:
            raise self.broken[run]
        return await super().claim(run)

    async def leave(self, count: int) -> list[str]:
        """Runs of a process that is gone."""
        summaries = SummaryPublisher(self)
        for number in range(count):
            run, origin = f"r{number}", Origin("echo", "ann", None, 1.0)
            recorder = Recorder(self, run, origin, "e", snapshots=Snapshots(), summaries=summaries)
            first = recorder.first_frame(1.0, RunQueued(epoch="e", input={}))
            await self.create(
                NewRun(run=run, epoch="e", agent="echo", principal="ann", thread=None, created=1.0, first=first)
            )
            self.left.append(run)
        return self.left

    async def ended(self, runs: Collection[str]) -> dict[str, RunInfo]:
        """Wait until the runs have ended."""
        while any(info.ended is None for info in (await self.info(runs)).values()):
            await anyio.lowlevel.checkpoint()
        return await self.info(runs)


@asynccontextmanager
async def ending(bus: Bus) -> AsyncIterator[None]:
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(module.end_orphans, bus, {}, Snapshots(), SummaryPublisher(bus))
            yield
            tasks.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def check_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECK_EVERY", 0.0)


async def test_orphans_are_ended_as_lost_by_their_worker() -> None:
    bus = Bus()
    runs = await bus.leave(20)
    async with ending(bus):
        infos = await bus.ended(runs)

    assert {info.status for info in infos.values()} == {"failed"}
    ends = await bus.read_ends(runs)
    assert {orjson.loads(end.last or b"")["error"]["code"] for end in ends.values()} == {"worker_lost"}


async def test_so_many_orphans_are_ended_at_once_and_no_more() -> None:
    bus = Bus()
    bus.gate = anyio.Event()
    runs = await bus.leave(3 * module.AT_ONCE)
    async with ending(bus):
        while bus.checks < 10:
            await anyio.lowlevel.checkpoint()
        assert len(bus.claims) == len(set(bus.claims)) == module.AT_ONCE
        bus.gate.set()
        await bus.ended(runs)

    assert sorted(bus.claims) == sorted(runs)


async def test_orphans_that_cannot_be_ended_hold_up_no_other(caplog: pytest.LogCaptureFixture) -> None:
    bus = Bus()
    stuck, broken, away, *others = await bus.leave(20)
    bus.stuck = {stuck}
    bus.broken = {broken: RuntimeError("unreadable"), away: Unavailable("away")}
    async with ending(bus):
        with caplog.at_level(logging.ERROR):
            await bus.ended(others)
        while bus.claims.count(away) < 3:
            await anyio.lowlevel.checkpoint()
        del bus.broken[away]
        await bus.ended([away])
        late = bus.checks
        while bus.checks < late + 5:
            await anyio.lowlevel.checkpoint()

    assert bus.claims.count(broken) == 1, "what cannot be read is not read again and again"
    assert bus.claims.count(stuck) == 1
    assert [record.args for record in caplog.records if record.levelno == logging.ERROR] == [(broken,)]
