"""What runs: the agent contract, the event vocabulary and the bridges from DSPy to it.

This package knows nothing of sockets, buses or servers; `server` imports it, never the other way round.

    from agentcast.agents import AgentTranspiler, Graph, StatefulNode

These names are fetched when they are asked for, since what they need takes long to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentcast.agents.graph import END, Graph, GraphError, Reducer, StatefulNode
    from agentcast.agents.transpiler import AgentTranspiler, Program

__all__ = ["END", "AgentTranspiler", "Graph", "GraphError", "Program", "Reducer", "StatefulNode"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "agentcast.agents.transpiler" if name in ("AgentTranspiler", "Program") else "agentcast.agents.graph"
    return getattr(importlib.import_module(module), name)
