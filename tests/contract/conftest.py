"""The buses that the contract is checked on: each name in `BUSES` runs the whole suite."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from server.bus.base import FEED_LENGTH, LOG_BYTES, LOG_EVENTS, Bus
from server.bus.memory import MemoryBus

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


BUSES: dict[str, MakeBus] = {"memory": memory_bus}


@pytest.fixture(params=BUSES)
def make_bus(request: pytest.FixtureRequest) -> MakeBus:
    return BUSES[request.param]


@pytest.fixture
async def bus(make_bus: MakeBus) -> AsyncIterator[Bus]:
    async with make_bus() as bus:
        yield bus
