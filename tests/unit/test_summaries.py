"""Detail `summary` on a bus: joining, changes, gaps, and how often (with a clock of the test's own)."""

import itertools
from collections.abc import AsyncIterator, Collection
from typing import Any

import anyio
import orjson
import pytest
from anyio.lowlevel import checkpoint

from agentcast.server.bus.base import DeliverSummaries, Filter, Listing, Subscription, Summary, new_run_id
from agentcast.server.errors import NotFound, TooMany, Unavailable
from agentcast.server.hub import board as board_module
from agentcast.server.hub import live_list, summaries
from agentcast.server.hub.hub import Hub
from agentcast.server.protocol import To
from tests.contract.support import Log, new_run
from tests.contract.support import summary as summary_of
from tests.support.buses import HeldBus
from tests.support.following import Client


class Clock:
    """The hub's `sleep`, which ends when the test moves the time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._sleeping: list[tuple[float, anyio.Event]] = []

    async def sleep(self, seconds: float) -> None:
        event = anyio.Event()
        self._sleeping.append((self.now + seconds, event))
        await event.wait()

    def pass_by(self, seconds: float) -> None:
        """Let the time pass."""
        self.now += seconds
        for one in [one for one in self._sleeping if one[0] <= self.now + 1e-9]:
            self._sleeping.remove(one)
            one[1].set()

    async def advance(self, seconds: float) -> None:
        """Let the time pass, and let everything that is due happen."""
        end = self.now + seconds
        while due := min((at for at, _ in self._sleeping if at <= end + 1e-9), default=None):
            self.pass_by(max(due - self.now, 0.0))
            await settle()
        self.now = end


async def settle() -> None:
    for _ in range(20):
        await checkpoint()
    await anyio.wait_all_tasks_blocked()


class CountingBus(HeldBus):
    """Counts its lists and its watchers of summaries."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.lists: list[Filter] = []
        self.broken = False

    async def list(self, filter: Filter) -> Listing:
        self.lists.append(filter)
        if self.broken:
            raise Unavailable("away")
        return await super().list(filter)

    async def summaries(self, runs: Collection[str]) -> dict[str, Summary]:
        return await self._answer("summaries", super().summaries(runs))

    async def watch_summaries(self, deliver: DeliverSummaries) -> Subscription:
        return await self._answer("watch_summaries", super().watch_summaries(deliver))

    def is_watched(self) -> bool:
        return bool(self._summary_watchers)

    def miss(self) -> None:
        for deliver in self._summary_watchers.values():
            deliver(None)


class Stage:
    def __init__(self, hub: Hub, bus: CountingBus, clock: Clock) -> None:
        self.hub = hub
        self.bus = bus
        self.clock = clock

    async def join(self, client: Client, *, name: str = "s", **to: Any) -> dict[str, Any]:
        async with self.hub.summaries.join(client.outbox, name, "ann", To(**to or {"all": True})) as join:
            join.commit()
        await settle()
        return join.result

    async def watch_page(self, client: Client, *, name: str = "s", **filter: Any) -> list[str]:
        """The runs that the reply shows."""
        async with self.hub.lists.join(client.outbox, name, Filter(**{"principal": "ann"} | filter)) as join:
            join.commit()
        await settle()
        return [item["run"] for item in orjson.loads(orjson.dumps(join.result["runs"]))]

    async def publish(self, log: Log, at: int | None = None, **fields: Any) -> None:
        seq = log.head if at is None else at
        data = orjson.dumps({"run": log.run, "at": seq, "status": fields.get("status", "running")})
        await self.bus.publish_summaries([summary_of(log, seq, data=data, **fields)])
        await settle()

    async def create(self, count: int = 1, **fields: Any) -> list[Log]:
        return [await Log.create(self.bus, new_run(**fields)) for _ in range(count)]

    async def finish(self, log: Log) -> None:
        await log.append(end=True)
        await self.publish(log, status="done")


