"""Agents that come with agentcast and work offline: `agents.demo:registry`."""

from agents.demo.researcher import registry
from agents.demo.swarm import Swarm

__all__ = ["Swarm", "registry"]
