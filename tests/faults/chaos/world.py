"""One Redis, with or without a replica, some hubs as processes, and what can be done to them."""

import logging
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import httpx
from anyio.abc import TaskGroup, TaskStatus

from tests.faults.chaos.journal import Journal
from tests.support.door import Door, open_door
from tests.support.process import ServedHub, serve
from tests.support.redis import KEEPING, Redis
from tests.support.waiting import PATIENCE, eventually, until

AGENTS = "tests.faults.chaos.agents:registry"
RUNNING = "queued,running,cancelling"


@dataclass(eq=False)
class World:
    redis: Redis
    hubs: list[ServedHub]
    folder: Path
    tasks: TaskGroup
    http: httpx.AsyncClient
    door: Door | None = None
    replica: Redis | None = None
    history: int = 0
    """How often Redis has lost some of what it held."""
    ended: list[ServedHub] = field(default_factory=list)

    # -- Hubs --------------------------------------------------------------------------------------------------------

    async def add_hub(self) -> ServedHub:
        url = self.redis.url if self.door is None else f"redis://127.0.0.1:{self.door.port}/0"
        hub: ServedHub = await self.tasks.start(_keep, url, str(self.folder / "journals"))
        self.hubs.append(hub)
        return hub

    async def kill_hub(self, hub: ServedHub) -> None:
        self.hubs.remove(hub)
        self.ended.append(hub)
        hub.process.kill()
        await hub.process.wait()

    def logs(self) -> str:
        """The last of what each hub has said."""
        return "\n\n".join("".join(hub.log)[-20_000:] for hub in (*self.ended, *self.hubs))

    def check_logs(self) -> None:
        """No hub has met what it did not know."""
        for hub in (*self.hubs, *self.ended):
            log = "".join(hub.log)
            bad = [line for line in log.splitlines() if re.search(r"Traceback| (ERROR|CRITICAL) ", line)]
            assert all("agentcast.server.runs.watchdog" in line for line in bad), log  # its process was stopped

    # -- Redis -------------------------------------------------------------------------------------------------------

    def empty_redis(self) -> None:
        """Bring Redis back as if it had never held anything."""
        self.redis.kill()
        self.redis.empty()
        self.history += 1
        self.redis.start()

    async def add_replica(self) -> None:
        folder = self.folder / f"redis-{self.history}"
        folder.mkdir()
        self.replica = Redis(folder, *KEEPING, replica_of=self.redis.port)
        self.replica.start()
        await self.replicated()

    async def replicated(self) -> None:
        """Until the replica follows the primary."""
        replica = self.replica
        assert replica is not None
        await until(lambda: replica.info("replication").get("master_link_status") == "up")

    async def promote(self, missing: float = 1.0) -> None:
        """Let the replica be the primary, without what the primary took in the last `missing` seconds of its life."""
        assert self.replica is not None
        assert self.door is not None
        await self.replicated()
        self.history += 1
        self.replica.promote()
        await anyio.sleep(missing)
        self.redis.kill()
        self.redis, self.replica = self.replica, None
        self.door.lead_to(self.redis.port)

    # -- Runs --------------------------------------------------------------------------------------------------------

    async def start(self, agent: str, hub: ServedHub | None = None, **input: Any) -> str:
        """Start a run, at once."""
        reply = await self.http.post(f"{(hub or self.hubs[0]).url}/v1/runs", json={"agent": agent, "input": input})
        assert reply.status_code == 200, reply.text
        run: str = reply.json()["run"]
        return run

    async def get(self, hub: ServedHub, path: str) -> dict[str, Any] | None:
        """What a hub says, as soon as it is available; None if it is not found."""
        reply = await self._available("GET", f"{hub.url}{path}")
        assert reply.status_code in (200, 404), reply.text
        document: dict[str, Any] = reply.json()
        return document if reply.status_code == 200 else None

    async def cancel(self, hub: ServedHub, run: str) -> None:
        """Cancel a run, as soon as a hub is available."""
        reply = await self._available("POST", f"{hub.url}/v1/runs/{run}/cancel")
        assert reply.status_code == 200, reply.text

    async def _available(self, method: str, url: str) -> httpx.Response:
        async def ask() -> httpx.Response | None:
            reply = await self.http.request(method, url)
            return None if reply.status_code == 503 else reply

        reply = await eventually(ask)
        assert reply is not None
        return reply

    async def state(self, run: str) -> dict[str, Any] | None:
        """The snapshot of a run, the same on every hub; None if it does not exist on any (G10)."""
        shown = [await self.get(hub, f"/v1/runs/{run}") for hub in self.hubs]
        assert all(item == shown[0] for item in shown), shown
        return shown[0]

    async def final(self, runs: Sequence[str]) -> dict[str, dict[str, Any] | None]:
        """Each run's snapshot, once none is active any more."""
        active: list[Any] = []

        async def all_ended() -> bool:
            active[:] = [run for hub in self.hubs for run in await self.active(hub)]
            return not active

        try:
            await eventually(all_ended, 2 * PATIENCE)
        except TimeoutError:
            raise AssertionError(f"these runs do not end: {active}") from None
        return {run: await self.state(run) for run in runs}

    async def active(self, hub: ServedHub) -> list[dict[str, Any]]:
        listed = await self.get(hub, f"/v1/runs?status={RUNNING}")
        assert listed is not None
        runs: list[dict[str, Any]] = listed["runs"]
        return runs

    def journal(self, run: str) -> Journal:
        return Journal.read(self.folder / "journals", run)

    def emissions(self, run: str) -> int:
        """Events that the agent of a run has emitted so far."""
        path = self.folder / "journals" / run
        return path.read_bytes().count(b'"event":') if path.exists() else 0

    def all_emissions(self) -> dict[str, int]:
        return {path.name: self.emissions(path.name) for path in (self.folder / "journals").iterdir()}

    async def at_rest(self, run: str) -> None:
        """Until a run's agent has emitted nothing for a second: what it had credit for may still come."""
        counts = [-1]
        with anyio.fail_after(PATIENCE):
            while counts[0] != counts[-1] or len(counts) < 5:
                counts = [*counts[-4:], self.emissions(run)]
                await anyio.sleep(0.25)

    async def emitted(self, run: str, count: int) -> None:
        """Until a run's agent has emitted so many events."""
        await until(lambda: self.emissions(run) >= count)

    async def ready(self) -> None:
        """Until all hubs take runs and their bus works end to end."""
        for hub in self.hubs:
            await self.get(hub, "/readyz")


