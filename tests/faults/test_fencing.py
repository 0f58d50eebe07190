"""A hub that was stopped for so long that another took its runs over: it lets go of them, agents included (G7)."""

import logging
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx
import pytest

from tests.support.process import ServedHub, serve
from tests.support.redis import Redis, running_redis
from tests.support.waiting import eventually, until

AGENTS = "tests.support.ticking:registry"


@asynccontextmanager
async def hub_on(redis: Redis, folder: Path) -> AsyncIterator[ServedHub]:
    settings = {"redis": redis.url, "journal": str(folder), "grace": "0", "cancel_grace": "0.5"}
    async with serve(agents=AGENTS, **settings) as hub:
        yield hub


@pytest.fixture
def redis() -> Iterator[Redis]:
    with running_redis() as redis:
        yield redis


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    logging.getLogger("httpx").setLevel(logging.WARNING)
    async with httpx.AsyncClient(trust_env=False) as http:
        yield http


async def active(hub: ServedHub, http: httpx.AsyncClient) -> int | None:
    """Runs that a hub says it has; None while it is not ready."""
    ready = await http.get(f"{hub.url}/readyz")
    return ready.json()["runs"] if ready.status_code == 200 else None


async def test_a_stopped_hub_whose_runs_were_taken_over_ends_their_agents(
    redis: Redis, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    async with (
        hub_on(redis, tmp_path) as here,
        hub_on(redis, tmp_path) as there,
        here.client() as watcher,
        there.client() as other,
    ):
        await watcher.follow_all()
        kinds = ["silent", "talker", "deaf", "threaded", "single", "single"]
        runs = [await watcher.start(kind, subscribe=False) for kind in kinds]
        files = [tmp_path / run for run in runs]
        for file in files[:-1]:
            await until(file.exists)
        await other.follow_all()
        here.signal(signal.SIGSTOP)
        try:
            for run in runs:
                assert (await other.view(run)).document["error"]["code"] == "worker_lost"
        finally:
            here.signal(signal.SIGCONT)

        async def let_go() -> bool:
            return await active(here, http) == 0

        await eventually(let_go, within=10.0)
        ticks = [file.read_bytes() for file in files[:-1]]
        assert not files[-1].exists(), "it was queued, and must not begin any more"
        assert [ticks[0][-1:], ticks[4][-1:]] == [b"!", b"!"], "an agent gets time to clean up"
        await anyio.sleep(0.3)
        assert [file.read_bytes() for file in files[:-1]] == ticks, "an agent goes on"
        for run in runs:
            seen, elsewhere = await watcher.view(run), other.memory.view(run)
            assert seen.document == elsewhere.document
            assert seen.names.count("run_error") <= 1, "the end comes in an event or in a snapshot"
        log = "".join(here.log)
        for run in runs:
            assert log.count(f"run {run}: ") == 1, log
        assert "Traceback" not in log
        again = await watcher.start("single", subscribe=False)
        await until((tmp_path / again).exists)


async def test_a_hub_whose_lease_has_expired_goes_on_with_the_runs_that_nobody_took(
    redis: Redis, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    async with hub_on(redis, tmp_path) as hub, hub.client() as client:
        await client.follow_all()
        runs = [await client.start(kind, subscribe=False) for kind in ("silent", "talker")]
        for run in runs:
            await until((tmp_path / run).exists)
        hub.signal(signal.SIGSTOP)
        try:
            await until(lambda: redis.do("KEYS", "agentcast:worker:*") == b"*0")
        finally:
            hub.signal(signal.SIGCONT)
        ticks = [len((tmp_path / run).read_bytes()) for run in runs]
        for run, before in zip(runs, ticks, strict=True):  # for longer than the hub needs to find out what is not its
            await until(lambda run=run, before=before: len((tmp_path / run).read_bytes()) > before + 100)  # type: ignore[misc]

        async def known() -> bool:
            return await active(hub, http) == 2

        await eventually(known)
        for run in runs:
            await client.ask("cancel", run=run)
            assert (await client.view(run)).names[-1] == "run_cancelled"
