"""The runs that have not ended yet, and their queue: each agent takes so many at once. Without I/O."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import anyio
from pydantic import BaseModel

from agentcast.agents.base import Agent
from agentcast.server.runs.recorder import Recorder

Cause = Literal["cancelled", "timeout", "shutting_down"]


@dataclass(slots=True, eq=False)
class ActiveRun:
    """A run that has not ended yet."""

    id: str
    agent: Agent
    input: BaseModel
    thread: str | None
    principal: str
    recorder: Recorder
    starter: object | None = None
    """Which client has started it, where clients share the places of this process."""
    created: float = field(default_factory=time.monotonic)
    started: float | None = None
    position: int | None = None
    sent_position: int | None = None
    cause: Cause | None = None
    """Why it is to end, if something other than its agent says so."""
    reason: str | None = None
    by: str | None = None
    finishing: bool = False
    changed: anyio.Event = field(default_factory=anyio.Event)
    """Set when `position` or `cause` has changed."""
    cancel_logged: anyio.Event = field(default_factory=anyio.Event)
    owned: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    """What this process does for the run; cancelled when the run is another process's."""

    def end(self, cause: Cause, reason: str | None = None) -> None:
        if self.cause is None:
            self.cause, self.reason = cause, reason
        self.changed.set()

    @property
    def fenced(self) -> bool:
        """Whether another process has taken over the run: nothing of it may be written here any more."""
        return self.owned.cancel_called

    def fence_off(self) -> None:
        """Stop all that this process does for the run."""
        self.finishing = True
        self.owned.cancel()
        self.cancel_logged.set()  # it never will be logged here: nothing may wait for it

    @property
    def duration(self) -> float:
        return max(0.0, time.monotonic() - (self.created if self.started is None else self.started))


class Slots:
    """The runs of one agent: as many as it takes at once are admitted, the others wait in order."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._admitted: set[ActiveRun] = set()
        self._waiting: deque[ActiveRun] = deque()

    def enter(self, run: ActiveRun) -> None:
        if len(self._admitted) < self._limit:
            self._admitted.add(run)
        else:
            run.position = run.sent_position = len(self._waiting)
            self._waiting.append(run)

    def leave(self, run: ActiveRun) -> None:
        """Give up a slot or a place; who waits moves up."""
        if run in self._admitted:
            self._admitted.remove(run)
        elif run in self._waiting:
            self._waiting.remove(run)
        while self._waiting and len(self._admitted) < self._limit:
            admitted = self._waiting.popleft()
            admitted.position = None
            self._admitted.add(admitted)
            admitted.changed.set()
        for position, waiting in enumerate(self._waiting):
            self._move(waiting, position)

    def _move(self, run: ActiveRun, position: int) -> None:
        """Give a run its new place, once that has halved since the last one it was given."""
        if position * 2 <= (run.sent_position or 0):
            run.position = position
            run.changed.set()
