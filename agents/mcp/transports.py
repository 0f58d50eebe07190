"""How an MCP server of each kind is connected to, and why that failed. It must not be known here how a connection is
kept."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import PurePath
from typing import Any, assert_never

import httpx2
from mcp.client.streamable_http import streamable_http_client

from agentcast.agents.mcp.http import bounded
from agentcast.agents.mcp.oversize import MAX_BYTES
from agentcast.agents.mcp.sources import Http, InProcess, Source, Stdio
from agentcast.agents.mcp.stdio import StdioLog, stdio_transport

CONNECT_TIMEOUT = 30.0
"""Seconds for connecting to an HTTP server, and for each write."""


def transport(source: Source, ended: Callable[[], None], log: StdioLog) -> Any:
    """What `mcp.Client` connects to. `ended` is called when the connection has ended by itself; one over HTTP does not:
    its server is asked from time to time."""
    match source:
        case Stdio():
            return stdio_transport([source.command, *source.args], source.env, source.cwd, ended, log)
        case Http():
            return _http_transport(source, log)
        case InProcess():
            return source.server
        case _:
            assert_never(source)


def explain(source: Source, error: BaseException, log: StdioLog) -> str | None:
    """Why `source` cannot be reached, if more is known than `error` says."""
    match source:
        case Stdio():
            if isinstance(error, OSError):
                name = PurePath(source.command).name
                return f"cannot run {name!r}: {error.strerror or type(error).__name__}"
            return log.last_words()
        case Http():
            return _explain_http(error, log)
        case InProcess():
            return None
        case _:
            assert_never(source)


@asynccontextmanager
async def _http_transport(source: Http, log: StdioLog) -> AsyncIterator[Any]:
    async def answered(response: httpx2.Response) -> None:
        log.http_status = response.status_code if response.status_code >= 400 else None
        response.stream = bounded(response)

    # Compressed bodies could not be cut. A call has its own time limit, so there is none for reading; `bounded` limits
    # events.
    headers = {**source.headers, "Accept-Encoding": "identity"}
    timeout = httpx2.Timeout(CONNECT_TIMEOUT, read=None)
    async with httpx2.AsyncClient(headers=headers, timeout=timeout, event_hooks={"response": [answered]}) as http:
        async with streamable_http_client(source.url, http_client=http, max_sse_event_size=2 * MAX_BYTES) as streams:
            yield streams


def _explain_http(error: BaseException, log: StdioLog) -> str | None:
    if isinstance(error, httpx2.ConnectError):
        return "nobody answers at its address"
    if isinstance(error, httpx2.TransportError):
        return f"the connection broke ({type(error).__name__})"
    if log.http_status in (401, 403):
        return f"it refuses us (HTTP {log.http_status}): check its token and headers"
    return None if log.http_status is None else f"it answers with HTTP {log.http_status}"
