"""The acceptance test: whatever happens to its connections, a client ends up with exactly the log (G1, G2, G10)."""

import random
from collections.abc import Sequence
from contextlib import suppress

import anyio
import pytest
from websockets.exceptions import ConnectionClosed

from agentcast.agents.base import Emitter, ToolError
from agentcast.agents.events import Custom, StatePatch
from tests.support.agents import agent
from tests.support.client import FULL_ONLY, Client, Memory, View
from tests.support.hub import RunningHub, open_hub
from tests.support.log import Log
from tests.support.work import Seed, Work

pytestmark = pytest.mark.usefixtures("each_server")

RUNS = 50
FAILURE = "the work could not be finished"


@agent("worker", input=Seed, max_concurrent=RUNS)
async def worker(input: Seed, emit: Emitter) -> dict[str, int]:
    work = Work(input.seed, emit)
    for number in range(work.rng.randint(2, 8)):
        await work.node(number)
        await emit.send(StatePatch(patch={"node": number}))
        await emit.send(Custom(name="mark", value=None))
    if input.seed % 10 == 3:
        raise ToolError(FAILURE)
    return {"seed": input.seed}


async def watch(hub: RunningHub, memory: Memory, runs: Sequence[str], rng: random.Random, detail: str) -> int:
    """Follow everything until all of `runs` have ended, losing the connection at random; gives how often."""
    cuts = 0
    while len(runs) < RUNS or not all(memory.view(run).ended for run in runs):
        async with hub.client(memory=memory, detail=detail) as client:
            with suppress(ConnectionClosed):
                result = await client.follow_all(detail=detail)
                assert result.get("feed_recovered", True)
                assert result["missing"] == []
                if rng.random() < 0.3:
                    client.cut()  # what has arrived is still read, the rest is lost
                for _ in range(rng.choice([0, 1, 5, 50, 500])):
                    if len(runs) == RUNS and all(memory.view(run).ended for run in runs):
                        break
                    await client.frame()
            client.cut()
            cuts += 1
    return cuts


@pytest.mark.parametrize("seed", [1, 2])
async def test_cut_and_resumed_at_random_during_fifty_runs_each_client_has_exactly_the_log(seed: int, log: Log) -> None:
    log.expect("of agent worker failed")
    rng = random.Random(seed)
    details = ["full", "full", "full", "progress"]
    memories = [Memory() for _ in details]
    runs: list[str] = []
    cuts: list[int] = []

    async def watcher(hub: RunningHub, memory: Memory, detail: str, seed: int) -> None:
        cuts.append(await watch(hub, memory, runs, random.Random(seed), detail))

    async with open_hub(worker) as hub, hub.client() as starter:
        for memory, detail in zip(memories, details, strict=True):
            async with hub.client(memory=memory) as client:
                await client.follow_all(detail=detail)  # before the first run: all that follows is theirs to see
        with anyio.fail_after(50):
            async with anyio.create_task_group() as tasks:
                for number, (memory, detail) in enumerate(zip(memories, details, strict=True)):
                    tasks.start_soon(watcher, hub, memory, detail, seed * 100 + number)
                for number in range(RUNS):
                    runs.append(await starter.start("worker", {"seed": number}, subscribe=False))
                    await anyio.sleep(rng.choice([0, 0, 0.02]))
                    if number % 10 == 7:
                        await starter.call("cancel", run=runs[rng.randrange(number)])

        assert sum(cuts) > 20, cuts
        statuses = set()
        async with hub.client() as reader:
            for run in runs:
                logged = await _read_log(hub, reader, run)
                statuses.add(logged.document["status"])
                for memory, detail in zip(memories, details, strict=True):
                    _compare(memory.view(run), logged, detail)
        assert statuses == {"done", "failed", "cancelled"}
        await hub.core.stop()
        await starter.closed()
        await hub.idle()


async def _read_log(hub: RunningHub, reader: Client, run: str) -> View:
    """The whole log of a run that has ended; its fold is the hub's own state."""
    await reader.ask("subscribe", to={"run": run}, since={run: {"seq": 0}})
    view = await reader.view(run)
    assert not view.snapshots
    async with hub.http() as http:
        assert view.document == (await http.get(f"/v1/runs/{run}")).json()["state"]
    return view


def _compare(seen: View, logged: View, detail: str) -> None:
    assert not seen.snapshots, "nothing here is worth a snapshot"
    assert not seen.gaps
    if detail == "full":
        assert seen.texts == logged.texts
        assert seen.document == logged.document
    else:
        assert seen.events == [event for event in logged.events if event["event"] not in FULL_ONLY]


async def test_nothing_is_left_of_runs_that_had_ended_where_the_client_already_was() -> None:
    async with open_hub(worker) as hub:
        async with hub.client() as client:
            runs = [await client.start("worker", {"seed": seed}) for seed in (1, 2)]
            await client.end(*runs)
        async with hub.client(memory=client.memory) as again:
            one = await again.ask("subscribe", to={"run": runs[0]}, since=client.memory.since())
            assert one["runs"][0]["recovered"] is True
            result = await again.ask("subscribe", to={"all": True}, since=client.memory.since())
            assert [entry["recovered"] for entry in result["runs"]] == [True, True]
            assert await again.quiet() == []
            assert (await again.refused("unsubscribe", subscription=one["subscription"]))["code"] == "not_found"
            assert not hub.core.hub.topics


async def test_a_client_cut_between_the_reply_and_the_runs_it_names_still_gets_them() -> None:
    async with open_hub(worker) as hub, hub.client() as starter:
        memory = Memory()
        async with hub.client(memory=memory) as client:
            await client.follow_all()
            client.cut()
        run = await starter.start("worker", {"seed": 1})
        await starter.end(run)
        async with hub.client(memory=memory) as client:
            await client.follow_all()
            client.cut()
        assert memory.view(run).events == []
        async with hub.client(memory=memory) as client:
            await client.follow_all()
            assert (await client.view(run)).texts == starter.memory.view(run).texts
