"""Whatever one client does, the others are answered in time and miss nothing (G11).

Hub, attackers and innocents are processes of their own. How long the innocents' replies take at most is measured by
`python -m benchmarks --only attacks`, on a machine that does nothing else; here the bound is generous.
"""

import json
from collections import Counter
from functools import partial
from typing import Any

import anyio
import httpx
import pytest

from agentcast.server.bus.redis.workers import SETTLE
from tests.support.attacks import run
from tests.support.forking import ForkedProcess, fork
from tests.support.innocents import Innocents, innocents
from tests.support.process import ServedHub, serve, serve_confined
from tests.support.redis import running_redis
from tests.support.waiting import eventually

SECONDS = 4.0
REPLIES = {"unknown runs": 100, "starts": 8_000, "joins": 2_000}
"""More than an attacker is answered in that time, if it has to wait for its turn."""
PROMPT = 3.0
"""Seconds within which every reply to an innocent comes, on a loaded machine with few cores."""


async def attack(hub: ServedHub, name: str, seconds: float = SECONDS) -> dict[str, Any]:
    """Attack from a process of its own; gives what became of it."""
    port = hub.url.rpartition(":")[2]
    async with ForkedProcess(fork(run, name, port, str(seconds))) as process:
        output = b""
        async for part in process.stdout:
            output += part
        assert await process.wait() == 0, b"".join([part async for part in process.stderr]).decode()
    outcome: dict[str, Any] = json.loads(output)
    return outcome


def check(seen: Innocents) -> None:
    assert set(seen.waits) == {"ping", "start", "first event", "cancel", "token", "request"}
    assert all(len(waits) >= 3 for waits in seen.waits.values()), {kind: len(w) for kind, w in seen.waits.items()}
    assert max(seen.slowest.values()) < PROMPT, seen.slowest


async def status(hub: ServedHub, path: str) -> int:
    """Of one request, on a connection of its own."""
    async with httpx.AsyncClient(base_url=hub.url, trust_env=False) as http:
        return (await http.get(path)).status_code


async def failed(hub: ServedHub) -> list[str]:
    """Runs that nobody asked to end."""
    async with httpx.AsyncClient(base_url=hub.url, trust_env=False) as http:
        return [run["run"] for run in (await http.get("/v1/runs?status=failed&limit=1000")).json()["runs"]]


@pytest.mark.parametrize(
    "name",
    [
        "empty pongs",
        "continuation frames",
        "connecting",
        "unknown runs",
        "starts",
        "joins",
        "never reading",
        "slow requests",
        "requests",
    ],
)
async def test_innocents_are_answered_in_time_and_miss_nothing(name: str) -> None:
    async with serve() as hub:
        async with innocents(hub.url) as seen:
            outcome = await attack(hub, name)
        check(seen)
        assert not await failed(hub)
    assert outcome.get("replies", 0) < REPLIES.get(name, 1), "the attacker did not have to wait"


async def test_half_open_handshakes_are_dropped_and_the_hub_serves_meanwhile() -> None:
    async with serve() as hub:
        async with innocents(hub.url) as seen:
            outcome = await attack(hub, "half-open handshakes", 30)
        assert outcome["dropped"] == outcome["connected"] == 300
        check(seen)


LIMITS = {
    "of an address": lambda: serve("--max-connections-per-address", "200"),
    "in total": lambda: serve("--max-connections", "200"),
    "of descriptors": lambda: serve_confined(250),
}


@pytest.mark.parametrize("limit", LIMITS)
async def test_idle_sockets_are_refused_and_health_is_served(limit: str) -> None:
    statuses: Counter[tuple[str, int]] = Counter()
    async with LIMITS[limit]() as hub, innocents(hub.url) as seen:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_probe, hub, statuses)
            outcome = await attack(hub, "idle sockets", 6)
            tasks.cancel_scope.cancel()
    assert outcome["connected"] == 400
    assert 200 <= outcome["503"] <= outcome["dropped"]
    assert statuses["/healthz", 200] >= statuses["/readyz", 200] > 10
    assert statuses["/healthz", 503] == statuses["/readyz", 503] == 0
    assert statuses["/v1/agents", 503] > 10
    check(seen)


async def _probe(hub: ServedHub, statuses: Counter[tuple[str, int]]) -> None:
    """Ask for health all the time, and for something else."""
    while True:
        for path in ("/healthz", "/readyz", "/v1/agents"):
            statuses[path, await status(hub, path)] += 1
        await anyio.sleep(0.05)


# -- Two hubs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["empty pongs", "starts"])
async def test_a_hub_under_attack_loses_no_run_to_another(name: str) -> None:
    """Another hub ends the runs of one that misses its heartbeats, as `worker_lost`. Times are not
    asserted: here two hubs, Redis and attackers share two cores."""
    with running_redis() as redis:
        async with serve("--redis", redis.url) as attacked, serve("--redis", redis.url) as other:
            async with attacked.client() as innocent, other.client() as watcher:
                runs = [await innocent.start("holder") for _ in range(5)]
                for run in runs:
                    await watcher.ask("subscribe", to={"run": run}, since={run: {"seq": 0}})
                await attack(attacked, name, 2 * SETTLE)
                await watcher.quiet()
                assert [watcher.memory.view(run).names[-1] for run in runs] == ["status"] * len(runs)
            for hub in (attacked, other):
                assert await eventually(partial(_listed, hub)), "the hub does not recover"
                assert not await failed(hub)


async def _listed(hub: ServedHub) -> bool:
    return await status(hub, "/v1/runs") == 200
