"""The runs of this process: admission, queue, execution, cancellation, and exactly one end for each (G6, G7, G9).

A run belongs to this process, not to the client that started it. It is one task: it waits for a slot of its agent,
executes the agent, and records one terminal event, whatever the agent does. Commands to it come through the bus, so
that a client of any process can cancel it.

Nothing here may know sockets, followers or the wire.
"""

import hashlib
import logging
import random
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import anyio
import orjson
from anyio.abc import TaskGroup, TaskStatus
from pydantic import BaseModel

from agentcast.agents.base import Agent, Stopped, Task, Turn, public_message, unavailable
from agentcast.agents.channel import Channel
from agentcast.agents.events import (
    CancelRequested,
    RunCancelled,
    RunEnd,
    RunError,
    RunFailure,
    RunPosition,
    RunQueued,
    RunStart,
    Terminal,
)
from agentcast.agents.execution import Execution
from agentcast.agents.failures import failure_of
from agentcast.agents.inputs.checking import RejectedInput, read_input
from agentcast.server.bus.base import Bus, Created, Filter, NewRun, Origin, new_epoch, new_run_id
from agentcast.server.bus.load_state import load_state
from agentcast.server.config import Settings
from agentcast.server.errors import (
    AlreadyFinished,
    Fenced,
    InvalidInput,
    LogError,
    NotFound,
    TooMany,
    Unavailable,
    UnknownAgent,
)
from agentcast.server.protocol import Start
from agentcast.server.runs.ownership import end_orphans, watch_fences
from agentcast.server.runs.recorder import Recorder, Snapshots
from agentcast.server.runs.slots import ActiveRun, Slots
from agentcast.server.state import RunState

HISTORY_TURNS = 20
GREED = 4
"""A client may have at most this many times as many active runs as there are places left: one alone takes 80 % of them,
and several leave some for those who come later."""
SAVING = 2.0
"""Seconds for which a stopping hub still saves snapshots."""
UNKNOWN = ("agent_error", "lm_error")
"""Codes of failures that only a traceback explains."""

logger = logging.getLogger(__name__)


