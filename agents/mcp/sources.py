"""Where an MCP server is: a command, an address, or an object in this process; and how each is connected to.

Whatever may hold a secret (environment, headers, addresses) is left out of every `repr` and made known to `redact`.
This module must not know how a connection is kept.
"""

import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import PurePath
from typing import Any, ClassVar
from urllib.parse import unquote, unquote_plus, urlsplit

import httpx2
from mcp.client.streamable_http import streamable_http_client

from agentcast.agents.base import is_secret_name, keep_secret, url_passwords
from agentcast.agents.mcp.http import bounded
from agentcast.agents.mcp.oversize import MAX_BYTES
from agentcast.agents.mcp.stdio import StdioLog, stdio_transport

CONNECT_TIMEOUT = 30.0
"""Seconds for connecting to an HTTP server, and for each write."""
_PLAIN_HEADERS = frozenset({"accept", "accept-language", "content-type", "user-agent"})
_NAMED = re.compile(r"-*([\w-]+)\s*[=:]\s*(.+)", re.S)
"""An argument that names its value: `--token=…`, `API_KEY=…`, `Authorization: Bearer …`."""
_TOKEN_IN_PATH = re.compile(r"(?=[^/]*\d)[^/]{20,}")


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
        keep_secret(*self._secrets())

    def _secrets(self) -> Iterator[str]:
        for text in (*self.args, *self.env.values()):
            yield from url_passwords(text)
        yield from (value for name, value in self.env.items() if is_secret_name(name))
        for arg, following in zip_longest(self.args, self.args[1:], fillvalue=""):
            if named := _NAMED.fullmatch(arg):
                if is_secret_name(named[1]):
                    yield from (named[2], named[2].rpartition(" ")[2])
            elif arg.startswith("-") and is_secret_name(arg) and not following.startswith("-"):
                yield following

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
        password = parts.password or ""
        values = [pair.partition("=")[2] for pair in parts.query.split("&")]
        yield from (password, unquote(password), *values, *map(unquote_plus, values))
        yield from _TOKEN_IN_PATH.findall(parts.path)
        for name, value in self.headers.items():
            if name.lower() not in _PLAIN_HEADERS:
                yield from (value, value.rpartition(" ")[2])

    @asynccontextmanager
    async def connect(self, ended: Callable[[], None], log: StdioLog) -> AsyncIterator[Any]:
        """As `Stdio.connect`. An HTTP connection does not end by itself: its server is asked from time to time."""

        async def answered(response: httpx2.Response) -> None:
            log.http_status = response.status_code if response.status_code >= 400 else None
            response.stream = bounded(response)

        # Compressed bodies could not be cut. A call has its own time limit, so there is none for reading; `bounded`
        # limits events.
        headers = {**self.headers, "Accept-Encoding": "identity"}
        timeout = httpx2.Timeout(CONNECT_TIMEOUT, read=None)
        async with httpx2.AsyncClient(headers=headers, timeout=timeout, event_hooks={"response": [answered]}) as http:
            async with streamable_http_client(self.url, http_client=http, max_sse_event_size=2 * MAX_BYTES) as streams:
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
