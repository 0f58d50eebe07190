"""Faults of Redis and of hubs, one at a time: nothing is lost, and every client learns of it (G1, G2, G5, G7, G10).

Ten runs stream on one hub. They are followed on both, by clients of all kinds.
"""

import random
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio

from tests.faults.chaos.viewer import Viewer
from tests.faults.chaos.world import World, open_world
from tests.support.process import ServedHub
from tests.support.waiting import PATIENCE, eventually, until

RUNS = 10
UNPAUSED: dict[str, Any] = {"steps": 2_000, "tokens": 200, "pause": 0}
"""An agent that is slowed down by nothing but the hub."""


@dataclass
class Scene:
    """Some runs of the first hub, and who watches."""

    world: World
    runs: list[str]
    viewers: list[Viewer]

    @property
    def here(self) -> ServedHub:
        return self.world.hubs[0]

    async def check(self) -> dict[str, dict[str, Any]]:
        """Everybody has seen every run end, and has the same of it. Gives the final snapshots."""
        final = await self.world.final(self.runs)
        snapshots = {run: snapshot for run, snapshot in final.items() if snapshot is not None}
        assert snapshots.keys() == set(self.runs)
        for viewer in self.viewers:
            await viewer.has_ended([run for run in self.runs if viewer.runs in (None, [run])], PATIENCE)
        for viewer in self.viewers:
            for run, snapshot in snapshots.items():
                if viewer.runs in (None, [run]):
                    viewer.check(run, snapshot)
        return snapshots

    async def check_done(self) -> None:
        """The same, and each run has been done to its end."""
        for run, snapshot in (await self.check()).items():
            assert snapshot["state"]["status"] == "done", snapshot
            self.world.journal(run).check(snapshot["state"], whole=True)


@asynccontextmanager
async def open_scene(
    *options: str, agent: str = "teller", runs: int = RUNS, replica: bool = False, **input: Any
) -> AsyncIterator[Scene]:
    """The runs go on, and the viewers follow them, when this begins."""
    rng = random.Random(1)
    async with open_world(*options, replica=replica) as world, anyio.create_task_group() as tasks:
        here, there = world.hubs
        viewers = [
            Viewer(world, rng, hub=here),
            Viewer(world, rng, hub=there),
            Viewer(world, rng, hub=there, detail="progress"),
            Viewer(world, rng, life=1.0),
        ]
        started = [await world.start(agent, here, **input) for _ in range(runs)]
        viewers += [Viewer(world, rng, hub=there, runs=[run]) for run in started[:3]]
        for viewer in viewers:
            tasks.start_soon(viewer.run)
        for viewer in viewers:
            await viewer.following.wait()
        for run in started:
            await world.emitted(run, 1 if agent == "waiter" else 20)
        yield Scene(world, started, viewers)
        tasks.cancel_scope.cancel()


def degraded(viewers: Sequence[Viewer]) -> list[bool]:
    """Whether each viewer has received a ping that reports a degraded hub."""
    return [any("degraded" in ping for ping in viewer.pings) for viewer in viewers]


async def refused_within(scene: Scene, seconds: float) -> float:
    """A command to each hub is answered as unavailable; gives how long it took at most."""
    slowest = 0.0
    for hub in scene.world.hubs:
        asked_at = time.monotonic()
        reply = await scene.world.http.post(f"{hub.url}/v1/runs", json={"agent": "teller", "input": {}})
        slowest = max(slowest, time.monotonic() - asked_at)
        assert (reply.status_code, reply.json()["error"]["retryable"]) == (503, True), reply.text
    assert slowest < seconds
    return slowest


async def test_redis_killed_and_restarted_with_its_data_loses_nothing() -> None:
    async with open_scene(steps=30) as scene:
        connections = [viewer.connections for viewer in scene.viewers[:3]]
        scene.world.redis.kill()
        await refused_within(scene, 5)
        await until(lambda: all(degraded(scene.viewers[:3])))
        scene.world.redis.start()
        await scene.world.ready()
        await scene.check_done()
        assert [viewer.connections for viewer in scene.viewers[:3]] == connections, "clients keep their connections"
        assert not any(view.snapshots for view in scene.viewers[0].memory.views.values() if len(view.snapshots) > 1)


async def test_redis_back_but_empty_is_given_the_runs_by_their_owners() -> None:
    async with open_scene(steps=30) as scene:
        scene.world.empty_redis()
        await scene.world.ready()
        await scene.check_done()
        reasons = {gap["reason"] for view in scene.viewers[1].memory.views.values() for gap in view.gaps}
        assert reasons == {"log_lost"}


async def test_runs_that_say_nothing_are_restored_in_an_empty_redis_too() -> None:
    async with open_scene(agent="waiter") as scene:
        scene.world.empty_redis()
        await scene.world.ready()
        for run in scene.runs:
            assert await scene.world.state(run) is not None
        for number, run in enumerate(scene.runs):
            await scene.world.cancel(scene.world.hubs[number % 2], run)
        for snapshot in (await scene.check()).values():
            assert snapshot["state"]["status"] == "cancelled"


