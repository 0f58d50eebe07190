"""What DSPy does not tell of its calls: whether one can stream.

This module must not know runs or events.
"""

import asyncio
import inspect
import sys
from types import FrameType
from typing import Any

import anyio
import anyio.from_thread
import dspy
from dspy.experimental import Choice, Noul, Score
from dspy.utils.callback import BaseCallback


def can_stream(lm: Any) -> bool:
    """Whether the call of `lm` whose start callback is running can send chunks."""
    awaited = _is_awaited()
    engine = getattr(lm, "_async_engine_spec", None) if awaited else getattr(lm, "engine", None)
    if engine is not None and not isinstance(engine, str) and not callable(getattr(engine, "stream", None)):
        return False
    return awaited or _is_worker_thread()


def _is_awaited() -> bool:
    """Whether the call whose start callback is running is a coroutine. Callbacks are not told; but the wrapper in which
    DSPy runs them is a coroutine if the call is, and is on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals["__name__"] != BaseCallback.__module__:
        frame = frame.f_back
    while frame is not None and frame.f_globals["__name__"] == BaseCallback.__module__:
        if frame.f_code.co_flags & inspect.CO_COROUTINE:
            return True
        frame = frame.f_back
    return False


def _is_worker_thread() -> bool:
    """Whether this thread is anyio's, from which DSPy's synchronous streaming can reach the loop."""
    try:
        anyio.from_thread.check_cancelled()
    except anyio.NoEventLoopError:
        return False
    except asyncio.CancelledError:
        pass
    return True


def decides(predictor: Any) -> bool:
    """Whether `predictor` has decision outputs, which DSPy refuses to make while streaming."""
    lm = predictor.lm or dspy.settings.lm
    if predictor.fields or getattr(lm, "supports_decision_requests", False) is True:
        return True
    fields = predictor.signature.output_fields.values()
    types = [annotation for info in fields for annotation in (info.annotation, *info.metadata)]
    return any(isinstance(each, type) and issubclass(each, Choice | Noul | Score) for each in types)