class Runs:
    """Starts, executes and cancels runs. `serve` must be running while the others are used."""

    def __init__(self, bus: Bus, agents: Mapping[str, Agent], settings: Settings, worker: str) -> None:
        self.agents = agents
        self._bus = bus
        self._settings = settings
        self._worker = worker
        self._slots = {name: Slots(agent.spec.max_concurrent) for name, agent in agents.items()}
        self._snapshots = Snapshots()
        self._runs: dict[str, ActiveRun] = {}
        self._started: Counter[object] = Counter()
        """Active runs by their starter."""
        self._tasks: TaskGroup | None = None
        self._stopping = False
        self._grace = settings.grace
        self._waiting: anyio.CancelScope | None = None
        self._idle = anyio.Event()
        self.abandoned = 0
        """Agents that ignored their cancellation and were left behind."""

    async def serve(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Be the home of the runs, until `stop` has ended them all."""
        async with AsyncExitStack() as stack:
            stack.callback((await self._bus.handle_commands(self._handle)).close)
            async with anyio.create_task_group() as self._tasks, anyio.create_task_group() as others:
                others.start_soon(self._snapshots.run)
                others.start_soon(end_orphans, self._bus, self._runs, self._snapshots)
                others.start_soon(watch_fences, self._bus, self._runs)
                task_status.started()
                await self._idle.wait()
                await self._save_last()
                others.cancel_scope.cancel()

    @property
    def active(self) -> int:
        """Runs that are queued or running here."""
        return len(self._runs)

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
        recorder = Recorder(self._bus, id, origin, epoch, snapshots=self._snapshots)
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
            run.recorder.fence = created.fence
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
        del self._runs[run.id]
        self._started[run.starter] -= 1
        if not self._started[run.starter]:
            del self._started[run.starter]
        self._slots[run.agent.spec.name].leave(run)
        if self._stopping and not self._runs:
            self._idle.set()

    # -- Executing -------------------------------------------------------------------------------------------------

    async def _execute(self, run: ActiveRun) -> None:
        try:
            with run.owned:
                await run.recorder.record(time.time(), await self._run_to_end(run))
            if run.owned.cancelled_caught:
                raise Fenced(run.id)
        except LogError as error:
            run.fence_off()
            logger.warning("%s: another process has ended or taken over this run; dropped here", error)
        except Exception:
            logger.exception("run %s of %s could not be recorded", run.id, run.agent.spec.name)
        finally:
            run.cancel_logged.set()
            self._forget(run)

    async def _run_to_end(self, run: ActiveRun) -> Terminal:
        try:
            await self._wait_for_slot(run)
            if run.cause is None:
                return await self._run_agent(run)
            await self._log_cancel(run)
            return _early_end(run)
        except LogError:
            raise
        except Exception:
            logger.exception("run %s of %s broke down in the hub", run.id, run.agent.spec.name)
            run.finishing = True
            return RunError(error=_INTERNAL, usage=run.recorder.usage, duration=run.duration)

    async def _wait_for_slot(self, run: ActiveRun) -> None:
        while run.cause is None and (position := run.position) is not None:
            if position != run.told_position:
                run.told_position = position
                await run.recorder.record(time.time(), RunPosition(position=position))
            else:
                await run.news.wait()
                run.news = anyio.Event()

    async def _run_agent(self, run: ActiveRun) -> Terminal:
        """Execute the agent and say how the run ends. The agent has ended, or was abandoned, when this returns."""
        run.started = time.monotonic()
        await run.recorder.record(time.time(), RunStart(worker=self._worker))
        spec = run.agent.spec
        task = Task(
            run=run.id,
            input=run.input,
            thread=run.thread,
            history=await self._history(run),
            deadline=time.time() + spec.timeout,
        )
        channel = Channel(f"run {run.id} of agent {spec.name}")
        execution = Execution(run.agent.run(task, channel), channel)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run.recorder.record_from, channel)
                await self._wait_for_end(run, execution)
                channel.close()
        except* LogError as group:
            run.fence_off()
            raise group.exceptions[0] from None
        finally:
            if run.fenced:
                await self._dismiss(run, execution, channel)
            execution.abandon()  # does nothing to one that is done
        return self._ending(run, execution, channel)

    async def _dismiss(self, run: ActiveRun, execution: Execution, channel: Channel) -> None:
        """Stop the agent of a run that another process has claimed. What it emits meanwhile is dropped."""

        async def drop() -> None:
            while await channel.receive():
                pass

        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(drop)
                await self._stop(run, execution)
                tasks.cancel_scope.cancel()

    async def _wait_for_end(self, run: ActiveRun, execution: Execution) -> None:
        """Until the agent is done, or `cancel_grace` seconds after it was asked to stop."""
        with anyio.move_on_after(run.agent.spec.timeout) as timeout:
            await self._wait_for_cause(run, execution)
        if timeout.cancelled_caught:
            run.end("timeout")
        await self._log_cancel(run)
        await self._stop(run, execution)
        run.finishing = True

    async def _stop(self, run: ActiveRun, execution: Execution) -> None:
        """Ask the agent to stop, unless it is done, and give it `cancel_grace` seconds for that."""
        if not execution.done.is_set():
            execution.cancel()
            with anyio.move_on_after(self._settings.cancel_grace):
                await execution.done.wait()
        if not execution.done.is_set():
            self.abandoned += 1
            logger.warning("run %s of %s ignored its cancellation and is left behind", run.id, run.agent.spec.name)

    async def _wait_for_cause(self, run: ActiveRun, execution: Execution) -> None:
        async with anyio.create_task_group() as tasks:

            async def watch() -> None:
                while run.cause is None:
                    await run.news.wait()
                    run.news = anyio.Event()
                tasks.cancel_scope.cancel()

            tasks.start_soon(watch)
            await execution.done.wait()
            tasks.cancel_scope.cancel()

    def _ending(self, run: ActiveRun, execution: Execution, channel: Channel) -> Terminal:
        usage = run.recorder.usage
        duration = run.duration
        if run.cause == "cancelled":
            return RunCancelled(reason=run.reason, usage=usage, duration=duration)
        failure = self._failure(run, execution, channel)
        if failure is not None:
            return RunError(error=failure, usage=usage, duration=duration)
        try:
            return RunEnd(result=execution.value, usage=usage, duration=duration)
        except BaseException as error:  # nothing here awaits, and SystemExit must not end the server
            logger.exception("%s returned what cannot be shown", channel.label)
            message = f"the result cannot be shown: {public_message(error)}"
            return RunError(error=RunFailure(code="invalid_result", message=message), usage=usage, duration=duration)

    def _failure(self, run: ActiveRun, execution: Execution, channel: Channel) -> RunFailure | None:
        if run.cause == "timeout":
            seconds = f"{run.agent.spec.timeout:g} s"
            return RunFailure(code="timeout", message=f"the agent took longer than {seconds}", retryable=True)
        if run.cause is not None:
            return _SHUTTING_DOWN
        error = execution.error
        if channel.overflowed:
            message = "the agent emitted events faster than they could be recorded, without ever waiting"
            return RunFailure(code="event_overflow", message=message)
        if error is None:
            return None
        if isinstance(error, Stopped | anyio.get_cancelled_exc_class()):
            return RunFailure(code="agent_error", message="the agent stopped itself")
        failure = failure_of(error)
        if failure.code in UNKNOWN:
            logger.error("%s failed", channel.label, exc_info=error)
        else:
            logger.warning("%s failed: %s: %s", channel.label, failure.code, failure.message)
        return failure

    async def _history(self, run: ActiveRun) -> tuple[Turn, ...]:
        """Earlier finished turns of the thread, oldest first. Waits for a bus that is away."""
        while run.thread is not None:
            try:
                return await self._turns(run)
            except Unavailable:
                await anyio.sleep(random.uniform(0.2, 1.0))  # noqa: S311 -- jitter, not a secret
        return ()

    async def _turns(self, run: ActiveRun) -> tuple[Turn, ...]:
        earlier = await self._bus.list(
            Filter(principal=run.principal, thread=run.thread, statuses={"done"}, before=run.id, limit=HISTORY_TURNS)
        )
        turns = []
        for info in reversed(earlier):
            try:
                state = RunState.decode((await load_state(self._bus, info.run)).state).document
            except NotFound:
                continue  # forgotten in the meantime
            turns.append(Turn(input=state["input"], result=state.get("result")))
        return tuple(turns)

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

    async def _log_cancel(self, run: ActiveRun) -> None:
        """The first half of a cancellation. The run's own task writes it: who asked for it may be gone by now."""
        if run.cause == "cancelled":
            await run.recorder.record(time.time(), CancelRequested(reason=run.reason, by=run.by))
            run.cancel_logged.set()

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
        """Give the last snapshots some time. What they would have said can still be folded out of the logs."""
        with anyio.move_on_after(SAVING):
            await self._snapshots.saved.wait()

    def hurry(self) -> None:
        """Let running runs finish no longer: `stop`, now or later, ends them at once."""
        self._grace = 0.0
        if self._waiting is not None:
            self._waiting.cancel()


_INTERNAL = RunFailure(code="internal", message="the hub could not go on with this run", retryable=True)
_SHUTTING_DOWN = RunFailure(code="shutting_down", message="the hub was stopped; start again", retryable=True)


def _early_end(run: ActiveRun) -> Terminal:
    """The end of a run that never got a slot."""
    run.finishing = True
    if run.cause == "cancelled":
        return RunCancelled(reason=run.reason, duration=run.duration)
    return RunError(error=_SHUTTING_DOWN, duration=run.duration)


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
