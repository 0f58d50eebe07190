"""What is special to the bus in memory: how much it keeps."""

import time

import pytest

from agentcast.server.bus import memory
from agentcast.server.bus.base import KEY_TTL, Filter
from agentcast.server.bus.memory import MemoryBus
from agentcast.server.errors import NotFound
from tests.contract.support import Log, Mail, follow, new_run


async def known(bus: MemoryBus) -> set[str]:
    return {info.run for info in await bus.list(Filter())}


async def test_oldest_ended_runs_are_forgotten_past_their_number() -> None:
    bus = MemoryBus(max_ended=2)
    logs = [await Log.create(bus) for _ in range(4)]
    for log in (logs[2], logs[0], logs[1], logs[3]):
        await log.append(end=True)

    assert await known(bus) == {logs[1].run, logs[3].run}
    with pytest.raises(NotFound):
        await bus.read(logs[2].run, logs[2].epoch, 0)


async def test_oldest_ended_runs_are_forgotten_past_their_bytes() -> None:
    bus = MemoryBus(max_ended_bytes=1_000)
    logs = [await Log.create(bus) for _ in range(3)]
    for log in logs:
        await log.append(end=True, size=400)

    assert await known(bus) == {log.run for log in logs[1:]}


async def test_final_snapshot_counts_too() -> None:
    bus = MemoryBus(max_ended_bytes=1_000)
    logs = [await Log.create(bus) for _ in range(2)]
    for log in logs:
        await log.append(end=True, size=300)
    await logs[1].save(2, b"x" * 600)

    assert await known(bus) == {logs[1].run}


async def test_final_snapshot_saved_again_is_counted_once() -> None:
    bus = MemoryBus(max_ended_bytes=1_000)
    log = await Log.create(bus)
    await log.append(end=True, size=100)
    for _ in range(20):
        await log.save(2, b"x" * 500)

    assert await known(bus) == {log.run}


async def test_active_runs_are_never_forgotten() -> None:
    bus = MemoryBus(max_ended=1, max_ended_bytes=100)
    active = [await Log.create(bus) for _ in range(5)]
    for log in active:
        await log.append(size=1_000)
    for _ in range(3):
        ended = await Log.create(bus)
        await ended.append(end=True)

    assert await known(bus) == {ended.run, *(log.run for log in active)}


async def test_run_that_a_rebase_ended_is_forgotten_like_any_other() -> None:
    bus = MemoryBus(max_ended=1)
    rebased = await Log.create(bus)
    await rebased.rebase(5, status="failed")
    ended = await Log.create(bus)
    await ended.append(end=True)

    assert await known(bus) == {ended.run}


async def test_key_of_a_forgotten_run_makes_a_new_one() -> None:
    bus = MemoryBus(max_ended=1)
    forgotten = await Log.create(bus, new_run(key="k", fingerprint="f"))
    await forgotten.append(end=True)
    await (await Log.create(bus)).append(end=True)

    created = await bus.create(new_run(key="k", fingerprint="g"))

    assert created.fence is not None
    assert created.run != forgotten.run


async def test_key_holds_for_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    bus = MemoryBus()
    first = await bus.create(new_run(key="k"))
    now += KEY_TTL - 1
    assert (await bus.create(new_run(key="k"))).run == first.run
    now += 2

    again = await bus.create(new_run(key="k"))

    assert again.run != first.run
    assert again.fence is not None
    now += KEY_TTL - 1
    assert (await bus.create(new_run(key="k"))).run == again.run


async def test_oldest_keys_go_past_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_KEYS", 2)
    bus = MemoryBus()
    runs = [await bus.create(new_run(key=key)) for key in "abc"]

    assert (await bus.create(new_run(key="c"))).run == runs[2].run
    assert (await bus.create(new_run(key="b"))).run == runs[1].run
    assert (await bus.create(new_run(key="a"))).fence is not None


async def test_closed_bus_holds_nothing() -> None:
    bus = MemoryBus()
    log = await Log.create(bus)
    await follow(bus, log.run, Mail().deliver)

    await bus.aclose()

    assert await known(bus) == set()
