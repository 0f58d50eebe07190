"""The private names of DSPy that are replaced, because there is no other way, and the one of anyio that is used.

Two kinds: names without which nothing streams from foreign threads, and, in `IN_RUNS`, names that stand for something
else in runs: it computes once what DSPy computes at each call, and keeps tracebacks out of prompts.

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
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import anyio
import anyio.from_thread
import dspy
from anyio._core import _eventloop
from anyio.lowlevel import EventLoopToken
from dspy.utils.callback import with_callbacks

from agentcast.agents.base import public_message
from agentcast.agents.streaming.memos import (
    call_args,
    handler_name,
    is_short,
    is_valid,
    trajectory_signature,
    type_adapter,
    wrapper_model,
)
from agentcast.agents.streaming.sink import ChunkJoiner, Sink
from agentcast.agents.streaming.turns import take_turn

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


# -- Names that stand for something else in runs -----------------------------------------------------------------------

InRun = Callable[[], bool]
"""Whether the calling code is in a run."""


def _validating(original: Callable[..., Any], in_run: InRun) -> Callable[..., Any]:
    def validate(instance: Any, schema: Any) -> None:
        if not (in_run() and is_valid(instance, schema)):
            original(instance=instance, schema=schema)

    return validate


def _wrapping(original: Callable[..., Any], in_run: InRun) -> Callable[..., Any]:
    def create_model(name: str, /, **fields: Any) -> Any:
        annotation, default = fields.get("value", (None, None))
        if not in_run() or name != "Wrapper" or len(fields) != 1 or default is not ...:
            return original(name, **fields)
        return wrapper_model(annotation)

    return create_model


def _adapting(original: Callable[..., Any], in_run: InRun) -> Callable[..., Any]:
    def adapter(annotation: Any) -> Any:
        return type_adapter(annotation) if in_run() else original(annotation, _parent_depth=3)

    return adapter


def _serializing(original: Callable[..., Any], in_run: InRun) -> Callable[..., Any]:
    def serialize_for_json(value: Any) -> Any:
        return value if type(value) is str and in_run() else original(value)

    return serialize_for_json


def _formatting(original: Callable[..., Any], in_run: InRun) -> Callable[..., Any]:
    def _format_trajectory(loop: Any, trajectory: dict[str, Any]) -> Any:
        if not in_run():
            return original(loop, trajectory)
        adapter = dspy.settings.adapter or dspy.ChatAdapter()
        return adapter.format_user_message_content(trajectory_signature(tuple(trajectory)), trajectory)

    return _format_trajectory


def _telling(original: Callable[..., Any], in_run: InRun) -> Callable[..., Any]:
    def format_error_for_lm(error: BaseException, *, traceback_frames: int = 0) -> str:
        return public_message(error) if in_run() else original(error, traceback_frames=traceback_frames)

    return format_error_for_lm


def _finding(original: Callable[..., Any], in_run: InRun) -> Callable[..., Any]:
    def _get_fields_with_type(signature: Any, kind: str) -> dict[str, Any]:
        if not in_run():
            return original(signature, kind)  # type: ignore[no-any-return]
        fields = signature.__pydantic_fields__.items()
        return {name: info for name, info in fields if info.json_schema_extra["__dspy_field_type"] == kind}

    return _get_fields_with_type


def _choosing(original: Callable[..., Any], in_run: InRun) -> Callable[..., Any]:
    def choose_handler(callback: Any, instance: Any, function: Callable[..., Any]) -> Any:
        if not in_run():
            return original(callback, instance, function)
        return getattr(callback, handler_name(original, instance, function))

    return choose_handler


class _Module:
    """A module as some code of DSPy's sees it."""

    def __init__(self, original: Any, in_run: InRun) -> None:
        self._original = original
        self._in_run = in_run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class _Uuid(_Module):
    def uuid4(self) -> Any:
        return _CallId() if self._in_run() else self._original.uuid4()


class _CallId:
    def __init__(self) -> None:
        self.hex = f"{random.getrandbits(128):032x}"


