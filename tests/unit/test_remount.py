"""A run that is left and subscribed to again at once, as by a page that remounts: what was in flight for the first
subscription must not touch the second (G1, G2)."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from agentcast.server.bus.base import Head
from agentcast.server.errors import NotFound
from tests.model.scene import Scene, brief, playing
from tests.model.world import Connection
from tests.support.buses import Caught

START = {"seq": 0}


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with playing() as scene:
        yield scene


async def is_followed_from(scene: Scene, connection: Connection, first: int) -> None:
    """The run's next events reach the connection, once, and its topic is the one that the hub has."""
    await scene.run.append(scene.bus, ["status", "end"])
    assert brief(await scene.frames(connection)) == [f"event {first}", f"event {first + 1}"]
    assert not connection.outbox.followers
    assert not connection.outbox.is_behind
    assert not scene.hub.topics
    assert scene.bus.subscribed == 0


def pull_of(scene: Scene, question: str) -> Caught:
    """Hold back the first answer to a question that is asked after the reply to a subscribe."""
    return scene.bus.catch(question)


OLD = [({"since": {"run00000": START}}, "read"), ({}, "load_snapshot"), ({}, "info")]


@pytest.mark.parametrize(("old", "question"), OLD, ids=["page", "snapshot", "snapshot's head"])
async def test_an_old_pull_does_not_close_the_new_topic(scene: Scene, old: dict[str, Any], question: str) -> None:
    connection = await scene.connect()
    pull = pull_of(scene, question)
    await scene.subscribe(connection, **old)
    await pull.asked.wait()
    await scene.unsubscribe(connection, "s1")
    await scene.turns()
    opening = scene.bus.catch("open")
    await scene.subscribe(connection, since={scene.run.id: START})
    await opening.asked.wait()

    pull.release()
    await scene.turns()
    opening.release()

    assert brief(await scene.frames(connection)) == ["reply", "reply", "reply", "event 1"]
    await is_followed_from(scene, connection, 2)


@pytest.mark.parametrize("question", ["read", "load_snapshot"])
@pytest.mark.parametrize("error", [None, NotFound("no")], ids=["an answer", "not found"])
async def test_an_old_pull_does_nothing_to_the_new_follower(
    scene: Scene, question: str, error: Exception | None
) -> None:
    fields: tuple[dict[str, Any], dict[str, Any]] = ({"since": {scene.run.id: START}}, {})
    old, new = fields if question == "read" else fields[::-1]
    connection = await scene.connect()
    pull = pull_of(scene, question)
    await scene.subscribe(connection, **old)
    await pull.asked.wait()
    await scene.unsubscribe(connection, "s1")
    await scene.subscribe(connection, **new)
    await scene.turns()
    (follower,) = connection.outbox.followers.values()

    pull.release(error)
    await scene.turns()

    shown = "snapshot 1" if question == "read" else "event 1"
    assert brief(await scene.frames(connection)) == ["reply", "reply", "reply", shown]
    assert list(connection.outbox.followers.values()) == [follower]
    await is_followed_from(scene, connection, 2)


async def test_an_old_pull_does_nothing_to_a_run_that_a_rule_has_brought_again(scene: Scene) -> None:
    connection = await scene.connect()
    pull = scene.bus.catch("load_snapshot")
    await scene.subscribe(connection, to={"all": True})
    await pull.asked.wait()
    await scene.unsubscribe(connection, "s1")
    opening = scene.bus.catch("open")
    await scene.subscribe(connection, to={"agent": "ant"})
    await opening.asked.wait()

    pull.release()
    await scene.turns()
    opening.release()

    assert brief(await scene.frames(connection)) == ["reply", "reply", "reply", "snapshot 1"]
    await scene.run.append(scene.bus, ["status", "end"])
    assert brief(await scene.frames(connection)) == ["event 2", "event 3"]
    assert not scene.hub.topics


async def test_deliveries_of_an_old_subscription_on_the_bus_do_not_reach_the_new_topic(scene: Scene) -> None:
    connection = await scene.connect()
    await scene.subscribe(connection, since={scene.run.id: START})
    await scene.frames(connection)
    (deliver,) = scene.bus._logs[scene.run.id].subscribers.values()
    await scene.unsubscribe(connection, "s1")
    await scene.turns()
    await scene.subscribe(connection, since={scene.run.id: START})
    assert brief(await scene.frames(connection)) == ["reply", "reply", "event 1"]

    deliver(Head(scene.run.id, "another", 7, ended=True))

    assert await scene.frames(connection) == []
    await is_followed_from(scene, connection, 2)


async def test_a_topic_that_is_being_opened_when_its_first_client_leaves_serves_the_second(scene: Scene) -> None:
    first, second = await scene.connect(), await scene.connect()
    opening = scene.bus.catch("open")
    await scene.subscribe(first)
    await opening.asked.wait()
    await scene.subscribe(second, since={scene.run.id: START})
    await scene.turns()

    await first.hang_up()

    assert brief(await scene.frames(second)) == ["reply", "event 1"]
    await is_followed_from(scene, second, 2)


