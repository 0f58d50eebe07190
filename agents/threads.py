"""Blocking calls on threads of their own, so that they never hold up the event loop (G3) and can be left behind (G6).

Not asyncio's default executor: it is small, and every LM call of DSPy hops over it. Not anyio's worker threads
either: they are not daemons, so one call that never returns would keep the whole process from ending.
"""

import asyncio
import contextlib
import contextvars
import functools
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import anyio
from anyio.lowlevel import RunVar

try:
    import sniffio
except ImportError:
    sniffio = None  # type: ignore[assignment]

MAX_THREADS = 64
"""Blocking calls that are waited for at once, in one event loop; more wait for their turn."""

T = TypeVar("T")

_log = logging.getLogger(__name__)
_limiter: RunVar[anyio.CapacityLimiter] = RunVar("agentcast_blocking_calls")
_abandoned: set[threading.Thread] = set()


def abandoned_threads() -> list[str]:
    """The names of the calls that nobody waits for any more and that still run."""
    return [thread.name for thread in _abandoned.copy()]


async def in_thread(
    call: Callable[[], T], name: str, *, limiter: anyio.CapacityLimiter | None = None, linger: float = 0
) -> T:
    """What `call()` returns or raises, called in a thread, in a copy of this context.

    When the wait is cancelled, the thread is left behind: it keeps no place among `MAX_THREADS`, it is counted, and
    the log names it; both unless it ends within `linger` seconds. `name` says what runs. `limiter` replaces the limit
    of `MAX_THREADS`.
    """
    async with limiter or _this_loops_limiter():
        work = _Work(call, name)
        work.thread.start()
        value: T
        try:
            value, error = await work.outcome
        except anyio.get_cancelled_exc_class():
            work.leave(linger)
            raise
    if error is not None:
        raise error
    return value


def run_to_end(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """What `await call()` gives, from synchronous code, on an event loop of its own: in this thread, or in another one
    if this one's loop is running, which is blocked meanwhile."""
    if not is_in_loop():
        return asyncio.run(call())
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((asyncio.run(call()), None))
        except BaseException as error:  # noqa: BLE001 -- raised again below
            outcome.extend((None, error))

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    thread.start()
    thread.join()
    value, error = outcome
    if error is not None:
        raise error
    result: T = value
    return result


def is_in_loop() -> bool:
    """Whether this thread runs an event loop at this moment."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def is_async_callable(function: Any) -> bool:
    """Whether calling `function` gives a coroutine: an `async def`, also as a method, in a partial or as `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def unblocking(function: Callable[..., Any], name: str) -> Callable[..., Awaitable[Any]]:
    """`function` as one to await; a synchronous one is called on a thread, which `name` is the name of."""
    if is_async_callable(function):
        return function

    async def call(*args: Any, **named: Any) -> Any:
        result = await in_thread(functools.partial(function, *args, **named), name)
        return await result if inspect.isawaitable(result) else result

    return call


def _this_loops_limiter() -> anyio.CapacityLimiter:
    try:
        return _limiter.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(MAX_THREADS)
        _limiter.set(limiter)
        return limiter


class _Work:
    def __init__(self, call: Callable[[], Any], name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._call = call
        self._ended = False
        self._lock = threading.Lock()
        self.outcome: asyncio.Future[tuple[Any, BaseException | None]] = self._loop.create_future()
        context = contextvars.copy_context()
        if sniffio is not None:  # in the thread no event loop runs: it may start one of its own
            context.run(sniffio.current_async_library_cvar.set, None)
        self.thread = threading.Thread(target=context.run, args=(self._run,), name=name, daemon=True)

    def _run(self) -> None:
        outcome: tuple[Any, BaseException | None]
        try:
            outcome = self._call(), None
        except BaseException as error:  # noqa: BLE001 -- raised again where the call is waited for
            outcome = None, error
        with self._lock:
            self._ended = True
            _abandoned.discard(self.thread)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._report, outcome)

    def _report(self, outcome: tuple[Any, BaseException | None]) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)

    def leave(self, linger: float) -> None:
        if linger:
            self._loop.call_later(linger, self._abandon)
        else:
            self._abandon()

    def _abandon(self) -> None:
        with self._lock:
            if self._ended:
                return
            _abandoned.add(self.thread)
        _log.warning(
            "%s did not return when its run was stopped; its thread is left behind (%d such threads now)",
            self.thread.name,
            len(_abandoned),
        )
