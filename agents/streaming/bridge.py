"""What every bridge from a DSPy program has: its settings, its sink, and how it ends.

DSPy tells what happens through two seams that every run gets for itself: a callback object and a `send_stream` sink,
both closed over the run's emitter. Nothing of a run is kept on programs, LMs or in globals (G8). Nothing here waits on
the event loop (G3). What a bridge tells is for its subclasses to know, how items travel for nobody here.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NoReturn

import dspy
from dspy.utils.callback import BaseCallback

from agentcast.agents.base import Stopped
from agentcast.agents.streaming.patch import install
from agentcast.agents.streaming.sink import Sink
from agentcast.agents.streaming.view import RUN_SETTING, replace_methods
from agentcast.agents.values import clean_texts


class Bridge(BaseCallback):  # type: ignore[misc]  # dspy is untyped
    """One run of one program: DSPy's callbacks and LM chunks in, items for `emit` out.

    `emit` is an `agentcast.agents.base.Emitter`, or a channel that takes items of another kind in the same way.
    """

    joins = False
    """Whether texts that an LM sends in one turn of the event loop may be joined."""

    def __init__(self, emit: Any) -> None:
        self.emit = emit
        self.sink = Sink(self)
        self._closed = threading.Event()
        self._failure: Exception | None = None
        self._muted: dict[str, contextlib.AbstractContextManager[Any]] = {}

    def read(self, chunk: Any) -> Iterable[Any]:
        """The items that a chunk makes; see `sink.Reader`."""
        raise NotImplementedError

    async def conduct(self, call: Callable[[], Awaitable[Any]], **settings: Any) -> Any:
        """Await `call()` with DSPy telling this bridge what happens, and with `settings` of DSPy.

        :raises Stopped: the run was stopped.
        :raises Exception: whatever the program raises, as it is.
        """
        install()
        replace_methods()
        own = {"callbacks": [*dspy.settings.callbacks, self], "send_stream": self.sink, RUN_SETTING: self}
        try:
            with dspy.context(**own, **settings):
                return await call()
        except BaseException as error:  # noqa: BLE001 -- raised again, or what caused it
            self._raise_cause(error)
        finally:
            self.close()

    @property
    def is_innermost(self) -> bool:
        """Whether the calling code is in this run, and not in another one that goes on inside it."""
        return dspy.settings.get(RUN_SETTING) is self

    # -- Ending ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Nothing is emitted any more; what still runs in a thread is stopped by its next callback, or wait."""
        self._closed.set()

    def check(self) -> None:
        """:raises Stopped: the run is over."""
        if self._closed.is_set():
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Wait in a thread.

        :raises Stopped: the run is over, as soon as it is.
        """
        if self._closed.wait(seconds):
            raise Stopped

    def fail(self, error: Exception) -> NoReturn:
        """End the run with `error`, which is ours, not the program's."""
        self._failure = self._failure or error
        self._closed.set()
        raise Stopped from error

    def tell(self, items: Iterable[Any], exception: BaseException | None = None) -> None:
        """Emit, from whatever thread. Where a call ends by cancellation, that goes on rather than `Stopped`."""
        try:
            for item in items:
                self.check()
                self.emit.nowait(item)
        except Stopped:
            if exception is None or isinstance(exception, Exception):
                raise

    def _raise_cause(self, error: BaseException) -> NoReturn:
        """Raise what ended the run, given what came out of the program: task groups wrap it, threads rename it."""
        if self._failure is not None and not isinstance(error, asyncio.CancelledError):
            raise self._failure
        if isinstance(error, BaseExceptionGroup) and error.subgroup(Stopped):
            raise Stopped from error
        raise error

    # -- Prompts and answers ---------------------------------------------------------------------------------------

    @staticmethod
    def clean(made: Any) -> None:
        """Clean the texts of a prompt, an answer or its fields, which DSPy has just made, so that nobody else has them
        yet. It puts chunks together as they come, and with half of a surrogate pair in a text it can neither parse XML
        nor ask the next LM."""
        if isinstance(made, list):
            made[:] = clean_texts(made)
        elif isinstance(made, dict):
            made |= clean_texts(made)

    # -- Calls that do not stream ----------------------------------------------------------------------------------

    def mute(self, call_id: str) -> None:
        """Have DSPy not stream inside this call, until `unmute`. Both run in the call's own context."""
        if dspy.settings.send_stream is self.sink:  # else it streams to a run inside this one, or not at all
            muted = self._muted[call_id] = dspy.context(send_stream=None)
            muted.__enter__()

    def unmute(self, call_id: str) -> None:
        muted = self._muted.pop(call_id, None)
        if muted is not None:
            muted.__exit__(None, None, None)


def innermost() -> Any:
    """The bridge of the run that the calling code is in, or None."""
    return dspy.settings.get(RUN_SETTING)


def wait_in_thread(seconds: float) -> None:
    """Wait in a thread, for no longer than the run goes on that the calling code is in.

    :raises Stopped: the run is over.
    """
    run: Bridge | None = innermost()
    if run is None:
        time.sleep(seconds)
    else:
        run.wait(seconds)
