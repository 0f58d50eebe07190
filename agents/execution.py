"""One agent's coroutine while it runs: started, asked to stop, and, if it does not listen, left behind (G6).

The coroutine lives in a task that belongs to no task group, since nobody can be forced to end: a task group would wait
for an agent that swallows its cancellation for as long as it likes. Instead it is driven by hand (`gate.drive`), so
that abandoning it means never resuming it again.

Cancelling is gentle: the cancellation is delivered once, and from then on the agent is shielded, so that it can clean
up with awaits of its own; who gives it how long for that is the caller's business.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import anyio

from agentcast.agents.channel import Channel
from agentcast.agents.gate import close_unstarted, drive


class Execution:
    """A running coroutine. Make it in a coroutine; it starts at once.

    `done` is set when it has returned, raised or been dropped. `on_cancel` is called as its cancellation reaches it.
    """

    def __init__(
        self, run: Coroutine[Any, Any, Any], channel: Channel, on_cancel: Callable[[], None] | None = None
    ) -> None:
        self.done = anyio.Event()
        self.error: BaseException | None = None
        """What the coroutine raised, of whatever kind: nothing an agent raises reaches the event loop."""
        self.value: Any = None
        self._channel = channel
        self._on_cancel = on_cancel
        self._scope = anyio.CancelScope()
        self._task = asyncio.create_task(self._run(run), name=channel.label)  # noqa: TID251 -- see above
        self._task.add_done_callback(lambda _: self._end(run))

    def cancel(self) -> None:
        """Ask the agent to stop."""
        self._scope.cancel()

    def abandon(self) -> None:
        """Never resume the agent again. Its threads run on until they emit or return."""
        self._channel.abandon()
        self._task.cancel()

    def _end(self, run: Coroutine[Any, Any, Any]) -> None:
        close_unstarted(run)
        self.done.set()

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
        except BaseException as error:  # noqa: BLE001 -- kept for whoever asks; SystemExit must not end the server
            self.error = error
