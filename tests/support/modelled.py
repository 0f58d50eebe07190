"""Agents that call language models, for hubs started as processes: `--agents tests.support.modelled:registry`."""

import sys
from typing import Any

import dspy

from agentcast.agents.registry import Registry

OWN = "anthropic/claude-sonnet-4-5"
FIXED = "ollama/llama3.2"

registry = Registry()
registry.add("writer", dspy.Predict("question -> answer"))
registry.add("other", dspy.Predict("question -> answer"), lm=OWN)


class Several(dspy.Module):  # type: ignore[misc]
    """Asks the agent's model first, then one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.draft = dspy.Predict("question -> answer")
        self.final = dspy.Predict("question -> answer")
        self.final.lm = dspy.LM(FIXED)

    async def aforward(self, question: str) -> Any:
        draft = await self.draft.acall(question=question)
        return await self.final.acall(question=f"{question} {draft.answer}")


registry.add("several", Several(), signature="question -> answer", lm=OWN)


@registry.agent
async def loaded() -> bool:
    """Whether this process has loaded litellm."""
    return "litellm" in sys.modules
