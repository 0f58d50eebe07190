"""One process's subscription to Redis: supervised, confirmed, and proven to deliver (G2).

Pub/sub delivers at most once, and a subscriber can be deaf while TCP looks well. So a probe travels the real path every
second, into Redis and back by the subscription; if it does not arrive, the connection is thrown away and a new one
subscribes to everything again. What was missed meanwhile cannot be told from here: `on_connect` is called after each
connection, for whoever can compare.

Nothing here knows what the messages mean.
"""

import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from itertools import islice

import anyio
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

from agentcast.server.bus.redis.pipelined import EXCHANGE_TIMEOUT, Connect, reason
from agentcast.server.errors import Unavailable

PROBE_EVERY = 1.0
DEAF_AFTER = 2.5
"""Seconds without a probe, after which the connection is taken for deaf."""
SUBSCRIBE_BATCH = 500
_RETRY_FIRST, _RETRY_MOST = 0.1, 1.5

logger = logging.getLogger(__name__)

Receive = Callable[[bytes], None]
"""Takes one message, on the event loop. Must not block or raise."""


class Deaf(RedisError):
    """The subscription does not deliver."""


class Listener:
    """Delivers the messages of channels, in order. `run` must be running meanwhile.

    `connect` makes a connection, `publish` sends to a channel by another one; `receivers` stay for good.
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
        """Why nothing may be delivered at the moment, if so."""
        self.connected = anyio.Event()
        """Set when the first connection stands."""
        self.attempts = 0
        """Connections that failed, or could not be had."""
        self.resubscribed = 0
        """Channels that were subscribed to anew."""
        self.probes = 0
        self.probes_lost = 0
        self._connect = connect
        self._publish = publish
        self._probe_channel = probe_channel
        self._on_connect = on_connect
        self._receivers: dict[str, Receive] = {probe_channel: self._take_probe, **receivers}
        self._confirmed: dict[str, anyio.Event] = {}
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
                was_well = self.problem is None
                self.problem = f"Redis is away ({reason(group)})"
                level = logging.WARNING if was_well or not self.attempts else logging.DEBUG
                logger.log(level, "the subscription to Redis is lost: %s", reason(group))
            finally:
                self._connection = None
                with anyio.CancelScope(shield=True):
                    await connection.disconnect(nowait=True)
            self.attempts += 1
            delay = _RETRY_FIRST if was_well else min(delay * 2, _RETRY_MOST)
            await anyio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 -- jitter, not a secret

    async def subscribe(self, channel: str, receive: Receive) -> None:
        """Deliver what is published to `channel` from now on; Redis has confirmed it when this returns. A channel has
        one receiver.

        :raises Unavailable: Redis does not confirm in time. The channel is wanted all the same, until `unsubscribe`.
        """
        self._receivers[channel] = receive
        self._stale.discard(channel)
        confirmed = self._confirmed.setdefault(channel, anyio.Event())
        try:
            with anyio.fail_after(EXCHANGE_TIMEOUT):
                if self._connection is None:
                    raise Unavailable(f"{self.problem}; try again")
                if not confirmed.is_set():
                    await self._connection.send_command("SUBSCRIBE", channel, check_health=False)
                    await confirmed.wait()
        except (RedisError, OSError, TimeoutError):
            raise Unavailable("Redis did not confirm a subscription in time; try again") from None

    def unsubscribe(self, channel: str) -> None:
        """Nothing of `channel` is delivered any more. Redis is told with the next probe."""
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
        channels = list(waiting)
        self.resubscribed += len(channels)
        with anyio.fail_after(DEAF_AFTER):
            for start in range(0, len(channels), SUBSCRIBE_BATCH):
                batch = channels[start : start + SUBSCRIBE_BATCH]
                await connection.send_command("SUBSCRIBE", *batch, check_health=False)
            for channel, confirmed in waiting.items():
                if channel in self._receivers:
                    await confirmed.wait()

    async def _read(self, connection: AbstractConnection) -> None:
        while True:
            kind, channel, data = await connection.read_response(timeout=float("inf"))
            name = channel.decode()
            if kind == b"message":
                self._take(name, data)
            elif kind == b"subscribe" and (confirmed := self._confirmed.get(name)) is not None:
                confirmed.set()

    def _take(self, channel: str, data: bytes) -> None:
        receive = self._receivers.get(channel)
        if receive is not None:
            try:
                receive(data)
            except Exception:  # whoever can publish here, a hub of another version too, must not bring this one down
                logger.exception("a message on %s could not be taken", channel)

    async def _keep_probing(self, connection: AbstractConnection) -> None:
        while True:
            self.probes += 1
            with suppress(Unavailable):  # late, perhaps: whether probes arrive is watched
                await self._publish(self._probe_channel, b"%d" % self.probes)
            stale = list(islice(self._stale, SUBSCRIBE_BATCH))
            if stale:
                self._stale.difference_update(stale)
                await connection.send_command("UNSUBSCRIBE", *stale, check_health=False)
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
