"""Two hubs: a dashboard on one sees the summaries that are published through the other, over any bus."""

from collections.abc import AsyncIterator, Callable

import anyio
import pytest

from agentcast.server.bus.base import Bus, Filter, new_epoch
from agentcast.server.bus.memory import MemoryBus
from agentcast.server.bus.redis import RedisBus
from agentcast.server.hub.hub import Hub
from agentcast.server.protocol import To
from tests.contract.support import PATIENCE
from tests.support.following import Client
from tests.support.link import Link
from tests.support.published import finish, publish, run_on
from tests.support.redis import Redis

Scene = tuple[Bus, Hub]
"""The bus of one hub, and another hub of the same deployment."""


@pytest.fixture(params=["memory", "redis"])
async def scene(request: pytest.FixtureRequest) -> AsyncIterator[Scene]:
    buses: list[Bus]
    if request.param == "memory":
        buses = [MemoryBus()] * 2
    else:
        redis: Redis = request.getfixturevalue("redis")
        prefix = new_epoch()
        buses = [RedisBus(redis.url, new_epoch(), prefix=prefix) for _ in range(2)]
    async with anyio.create_task_group() as tasks:
        hub = Hub(buses[1])
        with anyio.fail_after(PATIENCE):
            for bus in buses:
                await tasks.start(bus.run)
            await tasks.start(hub.run)
        yield buses[0], hub
        for bus in buses:
            await bus.aclose()
        tasks.cancel_scope.cancel()


class Dashboard(Link):
    """A connection that keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.client = Client()
        self.client.outbox.link = self
        self.newest: dict[str, int] = {}
        self.order: list[str] = []
        self._changed = anyio.Event()

    def wake(self) -> None:
        self._changed.set()

    async def until(self, true: Callable[[], bool]) -> None:
        with anyio.fail_after(PATIENCE):
            while not true():
                await self._changed.wait()
                self._changed = anyio.Event()
                for frame in self.client.take():
                    if frame["type"] == "summary":
                        self.newest |= {record["run"]: record.get("at", 0) for record in frame["runs"]}
                    else:
                        self.order = frame["runs"]


async def test_a_dashboard_sees_the_runs_of_another_hub_to_their_last_record(scene: Scene) -> None:
    there, hub = scene
    first, over = [await run_on(there) for _ in range(2)]
    await publish(first, 3)
    await finish(over, 9)
    dashboard = Dashboard()
    async with hub.summaries.join(dashboard.client.outbox, "s", "anonymous", To(all=True)) as join:
        join.commit()
    await dashboard.until(lambda: dashboard.newest == {first.run: 3})

    second = await run_on(there)
    await publish(second, 1)
    for at in range(4, 60):
        await publish(first, at)
    await dashboard.until(lambda: dashboard.newest == {first.run: 59, second.run: 1})
    await finish(first, 60)
    await finish(second, 61)
    await dashboard.until(lambda: dashboard.newest == {first.run: 60, second.run: 61})


async def test_a_page_on_one_hub_follows_the_runs_of_another(scene: Scene) -> None:
    there, hub = scene
    first = await run_on(there)
    await first.append()
    await publish(first, 2)
    dashboard = Dashboard()
    filter = Filter(principal="anonymous", statuses=frozenset({"running"}))
    async with hub.lists.join(dashboard.client.outbox, "s", filter) as join:
        assert len(join.result["runs"]) == 1
        join.commit()

    second = await run_on(there)
    await second.append()
    await publish(second, 2)
    await dashboard.until(lambda: dashboard.order == [second.run, first.run] and second.run in dashboard.newest)
    await finish(first, 9)
    await dashboard.until(lambda: dashboard.order == [second.run])
