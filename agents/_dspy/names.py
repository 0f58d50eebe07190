"""The private names that are used, and the two that are replaced so that every thread streams.

Private is what neither is exported at the top of its package nor documented. `PRIVATE` lists them with the reason, and
the suite holds each of them against what is installed.

Two things are replaced, because there is no other way. DSPy hands the chunks of a synchronous LM call over with
`anyio.from_thread.run`, which works in anyio's worker threads only: in a thread of `dspy.Parallel`, of a pool or of
`asyncio.to_thread`, the LM call itself fails. And its status callback uses `sync_send_to_stream`, which on the event
loop blocks the loop until a consumer that needs the loop has made room. Both hand chunks of our own streams over
directly instead. This happens when the first run begins, once in a process, and for the streams of runs only; LMs and
their engines are not touched. In a version of DSPy that this was not checked with, or that lacks one of the replaced
names, all stay as they are: a warning says so, once, and LM calls outside of anyio's worker threads give their text
whole.

This module must not know runs or events.
"""

import asyncio
import functools
import importlib
import importlib.util
import inspect
import logging
import shutil
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import anyio
import anyio.from_thread
import dspy
from anyio._core import _eventloop
from anyio.lowlevel import EventLoopToken
from dspy.adapters.utils import format_field_value
from dspy.clients.backend_selection import select_backend
from dspy.clients.call_context import adapter_fallback_scope
from dspy.clients.engines.streaming import EngineChunk
from dspy.dsp.utils.settings import thread_local_overrides
from dspy.primitives import resolve_interpreter_factory
from dspy.streaming.messages import StatusStreamingCallback
from dspy.streaming.streaming_listener import find_predictor_for_stream_listeners
from dspy.utils.callback import BaseCallback
from dspy.utils.usage_tracker import UsageTracker

from agentcast.agents.threads import run_to_end

__all__ = [
    "CHECKED",
    "PRIVATE",
    "StatusStreamingCallback",
    "ThreadStream",
    "UsageTracker",
    "adapter_fallback_scope",
    "as_worker_thread",
    "find_predictor_for_stream_listeners",
    "format_field_value",
    "get_setting",
    "has_engine_of_its_own",
    "install",
    "is_awaited",
    "is_lm_chunk",
    "missing_runtime",
    "reaches_stream",
    "select_backend",
    "set_settings",
    "streams",
]

CHECKED = {"dspy": "3.4.", "anyio": "4.16"}
"""What the versions begin with that these names were checked against."""

PRIVATE: Mapping[str, str] = {
    "anyio._core._eventloop.threadlocals": "from_thread in a thread that is not anyio's",
    "dspy.clients.execution.anyio": "replaced, see above",
    "dspy.clients.lm.anyio": "replaced, for the calls that LiteLLM makes",
    "dspy.streaming.messages.sync_send_to_stream": "replaced, see above",
    "dspy.streaming.messages.StatusStreamingCallback": "whether DSPy reports statuses itself",
    "dspy.streaming.streaming_listener.find_predictor_for_stream_listeners": "what dspy.streamify does first",
    "dspy.dsp.utils.settings.thread_local_overrides": "a setting for the length of a call that callbacks report",
    "dspy.clients.engines.streaming.EngineChunk": "whether something is a chunk of an LM",
    "dspy.clients.call_context.adapter_fallback_scope": "whether a failed LM call has shown text",
    "dspy.clients.backend_selection.select_backend": "which client serves a model, without a call",
    "dspy.clients.lm.LM._async_engine_spec": "whether an awaited call streams; set by __init__",
    "dspy.predict.rlm.RLM._interpreter_factory": "whether a module runs code; set by __init__",
    "dspy.primitives.resolve_interpreter_factory": "with what a module runs code",
    "dspy.utils.usage_tracker.UsageTracker": "the usage of a run's LM calls",
    "dspy.utils.callback.with_callbacks": "its wrapper is a coroutine exactly if the call is, and is on the stack",
    "dspy.adapters.utils.format_field_value": "how a value stands in a prompt",
}
"""Name → what it is needed for."""

T = TypeVar("T")

_worker: Any = getattr(_eventloop, "threadlocals", threading.local())
"""Where anyio notes what its worker threads belong to."""

_log = logging.getLogger(__name__)
_lock = threading.Lock()


