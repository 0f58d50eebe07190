"""The earlier turns of a conversation: what an agent is given of the finished runs of its thread.

A turn is the input of a run and its result. The first and the last event of the run have them; only where the bus has
lost these is the state read.
"""

import random

import anyio
import orjson
from anyio.lowlevel import checkpoint

from agentcast.agents.base import Turn
from agentcast.server.bus.base import Bus, Ends, Filter
from agentcast.server.bus.load_state import load_state
from agentcast.server.errors import NotFound, Unavailable
from agentcast.server.runs.slots import ActiveRun

HISTORY_TURNS = 20


async def read_history(bus: Bus, run: ActiveRun) -> tuple[Turn, ...]:
    """Earlier finished turns of the run's thread, oldest first. Waits for a bus that is away."""
    while run.thread is not None:
        try:
            return await _turns(bus, run)
        except Unavailable:
            await anyio.sleep(random.uniform(0.2, 1.0))  # noqa: S311 -- jitter, not a secret
    return ()


async def _turns(bus: Bus, run: ActiveRun) -> tuple[Turn, ...]:
    earlier = await bus.list(
        Filter(principal=run.principal, thread=run.thread, statuses={"done"}, before=run.id, limit=HISTORY_TURNS)
    )
    ids = [info.run for info in reversed(earlier)]
    ends = await bus.read_ends(ids) if ids else {}
    turns = []
    for id in ids:
        if id not in ends:
            continue  # forgotten in the meantime
        turn = _turn(ends[id]) or await _turn_of_state(bus, id)
        if turn is not None:
            turns.append(turn)
        await checkpoint()
    return tuple(turns)


def _turn(ends: Ends) -> Turn | None:
    if ends.first is None or ends.last is None:
        return None
    return Turn(input=orjson.loads(ends.first)["input"], result=orjson.loads(ends.last)["result"])


async def _turn_of_state(bus: Bus, run: str) -> Turn | None:
    try:
        state = orjson.loads((await load_state(bus, run)).state)
    except NotFound:
        return None
    return Turn(input=state["input"], result=state.get("result"))
