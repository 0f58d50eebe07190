"""Joining, catching up and being brought runs, on a bus whose answers may be late; and every bound (G1, G2, G4)."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from agentcast.server.bus.base import Filter, Head, RunInfo, Snapshot
from agentcast.server.errors import RUN_LOST, NotFound, Unavailable
from agentcast.server.hub import catch_up, outbox, rules
from agentcast.server.hub import hub as module
from agentcast.server.hub.follower import State
from agentcast.server.hub.frames import Segment
from agentcast.server.hub.hub import Hub
from agentcast.server.hub.ring import Rings
from agentcast.server.protocol import Detail, Position, To
from tests.contract.support import Log, new_run
from tests.support.buses import HeldBus
from tests.support.following import Client


class Paused(Exception):
    """The hub was about to wait before it asks again."""


def pause() -> float:
    raise Paused


class CountingBus(HeldBus):
    """Counts its questions, and how many of them wait at most at the same time."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.questions: list[str] = []
        self.waiting = self.most = 0

    async def _answer(self, question: str, answer: Any) -> Any:
        self.questions.append(question)
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        try:
            return await super()._answer(question, answer)
        finally:
            self.waiting -= 1


class Stage:
    def __init__(self, hub: Hub, bus: CountingBus) -> None:
        self.hub = hub
        self.bus = bus

    async def join(
        self,
        client: Client,
        *,
        name: str = "s",
        detail: Detail = "full",
        since: Mapping[str, Position] | None = None,
        feed: str | None = None,
        **to: Any,
    ) -> dict[str, Any]:
        """The reply to a `subscribe`."""
        asked = To(**to or {"all": True})
        async with self.hub.join(client.outbox, name, "ann", asked, detail, since or {}, feed) as join:
            join.commit()
        return join.result

    async def live(self, log: Log) -> Client:
        """A client that has all of the log so far."""
        client = Client()
        await self.join(client, run=log.run, since={log.run: Position(seq=0)})
        await self.hub.catch_up(client.outbox)
        assert client.outbox.followers[log.run].state is State.LIVE
        client.take()
        return client

    async def turns(self, count: int = 100) -> None:
        for _ in range(count):
            await checkpoint()


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    bus = CountingBus()
    hub = Hub(bus)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            await tasks.start(hub.run)
            yield Stage(hub, bus)
            tasks.cancel_scope.cancel()


@asynccontextmanager
async def meanwhile(work: Any, *arguments: Any) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work, *arguments)
        yield


# -- Joining -------------------------------------------------------------------------------------------------------


async def test_nothing_is_queued_before_the_reply_and_everything_after_it(stage: Stage) -> None:
    log, client = await Log.create(stage.bus), Client()
    since = {log.run: Position(seq=0)}

    async with stage.hub.join(client.outbox, "s", "ann", To(run=log.run), "full", since) as join:
        await log.append(2)
        await stage.hub.catch_up(client.outbox)
        assert (client.seqs_of(), client.link.pulled) == ([], 0)
        join.commit()
    await stage.hub.catch_up(client.outbox)
    await log.append(1)

    assert join.result == {
        "subscription": "s",
        "runs": [{"run": log.run, "epoch": log.epoch, "seq": 1, "recovered": True}],
    }
    assert client.seqs_of() == [1, 2, 3, 4]


async def test_a_join_that_is_left_without_its_reply_leaves_nothing_behind(stage: Stage) -> None:
    log, client = await Log.create(stage.bus), Client()

    async def leave(to: To) -> None:
        async with stage.hub.join(client.outbox, "s", "ann", to, "full", {}):
            assert stage.hub.topics
            raise Paused

    for to in (To(run=log.run), To(all=True)):
        with pytest.raises(Paused):
            await leave(to)

    assert (stage.hub.topics, len(stage.hub.rules), client.outbox.subscriptions) == ({}, 0, {})
    assert stage.bus.subscribed == 0


