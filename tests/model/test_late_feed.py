"""What the feed announces reaches the hub late, after runs have come another way and ended: no event comes twice on a
connection, and none is missing (G1, G2)."""

import os
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

import agentcast.server.hub.catch_up
import agentcast.server.hub.feed_place
import agentcast.server.hub.hub
import agentcast.server.hub.outbox
from agentcast.server.errors import LIMIT_EXCEEDED, CloseReason, Unavailable
from tests.model.client import Client, Line
from tests.model.scene import Scene, brief, playing
from tests.model.world import Connection, Run, World

MANY = 400


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with playing() as scene:
        yield scene


def shown(frames: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Run → the seqs of its events, in the order in which they came."""
    runs: dict[str, list[int]] = {}
    for frame in frames:
        if frame["type"] == "event":
            runs.setdefault(frame["run"], []).append(frame["seq"])
    return runs


async def by_start(scene: Scene, connection: Connection) -> None:
    await scene.start(connection)


async def by_its_id(scene: Scene, connection: Connection) -> None:
    await scene.create()
    run = scene.started[-1].id
    await scene.subscribe(connection, to={"run": run}, since={run: {"seq": 0}})


@pytest.mark.parametrize("detail", ["full", "progress"])
async def test_a_run_that_was_left_goes_on_where_it_was_when_its_announcement_comes_late(
    scene: Scene, detail: str
) -> None:
    connection = await scene.connect()
    await scene.subscribe(connection, to={"all": True})
    await scene.frames(connection)
    scene.bus.hold("read_feed")
    await scene.create()
    run = scene.started[-1]
    await scene.subscribe(connection, to={"run": run.id}, since={run.id: {"seq": 0}}, detail=detail)
    await run.append(scene.bus, ["status", "text"])
    frames = await scene.frames(connection)
    (reply,) = [frame for frame in frames if frame["type"] == "reply"]
    await scene.unsubscribe(connection, reply["result"]["subscription"])
    assert brief(await scene.frames(connection)) == ["reply"]
    await run.append(scene.bus, ["status"])
    assert brief(await scene.frames(connection)) == [], "nobody has brought the run yet"

    scene.bus.release("read_feed")
    late = await scene.frames(connection)
    await run.append(scene.bus, ["status", "end"])
    late += await scene.frames(connection)

    seqs = [frame["seq"] for frame in frames + late if frame["type"] in ("event", "snapshot")]
    assert seqs == sorted(seqs), "no event comes twice"
    assert len(set(seqs)) == len(seqs) or detail == "progress"
    if detail == "full":
        assert shown(frames + late) == {run.id: list(range(1, run.head + 1))}
    else:
        assert brief(late)[0] == "snapshot 4", "what the other detail had left out"
    await scene.create()
    await scene.frames(connection)
    connection.outbox.feed.forget()
    assert not connection.outbox.feed.past, "the announcement has passed"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("bring", [by_start, by_its_id])
async def test_runs_that_ended_while_the_feed_was_late_are_not_brought_again(
    scene: Scene, bring: Callable[[Scene, Connection], Any]
) -> None:
    connection = await scene.connect()
    await scene.subscribe(connection, to={"all": True})
    assert brief(await scene.frames(connection)) == ["reply", "snapshot 1"]
    scene.bus.hold("read_feed")
    frames = []
    for _ in range(MANY):
        await bring(scene, connection)
        frames += await scene.frames(connection)
        await scene.started[-1].append(scene.bus, ["status", "end"])
        frames += await scene.frames(connection)
    late = [await scene.create() for _ in range(3)]

    scene.bus.release("read_feed")
    for _ in range(MANY // 10):
        frames += await scene.frames(connection)

    assert shown(frames) == {run.id: [1, 2, 3] for run in scene.started[:MANY]} | {run.run: [1] for run in late}
    connection.outbox.put_notices()
    assert brief(await scene.frames(connection)) == ["feed"]
    await scene.create()
    await scene.frames(connection)
    connection.outbox.feed.forget()
    assert not connection.outbox.feed.past, "the announcements have passed"


async def test_a_run_that_had_ended_before_the_subscription_is_not_brought_by_a_late_announcement(scene: Scene) -> None:
    connection = await scene.connect()
    scene.bus.hold("read_feed")
    await scene.create()
    await scene.started[-1].append(scene.bus, ["end"])
    await scene.create()  # active when the subscription is made
    await scene.subscribe(connection, to={"all": True})
    reply, *frames = await scene.frames(connection)
    assert [frame["run"] for frame in frames] == [scene.run.id, scene.started[1].id]
    assert reply["result"]["feed"].endswith(":3")
    await scene.create()
    await scene.started[-1].append(scene.bus, ["end"])

    scene.bus.release("read_feed")

    assert shown(await scene.frames(connection)) == {scene.started[2].id: [1, 2]}
    connection.outbox.put_notices()
    assert [frame["position"][-2:] for frame in await scene.frames(connection)] == [":4"]


async def test_a_run_that_was_active_at_the_subscription_and_has_ended_is_not_brought_by_a_late_announcement(
    scene: Scene,
) -> None:
    connection = await scene.connect()
    listing = scene.bus.catch("watch_feed")
    await scene.subscribe(connection, to={"all": True})
    await listing.asked.wait()
    scene.bus.hold("read_feed")
    await scene.create()  # after the position of the feed, and before the list of active runs
    listing.release()
    assert brief(await scene.frames(connection)) == ["reply", "snapshot 1", "snapshot 1"]
    await scene.started[-1].append(scene.bus, ["end"])
    assert brief(await scene.frames(connection)) == ["event 2"]

    scene.bus.release("read_feed")

    assert await scene.frames(connection) == []


async def test_a_run_that_one_rule_has_shown_to_its_end_is_not_brought_again_by_a_slower_one(scene: Scene) -> None:
    connection = await scene.connect()
    await scene.subscribe(connection, to={"all": True})
    await scene.frames(connection)
    listing = scene.bus.catch("list")
    await scene.subscribe(connection, to={"agent": "ant"})
    await listing.asked.wait()
    for _ in range(3):
        await scene.create()
        await scene.frames(connection)
        await scene.started[-1].append(scene.bus, ["end"])
        assert brief(await scene.frames(connection)) == ["event 2"]

    listing.release()

    assert brief(await scene.frames(connection)) == ["reply"]
    connection.outbox.put_notices()
    assert brief(await scene.frames(connection)) == ["feed"]
    assert len(connection.outbox.feed.past) <= 3


async def test_a_client_that_resumes_gets_what_was_announced_meanwhile_though_the_hub_reads_the_feed_late(
    scene: Scene,
) -> None:
    connection = await scene.connect()
    await scene.subscribe(connection, to={"all": True})
    (reply, *_) = await scene.frames(connection)
    await connection.hang_up()
    reading = scene.bus.catch("read_feed")  # by the hub
    for _ in range(3):
        await scene.create()
        await scene.started[-1].append(scene.bus, ["end"])
    await reading.asked.wait()

    again = await scene.connect()
    since = {scene.run.id: {"seq": 1, "epoch": scene.run.epoch}}
    await scene.subscribe(again, to={"all": True}, since=since, feed=reply["result"]["feed"])
    resumed = await scene.frames(again)
    reading.release()
    late = await scene.frames(again)
    await scene.create()

    assert shown(resumed) == {run.id: [1, 2] for run in scene.started[:3]}
    assert shown(late) == {}
    assert shown(await scene.frames(again)) == {scene.started[3].id: [1]}


async def test_a_run_announced_after_the_position_was_asked_for_is_not_missed(scene: Scene) -> None:
    """It is not in the list of active runs either: it has ended by then."""
    connection = await scene.connect()
    position = scene.bus.catch("watch_feed")
    await scene.subscribe(connection, to={"all": True})
    await position.asked.wait()
    await scene.create()
    await scene.started[-1].append(scene.bus, ["end"])
    await scene.turns()
    position.release()

    assert shown(await scene.frames(connection)) == {scene.started[-1].id: [1, 2]}


async def test_a_feed_that_does_not_have_the_position_any_more_leaves_no_rule_waiting(scene: Scene) -> None:
    """As a store that came back older than it was."""
    connection = await scene.connect()
    scene.bus.hold("read_feed")
    await scene.create()
    await scene.subscribe(connection, to={"all": True})
    await scene.frames(connection)
    (rule,) = scene.hub.rules._named.values()
    assert rule.joined is not None
    rule.joined = "lost:7"
    scene.bus.release("read_feed")
    await scene.frames(connection)

    await scene.create()

    assert shown(await scene.frames(connection)) == {scene.started[-1].id: [1]}


async def test_after_a_feed_that_was_trimmed_no_run_comes_twice_and_every_active_one_comes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with playing(feed_length=2) as scene:
        connection = await scene.connect()
        await scene.subscribe(connection, to={"all": True})
        await scene.frames(connection)
        scene.bus.hold("read_feed")
        await scene.create()  # its read is held, and answered with it alone
        await scene.turns()
        for number in range(6):
            await by_start(scene, connection)
            frames = await scene.frames(connection)
            if number % 2:
                await scene.started[-1].append(scene.bus, ["end"])
            frames += await scene.frames(connection)
            assert shown(frames) == {scene.started[-1].id: [1, 2][: 1 + number % 2]}
        unseen = await scene.create()
        scene.bus.release("read_feed")

        assert shown(await scene.frames(connection)) == {run: [1] for run in (scene.started[0].id, unseen.run)}
        assert "the feed does not reach back" in caplog.text


async def test_a_listing_that_fails_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agentcast.server.hub.hub, "jitter", lambda: 0.0)
    monkeypatch.setattr(agentcast.server.hub.catch_up, "jitter", lambda: 0.0)
    async with playing(feed_length=1) as scene:
        connection = await scene.connect()
        await scene.subscribe(connection, to={"all": True})
        await scene.frames(connection)
        reading, listing = scene.bus.catch("read_feed"), scene.bus.catch("list")
        await scene.create()
        await reading.asked.wait()
        await scene.create()
        await scene.create()
        reading.release()
        await listing.asked.wait()
        listing.release(Unavailable("away"))

        assert shown(await scene.frames(connection)) == {run.id: [1] for run in scene.started}


async def test_a_rule_whose_runs_cannot_be_subscribed_to_at_the_moment_holds_up_no_other(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agentcast.server.hub.hub, "jitter", lambda: 0.0)
    monkeypatch.setattr(agentcast.server.hub.catch_up, "jitter", lambda: 0.0)
    first, second = await scene.connect(), await scene.connect()
    await scene.subscribe(first, to={"agent": "ant"})
    await scene.subscribe(second, to={"agent": "bee"})
    await scene.frames(first)
    await scene.frames(second)
    opened = scene.bus.open

    async def refuse(deliver: dict[str, Any]) -> Any:
        if scene.started[0].id in deliver:
            raise Unavailable("not this one")
        return await opened(deliver)

    monkeypatch.setattr(scene.bus, "open", refuse)
    await scene.create("ant")
    await scene.create("bee")

    assert shown(await scene.frames(second)) == {scene.started[1].id: [1]}
    monkeypatch.undo()
    monkeypatch.setattr(agentcast.server.hub.hub, "jitter", lambda: 0.0)
    monkeypatch.setattr(agentcast.server.hub.catch_up, "jitter", lambda: 0.0)
    assert shown(await scene.frames(first)) == {scene.started[0].id: [1]}


async def test_a_connection_on_which_too_many_runs_end_before_the_feed_is_read_is_cut(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agentcast.server.hub.feed_place, "MAX_PAST", 2)
    cut: list[CloseReason] = []
    connection = await scene.connect()
    monkeypatch.setattr(connection, "cut", cut.append)
    await scene.subscribe(connection, to={"all": True})
    await scene.frames(connection)
    scene.bus.hold("read_feed")
    for count in range(3):
        assert not cut, count
        await by_start(scene, connection)
        await scene.turns()
        await scene.started[-1].append(scene.bus, ["end"])
    assert cut == [LIMIT_EXCEEDED]
    assert len(connection.outbox.feed.past) == 2


class Crowd:
    """Short runs without end, and clients who come, go and ask for the same runs by id and by rule."""

    def __init__(self, seed: int, feed: int) -> None:
        self.random = random.Random(seed)
        self.world = World(
            seed, late=True, flaky=True, log_events=8, max_ended=10_000, queue_frames=50, most=6, feed=feed
        )
        self.clients = [Client(self.world, name) for name in ("one", "two", "three")]
        self.active: list[Run] = []

    def step(self) -> None:
        """One more run, something that a client does, and the end of some runs."""
        self.world.do(self.world.create(self.random.choice(["ant", "bee"]), self.random.choice([None, "t"])))
        self.active.append(self.world.runs[-1])
        client = self.connected(self.random.choice(self.clients))
        self.act(client)
        self.world.do(self.world.turns(self.random.randint(0, 20)))
        while len(self.active) > self.random.randint(0, 4):
            run = self.active.pop(self.random.randrange(len(self.active)))
            self.world.do(run.append(self.world.bus, ["status", "end"]))
        for reader in self.clients:
            if reader.line is not None and self.random.random() < 0.8:
                reader.read(30)

    def act(self, client: Client) -> None:
        assert client.line is not None
        if len(client.line.asked) > 3:
            return
        detail = self.random.choice(["full", "progress"])
        match self.random.choice(["all", "agent", "run", "run", "start", "start", "leave", "leave", "tick", "cut", ""]):
            case "all":
                client.subscribe({"all": True}, detail, since="known", feed=self.random.random() < 0.5)
            case "agent":
                client.subscribe({"agent": "ant"}, detail, since="none", feed=False)
            case "run":
                client.subscribe({"run": self.world.runs[-1].id}, detail, since="known", feed=False)
            case "start":
                client.start("ant", detail)
                self.world.do(self.world.turns(self.random.randint(0, 30)))
                self.active += [run for run in self.world.runs[-3:] if not run.ended and run not in self.active]
            case "leave" if client.line.held and not client.line.asked and not client.line.leaving:
                client.unsubscribe(self.random.choice(list(client.line.held)))
            case "tick":
                client.line.connection.outbox.put_notices()
            case "cut" if self.random.random() < 0.1:
                self.world.do(client.line.connection.hang_up())
                client.cut()

    def connected(self, client: Client) -> Client:
        if client.line is None:
            client.line = Line(self.world.do(self.world.connect()))
            client.subscribe({"all": True}, "full", since="known", feed=True)
        return client

    def come_to_rest(self) -> None:
        while True:
            self.world.bus.well = True
            self.world.do(self.world.settle())
            self.world.bus.well = False
            if not sum(client.read(1_000) for client in self.clients if client.line is not None):
                break
        for client in self.clients:
            if client.line is not None:
                client.line.connection.outbox.put_notices()
                client.read(100)
                client.check()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("feed", "rest"), [(400, 100), (40_000, 1_200)], ids=["late", "very late"])
def test_a_thousand_short_runs(feed: int, rest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agentcast.server.hub.hub, "jitter", lambda: 0.0)
    monkeypatch.setattr(agentcast.server.hub.catch_up, "jitter", lambda: 0.0)
    monkeypatch.setattr(agentcast.server.hub.outbox, "TAKE_BYTES", 1)
    crowd = Crowd(int(os.environ.get("CROWD_SEED", "0")), feed)
    try:
        for step in range(1_200):
            crowd.step()
            if step % rest == rest - 1:
                crowd.come_to_rest()
    finally:
        crowd.world.close()
