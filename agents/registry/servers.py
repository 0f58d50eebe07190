"""MCP servers and the agents of a registry: which agent uses which, and what a configuration file adds."""

from collections.abc import Iterable, Sequence

import dspy

from agentcast.agents.base import Agent
from agentcast.agents.mcp import McpServer, distinct
from agentcast.agents.registry.book import Registry
from agentcast.agents.registry.errors import RegistryError

ASSISTANT = "assistant"


class Assistant(dspy.Signature):  # type: ignore[misc]  # dspy is untyped
    """Do what is asked, or answer, with the help of the tools.

    Look things up instead of guessing. If the tools do not give what is needed, say so.
    """

    history: str = dspy.InputField(desc="earlier requests and answers of this conversation")
    request: str = dspy.InputField(desc="what you want")
    answer: str = dspy.OutputField()


def add_assistant(registry: Registry, servers: Sequence[McpServer]) -> Registry:
    """A registry with the agents of `registry` and, if there are `servers`, `assistant`, a ReAct agent that has the
    tools of all of them. An agent of that name that is there already stays as it is."""
    extended = Registry()
    extended.update(registry)
    if servers and ASSISTANT not in registry:
        names = ", ".join(server.name for server in servers)
        extended.mcp(ASSISTANT, Assistant, servers=servers, description=f"Does what you ask with the tools of {names}.")
    return extended


def servers_used(agents: Iterable[Agent]) -> tuple[McpServer, ...]:
    """The MCP servers of `agents`, each once. The host of the agents keeps them running
    (`agentcast.agents.mcp.supervise`).

    :raises RegistryError: two different ones have one name, or one is known by name only.
    """
    found: list[McpServer] = []
    for agent in agents:
        for server in getattr(agent, "servers", ()):
            if not server.defined:
                problem = f"nobody says what the MCP server {server.name!r} is"
                remedy = "define it in the file given with --mcp-config, or give mcp_server its command or url"
                raise RegistryError(f"agent {agent.spec.name!r}", problem, remedy)
            found.append(server)
    try:
        return distinct(found)
    except ValueError as error:
        raise RegistryError("MCP servers", str(error).partition(": ")[0], str(error).partition(": ")[2]) from error