@pytest.mark.parametrize("question", ["open", "list", "watch_feed", "info"])
async def test_a_join_that_is_cancelled_leaves_nothing_behind(stage: Stage, question: str) -> None:
    log, client = await Log.create(stage.bus), Client()
    stage.bus.hold(question)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: stage.join(client, since={log.run: Position(seq=0)}))
        await stage.bus.asked(question)
        tasks.cancel_scope.cancel()

    assert (stage.hub.topics, len(stage.hub.rules), client.outbox.subscriptions) == ({}, 0, {})
    assert stage.bus.subscribed == 0
    assert client.outbox.feed.beginning == 0


async def test_a_run_that_does_not_exist_or_is_anothers_is_not_found(stage: Stage) -> None:
    await stage.bus.create(new_run("bobs", principal="bob"))
    client = Client()
    for run in ("bobs", "nowhere"):
        with pytest.raises(NotFound, match=f"there is no run '{run}'"):
            await stage.join(client, run=run)
    with pytest.raises(NotFound):
        await stage.hub.snapshot("nowhere")

    assert (stage.hub.topics, client.outbox.subscriptions, stage.bus.subscribed) == ({}, {}, 0)


async def test_joining_many_runs_takes_as_many_questions_as_joining_one(stage: Stage) -> None:
    logs = [await Log.create(stage.bus) for _ in range(300)]
    since = {log.run: Position(seq=1, epoch=log.epoch) for log in logs}
    await stage.turns()
    stage.bus.questions.clear()
    await stage.join(Client(), since=since)
    asked = sorted(stage.bus.questions)

    assert asked == ["info", "list", "open", "watch_feed"]
    stage.bus.questions.clear()
    reply = await stage.join(Client(), since={logs[0].run: since[logs[0].run]})
    assert len(reply["runs"]) == 300
    assert "open" not in stage.bus.questions, "they are open already"


async def test_what_two_join_at_the_same_time_is_opened_once(stage: Stage) -> None:
    log = await Log.create(stage.bus)
    stage.bus.hold("open")
    async with meanwhile(lambda: stage.join(Client(), run=log.run)), meanwhile(lambda: stage.join(Client())):
        await stage.bus.asked("open")
        await stage.turns()
        stage.bus.release("open")

    assert stage.bus.questions.count("open") == 1
    assert stage.bus.subscribed == 1
    assert len(stage.hub.topics[log.run].followers) == 2


async def test_who_waits_for_another_that_fails_to_open_a_run_opens_it_itself(stage: Stage) -> None:
    log, first, second = await Log.create(stage.bus), Client(), Client()
    opening = stage.bus.catch("open")

    async def fails() -> None:
        with pytest.raises(Unavailable):
            await stage.join(first, run=log.run)

    async with meanwhile(fails):
        await opening.asked.wait()
        async with meanwhile(lambda: stage.join(second, run=log.run)):
            await stage.turns()
            opening.release(Unavailable("away"))

    assert (list(first.outbox.followers), list(second.outbox.followers)) == ([], [log.run])
    assert stage.bus.subscribed == 1


async def test_a_client_that_is_ahead_of_what_was_delivered_here_has_the_bus_asked(stage: Stage) -> None:
    log = await Log.create(stage.bus)
    await stage.live(log)
    subscribers = stage.bus._logs[log.run].subscribers
    kept = dict(subscribers)
    subscribers.clear()
    await log.append(3)  # not delivered yet
    subscribers.update(kept)

    reply = await stage.join(Client(), run=log.run, since={log.run: Position(seq=4, epoch=log.epoch)})

    assert reply["runs"] == [{"run": log.run, "epoch": log.epoch, "seq": 4, "recovered": True}]


# -- Leaving -------------------------------------------------------------------------------------------------------


async def test_who_leaves_a_run_that_another_subscription_wants_goes_on_getting_it(stage: Stage) -> None:
    log = await Log.create(stage.bus)
    client = await stage.live(log)
    await stage.join(client, name="all")

    stage.hub.leave(client.outbox, "s")
    stage.hub.leave(client.outbox, "unknown")
    await log.append(1)
    assert client.seqs_of() == [2]
    stage.hub.leave(client.outbox, "all")
    await log.append(1)

    assert client.seqs_of() == []
    assert (stage.hub.topics, len(stage.hub.rules), stage.bus.subscribed) == ({}, 0, 0)
    assert list(client.outbox.feed.past) == [log.run]


