"""Any bus: of each run the newest summary, kept and delivered."""

import anyio
import pytest

from agentcast.server.bus.base import SUMMARY_BYTES, Bus, Summary, new_run_id
from tests.contract.conftest import MakeBus
from tests.contract.support import Log, Summaries, new_run, summary


async def test_published_summary_is_stored_and_delivered_with_every_field(bus: Bus) -> None:
    log = await Log.create(bus, new_run(principal="bob", thread="t ☃\n"))
    watched = Summaries()
    subscription = await bus.watch_summaries(watched.deliver)
    record = Summary(
        run=log.run,
        epoch=log.epoch,
        seq=1,
        fence=log.fence,
        principal="bob",
        agent="agent “x”",
        thread="t ☃\n",
        status="cancelling",
        created=1_234.5,
        data='{"text":"é☃"}\n'.encode(),
    )

    await bus.publish_summaries([record])

    assert await watched.take(1) == [record]
    assert await bus.summaries([log.run]) == {log.run: record}
    subscription.close()


async def test_newest_summary_replaces_the_stored_one(bus: Bus) -> None:
    log = await Log.create(bus)
    for seq in (1, 4, 4, 9):
        record = summary(log, seq, data=b'{"seq":%d}' % seq)
        await bus.publish_summaries([record])
        assert await bus.summaries([log.run]) == {log.run: record}


async def test_older_summary_never_replaces_a_newer_one_and_is_not_delivered(bus: Bus) -> None:
    log, watched = await Log.create(bus), Summaries()
    await bus.watch_summaries(watched.deliver)
    newer, last = summary(log, 20), summary(log, 100)

    await bus.publish_summaries([newer])
    await bus.publish_summaries([summary(log, 19), summary(log, 3)])
    assert await bus.summaries([log.run]) == {log.run: newer}
    await bus.publish_summaries([last])

    assert await watched.take(2) == [newer, last]


async def test_within_one_call_the_newest_wins_too(bus: Bus) -> None:
    log = await Log.create(bus)

    await bus.publish_summaries([summary(log, 2), summary(log, 11), summary(log, 10)])

    assert (await bus.summaries([log.run]))[log.run].seq == 11


async def test_summary_of_a_fenced_owner_is_skipped_and_the_others_are_not(bus: Bus) -> None:
    claimed, mine, watched = await Log.create(bus), await Log.create(bus), Summaries()
    await bus.watch_summaries(watched.deliver)
    old = summary(claimed, 5)
    claimed.fence = await bus.claim(claimed.run)
    kept = [summary(mine, 1), summary(claimed, 2)]

    await bus.publish_summaries([old, *kept])

    assert await bus.summaries([claimed.run, mine.run]) == {record.run: record for record in kept}
    assert await watched.take(2) == kept


async def test_summary_of_an_unknown_run_is_skipped(bus: Bus) -> None:
    log = await Log.create(bus)

    await bus.publish_summaries([summary(log, run=new_run_id()), summary(log)])

    assert (await bus.summaries([log.run, new_run_id()])).keys() == {log.run}
    await bus.publish_summaries([])
    assert await bus.summaries([]) == {}


async def test_summary_of_an_epoch_that_is_over_is_skipped(bus: Bus) -> None:
    log = await Log.create(bus)
    before = summary(log, 9)
    await bus.publish_summaries([before])
    await log.rebase(3)
    assert await bus.summaries([log.run]) == {log.run: before}
    after = summary(log, 3)

    await bus.publish_summaries([after])
    await bus.publish_summaries([before])

    assert await bus.summaries([log.run]) == {log.run: after}


async def test_ended_run_takes_its_last_summary(bus: Bus) -> None:
    log = await Log.create(bus)
    await log.append(end=True)
    record = summary(log, status="done")

    await bus.publish_summaries([record])

    assert await bus.summaries([log.run]) == {log.run: record}


async def test_summaries_do_not_touch_what_else_is_known_of_a_run(bus: Bus) -> None:
    log = await Log.create(bus)
    await log.append()
    before = await bus.info([log.run])

    await bus.publish_summaries([summary(log, 7, status="failed")])

    assert await bus.info([log.run]) == before
    await log.append()


async def test_all_watchers_get_all_summaries_in_order_until_they_close(bus: Bus) -> None:
    logs = [await Log.create(bus) for _ in range(3)]
    closed, first, second = Summaries(), Summaries(), Summaries()
    gone = await bus.watch_summaries(closed.deliver)
    for watcher in (first, second):
        await bus.watch_summaries(watcher.deliver)
    gone.close()
    gone.close()
    records = [summary(log, seq) for seq in range(1, 30) for log in logs]

    for start in range(0, len(records), 10):
        await bus.publish_summaries(records[start : start + 10])

    assert await first.take(len(records)) == records
    assert await second.take(len(records)) == records
    assert closed.items == []


async def test_watch_is_confirmed_when_it_returns(bus: Bus) -> None:
    log = await Log.create(bus)
    for seq in range(1, 11):
        watched = Summaries()
        subscription = await bus.watch_summaries(watched.deliver)
        await bus.publish_summaries([summary(log, seq)])
        assert [record.seq for record in await watched.take(1) if record] == [seq]
        subscription.close()


async def test_watcher_that_closes_another_from_a_delivery_gets_its_way(bus: Bus) -> None:
    log, delivered = await Log.create(bus), list[str]()
    done = anyio.Event()

    def only(name: str, other: str) -> None:
        delivered.append(name)
        subscriptions[other].close()
        done.set()

    subscriptions = {
        "one": await bus.watch_summaries(lambda _: only("one", "other")),
        "other": await bus.watch_summaries(lambda _: only("other", "one")),
    }
    await bus.publish_summaries([summary(log)])
    with anyio.fail_after(5):
        await done.wait()
    await bus.check()

    assert len(delivered) == 1


async def test_summaries_of_thousands_of_runs_at_once_are_stored_and_delivered(bus: Bus) -> None:
    logs = [await Log.create(bus) for _ in range(300)]
    watched = Summaries()
    await bus.watch_summaries(watched.deliver)
    records = [summary(log, seq, data=b"x" * SUMMARY_BYTES) for seq in range(1, 5) for log in logs]

    await bus.publish_summaries(records)

    assert await watched.take(len(records)) == records
    assert await bus.summaries([log.run for log in logs]) == {record.run: record for record in records[-len(logs) :]}


async def test_summary_over_its_bytes_is_refused_and_nothing_is_stored(bus: Bus) -> None:
    log, other = await Log.create(bus), await Log.create(bus)

    with pytest.raises(ValueError, match=log.run):
        await bus.publish_summaries([summary(other), summary(log, data=b"x" * (SUMMARY_BYTES + 1))])

    assert await bus.summaries([log.run, other.run]) == {}


async def test_two_empty_buses_share_no_summary(make_bus: MakeBus) -> None:
    async with make_bus() as one, make_bus() as other:
        log, watched = await Log.create(one), Summaries()
        await other.watch_summaries(watched.deliver)

        await one.publish_summaries([summary(log)])

        await other.check()
        assert await other.summaries([log.run]) == {}
        assert watched.items == []