@pytest.fixture
async def stage(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    clock = Clock()
    for module in (summaries, live_list):
        monkeypatch.setattr(module, "sleep", clock.sleep)
    bus = CountingBus()
    hub = Hub(bus)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            await tasks.start(hub.run)
            yield Stage(hub, bus, clock)
            tasks.cancel_scope.cancel()


def records(client: Client) -> list[dict[str, Any]]:
    return [item for frame in client.take() if frame["type"] == "summary" for item in frame["runs"]]


def runs(client: Client) -> list[str]:
    return [item["run"] for item in records(client)]


# -- Joining -------------------------------------------------------------------------------------------------------


async def test_the_active_runs_come_after_the_reply_stored_or_made_of_what_the_bus_knows(stage: Stage) -> None:
    stored, fresh, over = await stage.create(3, thread="t")
    (bobs,) = await stage.create(principal="bob")
    await stage.publish(stored, 7)
    await stage.finish(over)
    client = Client()

    assert await stage.join(client) == {"subscription": "s"}

    shown = {item["run"]: item for item in records(client)}
    assert shown == {
        stored.run: {"run": stored.run, "at": 7, "status": "running"},
        fresh.run: {"run": fresh.run, "agent": "echo", "thread": "t", "status": "queued", "created": 1_000.0},
    }
    assert bobs.run not in shown


@pytest.mark.parametrize("to", [{"agent": "echo"}, {"thread": "t"}])
async def test_an_agent_or_a_thread_is_all_that_is_shown(stage: Stage, to: dict[str, str]) -> None:
    (mine,) = await stage.create(thread="t")
    (other,) = await stage.create(agent="other", thread="u")
    client = Client()
    await stage.join(client, **to)
    assert runs(client) == [mine.run]

    await stage.clock.advance(1)
    await stage.publish(other, 2, agent="other", thread="u")
    await stage.publish(mine, 2, thread="t")

    assert runs(client) == [mine.run]


async def test_a_new_run_comes_by_its_first_record(stage: Stage) -> None:
    client = Client()
    await stage.join(client)
    await stage.clock.advance(1)
    (log,) = await stage.create()

    await stage.publish(log)

    assert runs(client) == [log.run]
    assert not client.outbox.followers
    assert not stage.hub.topics


async def test_runs_by_name_come_also_if_they_have_ended_and_the_missing_are_named(stage: Stage) -> None:
    running, over, bare = await stage.create(3)
    (bobs,) = await stage.create(principal="bob")
    await stage.publish(running)
    await stage.finish(over)
    await bare.append(end=True)
    unknown = new_run_id()
    client = Client()

    reply = await stage.join(client, runs=[running.run, over.run, bare.run, bobs.run, unknown])

    assert reply == {"subscription": "s", "missing": [bobs.run, unknown]}
    shown = {item["run"]: item["status"] for item in records(client)}
    assert shown == {running.run: "running", over.run: "done", bare.run: "done"}
    await stage.clock.advance(1)
    await stage.finish(running)
    assert [item["status"] for item in records(client)] == ["done"]
    assert client.outbox.subscriptions == {}, "all of them have ended"
    assert not stage.bus.is_watched()


async def test_asking_only_for_runs_that_do_not_exist_is_refused(stage: Stage) -> None:
    client = Client()
    for to in ({"run": "nope"}, {"runs": ["nope", "neither"]}):
        with pytest.raises(NotFound, match="nope"):
            await stage.join(client, **to)
    assert client.outbox.subscriptions == {}
    assert stage.hub.summaries.board.unwatched


async def test_the_bus_is_watched_only_while_somebody_watches(stage: Stage) -> None:
    one, other = Client(), Client()
    assert not stage.bus.is_watched()
    await stage.join(one)
    await stage.join(other)
    stage.hub.leave(one.outbox, "s")
    assert stage.bus.is_watched()
    stage.hub.disconnect(other.outbox)

    assert not stage.bus.is_watched()
    assert len(stage.hub.summaries.board) == 0
    await stage.join(one)
    assert stage.bus.is_watched()


async def test_a_hundred_dashboards_read_the_active_runs_once(stage: Stage) -> None:
    logs = await stage.create(20)
    stage.bus.hold("list")
    clients = [Client() for _ in range(100)]
    async with anyio.create_task_group() as tasks:
        for client in clients:
            tasks.start_soon(stage.join, client)
        await stage.bus.asked("list")
        stage.bus.release("list")
    late = Client()
    await stage.join(late)
    await stage.clock.advance(1)

    assert len(stage.bus.lists) == 1
    assert all(len(runs(client)) == len(logs) for client in [*clients, late])


async def test_what_changes_while_the_active_runs_are_read_is_shown_newest(stage: Stage) -> None:
    first, second = await stage.create(2)
    await stage.publish(first, 1)
    await stage.publish(second, 1)
    client = Client()
    stage.bus.hold("list")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: stage.join(client))
        await stage.bus.asked("list")
        await stage.publish(first, 5)
        await stage.finish(second)
        stage.bus.release("list")
    await stage.clock.advance(1)

    assert [(item["run"], item["at"]) for item in records(client)] == [(first.run, 5)]