async def test_redis_stopped_for_ten_seconds_loses_nothing_and_no_live_run_is_taken_for_dead() -> None:
    async with open_scene(steps=30) as scene:
        scene.world.redis.pause()
        await anyio.sleep(3)
        await refused_within(scene, 5)
        await anyio.sleep(7)
        scene.world.redis.resume()
        await scene.check_done()
        assert all(degraded(scene.viewers[:3]))


async def test_killed_subscriptions_lose_nothing() -> None:
    async with open_scene(steps=30) as scene:
        for _ in range(3):
            scene.world.redis.do("CLIENT", "KILL", "TYPE", "pubsub")
            await anyio.sleep(0.3)
        await scene.check_done()


async def test_paused_clients_of_redis_lose_nothing() -> None:
    async with open_scene(steps=30) as scene:
        scene.world.redis.do("CLIENT", "PAUSE", 6_000)
        await anyio.sleep(1)
        await refused_within(scene, 5)
        await scene.check_done()


async def test_a_full_redis_holds_the_agents_and_takes_no_commands_until_there_is_room() -> None:
    async with open_scene(steps=30) as scene:
        scene.world.redis.do("CONFIG", "SET", "maxmemory", 1)
        await refused_within(scene, 5)
        for hub in scene.world.hubs:
            asked_at = time.monotonic()
            reply = await scene.world.http.post(f"{hub.url}/v1/runs/{scene.runs[0]}/cancel")
            assert reply.status_code == 503, reply.text
            assert time.monotonic() - asked_at < 5
        await until(lambda: all(degraded(scene.viewers[:3])))
        assert any("maxmemory" in ping.get("degraded", "") for ping in scene.viewers[0].pings)
        scene.world.redis.do("CONFIG", "SET", "maxmemory", 0)
        for run, snapshot in (await scene.check()).items():
            wanted = "cancelled" if run == scene.runs[0] else "done"
            assert snapshot["state"]["status"] == wanted, snapshot
            scene.world.journal(run).check(snapshot["state"], whole=wanted == "done")


async def test_a_promoted_replica_that_misses_the_last_second_is_brought_up_to_date() -> None:
    async with open_scene(steps=40, replica=True) as scene:
        await scene.world.promote(missing=1.0)
        await scene.check_done()
        lost = {gap["reason"] for view in scene.viewers[1].memory.views.values() for gap in view.gaps}
        assert lost == {"log_lost"}


async def test_the_runs_of_a_killed_hub_are_ended_by_another() -> None:
    async with open_scene(steps=500) as scene:
        here, there = scene.world.hubs
        for viewer in scene.viewers:
            viewer.hub = there
        killed_at = time.time()
        await scene.world.kill_hub(here)
        for run, snapshot in (await scene.check()).items():
            state = snapshot["state"]
            assert (state["error"]["code"], state["error"]["retryable"]) == ("worker_lost", True)
            assert state["ended"] - killed_at < 20
            scene.world.journal(run).check(state, whole=False)


async def test_what_a_hub_does_after_it_was_taken_for_dead_is_refused() -> None:
    async with open_scene(steps=150) as scene:
        here, there = scene.world.hubs
        here.signal(signal.SIGSTOP)
        try:

            async def all_ended() -> bool:
                return not await scene.world.active(there)

            await eventually(all_ended)
        finally:
            here.signal(signal.SIGCONT)
        for run, snapshot in (await scene.check()).items():
            assert snapshot["state"]["error"]["code"] == "worker_lost"
            scene.world.journal(run).check(snapshot["state"], whole=False)

        async def all_dropped() -> bool:
            ready = await scene.world.get(here, "/readyz")
            return ready is not None and ready["runs"] == 0

        await eventually(all_dropped)


async def test_an_agent_is_held_while_redis_is_away() -> None:
    async with open_scene(runs=2, **UNPAUSED) as scene:
        world = scene.world
        world.redis.kill()
        await refused_within(scene, 5)
        for run in scene.runs:
            await world.at_rest(run)
        held = [world.journal(run) for run in scene.runs]
        await anyio.sleep(2)
        for run, journal in zip(scene.runs, held, strict=True):
            assert not journal.returned
            assert world.journal(run).events == journal.events, "an agent goes on, though nothing can take its events"
            assert len(journal.events) - journal.sent <= 1
        world.redis.start()
        for run, journal in zip(scene.runs, held, strict=True):
            await world.emitted(run, len(journal.events) + 1)
            await world.cancel(scene.here, run)
        for run, snapshot in (await scene.check()).items():
            assert snapshot["state"]["status"] == "cancelled"
            world.journal(run).check(snapshot["state"], whole=False)
