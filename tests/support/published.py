"""Runs whose summaries a test publishes itself, as their owner would."""

from typing import Any

import orjson

from agentcast.server.bus.base import Bus, Summary
from tests.contract.support import Log, new_run, summary


async def run_on(bus: Bus, *, principal: str = "anonymous", **fields: Any) -> Log:
    """A run that no agent executes."""
    return await Log.create(bus, new_run(principal=principal, **fields))


def record_of(log: Log, at: int, *, status: str = "running", **fields: Any) -> Summary:
    """A summary whose `data` says `at`."""
    agent = fields.get("agent", "echo")
    data = orjson.dumps({"run": log.run, "agent": agent, "status": status, "at": at})
    return summary(log, at, principal="anonymous", status=status, data=data, **fields)


async def publish(log: Log, at: int, **fields: Any) -> None:
    """Publish one."""
    await log.bus.publish_summaries([record_of(log, at, **fields)])


async def finish(log: Log, at: int, **fields: Any) -> None:
    """End the run, and publish its last summary."""
    await log.append(end=True)
    await publish(log, at, status="done", **fields)
