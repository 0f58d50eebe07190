"""The state of a run, from what the bus holds: the saved snapshot, and the log after it folded on top (G10).

A large one is decoded, folded and encoded in slices.
"""

from collections.abc import Generator, Sequence
from dataclasses import replace

import orjson
from anyio.lowlevel import checkpoint

from agentcast.server.bus.base import ACTIVE, Bus, Frame, RunInfo, Snapshot
from agentcast.server.bus.slices import in_slices
from agentcast.server.errors import NotFound, Unavailable
from agentcast.server.state import RunState

_ATTEMPTS = 3


async def load_state(bus: Bus, run: str) -> Snapshot:
    """The run's state at the head of its log.

    :raises NotFound: there is no such run.
    :raises Unavailable: the bus is away, or the log changes its epoch faster than it can be read.
    """
    for _ in range(_ATTEMPTS):
        info = (await bus.info([run])).get(run)
        if info is None:
            raise NotFound(f"there is no run {run[:64]!r}")
        snapshot = await _fold(bus, info)
        if snapshot is not None:
            return snapshot
    raise Unavailable(f"the log of run {run} is being replaced; try again")


async def _fold(bus: Bus, info: RunInfo) -> Snapshot | None:
    """The state at the head, or None if the log was trimmed or replaced while it was read."""
    saved = await bus.load_snapshot(info.run)
    if saved is not None and saved.epoch == info.epoch:
        if saved.seq > info.head:
            return None  # newer than what was asked first: whether it is the end is not known
        if saved.seq == info.head:
            return replace(saved, ended=info.ended is not None)
        state, seq = await in_slices(RunState.decode_steps(saved.state)), saved.seq
    else:
        state, seq = RunState.new(info.run, info.agent), 0
    while seq < info.head:
        page = await bus.read(info.run, info.epoch, seq)
        if page is None or not page.frames:
            return None
        await in_slices(_apply(state, page.frames))
        seq = page.frames[-1].seq
        await checkpoint()  # a long log must not hold the loop
    encoded = await in_slices(state.encode_steps())
    return Snapshot(info.run, info.epoch, seq, encoded, ended=state.document["status"] not in ACTIVE)


def _apply(state: RunState, frames: Sequence[Frame]) -> Generator[None, None, None]:
    for frame in frames:
        state.apply(orjson.loads(frame.data))
        yield
