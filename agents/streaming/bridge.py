"""What every bridge from a DSPy program has: its settings, its sink, the call that code is in, and how it ends.

DSPy reports what happens through two seams that every run gets for itself: a callback object and a `send_stream` sink,
both closed over the run's emitter. Nothing of a run is kept on programs, LMs or in globals (G8). Nothing here waits on
the event loop (G3), and what can wait for room waits while the run is held back (G5). What a bridge makes of
calls and chunks is for its subclasses to know; how items travel is known to nobody here.
"""

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import dspy
from dspy.utils.callback import BaseCallback

from agentcast.agents._dspy.names import ThreadStream, install, set_settings
from agentcast.agents.base import Stopped
from agentcast.agents.context import SETTING, current
from agentcast.agents.streaming.view import replace_methods
from agentcast.agents.values import clean_texts


class _Entered(NamedTuple):
    """A call that is going on, and what to set when it ends."""

    call: Any
    around: Any
    before: dict[str, Any]
    """Fields of the context."""
    settings: dict[str, Any]


class Bridge(BaseCallback, ABC):  # type: ignore[misc]  # dspy is untyped
    """One run of one program: DSPy's callbacks and LM chunks in, items for `emit` out; an `Observer`.

    `emit` is an `agents.base.Emitter`, or a channel that takes items of another kind in the same way.
    """

    retracts = False
    joins = False
    """Whether texts that an LM sends in one turn of the event loop may be joined."""

    def __init__(self, emit: Any) -> None:
        self.emit = emit
        self.sink = Sink(self)
        self._closed = threading.Event()
        self._failure: Exception | None = None
        self._entered: dict[str, _Entered] = {}

    @abstractmethod
    def read(self, chunk: Any) -> Iterable[Any]:
        """The items that `chunk` makes. Called where the chunk is produced, in the context of its LM call."""

    async def conduct(self, call: Callable[[], Awaitable[Any]], changes: Mapping[str, Any], **settings: Any) -> Any:
        """Await `call()` with DSPy reporting to this bridge what happens, with `changes` of the context and with
        `settings` of DSPy.

        :raises Stopped: the run was stopped.
        :raises Exception: what the program raises, as it is.
        """
        install()
        replace_methods()
        context = replace(current(), observer=self, **changes)
        own = {"callbacks": [*dspy.settings.callbacks, self], "send_stream": self.sink, SETTING: context}
        try:
            with dspy.context(**own, **settings):
                return await call()
        except BaseException as error:  # noqa: BLE001 -- raised again, or what caused it
            self._raise_cause(error)
        finally:
            self.close()

    async def room(self) -> None:
        """Wait while the run is held back, on any event loop. An emitter that is no channel has always room."""
        wait = getattr(self.emit, "room", None)
        if wait is not None:
            await wait()

    @property
    def is_innermost(self) -> bool:
        """Whether the calling code is in this run, and not in another one that goes on inside it."""
        return current().observer is self

    # -- The call that code is in ----------------------------------------------------------------------------------

    def here(self) -> Any:
        """What was given to `enter` for the call that the calling code is in; None: it is in none."""
        return current().calls.get(self)

    def enter(self, call_id: str, call: Any, *, span: str | None = None, streams: bool = True) -> None:
        """From here to `leave`, both called in its own context, DSPy's call `call_id` is going on. Unless it `streams`,
        LM calls inside keep the retries and fallbacks that DSPy gives up for streams.

        To be called last in a start callback: if that raises, DSPy does not call the end callback.
        """
        context, stream = current(), dspy.settings.send_stream
        before: dict[str, Any] = {}
        settings: dict[str, Any] = {}
        changes: dict[str, Any] = {"calls": {**context.calls, self: call}}
        if span is not None and context.observer is self:
            before["span"], changes["span"] = context.span, span
        if not streams and stream is self.sink:  # else it streams to a run inside this one, or not at all
            settings["send_stream"] = stream
            set_settings(send_stream=None)
        self._entered[call_id] = _Entered(call, context.calls.get(self), before, settings)
        set_settings(**{SETTING: replace(context, **changes)})

    def leave(self, call_id: str) -> Any:
        """The call has ended. What was given to `enter`, or None.

        Only what this bridge has set is set back: of two bridges the outer one enters, and leaves, first.
        """
        entered = self._entered.pop(call_id, None)
        if entered is None:
            return None
        context = current()
        changes = {"calls": {**context.calls, self: entered.around}, **entered.before}
        set_settings(**{SETTING: replace(context, **changes), **entered.settings})
        return entered.call

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

    def report(self, items: Iterable[Any], exception: BaseException | None = None) -> None:
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


class Sink(ThreadStream):
    """DSPy's `send_stream` of one run: takes the chunks of LM calls, from the program's event loop and from other loops
    (`send`) and from threads (`send_nowait`).

    It closes over its bridge, so that a chunk reaches the run that it belongs to wherever it is produced (G8).
    """

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self.joins = bridge.joins

    @property
    def congested(self) -> bool:
        return getattr(self._bridge.emit, "congested", False)

    def hold(self, flush: Callable[[], None]) -> None:
        call = self._bridge.here()
        if call is not None:
            call.flush = flush

    async def send(self, chunk: Any) -> None:
        """Take `chunk`, waiting while the run is held back.

        :raises Stopped: the run is over.
        """
        self._bridge.check()
        try:
            for item in self._bridge.read(chunk):
                await self._bridge.emit.send(item)
        except Exception as error:  # noqa: BLE001 -- kept, and raised where the run is awaited; no failure of the LM
            self._bridge.fail(error)

    def send_nowait(self, chunk: Any) -> None:
        """Take `chunk` from synchronous code: on the loop without waiting, in a thread waiting for room.

        :raises Stopped: the run is over.
        """
        self._bridge.check()
        try:
            for item in self._bridge.read(chunk):
                self._bridge.emit.nowait(item)
        except Exception as error:  # noqa: BLE001 -- as above
            self._bridge.fail(error)
