"""One process's subscription to Redis: supervised, confirmed, and proven to deliver (G2).

Pub/sub delivers at most once, and a subscriber can be deaf while TCP looks well. So a probe travels the real path every
second, into Redis and back by the subscription; if it does not arrive, the connection is thrown away and a new one
subscribes to everything again. This module cannot know what was missed meanwhile: it calls `on_connect` after each
connection, so that others compare.

Nothing here knows what the messages mean.
"""

import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from itertools import islice

import anyio
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError, RedisError

from agentcast.server.bus.redis.pipelined import EXCHANGE_TIMEOUT, SLOWEST, Connect, reason
from agentcast.server.errors import Unavailable

PROBE_EVERY = 1.0
DEAF_AFTER = 2.5
"""Seconds without a probe after which the connection counts as deaf."""
SUBSCRIBE_BATCH = 500
"""Channels of one command."""
_RETRY_FIRST, _RETRY_MOST = 0.1, 1.5

logger = logging.getLogger(__name__)

Receive = Callable[[bytes], None]
"""Takes one message, on the event loop. Must not block or raise."""


class Deaf(RedisError):
    """The subscription does not deliver."""


class Listener:
    """Delivers the messages of channels, in order. `run` must be running while the rest is used.

    `connect` makes a connection, `publish` sends to a channel by another one; `receivers` stay for ever.
    """

    def __init__(
        self,
        connect: Connect,
        publish: Callable[[str, bytes], Awaitable[object]],
        probe_channel: str,
        receivers: Mapping[str, Receive],
        on_connect: Callable[[], Awaitable[None]],
    ) -> None:
        self.problem: str | None = "not connected yet"
        """Why deliveries may fail at the moment; None if they do not."""
        self.connected = anyio.Event()
        """Set once the first connection is ready."""
        self.attempts = 0
        """Connections that failed, or could not be made."""
        self.resubscribed = 0
        """Channels that were subscribed to again."""
        self.probes = 0
        self.probes_lost = 0
        self._connect = connect
        self._publish = publish
        self._probe_channel = probe_channel
        self._on_connect = on_connect
        self._receivers: dict[str, Receive] = {probe_channel: self._take_probe, **receivers}
        self._confirmed: dict[str, anyio.Event] = {}
        self._unanswered: Counter[str] = Counter()
        """SUBSCRIBEs on this connection that Redis has not confirmed yet."""
        self._connection: AbstractConnection | None = None
        self._stale: set[str] = set()
        self._heard = 0
        self._patience: anyio.CancelScope | None = None
        self._echo = anyio.Event()

    async def run(self) -> None:
        """Stay connected until cancelled."""
        delay = _RETRY_FIRST
        while True:
            connection = self._connect()
            try:
                await self._listen(connection)
            except* (RedisError, OSError, TimeoutError, Unavailable) as group:
                was_connected = self.problem is None
                self.problem = f"Redis is away ({reason(group)})"
                level = logging.WARNING if was_connected or not self.attempts else logging.DEBUG
                logger.log(level, "the subscription to Redis is lost: %s", reason(group))
            finally:
                self._connection = None
                with anyio.CancelScope(shield=True):
                    await connection.disconnect(nowait=True)
            self.attempts += 1
            delay = _RETRY_FIRST if was_connected else min(delay * 2, _RETRY_MOST)
            await anyio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 -- jitter, not a secret

    async def subscribe(self, receivers: Mapping[str, Receive]) -> None:
        """Deliver what is published to these channels from now on; Redis has confirmed it when this returns. A channel
        has one receiver. Channels that are subscribed to already cost nothing, all others together one round trip.

        :raises Unavailable: Redis does not confirm in time. The receivers stay all the same, until `unsubscribe`.
        """
        self._receivers.update(receivers)
        self._stale.difference_update(receivers)
        new = {channel: anyio.Event() for channel in receivers if channel not in self._confirmed}
        self._confirmed.update(new)
        waiting = [event for channel in receivers if not (event := self._confirmed[channel]).is_set()]
        try:
            with anyio.fail_after(EXCHANGE_TIMEOUT + _transfer(new)):
                if self._connection is None:
                    raise Unavailable(f"{self.problem}; try again")
                await self._send(self._connection, "SUBSCRIBE", new)
                for confirmed in waiting:
                    await confirmed.wait()
        except (RedisError, OSError, TimeoutError):
            raise Unavailable("Redis did not confirm a subscription in time; try again") from None

    def unsubscribe(self, channel: str) -> None:
        """Stop delivering from `channel`, at once. The UNSUBSCRIBE goes to Redis with the next probe."""
        if self._receivers.pop(channel, None) is not None:
            self._stale.add(channel)
        confirmed = self._confirmed.pop(channel, None)
        if confirmed is not None:
            confirmed.set()  # a resubscription may be waiting for it

    async def probe(self) -> None:
        """Send a probe and see it arrive.

        :raises Unavailable: it does not, in time.
        """
        if self.problem is not None:
            raise Unavailable(f"{self.problem}; try again")
        self.probes += 1
        number = self.probes
        with anyio.move_on_after(EXCHANGE_TIMEOUT):
            await self._publish(self._probe_channel, b"%d" % number)
            while self._heard < number:
                await self._echo.wait()
            return
        raise Unavailable("what is published to Redis does not arrive; try again")

    # -- One connection --------------------------------------------------------------------------------------------

    async def _listen(self, connection: AbstractConnection) -> None:
        with anyio.fail_after(DEAF_AFTER):
            await connection.send_command("PING", check_health=False)
            await connection.read_response()
        self._confirmed = {channel: anyio.Event() for channel in self._receivers}
        self._unanswered.clear()
        self._stale.clear()
        self._connection = connection
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._read, connection)
            await self._resubscribe(connection)
            await self._on_connect()
            self.problem = None
            self.connected.set()
            tasks.start_soon(self._watch)
            await self._keep_probing(connection)

    async def _resubscribe(self, connection: AbstractConnection) -> None:
        waiting = dict(self._confirmed)
        self.resubscribed += len(waiting)
        with anyio.fail_after(DEAF_AFTER):
            await self._send(connection, "SUBSCRIBE", waiting)
            for channel, confirmed in waiting.items():
                if channel in self._receivers:
                    await confirmed.wait()

    async def _send(self, connection: AbstractConnection, command: str, channels: Collection[str]) -> None:
        """Send a command for all channels. A caller that is cancelled meanwhile must not leave half a command behind:
        redis-py would close the connection, which everybody shares."""
        if not connection.is_connected:  # redis-py would connect again
            raise ConnectionError("the connection was lost")
        if command == "SUBSCRIBE":
            self._unanswered.update(iter(channels))  # a mapping would be taken for counts
        names = iter(channels)
        with anyio.CancelScope(shield=True), anyio.fail_after(EXCHANGE_TIMEOUT + _transfer(channels)):
            while batch := list(islice(names, SUBSCRIBE_BATCH)):
                await connection.send_command(command, *batch, check_health=False)

    async def _read(self, connection: AbstractConnection) -> None:
        while True:
            kind, channel, data = await connection.read_response(timeout=float("inf"))
            name = channel.decode()
            if kind == b"message":
                self._take(name, data)
            elif kind == b"subscribe":
                self._take_confirmation(name)

    def _take_confirmation(self, channel: str) -> None:
        """The last SUBSCRIBE counts: between two of them, the channel may have been unsubscribed."""
        self._unanswered[channel] -= 1
        if self._unanswered[channel] <= 0:
            del self._unanswered[channel]
            if channel in self._confirmed:
                self._confirmed[channel].set()

    def _take(self, channel: str, data: bytes) -> None:
        receive = self._receivers.get(channel)
        if receive is not None:
            try:
                receive(data)
            except Exception:  # a hub of another version may publish here, and must not bring this one down
                logger.exception("a message on %s could not be taken", channel)

    async def _keep_probing(self, connection: AbstractConnection) -> None:
        while True:
            self.probes += 1
            with suppress(Unavailable):  # perhaps only late: `_watch` finds out whether probes arrive
                await self._publish(self._probe_channel, b"%d" % self.probes)
            stale = list(islice(self._stale, SUBSCRIBE_BATCH))
            if stale:
                self._stale.difference_update(stale)
                await self._send(connection, "UNSUBSCRIBE", stale)
            await anyio.sleep(PROBE_EVERY)

    async def _watch(self) -> None:
        with anyio.move_on_after(DEAF_AFTER) as self._patience:
            await anyio.sleep_forever()
        self.probes_lost += 1
        raise Deaf("what is published does not arrive")

    def _take_probe(self, data: bytes) -> None:
        self._heard = max(self._heard, int(data))
        if self._patience is not None:
            self._patience.deadline = anyio.current_time() + DEAF_AFTER
        self._echo.set()
        self._echo = anyio.Event()


def _transfer(channels: Collection[str]) -> float:
    """Seconds that a slow link takes to carry the names of channels."""
    return sum(map(len, channels)) / SLOWEST
