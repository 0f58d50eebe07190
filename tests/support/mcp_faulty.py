"""An MCP server that does on request whatever a bad one does. Run as a process, over stdio or HTTP.

    python tests/support/mcp_faulty.py [--many N] [--http [--port P] [--token T]]

With `--http` it prints its port. It knows nothing of the project.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import anyio
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import CallToolResult, EmbeddedResource, ImageContent, ResourceLink, TextContent, TextResourceContents

server = MCPServer("faulty")
STDOUT = os.dup(1)  # the SDK turns the other one away from the messages, which not every server does


def say(text: str) -> None:
    data = text.encode(errors="surrogateescape")
    while data:
        data = data[os.write(STDOUT, data) :]


@server.tool()
def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
async def echo(text: str, pause: float = 0) -> str:
    """Give the text back, after a pause."""
    await anyio.sleep(pause)
    return text


@server.tool()
def pid() -> int:
    """The process."""
    return os.getpid()


@server.tool()
async def steps(ctx: Context, count: int) -> str:
    """Report progress."""
    for number in range(count):
        await ctx.report_progress(number, count, f"step {number}")
    return "done"


@server.tool()
async def wait(file: str) -> str:
    """Wait until cancelled; the file shows how far it is."""
    write(file, "started")
    try:
        await anyio.sleep_forever()
    finally:
        write(file, "cancelled")
    return "never"


def write(file: str, text: str) -> None:
    Path(file).write_text(text)


@server.tool()
async def hang() -> str:
    """Answer nothing any more."""
    time.sleep(1_000)  # noqa: ASYNC251 -- on purpose
    return "never"


@server.tool()
async def die() -> str:
    """Be gone at once."""
    os._exit(7)


@server.tool()
async def fail(text: str) -> str:
    """Fail."""
    raise ToolError(text)


@server.tool()
async def trip() -> str:
    """Fail with a message that reveals too much."""
    raise ToolError(
        "boom\nTraceback (most recent call last):\n  File \"/srv/app.py\", line 3, in f\nKeyError: '/srv/a/x'"
    )


@server.tool()
def big(size: int) -> str:
    """A long text."""
    return "x" * size


@server.tool()
def table(rows: int) -> dict[str, Any]:
    """Much structured content."""
    return {"rows": [[number, str(number)] for number in range(rows)]}


@server.tool()
async def rubbish(lines: int) -> str:
    """Write to stdout what is no message, between and in front of messages."""
    for number in range(lines):
        say(f'{{"log": {number}}}\nDEBUG {number} \x00\udcff\n' if number % 2 else "[1, 2]\n\n")
    return "said"


@server.tool()
async def endless(size: int) -> str:
    """Write a line without an end to stdout."""
    for _ in range(size // 65_536):
        say("y" * 65_536)
    await anyio.sleep_forever()
    return "never"


@server.tool()
async def media() -> CallToolResult:
    """Everything but plain text."""
    text = TextResourceContents(uri="file:///notes.txt", mime_type="text/plain", text="n" * 5_000)
    return CallToolResult(
        content=[
            TextContent(type="text", text="Look:"),
            ImageContent(type="image", data="QUJD" * 1_000, mime_type="image/png"),
            ResourceLink(type="resource_link", name="plan", uri="file:///plan.pdf", mime_type="application/pdf"),
            EmbeddedResource(type="resource", resource=text),
        ]
    )


@server.tool()
async def wrong_structure() -> CallToolResult:
    """Text beside structured content that says more."""
    return CallToolResult(content=[TextContent(type="text", text="3 items")], structured_content={"items": [1, 2, 3]})


@server.tool()
def environment() -> dict[str, str]:
    """Give away what it knows."""
    return dict(os.environ)


@server.tool()
async def grow(ctx: Context, name: str) -> str:
    """Have one tool more."""

    def grown() -> str:
        return f"I am {name}"

    server.add_tool(grown, name=name, description=f"The tool {name}.")
    await ctx.session.send_tool_list_changed()
    await ctx.notify_tools_changed()
    return "grown"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--many", type=int, default=0)
    parser.add_argument("--http", action="store_true")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--token")
    options = parser.parse_args()
    for number in range(options.many):
        server.add_tool(lambda number=number: f"number {number}", name=f"tool_{number}", description="d" * 500)
    if options.http:
        serve_http(options.port, options.token)
    else:
        server.run("stdio")


def serve_http(port: int, token: str | None) -> None:
    import socket

    import uvicorn
    from starlette.responses import PlainTextResponse

    app = server.streamable_http_app()

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", ()))
        if scope["type"] == "http" and token and headers.get(b"authorization") != f"Bearer {token}".encode():
            await PlainTextResponse("no", 401)(scope, receive, send)
        else:
            await app(scope, receive, send)

    sock = socket.create_server(("127.0.0.1", port))
    say(f"{sock.getsockname()[1]}\n")
    uvicorn.Server(uvicorn.Config(guarded, log_level="warning")).run([sock])


if __name__ == "__main__":
    main()
