"""One random sequence of faults, under a seed, while runs stream to clients; and what must be true afterwards."""

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx

from tests.faults.chaos.faults import ALL, OF_HUBS
from tests.faults.chaos.viewer import Viewer
from tests.faults.chaos.world import open_world
from tests.support.waiting import PATIENCE


@dataclass
class Story:
    """`runs` runs, started over the first half of `faults` faults, and about as many clients as `clients`."""

    seed: int
    runs: int = 50
    clients: int = 50
    faults: int = 6
    happened: list[str] = field(default_factory=list)
    """What has happened."""
    outcomes: Counter[str] = field(default_factory=Counter)

    async def play(self) -> None:
        """:raises AssertionError: a guarantee was broken."""
        self._rng = random.Random(self.seed)
        self._started: dict[str, str] = {}
        self._cancelled: set[str] = set()
        self._viewers: list[Viewer] = []
        async with open_world(replica=True) as world, anyio.create_task_group() as tasks:
            self._world = world
            self._tasks = tasks
            for _ in range(max(2, self.clients // 3)):
                self._add_viewer()
            for viewer in self._viewers:
                await viewer.following.wait()
            async with anyio.create_task_group() as starting:
                starting.start_soon(self._start_runs)
                await self._do_harm()
            await world.ready()
            await self._check()
            tasks.cancel_scope.cancel()

    # -- What happens ------------------------------------------------------------------------------------------------

    def _add_viewer(self, *runs: str) -> None:
        rng = random.Random(self._rng.random())
        viewer = Viewer(
            self._world,
            rng,
            detail=rng.choice(["full", "full", "progress"]),
            runs=runs or None,
            life=rng.choice([None, 1.0, 10.0]),
        )
        self._viewers.append(viewer)
        self._tasks.start_soon(viewer.run)

    async def _start_runs(self) -> None:
        rng = random.Random(self._rng.random())
        for number in range(self.runs):
            quick = number % 10 == 0
            input = {"steps": rng.randint(5, 20), "tokens": 5, "pause": rng.uniform(0.1, 0.4)}
            input = {"steps": 200, "tokens": 5, "pause": 0.01} if quick else input
            run = await self._start(f"key {number}", input, rng)
            self._started[run] = f"key {number}"
            if len(self._viewers) < self.clients:
                self._add_viewer(run)
            if number % 10 == 5:
                self._tasks.start_soon(self._cancel, run, rng.uniform(0.0, 3.0))
            await anyio.sleep(rng.uniform(0.0, 0.3))

    async def _start(self, key: str, input: dict[str, Any], rng: random.Random) -> str:
        """Start a run, as often as it takes: the key sees to it that it is one."""
        document = {"agent": "teller", "input": input, "key": key}
        while True:
            hub = rng.choice(self._world.hubs)
            try:
                reply = await self._world.http.post(f"{hub.url}/v1/runs", json=document, timeout=5.0)
            except httpx.TransportError:
                await anyio.sleep(0.2)
                continue
            if reply.status_code == 200:
                run: str = reply.json()["run"]
                return run
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable"), reply.text
            await anyio.sleep(rng.uniform(0.2, 1.0))

    async def _cancel(self, run: str, after: float) -> None:
        await anyio.sleep(after)
        self._cancelled.add(run)
        try:
            await self._world.http.post(f"{self._world.hubs[-1].url}/v1/runs/{run}/cancel", timeout=5.0)
        except httpx.TransportError:
            pass  # whether it has come through, the checks find out

    async def _do_harm(self) -> None:
        for fault in self._rng.choices(ALL, k=self.faults):
            await anyio.sleep(self._rng.uniform(0.0, 3.0))
            self.happened.append(fault.__name__)
            await fault(self._world, random.Random(self._rng.random()))

    # -- What must be true -------------------------------------------------------------------------------------------

    async def _check(self) -> None:
        world = self._world
        final = await world.final(list(self._started))
        for run, snapshot in final.items():
            self._check_run(run, snapshot)
        for viewer in self._viewers:
            await self._check_seen(viewer, final)
        for viewer in self._viewers:
            if viewer.runs is None:
                await self._check_after_return(viewer, final)
        self._check_ends()

    def _check_run(self, run: str, snapshot: dict[str, Any] | None) -> None:
        """G2, G5, G7: a run is what its agent has emitted, all of it if it was done."""
        if snapshot is None:
            assert self._world.history, f"run {run} is gone, and no Redis has lost anything"
            self.outcomes["gone"] += 1
            return
        state, journal = snapshot["state"], self._world.journal(run)
        outcome = state["error"]["code"] if state["status"] == "failed" else state["status"]
        self.outcomes[outcome] += 1
        journal.check(state, whole=outcome == "done")
        for message in state["messages"]:
            assert message["status"] != "open", state
        match outcome:
            case "done":
                assert journal.returned
            case "cancelled":
                assert run in self._cancelled
            case "worker_lost":
                hurt = self._world.history or any(fault.__name__ in self.happened for fault in OF_HUBS)
                assert hurt or not journal.events, f"run {run} was taken for dead, and its hub was well all the time"
            case _:
                raise AssertionError(f"run {run} ended as {outcome}")

    async def _check_seen(self, viewer: Viewer, final: dict[str, Any]) -> None:
        """G1, G2, G10: what a viewer was shown adds up to the final state.

        Where Redis has lost some of what it held, a run that had ended may be lost, or, with its end missing, be ended
        once more (`worker_lost`: who executed it is done with it). A client that has seen the first end need not see
        the second before it comes back.
        """
        lossy = self._world.history > 0
        wanted = list(viewer.runs or final)
        if lossy:
            wanted = [run for run in wanted if run in viewer.memory.views or run in viewer.gone]
        else:
            assert not viewer.gone, f"a viewer learned that {viewer.gone} do not exist"
            assert viewer.feed_recovered
        await viewer.has_ended(wanted, PATIENCE)
        for run in wanted:
            snapshot, view = final[run], viewer.memory.views.get(run)
            if snapshot is None or view is None:
                assert lossy
            elif view.epoch == snapshot["epoch"]:
                viewer.check(run, snapshot)
            else:
                assert lossy, f"run {run}: a viewer ended in epoch {view.epoch}, not in {snapshot['epoch']}"

    async def _check_after_return(self, viewer: Viewer, final: dict[str, Any]) -> None:
        """Who comes back with all positions is brought to the final state, whatever was lost."""
        await viewer.come_back()
        for run, view in list(viewer.memory.views.items()):
            snapshot = final.get(run)
            if snapshot is not None:
                await viewer.has_seen(run, snapshot["seq"], snapshot["epoch"])
                viewer.check(run, snapshot)
            elif run in final:
                raise AssertionError(f"a viewer that came back did not learn that {run} is gone: {view.position}")

    def _check_ends(self) -> None:
        """G7: one end, and one more at most for each time that Redis has lost some of what it held."""
        ends: dict[str, set[str]] = {}
        for viewer in self._viewers:
            for run, event in viewer.ends:
                ends.setdefault(run, set()).add(json.dumps(event, sort_keys=True))
        for run, events in ends.items():
            assert len(events) <= 1 + self._world.history, f"run {run} has ended more than once: {events}"
