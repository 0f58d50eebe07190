"""One connection to Redis for calls: those that wait at the same time share a round trip (G5).

A call is answered within its patience or is `Unavailable`, and then may have happened or not: every call of the bus can
be repeated. Nothing here knows what the calls mean.
"""

import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoScriptError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
)

from agentcast.server.errors import Unavailable

PATIENCE = 0.95
"""Seconds until a call is given up."""
EXCHANGE_TIMEOUT = 0.8
"""Seconds without an answer, connecting included, after which the connection is thrown away. Both get longer by what is
sent and what may be answered, at `SLOWEST` bytes per second."""
SLOWEST = 128 * 1024
BATCH_CALLS = 512
"""Calls that share a round trip. The loop packs and unpacks them without a pause, in about 5 ms."""
BATCH_BYTES = 1024 * 1024
"""The most that calls of one round trip send and may be answered; a larger call gets one of its own."""
LARGE = 32 * 1024
"""Calls that carry more share no round trip with smaller ones, which would wait for them."""

logger = logging.getLogger(__name__)

Argument = str | bytes | int | float


Connect = Callable[[], AbstractConnection]


def connections(url: str) -> Connect:
    """A factory of connections to the Redis at `url`, which connect at their first command and never retry.

    :raises ValueError: the URL is wrong.
    """
    pool = ConnectionPool.from_url(url, protocol=2)
    pool.connection_kwargs |= {  # after the URL's own options, which would win: all here relies on these
        "protocol": 2,
        "decode_responses": False,
        "socket_timeout": None,
        "socket_connect_timeout": EXCHANGE_TIMEOUT,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,
    }
    connect: Connect = pool.make_connection
    return connect


