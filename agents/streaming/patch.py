"""What of DSPy is replaced, because there is no other way, and the private name of anyio that is used.

DSPy hands the chunks of a synchronous LM call over with `anyio.from_thread.run`, which works in anyio's worker threads
only: in a thread of `dspy.Parallel`, of a pool or of `asyncio.to_thread`, the LM call itself fails. Its status callback
uses `sync_send_to_stream`, which on the event loop blocks the loop until a consumer that needs the loop has made room.
Both are replaced by functions that hand chunks of our own streams over directly. They are private: the name `anyio` in
`dspy.clients.execution` and in `dspy.clients.lm` (LiteLLM's calls), and `sync_send_to_stream` in
`dspy.streaming.messages`. In a version of DSPy that this was not tested with, or that lacks one of them, all stay as
they are: a warning says so, once, and LM calls outside of anyio's worker threads give their text whole.

Two methods are public, and replaced in any version. `Tool.acall` calls a synchronous function on the event loop; in a
run it calls it on a thread (G3), whatever module the tool is in. `Predict.forward` and `aforward` call the LM that the
predictor has, or DSPy's settings; in an agent's run they call what `MODELS_SETTING` makes of it, so that nobody's
predictors need to be changed.

All this happens when the first run begins, once in a process. Outside of runs everything does what DSPy does. LMs and
their engines are not touched.
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

from agents.streaming.sink import Sink
from agents.threads import is_async_callable, unblocking

TESTED = "3.4."
"""What the versions of DSPy start with that this was tested with."""

RUN_SETTING = "agentcast_run"
"""Key of the innermost bridge in DSPy's settings, which DSPy also carries into the threads of `dspy.Parallel`."""
EMITTER_SETTING = "agentcast_emitter"
"""Key in DSPy's settings of the emitter that tools use (`agents.current`)."""
MODELS_SETTING = "agentcast_models"
"""Key in DSPy's settings of a function from an LM to the one that a predictor calls in its place."""

T = TypeVar("T")

_worker: Any = getattr(_eventloop, "threadlocals", threading.local())
"""Where anyio notes what its worker threads belong to."""

_log = logging.getLogger(__name__)
_lock = threading.Lock()


def install() -> bool:
    """Replace what is to be replaced, if that was not yet done; whether the private names are replaced now."""
    with _lock:
        _replace_methods()
        return _replace_names()


@functools.cache
def _replace_methods() -> None:
    dspy.Tool.acall = _on_a_thread(dspy.Tool.acall)
    dspy.Predict.forward = _with_model(dspy.Predict.forward)
    dspy.Predict.aforward = _with_model_awaited(dspy.Predict.aforward)


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


# -- Methods -----------------------------------------------------------------------------------------------------------


def _on_a_thread(acall: Callable[..., Any]) -> Callable[..., Any]:
    """`Tool.acall` that in a run calls a synchronous function on a thread."""

    @functools.wraps(acall)
    async def call(tool: Any, /, **args: Any) -> Any:
        in_run = dspy.settings.get(RUN_SETTING) is not None or dspy.settings.get(EMITTER_SETTING) is not None
        if in_run and not is_async_callable(tool.func):
            function, tool = tool.func, tool.model_copy()
            tool.func = unblocking(function, f"tool {tool.name}")
        return await acall(tool, **args)

    return call


def _with_model(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`Predict.forward` that calls the LM that `MODELS_SETTING` gives."""

    @functools.wraps(forward)
    def call(predictor: Any, /, **inputs: Any) -> Any:
        return forward(predictor, **_modelled(predictor, inputs))

    return call


def _with_model_awaited(aforward: Callable[..., Any]) -> Callable[..., Any]:
    """`Predict.aforward` likewise."""

    @functools.wraps(aforward)
    async def call(predictor: Any, /, **inputs: Any) -> Any:
        return await aforward(predictor, **_modelled(predictor, inputs))

    return call


def _modelled(predictor: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    models = dspy.settings.get(MODELS_SETTING)
    if models is None:
        return inputs
    lm = inputs.get("lm", predictor.lm) or dspy.settings.lm
    return inputs if lm is None else {**inputs, "lm": models(lm)}


# -- Private names -----------------------------------------------------------------------------------------------------


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
