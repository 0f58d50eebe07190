"""Where an MCP server is: a command, an address, or an object in this process.

Whatever may hold a secret (environment, headers, addresses) is left out of every `repr` and made known to `redact`.
This module must not know how a server is connected to (see `transports`).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, ClassVar
from urllib.parse import unquote, unquote_plus, urlsplit

from agentcast.agents.base import is_secret_name, keep_secret, url_passwords

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


@dataclass(frozen=True)
class InProcess:
    """A server object of the SDK, `mcp.server.mcpserver.MCPServer` or `mcp.server.Server`, in this process."""

    server: Any = field(repr=False)
    kind: ClassVar[str] = "in-process"


Source = Stdio | Http | InProcess

_ADDRESS = re.compile(r"https?://[^\s/]+", re.I)


def is_address(url: str) -> bool:
    """Whether `url` can be the address of an HTTP server."""
    return _ADDRESS.match(url) is not None
