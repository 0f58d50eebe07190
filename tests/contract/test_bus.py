"""The bus contract: every sentence of `agentcast.server.bus.base`, for any bus.

Nothing here relies on a bus being in memory or synchronous: what it delivers is awaited, and that it delivers nothing
more is only asserted after something later has arrived by the same way.
"""

from collections.abc import Mapping
from typing import Any

import anyio
import pytest

from agentcast.server.bus.base import (
    ACTIVE,
    APPEND_BYTES,
    PAGE_BYTES,
    PAGE_EVENTS,
    Bus,
    Filter,
    Frame,
    Head,
    Snapshot,
    first_part,
    new_run_id,
)
from agentcast.server.errors import AlreadyFinished, Conflict, Ended, Fenced, HeadMismatch, NotFound, Unavailable
from tests.contract.conftest import MakeBus
from tests.contract.support import PATIENCE, Heard, Log, Mail, follow, frames, new_run

# -- Creating ------------------------------------------------------------------------------------------------------


async def test_created_run_is_known_and_holds_its_first_frame(bus: Bus) -> None:
    new = new_run(agent="echo", principal="ann", thread="t1")

    created = await bus.create(new)

    assert (created.run, created.epoch) == (new.run, new.epoch)
    assert created.fence is not None
    info = (await bus.info([new.run]))[new.run]
    assert (info.run, info.agent, info.principal, info.thread) == (new.run, "echo", "ann", "t1")
    assert (info.epoch, info.head, info.status, info.created, info.ended) == (new.epoch, 1, "queued", 1_000.0, None)
    page = await bus.read(new.run, new.epoch, 0)
    assert page is not None
    assert (list(page.frames), page.head) == ([new.first], 1)


async def test_same_key_and_fingerprint_gives_the_first_run_without_owning_it(bus: Bus) -> None:
    first = await bus.create(new_run(key="k", fingerprint="f"))
    again = new_run(key="k", fingerprint="f")

    found = await bus.create(again)

    assert (found.run, found.epoch, found.fence) == (first.run, first.epoch, None)
    assert await bus.info([again.run]) == {}


async def test_run_found_by_key_is_not_announced_again(bus: Bus) -> None:
    watched = Heard()
    subscription, position = await bus.watch_feed(watched.announce)
    first = await bus.create(new_run(key="k"))
    await bus.create(new_run(key="k"))
    last = await bus.create(new_run())

    assert [entry.run for entry in await watched.take(2)] == [first.run, last.run]
    entries = await bus.read_feed(position)
    assert entries is not None
    assert [entry.run for entry in entries] == [first.run, last.run]
    subscription.close()


async def test_run_found_by_key_has_the_epoch_of_now(bus: Bus) -> None:
    log = await Log.create(bus, new_run(key="k"))
    await log.rebase(5)

    assert (await bus.create(new_run(key="k"))).epoch == log.epoch


async def test_ended_run_is_still_found_by_its_key(bus: Bus) -> None:
    log = await Log.create(bus, new_run(key="k"))
    await log.append(end=True)

    assert (await bus.create(new_run(key="k"))).run == log.run


async def test_a_run_that_failed_before_it_began_gives_its_key_back(bus: Bus) -> None:
    log = await Log.create(bus, new_run(key="k"))
    await bus.append(log.run, log.fence, log.next(end=True), "failed")
    second = await bus.create(new_run(key="k"))
    assert second.run != log.run
    assert second.fence is not None
    began = Log(bus, second)
    await began.append()
    await bus.append(began.run, began.fence, began.next(end=True), "failed")
    assert (await bus.create(new_run(key="k"))).run == began.run


async def test_same_key_with_another_fingerprint_conflicts_and_creates_nothing(bus: Bus) -> None:
    await bus.create(new_run(key="k", fingerprint="f"))
    other = new_run(key="k", fingerprint="g")

    with pytest.raises(Conflict):
        await bus.create(other)

    assert await bus.info([other.run]) == {}


