"""Where an MCP server is: a command, an address, or an object in this process; and how each is connected to.

Whatever may hold a secret (environment, headers, addresses) is left out of every `repr` and made known to `redact`.
This module must not know how a connection is kept.
"""

import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urlsplit

import httpx2
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client

from agents.base import is_secret_name, keep_secret
from agents.mcp.stdio import MAX_LINE, StdioLog, stdio_transport

CONNECT_TIMEOUT = 30.0
"""Seconds for connecting to an HTTP server, and for each write."""
_PLAIN_HEADERS = frozenset({"accept", "accept-language", "content-type", "user-agent"})


@dataclass(frozen=True)
class Stdio:
    """A process that speaks MCP on stdin and stdout. It gets `env` and of our own environment only what is harmless
    (`PATH`, `HOME` and the like)."""

    command: str
    args: tuple[str, ...] = field(default=(), repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    cwd: str | None = field(default=None, repr=False)
    kind: ClassVar[str] = "stdio"

    def __post_init__(self) -> None:
        keep_secret(*(value for name, value in self.env.items() if is_secret_name(name)))

    def connect(self, ended: Callable[[], None], log: StdioLog) -> Any:
        """What `mcp.Client` connects to. `ended` is called when the connection has ended by itself."""
        return stdio_transport([self.command, *self.args], self.env, self.cwd, ended, log)

    def explain(self, error: BaseException, log: StdioLog) -> str | None:
        """Why it cannot be reached, if more is known than `error` says."""
        if isinstance(error, OSError):
            name = PurePath(self.command).name
            return f"cannot run {name!r}: {error.strerror or type(error).__name__}"
        return log.last_words()


@dataclass(frozen=True)
class Http:
    """A server at an address, by streamable HTTP."""

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    kind: ClassVar[str] = "http"

    def __post_init__(self) -> None:
        keep_secret(*self._secrets())

    def _secrets(self) -> Iterator[str]:
        parts = urlsplit(self.url)
        yield from filter(None, (parts.password, *(value for _, value in parse_qsl(parts.query))))
        for name, value in self.headers.items():
            if name.lower() not in _PLAIN_HEADERS:
                yield from (value, value.rpartition(" ")[2])

    @asynccontextmanager
    async def connect(self, ended: Callable[[], None], log: StdioLog) -> AsyncIterator[Any]:
        """As `Stdio.connect`. An HTTP connection does not end by itself: its server is asked from time to time."""

        async def note(response: httpx2.Response) -> None:
            log.http_status = response.status_code if response.status_code >= 400 else None

        # A call has its own time limit; the client must not end the stream of all others earlier.
        timeout = httpx2.Timeout(CONNECT_TIMEOUT, read=None)
        async with create_mcp_http_client(dict(self.headers), timeout) as http:
            http.event_hooks["response"].append(note)
            async with streamable_http_client(self.url, http_client=http, max_sse_event_size=MAX_LINE) as streams:
                yield streams

    def explain(self, error: BaseException, log: StdioLog) -> str | None:
        """As `Stdio.explain`."""
        if isinstance(error, httpx2.ConnectError):
            return "nobody answers at its address"
        if isinstance(error, httpx2.TransportError):
            return f"the connection broke ({type(error).__name__})"
        if log.http_status in (401, 403):
            return f"it refuses us (HTTP {log.http_status}): check its token and headers"
        return None if log.http_status is None else f"it answers with HTTP {log.http_status}"


@dataclass(frozen=True)
class InProcess:
    """A server object of the SDK, `mcp.server.mcpserver.MCPServer` or `mcp.server.Server`, in this process."""

    server: Any = field(repr=False)
    kind: ClassVar[str] = "in-process"

    def connect(self, ended: Callable[[], None], log: StdioLog) -> Any:
        """As `Stdio.connect`."""
        return self.server

    def explain(self, error: BaseException, log: StdioLog) -> str | None:
        """As `Stdio.explain`."""
        return None


Source = Stdio | Http | InProcess

_ADDRESS = re.compile(r"https?://[^\s/]+", re.I)


def is_address(url: str) -> bool:
    """Whether `url` can be the address of an HTTP server."""
    return _ADDRESS.match(url) is not None
