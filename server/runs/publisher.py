"""Publishes the summaries of this process's runs: in rounds, `EVERY` seconds apart, the newest record of each run that
has changed, and always the first and the last one.

While the bus is away nothing is lost but what is out of date by then. What waits is bounded: of an active run its
recorder, which is kept anyway, and of ended runs `MAX_ENDED` last records.

This module must not know how a summary is made.
"""

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import anyio
from anyio.lowlevel import checkpoint

from agentcast.server.bus.base import Bus, Summary
from agentcast.server.errors import Unavailable

EVERY = 0.25
"""Seconds between two rounds, and so between two records of one run, at least."""
SLICE = 100
"""Records that are made and published before other tasks get their turn."""
MAX_ENDED = 10_000
"""Last records of ended runs that wait for the bus; past that the oldest are lost."""
_RETRY = 2.0

logger = logging.getLogger(__name__)


class Source(Protocol):
    """A run that can be summarised."""

    @property
    def run(self) -> str: ...

    def summarise(self) -> Summary | None:
        """The newest record; None if it is not to be published yet."""


class SummaryPublisher:
    """The publisher of one process. `run` must be running meanwhile."""

    def __init__(self, bus: Bus) -> None:
        self.published = anyio.Event()
        """Set while nothing waits."""
        self.published.set()
        self.lost = 0
        """Last records that were lost, since more than `MAX_ENDED` waited for the bus."""
        self._bus = bus
        self._due: dict[str, Source] = {}
        self._ended: dict[str, Summary] = {}
        """The last records that wait, the oldest first."""
        self._arrived = anyio.Event()
        self._hurried = anyio.Event()

    def due(self, source: Source) -> None:
        """Publish the newest record of this run in the next round."""
        self._due[source.run] = source
        self._arrive()

    def ended(self, source: Source) -> None:
        """Publish the last record of this run, as it is now."""
        self.forget(source.run)
        if (last := source.summarise()) is not None:
            self._keep(last)

    def forget(self, run: str) -> None:
        """Publish nothing more of a run, which is another process's now."""
        self._due.pop(run, None)

    def _keep(self, last: Summary) -> None:
        self._ended[last.run] = last
        if len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]
            self.lost += 1
            if self.lost % 1_000 == 1:
                logger.warning("the bus takes no summaries: lists will miss the end of %d runs", self.lost)
        self._arrive()

    def _arrive(self) -> None:
        if self.published.is_set():
            self.published = anyio.Event()
        self._arrived.set()

    async def run(self) -> None:
        """Publish what is due until cancelled."""
        while True:
            await self._arrived.wait()
            self._arrived = anyio.Event()
            try:
                await self._publish_round()
            except Unavailable as error:
                logger.info("summaries wait for the bus: %s", error)
                self._arrived.set()
                await anyio.sleep(_RETRY * random.uniform(0.5, 1.0))  # noqa: S311 -- jitter, not a secret
            else:
                if not self._arrived.is_set():
                    self.published.set()
                with anyio.move_on_after(EVERY):
                    await self._hurried.wait()

    async def drain(self) -> None:
        """Publish without pauses from now on, and wait until nothing waits any more."""
        self._hurried.set()
        await self.published.wait()

    async def _publish_round(self) -> None:
        """Publish what waits now; what arrives meanwhile waits for the next round."""
        for part in _parts(self._ended):
            await self._publish_last([self._ended.pop(run) for run in part if run in self._ended])
        for part in _parts(self._due):
            await self._publish_due([self._due.pop(run) for run in part if run in self._due])

    async def _publish_last(self, records: Sequence[Summary]) -> None:
        try:
            await self._publish(records)
        except Unavailable:
            for record in records:
                self._keep(record)
            raise

    async def _publish_due(self, sources: Sequence[Source]) -> None:
        try:
            await self._publish([record for source in sources if (record := _summarise(source)) is not None])
        except Unavailable:
            for source in sources:
                if source.run not in self._ended:
                    self._due.setdefault(source.run, source)
            raise

    async def _publish(self, records: Sequence[Summary]) -> None:
        try:
            if records:
                await self._bus.publish_summaries(records)
        except Unavailable:
            raise
        except Exception:
            logger.exception("%d summaries could not be published", len(records))
        await checkpoint()


def _parts(runs: Iterable[str]) -> Iterator[list[str]]:
    now = list(runs)
    return (now[start : start + SLICE] for start in range(0, len(now), SLICE))


def _summarise(source: Source) -> Summary | None:
    try:
        return source.summarise()
    except Exception:
        logger.exception("run %s cannot be summarised", source.run)
        return None
