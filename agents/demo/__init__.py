"""Agents that come with agentcast and work offline: `agents.demo:registry`."""

from agents.demo.researcher import registry

__all__ = ["registry"]
