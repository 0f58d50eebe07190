"""A hub whose link to Redis carries 250 kB/s, and a run whose state has over 2 MB: other runs go on (G1, G4, G7)."""

import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf
from pathlib import Path

import anyio

from tests.support.client import Client
from tests.support.door import Door, open_door
from tests.support.process import ServedHub, serve
from tests.support.redis import Redis, running_redis
from tests.support.waiting import eventually

AGENTS = "tests.support.ticking:registry"
RATE = 250_000.0
BIG = 2_000_000


@asynccontextmanager
async def slow_and_fast(folder: Path) -> AsyncIterator[tuple[Redis, Door, ServedHub, Client]]:
    """A hub behind a door that is yet wide open, and a client of another hub, which would end what the first loses."""
    settings = {"journal": str(folder), "grace": "0", "cancel_grace": "0.5"}
    with running_redis() as redis:
        async with open_door(redis.port) as door:
            async with (
                serve(agents=AGENTS, redis=f"redis://127.0.0.1:{door.port}/0", **settings) as slow,
                serve(agents=AGENTS, redis=redis.url, **settings) as fast,
                fast.client() as watcher,
            ):
                yield redis, door, slow, watcher


async def heavy(slow: Client) -> str:
    """A run whose state is large, and saved only in part so far."""
    run = await slow.start("heavy", subscribe=False)
    await slow.ask("subscribe", to={"run": run}, detail="progress")
    with anyio.fail_after(40):
        while (await slow.event("status", run))["message"] != "built":
            pass
    return run


async def test_saving_a_large_state_over_a_slow_link_costs_no_other_run_its_life(tmp_path: Path) -> None:
    async with slow_and_fast(tmp_path) as (redis, door, hub, watcher), hub.client() as client:
        large = await heavy(client)
        others = [await client.start("talker", subscribe=False) for _ in range(5)]
        await watcher.follow_all()
        door.rate = RATE
        await client.ask("cancel", run=large)  # its last state is saved now

        async def saved() -> bool:
            head = redis.do("HGET", f"agentcast:run:{large}", "head")
            return redis.do("HGET", f"agentcast:snap:{large}", "seq") == head

        began, late = time.monotonic(), []

        async def listen() -> None:
            while True:
                frame = await watcher.frame()
                assert frame.get("event") not in ("run_error", "run_end"), frame
                if frame["type"] == "event" and frame["run"] in others:
                    late.append(time.time() - frame["ts"])

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen)
            await eventually(saved, within=40.0)
            assert int(redis.do("MEMORY", "USAGE", f"agentcast:snap:{large}").lstrip(b":")) > BIG
            assert time.monotonic() - began > BIG / RATE / 2, "the link was not slow at all"
            tasks.cancel_scope.cancel()
        assert len(late) > 5 * 20
        assert max(late[5:]) < 5.0, "an event waits for the state"
        door.rate = inf
        for run in others:
            await client.ask("cancel", run=run)
            assert (await watcher.view(run)).names[-1] == "run_cancelled"


async def test_a_hub_that_stops_does_not_wait_for_a_large_state(tmp_path: Path) -> None:
    async with slow_and_fast(tmp_path) as (_, door, hub, watcher):
        async with hub.client() as client:
            large = await heavy(client)
            door.rate = RATE
            hub.signal(signal.SIGTERM)
            assert await hub.exit_code(within=12.0) == 0
        door.rate = inf
        await watcher.ask("subscribe", to={"run": large})
        view = await watcher.view(large)
        assert view.document["error"]["code"] == "shutting_down"
        assert "field 479" in view.document["state"], "what was not saved is folded out of the log"
