"""Summaries over Redis: between processes, past lost connections, in bounded messages; with a real redis-server."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from agentcast.server.bus.base import SUMMARY_BYTES
from agentcast.server.bus.redis import RedisBus
from agentcast.server.bus.redis.pipelined import BATCH_BYTES, PipelinedConnection, connections
from agentcast.server.bus.redis.summaries import PART_BYTES, PART_SUMMARIES
from agentcast.server.errors import Unavailable
from tests.contract.support import Log, Summaries, new_run, summary
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


def watching(redis: Redis) -> int:
    """Connections that are subscribed to summaries."""
    lines = redis.do("PUBSUB", "CHANNELS", "*:summaries")
    return int(lines.lstrip(b"*"))


async def test_summaries_reach_the_watchers_of_all_processes(redis: Redis) -> None:
    here, there = RedisBus(redis.url, "one"), RedisBus(redis.url, "two")
    async with running(here, there):
        log, watched = await Log.create(here), Summaries()
        await there.watch_summaries(watched.deliver)
        record = summary(log)
        await here.publish_summaries([record])
        assert await watched.take(1) == [record]
        assert await there.summaries([log.run]) == {log.run: record}


async def test_channel_is_subscribed_to_only_while_somebody_watches(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentcast.server.bus.redis.listener.PROBE_EVERY", 0.02)
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        log, last = await Log.create(bus), Summaries()
        assert watching(redis) == 0
        for _ in range(2):
            first, second = [await bus.watch_summaries(lambda _: None) for _ in range(2)]
            assert watching(redis) == 1
            first.close()
            first.close()
            await bus.check()
            assert watching(redis) == 1
            second.close()
            await until(lambda: watching(redis) == 0)
        await bus.watch_summaries(last.deliver)
        await bus.publish_summaries([summary(log)])
        assert await last.take(1) == [summary(log)]


async def test_watchers_learn_after_a_reconnection_that_some_may_have_been_missed(redis: Redis) -> None:
    here, there = RedisBus(redis.url, "one"), RedisBus(redis.url, "two")
    async with running(here, there):
        log, watched = await Log.create(here), Summaries()
        await there.watch_summaries(watched.deliver)
        redis.do("CLIENT", "KILL", "TYPE", "pubsub")
        await watched.until(lambda items: None in items)
        await until(lambda: there.degraded is None)
        record = summary(log)
        await here.publish_summaries([record])
        assert (await watched.until(lambda items: record in items))[-1] == record


async def test_watch_that_fails_or_is_cancelled_leaves_no_watcher_and_spares_the_others(redis: Redis) -> None:
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        log, kept, failed = await Log.create(bus), Summaries(), Summaries()
        redis.pause()
        with pytest.raises(Unavailable):
            await bus.watch_summaries(failed.deliver)
        with anyio.move_on_after(0.01):
            await bus.watch_summaries(failed.deliver)
        redis.resume()
        assert not bus._summaries._watchers
        await until(lambda: bus.degraded is None)
        await bus.watch_summaries(kept.deliver)
        await bus.publish_summaries([summary(log)])
        await kept.until(lambda items: summary(log) in items)
        assert failed.items == []


async def test_stored_summary_lives_in_the_runs_own_key(redis: Redis) -> None:
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        log = await Log.create(bus)
        keys, ttl = redis.do("DBSIZE"), redis.do("TTL", f"agentcast:run:{log.run}")
        await bus.publish_summaries([summary(log)])
        assert redis.do("DBSIZE") == keys
        assert int(redis.do("TTL", f"agentcast:run:{log.run}").lstrip(b":")) <= int(ttl.lstrip(b":"))
        redis.do("DEL", f"agentcast:run:{log.run}")
        assert await bus.summaries([log.run]) == {}
        await bus.publish_summaries([summary(log, 9)])
        assert redis.do("EXISTS", f"agentcast:run:{log.run}") == b":0"


async def test_any_number_of_summaries_travels_in_bounded_messages_and_round_trips(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = PipelinedConnection._exchange
    trips: list[list[Any]] = []
    messages: list[int] = []

    async def watched(connection: PipelinedConnection, batch: list[Any]) -> None:
        trips.append([call for call in batch if call.script is not None or call.expects])
        await exchange(connection, batch)

    async def overhear(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        connection = connections(redis.url)()
        await connection.send_command("PSUBSCRIBE", "*:summaries", check_health=False)
        await connection.read_response(timeout=float("inf"))
        task_status.started()
        while True:
            messages.append(len((await connection.read_response(timeout=float("inf")))[-1]))

    monkeypatch.setattr(PipelinedConnection, "_exchange", watched)
    bus = RedisBus(redis.url, "one")
    async with running(bus), anyio.create_task_group() as tasks:
        await tasks.start(overhear)
        logs = [await Log.create(bus, new_run(thread="☃" * 256)) for _ in range(40)]
        small = [summary(log, seq) for seq in range(1, 31) for log in logs]
        large = [
            summary(log, 31 + seq, thread="☃" * 256, data=b"x" * SUMMARY_BYTES) for seq in range(20) for log in logs
        ]
        for records, most in ((small, -(-len(small) // PART_SUMMARIES)), (large, len(large) // (PART_BYTES // 4_096))):
            trips.clear()
            messages.clear()
            await bus.publish_summaries(records)
            assert len([trip for trip in trips if trip]) <= most
            await until(lambda trips=trips: len(messages) == len([t for t in trips if t]))  # type: ignore[misc]
            assert max(messages) <= PART_BYTES + 8 * PART_SUMMARIES < BATCH_BYTES
            assert max(call.size for trip in trips for call in trip) <= PART_BYTES + 1_024
        trips.clear()
        assert len(await bus.summaries([log.run for log in logs])) == len(logs)
        assert len([trip for trip in trips if trip]) == 1
        tasks.cancel_scope.cancel()


async def test_stored_summaries_of_thousands_of_runs_are_asked_for_in_bounded_round_trips(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = PipelinedConnection._exchange
    weights: list[int] = []

    async def watched(connection: PipelinedConnection, batch: list[Any]) -> None:
        weights.append(sum(call.weight for call in batch))
        await exchange(connection, batch)

    bus = RedisBus(redis.url, "one")
    async with running(bus):
        monkeypatch.setattr(PipelinedConnection, "_exchange", watched)
        await bus.summaries([str(number) for number in range(3_000)])
    assert max(weights) <= BATCH_BYTES
    assert 12 <= len([weight for weight in weights if weight > 1_024]) <= 13


async def test_what_cannot_be_read_hides_no_other(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        broken, good, watched = await Log.create(bus), await Log.create(bus), Summaries()
        await bus.watch_summaries(watched.deliver)
        redis.do("HSET", f"agentcast:run:{broken.run}", "summary", "garbage")
        redis.do("PUBLISH", bus._keys.summaries_channel, "\0\0\0\7garbage")
        redis.do("PUBLISH", bus._keys.summaries_channel, "\0")
        await bus.publish_summaries([summary(good)])
        assert await watched.take(1) == [summary(good)]
        assert await bus.summaries([broken.run, good.run]) == {good.run: summary(good)}
        assert bus.counters["connections_lost"] == 0
    assert "a summary cannot be read" in caplog.text
