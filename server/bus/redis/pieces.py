"""The states of runs, which may take megabytes, in pieces: other calls on the same connection go between them.

A piece that comes late, or twice, does no harm: where a state is staged is named by its epoch and seq, and so always
gets the same bytes.
"""

from agentcast.server.bus.base import Snapshot
from agentcast.server.bus.redis import scripts
from agentcast.server.bus.redis.keys import Keys
from agentcast.server.bus.redis.pipelined import PipelinedConnection, Script
from agentcast.server.errors import Fenced, Unavailable

PIECE_BYTES = 128 * 1024
STAGED_TTL = 60
"""Seconds after the last piece that a state waits to become a snapshot."""
_ATTEMPTS = 3

STAGE = Script(scripts.STAGE)


class Pieces:
    """Writes and reads states."""

    def __init__(self, connection: PipelinedConnection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys

    async def stage(self, run: str, fence: int, epoch: str, seq: int, state: bytes) -> tuple[str, bytes, int]:
        """Bring all but the first piece of a state to Redis. Gives their key, the first piece, which goes with the
        write that makes a snapshot of them, and the number of all.

        :raises Fenced: another owner has claimed the run.
        :raises Unavailable: Redis is away.
        """
        staged = self._keys.staged(run, epoch, seq)
        starts = range(PIECE_BYTES, len(state), PIECE_BYTES)
        for number, start in enumerate(starts, 1):
            keys, piece = [self._keys.run(run), staged], state[start : start + PIECE_BYTES]
            (answer,) = await self._connection.script(STAGE, keys, fence, number, piece, STAGED_TTL)
            if answer == b"fenced":
                raise Fenced(run)
        return staged, state[:PIECE_BYTES], 1 + len(starts)

    async def load(self, run: str) -> Snapshot | None:
        """The snapshot of a run, if it has one.

        :raises Unavailable: Redis is away, or the snapshot is replaced faster than it can be read.
        """
        snapshot = self._keys.snapshot(run)
        for _ in range(_ATTEMPTS):
            # Most states are small, and many are loaded at the same time: they share round trips if that is known.
            (epoch, seq, count), first = await self._connection.calls(
                [("HMGET", snapshot, "epoch", "seq", "pieces"), ("HSTRLEN", snapshot, "state")]
            )
            if epoch is None:
                return None
            state = await self._load(snapshot, [epoch, seq], int(count or 1), first)
            if state is not None:
                return Snapshot(run, epoch.decode(), int(seq), state)
        raise Unavailable("the run's snapshot is being replaced; try again")

    async def _load(self, snapshot: str, position: list[bytes], count: int, first: int) -> bytes | None:
        """The pieces of a state, whose first one has so many bytes; None if another state has replaced it."""
        pieces = []
        for number in range(count):
            field, size = (number, PIECE_BYTES) if number else ("state", first)
            *read, piece = await self._connection.call("HMGET", snapshot, "epoch", "seq", field, expects=size)
            if read != position:
                return None
            pieces.append(piece)
        return b"".join(pieces)
