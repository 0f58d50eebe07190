"""Any bus: what is closed or answered late concerns what it was about, and not what stands in its place by then."""

from collections.abc import Mapping
from typing import Any

import anyio
import anyio.lowlevel
import orjson
import pytest

from agentcast.server.bus.base import Bus
from agentcast.server.hub.hub import Hub
from agentcast.server.hub.outbox import Outbox
from agentcast.server.protocol import Position, To
from tests.contract.support import Log, Mail, follow
from tests.support.link import Link


async def test_closing_an_old_command_handler_leaves_the_new_one(bus: Bus) -> None:
    handled: list[str] = []

    async def old(run: str, command: Mapping[str, Any]) -> None:
        handled.append("old")

    async def new(run: str, command: Mapping[str, Any]) -> None:
        handled.append("new")

    log = await Log.create(bus)
    first = await bus.handle_commands(old)
    await bus.handle_commands(new)
    first.close()
    await bus.send_command(log.run, {"op": "cancel"})
    assert handled == ["new"]


async def test_closing_an_old_subscription_twice_leaves_the_new_one(bus: Bus) -> None:
    log, old, new = await Log.create(bus), Mail(), Mail()
    first = await follow(bus, log.run, old.deliver)
    first.close()
    await follow(bus, log.run, new.deliver)
    first.close()
    sent = await log.append()
    assert await new.take(1) == sent
    assert old.items == []


async def test_a_run_that_is_left_and_followed_again_many_times_misses_nothing(bus: Bus) -> None:
    log = await Log.create(bus)
    for _ in range(20):
        mail = Mail()
        subscription = await follow(bus, log.run, mail.deliver)
        sent = await log.append()
        assert await mail.take(1) == sent
        subscription.close()


@pytest.mark.parametrize("count", [60])
async def test_runs_that_ended_before_the_hub_has_read_the_feed_come_once(bus: Bus, count: int) -> None:
    hub, outbox = Hub(bus), Outbox(Link())
    held, released, read = anyio.Event(), anyio.Event(), bus.read_feed

    async def read_late(after: str) -> Any:
        answer = await read(after)
        held.set()
        await released.wait()
        return answer

    bus.read_feed = read_late  # type: ignore[method-assign]
    async with anyio.create_task_group() as tasks:
        await tasks.start(hub.run)
        async with hub.join(outbox, "all", "ann", To(all=True), "full", {}) as join:
            join.commit()
        before = await Log.create(bus)
        await before.append(end=True)
        with anyio.fail_after(10):
            await held.wait()
        runs = [await Log.create(bus) for _ in range(count)]
        for log in runs:
            async with hub.join(outbox, log.run, "ann", To(run=log.run), "full", {log.run: _START}) as join:
                join.commit()
            await hub.catch_up(outbox)
            await log.append(end=True)
        async with hub.join(outbox, "later", "ann", To(agent="echo"), "full", {}) as join:
            position = join.result["feed"]
            join.commit()
        seen = list[int]()
        with anyio.fail_after(10):
            while len(seen) < 2 * count:
                await hub.catch_up(outbox)
                seen += [orjson.loads(data)["seq"] for batch in outbox.take() for data in batch.payloads]
                await anyio.lowlevel.checkpoint()
            released.set()
            last = await Log.create(bus)
            while last.run not in outbox.followers:
                await anyio.lowlevel.checkpoint()
            await hub.catch_up(outbox)
        assert [orjson.loads(data)["seq"] for batch in outbox.take() for data in batch.payloads] == [
            1,
            2,
            1,
        ]  # `before`, and `last`
        assert await read(position) is not None
        with anyio.fail_after(10):
            while outbox.feed.past:  # until the next read of the feed
                hub.wake()
                outbox.feed.forget()
                await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()


_START = Position(seq=0)
