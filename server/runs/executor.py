"""Executing one run of this process: from its place in the queue to the terminal event that it ends with (G6, G7, G9).

Whatever the agent does, `execute` records exactly one end, unless another process has taken over the run. The agent has
ended, or was abandoned, before that.

Nothing here may know how runs are started, found or counted.
"""

import logging
import time

import anyio

from agentcast.agents.base import Stopped, Task, public_message
from agentcast.agents.channel import Channel
from agentcast.agents.events import (
    CancelRequested,
    RunCancelled,
    RunEnd,
    RunError,
    RunFailure,
    RunPosition,
    RunStart,
    Terminal,
)
from agentcast.agents.execution import Execution
from agentcast.agents.failures import failure_of
from agentcast.server.bus.base import Bus
from agentcast.server.errors import Fenced, LogError
from agentcast.server.runs.history import read_history
from agentcast.server.runs.slots import ActiveRun

UNKNOWN = ("agent_error", "lm_error")
"""Codes of failures that only a traceback explains."""

logger = logging.getLogger(__name__)


class Executor:
    """Executes the runs of one process. A cancelled agent gets `cancel_grace` seconds to clean up."""

    def __init__(self, bus: Bus, worker: str, cancel_grace: float) -> None:
        self.abandoned = 0
        """Agents that ignored their cancellation and were left behind."""
        self._bus = bus
        self._worker = worker
        self._cancel_grace = cancel_grace

    async def execute(self, run: ActiveRun) -> None:
        """Execute the run and record its end. Never raises."""
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
            if position != run.sent_position:
                run.sent_position = position
                await run.recorder.record(time.time(), RunPosition(position=position))
            else:
                await run.changed.wait()
                run.changed = anyio.Event()

    async def _run_agent(self, run: ActiveRun) -> Terminal:
        """Execute the agent and say how the run ends. The agent has ended, or was abandoned, when this returns."""
        run.started = time.monotonic()
        await run.recorder.record(time.time(), RunStart(worker=self._worker))
        spec = run.agent.spec
        task = Task(
            run=run.id,
            input=run.input,
            thread=run.thread,
            history=await read_history(self._bus, run),
            deadline=time.time() + spec.timeout,
        )
        channel = Channel(f"run {run.id} of agent {spec.name}")
        execution = Execution(run.agent.run(task, channel), channel, on_done=lambda: run.changed.set())
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
            with anyio.move_on_after(self._cancel_grace):
                await execution.done.wait()
        if not execution.done.is_set():
            self.abandoned += 1
            logger.warning("run %s of %s ignored its cancellation and is left behind", run.id, run.agent.spec.name)

    async def _wait_for_cause(self, run: ActiveRun, execution: Execution) -> None:
        """Until the agent is done, or there is a reason to stop it. Without a task of its own, which would be cancelled
        each time: an exception and its traceback, in a cycle with all that they see."""
        while run.cause is None and not execution.done.is_set():
            await run.changed.wait()
            run.changed = anyio.Event()

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

    async def _log_cancel(self, run: ActiveRun) -> None:
        """The first half of a cancellation. The run's own task writes it: the client may have left."""
        if run.cause == "cancelled":
            await run.recorder.record(time.time(), CancelRequested(reason=run.reason, by=run.by))
            run.cancel_logged.set()


_INTERNAL = RunFailure(code="internal", message="the hub could not go on with this run", retryable=True)
_SHUTTING_DOWN = RunFailure(code="shutting_down", message="the hub was stopped; start again", retryable=True)


def _early_end(run: ActiveRun) -> Terminal:
    """The end of a run that never got a slot."""
    run.finishing = True
    if run.cause == "cancelled":
        return RunCancelled(reason=run.reason, duration=run.duration)
    return RunError(error=_SHUTTING_DOWN, duration=run.duration)
