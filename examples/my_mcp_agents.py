import sys

from agentcast import Registry, mcp_server

registry = Registry()

# Any MCP server. Others: mcp_server("search", url="https://example.org/mcp", token=os.environ["SEARCH_TOKEN"])
library = mcp_server("texts", command=sys.executable, args=["-m", "agentcast.agents.demo.librarian_server"])

# An agent with its tools. They mix with functions, too: @registry.react(tools=[library, word_count]).
registry.mcp("reader", "question -> answer", servers=[library])
