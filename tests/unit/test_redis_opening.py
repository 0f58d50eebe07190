"""Many runs opened at once over Redis, also while it fails; with a real redis-server (G1, G2)."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import anyio
import pytest
from anyio.lowlevel import checkpoint
from redis.asyncio.connection import AbstractConnection

from agentcast.server.bus.base import Bus, Head, new_run_id
from agentcast.server.bus.redis import RedisBus
from agentcast.server.bus.redis.listener import SUBSCRIBE_BATCH, Listener
from agentcast.server.bus.redis.pipelined import BATCH_BYTES, BATCH_CALLS, PipelinedConnection, connections
from agentcast.server.errors import Unavailable
from tests.contract.support import Log, Mail, follow, new_run
from tests.support.redis import Redis, running_redis
from tests.support.waiting import PATIENCE, eventually, until


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


@pytest.fixture
async def bus(redis: Redis) -> AsyncIterator[RedisBus]:
    bus = RedisBus(redis.url, "one")
    async with running(bus):
        yield bus


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Any]]:
    """The commands of each write to Redis, by any connection: one for each round trip, or for each SUBSCRIBE."""
    sent: list[Sequence[Any]] = []
    round_trip = PipelinedConnection._round_trip
    send = AbstractConnection.send_command

    async def watched(connection: PipelinedConnection, batch: list[Any], **options: Any) -> list[Any]:
        assert sum(call.weight for call in batch) <= BATCH_BYTES
        sent.append([call.command for call in batch])
        return await round_trip(connection, batch, **options)

    async def watched_send(connection: AbstractConnection, *command: Any, **options: Any) -> None:
        if command[0] == "SUBSCRIBE":
            sent.append([command])
        await send(connection, *command, **options)

    monkeypatch.setattr(PipelinedConnection, "_round_trip", watched)
    monkeypatch.setattr(AbstractConnection, "send_command", watched_send)
    return sent


def questions(sent: list[Sequence[Any]]) -> list[str]:
    """The names of what was sent, without heartbeats and probes."""
    return [str(commands[0][0]) for commands in sent if commands[0][0] not in ("SET", "PUBLISH")]


async def subscribed(redis: Redis) -> int:
    """Channels that anybody is subscribed to."""
    return int(await anyio.to_thread.run_sync(lambda: redis.do("PUBSUB", "CHANNELS").lstrip(b"*")))


async def until_subscribed(redis: Redis, channels: int) -> None:
    async def reached() -> bool:
        return await subscribed(redis) == channels

    await eventually(reached)


async def logs_of(bus: Bus, count: int) -> list[Log]:
    """Runs, created side by side."""
    logs: list[Log] = []

    async def create() -> None:
        logs.append(await Log.create(bus))

    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(create)
    return logs


def ignore(update: object) -> None:
    pass


async def test_a_thousand_runs_are_opened_in_a_few_round_trips(bus: RedisBus, sent: list[Sequence[Any]]) -> None:
    logs = await logs_of(bus, 1_001)
    sent.clear()

    opened = await bus.open({log.run: ignore for log in logs} | {new_run_id(): ignore})

    assert len(opened) == 1_001
    subscribing, asking = -(-1_002 // SUBSCRIBE_BATCH), -(-1_002 // BATCH_CALLS)
    assert questions(sent) == ["SUBSCRIBE"] * subscribing + ["HMGET"] * asking


async def test_subscribes_are_sent_together_and_not_one_after_the_other(
    bus: RedisBus, redis: Redis, sent: list[Sequence[Any]]
) -> None:
    logs = await logs_of(bus, SUBSCRIBE_BATCH + 1)
    sent.clear()
    redis.pause()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bus.open, {log.run: ignore for log in logs})
        await until(lambda: questions(sent) == ["SUBSCRIBE"] * 2)
        redis.resume()


async def test_runs_that_this_process_follows_cost_nothing_but_their_infos(
    bus: RedisBus, sent: list[Sequence[Any]]
) -> None:
    logs, new = await logs_of(bus, 50), await Log.create(bus)
    await bus.open({log.run: ignore for log in logs})
    sent.clear()

    await bus.open({log.run: ignore for log in (*logs, new)})

    assert questions(sent) == ["SUBSCRIBE", "HMGET"]
    assert len(sent[0][0]) == 2, "only the new one"
    sent.clear()
    await bus.open({log.run: ignore for log in logs})
    assert questions(sent) == ["HMGET"]


async def test_two_who_open_the_same_runs_at_once_share_the_subscribe(
    bus: RedisBus, redis: Redis, sent: list[Sequence[Any]]
) -> None:
    log = await Log.create(bus)
    mails = [Mail(), Mail()]
    sent.clear()
    async with anyio.create_task_group() as tasks:
        for mail in mails:
            tasks.start_soon(bus.open, {log.run: mail.deliver})
    assert questions(sent).count("SUBSCRIBE") == 1
    batch = await log.append()
    for mail in mails:
        assert await mail.take(1) == batch


@pytest.mark.parametrize("turns", range(0, 30, 3))
async def test_opening_that_is_cancelled_anywhere_leaves_no_channel_subscribed(
    bus: RedisBus, redis: Redis, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    monkeypatch.setattr("agentcast.server.bus.redis.listener.PROBE_EVERY", 0.02)
    logs = await logs_of(bus, 5)
    before = await subscribed(redis)

    async def open_and_close() -> None:
        for opened in (await bus.open({log.run: ignore for log in logs})).values():
            opened.subscription.close()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(open_and_close)
        for _ in range(turns):
            await checkpoint()
        tasks.cancel_scope.cancel()
    assert not bus._heads._followed
    await until_subscribed(redis, before)
    assert bus.counters["connections_lost"] == 0


@pytest.mark.parametrize("moment", ["subscribe", "info"])
async def test_opening_that_is_cancelled_while_it_waits_leaves_nothing_behind(
    bus: RedisBus, redis: Redis, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr("agentcast.server.bus.redis.listener.PROBE_EVERY", 0.02)
    logs, kept = await logs_of(bus, 5), await Log.create(bus)
    mail, before = Mail(), await subscribed(redis)
    await follow(bus, kept.run, mail.deliver)
    held = anyio.Event()

    async def hold(*args: Any, **options: Any) -> Any:
        held.set()
        await anyio.sleep_forever()

    if moment == "info":
        monkeypatch.setattr(bus._queries, "infos", hold)
    else:
        redis.pause()
        send = bus._listener._send

        async def noted(*args: Any) -> None:
            await send(*args)
            held.set()

        monkeypatch.setattr(bus._listener, "_send", noted)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bus.open, {log.run: ignore for log in (*logs, kept)})
        await held.wait()
        tasks.cancel_scope.cancel()
    redis.resume()

    assert list(bus._heads._followed) == [kept.run]
    await until_subscribed(redis, before + 1)
    batch = await kept.append()
    assert await mail.take(1) == batch


async def test_opening_that_is_cancelled_while_it_writes_does_not_cut_the_connection_that_all_share(
    bus: RedisBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = bus._listener._connection
    assert connection is not None
    log, other, mail = await Log.create(bus), await Log.create(bus), Mail()
    await follow(bus, other.run, mail.deliver)
    writer = connection._writer
    assert writer is not None
    draining, drained, drain = anyio.Event(), anyio.Event(), writer.drain

    async def slow() -> None:
        draining.set()
        await drained.wait()
        await drain()

    with monkeypatch.context() as patch:
        patch.setattr(writer, "drain", slow)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bus.open, {log.run: ignore})
            await draining.wait()
            tasks.cancel_scope.cancel()
            drained.set()
    assert bus._listener._connection is connection
    assert connection.is_connected
    batch = await other.append()
    assert await mail.take(1) == batch
    assert bus.counters["connections_lost"] == 0


async def test_opening_while_redis_restarts_fails_and_leaves_nothing_behind(redis: Redis, bus: RedisBus) -> None:
    logs = await logs_of(bus, 20)
    before = await subscribed(redis)
    outcomes: list[str] = []

    async def open_all() -> None:
        try:
            await bus.open({log.run: ignore for log in logs})
        except Unavailable:
            outcomes.append("unavailable")

    redis.pause()
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(open_all)
        await until(lambda: bool(bus._heads._followed))
        redis.kill()
    assert outcomes == ["unavailable"] * 3
    assert not bus._heads._followed
    await open_all()
    assert outcomes == ["unavailable"] * 4
    redis.start()
    await until(lambda: bus.degraded is None)
    assert await subscribed(redis) == before
    with suppress(Unavailable):  # each connection for calls finds out for itself that it was lost
        await Log.create(bus)
    log, mail = await Log.create(bus), Mail()
    await follow(bus, log.run, mail.deliver)
    batch = await log.append()
    assert await mail.take(1) == batch


async def test_runs_that_may_be_restored_are_unavailable_and_open_once_they_are(redis: Redis, bus: RedisBus) -> None:
    await bus.watch_feed(lambda _: None)
    kept, lost, mail = await Log.create(bus), await Log.create(bus), Mail()
    redis.do("DEL", *bus._keys.log(lost.run))
    bus._restoring_until = anyio.current_time() + 1_000

    with pytest.raises(Unavailable, match="being restored"):
        await bus.open({kept.run: ignore, lost.run: mail.deliver})
    with pytest.raises(Unavailable, match="being restored"):
        await bus.read_ends([kept.run, lost.run])

    assert not bus._heads._followed
    assert (await bus.open({kept.run: ignore})).keys() == {kept.run}
    bus._restoring_until = 0.0
    assert (await bus.open({kept.run: ignore, lost.run: mail.deliver})).keys() == {kept.run}
    await bus.create(new_run(lost.run))
    assert (await bus.open({lost.run: mail.deliver})).keys() == {lost.run}


async def test_opened_runs_survive_a_reconnection_and_what_they_missed_comes_as_heads(
    redis: Redis, bus: RedisBus
) -> None:
    logs = await logs_of(bus, SUBSCRIBE_BATCH + 10)
    mails = {log.run: Mail() for log in logs}
    await bus.open({run: mail.deliver for run, mail in mails.items()})
    for log in (logs[0], logs[-1]):
        await log.append()
        await mails[log.run].take(1)
    redis.do("CLIENT", "KILL", "TYPE", "pubsub")
    for log in (logs[0], logs[-1]):
        await log.append(5)
        await mails[log.run].until(
            lambda items, log=log: Head(log.run, log.epoch, 7) in items or items[-1].seq == 7  # type: ignore[misc]
        )


# -- The listener --------------------------------------------------------------------------------------------------


class Silent:
    """Stands in for a connection that takes everything and confirms nothing."""

    is_connected = True

    def __init__(self) -> None:
        self.commands: list[tuple[Any, ...]] = []

    async def send_command(self, *command: Any, **options: Any) -> None:
        self.commands.append(command)


async def test_a_late_confirmation_of_a_subscribe_that_was_undone_does_not_confirm_the_next_one(redis: Redis) -> None:
    """Between the two, Redis unsubscribes, and what is published is lost."""

    async def publish(channel: str, message: bytes) -> None:
        pass

    receivers: Mapping[str, Callable[[bytes], None]] = {"run": ignore}
    listener, connection = Listener(connections(redis.url), publish, "probe", {}, checkpoint), Silent()
    listener._connection = cast(AbstractConnection, connection)
    confirmed = anyio.Event()

    async def subscribe() -> None:
        await listener.subscribe(receivers)
        confirmed.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(subscribe)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    listener.unsubscribe("run")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(subscribe)
        await anyio.wait_all_tasks_blocked()
        assert [command[0] for command in connection.commands] == ["SUBSCRIBE", "SUBSCRIBE"]
        listener._take_confirmation("run")
        await anyio.wait_all_tasks_blocked()
        assert not confirmed.is_set()
        listener._take_confirmation("run")
        await confirmed.wait()
