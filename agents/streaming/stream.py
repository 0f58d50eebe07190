"""A program's run as an object to iterate over: it owns the channel, the driven coroutine, and how both end.

`Stream` is a plain async iterator and an async context manager. It is no async generator, since a generator that is
abandoned cleans up somewhere else, later, and raises there. The program starts with the first item that is asked for,
in the context of the code that asks. It stops when the stream is closed, when the wait for an item is cancelled, and
when the stream is dropped; never is anything raised into the consumer's task because of it. It must not be known here
what the items are, nor what DSPy is.

An asynchronous program is cancelled, once, and may clean up; one that does not end is left where it stands. A
synchronous one stops at its next callback or LM chunk (G6).

`BlockingStream` is the same for code without an event loop: a plain iterator over a `Stream` that runs on a loop in a
thread. Each item is asked for when it is wanted, so back-pressure reaches the program as it does on a loop. The loop
ends with the stream, when the iterator is closed, and when it is dropped.
"""

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import anyio

from agentcast.agents.base import Stopped
from agentcast.agents.channel import HARD_CAP, Channel
from agentcast.agents.execution import Execution

GRACE = 2.0
"""Seconds that a stopped program gets to end, before it is left behind."""

T_co = TypeVar("T_co", covariant=True)

Play = Callable[[Any], Coroutine[Any, Any, Any]]
"""A run that puts items into a channel; made for each stream."""


class StreamError(RuntimeError):
    """The program ended in a way that is no exception of its own."""


class Stream(Generic[T_co]):
    """The items of one run, in order, none lost; then the program's own exception, or the end."""

    def __init__(self, play: Play, name: str, *, threaded: bool) -> None:
        self._play = play
        self._name = name
        self._threaded = threaded
        self._items: deque[Any] = deque()
        self._run: _Playing | None = None
        self._drop: weakref.finalize[..., Any] | None = None
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T_co:
        """The next item, as soon as there is one. Cancelling the wait stops the program.

        :raises Exception: what the program raised, once, after all items.
        """
        while not self._items:
            await self._receive()
        return self._items.popleft()  # type: ignore[no-any-return]

    async def aclose(self) -> None:
        """Stop the program, and wait until it has ended, for at most `GRACE` seconds. Idempotent; from any task."""
        self._end()
        if self._run is not None:
            self._run.stop()
            with anyio.move_on_after(GRACE, shield=True):
                await self._run.done.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    # -- Inside ----------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        if self._ended:
            raise StopAsyncIteration
        if self._run is None:
            self._start()
        assert self._run is not None  # noqa: S101
        run = self._run
        try:
            items = await run.channel.receive()
            if not items:
                await run.done.wait()
        except asyncio.CancelledError:
            self._end()
            run.stop()
            raise
        if self._ended:  # closed meanwhile
            raise StopAsyncIteration
        self._items.extend(item.event for item in items)
        if not items:
            self._end()
            self._finish(run)

    def _start(self) -> None:
        self._run = _Playing(self._play, self._name, self._threaded)
        self._drop = weakref.finalize(self, _stop_from_anywhere, asyncio.get_running_loop(), self._run)
        self._drop.atexit = False

    def _end(self) -> None:
        self._ended = True
        self._items.clear()
        if self._drop is not None:
            self._drop.detach()

    def _finish(self, run: "_Playing") -> None:
        """The run has ended by itself."""
        error = run.error
        if error is None:
            self._settle(run.value)
        elif run.channel.overflowed:
            raise StreamError(f"{self._name} emitted {HARD_CAP} items without a pause in which they could be taken")
        elif isinstance(error, Stopped | asyncio.CancelledError | GeneratorExit | StopAsyncIteration):
            # Raised as they are, these would be taken for the consumer's own.
            raise StreamError(f"{self._name} was cancelled from inside") from error
        else:
            raise error

    def _settle(self, value: Any) -> None:
        """The run has returned `value`."""


class _Playing:
    """The running side of a stream, which does not hold the stream itself."""

    def __init__(self, play: Play, name: str, threaded: bool) -> None:
        self.channel = Channel(name)
        self._threaded = threaded
        self._stopping = False
        # The channel is closed as the cancellation arrives: a program that found it closed before would be stopped
        # twice, and the second time in the middle of its cleaning up.
        self._execution = Execution(_play(play, self.channel), self.channel, on_cancel=self.channel.close)

    @property
    def done(self) -> anyio.Event:
        return self._execution.done

    @property
    def value(self) -> Any:
        return self._execution.value

    @property
    def error(self) -> BaseException | None:
        return self._execution.error

    def stop(self) -> None:
        """Ask the program to stop, and see to it that it does. On the loop; idempotent."""
        if self._stopping or self.done.is_set():
            return
        self._stopping = True
        loop = asyncio.get_running_loop()
        if self._threaded:  # a thread cannot be cancelled, only left behind: let it notice that the channel is closed
            self.channel.close()
            loop.call_later(GRACE, self._execution.cancel)
        else:
            self._execution.cancel()
            loop.call_later(GRACE, self._abandon)

    def _abandon(self) -> None:
        if not self.done.is_set():
            self._execution.abandon()


async def _play(play: Play, channel: Channel) -> Any:
    try:
        return await play(channel)
    finally:
        channel.close()


def _stop_from_anywhere(loop: asyncio.AbstractEventLoop, run: _Playing) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the run
        loop.call_soon_threadsafe(run.stop)


# -- Without an event loop ---------------------------------------------------------------------------------------------


class BlockingStream:
    """The items of one run. It starts with the first item that is asked for."""

    def __init__(self, make: Callable[[], Stream[Any]]) -> None:
        self._make = make
        self._host: _Host | None = None
        self._drop: weakref.finalize[..., Any] | None = None
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        """The next item.

        :raises Exception: what the program raised, once, after all items.
        """
        if self._ended:
            raise StopIteration
        if self._host is None:
            self._host = _Host(self._make())
            self._drop = weakref.finalize(self, self._host.end)
            self._drop.atexit = False
        try:
            return self._host.next()
        except StopAsyncIteration:
            self.close()
            raise StopIteration from None
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Stop the program, and wait until it has ended, for a bounded time. Idempotent; from any thread."""
        self._ended = True
        if self._host is not None and self._drop is not None:
            self._drop.detach()
            self._host.end()
            self._host.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Host:
    """A thread with an event loop, for one stream."""

    def __init__(self, stream: Stream[Any]) -> None:
        self._stream = stream
        self._started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()
        self._loop, self._end = self._started.result()

    def next(self) -> Any:
        """The stream's next item. The stream runs in the context of the code that asks for its first one."""
        return asyncio.run_coroutine_threadsafe(self._stream.__anext__(), self._loop).result()

    def end(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._end.set)

    def join(self) -> None:
        if threading.current_thread() is not self._thread:
            self._thread.join(2 * GRACE)

    def _run(self) -> None:
        asyncio.run(self._live())

    async def _live(self) -> None:
        end = asyncio.Event()
        self._started.set_result((asyncio.get_running_loop(), end))
        await end.wait()
        await self._stream.aclose()
