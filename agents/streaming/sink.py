"""DSPy's `send_stream`, one for each run: where an LM call puts its chunks.

This module must not know what becomes of a chunk, nor who consumes it. It carries G3 and G5: it never blocks an event
loop, and a caller that can wait does so while the run is held back.
"""

from collections.abc import Iterable
from typing import Any, NoReturn, Protocol


class Reader(Protocol):
    """One run: makes items of chunks, and has a way out for them."""

    emit: Any

    def check(self) -> None:
        """:raises Stopped: the run is over."""

    def read(self, chunk: Any) -> Iterable[Any]:
        """The items that `chunk` makes. Called where the chunk is produced, in the context of its LM call."""

    def fail(self, error: Exception) -> NoReturn:
        """End the run with `error`."""


class Sink:
    """Takes chunks from the program's event loop, from other loops (`send`) and from threads (`send_nowait`)."""

    def __init__(self, run: Reader) -> None:
        self._run = run

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
