"""Reading a run's state from the bus: in slices, whatever it takes (G3, G10)."""

from collections.abc import Generator

import anyio
import pytest
from anyio.lowlevel import checkpoint

from agentcast.server.bus import slices
from agentcast.server.bus.base import Frame
from agentcast.server.bus.load_state import load_state
from agentcast.server.bus.memory import MemoryBus
from agentcast.server.bus.slices import in_slices
from agentcast.server.protocol import encode_event
from agentcast.server.state import RunState
from tests.contract.support import Log

EVENTS = 300


@pytest.fixture
def always_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE", 0.0)


class Turns:
    """How often another task got its turn."""

    def __init__(self) -> None:
        self.count = 0

    async def take(self) -> None:
        while True:
            await checkpoint()
            self.count += 1


def event(log: Log, seq: int) -> Frame:
    fact = {"event": "lm_start", "span": f"s{seq}", "model": "gpt"}
    return Frame(log.run, log.epoch, seq, encode_event(log.run, "echo", seq, seq - 1, 1.0, fact))


async def made(bus: MemoryBus, *, saved: int) -> tuple[Log, RunState]:
    """A run of `EVENTS` events, whose state after `saved` of them is saved; and its state."""
    log = await Log.create(bus)
    frames = [event(log, seq) for seq in range(2, EVENTS + 1)]
    await bus.append(log.run, log.fence, frames, "running")
    state = RunState.new(log.run, "echo")
    for seq in range(2, EVENTS + 1):
        state.apply({"event": "lm_start", "span": f"s{seq}", "model": "gpt", "ts": 1.0})
        if seq == saved:
            await log.save(seq, state.encode())
    return log, state


@pytest.mark.usefixtures("always_interrupted")
@pytest.mark.parametrize("saved", [2, EVENTS - 1])
async def test_other_tasks_get_their_turn_while_a_state_is_decoded_folded_and_encoded(saved: int) -> None:
    bus, turns = MemoryBus(), Turns()
    log, state = await made(bus, saved=saved)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(turns.take)
            snapshot = await load_state(bus, log.run)
            tasks.cancel_scope.cancel()

    assert snapshot.state == state.encode()
    lines = len(snapshot.state.splitlines())
    decoded, folded, encoded = saved, EVENTS - saved, lines
    assert turns.count >= decoded + folded + encoded - 10


async def test_state_at_the_head_is_given_as_it_was_saved() -> None:
    bus = MemoryBus()
    log, state = await made(bus, saved=EVENTS)

    assert (await load_state(bus, log.run)).state == state.encode()


async def test_short_work_is_not_interrupted() -> None:
    turns = Turns()

    def work() -> Generator[None, None, int]:
        yield
        yield
        return 7

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(turns.take)
        assert await in_slices(work()) == 7
        assert turns.count == 0
        tasks.cancel_scope.cancel()
