"""The runs of this process: admission, cancellation, and the order in which they end when it stops (G6, G7).

A run belongs to this process, not to the client that started it. It is one task, which `executor` does. Commands to it
come through the bus, so that a client of any process can cancel it.

Nothing here may know sockets, followers or the wire.
"""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import anyio
import orjson
from anyio.abc import TaskGroup, TaskStatus
from pydantic import BaseModel

from agentcast.agents.base import Agent, unavailable
from agentcast.agents.events import RunQueued
from agentcast.agents.inputs.checking import RejectedInput, read_input
from agentcast.server.bus.base import Bus, Created, NewRun, Origin, new_epoch, new_run_id
from agentcast.server.config import Settings
from agentcast.server.errors import (
    AlreadyFinished,
    InvalidInput,
    LogError,
    NotFound,
    TooMany,
    Unavailable,
    UnknownAgent,
)
from agentcast.server.protocol import Start
from agentcast.server.runs.executor import Executor
from agentcast.server.runs.ownership import end_orphans, watch_fences
from agentcast.server.runs.publisher import SummaryPublisher
from agentcast.server.runs.recorder import Recorder
from agentcast.server.runs.slots import ActiveRun, Slots
from agentcast.server.runs.snapshots import Snapshots

GREED = 4
"""A client may have at most this many times as many active runs as there are places left: one alone takes 80 % of them,
and several leave some for those who come later."""
SAVING = 2.0
"""Seconds for which a stopping hub still publishes summaries and saves snapshots."""

logger = logging.getLogger(__name__)


