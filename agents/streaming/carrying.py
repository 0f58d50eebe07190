"""Taking a run along into threads that know nothing of it."""

import contextvars
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def carrying(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, to be called elsewhere but as if here: `pool.submit(carrying(program), question="…")`.

    A `concurrent.futures` pool and a `threading.Thread` begin without context, so that what DSPy does there belongs to
    no run and knows no settings. (`asyncio.to_thread`, `anyio.to_thread` and `dspy.Parallel` take it along.)
    """
    context = contextvars.copy_context()

    @functools.wraps(function)
    def carried(*args: P.args, **named: P.kwargs) -> T:
        return context.copy().run(function, *args, **named)

    return carried
