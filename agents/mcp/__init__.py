"""MCP servers as tools of agents: described once, supervised, shared by any number of runs.

    files = mcp_server("files", command="mcp-server-files", args=["/srv/texts"])
    search = mcp_server("search", url="https://example.org/mcp", token=os.environ["SEARCH_TOKEN"])

    @registry.react(tools=[files, search, word_count])
    class Editor(dspy.Signature): ...

    async with files:                                # outside of a hub
        prediction = await agent.acall(question="…")

A server is started by `supervise` (which the hub does) or `async with`, and restarted whenever it dies or hangs. Its
tools become those of a ReAct program at the start of each run. What it says reaches clients and LMs bounded and without
secrets, tracebacks or paths (G9). Importing this does not import the SDK, which takes half a second: the first server
that is started does. Nothing in here may know registries, runs or the hub.
"""

from agentcast.agents.mcp.config import McpConfigError, load_servers
from agentcast.agents.mcp.server import (
    McpServer,
    McpUnavailable,
    ServerStatus,
    check,
    distinct,
    mcp_server,
    running,
    servers_of,
    supervise,
    tried,
)
from agentcast.agents.mcp.tools import TOOLS_AT_ONCE, McpTool, with_distinct_names

__all__ = [
    "TOOLS_AT_ONCE",
    "McpConfigError",
    "McpServer",
    "McpTool",
    "McpUnavailable",
    "ServerStatus",
    "check",
    "distinct",
    "load_servers",
    "mcp_server",
    "running",
    "servers_of",
    "supervise",
    "tried",
    "with_distinct_names",
]
