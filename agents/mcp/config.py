"""MCP servers from a file in the `mcpServers` shape that other clients use:

    {"mcpServers": {
        "files":  {"command": "npx", "args": ["-y", "@modelcontextprotocol/server-filesystem", "/srv/texts"]},
        "search": {"url": "https://example.org/mcp", "headers": {"Authorization": "Bearer ${SEARCH_TOKEN}"}}
    }}

`${NAME}` stands for a variable of the environment, `${NAME:-text}` for one that may be missing.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentcast.agents.base import is_secret_name, keep_secret
from agentcast.agents.mcp.server import CALL_TIMEOUT, McpServer, mcp_server, named_server

_VARIABLE = re.compile(r"\$\{(?:env:)?(\w+)(?::-([^}]*))?\}")


class McpConfigError(ValueError):
    """A configuration file cannot be used. `file`, `where` in it, `problem`, and the `remedy`."""

    def __init__(self, file: str, where: str, problem: str, remedy: str) -> None:
        super().__init__(file, where, problem, remedy)
        self.file = file
        self.where = where
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        where = f": {self.where}" if self.where else ""
        return f"{self.file}{where}: {self.problem}. {self.remedy[:1].upper()}{self.remedy[1:]}."


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: str | None = None
    command: str | None = None
    args: list[str] = []
    env: dict[str, str] = {}
    cwd: str | None = None
    url: str | None = None
    headers: dict[str, str] = {}
    timeout: float = Field(default=CALL_TIMEOUT, gt=0)
    disabled: bool = False


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    mcpServers: dict[str, dict[str, Any]]


_TYPES = {"stdio": "command", "http": "url", "streamable-http": "url", "streamableHttp": "url"}
_KNOWN = ", ".join(_Entry.model_fields)


def load_servers(path: str | Path) -> list[McpServer]:
    """The servers that the file defines, disabled ones left out. `mcp_server(name)` gives the very same objects.

    :raises McpConfigError: it cannot be read, or something in it is wrong or unknown.
    """
    file = str(path)
    try:
        document = orjson.loads(Path(path).read_bytes())
    except OSError as error:
        problem = f"cannot be read: {error.strerror or type(error).__name__}"
        raise McpConfigError(file, "", problem, "give the path of a JSON file with --mcp-config") from None
    except orjson.JSONDecodeError as error:
        problem = f"is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise McpConfigError(file, "", problem, "fix it there") from None
    try:
        entries = _File.model_validate(document).mcpServers
    except ValidationError as error:
        raise _wrong(file, (), error, "mcpServers") from None
    loaded = (_server(file, name, entry) for name, entry in entries.items())
    return [server for server in loaded if server is not None]


def _server(file: str, name: str, document: Mapping[str, Any]) -> McpServer | None:
    place = ("mcpServers", name)
    try:
        entry = _Entry.model_validate(document)
    except ValidationError as error:
        raise _wrong(file, place, error, _KNOWN) from None
    if entry.disabled:
        return None
    given = _Expansion(file, place).of(entry.model_dump(exclude_defaults=True))
    wanted = _TYPES.get(entry.type) if entry.type is not None else None
    if entry.type is not None and wanted is None:
        known = ", ".join(_TYPES)
        raise McpConfigError(file, _path(*place, "type"), f"{entry.type!r} is not supported", f"use one of {known}")
    given.pop("type", None)
    if wanted is not None and wanted not in given:
        raise McpConfigError(file, _path(*place), f"type {entry.type!r} needs {wanted!r}", f"add {wanted!r}")
    if "command" not in given and "url" not in given:
        raise McpConfigError(file, _path(*place), "neither command nor url is given", "add one of them")
    try:
        described = mcp_server(name, **given)
    except ValueError as error:
        raise McpConfigError(file, _path(*place), str(error), "fix that entry") from None
    shared = named_server(name)
    shared.define_as(described)
    return shared


class _Expansion:
    """Variables of the environment put into the texts of one entry."""

    def __init__(self, file: str, place: tuple[str, ...]) -> None:
        self._file = file
        self._place = place

    def of(self, value: Any, *keys: str) -> Any:
        if isinstance(value, str):
            return _VARIABLE.sub(lambda match: self._variable(match, keys), value)
        if isinstance(value, dict):
            return {key: self.of(item, *keys, str(key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.of(item, *keys, str(at)) for at, item in enumerate(value)]
        return value

    def _variable(self, match: re.Match[str], keys: tuple[str, ...]) -> str:
        name, default = match.groups()
        value: str | None = os.environ.get(name, default)
        if value is None:
            where = _path(*self._place, *keys)
            remedy = f"set it, or write ${{{name}:-default}}"
            raise McpConfigError(self._file, where, f"the variable {name} is not set", remedy)
        if is_secret_name(name):
            keep_secret(value)
        return value


def _wrong(file: str, place: tuple[str, ...], error: ValidationError, known: str) -> McpConfigError:
    first = error.errors(include_url=False, include_input=False)[0]
    where = _path(*place, *map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return McpConfigError(file, where, "this key is not known", f"remove it; known are {known}")
    if first["type"] == "missing":
        return McpConfigError(file, where, "it is missing", 'write {"mcpServers": {"name": {"command": …}}}')
    return McpConfigError(file, where, first["msg"], "fix that value")


def _path(*keys: str) -> str:
    return ".".join(keys)