class _Inspect(_Module):
    def getcallargs(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> dict[str, Any]:
        found = call_args(function, args, named) if self._in_run() else None
        return self._original.getcallargs(function, *args, **named) if found is None else found


class _Asyncio(_Module):
    async def to_thread(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
        # Its fourth argument is the provider; a custom engine has none, and then there is no price to look up.
        if function.__name__ == "_price_result" and args[3] is None and self._in_run():
            return function(*args, **named)
        return await self._original.to_thread(function, *args, **named)


def _bridging(original: Callable[..., Any], in_run: InRun) -> Callable[..., Any]:
    def bridge(model: Any, predict_id: Any = None) -> Any:
        sink, full = dspy.settings.send_stream, original(model, predict_id)
        is_awaited = sys._getframe(1).f_code.co_flags & inspect.CO_COROUTINE
        return ChunkJoiner(full, sink) if is_awaited and isinstance(sink, Sink) and sink.joins else full

    return bridge


def _calling(original: Callable[..., Any], in_run: InRun) -> Callable[..., Any]:
    plain: Callable[..., Any] = inspect.unwrap(original)
    execution: Any = importlib.import_module("dspy.clients.execution")
    deprecation: Any = importlib.import_module("dspy.clients._deprecation")

    @with_callbacks  # type: ignore[untyped-decorator]
    @functools.wraps(plain)
    async def acall(lm: Any, prompt: Any = None, *, messages: Any = None, **options: Any) -> Any:
        if not in_run() or "request" in options or not is_short(messages):
            return await plain(lm, prompt, messages=messages, **options)
        call = execution.prepare(lm, prompt, messages, options, asynchronous=True)
        if not call.managed:
            deprecation.warn_legacy_lm()
        deprecation.warn_openai_messages(lm, messages)
        result = await execution.aexecute(lm, call)
        await take_turn()
        return execution.finalize(lm, call, result)

    return acall  # type: ignore[no-any-return]


class _InRuns(NamedTuple):
    """A private name of DSPy's that stands for something else in runs."""

    module: str
    name: str
    why: str
    made: Callable[[Any, InRun], Any]
    needs: tuple[str, ...] = ()
    """Private names, in their modules, that the replacement uses."""


_VALIDATE = "jsonschema checks the tool's schema itself again for each argument of each call"
_TYPES = "building a pydantic validator takes 100 times as long as using it"
_TEXTS = "a text is its own JSON value"
_ERRORS = "a traceback with the server's paths would go into the prompt (G9)"
_FIELDS = "it is asked for a hundred times in a run, and goes through a property of pydantic's that checks who asks"
_KINDS = "one of the checks of kinds is for a protocol, which takes longer than the others together"
_LM_PARTS = tuple(f"dspy.clients.execution.{name}" for name in ("prepare", "aexecute", "finalize"))
_LM_WARNS = tuple(f"dspy.clients._deprecation.{name}" for name in ("warn_legacy_lm", "warn_openai_messages"))

IN_RUNS = (
    _InRuns("dspy.adapters.types.tool", "validate", _VALIDATE, _validating),
    _InRuns("dspy.adapters.types.tool", "create_model", _TYPES, _wrapping),
    _InRuns("dspy.adapters.utils", "TypeAdapter", _TYPES, _adapting),
    _InRuns("dspy.adapters.xml_adapter", "TypeAdapter", _TYPES, _adapting),
    _InRuns("dspy.adapters.utils", "serialize_for_json", _TEXTS, _serializing),
    _InRuns("dspy.adapters.xml_adapter", "serialize_for_json", _TEXTS, _serializing),
    _InRuns("dspy.predict.react", "ReAct._format_trajectory", "each step builds a model of 4n fields", _formatting),
    _InRuns("dspy.predict.react", "format_error_for_lm", _ERRORS, _telling),
    _InRuns("dspy.predict.react_v2", "format_error_for_lm", _ERRORS, _telling),
    _InRuns("dspy.signatures.signature", "SignatureMeta._get_fields_with_type", _FIELDS, _finding),
    _InRuns("dspy.utils.callback", "_get_on_start_handler", _KINDS, _choosing),
    _InRuns("dspy.utils.callback", "_get_on_end_handler", _KINDS, _choosing),
    _InRuns("dspy.utils.callback", "uuid", "the system's randomness costs a system call", _Uuid),
    _InRuns("dspy.utils.callback", "inspect", "signatures are read anew for each call", _Inspect),
    _InRuns("dspy.clients.execution", "ListenerBridge", "chunks that nobody can tell apart", _bridging),
    _InRuns("dspy.clients.execution", "asyncio", "a thread for a price that is not known", _Asyncio),
    _InRuns("dspy.clients.base_lm", "BaseLM.acall", "a thread to check texts", _calling, (*_LM_PARTS, *_LM_WARNS)),
)
"""All of them, as of the versions that `TESTED` says. In any other, or where one is missing, DSPy's own stay."""


@functools.cache
def replace_in_runs(in_run: InRun) -> None:
    """Have the names of `IN_RUNS` stand for something else wherever `in_run`, once in a process."""
    missing = [f"{entry.module}.{entry.name}" for entry in IN_RUNS if not _replace_in_runs(entry, in_run)]
    if missing:
        _log.warning(
            "DSPy %s is not as agentcast knows it (%sx): runs are slower, and %s stay as they are",
            dspy.__version__,
            TESTED,
            ", ".join(missing),
        )


def _replace_in_runs(entry: _InRuns, in_run: InRun) -> bool:
    if not dspy.__version__.startswith(TESTED):
        return False
    *parents, name = entry.name.split(".")
    try:
        owner = functools.reduce(getattr, parents, importlib.import_module(entry.module))
        original = getattr(owner, name)
        for needed in entry.needs:
            module, _, attribute = needed.rpartition(".")
            getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        return False
    setattr(owner, name, entry.made(original, in_run))
    return True


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
