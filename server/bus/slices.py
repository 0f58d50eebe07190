"""Work that takes long, done in slices, so that it never keeps the event loop from other tasks (G3)."""

import time
from collections.abc import Generator
from typing import TypeVar

from anyio.lowlevel import checkpoint

T = TypeVar("T")

SLICE = 0.005
"""Seconds of work after which other tasks get their turn."""


async def in_slices(steps: Generator[None, None, T]) -> T:
    """What `steps` returns. It yields wherever it may be interrupted."""
    started = time.perf_counter()
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: T = stop.value
            return result
        if time.perf_counter() - started >= SLICE:
            await checkpoint()
            started = time.perf_counter()
