"""The news of runs that this process follows, and the proof that none is missing (G1, G2).

What is published may be lost, and nobody says so. So the head of each followed run is compared with what was delivered:
after every (re)connection, and of quiet runs now and then. A difference is delivered as a `Head`.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import anyio

from agentcast.server.bus.base import Deliver, Frame, Gone, Head, Registration, Subscription
from agentcast.server.bus.redis import codec
from agentcast.server.bus.redis.keys import Keys
from agentcast.server.bus.redis.listener import Listener
from agentcast.server.bus.redis.pipelined import PipelinedConnection

RECHECK = 15.0
"""Seconds without news after which the head of a followed run is compared."""
GONE_AFTER = 10.0
"""Seconds after which a followed run that Redis has lost, and nobody restored, is gone."""

Position = tuple[str, int]
"""Epoch and seq."""


@dataclass(slots=True, eq=False)
class _Followed:
    """A run whose news this process gets."""

    run: str
    heard_at: float
    delivers: dict[object, Deliver] = field(default_factory=dict)
    known: Position | None = None
    missing_since: float | None = None

    def hear(self, position: Position, now: float) -> None:
        self.known, self.heard_at, self.missing_since = position, now, None

    def deliver(self, item: Sequence[Frame] | Head | Gone) -> None:
        for token, deliver in list(self.delivers.items()):
            if token in self.delivers:  # one delivery may close another's subscription
                deliver(item)


class HeadTracker:
    """The followed runs."""

    def __init__(self, listener: Listener, reads: PipelinedConnection, keys: Keys) -> None:
        self.compared = 0
        """Heads that were compared."""
        self.missed = 0
        """Heads that were not what had been delivered."""
        self._listener = listener
        self._reads = reads
        self._keys = keys
        self._followed: dict[str, _Followed] = {}

    async def subscribe(self, run: str, deliver: Deliver, check: Callable[[str], Awaitable[None]]) -> Subscription:
        """Deliver the news of `run` from now on; confirmed when this returns. `check` raises for a run that is not."""
        followed = self._followed.get(run)
        if followed is None:
            followed = self._followed[run] = _Followed(run, anyio.current_time())
        token = object()
        followed.delivers[token] = deliver

        def remove() -> None:
            followed.delivers.pop(token, None)
            if not followed.delivers and self._followed.get(run) is followed:
                del self._followed[run]
                self._listener.unsubscribe(self._keys.news(run))

        try:
            await self._listener.subscribe(self._keys.news(run), lambda message: self._take(run, message))
            await check(run)
        except BaseException:
            remove()
            raise
        return Registration(remove)

    def _take(self, run: str, message: bytes) -> None:
        followed = self._followed.get(run)
        if followed is not None:
            item = codec.news(run, message)
            last = item if isinstance(item, Head) else item[-1]
            followed.hear((last.epoch, last.seq), anyio.current_time())
            followed.deliver(item)

    async def compare_all(self) -> None:
        """Compare the heads of all runs: news may have been missed."""
        await self._compare(list(self._followed.values()))

    async def compare_quiet(self) -> None:
        """Compare the heads of the runs that say nothing, and look for those that Redis has lost."""
        now = anyio.current_time()
        quiet = (item for item in self._followed.values() if item.missing_since or now - item.heard_at >= RECHECK)
        await self._compare(list(quiet))

    async def _compare(self, followed: Sequence[_Followed]) -> None:
        runs = [item.run for item in followed]
        asked = [(item, item.known) for item in followed]
        answers = await self._reads.calls([("HMGET", self._keys.run(run), *codec.INFO) for run in runs])
        infos = codec.infos(runs, answers)
        self.compared += len(runs)
        now = anyio.current_time()
        for item, known in asked:
            if item.known != known:
                continue  # news have come meanwhile, and the answer may be older than they are
            info = infos.get(item.run)
            if info is None:
                item.missing_since = item.missing_since or now
                if now - item.missing_since >= GONE_AFTER:
                    item.deliver(Gone(item.run))
                continue
            item.hear((info.epoch, info.head), now)
            if item.known != known:
                self.missed += known is not None
                item.deliver(Head(item.run, info.epoch, info.head, ended=info.ended is not None))
