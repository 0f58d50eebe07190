"""Waiting for what no event reports: the state of another process."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

T = TypeVar("T")
PATIENCE = 30.0
"""Seconds that anything may take that is not measured, on a loaded machine."""


async def eventually(ask: Callable[[], Awaitable[T]], within: float = PATIENCE) -> T:
    """The first answer that is true.

    :raises TimeoutError: there was none.
    """
    with anyio.fail_after(within):
        while not (answer := await ask()):  # noqa: ASYNC110 -- nothing would set an event
            await anyio.sleep(0.05)
    return answer


async def until(true: Callable[[], bool], within: float = PATIENCE) -> None:
    """Wait for something that can be seen from here.

    :raises TimeoutError: it did not come true.
    """
    with anyio.fail_after(within):
        while not true():  # noqa: ASYNC110 -- nothing would set an event
            await anyio.sleep(0.02)