@pytest.mark.parametrize("broken", [False, True])
async def test_nothing_is_left_of_a_connection_that_is_gone_even_if_its_books_are_wrong(
    stage: Stage, broken: bool
) -> None:
    log = await Log.create(stage.bus)
    client, other = await stage.live(log), await stage.live(log)
    await stage.join(client, name="all")
    if broken:
        client.outbox.fail(RuntimeError("broken on purpose"))
        client.outbox.followers.clear()

    stage.hub.disconnect(client.outbox)

    assert [follower.outbox for follower in stage.hub.topics[log.run].followers] == [other.outbox]
    assert len(stage.hub.rules) == 0
    stage.hub.disconnect(other.outbox)
    assert (stage.hub.topics, stage.bus.subscribed) == ({}, 0)


# -- Catching up ---------------------------------------------------------------------------------------------------


async def test_a_head_beyond_what_was_delivered_makes_a_live_follower_catch_up(stage: Stage) -> None:
    log = await Log.create(stage.bus)
    client = await stage.live(log)
    kept = stage.bus._logs[log.run]
    subscribers = dict(kept.subscribers)
    kept.subscribers.clear()
    await log.append(2)  # frames that are lost on the way
    kept.subscribers.update(subscribers)

    kept.deliver(Head(log.run, log.epoch, 3))

    assert client.outbox.is_behind
    await stage.hub.catch_up(client.outbox)
    assert client.seqs_of() == [2, 3]