class Script:
    """A Lua script, known to Redis by its hash once it has run there."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = hashlib.sha1(source.encode()).hexdigest()  # noqa: S324 -- what Redis calls it by


@dataclass(slots=True, eq=False)
class _Call:
    command: tuple[Argument, ...]
    script: Script | None = None
    expects: int = 0
    size: int = field(init=False)
    weight: int = field(init=False)
    answer: Any = None
    done: anyio.Event = field(default_factory=anyio.Event)
    given_up: bool = False

    def __post_init__(self) -> None:
        self.size = sum(len(part) for part in self.command if isinstance(part, str | bytes))
        self.weight = self.size + self.expects

    @property
    def transfer(self) -> float:
        """Seconds that it may take to carry the call and its answer."""
        return self.weight / SLOWEST


class PipelinedConnection:
    """Sends calls and gives their answers. Small and large ones take turns, each kind in order. `run` must be running
    meanwhile.
    """

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection = connection
        self._small: deque[_Call] = deque()
        self._large: deque[_Call] = deque()
        self._next, self._other = self._small, self._large
        self._arrived = anyio.Event()

    async def run(self) -> None:
        """Exchange calls for answers until cancelled."""
        try:
            while True:
                await self._arrived.wait()
                self._arrived = anyio.Event()
                while batch := self._next_batch():
                    await self._exchange(batch)
        finally:
            with anyio.CancelScope(shield=True):
                await self._connection.disconnect(nowait=True)

    async def call(self, *command: Argument, expects: int = 0) -> Any:
        """The answer to one command: bytes, a number, a list of such, or None. `expects` is how many bytes it may take,
        where that is many.

        :raises Unavailable: there is none in time, or Redis refuses at the moment.
        """
        (answer,) = await self._answers([_Call(command, expects=expects)])
        return answer

    async def calls(self, commands: Sequence[tuple[Argument, ...]], expects: int = 0) -> list[Any]:
        """The answers to any number of commands, of which each may take `expects` bytes. The calls of each round trip
        have a patience of their own. Raises as `call`."""
        calls = [_Call(command, expects=expects) for command in commands]
        heaviest = max((call.weight for call in calls), default=1)
        chunk = max(1, min(BATCH_CALLS, BATCH_BYTES // max(1, heaviest)))
        answers: list[Any] = []
        for start in range(0, len(calls), chunk):
            answers += await self._answers(calls[start : start + chunk])
        return answers

    async def script(self, script: Script, keys: Sequence[str], *args: Argument, expects: int = 0) -> Any:
        """The answer of a script. As `call`."""
        (answer,) = await self._answers([_Call(("EVALSHA", script.sha, len(keys), *keys, *args), script, expects)])
        return answer

    async def _answers(self, calls: list[_Call]) -> list[Any]:
        for call in calls:
            (self._large if call.weight > LARGE else self._small).append(call)
        self._arrived.set()
        try:
            with anyio.move_on_after(PATIENCE + sum(call.transfer for call in calls)):
                for call in calls:
                    await call.done.wait()
                    if isinstance(call.answer, Exception):
                        raise call.answer
                return [call.answer for call in calls]
        finally:
            for call in calls:
                call.given_up = True
        raise Unavailable("Redis does not answer; try again")

    def _next_batch(self) -> list[_Call]:
        self._next, self._other = self._other, self._next
        return _take(self._next) or _take(self._other)

    async def _exchange(self, batch: list[_Call]) -> None:
        try:
            unknown = await self._round_trip(batch)
            if unknown:  # a Redis that has just started, or has flushed its scripts
                await self._round_trip(unknown, whole_scripts=True)
        except (RedisError, OSError, TimeoutError) as error:
            await self._connection.disconnect(nowait=True)
            self._fail(batch, f"Redis is away ({reason(error)}); try again")

    async def _round_trip(self, batch: list[_Call], *, whole_scripts: bool = False) -> list[_Call]:
        """Send calls and take their answers. Gives those whose script Redis does not know."""
        commands = [_with_source(call) if whole_scripts else call.command for call in batch]
        unknown, refused = [], False
        with anyio.fail_after(EXCHANGE_TIMEOUT + sum(call.size for call in batch) / SLOWEST) as patience:
            await self._connection.send_packed_command(self._connection.pack_commands(commands), check_health=False)
            for call in batch:
                patience.deadline = anyio.current_time() + EXCHANGE_TIMEOUT + call.transfer
                try:
                    call.answer = await self._connection.read_response(timeout=float("inf"))
                except NoScriptError:
                    unknown.append(call)
                    continue
                except BusyLoadingError:
                    raise  # every call would get this answer
                except ResponseError as error:
                    call.answer = refusal(error)
                    refused = True
                call.done.set()
        if refused:  # perhaps a replica by now: the next connection may lead to the primary
            await self._connection.disconnect(nowait=True)
        return unknown

    def _fail(self, batch: list[_Call], message: str) -> None:
        for call in batch:
            if not call.done.is_set():
                call.answer = Unavailable(message)
                call.done.set()


def _take(waiting: deque[_Call]) -> list[_Call]:
    """As many calls as share a round trip."""
    batch: list[_Call] = []
    weight = 0
    while waiting and len(batch) < BATCH_CALLS:
        call = waiting[0]
        if not call.given_up:
            weight += call.weight
            if batch and weight > BATCH_BYTES:
                break
            batch.append(call)
        waiting.popleft()
    return batch


def _with_source(call: _Call) -> tuple[Argument, ...]:
    return call.command if call.script is None else ("EVAL", call.script.source, *call.command[2:])


_PASSING = ("READONLY", "MISCONF", "NOREPLICAS", "MASTERDOWN", "BUSY", "UNKILLABLE")


def refusal(error: ResponseError) -> Unavailable:
    """What an error reply means to the caller: a condition that passes, or one that an operator has to fix."""
    text = str(error)  # Redis 6.2 puts the code of what failed inside a script into the text
    if isinstance(error, OutOfMemoryError) or "OOM command not allowed" in text:
        return Unavailable("Redis is out of memory (maxmemory); it accepts no writes until memory is free")
    code = next((code for code in _PASSING if code in text), None)
    if code is None and type(error) is ResponseError:
        logger.error("Redis refused a call: %s", text[:120])
        return Unavailable("Redis refuses a call; the hub's log says why")
    return Unavailable(f"Redis refuses at the moment ({code or type(error).__name__}); try again")


def reason(error: BaseException) -> str:
    """Why Redis cannot be reached, without its URL, which may contain a password."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, AuthenticationError):
        return "it refuses user and password"
    if isinstance(error, BusyLoadingError):
        return "it is loading its data"
    cause = error.__cause__ or error.__context__ or error
    if isinstance(cause, OSError) and cause.strerror:
        if cause.errno and cause.strerror.startswith("Connect call failed"):  # asyncio puts the address there
            return os.strerror(cause.errno)
        return cause.strerror
    return _REASONS.get(type(error).__name__, type(error).__name__)


_REASONS = {
    "TimeoutError": "no answer",
    "Unavailable": "no answer",
    "ConnectionError": "the connection was lost",
    "Deaf": "what is published does not arrive",
}
