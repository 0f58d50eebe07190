"""The buses that the contract is checked on: each name in `BUSES` runs the whole suite."""

import functools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio
import pytest

from agentcast.server.bus.base import FEED_LENGTH, LOG_BYTES, LOG_EVENTS, Bus, new_epoch
from agentcast.server.bus.memory import MemoryBus
from agentcast.server.bus.redis import RedisBus
from tests.contract.support import PATIENCE
from tests.support.redis import Redis, running_redis

MakeBus = Callable[..., AbstractAsyncContextManager[Bus]]
"""Makes an empty bus; takes `log_events`, `log_bytes` and `feed_length`."""


@asynccontextmanager
async def memory_bus(
    *, log_events: int = LOG_EVENTS, log_bytes: int = LOG_BYTES, feed_length: int = FEED_LENGTH
) -> AsyncIterator[Bus]:
    bus = MemoryBus(log_events=log_events, log_bytes=log_bytes, feed_length=feed_length)
    try:
        yield bus
    finally:
        await bus.aclose()


@asynccontextmanager
async def redis_bus(
    redis: Redis, *, log_events: int = LOG_EVENTS, log_bytes: int = LOG_BYTES, feed_length: int = FEED_LENGTH
) -> AsyncIterator[Bus]:
    """A bus whose user may do what the documentation says is enough, and no more."""
    prefix = new_epoch()
    rules = (f"~{prefix}:*", f"&{prefix}@*", "+@all", "-@admin", "-@dangerous", "+info")
    redis.do("ACL", "SETUSER", prefix, "on", ">secret", *rules)
    url = f"redis://{prefix}:secret@127.0.0.1:{redis.port}/0"
    bus = RedisBus(url, new_epoch(), prefix=prefix, log_events=log_events, log_bytes=log_bytes, feed_length=feed_length)
    async with anyio.create_task_group() as tasks:
        with anyio.fail_after(PATIENCE):
            await tasks.start(bus.run)
        yield bus
        await bus.aclose()
        tasks.cancel_scope.cancel()


BUSES = ("memory", "redis")


@pytest.fixture(scope="session")
def redis() -> Iterator[Redis]:
    with running_redis() as redis:
        yield redis


@pytest.fixture(params=BUSES)
def make_bus(request: pytest.FixtureRequest) -> MakeBus:
    if request.param == "memory":
        return memory_bus
    return functools.partial(redis_bus, request.getfixturevalue("redis"))


@pytest.fixture
async def bus(make_bus: MakeBus) -> AsyncIterator[Bus]:
    async with make_bus() as bus:
        yield bus
