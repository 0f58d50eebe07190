"""The updates of runs that this process follows, and the proof that none is missing (G1, G2).

Pub/sub may lose a message without a trace. So the head of each followed run is compared with what was delivered: after
every (re)connection, and regularly while a run is quiet. A difference is delivered as a `Head`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import anyio

from agentcast.server.bus.base import Deliver, Gone, Head, Registration, Subscription, Update
from agentcast.server.bus.redis import codec
from agentcast.server.bus.redis.keys import Keys
from agentcast.server.bus.redis.listener import Listener
from agentcast.server.bus.redis.pipelined import PipelinedConnection

RECHECK = 15.0
"""Seconds without an update after which the head of a followed run is compared."""
GONE_AFTER = 10.0
"""Seconds after which a followed run that Redis has lost, and no owner restored, is reported as gone."""

Position = tuple[str, int]
"""Epoch and seq."""


@dataclass(slots=True, eq=False)
class _Followed:
    """A run whose updates this process gets."""

    run: str
    updated_at: float
    subscribers: dict[object, Deliver] = field(default_factory=dict)
    position: Position | None = None
    missing_since: float | None = None

    def advance(self, position: Position, now: float) -> None:
        self.position, self.updated_at, self.missing_since = position, now, None

    def deliver(self, update: Update) -> None:
        for token, deliver in list(self.subscribers.items()):
            if token in self.subscribers:  # one delivery may close another's subscription
                deliver(update)


class HeadTracker:
    """The followed runs."""

    def __init__(self, listener: Listener, reads: PipelinedConnection, keys: Keys) -> None:
        self.compared = 0
        """Heads that were compared."""
        self.missed = 0
        """Heads that differed from what had been delivered."""
        self._listener = listener
        self._reads = reads
        self._keys = keys
        self._followed: dict[str, _Followed] = {}

    async def subscribe(self, deliver: Mapping[str, Deliver]) -> dict[str, Subscription]:
        """Deliver the updates of each run from now on; confirmed when this returns, in one round trip. Leaves nothing
        subscribed when it raises or is cancelled.

        :raises Unavailable: Redis does not confirm in time.
        """
        added: dict[str, Subscription] = {run: self._add(run, take) for run, take in deliver.items()}
        try:
            await self._listener.subscribe({self._keys.updates(run): self._receiver(run) for run in deliver})
        except BaseException:
            for subscription in added.values():
                subscription.close()
            raise
        return added

    def _add(self, run: str, deliver: Deliver) -> Registration:
        followed = self._followed.get(run)
        if followed is None:
            followed = self._followed[run] = _Followed(run, anyio.current_time())
        token = object()
        followed.subscribers[token] = deliver

        def remove() -> None:
            followed.subscribers.pop(token, None)
            if not followed.subscribers and self._followed.get(run) is followed:
                del self._followed[run]
                self._listener.unsubscribe(self._keys.updates(run))

        return Registration(remove)

    def _receiver(self, run: str) -> Callable[[bytes], None]:
        return lambda message: self._take(run, message)

    def _take(self, run: str, message: bytes) -> None:
        followed = self._followed.get(run)
        if followed is not None:
            update = codec.update(run, message)
            last = update if isinstance(update, Head) else update[-1]
            followed.advance((last.epoch, last.seq), anyio.current_time())
            followed.deliver(update)

    async def compare_all(self) -> None:
        """Compare the heads of all runs: updates may have been missed."""
        await self._compare(list(self._followed.values()))

    async def compare_quiet(self) -> None:
        """Compare the heads of the runs without recent updates, and of those that Redis has lost."""
        now = anyio.current_time()
        quiet = (item for item in self._followed.values() if item.missing_since or now - item.updated_at >= RECHECK)
        await self._compare(list(quiet))

    async def _compare(self, followed: Sequence[_Followed]) -> None:
        runs = [item.run for item in followed]
        asked = [(item, item.position) for item in followed]
        answers = await self._reads.calls([("HMGET", self._keys.run(run), *codec.INFO) for run in runs])
        infos = codec.infos(runs, answers)
        self.compared += len(runs)
        now = anyio.current_time()
        for item, position in asked:
            if item.position != position:
                continue  # an update has arrived since, and the answer may be older
            info = infos.get(item.run)
            if info is None:
                item.missing_since = item.missing_since or now
                if now - item.missing_since >= GONE_AFTER:
                    item.deliver(Gone(item.run))
                continue
            item.advance((info.epoch, info.head), now)
            if item.position != position:
                self.missed += position is not None
                item.deliver(Head(item.run, info.epoch, info.head, ended=info.ended is not None))
