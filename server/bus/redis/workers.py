"""How processes watch each other: each keeps a heartbeat in Redis, and reports runs whose owner has none.

A heartbeat may be missing because its process is gone, or because Redis was: so only one that is missing in several
checks in a row counts, and checks start over after any trouble of this process with Redis.
"""

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import islice

import anyio

from agentcast.server.bus.redis import scripts
from agentcast.server.bus.redis.keys import Keys
from agentcast.server.bus.redis.pipelined import PipelinedConnection, Script
from agentcast.server.errors import Unavailable

BEAT_EVERY = 1.0
BEAT_EXPIRES = 4
"""Seconds after which a process without a sign of life is taken for gone."""
CHECKS = 3
SETTLE = 5.0
"""Seconds after trouble with Redis in which nobody is taken for gone: others may be slower to come back."""
MOST_ORPHANS = 200

FENCES_CHUNK = 1_000

ORPHANS, FENCED = Script(scripts.ORPHANS), Script(scripts.FENCED)

logger = logging.getLogger(__name__)


class Workers:
    """This process's heartbeat, and its view of the others'. `run` must be running meanwhile."""

    def __init__(self, connection: PipelinedConnection, keys: Keys, worker: str) -> None:
        self.problem: str | None = None
        """Why Redis takes no heartbeat at the moment, if so."""
        self._connection = connection
        self._keys = keys
        self._worker = worker
        self._seen: Counter[str] = Counter()
        self._settled_at = 0.0

    async def run(self) -> None:
        """Keep the heartbeat until cancelled."""
        self._unsettle()  # Redis may have been away until a moment ago
        key = self._keys.heartbeat(self._worker)
        while True:
            try:
                await self._connection.call("SET", key, "1", "EX", BEAT_EXPIRES)
                self.problem = None
            except Unavailable as error:
                self.problem = error.message
            await anyio.sleep(BEAT_EVERY)

    async def orphans(self, mine: Collection[str], problem: str | None) -> Sequence[str]:
        """Active runs whose process is gone, or which belong to this one and are not `mine`."""
        if problem is not None:
            self._unsettle()
            return ()
        try:
            missing = await self._connection.script(
                ORPHANS,
                [self._keys.workers],
                *(self._keys.heartbeat(""), self._keys.owned(""), MOST_ORPHANS, self._keys.run("")),
            )
            own = await self._connection.call("ZRANGE", self._keys.owned(self._worker), 0, -1)
        except Unavailable:
            self._unsettle()
            return ()
        if anyio.current_time() < self._settled_at:
            return ()
        runs = {run.decode() for _, owned in missing for run in owned}
        runs |= {run.decode() for run in own} - set(mine)
        self._seen = Counter({run: self._seen[run] + 1 for run in runs})
        return [run for run, times in self._seen.items() if times >= CHECKS]

    async def fenced(self, fences: Mapping[str, int]) -> Sequence[str]:
        """See `Bus.fenced`."""
        found: list[str] = []
        owned = iter(fences.items())
        while chunk := [part for item in islice(owned, FENCES_CHUNK) for part in item]:
            answer = await self._connection.script(FENCED, [], self._keys.run(""), *chunk)
            found += (run.decode() for run in answer)
        return found

    def _unsettle(self) -> None:
        self._seen.clear()
        self._settled_at = anyio.current_time() + SETTLE