async def test_a_join_that_fails_leaves_nothing(stage: Stage) -> None:
    client = Client()
    stage.bus.broken = True
    with pytest.raises(Unavailable):
        await stage.join(client)

    assert client.outbox.subscriptions == {}
    assert not stage.bus.is_watched()
    stage.bus.broken = False
    (log,) = await stage.create()
    await stage.join(client)
    assert runs(client) == [log.run]


async def test_who_leaves_before_the_bus_is_watched_gets_a_reply_and_leaves_nothing(stage: Stage) -> None:
    client = Client()
    watching = stage.bus.catch("watch_summaries")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: stage.join(client))
        await watching.asked.wait()
        stage.hub.leave(client.outbox, "s")
        watching.release()

    assert stage.bus.lists == [], "nobody is left to read for"
    assert not stage.bus.is_watched()
    assert stage.hub.summaries.board.unwatched


async def test_more_active_runs_than_the_board_takes_are_said_in_the_reply(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board_module, "MAX_RECORDS", 3)
    logs = await stage.create(5)
    client, named = Client(), Client()

    assert await stage.join(client) == {"subscription": "s", "truncated": 2}
    assert set(runs(client)) == {log.run for log in logs[2:]}, "the oldest are left out"
    assert await stage.join(named, run=logs[0].run) == {"truncated": 1}
    assert named.outbox.subscriptions == {}


async def test_more_runs_by_name_than_a_connection_may_watch_are_said_in_the_reply(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summaries, "MAX_NAMED", 3)
    names = [log.run for log in await stage.create(5)]
    client = Client()

    assert await stage.join(client, runs=names[:2]) == {"subscription": "s"}
    assert await stage.join(client, name="s2", runs=names[2:]) == {"subscription": "s2", "truncated": 2}
    assert await stage.join(client, name="s3", run=names[4]) == {"truncated": 1}
    await stage.clock.advance(1)
    assert sorted(runs(client)) == names[:3]


async def test_runs_that_do_not_exist_are_not_watched(stage: Stage) -> None:
    (log,) = await stage.create()
    client = Client()
    for number in range(3):
        await stage.join(client, name=f"s{number}", runs=[log.run, *(f"{number}.{n}" for n in range(10))])

    assert len(stage.hub.summaries.board.groups) == 1


async def test_what_a_connection_names_is_bounded_also_in_many_subscriptions_at_once(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summaries, "MAX_NAMED", 5)
    names = [log.run for log in await stage.create(3)]
    client = Client()
    replies: list[dict[str, Any]] = []

    async def join(name: str) -> None:
        replies.append(await stage.join(client, name=name, runs=names))

    stage.bus.hold("info")
    async with anyio.create_task_group() as tasks:
        for name in ("s1", "s2", "s3"):
            tasks.start_soon(join, name)
        await settle()
        stage.bus.release("info")

    assert sorted(reply.get("truncated", 0) for reply in replies) == [0, 1, 3]
    assert stage.hub.summaries.board.named(client.outbox) == 5


# -- How often -----------------------------------------------------------------------------------------------------


async def test_a_run_is_sent_four_times_a_second_at_most_and_the_latest_wins(stage: Stage) -> None:
    (log,) = await stage.create()
    client = Client()
    await stage.join(client)
    sent: list[tuple[float, int]] = []
    for tick in range(1, 301):  # three seconds, a record every 10 ms
        await stage.publish(log, tick)
        await stage.clock.advance(0.01)
        sent += [(stage.clock.now, item["at"]) for item in records(client) if "at" in item]
    await stage.clock.advance(0.3)
    sent += [(stage.clock.now, item["at"]) for item in records(client)]

    times = [at for at, _ in sent]
    assert 11 <= len(sent) <= 13
    assert all(later - earlier >= 0.25 - 1e-6 for earlier, later in itertools.pairwise(times))
    assert sent[-1][1] == 300


