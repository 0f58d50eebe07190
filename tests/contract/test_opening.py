"""Any bus: many runs opened at once, both ends of their logs, and lists of them."""

from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from agentcast.server.bus.base import ACTIVE, LIST_EXAMINED, Bus, Ends, Filter, Frame, Head, RunInfo, new_run_id
from tests.contract.conftest import MakeBus
from tests.contract.support import PATIENCE, Log, Mail, follow, new_run

# -- Opening -------------------------------------------------------------------------------------------------------


async def test_opened_runs_are_subscribed_before_their_infos_are_read(bus: Bus) -> None:
    """The info and what is delivered from then on are the whole log: nothing falls between (G2)."""
    logs = [await Log.create(bus) for _ in range(20)]
    mails = {log.run: Mail() for log in logs}
    written = anyio.Event()

    async def write() -> None:
        for _ in range(10):
            for log in logs:
                await log.append()
        written.set()

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)
            await checkpoint()
            opened = await bus.open({run: mail.deliver for run, mail in mails.items()})
            await written.wait()

    assert opened.keys() == mails.keys()
    for log in logs:
        end = await log.append(end=True)
        got = await mails[log.run].until(lambda items, end=end: end[0] in items)  # type: ignore[misc]
        after = [item.seq for item in got if item.seq > opened[log.run].info.head]
        assert after == list(range(opened[log.run].info.head + 1, log.head + 1))


async def test_opened_run_has_the_info_of_now(bus: Bus) -> None:
    log = await Log.create(bus, new_run(agent="echo", principal="bob", thread="t"))
    await log.append(3)

    opened = (await bus.open({log.run: Mail().deliver}))[log.run]

    assert opened.info == (await bus.info([log.run]))[log.run]
    assert (opened.info.head, opened.info.principal, opened.info.thread) == (4, "bob", "t")


async def test_each_of_many_opened_runs_gets_its_own_updates_and_ends_alone(bus: Bus) -> None:
    logs = [await Log.create(bus) for _ in range(30)]
    mails = [Mail() for _ in logs]
    opened = await bus.open({log.run: mail.deliver for log, mail in zip(logs, mails, strict=True)})
    opened[logs[0].run].subscription.close()
    opened[logs[0].run].subscription.close()

    sent = [await log.append(2) for log in logs]

    for mail, batch in zip(mails[1:], sent[1:], strict=True):
        assert await mail.take(2) == batch
        assert len(mail.items) == 2
    assert mails[0].items == []


async def test_unknown_runs_are_left_out_and_not_subscribed(bus: Bus) -> None:
    log, unknown, mail, none = await Log.create(bus), new_run_id(), Mail(), Mail()

    opened = await bus.open({unknown: none.deliver, log.run: mail.deliver})

    assert opened.keys() == {log.run}
    late = await Log.create(bus, new_run(unknown))
    await late.append()
    sent = await log.append()
    assert await mail.take(1) == sent
    await bus.check()
    assert none.items == []


async def test_nothing_is_opened_when_no_run_is_named(bus: Bus) -> None:
    assert await bus.open({}) == {}


async def test_run_that_is_open_is_opened_again_for_another(bus: Bus) -> None:
    log, first, second = await Log.create(bus), Mail(), Mail()
    one = (await bus.open({log.run: first.deliver}))[log.run]
    other = (await bus.open({log.run: second.deliver}))[log.run]
    one.subscription.close()

    sent = await log.append()

    assert await second.take(1) == sent
    assert first.items == []
    other.subscription.close()


async def test_opening_that_is_cancelled_leaves_nothing_subscribed_and_others_subscribed(bus: Bus) -> None:
    logs = [await Log.create(bus) for _ in range(10)]
    stays, cancelled = Mail(), Mail()
    await follow(bus, logs[0].run, stays.deliver)
    for turns in range(12):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(bus.open, {log.run: cancelled.deliver for log in logs})
                for _ in range(turns):
                    await checkpoint()
                scope.cancel()
        cancelled.items.clear()  # what was delivered before
        sent = await logs[0].append()
        await logs[1].append()
        await stays.until(lambda items, sent=sent: sent[0] in items)  # type: ignore[misc]
    await bus.check()

    assert [item for item in stays.items if isinstance(item, Frame)] == await logs[0].read_all(after=1)


# -- Both ends -----------------------------------------------------------------------------------------------------


async def test_ends_are_the_first_and_the_last_frame(bus: Bus) -> None:
    new = new_run()
    log = await Log.create(bus, new)
    alone = await Log.create(bus)
    last = (await log.append(5, end=True))[-1]

    ends = await bus.read_ends([log.run, new_run_id(), alone.run])

    assert ends.keys() == {log.run, alone.run}
    assert ends[log.run] == Ends(new.first.data, last.data) == (new.first.data, last.data)
    assert ends[alone.run].first == ends[alone.run].last is not None
    assert await bus.read_ends([]) == {}


async def test_first_frame_outlives_trimming(make_bus: MakeBus) -> None:
    async with make_bus(log_events=2) as bus:
        new = new_run()
        log = await Log.create(bus, new)
        for _ in range(3):
            last = (await log.append(30))[-1]
            await log.save(log.head)

            assert await bus.read(log.run, log.epoch, 0) is None
            assert (await bus.read_ends([log.run]))[log.run] == (new.first.data, last.data)