@pytest.mark.parametrize(
    ("to", "question"),
    [({"run": "run00000"}, "open"), *(({"all": True}, question) for question in ("info", "list", "open"))],
)
async def test_a_connection_that_closes_while_it_joins_leaves_nothing(
    scene: Scene, to: dict[str, Any], question: str
) -> None:
    connection = await scene.connect()
    held = scene.bus.catch(question)
    await scene.subscribe(connection, to=to, since={scene.run.id: START})
    await held.asked.wait()

    await connection.hang_up()

    held.release()
    await scene.turns()
    assert not scene.hub.topics
    assert not len(scene.hub.rules)
    assert scene.bus.subscribed == 0


@pytest.mark.parametrize(
    ("to", "question"),
    [({"run": "run00000"}, "open"), *(({"all": True}, question) for question in ("info", "list", "open"))],
)
async def test_a_subscription_that_is_ended_before_its_reply_brings_nothing(
    scene: Scene, to: dict[str, Any], question: str
) -> None:
    """Its name can be guessed."""
    connection = await scene.connect()
    held = scene.bus.catch(question)
    await scene.subscribe(connection, to=to, since={scene.run.id: START})
    await held.asked.wait()
    await scene.unsubscribe(connection, "s1")
    await scene.turns()
    held.release()
    assert [frame["ok"] for frame in await scene.frames(connection)] == [True, True]

    await scene.run.append(scene.bus, ["status"])
    await scene.create()

    assert await scene.frames(connection) == []
    assert not scene.hub.topics
    assert not len(scene.hub.rules)


@pytest.mark.parametrize("question", ["create", "open"])
async def test_a_start_whose_subscription_is_ended_before_its_reply_brings_nothing(scene: Scene, question: str) -> None:
    connection = await scene.connect()
    held = scene.bus.catch(question)
    await scene.start(connection)
    await held.asked.wait()
    await scene.unsubscribe(connection, "s1")
    await scene.turns()
    held.release()

    assert {frame["type"] for frame in await scene.frames(connection)} == {"reply"}
    assert not scene.hub.topics
    assert not connection.outbox.subscriptions


async def test_two_subscriptions_to_one_run_end_one_by_one(scene: Scene) -> None:
    connection = await scene.connect()
    await scene.subscribe(connection, since={scene.run.id: START})
    await scene.subscribe(connection, since={scene.run.id: START})
    assert brief(await scene.frames(connection)) == ["reply", "reply", "event 1"]

    await scene.unsubscribe(connection, "s1")
    await scene.unsubscribe(connection, "s1")
    replies = await scene.frames(connection)
    await scene.unsubscribe(connection, "s9")
    replies += await scene.frames(connection)

    assert [reply.get("error", {}).get("code") for reply in replies] == [None, "not_found", "not_found"]
    await is_followed_from(scene, connection, 2)


AGAIN: list[tuple[dict[str, Any], list[str]]] = [
    ({"since": {"run00000": {"seq": 0}}}, ["event 1", "event 2", "event 3", "event 4"]),
    ({"since": {"run00000": {"seq": 2, "epoch": "run00000-first"}}}, ["event 3", "event 4"]),
    ({"since": {"run00000": {"seq": 4, "epoch": "run00000-first"}}}, []),
    ({"since": {"run00000": {"seq": 9, "epoch": "run00000-first"}}}, ["gap", "snapshot 4"]),
    ({"since": {"run00000": {"seq": 2, "epoch": "another"}}}, ["gap", "snapshot 4"]),
    ({}, ["snapshot 4"]),
]


@pytest.mark.parametrize(("fields", "frames"), AGAIN, ids=["start", "older", "newest", "newer", "other log", "nothing"])
@pytest.mark.parametrize("details", [("full", "progress"), ("progress", "full")], ids=" then ".join)
@pytest.mark.parametrize("held", ["read", "load_snapshot"])
async def test_the_new_subscription_begins_where_it_says(
    scene: Scene, fields: dict[str, Any], frames: list[str], details: tuple[str, str], held: str
) -> None:
    await scene.run.append(scene.bus, ["status", "status", "status"])
    connection = await scene.connect()
    pull = pull_of(scene, held)
    await scene.subscribe(connection, detail=details[0], since={scene.run.id: START} if held == "read" else {})
    await pull.asked.wait()
    await scene.unsubscribe(connection, "s1")
    await scene.subscribe(connection, detail=details[1], **fields)
    await scene.turns()
    pull.release()

    assert brief(await scene.frames(connection)) == ["reply", "reply", "reply", *frames]
    await is_followed_from(scene, connection, 5)