async def test_a_change_after_a_quiet_time_is_sent_at_once(stage: Stage) -> None:
    (log,) = await stage.create()
    client = Client()
    await stage.join(client)
    await stage.clock.advance(10)
    client.take()

    await stage.publish(log, 2)

    assert [item["at"] for item in records(client)] == [2]


async def test_thousands_of_runs_do_not_hold_the_loop(stage: Stage) -> None:
    logs = await stage.create(3_000)
    client = Client(queue_bytes=10_000_000, queue_frames=1_000)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await checkpoint()

    await stage.join(client)
    assert len(set(runs(client))) == len(logs)
    await stage.bus.publish_summaries([summary_of(log, data=b'{"run":"%s"}' % log.run.encode()) for log in logs])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        stage.clock.pass_by(0.25)
        seen = 0
        while seen < len(logs):
            await checkpoint()
            seen += len(runs(client))
        tasks.cancel_scope.cancel()

    assert turns >= len(logs) / board_module.SLICE


# -- What was missed -----------------------------------------------------------------------------------------------


async def unheard(stage: Stage, record: Summary) -> None:
    """Store a summary that no watcher gets."""
    watchers, stage.bus._summary_watchers = stage.bus._summary_watchers, {}
    await stage.bus.publish_summaries([record])
    stage.bus._summary_watchers = watchers


async def test_after_a_gap_what_was_missed_is_read_again(stage: Stage) -> None:
    changed, over, same = await stage.create(3)
    for log in (changed, over, same):
        await stage.publish(log)
    client = Client()
    await stage.join(client)
    await stage.clock.advance(1)
    client.take()
    (new,) = await stage.create()
    await unheard(stage, summary_of(new, data=orjson.dumps({"run": new.run})))
    await unheard(stage, summary_of(changed, 9, data=orjson.dumps({"run": changed.run})))
    await over.append(end=True)
    await unheard(stage, summary_of(over, status="done", data=orjson.dumps({"run": over.run})))

    stage.bus.miss()
    await settle()
    await stage.clock.advance(1)

    assert sorted(runs(client)) == sorted([changed.run, over.run, new.run])
    assert len(stage.hub.summaries.board) == 3


async def test_a_bus_that_is_away_after_a_gap_is_asked_again(stage: Stage) -> None:
    client = Client()
    await stage.join(client)
    (new,) = await stage.create()
    stage.bus.broken = True
    stage.bus.miss()
    await settle()
    stage.bus.broken = False
    await stage.clock.advance(2)

    assert runs(client) == [new.run]


