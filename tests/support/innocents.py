"""Clients that mind their own business while a hub is attacked: how long their replies take, and whether all of what
they follow comes (G11)."""

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx

from tests.support.client import Client, connect

PAUSE = 0.02
TOKENS_PAUSE = 0.01


@dataclass
class Innocents:
    """What was seen. All times are in seconds."""

    waits: dict[str, list[float]] = field(default_factory=dict)
    """How long each kind of reply took."""

    @property
    def slowest(self) -> dict[str, float]:
        return {kind: max(waits) for kind, waits in self.waits.items()}

    async def timed(self, kind: str, reply: Awaitable[Any]) -> Any:
        start = anyio.current_time()
        answer = await reply
        self.waits.setdefault(kind, []).append(anyio.current_time() - start)
        return answer


@asynccontextmanager
async def innocents(url: str) -> AsyncIterator[Innocents]:
    """Clients of the hub at `url` that ask, start, cancel and follow for the time of the context; they assert that they
    are answered, and that what they follow is complete."""
    seen, ended = Innocents(), anyio.Event()
    socket = f"{url.replace('http', 'ws', 1)}/ws"
    async with connect(socket) as pinging, connect(socket) as starting, connect(socket) as following:
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as http:
            await http.get("/healthz")  # each has its connection before anything happens
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_ping, seen, pinging, ended)
                tasks.start_soon(_start, seen, starting, ended)
                tasks.start_soon(_follow, seen, following, ended)
                tasks.start_soon(_request, seen, http, ended)
                try:
                    yield seen
                finally:
                    ended.set()


async def _ping(seen: Innocents, client: Client, ended: anyio.Event) -> None:
    while not ended.is_set():
        await seen.timed("ping", client.ask("ping"))
        await anyio.sleep(PAUSE)


async def _start(seen: Innocents, client: Client, ended: anyio.Event) -> None:
    """Start a run, see it start, cancel it, see its end."""
    while not ended.is_set():
        run = await seen.timed("start", client.start("holder"))
        await seen.timed("first event", client.event("status", run))
        await seen.timed("cancel", client.ask("cancel", run=run))
        view = await client.view(run)
        assert view.names[-1] == "run_cancelled", view.names
        await anyio.sleep(PAUSE)


async def _follow(seen: Innocents, client: Client, ended: anyio.Event) -> None:
    """Follow a run that streams all the time, to its end. The client checks that no event is missing or comes twice."""
    run = await client.start("counter", {"n": 100_000, "pause": TOKENS_PAUSE})
    last = anyio.current_time()
    while not ended.is_set():
        await client.event("token", run)
        now = anyio.current_time()
        seen.waits.setdefault("token", []).append(now - last - TOKENS_PAUSE)
        last = now
    await client.ask("cancel", run=run)
    view = await client.view(run)
    assert not view.snapshots, "it was behind"
    assert [event["seq"] for event in view.events] == [*range(1, view.seq + 1)]
    assert view.names[-1] == "run_cancelled", view.names[-1]


async def _request(seen: Innocents, http: httpx.AsyncClient, ended: anyio.Event) -> None:
    while not ended.is_set():
        response = await seen.timed("request", http.get("/v1/runs?limit=1"))
        assert response.status_code == 200, response.text
        await anyio.sleep(PAUSE)
