"""What travels between a hub and Redis at a time is bounded, and what is small and urgent waits for none of it (G4)."""

import itertools
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from agentcast.agents.channel import Channel
from agentcast.agents.events import ToolStart
from agentcast.server.bus.base import APPEND_BYTES, PAGE_BYTES, NewRun, Origin, Snapshot, new_run_id
from agentcast.server.bus.redis import RedisBus, feed
from agentcast.server.bus.redis.pieces import PIECE_BYTES
from agentcast.server.bus.redis.pipelined import BATCH_BYTES, PipelinedConnection, Script, connections
from agentcast.server.errors import Fenced, NotFound, Unavailable
from agentcast.server.runs.publisher import SummaryPublisher
from agentcast.server.runs.recorder import Recorder
from agentcast.server.runs.snapshots import Snapshots
from tests.contract.support import Log, Mail, follow, frames, new_run
from tests.support.redis import Redis, running_redis
from tests.support.waiting import PATIENCE

KIB = 1024


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
def trips(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The calls of each round trip of any connection."""
    trips: list[list[Any]] = []
    exchange = PipelinedConnection._exchange

    async def watched(connection: PipelinedConnection, batch: list[Any]) -> None:
        trips.append(batch)
        await exchange(connection, batch)

    monkeypatch.setattr(PipelinedConnection, "_exchange", watched)
    return trips


def check_trips(trips: Sequence[Sequence[Any]]) -> None:
    """No call and no round trip sends more than a mebibyte."""
    assert trips
    assert max(sum(call.size for call in batch) for batch in trips) <= BATCH_BYTES


def state(size: int) -> bytes:
    """A state in which no two pieces are the same."""
    return random.Random(size).randbytes(size)


# -- Events --------------------------------------------------------------------------------------------------------


async def test_a_burst_of_large_events_is_published_in_small_messages_and_cuts_no_subscription(
    redis: Redis, bus: RedisBus, trips: list[list[Any]]
) -> None:
    other = RedisBus(redis.url, "two")
    sizes: list[int] = []

    async def overhear() -> None:
        connection = connections(redis.url)()
        await connection.send_command("PSUBSCRIBE", "*", check_health=False)
        while True:
            message = await connection.read_response(timeout=float("inf"))
            sizes.append(len(message[-1]) if message[0] == b"pmessage" else 0)

    async with running(other), anyio.create_task_group() as tasks:
        tasks.start_soon(overhear)
        recorder = Recorder(
            bus,
            new_run_id(),
            Origin("echo", "ann", None, 1.0),
            "e",
            1,
            snapshots=Snapshots(),
            summaries=SummaryPublisher(bus),
        )
        first = frames(recorder.run, "e", 1)[0]
        recorder._seq = recorder._prev = 1
        await bus.create(
            NewRun(run=recorder.run, epoch="e", agent="a", principal="ann", thread=None, created=1.0, first=first)
        )
        mail = Mail()
        await follow(other, recorder.run, mail.deliver)
        channel = Channel(high_water=1_000)
        for n in range(200):
            await channel.send(ToolStart(span=str(n), tool="t", args=dict.fromkeys("abc", "x" * 64_000)))
        channel.close()
        await recorder.record_from(channel)
        got = await mail.take(200)
        assert [item.seq for item in got] == list(range(2, 202))
        assert 150 * KIB < max(sizes) <= APPEND_BYTES
        after = 1
        while after < 201:
            page = await other.read(recorder.run, "e", after)
            assert page is not None
            assert sum(len(frame.data) for frame in page.frames) <= PAGE_BYTES + 256 * KIB
            after = page.frames[-1].seq
        assert other.counters["connections_lost"] == 0
        tasks.cancel_scope.cancel()
    check_trips(trips)


async def test_calls_that_wait_together_share_round_trips_of_bounded_size_and_small_ones_wait_for_one_at_most(
    redis: Redis, trips: list[list[Any]]
) -> None:
    connection, echo = PipelinedConnection(connections(redis.url)()), Script("return #ARGV[1]")
    sizes = [300 * KIB] * 20 + [1] * 30 + [2 * BATCH_BYTES, 10] + [10] * 100
    answers: dict[int, Any] = {}

    async def call(number: int, size: int) -> None:
        answers[number] = await connection.script(echo, [], b"x" * size, expects=300 * KIB if size == 1 else 0)

    async with anyio.create_task_group() as tasks:
        async with anyio.create_task_group() as calls:
            for number, size in enumerate(sizes):
                calls.start_soon(call, number, size)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(connection.run)
        tasks.cancel_scope.cancel()
    assert [answers[number] for number in range(len(sizes))] == sizes
    alone = [batch for batch in trips if sum(call.weight for call in batch) > BATCH_BYTES]
    assert [[call.answer for call in batch] for batch in alone] == [[2 * BATCH_BYTES]]
    carried = [[call.answer for call in batch] for batch in trips]
    smalls = [place for place, batch in enumerate(carried) if 10 in batch]
    assert smalls == [1] or smalls == [0]
    assert len(trips) == 7 + 10 + 1 + 1


async def test_a_start_with_the_largest_input_fits(bus: RedisBus, trips: list[list[Any]]) -> None:
    run = new_run_id()
    first = frames(run, "e", 1, size=256 * KIB)[0]
    await bus.create(
        NewRun(
            run=run,
            epoch="e",
            agent="a" * 256,
            principal="p",
            thread="☃" * 256,
            created=1.0,
            first=first,
            key="k" * 256,
        )
    )
    check_trips(trips)


async def test_a_long_feed_is_read_in_pages(
    bus: RedisBus, trips: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "PAGE_ENTRIES", 7)
    _, position = await bus.watch_feed(lambda _: None)
    runs = [(await bus.create(new_run())).run for _ in range(30)]
    trips.clear()
    for after, wanted in (("0:", runs), (position, runs), (f"7:{runs[6]}", runs[7:]), (f"30:{runs[29]}", [])):
        entries = await bus.read_feed(after)
        assert entries is not None
        assert [entry.run for entry in entries] == wanted
    assert max(len(call.answer) for batch in trips for call in batch) == 7


async def test_a_feed_that_loses_entries_while_it_is_read_says_so(
    redis: Redis, bus: RedisBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "PAGE_ENTRIES", 7)
    for _ in range(30):
        await bus.create(new_run())
    call = bus._reads.call

    async def trimming(*command: Any, **options: Any) -> Any:
        answer = await call(*command, **options)
        redis.do("XTRIM", "agentcast:feed", "MAXLEN", 10)
        return answer

    monkeypatch.setattr(bus._reads, "call", trimming)
    assert await bus.read_feed("0:") is None


# -- States --------------------------------------------------------------------------------------------------------

SIZES = [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES, 30 * PIECE_BYTES + 17]


@pytest.mark.parametrize("size", SIZES)
async def test_a_state_of_any_size_replaces_any_other(
    redis: Redis, bus: RedisBus, trips: list[list[Any]], size: int
) -> None:
    for former, rebase in itertools.product(SIZES, [False, True]):
        log = await Log.create(bus)
        await log.append(2)
        await log.save(2, state(former))
        await (log.rebase if rebase else log.save)(3, state(size))
        assert await bus.load_snapshot(log.run) == Snapshot(log.run, log.epoch, 3, state(size))
        pieces = max(1, -(-size // PIECE_BYTES))
        assert redis.do("HLEN", f"agentcast:snap:{log.run}") == b":%d" % (4 + pieces - 1)
        assert redis.do("KEYS", f"agentcast:snap:{log.run}*") == b"*1", "nothing is left of what was staged"
        assert int(redis.do("TTL", f"agentcast:snap:{log.run}").lstrip(b":")) > 3_600
    check_trips(trips)
    assert max(call.size for batch in trips for call in batch) < PIECE_BYTES + 4 * KIB


async def test_other_calls_go_between_the_pieces_of_a_state(bus: RedisBus, trips: list[list[Any]]) -> None:
    log = await Log.create(bus)
    await log.append()
    trips.clear()
    done = anyio.Event()

    async def save() -> None:
        await log.save(2, state(40 * PIECE_BYTES))
        done.set()

    asked = 0
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(save)
        while not done.is_set():
            await bus.info([log.run])
            asked += 1
    assert asked >= 20
    assert len(trips) >= 40


async def test_a_state_that_is_replaced_while_it_is_read_is_read_whole(
    bus: RedisBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await Log.create(bus)
    await log.append(3)
    await log.save(2, state(5 * PIECE_BYTES))
    newer = state(4 * PIECE_BYTES)
    call = bus._reads.call
    asked = 0

    async def meddling(*command: Any, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 3:
            await log.save(3, newer)
        return await call(*command, **options)

    monkeypatch.setattr(bus._reads, "call", meddling)
    assert await bus.load_snapshot(log.run) == Snapshot(log.run, log.epoch, 3, newer)


async def test_a_state_of_which_redis_has_lost_a_piece_is_not_kept(
    redis: Redis, bus: RedisBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await Log.create(bus)
    await log.append(3)
    saved = await log.save(2, state(3 * PIECE_BYTES))
    stage = bus._pieces.stage

    async def losing(run: str, fence: int, epoch: str, seq: int, state: bytes) -> tuple[str, bytes, int]:
        staged = await stage(run, fence, epoch, seq, state)
        redis.do("DEL", staged[0])
        return staged

    monkeypatch.setattr(bus._pieces, "stage", losing)
    with pytest.raises(Unavailable):
        await log.save(3, state(4 * PIECE_BYTES))
    with pytest.raises(Unavailable):
        await log.rebase(4, state(4 * PIECE_BYTES))
    assert await bus.load_snapshot(log.run) == saved
    assert (await bus.info([log.run]))[log.run].head == 4
    monkeypatch.setattr(bus._pieces, "stage", stage)
    assert await bus.load_snapshot(log.run) != await log.save(3, state(4 * PIECE_BYTES))


async def test_an_owner_that_is_fenced_while_it_saves_a_state_stops_at_the_next_piece(
    bus: RedisBus, trips: list[list[Any]]
) -> None:
    log = await Log.create(bus)
    await log.append(3)
    saved = await log.save(2, state(PIECE_BYTES))
    await bus.claim(log.run)
    trips.clear()
    with pytest.raises(Fenced):
        await log.save(3, state(100 * PIECE_BYTES))
    assert len(trips) == 1
    assert await bus.load_snapshot(log.run) == saved


async def test_a_run_that_redis_has_lost_is_created_again_with_a_large_state(redis: Redis, bus: RedisBus) -> None:
    log = await Log.create(bus)
    redis.do("FLUSHALL")
    with pytest.raises(NotFound):
        await log.append()
    large = state(20 * PIECE_BYTES)
    epoch = await bus.rebase(log.run, log.fence, 9, large, "running", Origin("echo", "ann", None, 1.0))
    assert await bus.load_snapshot(log.run) == Snapshot(log.run, epoch, 9, large)


async def test_what_is_staged_and_left_expires(redis: Redis, bus: RedisBus) -> None:
    log = await Log.create(bus)
    staged, _, pieces = await bus._pieces.stage(log.run, log.fence, log.epoch, 1, state(3 * PIECE_BYTES))
    assert pieces == 3
    assert 0 < int(redis.do("TTL", staged).lstrip(b":")) <= 60


# -- Connections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stuck", [["_appends"], ["_reads"], ["_appends", "_reads"]], ids="+".join)
async def test_control_traffic_waits_for_no_payload(
    redis: Redis, bus: RedisBus, monkeypatch: pytest.MonkeyPatch, stuck: list[str]
) -> None:
    """Heartbeats, probes, fences, claims and commands go on while what carries appends, pages or states is stuck."""
    other = RedisBus(redis.url, "two")
    handled: list[str] = []

    async def handle(run: str, command: Any) -> None:
        handled.append(run)

    async with running(other):
        log = await Log.create(bus)
        await bus.handle_commands(handle)

        async def never(batch: list[Any]) -> None:
            await anyio.sleep_forever()

        for name in stuck:
            monkeypatch.setattr(getattr(bus, name), "_exchange", never)
        calls: dict[str, Callable[[], Any]] = {
            "_appends": lambda: log.append(),
            "_reads": lambda: bus.info([log.run]),
        }
        for name in stuck:
            with pytest.raises(Unavailable):
                await calls[name]()
        redis.do("DEL", "agentcast:worker:one")
        with anyio.fail_after(PATIENCE):
            while redis.do("EXISTS", "agentcast:worker:one") != b":1":  # noqa: ASYNC110 -- of another process
                await anyio.sleep(0.02)
        await bus.check()
        assert bus.degraded is None
        await other.send_command(log.run, {"op": "verify"})
        assert handled == [log.run]
        assert not await bus.fenced({log.run: log.fence})
        await bus.claim(log.run)
        assert await bus.fenced({log.run: log.fence}) == [log.run]
        await bus._workers.orphans([], None)


async def test_a_slow_append_is_not_sent_again_and_again(redis: Redis) -> None:
    """A link of some hundred KB/s carries the largest append: it is not given up on its way."""
    connection = PipelinedConnection(connections(redis.url)())
    slow = Script("local t = redis.call('TIME')[1] while redis.call('TIME')[1] - t < 3 do end return #ARGV[1]")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(connection.run)
        assert await connection.script(slow, [], b"x" * APPEND_BYTES) == APPEND_BYTES
        tasks.cancel_scope.cancel()
