"""Which run the calling code is part of: one frozen `RunContext`, for code that is not handed an `Emitter`.

It is one of DSPy's settings, because these reach further than a context variable: DSPy carries them into the threads of
`dspy.Parallel`, too. Code changes the context for what it calls (`within`), never for its caller, so that runs, and
calls that go on at once in one run, cannot mix (G8).

This module must not know how events travel, or how DSPy reports its calls.
"""

import contextvars
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, Protocol, TypeVar

import dspy

from agentcast.agents._dspy.names import get_setting
from agentcast.agents.base import Emitter, Task
from agentcast.agents.events import AgentEvent, Status

SETTING = "agentcast"
"""The key of the `RunContext` in DSPy's settings."""


P = ParamSpec("P")
T = TypeVar("T")


class Observer(Protocol):
    """Sees the calls of a program: a bridge of `agentcast.agents.streaming`."""

    retracts: bool
    """Whether text that an LM call has streamed is void once the call fails, so that the call may be made again."""

    async def room(self) -> None:
        """Wait while the run is held back, on any event loop."""

    def wait(self, seconds: float) -> None:
        """Wait in a thread.

        :raises Stopped: the run is over, as soon as it is.
        """


class Numbers:
    """The numbers of a run's spans and messages."""

    def __init__(self) -> None:
        self.spans = itertools.count(1)
        self.messages = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """The run that code is part of. Outside of any run every field has its default."""

    emitter: Emitter | None = None
    """Where the run's events go."""
    numbers: Numbers = field(default_factory=Numbers, compare=False)
    """Of what goes there."""
    task: Task | None = None
    """What the run is asked to do, if a hub runs it."""
    span: str | None = None
    """The span that the code is in."""
    observer: Any = None
    """The innermost `Observer`: programs may be streamed inside a run."""
    calls: Mapping[Any, Any] = field(default_factory=dict)
    """Of each `Observer`, outer ones too, the call that the code is in, in a form of its own."""
    callers: Any = None
    """DSPy's `caller_modules` as the running tool was called; in the tool itself they are the same list."""
    models: Callable[[Any], Any] | None = None
    """Gives for an LM the one that is called in its place."""
    retrying: Any = None
    """How failed LM calls are retried: a `Retrying` of `agentcast.agents.llm`."""

    def __bool__(self) -> bool:
        """Whether there is a run."""
        return self.emitter is not None or self.observer is not None


_OUTSIDE = RunContext()


def current() -> RunContext:
    """The context of the calling code."""
    context: RunContext | None = get_setting(SETTING)
    return _OUTSIDE if context is None else context


@contextmanager
def within(**changes: Any) -> Iterator[None]:
    """Inside, the context has these fields changed."""
    with dspy.context(**{SETTING: replace(current(), **changes)}):
        yield


def emit_event(event: AgentEvent) -> None:
    """Emit `event` in the run that calls, from a coroutine, a callback or a thread; outside of any run, do nothing.

    :raises Stopped: the run has ended, or is to end now.
    """
    emitter = current().emitter
    if emitter is not None:
        emitter.nowait(event)


def status(message: str) -> None:
    """Say in words what is going on, to everyone who watches the run: `status("Reading guide.md")`.

    :raises Stopped: as `emit_event`.
    """
    context = current()
    if context.emitter is not None:
        context.emitter.nowait(Status(message=message, span=context.span))


async def wait_for_room() -> None:
    """Wait while the run that the calling code is in is held back (G5). To be awaited before something is emitted in a
    task of the run, which nothing else holds back."""
    observer: Observer | None = current().observer
    if observer is not None:
        await observer.room()


def wait_in_thread(seconds: float) -> None:
    """Wait in a thread, for no longer than the run goes on that the calling code is in.

    :raises Stopped: the run is over.
    """
    observer: Observer | None = current().observer
    if observer is None:
        time.sleep(seconds)
    else:
        observer.wait(seconds)


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
