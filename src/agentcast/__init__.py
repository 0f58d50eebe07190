"""Runs many LLM agents at once and lets any number of people watch them live.

These names are the whole public interface; docs/api.md has a line about each. They are imported when they are first
used, so that a program that needs one of them does not wait for the others: `import agentcast` is quick and loads
neither DSPy nor a web framework. What is under `agentcast.agents` and `agentcast.server` may change at any time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentcast import events
    from agentcast.agents.base import Agent, AgentSpec, Emitter, Task, ToolError
    from agentcast.agents.context import status
    from agentcast.agents.graph import END, Graph, StatefulNode
    from agentcast.agents.llm import configure
    from agentcast.agents.mcp import mcp_server
    from agentcast.agents.react import ReAct
    from agentcast.agents.registry import Registry
    from agentcast.agents.streaming import stream_events, streamify
    from agentcast.agents.transpiler import AgentTranspiler, self_correcting
    from agentcast.server.client import connect

__version__ = "0.1.0"

__all__ = [
    "END",
    "Agent",
    "AgentSpec",
    "AgentTranspiler",
    "Emitter",
    "Graph",
    "ReAct",
    "Registry",
    "StatefulNode",
    "Task",
    "ToolError",
    "__version__",
    "configure",
    "connect",
    "events",
    "mcp_server",
    "self_correcting",
    "status",
    "stream_events",
    "streamify",
]

_MODULES = {
    "END": "agents.graph",
    "Agent": "agents.base",
    "AgentSpec": "agents.base",
    "AgentTranspiler": "agents.transpiler",
    "Emitter": "agents.base",
    "Graph": "agents.graph",
    "ReAct": "agents.react",
    "Registry": "agents.registry",
    "StatefulNode": "agents.graph",
    "Task": "agents.base",
    "ToolError": "agents.base",
    "configure": "agents.llm",
    "connect": "server.client",
    "mcp_server": "agents.mcp",
    "self_correcting": "agents.transpiler",
    "status": "agents.context",
    "stream_events": "agents.streaming",
    "streamify": "agents.streaming",
}
"""Where each name is defined."""


if not TYPE_CHECKING:  # to a type checker, `__getattr__` would mean that there is every name

    def __getattr__(name: str) -> Any:
        if name == "events":
            return import_module("agentcast.events")
        if name not in _MODULES:
            raise AttributeError(f"module 'agentcast' has no attribute {name!r}: {_hint(name)}", name=name)
        value = getattr(import_module(f"agentcast.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _hint(name: str) -> str:
    from difflib import get_close_matches

    if name[:1].isupper() and name in import_module("agentcast.events").__all__:
        return f"the classes of events are in agentcast.events, write agentcast.events.{name}"
    if similar := get_close_matches(name, __all__, 1):
        return f"did you mean {similar[0]!r}?"
    return f"it has: {', '.join(__all__)}"
