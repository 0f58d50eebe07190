"""How DSPy's programs and LMs are called. This module must not know runs or events."""

from collections.abc import Callable, Set
from typing import Any

import anyio
import anyio.lowlevel
import dspy
from dspy.experimental import Choice, Noul, Score

from agentcast.agents._dspy.names import as_worker_thread, has_engine_of_its_own
from agentcast.agents.threads import in_thread

LINGER = 2.0
"""Seconds that a stopped program in a thread gets to notice it, before it counts as left behind."""


def is_async(program: Any) -> bool:
    """Whether `program` has an `aforward` that does what its `forward` does: one that is not inherited from a class
    above the one that defines its `forward`."""
    return _comes_first(program, {"aforward"}, {"forward"})


def can_be_awaited(lm: Any) -> bool:
    """Whether awaiting `lm` does what calling it does: whether it has an asynchronous side, and one that is no older
    than its synchronous one. What is no `dspy.BaseLM` is taken to have one."""
    if not isinstance(lm, dspy.BaseLM):
        return True
    return not has_engine_of_its_own(lm) and _comes_first(lm, {"aforward", "acall"}, {"forward", "__call__"})


def _comes_first(instance: Any, asynchronous: Set[str], synchronous: Set[str]) -> bool:
    """Whether one of the `asynchronous` methods is defined no higher up among the classes than the `synchronous`."""
    for namespace in (vars(instance), *map(vars, type(instance).__mro__)):
        if not asynchronous.isdisjoint(namespace):
            return True
        if not synchronous.isdisjoint(namespace):
            return False
    return False


async def call_in_thread(program: Callable[[], Any], name: str, limiter: anyio.CapacityLimiter | None = None) -> Any:
    """What `program()` returns, called in a thread; see `threads.in_thread`. By default that thread takes nobody's
    place in a pool: a program would hold one while its tools wait for theirs."""
    with anyio.CancelScope() as scope:
        token = anyio.lowlevel.current_token()

        def call() -> Any:
            with as_worker_thread(token, scope):
                return program()

        return await in_thread(call, name, limiter=limiter or anyio.CapacityLimiter(1), linger=LINGER)


def annotations(signature: Any) -> dict[str, Any]:
    """The output fields of `signature`: name → annotation."""
    return {field: info.annotation for field, info in signature.output_fields.items()}


def submits(module: Any) -> bool:
    """Whether `module` is a loop whose answer is what its tool `submit` is called with: a `dspy.ReActV2`, which is
    `dspy.ReAct` from DSPy 3.5 on. It is known by its parts, not by either name."""
    is_loop = isinstance(getattr(module, "react", None), dspy.Predict) and not hasattr(module, "extract")
    return is_loop and "submit" in getattr(module, "tools", ())


def ending_tool(module: Any) -> str | None:
    """The name of the tool with which the loop `module` ends. It is no tool of the user's."""
    if submits(module):
        return "submit"
    return "finish" if isinstance(module, dspy.ReAct) else None


def decides(predictor: Any) -> bool:
    """Whether `predictor` has decision outputs, which DSPy refuses to make while streaming."""
    lm = predictor.lm or dspy.settings.lm
    if predictor.fields or getattr(lm, "supports_decision_requests", False) is True:
        return True
    fields = predictor.signature.output_fields.values()
    types = [annotation for info in fields for annotation in (info.annotation, *info.metadata)]
    return any(isinstance(each, type) and issubclass(each, Choice | Noul | Score) for each in types)
