"""Saves the snapshots of this process's runs, apart from their recording.

This module must not know what a snapshot holds, or when one is due.
"""

import logging
import random
from typing import Protocol

import anyio

from agentcast.server.errors import LogError, NotFound, Unavailable

MAX_DUE = 1_000
"""Snapshots that are due at once, each of which keeps a state in memory. Past that the oldest is given up: the log
keeps what no snapshot covers, and a run that goes on is due again as its log grows."""
_RETRY = 2.0

logger = logging.getLogger(__name__)


class Source(Protocol):
    """A run whose state can be saved."""

    @property
    def run(self) -> str: ...

    async def save_snapshot(self) -> None:
        """Save the newest state.

        :raises LogError: another process has claimed the run.
        :raises NotFound: the bus has let go of the run.
        :raises Unavailable: the bus is away, or busy with this run.
        """


class Snapshots:
    """Saves the snapshots of this process's runs, one at a time: no append waits for one, and what they take in memory
    is one encoded state. `run` must be running meanwhile.
    """

    def __init__(self) -> None:
        self.saved = anyio.Event()
        """Set while none is due."""
        self.saved.set()
        self._due: dict[str, Source] = {}
        self._arrived = anyio.Event()

    def due(self, source: Source) -> None:
        """Save a snapshot of this run when it is its turn, of its state by then."""
        self._due.setdefault(source.run, source)
        if len(self._due) > MAX_DUE:
            del self._due[next(iter(self._due))]
        if self.saved.is_set():
            self.saved = anyio.Event()
        self._arrived.set()

    async def run(self) -> None:
        """Save what is due until cancelled."""
        while True:
            await self._arrived.wait()
            self._arrived = anyio.Event()
            while self._due:
                await self._save(self._due.pop(next(iter(self._due))))
            self.saved.set()

    async def _save(self, source: Source) -> None:
        try:
            await source.save_snapshot()
        except Unavailable:
            self.due(source)
            await anyio.sleep(_RETRY * random.uniform(0.5, 1.0))  # noqa: S311 -- jitter, not a secret
        except (LogError, NotFound):
            pass  # another process has claimed the run, or the bus has forgotten it
        except Exception:
            logger.exception("no snapshot of run %s could be saved", source.run)