async def _keep(url: str, journals: str, *, task_status: TaskStatus[ServedHub]) -> None:
    """Run a hub until it is killed."""
    settings = {"redis": url, "journal": journals, "heartbeat": "2", "grace": "0", "cancel_grace": "0.5"}
    async with serve(agents=AGENTS, **settings) as hub:
        task_status.started(hub)
        await hub.process.wait()


@contextmanager
def one_failure() -> Iterator[None]:
    """What failed in a task is shown as it is, without the groups around it."""
    try:
        yield
    except BaseExceptionGroup as group:
        failure: BaseException = group
        notes: list[str] = []
        while isinstance(failure, BaseExceptionGroup):
            notes += getattr(failure, "__notes__", ())
            failure = failure.exceptions[0]
        for note in notes:
            failure.add_note(note)
        raise failure from None


@asynccontextmanager
async def open_world(*options: str, hubs: int = 2, replica: bool = False) -> AsyncIterator[World]:
    """A redis-server with `options` and so many hubs; with a replica, there is a door before the primary."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with one_failure(), TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        (folder / "journals").mkdir()
        (folder / "redis").mkdir()
        redis = Redis(folder / "redis", *(options or KEEPING))
        async with open_door(redis.port) as door, httpx.AsyncClient(trust_env=False, timeout=PATIENCE) as http:
            async with anyio.create_task_group() as tasks:
                world = World(redis, [], folder, tasks, http, door if replica else None)
                try:
                    redis.start()
                    if replica:
                        await world.add_replica()
                    async with anyio.create_task_group() as starting:
                        for _ in range(hubs):
                            starting.start_soon(world.add_hub)
                    yield world
                    world.check_logs()
                except BaseException as error:
                    error.add_note(world.logs())
                    raise
                finally:
                    tasks.cancel_scope.cancel()
                    for server in (world.redis, world.replica):
                        if server is not None:
                            server.stop()
