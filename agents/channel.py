"""The way out of a run: one bounded, ordered channel per run that never blocks the event loop (G3, G5, G8).

Events travel through an anyio memory object stream, which belongs to one event loop. What this module adds lets them
come from everywhere: from worker threads and other event loops, which put theirs into an inbox that one wake-up of the
loop empties, and from synchronous callbacks on the loop, which cannot wait. Events leave in the order in which they
were emitted: each emit on the loop empties the inbox first, so what a thread emitted before it handed something
to the loop comes before what the loop then emits.

From `HIGH_WATER` waiting events on the channel is congested, and its run is held back: `execution` does not resume the
run's coroutine, threads wait, and tasks wait where they emit with `await` (`send`, `room`). A producer that never
waits meets `HARD_CAP`, which ends the run.
"""

import asyncio
import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import anyio
from anyio.lowlevel import checkpoint
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

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
    """One run's events on their way to its consumer; an `agentcast.agents.base.Emitter`. Made on the loop that consumes
    it.

    It is open until `close`. After that every `send` and `nowait` raises `Stopped`, while `receive` still returns what
    was put before, and then an empty list.
    """

    def __init__(self, label: str = "", *, high_water: int = HIGH_WATER, hard_cap: int = HARD_CAP) -> None:
        self.label = label
        self.overflowed = False
        """Whether `HARD_CAP` was met."""
        self.abandoned = False
        self._high_water = high_water
        self._hard_cap = hard_cap
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._sending, self._receiving = anyio.create_memory_object_stream[Emitted](hard_cap)
        # anyio warns about streams that are collected while they are open.
        weakref.finalize(self, _close_streams, self._sending, self._receiving)
        self._held = 0
        """Events in the stream."""
        self._closed = False
        self._consumer: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._patience = 0.0
        self._can_wait: Callable[[AgentEvent], bool] = _cannot_wait
        self._urgent = False
        """Whether an event waits that cannot wait for others."""
        # Shared with other threads; `_room` guards `_closed`, `_waiters` and putting into `_inbox`.
        self._room = threading.Condition()
        self._inbox: deque[Emitted] = deque()
        self._wake_scheduled = False
        self._waiters: list[asyncio.Future[None]] = []
        self._pinged_at: float | None = None

    def __len__(self) -> int:
        return self._held + len(self._inbox)

    @property
    def congested(self) -> bool:
        """Whether the run is to be held back."""
        return not self._closed and self._held + len(self._inbox) >= self._high_water

    # -- Producers -------------------------------------------------------------------------------------------------

    def nowait(self, event: AgentEvent) -> None:
        """See `agentcast.agents.base.Emitter.nowait`."""
        if threading.get_ident() == self._thread:
            self._put(event)
            return
        with self._room:
            self._put_from_thread(event)
            while self.congested and not self._loop_is_blocked():
                self._room.wait(LOOP_BLOCKED_AFTER / 4)
            if self._closed:
                raise Stopped

    async def send(self, event: AgentEvent) -> None:
        """See `agentcast.agents.base.Emitter.send`. On any event loop. Cancelling the wait leaves the event sent."""
        if threading.get_ident() == self._thread:
            self._put(event)
        else:
            with self._room:
                self._put_from_thread(event)
        if self.congested:
            await self.room()

    async def room(self) -> None:
        """Wait until the channel is not congested. On another event loop than the channel's own this does not wait for
        one that is blocked, perhaps on it."""
        while self.congested:
            if threading.get_ident() == self._thread:
                await self._next_room()
            elif self._loop_is_blocked():
                return
            else:
                await asyncio.wait([self._next_room()], timeout=LOOP_BLOCKED_AFTER / 4)

    def hand_over(self) -> None:
        """In a thread, wait until the loop has been woken for what was put, unless it is blocked."""
        if threading.get_ident() == self._thread:
            return
        woken = threading.Event()
        self._call_loop(woken.set)
        while not woken.is_set() and not self._closed and not self._loop_is_blocked():
            woken.wait(LOOP_BLOCKED_AFTER / 4)

    def _put(self, event: AgentEvent) -> None:
        if self._inbox:
            self._empty_inbox()
        if self._closed:
            raise Stopped
        self._admit(Emitted(time.time(), event))
        if self.overflowed:
            raise Stopped

    def _admit(self, emitted: Emitted) -> None:
        """Put into the stream, and see that the consumer is woken in time. On the loop."""
        try:
            self._sending.send_nowait(emitted)
        except anyio.WouldBlock:
            self._inbox.clear()  # over the cap, too
            self._overflow()
            return
        self._held += 1
        if self._consumer is not None or not self._urgent:
            self._announce(emitted.event)

    def _put_from_thread(self, event: AgentEvent) -> None:
        if not self._closed and len(self) >= self._hard_cap:
            self._overflow()
        if self._closed:
            raise Stopped
        self._inbox.append(Emitted(time.time(), event))
        if not self._wake_scheduled:  # one wake-up serves every event that comes before it runs
            self._wake_scheduled = True
            self._call_loop(self._wake)

    def _wake(self) -> None:
        self._wake_scheduled = False  # first: a thread that finds it set has put its event already
        self._empty_inbox()

    def _empty_inbox(self) -> None:
        """Move what threads have put into the stream. On the loop."""
        while self._inbox:
            self._admit(self._inbox.popleft())

    def _overflow(self) -> None:
        self.overflowed = True
        self.close()

    def _next_room(self) -> "asyncio.Future[None]":
        """A future of the running loop that is done as soon as the channel may have room again."""
        future = asyncio.get_running_loop().create_future()
        with self._room:
            if self.congested:
                self._waiters.append(future)
            else:
                future.set_result(None)
        return future

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
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nothing waits there
            self._loop.call_soon_threadsafe(callback)

    # -- The consumer ----------------------------------------------------------------------------------------------

    async def receive(self) -> list[Emitted]:
        """All that waits, as soon as anything does; an empty list once the channel is closed and drained.

        Cancelling loses nothing.
        """
        await self.ready()
        return self.take()

    async def ready(self, patience: float = 0.0, can_wait: Callable[[AgentEvent], bool] | None = None) -> bool:
        """Wait until an event waits, or the channel is closed; false once it is closed and drained. Always gives way to
        other tasks.

        Events for which `can_wait` is true wait up to `patience` seconds for others to join them, unless the channel is
        congested.
        """
        self._patience, self._can_wait = patience, can_wait or _cannot_wait
        self._empty_inbox()
        if self._closed or self.congested or (len(self) and (self._urgent or not patience)):
            await checkpoint()
        else:
            await self._woken()
        return not self._closed or len(self) > 0

    async def _woken(self) -> None:
        self._consumer = self._loop.create_future()
        if len(self):
            self._start_timer()
        try:
            await self._consumer
        finally:
            self._consumer = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def take(self) -> list[Emitted]:
        """All that waits now."""
        self._empty_inbox()
        items = [self._receiving.receive_nowait() for _ in range(self._held)]
        self._held, self._urgent = 0, False
        self._release()
        return items

    def close(self) -> None:
        """No event is taken any more. Idempotent; from any thread."""
        with self._room:
            self._closed = True
            self._room.notify_all()
        if threading.get_ident() == self._thread:
            self._finish()
        else:
            self._call_loop(self._finish)

    def abandon(self) -> None:
        """Close, and never resume the run's coroutine again: it is closed where it stands."""
        self.abandoned = True
        self.close()

    def _finish(self) -> None:
        self._empty_inbox()
        self._sending.close()
        self._release()
        self._wake_consumer()

    def _announce(self, event: AgentEvent) -> None:
        """Wake the consumer for an event that was put, at once or in time."""
        if not self._urgent:
            self._urgent = not self._can_wait(event)
        if self._consumer is None:
            return
        if self._urgent or not self._patience or self.congested:
            self._wake_consumer()
        elif self._timer is None:
            self._start_timer()

    def _start_timer(self) -> None:
        self._timer = self._loop.call_later(self._patience, self._wake_consumer)

    def _wake_consumer(self) -> None:
        if self._consumer is not None and not self._consumer.done():
            self._consumer.set_result(None)

    def _release(self) -> None:
        """Wake all that wait for room. On the loop."""
        with self._room:
            self._room.notify_all()
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            loop = waiter.get_loop()
            if loop is self._loop:
                _resolve(waiter)
                continue
            with contextlib.suppress(RuntimeError):  # that loop is closed, and with it all that waited
                loop.call_soon_threadsafe(_resolve, waiter)


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _cannot_wait(event: AgentEvent) -> bool:
    return False


def _close_streams(sending: MemoryObjectSendStream[Emitted], receiving: MemoryObjectReceiveStream[Emitted]) -> None:
    sending.close()
    receiving.close()
