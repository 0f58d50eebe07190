"""The way out of a run: one bounded, ordered channel per run that never blocks the event loop (G3, G5, G8).

Events come from everywhere: the agent's coroutine, tasks it spawned, synchronous callbacks on the loop, worker
threads, other event loops. They leave in the order in which they were emitted, through one consumer.

A synchronous callback on the loop cannot wait, so it always puts its event; the `gate` holds its caller back instead.
Threads wait for room themselves, unless the loop is blocked, perhaps on them: then they put and go on, so that nothing
deadlocks. What cannot be held back at all (a callback in a tight loop) meets a hard cap, which stops the run.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from agentcast.agents.base import Stopped
from agentcast.agents.events import AgentEvent

HIGH_WATER = 64
"""Events waiting in a channel from which on its run is held back."""
HARD_CAP = 10_000
"""Events waiting in a channel at which its run is stopped (`event_overflow`)."""
LOOP_BLOCKED_AFTER = 0.2
"""Seconds without an answer from the loop after which a waiting thread takes it as blocked."""


class Emitted(NamedTuple):
    """An event and the Unix time at which it was emitted."""

    ts: float
    event: AgentEvent


class Channel:
    """One run's events on their way to its consumer. Made on the loop that consumes it; an
    `agentcast.agents.base.Emitter`.

    It is open until `close`; after that every `send` and `nowait` raises `Stopped`, while `receive` still yields what
    had been put before, and then an empty list.
    """

    resumed: "Channel | None" = None
    """Class-wide: the channel whose run the event loop is executing at this moment (for the watchdog)."""

    def __init__(self, label: str = "", *, high_water: int = HIGH_WATER, hard_cap: int = HARD_CAP) -> None:
        self.label = label
        self.overflowed = False
        self.abandoned = False
        self._high_water = high_water
        self._hard_cap = hard_cap
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._items: deque[Emitted] = deque()
        self._closed = False
        self._room = threading.Condition(threading.Lock())
        self._arrived = asyncio.Event()
        self._wake_scheduled = False
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._pinged_at: float | None = None

    def __len__(self) -> int:
        return len(self._items)

    @property
    def congested(self) -> bool:
        """Whether the run is to be held back."""
        return len(self._items) >= self._high_water and not self._closed

    # -- Producers -------------------------------------------------------------------------------------------------

    def nowait(self, event: AgentEvent) -> None:
        """See `agentcast.agents.base.Emitter.nowait`."""
        if threading.get_ident() == self._thread:
            with self._room:
                self._put(event)
            self._arrived.set()
        else:
            with self._room:
                self._put(event)
                self._wake_from_thread()
                self._wait_in_thread()

    def hand_over(self) -> None:
        """In a thread, wait until the loop has been woken for what was put, unless it is blocked."""
        if threading.get_ident() == self._thread:
            return
        woken = threading.Event()
        self._call_loop(woken.set)
        while not woken.is_set() and not self._closed and not self._loop_is_blocked():
            woken.wait(LOOP_BLOCKED_AFTER / 4)

    async def send(self, event: AgentEvent) -> None:
        """See `agentcast.agents.base.Emitter.send`. Cancelling the wait leaves the event sent. Works on any event loop;
        on another than the channel's own it does not wait for one that is blocked, perhaps on it."""
        with self._room:
            self._put(event)
            if threading.get_ident() == self._thread:
                self._arrived.set()
            else:
                self._wake_from_thread()
        own = threading.get_ident() == self._thread
        while self.congested and (own or not self._loop_is_blocked()):
            if own:
                await self.room()
            else:
                await asyncio.wait([self.room()], timeout=LOOP_BLOCKED_AFTER / 4)

    def _put(self, event: AgentEvent) -> None:
        if not self._closed and len(self._items) >= self._hard_cap:
            self.overflowed = True
            self._close()
        if self._closed:
            raise Stopped
        self._items.append(Emitted(time.time(), event))

    def _wake_from_thread(self) -> None:
        if not self._wake_scheduled:  # one wake-up serves every event that comes before it runs
            self._wake_scheduled = True
            self._call_loop(self._wake)

    def _wake(self) -> None:
        with self._room:
            self._wake_scheduled = False
        self._arrived.set()

    def _wait_in_thread(self) -> None:
        """Wait for room, holding the lock. Ends early when the loop does not answer: it may be waiting for us."""
        while self.congested:
            if self._loop_is_blocked():
                return
            self._room.wait(LOOP_BLOCKED_AFTER / 4)
        if self._closed:
            raise Stopped

    def _loop_is_blocked(self) -> bool:
        """Whether the loop has not answered for long, called again and again while waiting in another thread."""
        pinged_at = self._pinged_at
        if pinged_at is None:
            self._pinged_at = time.monotonic()
            self._call_loop(self._answer_ping)
            return False
        return time.monotonic() - pinged_at > LOOP_BLOCKED_AFTER

    def _answer_ping(self) -> None:
        self._pinged_at = None

    def _call_loop(self, callback: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(callback)

    def room(self) -> "asyncio.Future[None]":
        """A future of the running loop that is done as soon as the channel may have room again."""
        future = asyncio.get_running_loop().create_future()
        with self._room:
            if self.congested:
                self._waiters.append(future)
            else:
                future.set_result(None)
        return future

    # -- The consumer ----------------------------------------------------------------------------------------------

    async def receive(self) -> list[Emitted]:
        """Everything that waits, as soon as anything does; an empty list once the channel is closed and drained.

        Cancelling loses nothing.
        """
        while not self._items and not self._closed:
            self._arrived.clear()
            await self._arrived.wait()
        with self._room:
            items = list(self._items)
            self._items.clear()
            self._release()
        return items

    def close(self) -> None:
        """No event is taken any more. Idempotent."""
        with self._room:
            self._close()

    def abandon(self) -> None:
        """Close, and never resume the run again: its coroutines are closed where they stand."""
        self.abandoned = True
        self.close()

    def _close(self) -> None:
        self._closed = True
        self._release()
        if threading.get_ident() == self._thread:
            self._arrived.set()
        else:
            self._call_loop(self._arrived.set)

    def _release(self) -> None:
        self._room.notify_all()
        while self._waiters:
            waiter = self._waiters.popleft()
            with contextlib.suppress(RuntimeError):  # that loop is closed, and with it whoever waited
                waiter.get_loop().call_soon_threadsafe(_resolve, waiter)


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
