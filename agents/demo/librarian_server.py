"""The librarian's MCP server, over stdio: search and read a folder of texts, and a slow index that reports progress.

    python -m agentcast.agents.demo.librarian_server

It is an ordinary MCP server: any other client can use it, too. It must not know agents.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError as McpToolError

from agentcast.agents.base import ToolError
from agentcast.agents.demo import corpus

INDEX_SECONDS = 8.0
"""How long an index takes at most..."""
FILE_SECONDS = 0.25
"""...and each file in it: it leaves the disk to others, and can be watched."""
MAX_HEADINGS = 6

server = MCPServer("library", instructions="Search and read a folder of texts.")

T = TypeVar("T")


@server.tool()
async def search(query: str, limit: int = 5) -> str:
    """Search the files for words. Gives the passages that fit best, each under the file and line where it starts."""
    return await _done(functools.partial(corpus.found, query, limit))


@server.tool()
async def read(file: str, line: int = 1, count: int | None = None) -> str:
    """Read a file: the section around a line, or count lines from that line on."""
    return await _done(lambda: corpus.excerpt(*corpus.corpus().open(file), line, count))


@server.tool()
async def index(ctx: Context) -> str:
    """List and count all files of the library, with their headings. Reads them one by one, which takes seconds."""
    names = list(await _done(lambda: corpus.corpus().files()))
    entries = []
    for number, name in enumerate(names):
        await ctx.report_progress(number, len(names), f"Reading {name}")
        entries.append(await _done(functools.partial(_entry, name)))
        await anyio.sleep(min(FILE_SECONDS, INDEX_SECONDS / len(names)))
    await ctx.report_progress(len(names), len(names), "Done")
    return "\n".join([f"The index has {len(names)} files.", *entries])


def _entry(name: str) -> str:
    _, lines = corpus.corpus().open(name)
    headings = corpus.headings(lines)
    shown = "; ".join(headings[:MAX_HEADINGS]) + ("; …" if len(headings) > MAX_HEADINGS else "")
    return f"- {name}, {len(lines)} lines" + (f": {shown}" if shown else "")


async def _done(call: Callable[[], T]) -> T:
    try:
        return await anyio.to_thread.run_sync(call)
    except ToolError as error:
        raise McpToolError(str(error)) from error


if __name__ == "__main__":
    server.run("stdio")
