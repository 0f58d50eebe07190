"""`astream`: the events of one run of a program, as dicts."""

import functools
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from agentcast.agents.failures import failure_of
from agentcast.agents.streaming import Stream, run_program

T = TypeVar("T")

Item = dict[str, Any]


class ProgramStream(Stream[Item], Generic[T]):
    """The events of one run, then `{"event": "finished", "prediction": T}`; or `{"event": "error", …}`, and then the
    exception itself."""

    _error: Exception | None = None

    async def __anext__(self) -> Item:
        if self._error is not None and not self._items:
            error, self._error = self._error, None
            raise error
        item: Any = await super().__anext__()
        return item if isinstance(item, dict) else _plain(item)

    def _settle(self, value: Any) -> None:
        self._items.append({"event": "finished", "prediction": value.prediction})

    def _finish(self, run: Any) -> None:
        try:
            super()._finish(run)
        except Exception as error:  # noqa: BLE001 -- raised once the event was taken
            self._error = error
            node = getattr(error, "node", None)
            named = {"node": node} if isinstance(node, str) else {}
            self._items.append({"event": "error", **named, "error": failure_of(error).message})


def stream_program(program: Any, inputs: Mapping[str, Any]) -> ProgramStream[Any]:
    return ProgramStream(functools.partial(_play, program, dict(inputs)), type(program).__name__, threaded=False)


async def _play(program: Any, inputs: Mapping[str, Any], channel: Any) -> Any:
    return await run_program(program, inputs, channel, root=False)


def _plain(event: Any) -> Item:
    """As on the wire, but with lists where JSON has them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in event.wire().items()}
