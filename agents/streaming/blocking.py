"""A stream for code without an event loop: a plain iterator over a `Stream` that runs on a loop in a thread.

Each item is asked for when it is wanted, so back-pressure reaches the program as it does on a loop. The loop ends with
the stream, when the iterator is closed, and when it is dropped.
"""

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from agentcast.agents.streaming.stream import GRACE, Stream


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
        """The stream's next item. The stream runs in the context of whoever asks for its first one."""
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
