"""The private names of DSPy that are replaced, because there is no other way, and the one of anyio that is used.

DSPy hands the chunks of a synchronous LM call over with `anyio.from_thread.run`, which works in anyio's worker threads
only: in a thread of `dspy.Parallel`, of a pool or of `asyncio.to_thread`, the LM call itself fails. Its status callback
uses `sync_send_to_stream`, which on the event loop blocks the loop until a consumer that needs the loop has made room.
Both are replaced by functions that hand chunks of our own streams over directly. They are private: the name `anyio` in
`dspy.clients.execution` and in `dspy.clients.lm` (LiteLLM's calls), and `sync_send_to_stream` in
`dspy.streaming.messages`. In a version of DSPy that this was not tested with, or that lacks one of them, all stay as
they are: a warning says so, once, and LM calls outside of anyio's worker threads give their text whole.

All this happens when the first run begins, once in a process, and for the streams of runs only. LMs and their engines
are not touched.
"""

import asyncio
import contextvars
import functools
import importlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import anyio
import anyio.from_thread
import dspy
from anyio._core import _eventloop
from anyio.lowlevel import EventLoopToken

from agentcast.agents.streaming.sink import Sink

TESTED = "3.4."
"""What the versions of DSPy start with that this was tested with."""

T = TypeVar("T")

_worker: Any = getattr(_eventloop, "threadlocals", threading.local())
"""Where anyio notes what its worker threads belong to."""

_log = logging.getLogger(__name__)
_lock = threading.Lock()


def install() -> bool:
    """Replace the names, if that was not yet done; whether they are replaced now."""
    with _lock:
        return _replace_names()


@functools.cache
def _replace_names() -> bool:
    stand_ins: dict[tuple[str, str], Callable[[Any], Any]] = {
        ("dspy.clients.execution", "anyio"): lambda _: _Anyio(),
        ("dspy.clients.lm", "anyio"): lambda _: _Anyio(),
        ("dspy.streaming.messages", "sync_send_to_stream"): _SendToStream,
    }
    try:
        modules = {place: importlib.import_module(place[0]) for place in stand_ins}
        found = {place: getattr(module, place[1]) for place, module in modules.items()}
    except (ImportError, AttributeError):
        found = {}
    if not found or not dspy.__version__.startswith(TESTED):
        _log.warning(
            "DSPy %s was not tested with this bridge (%sx was): "
            "tokens from dspy.Parallel and other foreign threads arrive whole, not streamed",
            dspy.__version__,
            TESTED,
        )
        return False
    for place, original in found.items():
        setattr(modules[place], place[1], stand_ins[place](original))
    return True


def reaches_stream() -> bool:
    """Whether a synchronous LM call of this thread can hand over chunks."""
    return install() or _is_worker_thread()


class _Anyio:
    """The module `anyio`, as far as DSPy's LM calls see it."""

    def __init__(self) -> None:
        self.from_thread = _FromThread()

    def __getattr__(self, name: str) -> Any:
        return getattr(anyio, name)


class _FromThread:
    """The module `anyio.from_thread`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(anyio.from_thread, name)

    def run(self, func: Callable[..., Any], *args: Any, **options: Any) -> Any:
        sink = getattr(func, "__self__", None)
        if isinstance(sink, Sink):
            return sink.send_nowait(*args)
        if not isinstance(dspy.settings.send_stream, Sink) or _is_worker_thread():
            return anyio.from_thread.run(func, *args, **options)
        return _run_aside(func, *args)


class _SendToStream:
    """`sync_send_to_stream`."""

    def __init__(self, original: Callable[[Any, Any], Any]) -> None:
        self._original = original

    def __call__(self, stream: Any, message: Any) -> Any:
        return stream.send_nowait(message) if isinstance(stream, Sink) else self._original(stream, message)


def _run_aside(func: Callable[..., Any], *args: Any) -> Any:
    """Run a coroutine function to its end on an event loop of its own, from whatever thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(func(*args))
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((asyncio.run(func(*args)), None))
        except BaseException as error:  # noqa: BLE001 -- raised again by whoever waits for it
            outcome.append((None, error))

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    thread.start()
    thread.join()
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


# -- Threads -----------------------------------------------------------------------------------------------------------


def _is_worker_thread() -> bool:
    """Whether `anyio.from_thread` works here."""
    try:
        anyio.from_thread.check_cancelled()
    except anyio.NoEventLoopError:
        return False
    except asyncio.CancelledError:
        pass
    return True


@contextmanager
def as_worker_thread(token: EventLoopToken, scope: anyio.CancelScope) -> Iterator[None]:
    """Have `anyio.from_thread` work in this thread, as in those of `anyio.to_thread`, where DSPy would run a program:
    the functions reach the loop of `token` and notice when `scope` is cancelled."""
    _worker.current_token = token
    _worker.current_cancel_scope = scope
    try:
        yield
    finally:
        del _worker.current_token, _worker.current_cancel_scope
