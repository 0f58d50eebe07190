"""Holding a run back while its channel is congested (G5), without ever blocking the event loop (G3).

`drive` steps the agent's coroutine by hand: it is not resumed until there is room. That holds back one coroutine, and
50 gathered sub-calls would still fill the channel without bound, so a task factory does the same for each task that is
created inside the run. Driving by hand also means that a run can be left behind: it is just never resumed again.

asyncio, not anyio, on purpose: stepping coroutines and wrapping tasks has no anyio counterpart.
"""

import asyncio
import ctypes
import inspect
import types
from collections.abc import Callable, Coroutine, Generator
from contextvars import ContextVar
from typing import Any, TypeVar

from agentcast.agents.base import Stopped
from agentcast.agents.channel import Channel

T = TypeVar("T")

_current: ContextVar[Channel | None] = ContextVar("agentcast_channel", default=None)


async def drive(run: Coroutine[Any, Any, T], channel: Channel, *, on_cancel: Callable[[], None] | None = None) -> T:
    """Await `run`, holding it and every task that it creates back while `channel` is congested.

    `on_cancel` is called as a cancellation is about to be thrown into `run`.

    :raises Stopped: the channel was abandoned; `run` was closed instead of being resumed.
    """
    _install_gate(asyncio.get_running_loop())
    token = _current.set(channel)
    try:
        return await _step(run, channel, on_cancel)
    finally:
        _current.reset(token)


@types.coroutine
def _step(
    run: Coroutine[Any, Any, T], channel: Channel, on_cancel: Callable[[], None] | None = None
) -> Generator[Any, Any, T]:
    """Step `run`, passing on the futures that it waits for and whatever is thrown in. Cancellation passes the gate."""
    error: BaseException | None = None
    while True:
        if error is None:
            error = yield from _pass_gate(channel)
        if channel.abandoned:
            _drop(run)
            raise Stopped from error
        if on_cancel is not None and isinstance(error, asyncio.CancelledError):
            on_cancel()
        try:
            waiting_for = _resume(run, channel, error)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        error = None
        try:
            yield waiting_for
        except GeneratorExit:
            run.close()
            raise
        except BaseException as thrown:  # noqa: BLE001 -- handed on to `run` above
            error = thrown


def _pass_gate(channel: Channel) -> Generator[Any, Any, BaseException | None]:
    """Wait while `channel` is congested; gives what was thrown in meanwhile."""
    try:
        while channel.congested:
            yield from channel.room()
    except BaseException as thrown:  # noqa: BLE001 -- handed on to the run
        return thrown
    return None


def _resume(run: Coroutine[Any, Any, T], channel: Channel, error: BaseException | None) -> Any:
    """One step of `run`: the future that it waits for next. Raises `StopIteration` when it returns."""
    Channel.resumed = channel
    try:
        return run.send(None) if error is None else run.throw(error)
    finally:
        Channel.resumed = None


def _drop(run: Coroutine[Any, Any, Any]) -> None:
    """Close `run`; one that ignores even GeneratorExit is kept for good, unresumed.

    Python resumes a suspended coroutine once more to collect it, also at the interpreter's exit, where one that
    swallows everything would spin for ever. So it gets a reference that nobody gives back.
    """
    links = [run]
    while (inner := getattr(links[-1], "cr_await", None)) is not None:
        links.append(inner)  # closing frees them one by one, and any of them may be the one that ignores it
    try:
        run.close()
    except RuntimeError:
        for link in links:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(link))


async def _gated(run: Coroutine[Any, Any, Any], channel: Channel) -> Any:
    try:
        return await _step(run, channel)
    except Stopped:
        if channel.abandoned:  # nobody waits for this task any more
            return None
        raise
    except (SystemExit, KeyboardInterrupt) as error:  # asyncio would end the event loop with it, and so the hub
        raise RuntimeError(f"a task of the agent raised {type(error).__name__}") from error


def _install_gate(loop: asyncio.AbstractEventLoop) -> None:
    """Make `loop` hold back the tasks that runs create, on top of the task factory that it has."""
    inner = loop.get_task_factory()
    if isinstance(inner, _Gate):
        return
    loop.set_task_factory(_Gate(inner))


class _Gate:
    """A task factory that wraps each task made inside a run. Other tasks pass untouched."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> Any:
        context = options.get("context")
        channel = _current.get() if context is None else context.get(_current)
        gated = coro if channel is None else _gated(coro, channel)
        if self._inner is not None:
            task = self._inner(loop, gated, **options)
        else:
            task = asyncio.Task(gated, loop=loop, **options)
        if channel is not None:
            task.add_done_callback(lambda _: close_unstarted(coro))
        return task


def close_unstarted(run: Any) -> None:
    """Close `run` if it was never stepped, as when its task is cancelled early; else Python warns "never awaited"."""
    if inspect.iscoroutine(run) and inspect.getcoroutinestate(run) == inspect.CORO_CREATED:
        run.close()