async def test_keys_of_different_principals_do_not_meet(bus: Bus) -> None:
    first = await bus.create(new_run(principal="ann", key="k", fingerprint="f"))
    second = await bus.create(new_run(principal="bob", key="k", fingerprint="g"))

    assert first.run != second.run
    assert second.fence is not None


async def test_one_of_many_racing_creates_with_one_key_wins(bus: Bus) -> None:
    results: list[tuple[str, int | None]] = []

    async def create() -> None:
        created = await bus.create(new_run(key="k"))
        results.append((created.run, created.fence))

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(create)

    assert len({run for run, _ in results}) == 1
    assert sum(fence is not None for _, fence in results) == 1


# -- Owning --------------------------------------------------------------------------------------------------------


async def test_claim_makes_the_earlier_fence_void_for_every_write(bus: Bus) -> None:
    log = await Log.create(bus)
    stale = log.fence
    log.fence = await bus.claim(log.run)

    with pytest.raises(Fenced):
        await bus.append(log.run, stale, log.next(), "running")
    with pytest.raises(Fenced):
        await bus.rebase(log.run, stale, 9, b"{}", "running")
    with pytest.raises(Fenced):
        await bus.save_snapshot(stale, Snapshot(log.run, log.epoch, 1, b"{}"))

    assert await bus.load_snapshot(log.run) is None
    assert (await bus.info([log.run]))[log.run].head == 1
    await log.append()
    await log.save(2)


async def test_fenced_owner_cannot_even_retry(bus: Bus) -> None:
    log = await Log.create(bus)
    batch = await log.append()
    await bus.claim(log.run)

    with pytest.raises(Fenced):
        await bus.append(log.run, log.fence, batch, "running")


async def test_only_the_last_of_racing_claims_may_write(bus: Bus) -> None:
    log = await Log.create(bus)
    fences: list[int] = []

    async def claim() -> None:
        fences.append(await bus.claim(log.run))

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(claim)

    assert len({log.fence, *fences}) == 11
    accepted = []
    for fence in fences:
        try:
            await bus.append(log.run, fence, log.next(), "running")
            accepted.append(fence)
        except Fenced:
            pass
    assert len(accepted) == 1


async def test_only_runs_that_another_owner_has_claimed_are_fenced(bus: Bus) -> None:
    mine, claimed, ended_here, ended_there = [await Log.create(bus) for _ in range(4)]
    fences = {log.run: log.fence for log in (mine, claimed, ended_here, ended_there)}
    await claimed.append()
    await ended_here.append(end=True)
    assert not await bus.fenced(fences)

    claimed.fence = await bus.claim(claimed.run)
    ended_there.fence = await bus.claim(ended_there.run)
    await ended_there.append(end=True)

    assert set(await bus.fenced(fences | {new_run_id(): 1})) == {claimed.run, ended_there.run}
    assert not await bus.fenced({mine.run: mine.fence, claimed.run: claimed.fence})
    assert not await bus.fenced({})


async def test_ended_run_cannot_be_claimed(bus: Bus) -> None:
    log = await Log.create(bus)
    await log.append(end=True)

    with pytest.raises(Ended):
        await bus.claim(log.run)


async def test_two_owners_racing_to_end_a_run_leave_one_terminal_frame(bus: Bus) -> None:
    log = await Log.create(bus)
    fences = [log.fence, await bus.claim(log.run)]
    refused: list[Exception] = []

    async def end(fence: int) -> None:
        try:
            await bus.append(log.run, fence, log.next(end=True), "done")
        except (Fenced, Ended) as error:
            refused.append(error)

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            for fence in fences:
                tasks.start_soon(end, fence)

    assert len(refused) == 1
    assert [frame.terminal for frame in await log.read_all()] == [False, True]


# -- Appending -----------------------------------------------------------------------------------------------------


async def test_appended_frames_are_in_the_log_and_delivered_in_order(bus: Bus) -> None:
    log = await Log.create(bus)
    mail = Mail()
    subscription = await follow(bus, log.run, mail.deliver)

    appended = [*await log.append(3), *await log.append(1), *await log.append(5)]

    assert await mail.take(9) == appended
    assert await log.read_all(after=1) == appended
    info = (await bus.info([log.run]))[log.run]
    assert (info.head, info.status, info.ended) == (10, "running", None)
    subscription.close()


