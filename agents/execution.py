"""One agent's coroutine while it runs: held back while its channel is congested, asked to stop, and, if it does not
listen, left behind (G3, G5, G6).

`drive` steps the coroutine by hand: it is not resumed until there is room, and one that is left behind is never
resumed again. So it needs a task that belongs to no task group, which would wait for an agent that swallows its
cancellation for as long as it likes.

Only the coroutine itself is driven. Tasks that it starts are ordinary tasks of the event loop, and nothing of the loop
is changed for them: they wait where they emit with `await`, and are cancelled by their owners. A task that a library
starts inside a run, and that serves other runs too, is therefore never held back or dropped with the run.

Cancelling is gentle: the cancellation is delivered once, and from then on the agent is shielded, so that it can clean
up with awaits of its own. How long it gets for that is the caller's business.

asyncio, not anyio, on purpose: stepping a coroutine has no anyio counterpart.
"""

import asyncio
import ctypes
import inspect
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

import anyio

from agentcast.agents.base import Stopped
from agentcast.agents.channel import Channel

T = TypeVar("T")


class Execution:
    """A running coroutine. Make it in a coroutine; it starts at once, in a task that bears the channel's label.

    `done` is set when it has returned, raised or been dropped, and then `on_done` is called; `on_cancel` as its
    cancellation reaches it.
    """

    def __init__(
        self,
        run: Coroutine[Any, Any, Any],
        channel: Channel,
        on_cancel: Callable[[], None] | None = None,
        on_done: Callable[[], None] | None = None,
    ) -> None:
        self.done = anyio.Event()
        self.error: BaseException | None = None
        """What the coroutine raised, of whatever kind: nothing an agent raises reaches the event loop."""
        self.value: Any = None
        self._channel = channel
        self._on_cancel = on_cancel
        self._on_done = on_done
        self._scope = anyio.CancelScope()
        self._task = asyncio.create_task(self._run(run), name=channel.label)  # noqa: TID251 -- see above
        self._task.add_done_callback(lambda _: self._end(run))

    def cancel(self) -> None:
        """Ask the agent to stop."""
        self._scope.cancel()

    def abandon(self) -> None:
        """Never resume the agent again. Its threads and tasks run on until they emit or return."""
        self._channel.abandon()
        self._task.cancel()

    def _end(self, run: Coroutine[Any, Any, Any]) -> None:
        if inspect.iscoroutine(run) and inspect.getcoroutinestate(run) == inspect.CORO_CREATED:
            run.close()  # cancelled before its first step; else Python warns "never awaited"
        self.done.set()
        if self._on_done is not None:
            self._on_done()

    async def _run(self, run: Coroutine[Any, Any, Any]) -> None:
        try:
            with self._scope, anyio.CancelScope() as cleanup:

                def shield() -> None:
                    cleanup.shield = True
                    if self._on_cancel is not None and self._scope.cancel_called:  # else the agent cancels itself
                        self._on_cancel()

                self.value = await drive(run, self._channel, on_cancel=shield)
                return
            self.error = asyncio.CancelledError()  # the scope took it
        except BaseException as error:  # noqa: BLE001 -- kept for the caller; SystemExit must not end the server
            self.error = error


async def drive(run: Coroutine[Any, Any, T], channel: Channel, *, on_cancel: Callable[[], None] | None = None) -> T:
    """Await `run`, holding it back while `channel` is congested.

    `on_cancel` is called as a cancellation is about to be thrown into `run`.

    :raises Stopped: the channel was abandoned; `run` was closed instead of being resumed.
    """
    return await _step(run, channel, on_cancel)


@types.coroutine
def _step(
    run: Coroutine[Any, Any, T], channel: Channel, on_cancel: Callable[[], None] | None
) -> Generator[Any, Any, T]:
    """Step `run`, passing on the futures that it waits for and whatever is thrown in. A cancellation does not wait."""
    error: BaseException | None = None
    while True:
        if error is None and channel.congested:
            error = yield from _wait_for_room(channel)
        if channel.abandoned:
            _drop(run)
            raise Stopped from error
        if on_cancel is not None and isinstance(error, asyncio.CancelledError):
            on_cancel()
        try:
            waiting_for = run.send(None) if error is None else run.throw(error)
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


def _wait_for_room(channel: Channel) -> Generator[Any, Any, BaseException | None]:
    """Wait while `channel` is congested; returns what was thrown in meanwhile."""
    try:
        yield from channel.room().__await__()
    except BaseException as thrown:  # noqa: BLE001 -- handed on to the run
        return thrown
    return None


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