class Runs:
    """Starts, executes and cancels runs. `serve` must be running while the others are used."""

    def __init__(self, bus: Bus, agents: Mapping[str, Agent], settings: Settings, worker: str) -> None:
        self.agents = agents
        self._bus = bus
        self._settings = settings
        self._executor = Executor(bus, worker, settings.cancel_grace)
        self._slots = {name: Slots(agent.spec.max_concurrent) for name, agent in agents.items()}
        self._snapshots = Snapshots()
        self._summaries = SummaryPublisher(bus)
        self.ended = 0
        """Runs of this process that have ended, or were taken over."""
        self._runs: dict[str, ActiveRun] = {}
        self._started: Counter[object] = Counter()
        """Active runs by their starter."""
        self._tasks: TaskGroup | None = None
        self._stopping = False
        self._grace = settings.grace
        self._waiting: anyio.CancelScope | None = None
        self._idle = anyio.Event()

    async def serve(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Be the home of the runs, until `stop` has ended them all."""
        async with AsyncExitStack() as stack:
            stack.callback((await self._bus.handle_commands(self._handle)).close)
            async with anyio.create_task_group() as self._tasks, anyio.create_task_group() as others:
                others.start_soon(self._snapshots.run)
                others.start_soon(self._summaries.run)
                others.start_soon(end_orphans, self._bus, self._runs, self._snapshots, self._summaries)
                others.start_soon(watch_fences, self._bus, self._runs)
                task_status.started()
                await self._idle.wait()
                await self._save_last()
                others.cancel_scope.cancel()

    @property
    def active(self) -> int:
        """Runs that are queued or running here."""
        return len(self._runs)

    @property
    def abandoned(self) -> int:
        """Agents that ignored their cancellation and were left behind."""
        return self._executor.abandoned

    # -- Starting --------------------------------------------------------------------------------------------------

    async def start(self, principal: str, command: Start, starter: object | None = None) -> Created:
        """Create a run, or find the one that `command.key` names. `starter` is the client that asks for it.

        :raises UnknownAgent: there is no such agent.
        :raises InvalidInput: the input does not fit the agent's schema; `details` names the fields.
        :raises Conflict: the key was used for another agent or input.
        :raises TooMany: this process has as many runs as it takes, in all or from this starter.
        :raises Unavailable: the agent is, the bus is away, or the hub is shutting down.
        """
        agent = self._agent(command.agent)
        input = _validated(agent, command.input)
        if (reason := unavailable(agent)) is not None:
            raise Unavailable(f"agent {command.agent} is not available: {reason}")
        if self._stopping or self._tasks is None:
            raise Unavailable("the hub is shutting down; try again in a moment")
        self._check_places(starter)
        epoch = new_epoch()
        id = new_run_id()
        origin = Origin(agent.spec.name, principal, command.thread, time.time())
        recorder = Recorder(self._bus, id, origin, epoch, snapshots=self._snapshots, summaries=self._summaries)
        run = ActiveRun(id, agent, input, command.thread, principal, recorder, starter)
        slots = self._slots[agent.spec.name]
        self._runs[id] = run
        self._started[starter] += 1
        slots.enter(run)
        created = None
        try:
            created = await self._create(run, origin, epoch, command)
        finally:
            if created is None or created.fence is None:
                self._forget(run)
        if created.fence is not None:
            run.recorder.begin(created.fence)
            self._tasks.start_soon(self._execute, run, name=f"run {id}")
        return created

    async def _create(self, run: ActiveRun, origin: Origin, epoch: str, command: Start) -> Created:
        queued = RunQueued(epoch=epoch, input=command.input, thread=command.thread, position=run.position)
        new = NewRun(
            run=run.id,
            epoch=epoch,
            agent=origin.agent,
            principal=origin.principal,
            thread=origin.thread,
            created=origin.created,
            first=run.recorder.first_frame(origin.created, queued),
            key=command.key,
            fingerprint=_fingerprint(command),
        )
        return await self._bus.create(new)

    def _agent(self, name: str) -> Agent:
        try:
            return self.agents[name]
        except KeyError:
            known = ", ".join(sorted(self.agents)) or "none"
            raise UnknownAgent(f"there is no agent {name[:64]!r}; known are: {known}") from None

    def _check_places(self, starter: object | None) -> None:
        active, most = len(self._runs), self._settings.max_active
        if active >= most:
            raise TooMany(f"{active} runs are active here, which is the most; wait until some have ended")
        mine = 0 if starter is None else self._started[starter]
        if mine >= GREED * (most - active):
            raise TooMany(
                f"{mine} of the {active} runs that are active here are of this connection, and the {most - active} "
                "places left are for others; wait until some have ended"
            )

    def _forget(self, run: ActiveRun) -> None:
        if run.fenced:
            self._summaries.forget(run.id)
        del self._runs[run.id]
        self.ended += 1
        self._started[run.starter] -= 1
        if not self._started[run.starter]:
            del self._started[run.starter]
        self._slots[run.agent.spec.name].leave(run)
        if self._stopping and not self._runs:
            self._idle.set()

    async def _execute(self, run: ActiveRun) -> None:
        try:
            await self._executor.execute(run)
        finally:
            self._forget(run)

    # -- Cancelling ------------------------------------------------------------------------------------------------

    async def cancel(self, principal: str, run: str, reason: str | None) -> None:
        """Ask a run, of whatever process, to stop; returns once `cancel_requested` is in its log.

        :raises NotFound: there is no such run.
        :raises AlreadyFinished: it has ended.
        :raises Unavailable: the bus is away, or no process owns the run.
        """
        info = (await self._bus.info([run])).get(run)
        if info is None or info.principal != principal:
            raise NotFound(f"there is no run {run[:64]!r}")
        if info.ended is not None:
            raise AlreadyFinished(f"run {run} has ended already ({info.status})")
        await self._bus.send_command(run, {"op": "cancel", "reason": reason, "by": principal})

    async def _handle(self, id: str, command: Mapping[str, Any]) -> None:
        """A command that came through the bus: `cancel`, or `verify` from the bus itself."""
        run = self._runs.get(id)
        if command["op"] == "verify":
            if run is not None:
                await self._verify(run)
            return
        if run is None or run.finishing or run.cause in ("timeout", "shutting_down"):
            raise AlreadyFinished(f"run {id} has ended already")
        if run.cause is None:
            run.by = command["by"]
            run.end("cancelled", command["reason"])
        await run.cancel_logged.wait()
        if run.fenced:
            raise AlreadyFinished(f"run {id} has ended already")

    async def _verify(self, run: ActiveRun) -> None:
        try:
            await run.recorder.verify()
        except LogError:
            run.fence_off()

    # -- Stopping --------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Take no new runs; let running ones finish for `grace` seconds, then end them as `shutting_down`."""
        self._stopping = True
        if not self._runs:
            self._idle.set()
        for run in list(self._runs.values()):
            if run.position is not None:
                run.end("shutting_down")
        with anyio.move_on_after(self._grace) as self._waiting:
            await self._idle.wait()
        for run in list(self._runs.values()):
            run.end("shutting_down")
        with anyio.move_on_after(self._settings.cancel_grace + 2):
            await self._idle.wait()
        if self._tasks is not None and not self._idle.is_set():
            logger.error("%d runs could not be ended in time", len(self._runs))
            self._tasks.cancel_scope.cancel()
        else:
            await self._save_last()

    async def _save_last(self) -> None:
        """Give the last summaries and snapshots some time. What these would have said can still be folded out of the
        logs."""
        with anyio.move_on_after(SAVING):
            await self._summaries.drain()
            await self._snapshots.saved.wait()

    def hurry(self) -> None:
        """Let running runs finish no longer: `stop`, now or later, ends them at once."""
        self._grace = 0.0
        if self._waiting is not None:
            self._waiting.cancel()


def _validated(agent: Agent, input: Mapping[str, Any]) -> BaseModel:
    try:
        return read_input(agent.spec.input_model, input)
    except RejectedInput as rejected:
        if rejected.__cause__ is not None:
            logger.warning("an input of %s could not be checked", agent.spec.name, exc_info=rejected.__cause__)
        raise InvalidInput(f"invalid input for {agent.spec.name}: {rejected}", details=rejected.problems) from None


def _fingerprint(command: Start) -> str:
    try:
        document = orjson.dumps([command.agent, command.input], option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError as error:
        raise InvalidInput(f"invalid input for {command.agent}: {error}") from None
    return hashlib.sha256(document).hexdigest()
