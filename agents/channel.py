"""The way out of a run: one bounded, ordered channel per run that never blocks the event loop (G3, G5, G8).

Events come from everywhere: the agent's coroutine, tasks it spawned, synchronous callbacks on the loop, worker
threads, other event loops. They leave in the order in which they were emitted, through one consumer.

Back-pressure without blocking is the point here. A synchronous callback on the loop cannot wait, so it always puts
its event; instead, whoever called it is not *resumed* while the channel is congested. `drive` steps the agent's
coroutine by hand and holds it back; a task factory does the same for each task that is created inside the run (50
gathered sub-calls would otherwise fill the channel without bound). Threads wait for room themselves, unless the loop
is blocked, perhaps on them: then they put and go on, so that nothing deadlocks. What cannot be held back at all (a
callback in a tight loop) meets a hard cap, which stops the run.

asyncio, not anyio, on purpose: stepping coroutines and wrapping tasks has no anyio counterpart.
"""

import asyncio
import contextlib
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

from agents.base import Stopped
from agents.events import AgentEvent

HIGH_WATER = 64
"""Events waiting in a channel from which on its run is held back."""
HARD_CAP = 10_000
"""Events waiting in a channel at which its run is stopped (`event_overflow`)."""
LOOP_BLOCKED_AFTER = 0.2
"""Seconds without an answer from the loop after which a waiting thread takes it as blocked."""

T = TypeVar("T")

_current: ContextVar["Channel | None"] = ContextVar("agentcast_channel", default=None)


class Emitted(NamedTuple):
    """An event and the Unix time at which it was emitted."""

    ts: float
    event: AgentEvent


class Channel:
    """One run's events on their way to its consumer. Made on the loop that consumes it; an `agents.base.Emitter`.

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
        """See `agents.base.Emitter.nowait`."""
        if threading.get_ident() == self._thread:
            with self._room:
                self._put(event)
            self._arrived.set()
        else:
            with self._room:
                self._put(event)
                self._wake_from_thread()
                self._wait_in_thread()

    async def send(self, event: AgentEvent) -> None:
        """See `agents.base.Emitter.send`. Cancelling the wait leaves the event sent. Works on any event loop."""
        with self._room:
            self._put(event)
            if threading.get_ident() == self._thread:
                self._arrived.set()
            else:
                self._wake_from_thread()
        while self.congested:
            await self.room()

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
            if self._pinged_at is None:
                self._pinged_at = time.monotonic()
                self._call_loop(self._answer_ping)
            elif time.monotonic() - self._pinged_at > LOOP_BLOCKED_AFTER:
                return
            self._room.wait(LOOP_BLOCKED_AFTER / 4)
        if self._closed:
            raise Stopped

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


# -- Driving a run by hand -----------------------------------------------------------------------------------------


async def drive(run: Coroutine[Any, Any, T], channel: Channel, *, on_cancel: Callable[[], None] | None = None) -> T:
    """Await `run`, holding it and every task that it creates back while `channel` is congested.

    `on_cancel` is called as a cancellation is about to be thrown into `run`.

    :raises Stopped: the channel was abandoned; `run` was closed instead of being resumed.
    """
    _install_gate(asyncio.get_running_loop())
    token = _current.set(channel)
    try:
        return await _step(run, channel, on_cancel)
    finally:
        _current.reset(token)


@types.coroutine
def _step(
    run: Coroutine[Any, Any, T], channel: Channel, on_cancel: Callable[[], None] | None = None
) -> Generator[Any, Any, T]:
    """Step `run`, passing on the futures that it waits for and whatever is thrown in. Cancellation passes the gate."""
    error: BaseException | None = None
    while True:
        if error is None:
            error = yield from _pass_gate(channel)
        if channel.abandoned:
            _drop(run)
            raise Stopped from error
        if on_cancel is not None and isinstance(error, asyncio.CancelledError):
            on_cancel()
        try:
            waiting_for = _resume(run, channel, error)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        error = None
        try:
            yield waiting_for
        except GeneratorExit:
            run.close()
            raise
        except BaseException as thrown:  # noqa: BLE001 -- handed on to `run` above
            error = thrown


def _pass_gate(channel: Channel) -> Generator[Any, Any, BaseException | None]:
    """Wait while `channel` is congested; gives what was thrown in meanwhile."""
    try:
        while channel.congested:
            yield from channel.room()
    except BaseException as thrown:  # noqa: BLE001 -- handed on to the run
        return thrown
    return None


def _resume(run: Coroutine[Any, Any, T], channel: Channel, error: BaseException | None) -> Any:
    """One step of `run`: the future that it waits for next. Raises `StopIteration` when it returns."""
    Channel.resumed = channel
    try:
        return run.send(None) if error is None else run.throw(error)
    finally:
        Channel.resumed = None


_undead: list[Coroutine[Any, Any, Any]] = []
"""Coroutines that ignored GeneratorExit: kept, since the interpreter would resume them again to collect them."""


def _drop(run: Coroutine[Any, Any, Any]) -> None:
    try:
        run.close()
    except RuntimeError:
        _undead.append(run)


async def _gated(run: Coroutine[Any, Any, Any], channel: Channel) -> Any:
    try:
        return await _step(run, channel)
    except Stopped:
        if channel.abandoned:  # nobody waits for this task any more
            return None
        raise


def _install_gate(loop: asyncio.AbstractEventLoop) -> None:
    """Make `loop` hold back the tasks that runs create, on top of the task factory that it has."""
    inner = loop.get_task_factory()
    if isinstance(inner, _Gate):
        return
    loop.set_task_factory(_Gate(inner))


class _Gate:
    """A task factory that wraps each task made inside a run. Other tasks pass untouched."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> Any:
        context = options.get("context")
        channel = _current.get() if context is None else context.get(_current)
        if channel is not None:
            coro = _gated(coro, channel)
        if self._inner is not None:
            return self._inner(loop, coro, **options)
        return asyncio.Task(coro, loop=loop, **options)
