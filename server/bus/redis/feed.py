"""The feed: a stream of announcements whose ids count from 1.

A position is `<number>:<run>`, or `0:` before the first. The entry at a position proves that the position is of this
feed: a Redis that came back empty, or older, has another run there, or none. Redis therefore keeps one entry more than
the feed is to reach back.
"""

from collections.abc import Sequence
from typing import Any

from agentcast.server.bus.base import Announce, Announcement, Registration, Subscription
from agentcast.server.bus.redis import codec
from agentcast.server.bus.redis.keys import Keys
from agentcast.server.bus.redis.pipelined import PipelinedConnection

PAGE_ENTRIES = 500
PAGE_BYTES = 128 * 1024
"""What so many entries usually take."""


class Feed:
    """What is announced, to those who watch."""

    def __init__(self, reads: PipelinedConnection, keys: Keys, length: int) -> None:
        self.entries = length + 1
        """Entries that Redis is to keep."""
        self._reads = reads
        self._keys = keys
        self._watchers: dict[object, Announce] = {}
        self._position: str | None = None

    async def watch(self, announce: Announce) -> tuple[Subscription, str]:
        """See `Bus.watch_feed`."""
        token = object()
        self._watchers[token] = announce
        registration = Registration(lambda: self._watchers.pop(token, None))
        try:
            position = await self._end()
        except BaseException:
            registration.close()
            raise
        self._position = self._position or position
        return registration, position

    async def read(self, after: str) -> Sequence[Announcement] | None:
        """See `Bus.read_feed`."""
        number, _, run = after.partition(":")
        if not (number.isascii() and number.isdecimal()) or len(number) > 15 or number != str(int(number)):
            return None
        entries = await self._from(number)
        if entries is None:
            return None
        if number == "0":
            return codec.announcements(entries) if run == "" and (not entries or entries[0][0] == b"1-0") else None
        if not entries or codec.entry_position(entries[0]) != after:
            return None
        return codec.announcements(entries[1:])

    async def _from(self, number: str) -> list[Any] | None:
        """The entries from a number on; None if some of them went while they were read."""
        entries: list[Any] = []
        start = f"{number}-0"
        while True:
            page = await self._reads.call(
                "XRANGE", self._keys.feed, start, "+", "COUNT", PAGE_ENTRIES, expects=PAGE_BYTES
            )
            if entries and page and page[0][0] != b"%d-0" % (_number(entries[-1]) + 1):
                return None
            entries += page
            if len(page) < PAGE_ENTRIES:
                return entries
            start = f"({page[-1][0].decode()}"

    def take(self, message: bytes) -> None:
        """What was published on the feed's channel."""
        number, _, document = message.partition(b" ")
        announcement = codec.announced(number.decode(), document)
        self._position = announcement.position
        self._tell(announcement)

    def hint(self) -> None:
        """Tell who watches that announcements may have been missed."""
        self._tell(None)

    async def catch_up(self) -> bool:
        """After a (re)connection: go on from where the feed is now. False if it is not the one that it was."""
        if self._position is None:
            return True
        whole = await self.read(self._position) is not None
        self._position = await self._end()
        self.hint()
        return whole

    async def _end(self) -> str:
        entries = await self._reads.call("XREVRANGE", self._keys.feed, "+", "-", "COUNT", 1)
        return codec.entry_position(entries[0]) if entries else "0:"

    def _tell(self, announcement: Announcement | None) -> None:
        for token, announce in list(self._watchers.items()):
            if token in self._watchers:  # one may end another's watch
                announce(announcement)


def _number(entry: Any) -> int:
    return int(entry[0].partition(b"-")[0])
