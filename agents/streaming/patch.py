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
import inspect
import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import anyio
import anyio.from_thread
import dspy
from anyio._core import _eventloop
from anyio.lowlevel import EventLoopToken
from dspy.clients import _deprecation, execution
from dspy.utils.callback import with_callbacks

from agentcast.agents.base import public_message
from agentcast.agents.streaming.memos import call_args, handler_name, is_short, is_valid, trajectory_signature, type_adapter, wrapper_model
from agentcast.agents.streaming.sink import ChunkJoiner, Sink

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


# -- What DSPy works out anew at each call ---------------------------------------------------------------------------------


def _validating(original: Callable[..., Any], in_run: Callable[[], bool]) -> Callable[..., Any]:
    def validate(instance: Any, schema: Any) -> None:
        if not (in_run() and is_valid(instance, schema)):
            original(instance=instance, schema=schema)

    return validate


def _wrapping(original: Callable[..., Any], in_run: Callable[[], bool]) -> Callable[..., Any]:
    def create_model(name: str, /, **fields: Any) -> Any:
        annotation, default = fields.get("value", (None, None))
        if not in_run() or name != "Wrapper" or len(fields) != 1 or default is not ...:
            return original(name, **fields)
        return wrapper_model(annotation)

    return create_model


def _adapting(original: Callable[..., Any], in_run: Callable[[], bool]) -> Callable[..., Any]:
    def adapter(annotation: Any) -> Any:
        return type_adapter(annotation) if in_run() else original(annotation, _parent_depth=3)

    return adapter


def _serializing(original: Callable[..., Any], in_run: Callable[[], bool]) -> Callable[..., Any]:
    def serialize_for_json(value: Any) -> Any:
        return value if type(value) is str and in_run() else original(value)

    return serialize_for_json


def _formatting(original: Callable[..., Any], in_run: Callable[[], bool]) -> Callable[..., Any]:
    def _format_trajectory(loop: Any, trajectory: dict[str, Any]) -> Any:
        if not in_run():
            return original(loop, trajectory)
        adapter = dspy.settings.adapter or dspy.ChatAdapter()
        return adapter.format_user_message_content(trajectory_signature(tuple(trajectory)), trajectory)

    return _format_trajectory


def _telling(original: Callable[..., Any], in_run: Callable[[], bool]) -> Callable[..., Any]:
    def format_error_for_lm(error: BaseException, *, traceback_frames: int = 0) -> str:
        return public_message(error) if in_run() else original(error, traceback_frames=traceback_frames)

    return format_error_for_lm


class _Uuid:
    """The module `uuid`, as DSPy's callbacks see it: ids of calls need no randomness of the system's."""

    def __init__(self, original: Any, in_run: Callable[[], bool]) -> None:
        self._original = original
        self._in_run = in_run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def uuid4(self) -> Any:
        return _CallId() if self._in_run() else self._original.uuid4()


class _CallId:
    def __init__(self) -> None:
        self.hex = f"{random.getrandbits(128):032x}"  # noqa: S311 -- nobody guesses them


class _Inspect:
    """The module `inspect`, as DSPy's callbacks see it."""

    def __init__(self, original: Any, in_run: Callable[[], bool]) -> None:
        self._original = original
        self._in_run = in_run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def getcallargs(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> dict[str, Any]:
        found = call_args(function, args, named) if self._in_run() else None
        return self._original.getcallargs(function, *args, **named) if found is None else found


def _choosing(original: Callable[..., Any], in_run: Callable[[], bool]) -> Callable[..., Any]:
    def handler(callback: Any, instance: Any, function: Callable[..., Any]) -> Any:
        if not in_run():
            return original(callback, instance, function)
        return getattr(callback, handler_name(original, instance, function))

    return handler


def _bridging(original: Callable[..., Any], in_run: Callable[[], bool]) -> Callable[..., Any]:
    def bridge(model: Any, predict_id: Any = None) -> Any:
        sink = dspy.settings.send_stream
        full = original(model, predict_id)
        return ChunkJoiner(full, sink) if isinstance(sink, Sink) and sink.joins else full

    return bridge


def _calling(original: Callable[..., Any], in_run: Callable[[], bool]) -> Callable[..., Any]:
    """`BaseLM.acall` that prepares a prompt of a moderate size where it is, rather than in a thread."""
    plain: Callable[..., Any] = inspect.unwrap(original)

    @with_callbacks
    @functools.wraps(plain)
    async def acall(lm: Any, prompt: Any = None, *, messages: Any = None, **options: Any) -> Any:
        if not in_run() or "request" in options or not is_short(messages):
            return await plain(lm, prompt, messages=messages, **options)
        call = execution.prepare(lm, prompt, messages, options, asynchronous=True)
        if not call.managed:
            _deprecation.warn_legacy_lm()
        _deprecation.warn_openai_messages(lm, messages)
        return execution.finalize(lm, call, await execution.aexecute(lm, call))

    return acall


class _Asyncio:
    def __init__(self, original: Any, in_run: Callable[[], bool]) -> None:
        self._original = original
        self._in_run = in_run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    async def to_thread(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
        if function is execution._price_result and args[3] is None and self._in_run():
            return function(*args, **named)
        return await self._original.to_thread(function, *args, **named)


_IN_RUNS: dict[tuple[str, str], Callable[..., Any]] = {
    ("dspy.adapters.types.tool", "validate"): _validating,
    ("dspy.adapters.types.tool", "create_model"): _wrapping,
    ("dspy.adapters.utils", "TypeAdapter"): _adapting,
    ("dspy.adapters.utils", "serialize_for_json"): _serializing,
    ("dspy.adapters.xml_adapter", "TypeAdapter"): _adapting,
    ("dspy.adapters.xml_adapter", "serialize_for_json"): _serializing,
    ("dspy.predict.react", "ReAct._format_trajectory"): _formatting,
    ("dspy.predict.react", "format_error_for_lm"): _telling,
    ("dspy.predict.react_v2", "format_error_for_lm"): _telling,
    ("dspy.utils.callback", "uuid"): _Uuid,
    ("dspy.utils.callback", "inspect"): _Inspect,
    ("dspy.utils.callback", "_get_on_start_handler"): _choosing,
    ("dspy.utils.callback", "_get_on_end_handler"): _choosing,
    ("dspy.clients.execution", "ListenerBridge"): _bridging,
    ("dspy.clients.execution", "asyncio"): _Asyncio,
    ("dspy.clients.base_lm", "BaseLM.acall"): _calling,
}


@functools.cache
def replace_in_runs(in_run: Callable[[], bool]) -> None:
    for (place, path), made in _IN_RUNS.items():
        owner = importlib.import_module(place)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, made(getattr(owner, name), in_run))


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
