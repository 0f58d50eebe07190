"""Saving snapshots: what waits to be saved is bounded."""

import anyio
import pytest

from agentcast.server.errors import Unavailable
from agentcast.server.runs import snapshots as module
from agentcast.server.runs.snapshots import Snapshots


class Run:
    def __init__(self, number: int, saved: list[int]) -> None:
        self.run = f"r{number}"
        self.number = number
        self.away = False
        self._saved = saved

    async def save_snapshot(self) -> None:
        if self.away:
            self.away = False
            raise Unavailable("away")
        self._saved.append(self.number)


async def test_snapshots_that_wait_are_bounded_and_the_newest_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DUE", 3)
    monkeypatch.setattr(module, "_RETRY", 0.0)
    snapshots, saved = Snapshots(), list[int]()
    runs = [Run(number, saved) for number in range(5)]
    for run in [*runs, runs[3]]:
        snapshots.due(run)
    runs[2].away = True
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(snapshots.run)
            await snapshots.saved.wait()
            tasks.cancel_scope.cancel()

    assert saved == [3, 4, 2]
