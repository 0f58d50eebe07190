"""One call of a tool of an MCP server, between the run that makes it and the task that owns the connection.

The SDK's client is shared by all runs, and what it starts runs in the context of its caller. So no run calls it:
a run puts a `Call` into the connection's inbox and reads progress and outcome from it, and the connection makes the
call in a task and context of its own (G8). Nothing in here waits for a run: progress that is not read in time is
thinned out, the oldest first.
"""

import math
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import anyio
from mcp import Client
from mcp.shared.exceptions import MCPError
from mcp_types import CONNECTION_CLOSED, INTERNAL_ERROR, INVALID_PARAMS, METHOD_NOT_FOUND, CallToolResult

from agentcast.agents.base import ToolError, redact
from agentcast.agents.mcp.words import clean_error, observation
from agentcast.agents.values import clean_text, cut_text

LOST = "the connection to its server was lost"
WAITING_PROGRESS = 256
"""Notifications of progress that wait for one run."""
PROGRESS_BYTES = 4 * 1024
"""Size of a message of progress."""
MAX_DEPTH = 100
"""Levels of nesting in the arguments of a call. The SDK writes no more than 200."""
_ABOUT_THE_CALL = (INVALID_PARAMS, METHOD_NOT_FOUND, INTERNAL_ERROR)
"""Errors by which a server shows that it lives. Others may mean that it has forgotten its session."""


class Progress(NamedTuple):
    progress: float
    total: float | None
    message: str | None


class Call:
    """A call and what is known of it. Everything happens on the event loop of the connection."""

    def __init__(self, tool: str, args: dict[str, Any], timeout: float) -> None:
        self.tool = tool
        self.args = args
        self.timeout = timeout
        self.doubtful = False
        """Whether it ended in a way that leaves it open whether the server knows this connection any more."""
        self._scope = anyio.CancelScope()
        self._progress: deque[Progress] = deque(maxlen=WAITING_PROGRESS)
        self._result: CallToolResult | None = None
        self._failure: str | None = None
        self._changed = anyio.Event()

    # -- For the run -----------------------------------------------------------------------------------------------

    async def progress(self) -> AsyncIterator[Progress]:
        """What the server reports of its progress, in order, until the call has ended."""
        while True:
            while self._progress:
                yield self._progress.popleft()
            if self._ended:
                return
            await self._changed.wait()
            self._changed = anyio.Event()

    def result(self) -> Any:
        """What the server gave, as plain, bounded data.

        :raises ToolError: the call or the tool failed, or the connection ended before it.
        """
        if self._result is None:
            raise ToolError(self._failure or "it was not answered")
        return observation(self._result, self.args)

    def cancel(self) -> None:
        """Have the call cancelled at the server. Idempotent; does nothing to one that has ended."""
        self._scope.cancel()

    # -- For the connection ----------------------------------------------------------------------------------------

    async def make(self, client: Client) -> None:
        """Make the call. Nothing is raised: what goes wrong is the outcome."""
        try:
            with self._scope, anyio.move_on_after(self.timeout) as limit:
                result = await client.call_tool(self.tool, self.args, None, self._on_progress)
                self._end(result, None)
            if limit.cancelled_caught:
                self.doubtful = True
                self._end(None, f"it gave no answer within {self.timeout:g} s; the call was cancelled")
        except MCPError as error:
            self.doubtful = error.code not in _ABOUT_THE_CALL
            self._end(None, _message_of(error))
        except Exception as error:  # noqa: BLE001 -- whatever the SDK makes of a server's answer
            self._end(None, f"its answer could not be read ({type(error).__name__})")
        finally:
            self.drop()

    def drop(self) -> None:
        """The connection has ended; an outcome that is there already stands."""
        self._end(None, LOST)

    async def _on_progress(self, progress: float, total: float | None, message: str | None) -> None:
        # The SDK starts a task for each notification: whatever came before this line could put them out of order.
        if not math.isfinite(progress):
            return
        total = total if total is None or math.isfinite(total) else None
        text = None if message is None else redact(cut_text(message, PROGRESS_BYTES))
        self._progress.append(Progress(progress, total, text))
        self._changed.set()

    @property
    def _ended(self) -> bool:
        return self._result is not None or self._failure is not None

    def _end(self, result: CallToolResult | None, failure: str | None) -> None:
        if not self._ended:
            self._result, self._failure = result, failure
            self._changed.set()


def sendable(value: Any, depth: int = 0) -> Any:
    """A copy of the arguments of a call, without lone surrogates.

    What JSON cannot carry has to be found here: on its way out it would end the connection, and every call with it.

    :raises ToolError: there is something else in them that cannot be sent.
    """
    if depth > MAX_DEPTH:
        raise ToolError("the arguments cannot be sent: they are nested too deeply")
    if isinstance(value, str):
        return clean_text(value)
    if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [sendable(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {clean_text(str(name)): sendable(item, depth + 1) for name, item in value.items()}
    shown = str(value) if isinstance(value, float) else type(value).__name__
    raise ToolError(f"the arguments cannot be sent: JSON has no {shown}")


def _message_of(error: MCPError) -> str:
    if error.code == CONNECTION_CLOSED and error.message == "Connection closed":
        return LOST
    return clean_error(error.message) or f"error {error.code}"
