"""Names of DSPy that stand for something else in runs: what it computes at each call although the result is the same is
computed once, and tracebacks stay out of prompts. Everywhere else they are DSPy's own.

`IN_RUNS` is their table.
"""

import asyncio
import functools
import importlib
import inspect
import logging
import random
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import dspy
from dspy.utils.callback import with_callbacks

from agentcast.agents._dspy.memos import (
    call_args,
    handler_name,
    is_short,
    is_valid,
    trajectory_signature,
    type_adapter,
    wrapper_model,
)
from agentcast.agents._dspy.names import CHECKED, ThreadStream
from agentcast.agents.base import Stopped, public_message
from agentcast.agents.turns import take_turn, this_loops_turns

_log = logging.getLogger(__name__)

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


def _formatting_errors(original: Callable[..., Any], in_run: InRun) -> Callable[..., Any]:
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
        self.hex = f"{_random.getrandbits(128):032x}"


_random = random.Random()  # noqa: S311 -- ids, no secrets; its own: a program may seed Python's, and then expects its numbers


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


# -- Chunks of text


CROWDED = 0.02
"""Seconds in which texts are joined while runs wait for their turn to compute; a hub's log joins them for 0.025."""


class _Text:
    """What a reader sees of a chunk of text."""

    __slots__ = ("choices",)

    def __init__(self, text: str) -> None:
        self.choices = (_Choice(text),)


class _Choice:
    __slots__ = ("delta",)
    index = 0
    finish_reason = None

    def __init__(self, text: str) -> None:
        self.delta = _Delta(text)


class _Delta:
    __slots__ = ("content",)

    def __init__(self, content: str) -> None:
        self.content = content


class ChunkJoiner:
    """DSPy's maker of chunks, `full`, but one that joins the texts which arrive in one turn of the event loop: there is
    nobody yet who could read them apart. While runs wait for a turn to compute, it joins those of `CROWDED` seconds.
    The first text goes at once, and so does what is no text."""

    def __init__(self, full: Any, sink: ThreadStream) -> None:
        self._full = full
        self._sink = sink
        self._texts: list[str] = []
        """What waits until the end of this turn."""
        self._started = False
        self._stopped: Stopped | None = None
        self._turns = this_loops_turns()
        sink.hold(self.flush)

    def chunk(self, event: Any) -> Any:
        """The chunk to send now, if there is one.

        :raises Stopped: the run is over.
        """
        if event.type == "delta" and event.delta.type == "text":
            self._texts.append(event.delta.text)
            return None if len(self._texts) > 1 and self._may_join else self._first()
        self.flush()
        if self._stopped is not None:
            raise self._stopped
        return self._full.chunk(event)

    def _first(self) -> Any:
        """What to do with the first text of a turn, and with one that makes too many."""
        if self._stopped is not None:
            raise self._stopped
        if self._started and self._may_join:
            asyncio.get_running_loop().call_soon(self._end_turn)
            return None
        self._started = True
        return self._joined()

    @property
    def _may_join(self) -> bool:
        """A text that is returned is awaited, which is how the LM call is held back."""
        return len(self._texts) < _JOINED and not self._sink.congested

    def _end_turn(self) -> None:
        if self._turns.is_crowded:
            asyncio.get_running_loop().call_later(CROWDED, self.flush)
        else:
            self.flush()

    def flush(self) -> None:
        """Send what waits: the turn is over, or the LM call."""
        if self._texts:
            try:
                self._sink.send_nowait(self._joined())
            except Stopped as error:
                self._stopped = error

    def _joined(self) -> _Text:
        text = "".join(self._texts)
        self._texts.clear()
        return _Text(text)


_JOINED = 64
"""Texts that are joined at most, before the LM call may be held back."""


def _bridging(original: Callable[..., Any], in_run: InRun) -> Callable[..., Any]:
    def bridge(model: Any, predict_id: Any = None) -> Any:
        sink, full = dspy.settings.send_stream, original(model, predict_id)
        is_awaited = sys._getframe(1).f_code.co_flags & inspect.CO_COROUTINE
        return ChunkJoiner(full, sink) if is_awaited and isinstance(sink, ThreadStream) and sink.joins else full

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
    _InRuns("dspy.predict.react", "format_error_for_lm", _ERRORS, _formatting_errors),
    _InRuns("dspy.predict.react_v2", "format_error_for_lm", _ERRORS, _formatting_errors),
    _InRuns("dspy.signatures.signature", "SignatureMeta._get_fields_with_type", _FIELDS, _finding),
    _InRuns("dspy.utils.callback", "_get_on_start_handler", _KINDS, _choosing),
    _InRuns("dspy.utils.callback", "_get_on_end_handler", _KINDS, _choosing),
    _InRuns("dspy.utils.callback", "uuid", "the system's randomness costs a system call", _Uuid),
    _InRuns("dspy.utils.callback", "inspect", "signatures are read again for each call", _Inspect),
    _InRuns("dspy.clients.execution", "ListenerBridge", "chunks that nobody can tell apart", _bridging),
    _InRuns("dspy.clients.execution", "asyncio", "a thread for a price that is not known", _Asyncio),
    _InRuns("dspy.clients.base_lm", "BaseLM.acall", "a thread to check texts", _calling, (*_LM_PARTS, *_LM_WARNS)),
)
"""All of them, as of the versions that `CHECKED` says. In any other, or where one is missing, DSPy's own stay."""


@functools.cache
def replace_in_runs(in_run: InRun) -> None:
    """Have the names of `IN_RUNS` stand for something else wherever `in_run`, once in a process."""
    missing = [f"{entry.module}.{entry.name}" for entry in IN_RUNS if not _replace_in_runs(entry, in_run)]
    if missing:
        _log.warning(
            "DSPy %s is not as agentcast knows it (%sx): runs are slower, and %s stay as they are",
            dspy.__version__,
            CHECKED["dspy"],
            ", ".join(missing),
        )


def _replace_in_runs(entry: _InRuns, in_run: InRun) -> bool:
    if not dspy.__version__.startswith(CHECKED["dspy"]):
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
