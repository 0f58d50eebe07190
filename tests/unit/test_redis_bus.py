"""The Redis bus where it meets trouble, closer than a hub can show it; with a real redis-server (G1, G2, G7)."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from redis.asyncio.connection import AbstractConnection

from agentcast.server.bus.base import Frame, Gone, Head, Origin, Snapshot
from agentcast.server.bus.redis import RedisBus
from agentcast.server.bus.redis.keys import Keys
from agentcast.server.bus.redis.listener import Listener
from agentcast.server.bus.redis.pipelined import PipelinedConnection, Script, connections
from agentcast.server.bus.redis.workers import Workers
from agentcast.server.config import Settings
from agentcast.server.errors import Ended, Fenced, HeadMismatch, NotFound, Unavailable
from agentcast.server.runs.runs import Runs
from agentcast.server.state import RunState
from tests.contract.support import Log, Mail, follow, new_run, summary
from tests.support.redis import Redis, running_redis
from tests.support.waiting import PATIENCE, until


@pytest.fixture
def redis() -> Iterator[Redis]:
    with running_redis() as redis:
        yield redis


@asynccontextmanager
async def running(*buses: RedisBus) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        with anyio.fail_after(PATIENCE):
            for bus in buses:
                await tasks.start(bus.run)
        yield
        tasks.cancel_scope.cancel()


async def back(bus: RedisBus) -> None:
    with anyio.fail_after(PATIENCE):
        while True:
            try:
                await bus.check()
                return
            except Unavailable:
                await anyio.sleep(0.05)


# -- Subscriptions -------------------------------------------------------------------------------------------------


async def test_a_subscription_that_fails_leaves_the_others_to_the_same_run_alone(redis: Redis) -> None:
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        log = await Log.create(bus)
        mail = Mail()
        await follow(bus, log.run, mail.deliver)
        redis.pause()
        bus._listener._confirmed[bus._keys.updates(log.run)] = anyio.Event()  # as on a new connection
        with pytest.raises(Unavailable):
            await follow(bus, log.run, Mail().deliver)
        redis.resume()
        await back(bus)
        sent = await log.append(3)
        await mail.until(lambda items: [item for item in items if isinstance(item, Frame)] == sent)


async def _make_deaf(bus: RedisBus) -> None:
    """Have Redis forget what the bus has subscribed to, while its connection looks well."""
    connection = bus._listener._connection
    assert connection is not None
    await connection.send_command("UNSUBSCRIBE", check_health=False)


async def test_a_subscription_that_has_gone_deaf_is_found_out_and_what_it_missed_is_made_up_for_by_the_head(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentcast.server.bus.redis.heads.RECHECK", 1_000.0)
    here, there = RedisBus(redis.url, "one"), RedisBus(redis.url, "two")
    async with running(here, there):
        log = await Log.create(here)
        mail = Mail()
        await follow(there, log.run, mail.deliver)
        await log.append()
        await mail.take(1)
        await _make_deaf(there)
        redis.do("PING")
        await log.append(5)
        await until(lambda: there._listener.probes_lost == 1)
        await mail.until(lambda items: Head(log.run, log.epoch, log.head) in items)
        sent = await log.append()
        await mail.until(lambda items: items[-1] == sent[0])


async def test_the_head_of_a_quiet_run_is_asked_for_now_and_then(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentcast.server.bus.redis.heads.RECHECK", 0.2)
    monkeypatch.setattr("agentcast.server.bus.redis.bus.RECHECK_TICK", 0.1)
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        log = await Log.create(bus)
        mail = Mail()
        await follow(bus, log.run, mail.deliver)
        redis.do("HSET", f"agentcast:run:{log.run}", "head", 7)  # as by an append whose announcement was lost
        await mail.until(lambda items: Head(log.run, log.epoch, 7) in items)


async def test_a_message_that_cannot_be_read_hurts_nobody(redis: Redis) -> None:
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        log, mail = await Log.create(bus), Mail()
        await follow(bus, log.run, mail.deliver)
        for channel in (bus._keys.feed_channel, bus._keys.commands("one"), bus._keys.updates(log.run)):
            redis.do("PUBLISH", channel, "garbage")
        sent = await log.append()
        assert await mail.take(1) == sent
        assert bus.counters["connections_lost"] == 0


async def test_a_channel_that_is_left_and_wanted_again_while_all_are_resubscribed_holds_up_none(redis: Redis) -> None:
    connect = connections(redis.url)
    again: list[str] = []

    def meddled() -> AbstractConnection:
        connection = connect()
        send = connection.send_command

        async def send_command(*command: Any, **options: Any) -> None:
            await send(*command, **options)
            if command[0] == "SUBSCRIBE" and not again:
                again.append("run")
                listener.unsubscribe("run")
                tasks.start_soon(listener.subscribe, {"run": print})

        connection.send_command = send_command  # type: ignore[method-assign]
        return connection

    connection = PipelinedConnection(connect())

    async def publish(channel: str, message: bytes) -> object:
        return await connection.call("PUBLISH", channel, message)

    listener = Listener(meddled, publish, "probe", {"run": print}, checkpoint)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(connection.run)
        tasks.start_soon(listener.run)
        with anyio.fail_after(PATIENCE):
            await listener.connected.wait()
        assert again
        assert listener.attempts == 0
        tasks.cancel_scope.cancel()


# -- A Redis that has lost some ------------------------------------------------------------------------------------


async def test_a_page_goes_on_where_its_short_first_part_ends(redis: Redis) -> None:
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        log = await Log.create(bus)
        for _ in range(60):
            await log.append(size=1_000)

        page = await bus.read(log.run, log.epoch, 0)

        assert page is not None
        assert page.head == log.head > 60
        assert [frame.seq for frame in page.frames] == [*range(1, log.head + 1)]


async def test_until_it_is_known_whether_redis_has_lost_anything_no_run_is_called_unknown(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentcast.server.bus.redis.bus.RESTORING", 60.0)  # a busy machine may be late to look
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        await bus.watch_feed(lambda _: None)
        log = await Log.create(bus)
        redis.kill()
        await until(lambda: bus._listener.attempts > 4)  # it waits longer between attempts
        redis.start()
        while bus.degraded is not None:
            with pytest.raises(Unavailable):
                await bus.info([log.run])
            with pytest.raises(Unavailable):
                await bus.read(log.run, log.epoch, 0)
        with pytest.raises(Unavailable, match="being restored"):
            await bus.info([log.run])


async def test_the_owner_is_asked_to_verify_a_run_of_which_redis_has_less(redis: Redis) -> None:
    bus = RedisBus(redis.url, "one")
    asked: list[tuple[str, str]] = []

    async def handler(run: str, command: Mapping[str, Any]) -> None:
        asked.append((run, command["op"]))

    async with running(bus):
        await bus.handle_commands(handler)
        await bus.watch_feed(lambda _: None)
        kept, lost = await Log.create(bus), await Log.create(bus)
        await lost.append()
        redis.do("HSET", f"agentcast:run:{lost.run}", "head", 1)
        redis.do("CLIENT", "KILL", "TYPE", "pubsub")
        await until(lambda: bool(asked))
        await back(bus)
        assert asked == [(lost.run, "verify")]
        assert kept.run in await bus.info([kept.run])


async def test_a_run_that_nobody_restores_is_reported_gone(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentcast.server.bus.redis.bus.RECHECK_TICK", 0.1)
    monkeypatch.setattr("agentcast.server.bus.redis.heads.GONE_AFTER", 0.3)
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        log = await Log.create(bus)
        delivered: list[Any] = []
        await follow(bus, log.run, delivered.append)
        redis.kill()
        redis.start()
        await until(lambda: Gone(log.run) in delivered)


async def test_a_run_that_redis_has_lost_is_restored_where_it_was_and_announced(redis: Redis) -> None:
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        log = await Log.create(bus)
        redis.do("FLUSHALL")
        with pytest.raises(NotFound):
            await log.append()
        info = new_run(log.run)
        origin = Origin("echo", "ann", "talk", info.created)
        epoch = await bus.rebase(log.run, log.fence, 9, b"{}", "running", origin)
        found = (await bus.info([log.run]))[log.run]
        assert (found.epoch, found.head, found.agent) == (epoch, 9, "echo")
        announced = await bus.read_feed("0:")
        assert announced is not None
        assert [entry.run for entry in announced] == [log.run]
        assert redis.do("TTL", "agentcast:thread:talk") != b":-1"


# -- Writes that are carried out late, or twice --------------------------------------------------------------------


async def test_a_write_that_was_given_up_and_is_carried_out_later_does_no_harm(redis: Redis) -> None:
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        log = await Log.create(bus)
        batch = log.next(3)
        redis.pause()
        for _ in range(2):
            with pytest.raises(Unavailable):
                await bus.append(log.run, log.fence, batch, "running")
        with pytest.raises(Unavailable):
            await bus.rebase(log.run, log.fence, 4, b"late", "running")
        redis.resume()
        await back(bus)
        try:
            await bus.append(log.run, log.fence, batch, "running")
        except HeadMismatch:  # the rebase was carried out, too: the owner begins another epoch
            await bus.rebase(log.run, log.fence, 4, b"{}", "running")
        info = (await bus.info([log.run]))[log.run]
        assert info.head == 4


async def test_an_owner_whose_run_was_claimed_can_write_nothing_more(redis: Redis) -> None:
    here, there = RedisBus(redis.url, "one"), RedisBus(redis.url, "two")
    async with running(here, there):
        log = await Log.create(here)
        fence = await there.claim(log.run)
        for write in (
            log.append(),
            here.rebase(log.run, log.fence, 5, b"{}", "running"),
            here.save_snapshot(log.fence, _snapshot(log)),
        ):
            with pytest.raises(Fenced):
                await write
        await there.append(log.run, fence, log.next(end=True), "failed")
        with pytest.raises(Fenced):
            await log.append(2, end=True)
        with pytest.raises(Ended):
            await there.claim(log.run)


def _snapshot(log: Log) -> Snapshot:
    return Snapshot(log.run, log.epoch, log.head, b"{}")


# -- Workers -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def watching(redis: Redis) -> AsyncIterator[Workers]:
    """How worker `two` sees the others, without a heartbeat of its own."""
    connection = PipelinedConnection(connections(redis.url)())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(connection.run)
        yield Workers(connection, Keys("agentcast", 0), "two")
        tasks.cancel_scope.cancel()


async def test_runs_of_a_process_without_heartbeat_are_orphans_after_three_checks(redis: Redis) -> None:
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        log = await Log.create(bus)
    redis.do("DEL", "agentcast:worker:one")
    async with watching(redis) as workers:
        assert [list(await workers.orphans([], None)) for _ in range(3)] == [[], [], [log.run]]


async def test_after_trouble_with_redis_nobody_is_taken_for_gone_for_a_while(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        log = await Log.create(bus)
    redis.do("DEL", "agentcast:worker:one")
    async with watching(redis) as workers:
        for _ in range(2):
            assert await workers.orphans([], None) == []
        assert await workers.orphans([], "Redis is away") == ()
        for _ in range(10):
            assert await workers.orphans([], None) == ()
        monkeypatch.setattr(workers, "_settled_at", 0.0)
        assert [list(await workers.orphans([], None)) for _ in range(3)] == [[], [], [log.run]]


async def test_a_heartbeat_that_comes_back_in_time_saves_the_runs(redis: Redis) -> None:
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        await Log.create(bus)
    async with watching(redis) as workers:
        for present in (False, False, True, False, False):
            redis.do(*(("SET", "agentcast:worker:one", 1) if present else ("DEL", "agentcast:worker:one")))
            assert list(await workers.orphans([], None)) == []


async def test_runs_that_have_expired_are_no_orphans(redis: Redis) -> None:
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        expired, left = await Log.create(bus), await Log.create(bus)
    redis.do("DEL", "agentcast:worker:one", f"agentcast:run:{expired.run}")
    async with watching(redis) as workers:
        assert [list(await workers.orphans([], None)) for _ in range(3)] == [[], [], [left.run]]
    assert redis.do("ZCARD", "agentcast:owned:one") == b":1"


async def test_own_runs_that_nobody_here_executes_are_orphans_too(redis: Redis) -> None:
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        mine, forgotten = await Log.create(bus), await Log.create(bus)
        assert [list(await bus.orphans([])) for _ in range(10)] == [[]] * 10, "it has only just started"
        bus._workers._settled_at = 0.0
        seen = [list(await bus.orphans([mine.run])) for _ in range(3)]
        assert seen[-1] == [forgotten.run]


async def test_an_orphan_whose_log_cannot_be_read_takes_no_hub_down(
    redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    dead, bus = RedisBus(redis.url, "dead"), RedisBus(redis.url, "one")
    async with running(dead):
        unreadable, left = await Log.create(dead), await Log.create(dead)
    redis.do("DEL", "agentcast:worker:dead")
    redis.do("HSET", f"agentcast:snap:{unreadable.run}", "epoch", unreadable.epoch, "seq", 1, "state", "{}")
    left_state = RunState.new(left.run, "echo").encode().decode()
    redis.do("HSET", f"agentcast:snap:{left.run}", "epoch", left.epoch, "seq", 1, "state", left_state)
    async with running(bus), anyio.create_task_group() as tasks:
        bus._workers._settled_at = 0.0
        mail = Mail()
        await follow(bus, left.run, mail.deliver)
        await tasks.start(Runs(bus, {}, Settings(), "one").serve)
        await mail.until(lambda items: any(isinstance(item, Frame) and item.terminal for item in items))
        await until(lambda: f"run {unreadable.run} was left without a process, and cannot be ended" in caplog.messages)
        tasks.cancel_scope.cancel()


# -- The connection ----------------------------------------------------------------------------------------------------


async def test_a_connection_answers_thousands_of_questions_also_after_scripts_were_forgotten(redis: Redis) -> None:
    connection, script = PipelinedConnection(connections(redis.url)()), Script("return ARGV[1]")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(connection.run)
        answers = await connection.calls([("ECHO", str(number)) for number in range(3_000)])
        assert answers == [b"%d" % number for number in range(3_000)]
        for _ in range(2):
            assert await connection.script(script, [], "hello") == b"hello"
            redis.do("SCRIPT", "FLUSH")
        tasks.cancel_scope.cancel()


async def test_a_connection_says_within_its_patience_that_redis_is_away_and_works_when_it_is_back(redis: Redis) -> None:
    connection = PipelinedConnection(connections(redis.url)())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(connection.run)
        redis.pause()
        with anyio.fail_after(5), pytest.raises(Unavailable):
            await connection.call("PING")
        redis.resume()
        with anyio.fail_after(PATIENCE):
            while True:
                try:
                    assert await connection.call("PING") == b"PONG"
                    break
                except Unavailable:
                    await anyio.sleep(0.05)
        redis.kill()
        with anyio.fail_after(5):
            while True:
                with pytest.raises(Unavailable, match="Redis is away") as caught:
                    await connection.call("PING")
                assert str(redis.port) not in str(caught.value), "clients see this text"
                if "Connection refused" in str(caught.value):
                    break
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("name", ["CREATE", "CLAIM", "APPEND", "SAVE_SNAPSHOT", "STORE_SUMMARIES"])
async def test_a_script_that_a_full_redis_refuses_has_written_nothing(redis: Redis, name: str) -> None:
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        log = await Log.create(bus)
        await log.append()
        dump = redis.do("DUMP", f"agentcast:run:{log.run}")
        redis.do("CONFIG", "SET", "maxmemory", 1)
        write = {
            "CREATE": lambda: bus.create(new_run()),
            "CLAIM": lambda: bus.claim(log.run),
            "APPEND": lambda: bus.append(log.run, log.fence, log.next(2), "running"),
            "SAVE_SNAPSHOT": lambda: bus.save_snapshot(log.fence, _snapshot(log)),
            "STORE_SUMMARIES": lambda: bus.publish_summaries([summary(log)]),
        }[name]
        with pytest.raises(Unavailable, match="maxmemory"):
            await write()
        redis.do("CONFIG", "SET", "maxmemory", 0)
        assert redis.do("DUMP", f"agentcast:run:{log.run}") == dump
        assert (await bus.read(log.run, log.epoch, 0)) is not None


async def test_a_key_of_another_kind_takes_nobody_down(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    redis.do("SET", "agentcast:workers", "x")
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        assert await bus.orphans([]) == ()
        with pytest.raises(Unavailable):
            await Log.create(bus)
    assert "Redis refused a call" in caplog.text


async def test_a_probe_that_is_late_is_no_reason_to_reconnect(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentcast.server.bus.redis.listener.PROBE_EVERY", 0.02)
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        publish, refused = bus._listener._publish, [True]

        async def late(channel: str, message: bytes) -> object:
            if refused:
                refused.pop()
                raise Unavailable("late")
            return await publish(channel, message)

        monkeypatch.setattr(bus._listener, "_publish", late)
        probes = bus.counters["probes"]
        await until(lambda: bus.counters["probes"] > probes + 5)
        assert not refused
        assert bus.counters["connections_lost"] == 0
