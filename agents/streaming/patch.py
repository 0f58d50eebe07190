"""The private names of DSPy that are replaced, because there is no other way, and the one of anyio that is used.

DSPy hands the chunks of a synchronous LM call over with `anyio.from_thread.run`, which works in anyio's worker threads
only: in a thread of `dspy.Parallel`, of a pool or of `asyncio.to_thread`, the LM call itself fails. Its status callback
uses `sync_send_to_stream`, which on the event loop blocks the loop until a consumer that needs the loop has made room.
Both are replaced by functions that hand chunks of our own streams over directly, and that do for everybody else's what
DSPy does. The LM and its engines are not touched.

Public methods are replaced as well, in any version. `Predict.aforward`: an LM that has no asynchronous side cannot be
awaited; here the predictor then does on a thread what it does when it is called synchronously. `Tool.acall` and
`Tool.__call__`, in runs: a tool that cancels itself fails, whatever module calls it, and does not end the program.

Replaced, when the first stream is opened or graph is run, and once in a process: the name `anyio` in
`dspy.clients.execution` and in `dspy.clients.lm` (LiteLLM's calls), and `sync_send_to_stream` in
`dspy.streaming.messages`. Only in versions of DSPy that this was tested with. In others a warning says so, once, and
what DSPy cannot do by itself is not done: LM calls outside of anyio's worker threads give their text whole.
"""

import asyncio
import contextvars
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import anyio
import anyio.from_thread
import dspy
from anyio._core import _eventloop
from anyio.lowlevel import EventLoopToken

from agents.observations import contained
from agents.streaming.sink import Sink

TESTED = "3.4."
"""What the versions of DSPy start with that this was tested with."""

RUN_SETTING = "agentcast_run"
"""Key of the innermost bridge in DSPy's settings, which DSPy also carries into the threads of `dspy.Parallel`."""

T = TypeVar("T")

_worker: Any = getattr(_eventloop, "threadlocals", threading.local())
"""Where anyio notes what its worker threads belong to."""

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_warned = False


def install() -> bool:
    """Replace the names, if that was not yet done and DSPy is of a tested version; whether they are replaced now."""
    global _warned
    _replace_methods()
    from dspy.clients import execution, lm
    from dspy.streaming import messages

    if isinstance(execution.anyio, _Anyio):
        return True
    with _lock:
        if not dspy.__version__.startswith(TESTED):
            if not _warned:
                _log.warning(
                    "DSPy %s was not tested with this bridge (%sx was): "
                    "tokens from dspy.Parallel and other foreign threads arrive whole, not streamed",
                    dspy.__version__,
                    TESTED,
                )
            _warned = True
            return False
        messages.sync_send_to_stream = _SendToStream(messages.sync_send_to_stream)
        lm.anyio = execution.anyio = _Anyio()
    return True


def reaches_stream() -> bool:
    """Whether a synchronous LM call of this thread can hand over chunks."""
    return install() or _is_worker_thread()


@functools.cache
def _replace_methods() -> None:
    dspy.Predict.aforward = _on_a_thread_if_synchronous(dspy.Predict.aforward)
    dspy.Tool.acall = _contained_awaited(dspy.Tool.acall)
    dspy.Tool.__call__ = _contained(dspy.Tool.__call__)


def _on_a_thread_if_synchronous(aforward: Callable[..., Any]) -> Callable[..., Any]:
    """`Predict.aforward` that calls an LM without an asynchronous side on a thread."""
    from agents.streaming.dspy_calls import call_in_thread, can_be_awaited  # which need this module

    @functools.wraps(aforward)
    async def call(predictor: Any, /, **inputs: Any) -> Any:
        lm = inputs.get("lm", predictor.lm) or dspy.settings.lm
        if can_be_awaited(lm) and can_be_awaited(getattr(dspy.settings.adapter, "extraction_model", None)):
            return await aforward(predictor, **inputs)
        return await call_in_thread(functools.partial(dspy.Predict.forward, predictor, **inputs), "LM call")

    return call


def _contained_awaited(acall: Callable[..., Any]) -> Callable[..., Any]:
    """`Tool.acall` that in a run does not end it; see `observations.contained`."""

    @functools.wraps(acall)
    async def call(tool: Any, /, **args: Any) -> Any:
        with contained() if _in_run() else nullcontext():
            return await acall(tool, **args)

    return call


def _contained(call: Callable[..., Any]) -> Callable[..., Any]:
    """`Tool.__call__` likewise."""

    @functools.wraps(call)
    def contained_call(tool: Any, /, **args: Any) -> Any:
        with contained() if _in_run() else nullcontext():
            return call(tool, **args)

    return contained_call


def _in_run() -> bool:
    return dspy.settings.get(RUN_SETTING) is not None


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
