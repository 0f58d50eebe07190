"""What a hub makes of news that tell less, or more, than the log holds (G2)."""

import anyio
import orjson
import pytest

from agentcast.server.bus.base import Head
from agentcast.server.bus.memory import MemoryBus
from agentcast.server.hub.hub import Hub
from agentcast.server.hub.outbox import Outbox
from agentcast.server.protocol import Position, To
from tests.contract.support import Log


class Paused(Exception):
    """The hub was about to wait before it asks again."""


def nothing() -> None:
    pass


async def live_follower(bus: MemoryBus, log: Log) -> tuple[Hub, Outbox]:
    """A client that has all of the log so far."""
    hub, outbox = Hub(bus), Outbox(nothing, nothing, nothing)
    since = {log.run: Position(seq=0)}
    async with hub.join(outbox, "s", "ann", To(run=log.run), "full", since) as join:
        join.commit()
    await hub.catch_up(outbox)
    assert not outbox.is_behind
    outbox.take()
    return hub, outbox


async def test_head_beyond_what_was_delivered_makes_a_live_follower_catch_up() -> None:
    bus = MemoryBus()
    log = await Log.create(bus)
    hub, outbox = await live_follower(bus, log)
    kept = bus._logs[log.run]
    subscribers = dict(kept.subscribers)
    kept.subscribers.clear()
    await log.append(2)  # news that are lost on the way
    kept.subscribers.update(subscribers)

    kept.deliver(Head(log.run, log.epoch, 3))

    assert outbox.is_behind
    with anyio.fail_after(5):
        await hub.catch_up(outbox)
    assert [orjson.loads(frame)["seq"] for frame in outbox.take()] == [2, 3]


async def test_log_that_is_shorter_than_it_was_is_asked_again_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    bus = MemoryBus()
    log = await Log.create(bus)
    hub, outbox = await live_follower(bus, log)
    bus._logs[log.run].deliver(Head(log.run, log.epoch, 9))

    def pause() -> float:
        raise Paused

    monkeypatch.setattr("agentcast.server.hub.hub._jitter", pause)
    with anyio.fail_after(5), pytest.raises(Paused):
        await hub.catch_up(outbox)
