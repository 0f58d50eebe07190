"""Two hubs over one Redis: to a client it makes no difference which one it asks (G1, G2, G6, G7, G10)."""

from collections.abc import AsyncIterator

import anyio
import pytest

from tests.faults.chaos.world import World, open_world
from tests.support.client import Memory


@pytest.fixture(scope="module")
async def world() -> AsyncIterator[World]:
    async with open_world() as world:
        yield world


async def test_a_run_started_on_one_hub_is_watched_live_on_the_other(world: World) -> None:
    here, there = world.hubs
    async with here.client() as starter, there.client() as watcher:
        await watcher.follow_all()
        run = await starter.start("teller", {"steps": 4})
        seen, own = await watcher.view(run), await starter.view(run)
        assert seen.texts == own.texts
        assert not seen.snapshots
        assert seen.document == (await world.final([run]))[run]["state"]  # type: ignore[index]
        world.journal(run).check(seen.document, whole=True)


async def test_who_joins_late_on_the_other_hub_has_the_same_as_who_was_there(world: World) -> None:
    here, there = world.hubs
    async with here.client() as starter, there.client() as late:
        run = await starter.start("teller", {"steps": 6})
        await starter.until(lambda frame: frame.get("patch") == {"step": 2})
        await late.ask("subscribe", to={"run": run}, since={run: {"seq": 0}})
        assert (await late.view(run)).texts == (await starter.view(run)).texts


async def test_a_lost_connection_is_resumed_on_the_other_hub(world: World) -> None:
    here, there = world.hubs
    memory = Memory()
    async with here.client(memory=memory) as client:
        await client.follow_all()
        run = await client.start("teller", {"steps": 6})
        await client.until(lambda frame: frame.get("patch") == {"step": 1})
        client.cut()
    async with there.client(memory=memory) as client:
        result = await client.follow_all()
        assert result["feed_recovered"] is True
        assert [entry["recovered"] for entry in result["runs"] if entry["run"] == run] == [True]
        view = await client.view(run)
    assert not view.snapshots
    assert [event["seq"] for event in view.events] == list(range(1, view.seq + 1))
    assert view.document == (await world.state(run))["state"]  # type: ignore[index]


async def test_a_run_is_cancelled_from_the_other_hub(world: World) -> None:
    here, there = world.hubs
    async with here.client() as starter, there.client() as other:
        run = await starter.start("waiter")
        await starter.event("status", run)
        await other.ask("cancel", run=run, reason="enough")
        view = await starter.view(run)
        assert view.names[-2:] == ["cancel_requested", "run_cancelled"]
        assert (await other.refused("cancel", run=run))["code"] == "already_finished"


async def test_one_key_is_one_run_whichever_hub_is_asked(world: World) -> None:
    here, there = world.hubs
    async with here.client() as one, there.client() as other:
        first = await one.start("teller", {"steps": 1}, key="same")
        assert await other.start("teller", {"steps": 1}, key="same") == first
        assert (await other.refused("start", agent="teller", input={"steps": 2}, key="same"))["code"] == "conflict"
        await other.end(first)


async def test_all_hubs_list_the_same_runs(world: World) -> None:
    here, there = world.hubs
    run = await world.start("teller", steps=1)
    await world.final([run])
    with anyio.fail_after(10):
        listed = await world.get(here, "/v1/runs")
        assert listed == await world.get(there, "/v1/runs")
    assert listed is not None
    assert run in [item["run"] for item in listed["runs"]]