async def test_frames_keep_every_field(bus: Bus) -> None:
    log = await Log.create(bus)
    mail = Mail()
    subscription = await follow(bus, log.run, mail.deliver)
    batch = [
        Frame(log.run, log.epoch, 2, b'{"text":"\xc3\xa9\xe2\x98\x83"}', progress=False),
        Frame(log.run, log.epoch, 3, b"{}", progress=True),
        Frame(log.run, log.epoch, 4, b"{}", progress=True, terminal=True),
    ]

    await bus.append(log.run, log.fence, batch, "failed")

    assert await mail.take(3) == batch
    assert await log.read_all(after=1) == batch
    subscription.close()


@pytest.mark.parametrize("first", [2, 4], ids=["a batch before the last", "the last batch"])
async def test_retried_batch_changes_nothing_and_is_not_delivered_again(bus: Bus, first: int) -> None:
    log = await Log.create(bus)
    batches = {2: await log.append(2), 4: await log.append(2)}
    mail = Mail()
    subscription = await follow(bus, log.run, mail.deliver)

    await bus.append(log.run, log.fence, batches[first], "cancelling")

    later = await log.append()
    assert await mail.take(1) == later
    assert mail.items == later
    assert await log.read_all(after=1) == [*batches[2], *batches[4], *later]
    assert (await bus.info([log.run]))[log.run].status == "running"
    subscription.close()


async def test_terminal_batch_may_be_retried_after_the_end(bus: Bus) -> None:
    log = await Log.create(bus)
    batch = await log.append(2, end=True)

    await bus.append(log.run, log.fence, batch, "done")

    assert await log.read_all(after=1) == batch


async def test_nothing_is_written_after_the_end(bus: Bus) -> None:
    log = await Log.create(bus)
    await log.append(end=True)

    with pytest.raises(Ended):
        await bus.append(log.run, log.fence, log.next(), "running")

    assert len(await log.read_all()) == 2
    info = (await bus.info([log.run]))[log.run]
    assert info.status == "done"
    assert info.ended is not None


@pytest.mark.parametrize(
    ("first", "count"),
    [(5, 1), (3, 2), (2, 3)],
    ids=["leaves a hole", "overlaps the head", "repeats a batch and goes on"],
)
async def test_batch_that_does_not_follow_the_head_is_refused_whole(bus: Bus, first: int, count: int) -> None:
    log = await Log.create(bus)
    appended = await log.append(2)
    mail = Mail()
    subscription = await follow(bus, log.run, mail.deliver)

    with pytest.raises(HeadMismatch) as refusal:
        await bus.append(log.run, log.fence, frames(log.run, log.epoch, first, count, end=True), "done")

    assert (refusal.value.run, refusal.value.epoch, refusal.value.head) == (log.run, log.epoch, 3)
    assert await log.read_all(after=1) == appended
    assert (await bus.info([log.run]))[log.run].ended is None
    later = await log.append()
    assert await mail.take(1) == later
    assert mail.items == later
    subscription.close()


@pytest.mark.parametrize("first", [2, 3], ids=["at the head", "after the head"])
async def test_batch_of_another_epoch_is_refused(bus: Bus, first: int) -> None:
    log = await Log.create(bus)
    await log.append(1)

    with pytest.raises(HeadMismatch) as refusal:
        await bus.append(log.run, log.fence, frames(log.run, "other", first), "running")

    assert (refusal.value.epoch, refusal.value.head) == (log.epoch, 2)