async def test_a_run_whose_owner_died_without_a_last_record_ends_by_what_the_log_says(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    (log,) = await stage.create()
    await stage.publish(log)
    client = Client()
    await stage.join(client)
    await stage.clock.advance(1)
    client.take()
    await log.append(end=True)

    stage.bus.miss()
    await settle()
    await stage.clock.advance(1)

    (last,) = records(client)
    assert (last["status"], last["run"]) == ("done", log.run)
    assert last["ended"] > 0
    assert len(stage.hub.summaries.board) == 0


async def test_a_run_that_the_bus_has_lost_has_failed_once_that_is_sure(stage: Stage) -> None:
    (log,) = await stage.create()
    await stage.publish(log)
    client = Client()
    await stage.join(client)
    await stage.clock.advance(1)
    client.take()
    del stage.bus._logs[log.run]
    stage.bus._ids.remove(log.run)

    stage.bus.miss()
    await settle()
    assert records(client) == [], "it may be restored"
    stage.bus.miss()
    await settle()
    await stage.clock.advance(1)

    (last,) = records(client)
    assert (last["status"], last["error"]["code"]) == ("failed", "run_lost")


# -- The list that lives -------------------------------------------------------------------------------------------


def orders(client: Client) -> list[list[str]]:
    return [frame["runs"] for frame in client.take() if frame["type"] == "list"]


async def test_a_page_lives_runs_enter_and_leave_it(stage: Stage) -> None:
    first, second = await stage.create(2)
    for log in (first, second):
        await log.append()
        await stage.publish(log)
    client = Client()
    shown = await stage.watch_page(client, statuses=frozenset({"running"}), limit=2)
    assert shown == [second.run, first.run]
    await stage.clock.advance(1)
    assert client.take() == []

    (third,) = await stage.create()
    await third.append()
    await stage.publish(third)
    await stage.clock.advance(1)
    frames = client.take()
    assert {"type": "list", "subscription": "s", "runs": [third.run, second.run], "next": second.run} in frames
    assert [item["run"] for frame in frames if frame["type"] == "summary" for item in frame["runs"]] == [third.run]

    await stage.finish(third)
    await stage.clock.advance(1)
    assert orders(client)[-1] == [second.run, first.run]


async def test_records_that_change_in_a_page_are_sent_and_cost_no_list(stage: Stage) -> None:
    shown, beyond = (await stage.create(2))[::-1]
    client = Client()
    assert await stage.watch_page(client, limit=1) == [shown.run]
    await stage.clock.advance(1)
    stage.bus.lists.clear()
    for at in range(2, 40):
        await stage.publish(shown, at)
        await stage.publish(beyond, at)
        await stage.clock.advance(0.1)
    await stage.clock.advance(1)

    seen = records(client)
    assert {item["run"] for item in seen} == {shown.run}
    assert seen[-1]["at"] == 39
    assert stage.bus.lists == []


async def test_all_who_watch_one_page_share_its_reads_four_a_second_at_most(stage: Stage) -> None:
    clients = [Client() for _ in range(20)]
    for client in clients:
        await stage.watch_page(client, limit=5)
    await stage.clock.advance(1)
    stage.bus.lists.clear()
    for _ in range(100):  # runs enter for two seconds
        (log,) = await stage.create()
        await stage.publish(log)
        await stage.clock.advance(0.02)

    assert 2 <= len(stage.bus.lists) <= 9
    await stage.clock.advance(1)
    newest = sorted(stage.bus._logs, reverse=True)[:5]
    for client in clients:
        seen = orders(client)
        assert seen[-1] == newest
        assert len(seen) <= 13


async def test_a_page_further_back_is_not_read_for_runs_that_come_before_it(stage: Stage) -> None:
    logs = await stage.create(4)
    client = Client()
    shown = await stage.watch_page(client, limit=1, before=logs[3].run)
    assert shown == [logs[2].run]
    await stage.clock.advance(1)
    stage.bus.lists.clear()
    (new,) = await stage.create()
    await stage.publish(new)
    await stage.publish(logs[0], 2)
    await stage.clock.advance(1)

    assert stage.bus.lists == []
    assert client.take() == []


async def test_the_oldest_first_grow_at_their_end(stage: Stage) -> None:
    (first,) = await stage.create()
    client = Client()
    assert await stage.watch_page(client, order="oldest", limit=2) == [first.run]
    second, third = await stage.create(2)
    for log in (second, third):
        await stage.publish(log)
    await stage.clock.advance(1)

    assert orders(client)[-1] == [first.run, second.run]


async def test_what_happens_between_a_pages_read_and_its_reply_is_not_lost(stage: Stage) -> None:
    log, over = await stage.create(2)
    client = Client()
    async with stage.hub.lists.join(client.outbox, "s", Filter(principal="ann")) as join:
        await stage.publish(log, 5)
        await stage.finish(over)
        await stage.clock.advance(1)
        assert client.take() == []
        join.commit()
    await stage.clock.advance(1)

    assert {item["run"]: item["status"] for item in records(client)} == {log.run: "running", over.run: "done"}


async def test_a_run_that_ends_while_a_page_is_read_is_not_shown_as_running(stage: Stage) -> None:
    (log,) = await stage.create()
    await stage.publish(log)
    client = Client()
    caught = stage.bus.catch("summaries")
    replies: list[dict[str, Any]] = []

    async def watch() -> None:
        async with stage.hub.lists.join(client.outbox, "s", Filter(principal="ann")) as join:
            replies.append(join.result)
            join.commit()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        await caught.asked.wait()
        await stage.finish(log)
        caught.release()
    await stage.clock.advance(1)

    assert [item["status"] for item in orjson.loads(orjson.dumps(replies[0]["runs"]))] == ["done"]
    assert len(stage.hub.summaries.board) == 0, "no answer from before its end has brought it back"


async def test_a_list_that_lags_behind_the_records_is_read_once_more(stage: Stage) -> None:
    (log,) = await stage.create()
    await log.append()
    await stage.publish(log)
    client = Client()
    assert await stage.watch_page(client, statuses=frozenset({"running"})) == [log.run]
    await stage.clock.advance(1)
    await stage.publish(log, 9, status="done")
    await log.append(end=True)
    await stage.clock.advance(1)

    assert orders(client) == [[]]
    stage.bus.lists.clear()
    await stage.clock.advance(5)
    assert stage.bus.lists == [], "and that is all"


async def test_a_run_that_enters_a_page_and_is_known_already_has_its_record_sent(stage: Stage) -> None:
    first, second = await stage.create(2)
    await stage.publish(first, 7)
    reader, other = Client(), Client()
    await stage.join(other)
    assert await stage.watch_page(reader, limit=1) == [second.run]
    await stage.clock.advance(1)
    reader.take()
    del stage.bus._logs[second.run]  # forgotten, so that the page goes further back
    stage.bus._ids.remove(second.run)
    stage.bus.miss()
    await settle()
    await stage.clock.advance(1)

    frames = reader.take()
    assert [frame["runs"] for frame in frames if frame["type"] == "list"] == [[first.run]]
    seen = [item for frame in frames if frame["type"] == "summary" for item in frame["runs"]]
    assert {"run": first.run, "at": 7, "status": "running"} in seen


async def test_a_slow_reader_gets_the_newest_order_once_it_has_room(stage: Stage) -> None:
    slow, fast = Client(queue_frames=1), Client()
    await stage.watch_page(slow)
    await stage.watch_page(fast)
    slow.outbox.put(b'{"type":"ping"}')
    for _ in range(5):
        (log,) = await stage.create()
        await stage.publish(log)
        await stage.clock.advance(0.6)
    assert len(orders(fast)) >= 5
    assert len(slow.outbox) == 1

    frames = []
    for _ in range(8):
        frames += slow.take()
        await stage.clock.advance(0.3)
    seen = [frame["runs"] for frame in frames if frame["type"] == "list"]
    assert len(seen) == 1
    assert len(seen[0]) == 5


async def test_leaving_a_page_leaves_nothing_behind(stage: Stage) -> None:
    await stage.create(3)
    one, other = Client(), Client()
    await stage.watch_page(one)
    await stage.watch_page(other)
    await stage.join(other, name="s2")
    stage.hub.leave(one.outbox, "s")
    stage.hub.disconnect(other.outbox)

    assert stage.hub.summaries.board.unwatched
    assert len(stage.hub.summaries.board) == 0
    assert not stage.bus.is_watched()
    assert (stage.hub.lists._pages, stage.hub.lists._readers) == ({}, {})


async def test_pages_that_are_watched_are_bounded(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_list, "MAX_WATCHED", 2)
    monkeypatch.setattr(live_list, "MAX_PAGES", 3)
    one, other = Client(), Client()
    await stage.watch_page(one, name="s1", limit=1)
    await stage.watch_page(one, name="s2", limit=2)
    with pytest.raises(TooMany, match="2 pages"):
        await stage.watch_page(one, name="s3", limit=2)
    await stage.watch_page(other, name="s1", limit=3)
    with pytest.raises(TooMany, match="3 different"):
        await stage.watch_page(other, name="s2", limit=4)
    await stage.watch_page(other, name="s2", limit=1)
    assert one.outbox.subscriptions.keys() == {"s1", "s2"}


async def test_after_a_gap_pages_are_read_again(stage: Stage) -> None:
    client = Client()
    await stage.watch_page(client)
    (log,) = await stage.create()
    stage.bus.miss()
    await settle()
    await stage.clock.advance(1)

    assert orders(client) == [[log.run]]
