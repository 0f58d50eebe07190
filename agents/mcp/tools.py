"""The tools of an MCP server as `dspy.Tool`s: names, descriptions and arguments, bounded, as a prompt shows them.

This module must not know connections: a tool has a `Caller`.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import dspy
from anyio import CapacityLimiter
from dspy.utils.callback import with_callbacks
from pydantic import PrivateAttr

from agentcast.agents.mcp.arguments import SCHEMA, Arguments
from agentcast.agents.threads import in_thread
from agentcast.agents.values import cut_text

if TYPE_CHECKING:
    from mcp_types import Tool

DESCRIPTION_BYTES = 4 * 1024
NAME_CHARS = 128
TOOLS_AT_ONCE = 20
"""Tools that are put into a prompt before the event loop has its turn."""

_ODD = re.compile(r"[^\w./-]+")


class Caller(Protocol):
    """Who calls the tools; an `McpServer`."""

    name: str

    async def call(self, tool: str, args: dict[str, Any]) -> Any: ...


class McpTool(dspy.Tool):  # type: ignore[misc]  # dspy is untyped
    """A tool of the MCP server called `server`. Its arguments may have any names, and go by its own schema."""

    _server: str = PrivateAttr()
    _arguments: Arguments = PrivateAttr()

    def __init__(self, caller: Caller, tool: "Tool") -> None:
        arguments = Arguments((tool.meta or {}).get(SCHEMA, tool.input_schema))
        super().__init__(
            func=_call(caller, tool.name),
            name=_ODD.sub("_", tool.name)[:NAME_CHARS],
            desc=cut_text(tool.description or tool.title or "", DESCRIPTION_BYTES),
            args=arguments.shown,
            arg_types=dict.fromkeys(arguments.shown, Any),
        )
        self._server = caller.name
        self._arguments = arguments

    @property
    def server(self) -> str:
        return self._server

    @property
    def problem(self) -> str | None:
        """Why its arguments are not checked, if they are not."""
        return self._arguments.problem

    @property
    def note(self) -> str:
        """What its schema says of its arguments beside `args`, as a sentence for a prompt; it may be empty."""
        rest = self._arguments.rest
        return f" This JSON Schema applies to them as well: {rest}." if rest else ""

    @property
    def parameters(self) -> dict[str, Any]:
        """Its schema, as an API for tool calls takes it."""
        return {"type": "object", **self._arguments.schema}

    def named(self, name: str) -> "McpTool":
        """The same tool under another name."""
        return self.model_copy(update={"name": name})  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return f"{super().__str__()}{self.note}"

    def format_as_litellm_function_call(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.desc or "", "parameters": self.parameters}
        return {"type": "function", "function": function}

    async def acall(self, /, **args: Any) -> Any:
        return await self._run(args)

    @with_callbacks  # type: ignore[untyped-decorator]
    async def _run(self, kwargs: dict[str, Any]) -> Any:
        """The call. Its arguments are no keywords: `self` may be among them. Callbacks see them as DSPy's own."""
        return await self.func(**self._validate_and_parse_args(**kwargs))

    def _validate_and_parse_args(self, /, **args: Any) -> dict[str, Any]:
        return self._arguments.fit(args)


def with_distinct_names(own: Collection[str], listings: Sequence[Sequence[McpTool]]) -> list[McpTool]:
    """The tools of several servers, under names that occur once and are not among `own`.

    A name that several tools have becomes "server_name"; the others stay as they are.
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


async def make_tools(caller: Caller, tools: "Sequence[Tool]") -> tuple[McpTool, ...]:
    """The tools of `caller`; of several with one name, the first.

    They are made in a thread, since it takes milliseconds to check a schema (G3).
    """
    first: dict[str, Tool] = {}
    for tool in tools:
        first.setdefault(tool.name, tool)

    def make() -> tuple[McpTool, ...]:
        return tuple(McpTool(caller, tool) for tool in first.values())

    return await in_thread(make, f"the list of tools of {caller.name}", limiter=CapacityLimiter(1))


def _call(caller: Caller, tool: str) -> Any:
    async def call(**given: Any) -> Any:
        return await caller.call(tool, given)

    return call