@pytest.mark.parametrize("count", [4, 200])
async def test_batch_over_the_bytes_of_an_append_is_refused_whole(bus: Bus, count: int) -> None:
    log = await Log.create(bus)
    batch = log.next(count, size=APPEND_BYTES // 4)

    with pytest.raises(ValueError, match="append"):
        await bus.append(log.run, log.fence, batch, "running")

    assert [frame.seq for frame in await log.read_all()] == [1]


@pytest.mark.parametrize("size", [0, 1, 1_000, 65_537, 256 * 1024])
async def test_any_batch_can_be_appended_in_parts(bus: Bus, size: int) -> None:
    log = await Log.create(bus)
    mail = Mail()
    subscription = await follow(bus, log.run, mail.deliver)
    batch = log.next(40, size=size)
    waiting = list(batch)

    while waiting:
        part = first_part(waiting)
        assert sum(len(frame.data) for frame in part) <= APPEND_BYTES
        await bus.append(log.run, log.fence, part, "running")
        del waiting[: len(part)]

    assert await mail.take(len(batch)) == batch
    assert await log.read_all(after=1) == batch
    subscription.close()


async def test_unknown_run_is_not_found(bus: Bus) -> None:
    run = new_run_id()
    for attempt in (
        bus.claim(run),
        bus.append(run, 1, frames(run, "e", 1), "running"),
        bus.read(run, "e", 0),
        bus.load_snapshot(run),
        follow(bus, run, Mail().deliver),
        bus.send_command(run, {"op": "cancel"}),
    ):
        with pytest.raises(NotFound):
            await attempt


async def test_info_leaves_unknown_runs_out(bus: Bus) -> None:
    log = await Log.create(bus)

    assert set(await bus.info([new_run_id(), log.run])) == {log.run}
    assert await bus.info([]) == {}


# -- Rebasing ------------------------------------------------------------------------------------------------------


async def test_rebase_begins_an_empty_epoch_at_the_owners_state(bus: Bus) -> None:
    log = await Log.create(bus)
    await log.append(3)
    before = log.epoch

    await log.rebase(7, b'{"at":7}')

    assert log.epoch != before
    info = (await bus.info([log.run]))[log.run]
    assert (info.epoch, info.head, info.status, info.ended) == (log.epoch, 7, "running", None)
    assert await bus.load_snapshot(log.run) == Snapshot(log.run, log.epoch, 7, b'{"at":7}')
    page = await bus.read(log.run, log.epoch, 7)
    assert page is not None
    assert (list(page.frames), page.head) == ([], 7)


async def test_rebase_makes_every_older_position_unreadable(bus: Bus) -> None:
    log = await Log.create(bus)
    await log.append(3)
    before = log.epoch
    await log.rebase(7)

    assert [await bus.read(log.run, before, after) for after in (0, 4, 7)] == [None, None, None]
    assert [await bus.read(log.run, log.epoch, after) for after in (0, 4, 6, 8)] == [None] * 4


async def test_log_goes_on_after_a_rebase(bus: Bus) -> None:
    log = await Log.create(bus)
    mail = Mail()
    subscription = await follow(bus, log.run, mail.deliver)
    before = await log.append()
    await log.rebase(5)
    after = await log.append(2)
    end = await log.append(end=True)

    assert await mail.take(5) == [*before, Head(log.run, log.epoch, 5), *after, *end]
    assert await log.read_all(after=5) == [*after, *end]
    assert [frame.seq for frame in after] == [6, 7]
    subscription.close()


async def test_frames_of_the_old_epoch_are_refused_after_a_rebase(bus: Bus) -> None:
    log = await Log.create(bus)
    batch = await log.append()
    await log.rebase(2)

    with pytest.raises(HeadMismatch):
        await bus.append(log.run, log.fence, batch, "running")


async def test_rebase_to_an_ended_state_ends_the_run(bus: Bus) -> None:
    log = await Log.create(bus)
    mail = Mail()
    subscription = await follow(bus, log.run, mail.deliver)

    await log.rebase(4, status="failed")

    assert await mail.take(1) == [Head(log.run, log.epoch, 4, ended=True)]
    info = (await bus.info([log.run]))[log.run]
    assert info.status == "failed"
    assert info.ended is not None
    with pytest.raises(Ended):
        await bus.append(log.run, log.fence, log.next(), "running")
    with pytest.raises(Ended):
        await bus.claim(log.run)
    subscription.close()


# -- Reading -------------------------------------------------------------------------------------------------------


async def test_page_holds_at_most_its_number_of_frames(bus: Bus) -> None:
    log = await Log.create(bus)
    await log.append(2 * PAGE_EVENTS)

    page = await bus.read(log.run, log.epoch, 0)

    assert page is not None
    assert [frame.seq for frame in page.frames] == list(range(1, PAGE_EVENTS + 1))
    assert page.head == 2 * PAGE_EVENTS + 1
    assert [frame.seq for frame in await log.read_all()] == list(range(1, page.head + 1))


async def test_page_is_larger_than_its_bytes_by_its_last_frame_at_most(bus: Bus) -> None:
    log = await Log.create(bus)
    for _ in range(5):
        await log.append(1, size=PAGE_BYTES // 2 + 1)

    page = await bus.read(log.run, log.epoch, 1)

    assert page is not None
    assert sum(len(frame.data) for frame in page.frames[:-1]) < PAGE_BYTES
    assert 1 <= len(page.frames) <= 2
    assert [frame.seq for frame in await log.read_all(after=1)] == [2, 3, 4, 5, 6]


async def test_single_frame_over_the_page_size_is_read(bus: Bus) -> None:
    log = await Log.create(bus)
    await log.append(1, size=2 * PAGE_BYTES)

    assert [frame.seq for frame in await log.read_all(after=1)] == [2]


async def test_page_starts_exactly_after_the_position(bus: Bus) -> None:
    log = await Log.create(bus)
    await log.append(4)

    for after in range(6):
        page = await bus.read(log.run, log.epoch, after)
        assert page is not None
        assert [frame.seq for frame in page.frames] == list(range(after + 1, 6))
        assert page.head == 5


async def test_position_that_the_log_cannot_continue_gives_no_page(bus: Bus) -> None:
    log = await Log.create(bus)
    await log.append(2)

    assert await bus.read(log.run, log.epoch, 4) is None
    assert await bus.read(log.run, "other", 1) is None
    assert await bus.read(log.run, "other", 0) is None


# -- Snapshots and trimming ----------------------------------------------------------------------------------------


async def test_there_is_no_snapshot_before_one_is_saved(bus: Bus) -> None:
    log = await Log.create(bus)

    assert await bus.load_snapshot(log.run) is None


async def test_newest_snapshot_is_loaded(bus: Bus) -> None:
    log = await Log.create(bus)
    await log.append(4)
    await log.save(2, b'{"at":2}')
    newest = await log.save(4, b'{"at":4}')
    await log.save(3, b'{"at":3}')

    assert await bus.load_snapshot(log.run) == newest


async def test_snapshot_of_an_epoch_that_is_over_is_not_kept(bus: Bus) -> None:
    log = await Log.create(bus)
    await log.append(4)
    over = log.epoch
    await log.rebase(6, b'{"at":6}')

    await bus.save_snapshot(log.fence, Snapshot(log.run, over, 5, b"{}"))

    assert await bus.load_snapshot(log.run) == Snapshot(log.run, log.epoch, 6, b'{"at":6}')


async def test_log_is_never_trimmed_without_a_snapshot(make_bus: MakeBus) -> None:
    async with make_bus(log_events=4, log_bytes=100) as bus:
        log = await Log.create(bus)
        for _ in range(10):
            await log.append(3, size=50)

        assert [frame.seq for frame in await log.read_all()] == list(range(1, 32))


async def test_log_is_trimmed_up_to_the_snapshot_at_most(make_bus: MakeBus) -> None:
    async with make_bus(log_events=4) as bus:
        log = await Log.create(bus)
        await log.append(19)
        await log.save(7)

        assert [frame.seq for frame in await log.read_all(after=7)] == list(range(8, 21))
        assert await bus.read(log.run, log.epoch, 0) is None
        assert await bus.read(log.run, log.epoch, 6) is None


async def test_trimmed_log_keeps_its_number_of_events(make_bus: MakeBus) -> None:
    async with make_bus(log_events=4) as bus:
        log = await Log.create(bus)
        await log.append(19)
        await log.save(20)

        assert await bus.read(log.run, log.epoch, 15) is None
        assert [frame.seq for frame in await log.read_all(after=16)] == [17, 18, 19, 20]


async def test_log_over_its_bytes_is_trimmed_though_it_has_few_events(make_bus: MakeBus) -> None:
    async with make_bus(log_bytes=1_000) as bus:
        log = await Log.create(bus)
        await log.append(10, size=400)
        await log.save(11)

        assert await bus.read(log.run, log.epoch, 0) is None
        assert [frame.seq for frame in await log.read_all(after=9)] == [10, 11]


async def test_small_log_is_not_trimmed(bus: Bus) -> None:
    log = await Log.create(bus)
    await log.append(9)
    await log.save(10)

    assert len(await log.read_all()) == 10


async def test_log_goes_on_after_it_was_trimmed(make_bus: MakeBus) -> None:
    async with make_bus(log_events=2) as bus:
        log = await Log.create(bus)
        await log.append(6)
        await log.save(7)
        await log.append(3, end=True)
        await log.save(10)

        assert [frame.seq for frame in await log.read_all(after=8)] == [9, 10]
        assert await bus.read(log.run, log.epoch, 7) is None


# -- Subscribing ---------------------------------------------------------------------------------------------------


async def test_subscription_is_confirmed_when_it_returns(bus: Bus) -> None:
    """Subscribing, then reading the head, then a page shows everything: nothing falls between (G2)."""
    log = await Log.create(bus)
    for _ in range(10):
        mail = Mail()
        subscription = await follow(bus, log.run, mail.deliver)
        batch = await log.append(2)
        assert (await mail.take(2)) == batch
        subscription.close()


async def test_subscriber_gets_nothing_from_before(bus: Bus) -> None:
    log = await Log.create(bus)
    await log.append(3)
    mail = Mail()
    subscription = await follow(bus, log.run, mail.deliver)

    later = await log.append()

    await mail.take(1)
    assert mail.items == later
    subscription.close()


async def test_every_subscriber_gets_all_and_only_its_run(bus: Bus) -> None:
    one, other = await Log.create(bus), await Log.create(bus)
    mails = [Mail(), Mail(), Mail()]
    subscriptions = [
        await follow(bus, log.run, mail.deliver) for log, mail in zip((one, one, other), mails, strict=True)
    ]

    first, second = await one.append(2), await other.append(3)

    assert await mails[0].take(2) == first
    assert await mails[1].take(2) == first
    assert await mails[2].take(3) == second
    assert [len(mail.items) for mail in mails] == [2, 2, 3]
    for subscription in subscriptions:
        subscription.close()


async def test_no_delivery_follows_a_close(bus: Bus) -> None:
    log = await Log.create(bus)
    closed, open = Mail(), Mail()
    subscription = await follow(bus, log.run, closed.deliver)
    other = await follow(bus, log.run, open.deliver)
    subscription.close()
    subscription.close()

    await log.append()

    await open.take(1)
    await bus.check()
    assert closed.items == []
    other.close()


async def test_no_delivery_follows_a_close_from_inside_a_delivery(bus: Bus) -> None:
    log = await Log.create(bus)
    delivered: list[str] = []
    done = anyio.Event()

    def only(name: str, other: str) -> None:
        delivered.append(name)
        subscriptions[other].close()
        done.set()

    subscriptions = {
        "one": await follow(bus, log.run, lambda _: only("one", "other")),
        "other": await follow(bus, log.run, lambda _: only("other", "one")),
    }
    await log.append()
    with anyio.fail_after(PATIENCE):
        await done.wait()
    await bus.check()

    assert len(delivered) == 1


async def test_subscriptions_to_a_busy_run_miss_nothing(bus: Bus) -> None:
    """A page up to the head, then deliveries: together they are the log, wherever the subscription falls (G1, G2)."""
    log = await Log.create(bus)
    seen: list[list[int]] = []

    async def write() -> None:
        for _ in range(30):
            await log.append(2)
            await anyio.lowlevel.checkpoint()
        await log.append(end=True)

    async def read_and_follow() -> None:
        mail = Mail()
        subscription = await follow(bus, log.run, mail.deliver)
        page = await bus.read(log.run, log.epoch, 0)
        assert page is not None
        await mail.until(lambda items: any(isinstance(item, Frame) and item.terminal for item in items))
        seqs = [frame.seq for frame in page.frames]
        seqs += [item.seq for item in mail.items if item.seq > seqs[-1]]
        seen.append(seqs)
        subscription.close()

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)
            for _ in range(10):
                tasks.start_soon(read_and_follow)
                await anyio.lowlevel.checkpoint()

    assert seen == [list(range(1, 63))] * 10


# -- Listing -------------------------------------------------------------------------------------------------------


async def test_list_is_newest_first_and_limited(bus: Bus) -> None:
    ids = [f"{n:09d}run" for n in range(5)]
    for n in (3, 0, 4, 1, 2):  # ids say when a run was created; they need not arrive in that order
        await bus.create(new_run(ids[n]))

    assert [info.run for info in await bus.list(Filter())] == ids[::-1]
    assert [info.run for info in await bus.list(Filter(limit=2))] == [ids[4], ids[3]]
    assert [info.run for info in await bus.list(Filter(before=ids[3], limit=2))] == [ids[2], ids[1]]
    assert [info.run for info in await bus.list(Filter(before=ids[0]))] == []


async def test_list_filters_by_every_field(bus: Bus) -> None:
    logs = {
        "a": await Log.create(bus, new_run(agent="echo", principal="ann", thread="t")),
        "b": await Log.create(bus, new_run(agent="echo", principal="bob", thread="t")),
        "c": await Log.create(bus, new_run(agent="other", principal="ann", thread="t")),
        "d": await Log.create(bus, new_run(agent="echo", principal="ann")),
    }
    names = {log.run: name for name, log in logs.items()}
    await logs["c"].append()
    await logs["d"].append(end=True)

    async def found(**filter: Any) -> str:
        return "".join(sorted(names[info.run] for info in await bus.list(Filter(**filter))))

    assert await found() == "abcd"
    assert await found(principal="ann") == "acd"
    assert await found(agent="echo") == "abd"
    assert await found(thread="t") == "abc"
    assert await found(statuses=ACTIVE) == "abc"
    assert await found(statuses={"done"}) == "d"
    assert await found(statuses=set()) == ""
    assert await found(principal="ann", agent="echo", thread="t", statuses={"queued"}) == "a"
    assert await found(principal="nobody") == ""


async def test_paging_through_the_list_gives_each_run_once(bus: Bus) -> None:
    """Also for runs that were created within one millisecond."""
    created = {(await bus.create(new_run())).run for _ in range(100)}
    found: list[str] = []

    while page := await bus.list(Filter(before=found[-1] if found else None, limit=7)):
        found += [info.run for info in page]

    assert len(found) == 100
    assert set(found) == created
    assert found == sorted(found, reverse=True)


# -- The feed ------------------------------------------------------------------------------------------------------


async def test_feed_announces_each_run_in_order(bus: Bus) -> None:
    watched = Heard()
    await bus.create(new_run())
    subscription, position = await bus.watch_feed(watched.announce)
    assert await bus.read_feed(position) == []
    created = [new_run(agent="echo", thread="t"), new_run(principal="bob"), new_run()]
    for new in created:
        await bus.create(new)

    entries = await watched.take(3)

    assert await bus.read_feed(position) == entries
    assert [(entry.run, entry.epoch, entry.agent, entry.thread, entry.principal) for entry in entries] == [
        (new.run, new.epoch, new.agent, new.thread, new.principal) for new in created
    ]
    subscription.close()


async def test_feed_goes_on_after_each_position(bus: Bus) -> None:
    subscription, start = await bus.watch_feed(lambda _: None)
    subscription.close()
    for _ in range(4):
        await bus.create(new_run())
    entries = await bus.read_feed(start)
    assert entries is not None

    for index, entry in enumerate(entries):
        assert await bus.read_feed(entry.position) == entries[index + 1 :]


async def test_closed_watch_receives_nothing_more(bus: Bus) -> None:
    closed = Heard()
    open = Heard()
    subscription, _ = await bus.watch_feed(closed.announce)
    other, _ = await bus.watch_feed(open.announce)
    subscription.close()
    subscription.close()

    await bus.create(new_run())

    await open.take(1)
    await bus.check()
    assert closed.items == []
    other.close()


async def test_feed_that_does_not_reach_back_says_so(make_bus: MakeBus) -> None:
    async with make_bus(feed_length=3) as bus:
        await bus.create(new_run())
        subscription, start = await bus.watch_feed(lambda _: None)
        subscription.close()
        for _ in range(3):
            await bus.create(new_run())
        entries = await bus.read_feed(start)
        assert entries is not None
        assert len(entries) == 3

        await bus.create(new_run())

        assert await bus.read_feed(start) is None
        rest = await bus.read_feed(entries[0].position)
        assert rest is not None
        assert len(rest) == 3


@pytest.mark.parametrize("position", ["", "x", "elsewhere:1", "0-0-0", "9" * 200, ":", "elsewhere:-1"])
async def test_position_that_the_feed_never_had_is_lost(bus: Bus, position: str) -> None:
    await bus.create(new_run())

    assert await bus.read_feed(position) is None


async def test_position_ahead_of_the_feed_is_lost(make_bus: MakeBus) -> None:
    async with make_bus() as ahead, make_bus() as bus:
        subscription, start = await ahead.watch_feed(lambda _: None)
        subscription.close()
        await ahead.create(new_run())
        entries = await ahead.read_feed(start)
        assert entries

        assert await bus.read_feed(entries[-1].position) is None


# -- Commands ------------------------------------------------------------------------------------------------------


async def test_command_reaches_the_owner_and_returns_when_it_is_handled(bus: Bus) -> None:
    log = await Log.create(bus)
    handled: list[tuple[str, Any]] = []
    asked, go = anyio.Event(), anyio.Event()

    async def handle(run: str, command: Mapping[str, Any]) -> None:
        asked.set()
        await go.wait()
        handled.append((run, dict(command)))

    async def send() -> None:
        await bus.send_command(log.run, {"op": "cancel", "reason": None, "by": "ann"})
        assert handled == [(log.run, {"op": "cancel", "reason": None, "by": "ann"})]

    subscription = await bus.handle_commands(handle)
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            await asked.wait()
            assert handled == []
            go.set()
    subscription.close()


async def test_slow_command_does_not_hold_up_another(bus: Bus) -> None:
    slow, quick = await Log.create(bus), await Log.create(bus)
    go = anyio.Event()

    async def handle(run: str, command: Mapping[str, Any]) -> None:
        if run == slow.run:
            await go.wait()

    subscription = await bus.handle_commands(handle)
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bus.send_command, slow.run, {"op": "cancel"})
            await bus.send_command(quick.run, {"op": "cancel"})
            go.set()
    subscription.close()


async def test_refusal_of_a_command_reaches_who_sent_it(bus: Bus) -> None:
    log = await Log.create(bus)

    async def handle(run: str, command: Mapping[str, Any]) -> None:
        raise AlreadyFinished("it has ended already")

    subscription = await bus.handle_commands(handle)
    with pytest.raises(AlreadyFinished, match="it has ended already"):
        await bus.send_command(log.run, {"op": "cancel"})
    subscription.close()


async def test_command_without_an_owner_is_unavailable(bus: Bus) -> None:
    log = await Log.create(bus)

    async def handle(run: str, command: Mapping[str, Any]) -> None:
        raise AssertionError("closed")

    with anyio.fail_after(PATIENCE), pytest.raises(Unavailable):
        await bus.send_command(log.run, {"op": "cancel"})
    subscription = await bus.handle_commands(handle)
    subscription.close()
    subscription.close()
    with anyio.fail_after(PATIENCE), pytest.raises(Unavailable):
        await bus.send_command(log.run, {"op": "cancel"})


# -- Health --------------------------------------------------------------------------------------------------------


async def test_working_bus_passes_its_check(bus: Bus) -> None:
    with anyio.fail_after(PATIENCE):
        await bus.check()
