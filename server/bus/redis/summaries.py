"""The summaries of runs: the newest is kept in the run's hash, and each new one is published on one channel.

The channel is subscribed to only while somebody watches. What a lost connection missed is not known, so after each
reconnection the watchers get None, and read the stored summaries.
"""

from collections.abc import Collection, Iterator, Sequence

from agentcast.server.bus.base import DeliverSummaries, Registration, Subscription, Summary
from agentcast.server.bus.redis import codec, scripts
from agentcast.server.bus.redis.keys import Keys
from agentcast.server.bus.redis.listener import Listener
from agentcast.server.bus.redis.pipelined import PipelinedConnection, Script

PART_BYTES = 256 * 1024
"""Packed summaries that share one call and one message."""
_AROUND = 64
"""Bytes that a call takes for each of them, besides its fields."""
PART_SUMMARIES = 500
"""Redis does nothing else while it stores a part."""
_SIZE = 4 * 1024
"""What a stored summary takes at most."""

STORE_SUMMARIES = Script(scripts.STORE_SUMMARIES)


class Summaries:
    """Stores, publishes and delivers summaries."""

    def __init__(self, listener: Listener, connection: PipelinedConnection, keys: Keys) -> None:
        self._listener = listener
        self._connection = connection
        self._keys = keys
        self._watchers: dict[object, DeliverSummaries] = {}

    async def publish(self, records: Sequence[Summary]) -> None:
        """See `Bus.publish_summaries`."""
        for part in _parts(records):
            arguments = [argument for record in part for argument in record]
            channel = self._keys.summaries_channel
            await self._connection.script(STORE_SUMMARIES, [], self._keys.run(""), channel, *arguments)

    async def watch(self, deliver: DeliverSummaries) -> Subscription:
        """See `Bus.watch_summaries`."""
        token = object()
        self._watchers[token] = deliver

        def remove() -> None:
            if self._watchers.pop(token, None) is not None and not self._watchers:
                self._listener.unsubscribe(self._keys.summaries_channel)

        try:
            await self._listener.subscribe({self._keys.summaries_channel: self._take})
        except BaseException:
            remove()
            raise
        return Registration(remove)

    async def read(self, runs: Collection[str]) -> dict[str, Summary]:
        """See `Bus.summaries`."""
        commands = [("HGET", self._keys.run(run), "summary") for run in runs]
        answers = await self._connection.calls(commands, expects=_SIZE)
        return {record.run: record for record in codec.summaries(answers)}

    def report_gap(self) -> None:
        """Let the watchers know that summaries may have been missed."""
        self._deliver(None)

    def _take(self, message: bytes) -> None:
        records = codec.published_summaries(message)
        if records:
            self._deliver(records)

    def _deliver(self, records: Sequence[Summary] | None) -> None:
        for token, deliver in list(self._watchers.items()):
            if token in self._watchers:  # one delivery may close another's subscription
                deliver(records)


_Arguments = tuple[str, int, str, int, bytes]


def _parts(records: Sequence[Summary]) -> Iterator[list[_Arguments]]:
    """The script's arguments for the records, as many at a time as one call takes."""
    part: list[_Arguments] = []
    size = 0
    for record in records:
        packed = codec.pack_summary(record)
        taken = len(packed) + len(record.run) + len(record.epoch) + _AROUND
        if part and (len(part) == PART_SUMMARIES or size + taken > PART_BYTES):
            yield part
            part, size = [], 0
        part.append((record.run, record.fence, record.epoch, record.seq, packed))
        size += taken
    if part:
        yield part
