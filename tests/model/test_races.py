"""Answers of the bus that come late: what the model test meets by chance, once each on purpose (G1, G2)."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.model.scene import Scene, brief, playing
from tests.model.world import Run


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with playing() as scene:
        yield scene


@pytest.mark.parametrize("ending", [[], ["end"]], ids=["the run goes on", "the run has ended"])
async def test_snapshot_asked_for_before_a_rebase_is_asked_for_again(scene: Scene, ending: list[str]) -> None:
    connection = await scene.connect()
    scene.bus.hold("read")
    await scene.subscribe(connection)
    await scene.bus.asked("read")
    await scene.run.rebase(scene.bus, ["status", *ending])
    scene.bus.release("read")

    *_, snapshot = await scene.frames(connection)

    assert (snapshot["type"], snapshot["epoch"], snapshot["seq"]) == ("snapshot", scene.run.epoch, scene.run.head)
    assert snapshot["state"] == scene.run.state.document
    assert bool(connection.outbox.followers) is not bool(ending)


async def test_snapshot_of_an_epoch_that_is_over_is_not_sent(scene: Scene) -> None:
    connection = await scene.connect()
    scene.bus.hold("read")
    await scene.subscribe(connection)
    await scene.bus.asked("read")
    await scene.run.rebase(scene.bus, ["status"])
    scene.bus.release("read")

    frames = await scene.frames(connection)

    assert [frame["epoch"] for frame in frames if frame["type"] == "snapshot"] == [scene.run.epoch]


async def test_head_asked_for_before_a_rebase_is_asked_for_again(scene: Scene) -> None:
    connection = await scene.connect()
    opening = scene.bus.catch("open")
    await scene.subscribe(connection)
    await opening.asked.wait()
    await scene.run.rebase(scene.bus, [])
    opening.release()
    await scene.frames(connection)
    await scene.run.append(scene.bus, ["status", "end"])

    assert brief(await scene.frames(connection)) == ["event 2", "event 3"]


async def test_snapshot_that_others_asked_for_earlier_does_not_take_a_client_back(scene: Scene) -> None:
    ahead, other = await scene.connect(), await scene.connect()
    await scene.subscribe(ahead, detail="progress", since={scene.run.id: {"seq": 0}})
    assert brief(await scene.frames(ahead)) == ["reply", "event 1"]
    scene.bus.hold("read")
    await scene.subscribe(other)
    await scene.bus.asked("read")
    await scene.run.append(scene.bus, ["status", "status"])
    assert brief(await scene.frames(ahead)) == ["event 2", "event 3"]

    await scene.subscribe(ahead, detail="full")  # raises the detail: a snapshot is due
    assert brief(await scene.frames(ahead)) == ["reply"]
    scene.bus.release("read")

    assert brief(await scene.frames(ahead)) == ["snapshot 3"]
    assert brief(await scene.frames(other)) == ["reply", "snapshot 1", "event 2", "event 3"]


@pytest.mark.parametrize("rebased", [False, True], ids=["by its last event", "by a rebase"])
async def test_run_that_ended_on_a_connection_is_not_brought_again_by_its_announcement(
    scene: Scene, rebased: bool
) -> None:
    connection = await scene.connect()
    scene.bus.hold("list")
    await scene.subscribe(connection, to={"all": True})
    await scene.bus.asked("list")
    new = Run(1, "ant", None)
    await new.create(scene.bus)
    await scene.subscribe(connection, to={"run": new.id}, since={new.id: {"seq": 0}})
    await scene.frames(connection)
    if rebased:
        await new.rebase(scene.bus, ["end"])
    else:
        await new.append(scene.bus, ["end"])
    assert brief(await scene.frames(connection)) == (["gap", "snapshot 2"] if rebased else ["event 2"])

    scene.bus.release("list")

    frames = await scene.frames(connection)
    assert [frame["run"] for frame in frames if "run" in frame] == [scene.run.id]
    connection.outbox.put_notices()
    assert brief(await scene.frames(connection)) == ["feed"]


async def test_runs_announced_while_a_subscription_is_being_made_are_not_missed(scene: Scene) -> None:
    connection = await scene.connect()
    scene.bus.hold("list")
    await scene.subscribe(connection, to={"all": True})
    await scene.bus.asked("list")
    new = Run(1, "ant", None)
    await new.create(scene.bus)
    await new.append(scene.bus, ["end"])
    assert await scene.frames(connection) == []
    scene.bus.release("list")

    frames = await scene.frames(connection)

    assert frames[0]["type"] == "reply"
    assert [frame["seq"] for frame in frames if frame.get("run") == new.id] == [1, 2]


async def test_feed_does_not_run_ahead_of_a_subscription_that_is_being_made(scene: Scene) -> None:
    connection = await scene.connect()
    await scene.subscribe(connection, to={"agent": "nobody"})
    scene.bus.hold("list")
    await scene.frames(connection)
    await scene.subscribe(connection, to={"all": True})
    await scene.bus.asked("list")
    new = Run(1, "ant", None)
    await new.create(scene.bus)
    await scene.frames(connection)

    connection.outbox.put_notices()
    assert await scene.frames(connection) == []
    scene.bus.release("list")
    frames = await scene.frames(connection)
    connection.outbox.put_notices()
    frames += await scene.frames(connection)

    assert [frame["type"] for frame in frames][-1] == "feed"
    assert new.id in {frame.get("run") for frame in frames}


async def test_late_deliveries_of_a_past_epoch_change_nothing(scene: Scene) -> None:
    """The snapshot already shows the rebase; what was on its way before it comes afterwards."""
    connection = await scene.connect()
    await scene.subscribe(connection, since={scene.run.id: {"seq": 0}})
    await scene.frames(connection)
    log = scene.bus._logs[scene.run.id]
    (token,) = log.subscribers
    deliver, late = log.subscribers[token], list[Any]()
    log.subscribers[token] = late.append
    await scene.run.append(scene.bus, ["status"])
    await scene.run.rebase(scene.bus, ["status"])
    log.subscribers[token] = deliver
    await scene.run.append(scene.bus, ["status"])
    assert brief(await scene.frames(connection)) == ["gap", "snapshot 4"]

    for delivery in late:
        deliver(delivery)
    await scene.run.append(scene.bus, ["status"])

    assert brief(await scene.frames(connection)) == ["event 5"]