async def test_a_log_that_is_shorter_than_it_was_is_asked_again_after_a_pause(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await Log.create(stage.bus)
    client = await stage.live(log)
    stage.bus._logs[log.run].deliver(Head(log.run, log.epoch, 9))

    monkeypatch.setattr(catch_up, "jitter", pause)
    with pytest.raises(Paused):
        await stage.hub.catch_up(client.outbox)


async def test_pages_and_states_are_read_once_for_all_who_ask_at_the_same_time(stage: Stage) -> None:
    log = await Log.create(stage.bus)
    await log.append(5)
    await log.save(6)
    replaying, fresh = [Client() for _ in range(20)], [Client() for _ in range(20)]
    for client in replaying:
        await stage.join(client, run=log.run, since={log.run: Position(seq=0)})
    for client in fresh:
        await stage.join(client, run=log.run)
    stage.bus.questions.clear()
    for question in ("read", "load_snapshot"):
        stage.bus.hold(question)

    async with anyio.create_task_group() as tasks:
        for client in [*replaying, *fresh]:
            tasks.start_soon(stage.hub.catch_up, client.outbox)
        await stage.turns()
        for question in ("read", "load_snapshot"):
            stage.bus.release(question)

    assert all(client.seqs_of() == [1, 2, 3, 4, 5, 6] for client in replaying)
    assert [client.take()[0]["seq"] for client in fresh] == [6] * 20
    assert stage.bus.questions.count("load_snapshot") == 1
    assert stage.bus.questions.count("read") <= 3, "a page for each of the two, and one at the head"


async def test_what_the_ring_holds_is_not_read(stage: Stage) -> None:
    log = await Log.create(stage.bus)
    await stage.live(log)
    await log.append(5)
    client = Client()
    await stage.join(client, run=log.run, since={log.run: Position(seq=1, epoch=log.epoch)})
    stage.bus.questions.clear()

    await stage.hub.catch_up(client.outbox)

    assert client.seqs_of() == [2, 3, 4, 5, 6]
    assert "read" not in stage.bus.questions


async def test_a_follower_that_has_everything_reads_nothing(stage: Stage) -> None:
    log, client = await Log.create(stage.bus), Client()
    await log.append(2)
    await stage.join(client, run=log.run, since={log.run: Position(seq=3, epoch=log.epoch)})
    stage.bus.questions.clear()

    await stage.hub.catch_up(client.outbox)

    assert client.outbox.followers[log.run].state is State.LIVE
    assert "read" not in stage.bus.questions


async def test_a_run_that_nobody_follows_any_more_leaves_nothing_in_the_rings(stage: Stage) -> None:
    log, client = await Log.create(stage.bus), Client()
    await stage.join(client, run=log.run)
    await log.append(1, size=500)
    assert len(stage.hub._rings) == 500

    stage.hub.disconnect(client.outbox)

    assert len(stage.hub._rings) == 0


@pytest.mark.parametrize("meantime", ["left", "lost", "pulled"])
async def test_a_page_that_comes_late_is_applied_only_where_it_is_still_asked_for(stage: Stage, meantime: str) -> None:
    log, client = await Log.create(stage.bus), Client()
    await log.append(2)
    await stage.join(client, run=log.run, since={log.run: Position(seq=0)})
    follower = client.outbox.followers[log.run]
    reading = stage.bus.catch("read")
    async with meanwhile(stage.hub.catch_up, client.outbox):
        await reading.asked.wait()
        if meantime == "left":
            stage.hub.leave(client.outbox, "s")
        elif meantime == "lost":
            await log.rebase(3, b'{"status":"running"}')
        else:
            stage.hub.topics[log.run].supply(follower, Segment((await log.read_all())[:2]))
        reading.release()

    expected = {"left": [], "lost": ["gap", "snapshot"], "pulled": ["event 1", "event 2", "event 3"]}
    assert client.brief() == expected[meantime]


@pytest.mark.parametrize("question", ["read", "info"])
async def test_a_run_that_was_forgotten_before_it_was_pulled_ends_the_connection(
    stage: Stage, question: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, client = await Log.create(stage.bus), Client()
    await stage.join(client, run=log.run, since={log.run: Position(seq=0)} if question == "read" else {})

    async def forgotten(*_: Any) -> Any:
        raise NotFound("forgotten")

    monkeypatch.setattr(stage.bus, question, forgotten)
    await stage.hub.catch_up(client.outbox)

    assert client.link.cuts == [RUN_LOST]
    assert stage.hub.topics == {}


async def test_a_client_that_cannot_be_pulled_for_at_the_moment_is_pulled_for_later(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catch_up, "jitter", lambda: 0.0)
    log, client = await Log.create(stage.bus), Client()
    await stage.join(client, run=log.run, since={log.run: Position(seq=0)})
    reading = stage.bus.catch("read")
    reading.release(Unavailable("away"))

    await stage.hub.catch_up(client.outbox)

    assert client.seqs_of() == [1]


# -- What is brought -----------------------------------------------------------------------------------------------


async def test_one_run_that_is_slow_to_open_delays_no_other(stage: Stage) -> None:
    client = Client()
    await stage.join(client)
    opening = stage.bus.catch("open")
    await stage.bus.create(new_run("slow"))
    await opening.asked.wait()

    for n in range(5):
        await stage.bus.create(new_run(f"quick{n}"))
        await stage.turns()
        assert f"quick{n}" in client.outbox.followers

    assert "slow" not in client.outbox.followers
    client.outbox.put_notices()
    assert client.take() == [{"type": "feed", "position": client.outbox.feed._sent}]
    before = client.outbox.feed._sent
    opening.release()
    await stage.turns()
    await stage.hub.catch_up(client.outbox)
    assert "slow" in client.outbox.followers
    client.outbox.put_notices()
    assert client.outbox.feed._sent != before, "the position had waited for it"


async def test_groups_of_runs_that_are_being_opened_are_bounded(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    await stage.join(client)
    stage.bus.questions.clear()
    stage.bus.hold("open")

    for n in range(module.BRINGING + 5):
        await stage.bus.create(new_run(f"run{n}"))
        await stage.turns()

    assert stage.bus.questions.count("open") == module.BRINGING
    stage.bus.release("open")
    await stage.turns()
    assert len(client.outbox.followers) == module.BRINGING + 5


# -- Bounds --------------------------------------------------------------------------------------------------------


async def test_a_subscription_that_covers_more_runs_than_a_connection_may_follow_says_so(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "MAX_FOLLOWED", 3)
    runs = [(await Log.create(stage.bus)).run for _ in range(5)]
    client = Client()
    await stage.turns()

    reply = await stage.join(client)

    assert reply["truncated"] == 2
    assert [entry["run"] for entry in reply["runs"]] == runs[2:], "the oldest are left out"
    assert set(client.outbox.followers) == set(runs[2:])
    client.outbox.put_notices()
    assert [frame["type"] for frame in client.take()] == ["feed"]

    for _ in range(2):
        await Log.create(stage.bus)
    await stage.turns()
    client.outbox.put_notices()

    assert len(client.outbox.followers) == 3
    notice = {"type": "truncated", "subscription": "s", "runs": 2}
    assert notice in client.take()
    assert client.link.cuts == [], "the connection goes on"
    assert set(stage.hub.topics) == set(runs[2:])


async def test_a_subscription_to_one_run_too_many_says_so(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_FOLLOWED", 1)
    first, second = await Log.create(stage.bus), await Log.create(stage.bus)
    client = await stage.live(first)

    assert await stage.join(client, name="s2", run=second.run) == {"runs": [], "truncated": 1}
    client.outbox.put_notices()

    assert client.take() == [], "the reply says it"
    assert client.outbox.subscriptions.keys() == {"s"}, "it takes no place"
    assert "truncated" not in await stage.join(client, name="s3", run=first.run), "that one it follows"


async def test_a_subscription_to_one_run_whose_room_is_taken_meanwhile_ends_and_says_so(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "MAX_FOLLOWED", 1)
    first, second = await Log.create(stage.bus), await Log.create(stage.bus)
    client = Client()
    async with stage.hub.join(client.outbox, "s1", "ann", To(run=first.run), "full", {}) as join:
        await stage.join(client, name="s2", run=second.run)
        join.commit()

    assert {"type": "truncated", "subscription": "s1", "runs": 1} in client.take()
    assert client.outbox.subscriptions.keys() == {"s2"}


async def test_a_subscription_to_one_run_too_many_may_be_left_before_its_reply(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "MAX_FOLLOWED", 1)
    first, second = await Log.create(stage.bus), await Log.create(stage.bus)
    client = await stage.live(first)
    opening = stage.bus.catch("open")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: stage.join(client, name="s2", run=second.run))
        await opening.asked.wait()
        stage.hub.leave(client.outbox, "s2")
        opening.release()

    assert client.outbox.subscriptions.keys() == {"s"}


async def test_opening_thousands_of_runs_does_not_hold_the_loop(stage: Stage) -> None:
    runs = [(await Log.create(stage.bus)).run for _ in range(1_000)]
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        topics = stage.hub._pin(runs, [])
        await stage.hub._open(topics)
        tasks.cancel_scope.cancel()

    assert turns >= len(runs) / module.SLICE
    for topic in topics:
        topic.unpin()


async def test_one_that_has_room_says_nothing_of_it(stage: Stage) -> None:
    await Log.create(stage.bus)

    assert "truncated" not in await stage.join(Client())


async def test_an_open_ended_subscription_asks_for_no_more_runs_than_it_can_bring(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_LISTED", 7)
    limits: list[int] = []
    listed = stage.bus.list

    async def listing(filter: Filter) -> Sequence[RunInfo]:
        limits.append(filter.limit)
        return await listed(filter)

    monkeypatch.setattr(stage.bus, "list", listing)

    await stage.join(Client())

    assert limits == [8], "one more shows whether some are left out"
    assert rules.MAX_LISTED == outbox.MAX_FOLLOWED


async def test_active_runs_are_listed_page_by_page(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "LIST_PAGE", 2)
    runs = [(await Log.create(stage.bus)).run for _ in range(7)]

    assert [info.run for info in await rules.list_active(stage.bus, Filter())] == runs[::-1]
    assert [info.run for info in await rules.list_active(stage.bus, Filter(), 5)] == runs[:1:-1]


async def test_after_a_hole_in_the_feed_every_active_run_comes(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "LIST_PAGE", 2)
    client = Client()
    await stage.join(client)
    await stage.turns()
    stage.hub.feed.place.position = "another:1"
    runs = {(await Log.create(stage.bus)).run for _ in range(7)}
    await stage.turns()

    assert set(client.outbox.followers) == runs


async def test_followers_of_one_connection_that_are_pulled_for_at_once_are_bounded(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catch_up, "PULLS", 4)
    logs, client = [await Log.create(stage.bus) for _ in range(20)], Client()
    await stage.join(client, since={log.run: Position(seq=0) for log in logs})
    stage.bus.most = 0
    stage.bus.hold("read")

    async with meanwhile(stage.hub.catch_up, client.outbox):
        await stage.bus.asked("read")
        await stage.turns()
        assert stage.bus.waiting == 4
        stage.bus.release("read")

    assert stage.bus.most == 4
    assert len(client.take()) == 20
    assert not client.outbox.is_behind


def rings(hub: Hub) -> list[int]:
    return [one._ring.size for one in hub.topics.values()]


async def test_what_is_kept_of_the_newest_frames_is_bounded_for_each_run_and_for_all(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.hub, "_rings", Rings(each=2_000, total=6_000))
    logs = [await Log.create(stage.bus)]
    await stage.join(Client(), name="all")
    for _ in range(10):
        await logs[0].append(1, size=500)
    assert rings(stage.hub) == [2_000]

    logs += [await Log.create(stage.bus) for _ in range(3)]
    await stage.turns()
    for log in logs[1:]:
        for _ in range(10):
            await log.append(1, size=500)

    assert rings(stage.hub) == [0, 2_000, 2_000, 2_000], "the one that was extended longest ago is emptied"
    assert len(stage.hub._rings) == 6_000


def kept(hub: Hub) -> int:
    return sum(len(one.snapshot.state) for one in hub.topics.values() if one.snapshot is not None)


async def test_what_is_kept_of_states_is_bounded_for_all_runs(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    logs, client = [await Log.create(stage.bus) for _ in range(6)], Client()
    monkeypatch.setattr(catch_up, "load_state", state_of(stage, 1_000))
    monkeypatch.setattr(catch_up, "SNAPSHOTS_BYTES", 3_500)
    await stage.join(client)

    await stage.hub.catch_up(client.outbox)

    assert len(client.take()) == 6, "all were sent"
    assert kept(stage.hub) == stage.hub._catch_up._size == 3_000
    for log in logs:
        await stage.hub.snapshot(log.run)
    assert kept(stage.hub) == stage.hub._catch_up._size == 3_000


async def test_nothing_is_kept_of_the_state_of_a_run_that_nobody_follows_any_more(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, client = await Log.create(stage.bus), Client()
    await log.save(1)
    await stage.join(client, run=log.run)
    loading = stage.bus.catch("load_snapshot")
    async with meanwhile(stage.hub.catch_up, client.outbox):
        await loading.asked.wait()
        stage.hub.leave(client.outbox, "s")
        loading.release()

    assert (stage.hub.topics, stage.hub._catch_up._kept, stage.hub._catch_up._size) == ({}, {}, 0)


async def test_the_state_of_a_run_is_let_go_of_with_its_last_follower(stage: Stage) -> None:
    log, client = await Log.create(stage.bus), Client()
    await log.save(1)
    await stage.join(client, run=log.run)
    await stage.hub.catch_up(client.outbox)
    assert list(stage.hub._catch_up._kept) == [stage.hub.topics[log.run]]

    stage.hub.disconnect(client.outbox)

    assert (stage.hub._catch_up._kept, stage.hub._catch_up._size) == ({}, 0)


def state_of(stage: Stage, size: int) -> Any:
    async def load(bus: Any, run: str) -> Snapshot:
        return Snapshot(run, stage.hub.topics[run].epoch, stage.hub.topics[run].head, b'"'.ljust(size - 1) + b'"')

    return load
