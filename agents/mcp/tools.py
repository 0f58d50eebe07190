"""The tools of an MCP server as `dspy.Tool`s: names, descriptions and arguments, bounded, as a prompt shows them.

This module must not know connections: a tool has somebody who calls it.
"""

import inspect
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import dspy
from anyio.lowlevel import checkpoint
from dspy.adapters.types.tool import convert_input_schema_to_tool_args
from mcp_types import Tool
from pydantic import PrivateAttr

from agents.values import cut_text

DESCRIPTION_BYTES = 4 * 1024
NAME_CHARS = 128
TOOLS_AT_ONCE = 20
"""Tools that are made before the event loop has its turn."""

_ODD = re.compile(r"[^\w./-]+")


class Caller(Protocol):
    """Who calls the tools; an `McpServer`."""

    name: str

    async def call(self, tool: str, args: dict[str, Any]) -> Any: ...


class McpTool(dspy.Tool):  # type: ignore[misc]  # dspy is untyped
    """A tool of the MCP server called `server`."""

    _server: str = PrivateAttr()

    def __init__(self, caller: Caller, tool: Tool) -> None:
        args, optional = _arguments(tool.input_schema)
        super().__init__(
            func=_call(caller, tool.name, args, optional),
            name=_ODD.sub("_", tool.name)[:NAME_CHARS],
            desc=cut_text(tool.description or tool.title or "", DESCRIPTION_BYTES),
            args=args,
            arg_types=dict.fromkeys(args, Any),  # the server checks them better than a conversion could
        )
        # An open schema takes more than it names; the server knows.
        self.has_kwargs = bool(tool.input_schema.get("additionalProperties"))
        self._server = caller.name

    @property
    def server(self) -> str:
        return self._server

    def named(self, name: str) -> "McpTool":
        """The same tool under another name."""
        return self.model_copy(update={"name": name})  # type: ignore[no-any-return]


def told_apart(own: Collection[str], listings: Sequence[Sequence[McpTool]]) -> list[McpTool]:
    """The tools of several servers by names of which none is twice or among `own`.

    A name that would be becomes "server_name"; the others stay as they are.
    """
    counts = Counter([*own, *(tool.name for listing in listings for tool in listing)])
    taken = set(own)
    found = []
    for tool in (tool for listing in listings for tool in listing):
        name = tool.name if counts[tool.name] == 1 else f"{tool.server}_{tool.name}"
        while name in taken:
            name += "_"
        taken.add(name)
        found.append(tool if name == tool.name else tool.named(name))
    return found


async def make_tools(caller: Caller, tools: Sequence[Tool]) -> tuple[McpTool, ...]:
    """The tools of `caller`; of several with one name, the first. One whose schema cannot be read takes anything."""
    made: dict[str, McpTool] = {}
    for number, tool in enumerate(tools):
        if number % TOOLS_AT_ONCE == 0:
            await checkpoint()
        if tool.name not in made:
            made[tool.name] = _made(caller, tool)
    return tuple(made.values())


def _made(caller: Caller, tool: Tool) -> McpTool:
    try:
        return McpTool(caller, tool)
    except Exception:  # noqa: BLE001 -- schemas come from others, and may be anything
        return McpTool(caller, tool.model_copy(update={"input_schema": {"additionalProperties": True}}))


def _arguments(schema: Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """The JSON Schema of each argument, and those that may be left out without having a default.

    These are given one, null, since a prompt shows schemas alone and could not tell which arguments are needed.
    """
    described, _, _ = convert_input_schema_to_tool_args(dict(schema))
    # A title is but the name once more.
    args = {name: {key: arg[key] for key in arg if key != "title"} for name, arg in described.items()}
    required = schema.get("required", ())
    optional = frozenset(name for name, arg in args.items() if name not in required and "default" not in arg)
    for name in optional:
        args[name] = {"anyOf": [args[name], {"type": "null"}], "default": None}
    return args, optional


def _call(caller: Caller, tool: str, args: Mapping[str, Any], optional: frozenset[str]) -> Any:
    async def call(**given: Any) -> Any:
        return await caller.call(
            tool, {name: value for name, value in given.items() if value is not None or name not in optional}
        )

    call.__signature__ = _signature(args)  # type: ignore[attr-defined]  # what a missing argument is told by
    return call


def _signature(args: Mapping[str, Any]) -> inspect.Signature:
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=arg.get("default", inspect.Parameter.empty))
        for name, arg in args.items()
        if name.isidentifier()
    ]
    rest = inspect.Parameter("__others", inspect.Parameter.VAR_KEYWORD)
    return inspect.Signature([*parameters, rest])
