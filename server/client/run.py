"""One run, as a client sees it. It must not be known here how a run is shown, or how a hub works inside."""

import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from types import TracebackType
from typing import Any, Self

import anyio

from agentcast.server.client.connection import (
    ClientError,
    Connection,
    Dropped,
    Frame,
    HubUrl,
    Refused,
    Unreachable,
)
from agentcast.server.protocol import Detail
from agentcast.server.state import STATUS_AFTER, RunState

PATIENCE = 60.0
"""Seconds for which a lost hub is looked for before giving up."""
BACKOFF_FIRST, BACKOFF_MOST = 0.25, 10.0
OnDrop = Callable[[str, int], None]
"""Called with the reason why an attempt to connect failed, and the attempt's number."""
ENDED = frozenset(STATUS_AFTER.values())
"""Statuses of a run that has its terminal event."""


class RunFailed(ClientError):
    """A run ended without a result. `status` is `failed` or `cancelled`; `code` and `retryable` are the hub's."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        error = state.get("error", {})
        self.run: str = state["run"]
        self.status: str = state["status"]
        self.code: str = error.get("code", self.status)
        self.message: str = error.get("message", f"the run was {self.status}")
        self.retryable: bool = error.get("retryable", False)
        super().__init__(self.message)


class Run:
    """One run of an agent: started by entering it, then followed to its end by iterating, which gives its events.

    Lost connections are replaced, with jittered delays, and the run goes on where it was. The start carries an
    idempotency key: sent again, because its reply was lost, it gives the same run.

    Iterate in one task. `cancel` may be called from another.

    Entering and iterating raise `Unreachable` if there is no hub at first, or none for `patience` seconds later on;
    `Refused` after the error reply; `Closed` when the hub wants no more; `TooBig` if the input is.
    """

    def __init__(
        self,
        hub: HubUrl,
        agent: str,
        input: Mapping[str, Any],
        *,
        thread: str | None,
        key: str | None,
        detail: Detail,
        patience: float,
        on_drop: OnDrop,
    ) -> None:
        self.hub = hub
        self.agent = agent
        self.detail = detail
        self.id: str | None = None
        """The run's id, once the hub has given it."""
        self._state = RunState.new("", agent)
        self._start = {"agent": agent, "input": dict(input), "thread": thread, "detail": detail}
        self._start["key"] = secrets.token_hex(16) if key is None else key
        self._patience = patience
        self._on_drop = on_drop
        self._connection: Connection | None = None
        self._hello: Frame | None = None
        """Of a new connection, until it is given out."""
        self._epoch = ""
        self._seq = 0
        self._sent: dict[int, str] = {}
        self._cancel: dict[str, str | None] | None = None
        self._asked = False
        self._attempt = 0
        self._well_at: float | None = None
        self._failure: ClientError | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._connected()
        except BaseException:
            await self._disconnect()
            raise
        return self

    async def __aexit__(
        self, type: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._disconnect()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Frame:
        while (frame := await self._next()) is not None:
            if frame["type"] == "event":
                return frame
        raise StopAsyncIteration

    async def frames(self) -> AsyncIterator[Frame]:
        """Instead of the events, every frame that the hub sends; `hello` and `reply` of each connection, too."""
        while (frame := await self._next()) is not None:
            yield frame

    async def result(self) -> Any:
        """Follow the run to its end. Gives what it returned.

        :raises RunFailed: it failed, or was cancelled.
        """
        async for _ in self:
            pass
        if self.state["status"] != "done":
            raise RunFailed(self.state)
        return self.state.get("result")

    @property
    def state(self) -> Mapping[str, Any]:
        """All events so far, folded: `status`, `messages`, `spans` and so on, as in the protocol's snapshots. Exact at
        detail `full`."""
        return self._state.document

    @property
    def ended(self) -> bool:
        """Whether the terminal event, or a snapshot after it, was seen."""
        return self.state["status"] in ENDED

    @property
    def cancelling(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancel is not None

    async def cancel(self, reason: str | None = None) -> bool:
        """Ask for the run's end, now or as soon as there is a connection; `run_cancelled` follows.

        False if there is nothing to cancel: no start was sent.
        """
        self._cancel = {"reason": reason}
        if self._connection is not None and self.id is not None:
            try:
                await self._send(self._connection, "cancel", run=self.id, **self._cancel)
            except Dropped:
                pass  # the iteration notices, and connects again
        return self._asked

    # -- The connection --------------------------------------------------------------------------------------------

    async def _connected(self) -> Connection:
        """The connection; a new one if there is none."""
        while self._connection is None:
            try:
                self._hello = await self._connect()
            except (Dropped, Unreachable) as error:
                await self._back_off(error)
        return self._connection

    async def _connect(self) -> Frame:
        """Open a connection and say on it where we are: nowhere yet, or at a position."""
        connection = await Connection.open(self.hub)
        self._connection, self._sent = connection, {}
        if self._well_at is None:
            self._well_at = time.monotonic()
        if self.id is None:
            self._asked = True
            await self._send(connection, "start", **self._start)
            return connection.hello
        since = {self.id: {"epoch": self._epoch, "seq": self._seq}}
        await self._send(connection, "subscribe", to={"run": self.id}, since=since, detail=self.detail)
        if self._cancel is not None:
            await self._send(connection, "cancel", run=self.id, **self._cancel)
        return connection.hello

    async def _send(self, connection: Connection, op: str, **fields: Any) -> None:
        self._sent[await connection.send(op, **fields)] = op

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.aclose()

    async def _back_off(self, error: Exception) -> None:
        """Wait before the next connection; longer each time, with jitter so that not all clients come at once."""
        await self._disconnect()
        if self._well_at is None:
            raise error
        self._attempt += 1
        reason = error.reason if isinstance(error, Unreachable) else str(error)
        self._on_drop(reason, self._attempt)
        longest = min(BACKOFF_FIRST * 2 ** (self._attempt - 1), BACKOFF_MOST)
        delay = longest * random.uniform(0.5, 1.0)  # noqa: S311 -- jitter, not a secret
        if time.monotonic() + delay - self._well_at > self._patience:
            raise Unreachable(str(self.hub), f"{reason}; gave up after {self._patience:g} s") from None
        await anyio.sleep(delay)

    # -- Frames ----------------------------------------------------------------------------------------------------

    async def _next(self) -> Frame | None:
        """The next frame; `None` after the run's end."""
        while not self.ended:
            if self._failure is not None:
                raise self._failure
            connection = await self._connected()
            if self._hello is not None:
                hello, self._hello = self._hello, None
                return hello
            try:
                frame = await connection.receive()
                wanted = await self._take(frame)
                self._well_at = time.monotonic()
                if wanted:
                    return frame
            except Dropped as error:
                await self._back_off(error)
        return None

    async def _take(self, frame: Frame) -> bool:
        """Take note of one frame. False if it was seen before.

        :raises Dropped: there is a hole before it, which only a new connection can fill.
        """
        match frame["type"]:
            case "reply":
                await self._take_reply(frame)
            case "snapshot" if frame["run"] == self.id:
                self._epoch, self._seq = frame["epoch"], frame["seq"]
                self._state = RunState(frame["state"])
            case "event" if frame["run"] == self.id:
                return self._take_event(frame)
        return True

    def _take_event(self, event: Frame) -> bool:
        if event["seq"] <= self._seq:
            return False
        before = event["seq"] - 1 if self.detail == "full" else event["prev"]
        if before > self._seq:
            raise Dropped(f"events after {self._seq} are missing")
        self._state.apply(event)
        self._seq = event["seq"]
        return True

    async def _take_reply(self, reply: Frame) -> None:
        if "id" not in reply:  # the hub could not read a message: it is the start's input, all else is ours
            self._failure = Refused(reply["error"])
            return
        op = self._sent.pop(reply["id"], None)
        if op is None or self._connection is None:
            return
        if op == "cancel":  # refused only if the run has just ended, which its events show
            return
        if not reply["ok"]:
            refused = Refused(reply["error"])
            if refused.retryable:
                raise Dropped(refused.message)
            self._failure = refused
            return
        self._attempt = 0
        if op == "start":
            self.id, self._epoch = reply["result"]["run"], reply["result"]["epoch"]
            self._state = RunState.new(self.id, self.agent)
            if self._cancel is not None:
                await self._send(self._connection, "cancel", run=self.id, **self._cancel)
