"""DSPy's `send_stream`, one for each run: where an LM call puts its chunks.

This module must not know what becomes of a chunk, nor who consumes it. It carries G3 and G5: it never blocks an event
loop, and whoever can wait does wait while the run is held back.
"""

import asyncio
from collections.abc import Iterable
from typing import Any, NoReturn, Protocol

from agentcast.agents.base import Stopped
from agentcast.agents.streaming.turns import this_loops_turns


class Reader(Protocol):
    """One run: makes items of chunks, and has a way out for them."""

    emit: Any
    joins: bool
    """Whether it does not matter to it where texts are torn apart."""

    def check(self) -> None:
        """:raises Stopped: the run is over."""

    def read(self, chunk: Any) -> Iterable[Any]:
        """The items that `chunk` makes. Called where the chunk is produced, in the context of its LM call."""

    def fail(self, error: Exception) -> NoReturn:
        """End the run with `error`."""


CROWDED = 0.02
"""Seconds in which texts are joined while runs wait for their turn to compute; a hub's log joins them for 0.025."""


class _Text:
    """What a reader sees of a chunk of text."""

    __slots__ = ("choices",)

    def __init__(self, text: str) -> None:
        self.choices = (_Choice(text),)


class _Choice:
    __slots__ = ("delta",)
    index = 0
    finish_reason = None

    def __init__(self, text: str) -> None:
        self.delta = _Delta(text)


class _Delta:
    __slots__ = ("content",)

    def __init__(self, content: str) -> None:
        self.content = content


class ChunkJoiner:
    """DSPy's maker of chunks, `full`, but one that joins the texts which arrive in one turn of the event loop: there is
    nobody yet who could read them apart. While runs wait for a turn to compute, it joins those of `CROWDED` seconds.
    The first text goes at once, and so does what is no text."""

    def __init__(self, full: Any, sink: "Sink") -> None:
        self._full = full
        self._sink = sink
        self._texts: list[str] = []
        """What waits until the end of this turn."""
        self._started = False
        self._stopped: Stopped | None = None
        self._turns = this_loops_turns()

    def chunk(self, event: Any) -> Any:
        """The chunk to send now, if there is one.

        :raises Stopped: the run is over.
        """
        if event.type == "delta" and event.delta.type == "text":
            self._texts.append(event.delta.text)
            return None if 1 < len(self._texts) < _JOINED else self._first()
        self._flush()
        if self._stopped is not None:
            raise self._stopped
        return self._full.chunk(event)

    def _first(self) -> Any:
        """What to do with the first text of a turn, and with one that makes too many."""
        if self._stopped is not None:
            raise self._stopped
        if self._started and len(self._texts) < _JOINED:
            asyncio.get_running_loop().call_soon(self._end_turn)
            return None
        self._started = True
        return self._joined()

    def _end_turn(self) -> None:
        if self._turns.is_crowded:
            asyncio.get_running_loop().call_later(CROWDED, self._flush)
        else:
            self._flush()

    def _flush(self) -> None:
        if self._texts:
            try:
                self._sink.send_nowait(self._joined())
            except Stopped as error:
                self._stopped = error

    def _joined(self) -> _Text:
        text = "".join(self._texts)
        self._texts.clear()
        return _Text(text)


_JOINED = 64
"""Texts that are joined at most, before the LM call may be held back."""


class Sink:
    """Takes chunks from the program's event loop, from other loops (`send`) and from threads (`send_nowait`)."""

    def __init__(self, run: Reader) -> None:
        self._run = run

    @property
    def joins(self) -> bool:
        """Whether texts may be joined."""
        return self._run.joins

    async def send(self, chunk: Any) -> None:
        """Take `chunk`, waiting while the run is held back.

        :raises Stopped: the run is over.
        """
        self._run.check()
        try:
            for item in self._run.read(chunk):
                await self._run.emit.send(item)
        except Exception as error:  # noqa: BLE001 -- kept, and raised where the run is awaited; no failure of the LM
            self._run.fail(error)

    def send_nowait(self, chunk: Any) -> None:
        """Take `chunk` from synchronous code: on the loop without waiting, in a thread waiting for room.

        :raises Stopped: the run is over.
        """
        self._run.check()
        try:
            for item in self._run.read(chunk):
                self._run.emit.nowait(item)
        except Exception as error:  # noqa: BLE001 -- as above
            self._run.fail(error)