class ThreadStream(ABC):
    """A `send_stream` that takes chunks from any thread."""

    joins = False
    """Whether texts that an LM sends in one turn of the event loop may be joined."""

    @property
    @abstractmethod
    def congested(self) -> bool:
        """Whether the sender is to wait."""

    @abstractmethod
    def hold(self, flush: Callable[[], None]) -> None:
        """Texts of the LM call that the calling code is in are held back; `flush` sends them."""

    @abstractmethod
    async def send(self, chunk: Any) -> None: ...

    @abstractmethod
    def send_nowait(self, chunk: Any) -> None: ...


# -- Settings ----------------------------------------------------------------------------------------------------------


def get_setting(key: str) -> Any:
    """A setting of DSPy, or None. Inside a `dspy.context`, at a tenth of what `dspy.settings.get` takes: a run asks
    hundreds of times."""
    value = thread_local_overrides.get().get(key)
    return dspy.settings.get(key) if value is None else value


def set_settings(**settings: Any) -> None:
    """Set `settings` of DSPy for the calling context, until they are set again or the `dspy.context` around is left.

    For start and end callbacks: `dspy.context` has to be left in the reverse order, but DSPy calls the end callbacks of
    several objects in the order of their start callbacks.
    """
    overrides = thread_local_overrides.get()
    thread_local_overrides.set(type(overrides)({**overrides, **settings}))


# -- Replaced ----------------------------------------------------------------------------------------------------------


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
    if not found or not dspy.__version__.startswith(CHECKED["dspy"]):
        _log.warning(
            "DSPy %s was not checked with this version of agentcast (%sx was): "
            "tokens from dspy.Parallel and other foreign threads arrive whole, not streamed",
            dspy.__version__,
            CHECKED["dspy"],
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
        if isinstance(sink, ThreadStream):
            return sink.send_nowait(*args)
        if not isinstance(dspy.settings.send_stream, ThreadStream) or _is_worker_thread():
            return anyio.from_thread.run(func, *args, **options)
        return run_to_end(functools.partial(func, *args))


class _SendToStream:
    """`sync_send_to_stream`."""

    def __init__(self, original: Callable[[Any, Any], Any]) -> None:
        self._original = original

    def __call__(self, stream: Any, message: Any) -> Any:
        return stream.send_nowait(message) if isinstance(stream, ThreadStream) else self._original(stream, message)


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


# -- What DSPy does not say about its calls ----------------------------------------------------------------------------


def is_lm_chunk(value: Any) -> bool:
    """Whether `value` is a chunk as DSPy's LMs stream them, native or LiteLLM's."""
    kind = type(value)
    if isinstance(value, EngineChunk):
        return True
    return bool(kind.__name__ == "ModelResponseStream" and kind.__module__.startswith("litellm"))


def has_engine_of_its_own(lm: Any) -> bool:
    """Whether `lm` was given an engine for synchronous calls, and none for awaited ones."""
    engine = getattr(lm, "engine", None)
    return engine is not None and not isinstance(engine, str) and getattr(lm, "_async_engine_spec", None) is None


def streams(lm: Any) -> bool:
    """Whether the call of `lm` whose start callback is running can send chunks."""
    awaited = is_awaited()
    engine = getattr(lm, "_async_engine_spec", None) if awaited else getattr(lm, "engine", None)
    if engine is not None and not isinstance(engine, str) and not callable(getattr(engine, "stream", None)):
        return False
    return awaited or reaches_stream()


def is_awaited() -> bool:
    """Whether the call whose start callback is running is a coroutine. Callbacks do not learn it; but the wrapper in
    which DSPy runs them is a coroutine if the call is, and is on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals["__name__"] != BaseCallback.__module__:
        frame = frame.f_back
    while frame is not None and frame.f_globals["__name__"] == BaseCallback.__module__:
        if frame.f_code.co_flags & inspect.CO_COROUTINE:
            return True
        frame = frame.f_back
    return False


def missing_runtime(program: Any) -> str | None:
    """What a module in `program` needs to run code, and is not installed; None: nothing."""
    for path, part in program.named_sub_modules():
        factory = getattr(part, "_interpreter_factory", None)
        if factory is None or resolve_interpreter_factory(factory) is not dspy.PythonInterpreter:
            continue
        if shutil.which("deno") is None and importlib.util.find_spec("deno") is None:
            where = path.removeprefix("self").removeprefix(".")
            return f"{type(part).__name__}{f' ({where})' if where else ''} runs code with Deno, which is not installed"
    return None