async def test_first_frame_outlives_a_rebase_and_the_last_one_comes_back_with_the_next(bus: Bus) -> None:
    new = new_run()
    log = await Log.create(bus, new)
    await log.append(3)
    for seq in (6, 20):
        await log.rebase(seq)
        assert (await bus.read_ends([log.run]))[log.run] == (new.first.data, None)
        last = (await log.append(2))[-1]
        assert (await bus.read_ends([log.run]))[log.run] == (new.first.data, last.data)


async def test_ends_of_many_large_runs_are_read(bus: Bus) -> None:
    logs = [await Log.create(bus) for _ in range(12)]
    sent = {log.run: (await log.append(size=200_000))[0].data for log in logs}

    ends = await bus.read_ends([log.run for log in logs])

    assert {run: last for run, (_, last) in ends.items()} == sent


# -- The oldest frame ----------------------------------------------------------------------------------------------


async def test_info_says_from_where_the_log_can_be_read(make_bus: MakeBus) -> None:
    async def oldest() -> int:
        return (await bus.info([log.run]))[log.run].oldest

    async with make_bus(log_events=4) as bus:
        log = await Log.create(bus)
        assert await oldest() == 1
        await log.append(19)
        await log.save(20)
        assert await oldest() == 17
        await log.rebase(30)
        assert await oldest() == 31


# -- Lists ---------------------------------------------------------------------------------------------------------


async def pages(bus: Bus, **filter: Any) -> list[list[RunInfo]]:
    found = [await bus.list(Filter(**filter))]
    while (next := found[-1].next) is not None:
        found.append(await bus.list(Filter(**filter | {"before": next})))
    return [list(page) for page in found]


async def test_list_in_either_order_goes_on_beyond_a_run(bus: Bus) -> None:
    ids = [f"{n:09d}run" for n in range(6)]
    for n in (3, 0, 5, 4, 1, 2):
        await bus.create(new_run(ids[n]))

    async def listed(**filter: Any) -> list[str]:
        return [info.run for info in await bus.list(Filter(**filter))]

    assert await listed(order="oldest") == ids
    assert await listed(order="oldest", limit=2) == ids[:2]
    assert await listed(order="oldest", before=ids[1], limit=2) == ids[2:4]
    assert await listed(order="oldest", before=ids[5]) == []
    assert await listed(order="newest", before=ids[4], limit=2) == [ids[3], ids[2]]
    assert await listed(order="oldest", before=f"{2:09d}between") == ids[2:]
    assert await listed(order="newest", before=f"{2:09d}between") == [ids[1], ids[0]]


@pytest.mark.parametrize("order", ["newest", "oldest"])
async def test_pages_give_each_run_that_fits_once_however_few_fit(bus: Bus, order: str) -> None:
    created = [await bus.create(new_run(agent="rare" if n % 20 == 0 else "echo")) for n in range(100)]
    wanted = sorted((run.run for run in created[::20]), reverse=order == "newest")

    for limit in (1, 2, 5, 100):
        found = await pages(bus, agent="rare", order=order, limit=limit)
        assert [info.run for page in found for info in page] == wanted
        assert max(map(len, found)) <= limit


async def test_list_looks_at_a_bounded_number_of_runs_and_says_where_to_go_on(
    make_bus: MakeBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LIST_EXAMINED >= 5_000, "a hub lists as many active runs at once"
    monkeypatch.setattr("agentcast.server.bus.memory.LIST_EXAMINED", 20)
    monkeypatch.setattr("agentcast.server.bus.redis.queries.LIST_EXAMINED", 20)
    monkeypatch.setattr("agentcast.server.bus.redis.queries.LIST_CHUNK", 10)
    async with make_bus() as bus:
        wanted = await Log.create(bus, new_run(principal="bob"))
        others = [(await bus.create(new_run())).run for _ in range(50)]

        first = await bus.list(Filter(principal="bob"))

        assert (first, first.next) == ([], others[30])
        found = await pages(bus, principal="bob")
        assert [[info.run for info in page] for page in found] == [[], [], [wanted.run]]


async def test_filters_and_pages_go_together_while_runs_are_created_and_end(bus: Bus) -> None:
    logs = [await Log.create(bus) for _ in range(10)]
    first = await bus.list(Filter(statuses=ACTIVE, order="oldest", limit=4))
    for log in logs[:6]:
        await log.append(end=True)
    new = await Log.create(bus)

    rest = await bus.list(Filter(statuses=ACTIVE, order="oldest", before=first.next))

    assert [info.run for info in first] == [log.run for log in logs[:4]]
    assert [info.run for info in rest] == [log.run for log in (*logs[6:], new)]


async def test_a_head_is_delivered_to_all_who_opened_the_run(bus: Bus) -> None:
    log, mails = await Log.create(bus), [Mail(), Mail()]
    for mail in mails:
        await follow(bus, log.run, mail.deliver)
    epoch = await log.rebase(7)
    for mail in mails:
        assert await mail.take(1) == [Head(log.run, epoch, 7)]
