"""Which process a run belongs to, when processes stop or die (G7): each ends the runs that nobody executes any more,
and lets go of its own that another process has claimed.

Nothing here may know how agents are executed.
"""

import logging
import time
from collections.abc import Mapping
from contextlib import suppress

import anyio

from agentcast.agents.events import RunError, RunFailure
from agentcast.server.bus.base import Bus
from agentcast.server.errors import LogError, NotFound, Unavailable
from agentcast.server.runs.publisher import SummaryPublisher
from agentcast.server.runs.recorder import Recorder
from agentcast.server.runs.slots import ActiveRun
from agentcast.server.runs.snapshots import Snapshots

CHECK_EVERY = 1.0
"""Seconds between two checks, of either kind."""

AT_ONCE = 8
"""Orphans that are ended at the same time. Each takes the memory of its state meanwhile."""

_WORKER_LOST = RunFailure(
    code="worker_lost", message="the process that executed this run is gone; start again", retryable=True
)

logger = logging.getLogger(__name__)


async def end_orphans(
    bus: Bus, mine: Mapping[str, ActiveRun], snapshots: Snapshots, summaries: SummaryPublisher
) -> None:
    """End the runs whose process is gone, until cancelled: several at once, and none waits for one that cannot be."""
    known: set[str] = set()
    """Runs that are being ended, or cannot be."""
    places = anyio.Semaphore(AT_ONCE)

    async def end(id: str) -> None:
        async with places:
            try:
                await _end_orphan(await Recorder.take_over(bus, id, snapshots, summaries))
                known.discard(id)
            except (LogError, NotFound, Unavailable) as error:
                logger.info("run %s is left to others: %s", id, error)
                known.discard(id)
            except Exception:  # as of a log that this version cannot read: no reason for a hub to go down
                logger.exception("run %s was left without a process, and cannot be ended", id)

    async with anyio.create_task_group() as tasks:
        while True:
            await anyio.sleep(CHECK_EVERY)
            with suppress(Unavailable):  # the next check asks again
                for id in set(await bus.orphans(mine)) - known:
                    known.add(id)
                    tasks.start_soon(end, id)


async def _end_orphan(recorder: Recorder) -> None:
    logger.warning("run %s was left without a process: ended", recorder.run)
    now = time.time()
    since = recorder.state.document.get("started", now)
    await recorder.record(now, RunError(error=_WORKER_LOST, duration=max(0.0, now - since)))


async def watch_fences(bus: Bus, mine: Mapping[str, ActiveRun]) -> None:
    """Fence off the runs that another process has claimed, until cancelled. Not all would find out by themselves: an
    agent may have nothing to record for hours."""
    while True:
        await anyio.sleep(CHECK_EVERY)
        fences = {id: run.recorder.fence for id, run in mine.items() if run.recorder.fence}
        with suppress(Unavailable):  # the next check asks again
            for id in await bus.fenced(fences) if fences else ():
                if id in mine:
                    mine[id].fence_off()
