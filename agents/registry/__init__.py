"""Registries: which agents there are, by name.

    registry = Registry()
    registry.add("summarizer", dspy.ChainOfThought("text -> summary"))

    @registry.react(tools=[search])
    class Researcher(dspy.Signature): ...

    @registry.agent
    async def greeter(name: str, emit: Emitter) -> str: ...

Names, descriptions, input models and JSON Schemas come from signatures, types and docstrings. What cannot be derived
is an error at once, which says what to do. `load` gets registries from strings such as "package.module:registry".
"""

from agentcast.agents.registry.book import Registry
from agentcast.agents.registry.errors import RegistryError
from agentcast.agents.registry.loading import load
from agentcast.agents.registry.servers import add_assistant, servers_used

__all__ = ["Registry", "RegistryError", "add_assistant", "load", "servers_used"]
