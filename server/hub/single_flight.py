"""Sharing work that several tasks ask for at the same time."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import anyio

K = TypeVar("K")
V = TypeVar("V")


@dataclass(slots=True)
class _Flight(Generic[V]):
    landed: anyio.Event = field(default_factory=anyio.Event)
    values: list[V] = field(default_factory=list)


class SingleFlight(Generic[K, V]):
    """Calls with the same key that overlap share one execution. Nothing is kept afterwards.

    If it fails, or its caller is cancelled, each of the others tries for itself.
    """

    def __init__(self) -> None:
        self._flights: dict[K, _Flight[V]] = {}

    async def __call__(self, key: K, call: Callable[[], Awaitable[V]]) -> V:
        flight = self._flights.get(key)
        if flight is not None:
            await flight.landed.wait()
            return flight.values[0] if flight.values else await call()
        flight = self._flights[key] = _Flight()
        try:
            flight.values.append(await call())
            return flight.values[0]
        finally:
            del self._flights[key]
            flight.landed.set()
