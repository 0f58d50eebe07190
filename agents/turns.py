"""Runs take turns to compute, so that many which are resumed together do not hold up the event loop (G3).

A loop resumes all that is ready before it looks at its timers and sockets again. When the LM calls of 200 runs end at
once, and each run then computes for a millisecond, everything else waits for 200 of them.

This module must not know what a run is, or DSPy.
"""

import asyncio
import time
from collections import deque

from anyio.lowlevel import RunVar

SHARE = 0.01
"""Seconds of one turn of the loop after which a run that wants to compute waits for the next one."""


class Turns:
    """Those of one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._ends: float | None = None
        """When the share of this turn is used up; None: nobody has computed in it yet."""

    @property
    def is_crowded(self) -> bool:
        """Whether somebody waits for a turn."""
        return bool(self._waiting)

    async def take(self) -> None:
        if self._ends is None:
            self._begin()
        elif self._waiting or time.monotonic() >= self._ends:
            waiter = self._loop.create_future()
            self._waiting.append(waiter)
            await waiter

    def _begin(self) -> None:
        self._ends = time.monotonic() + SHARE
        self._loop.call_soon(self._next)

    def _next(self) -> None:
        """The loop has turned: the one who waits longest goes on, if there is one."""
        self._ends = None
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():  # else it was cancelled
                waiter.set_result(None)
                self._begin()
                return


_turns: RunVar[Turns] = RunVar("agentcast_turns")


async def take_turn() -> None:
    """Return at once, or in a later turn of the event loop if others have computed for long in this one."""
    await this_loops_turns().take()


def this_loops_turns() -> Turns:
    """Those of the event loop that the calling task runs in."""
    try:
        return _turns.get()
    except LookupError:
        turns = Turns()
        _turns.set(turns)
        return turns
