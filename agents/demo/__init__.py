"""Agents that come with agentcast and work offline: `agentcast.agents.demo:registry`.

They are imported when they are asked for: the librarian's server lives in this package too, and needs none of them.
"""

from typing import Any

__all__ = ["Swarm", "registry"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from agentcast.agents.demo import librarian, report, swarm, triage  # noqa: F401 -- each adds itself to the registry

    return librarian.registry if name == "registry" else swarm.Swarm
