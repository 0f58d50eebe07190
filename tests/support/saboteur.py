"""A registry whose agent breaks the hub that runs it: `--agents tests.support.saboteur:registry`."""

from typing import Any

from agentcast.agents.registry import Registry
from agentcast.server.hub.rules import FeedReader

registry = Registry()


async def _broken(reader: Any) -> None:
    raise RuntimeError("broken on purpose")


@registry.agent
async def saboteur() -> str:
    """From now on, the hub cannot read its feed."""
    setattr(FeedReader, "read", _broken)  # noqa: B010 -- a method of another type
    return "done"
