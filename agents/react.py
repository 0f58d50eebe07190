"""ReAct agents: `dspy.ReAct` with tools that cannot hurt.

Sync tools run on threads, so that none blocks the event loop (G3). A tool that fails, or a reply of the model that
cannot be read, becomes an observation which says what was wrong, without traceback or path (G9), while callbacks, and
with them the event stream, still see the tool fail. Prompts are byte for byte those of `dspy.ReAct`. The tools of MCP
servers are looked up at the start of each run, since they are known only while a server is connected, and may change.

This module must not know runs or registries.
"""

import contextlib
import inspect
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import dspy
from anyio.lowlevel import checkpoint
from dspy.utils.callback import with_callbacks
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError
from pydantic import PrivateAttr, ValidationError

from agentcast.agents.base import ToolError, public_message
from agentcast.agents.context import emit_event, status
from agentcast.agents.events import StepLimit
from agentcast.agents.inputs.history import told_as_text
from agentcast.agents.mcp import TOOLS_AT_ONCE, McpServer, McpTool, told_apart
from agentcast.agents.observations import LISTS_OF_NO_TEXTS, observation, observed, prompt_text
from agentcast.agents.threads import unblocking
from agentcast.agents.values import cut_text

DEFAULT_MAX_ITERS = 12
MAX_MISREAD = 3
"""Replies in a row that cannot be read, after which the run fails."""
FINISH = "finish"
TURN_FIELDS = ("next_thought", "next_tool_name", "next_tool_args")

_log = logging.getLogger(__name__)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def react_agent(
    signature: Any, tools: Sequence[Callable[..., Any] | Any], max_iters: int = DEFAULT_MAX_ITERS
) -> "ReAct":
    """A ReAct program for `signature` (a `dspy.Signature` class or "question -> answer").

    `tools` are functions with type hints, sync or async, `dspy.Tool` objects, or MCP servers
    (`agentcast.agents.mcp.mcp_server`), which stand for all tools that they have; `max_iters` is the most tool calls.

    :raises ValueError: a tool has no use: its name is taken, or it is not callable; or `max_iters` is below 1.
    """
    return ReAct(signature, tools, max_iters)


@dataclass(frozen=True)
class Toolset:
    """The tools of one moment by name, and the signature whose prompt lists them."""

    tools: Mapping[str, Any]
    signature: Any


class ReAct(dspy.ReAct):  # type: ignore[misc]
    """`dspy.ReAct` whose loop is robust. `message_fields` are the outputs worth streaming as text; `servers` the MCP
    servers whose tools it has besides `tools`."""

    def __init__(self, signature: Any, tools: Sequence[Any], max_iters: int = DEFAULT_MAX_ITERS) -> None:
        if max_iters < 1:
            raise ValueError(f"max_iters is {max_iters}; it must be 1 or more")
        super().__init__(signature, guarded([tool for tool in tools if not isinstance(tool, McpServer)]), max_iters)
        self.tools[FINISH] = _Finish(self.tools[FINISH])
        self.servers = distinct(tool for tool in tools if isinstance(tool, McpServer))
        self._extended: tuple[tuple[Any, ...], Toolset] | None = None

    @property
    def message_fields(self) -> Collection[str]:
        texts = [name for name, info in self.signature.output_fields.items() if info.annotation is str]
        return ("next_thought", "reasoning", *texts)

    async def aforward(self, **inputs: Any) -> Any:
        """Run the loop, then answer. Differs from DSPy's own in what it does with failures; see the module."""
        trajectory = await self.act(**inputs)
        inputs.pop("max_iters", None)
        return dspy.Prediction(trajectory=trajectory, **await self.answer(trajectory, **inputs))

    async def answer(self, trajectory: dict[str, Any], **inputs: Any) -> Any:
        """The prediction of the output fields, out of what was done."""
        return await self._async_call_with_potential_trajectory_truncation(self.extract, trajectory, **inputs)

    async def act(self, **inputs: Any) -> dict[str, Any]:
        """Run the loop: what was thought, done and seen."""
        limit = inputs.pop("max_iters", self.max_iters)
        toolset = await self._toolset()
        trajectory: dict[str, Any] = {}
        misread = 0
        for turn in range(limit):
            try:
                move = await self._async_call_with_potential_trajectory_truncation(
                    self.react, trajectory, signature=toolset.signature, **inputs
                )
                thought, name, args = (getattr(move, field) for field in TURN_FIELDS)
                misread = 0
            except ContextWindowExceededError:
                _log.warning("the trajectory no longer fits the model's context: answering from what there is")
                break
            except (AdapterParseError, ValidationError) as error:
                if (misread := misread + 1) == MAX_MISREAD:
                    raise
                thought, name, args, observation = await _recover(toolset.tools, error)
            else:
                observation = await _observe(toolset.tools, name, args)
            trajectory |= {f"thought_{turn}": thought, f"tool_name_{turn}": name}
            trajectory |= {f"tool_args_{turn}": args, f"observation_{turn}": observation}
            if name == FINISH:
                break
        else:
            emit_event(StepLimit(max_steps=limit, message=f"No answer after {limit} steps; answering from these."))
        return trajectory

    def forward(self, **inputs: Any) -> Any:
        """As DSPy's own; without MCP servers only.

        :raises ValueError: it has some.
        """
        if self.servers:
            raise ValueError("an agent with MCP servers can be awaited only: use `await agent.acall(…)`")
        return super().forward(**inputs)

    async def _toolset(self) -> Toolset:
        """The tools as they are now. Made anew only when a server has listed others.

        :raises McpUnavailable: a server is not connected, and does not come back in time.
        """
        if not self.servers:
            return Toolset(self.tools, self.react.signature)
        for server in self.servers:
            if server.status.state != "up":
                status(f"Waiting for MCP server {server.name}")
            await server.ready()
        listings = tuple(server.tools for server in self.servers)
        made_of = (self.react.signature, *listings)
        extended = self._extended
        if extended is None or any(old is not new for old, new in zip(extended[0], made_of, strict=True)):
            extended = self._extended = made_of, await _extended(self.tools, self.react.signature, listings)
        return extended[1]

    def _call_with_potential_trajectory_truncation(self, module: Any, trajectory: Any, **inputs: Any) -> Any:
        return super()._call_with_potential_trajectory_truncation(module, trajectory, **self._told(module, inputs))

    async def _async_call_with_potential_trajectory_truncation(
        self, module: Any, trajectory: Any, **inputs: Any
    ) -> Any:
        told = self._told(module, inputs)
        return await super()._async_call_with_potential_trajectory_truncation(module, trajectory, **told)

    def _told(self, module: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs` for `module`, in which a conversation is text where the module is a step of the loop: DSPy would
        show of it what fits a step's fields, and thus no answers."""
        return told_as_text(inputs, self.signature, module.signature) if module is self.react else inputs

    def _format_trajectory(self, trajectory: dict[str, Any]) -> Any:
        """As DSPy's own, and of lists that it cannot show, too."""
        try:
            return super()._format_trajectory(trajectory)
        except LISTS_OF_NO_TEXTS:
            texts = {name: prompt_text(value) for name, value in trajectory.items() if type(value) is list}
            return super()._format_trajectory(trajectory | texts)


async def _extended(own: Mapping[str, Any], signature: Any, listings: Sequence[Sequence[Any]]) -> Toolset:
    """`own` tools and those of MCP servers, listed in the prompt of `signature` where the own ones stand."""
    tools = {name: tool for name, tool in own.items() if name != FINISH}
    for number, tool in enumerate(told_apart(own, listings)):
        if number % TOOLS_AT_ONCE == 0:
            await checkpoint()
        tools[tool.name] = GuardedTool(tool)
    tools[FINISH] = own[FINISH]
    before, after = _numbered(own), _numbered(tools)
    text = signature.instructions
    text = text.replace(before, after) if before in text else f"{text}\n{after}"  # an optimizer may have rewritten it
    typed = signature.with_updated_fields("next_tool_name", type_=Literal[tuple(tools)])
    return Toolset(tools, typed.with_instructions(text))


def _numbered(tools: Mapping[str, Any]) -> str:
    return "\n".join(f"({number}) {tool}" for number, tool in enumerate(tools.values(), start=1))


async def _observe(tools: Mapping[str, Any], name: str, args: dict[str, Any]) -> Any:
    tool = tools.get(name) or _unknown_tool(name, list(tools))
    return await tool.acall(**args)


async def _recover(tools: Mapping[str, Any], error: Exception) -> tuple[str, str, dict[str, Any], Any]:
    """What a reply that does not fit the format was meant as, as far as it can be read."""
    reply = getattr(error, "lm_response", "") or ""
    thought, name = _section(reply, "next_thought"), _section(reply, "next_tool_name")
    if name and name not in tools:
        return thought, name, {}, await _observe(tools, name, {})
    options = ", ".join(tools)
    problem = f"next_tool_name must be one of {options}" if not name else "next_tool_args must be a JSON object"
    return thought, name or "none", {}, f"Your reply could not be read: {problem}."


def _section(reply: str, name: str) -> str:
    match = re.search(rf"\[\[ ## {name} ## \]\]\s*(.*?)\s*(?=\[\[ ## |\Z)", reply, re.S)
    return cut_text(match[1], 4_096) if match else ""


# -- MCP servers ---------------------------------------------------------------------------------------------------


def distinct(servers: Iterable[McpServer]) -> tuple[McpServer, ...]:
    """`servers`, each once.

    :raises ValueError: two different ones have one name.
    """
    found: dict[str, McpServer] = {}
    for server in servers:
        if found.setdefault(server.name, server) is not server:
            raise ValueError(f"there are two MCP servers named {server.name!r}: use one object for both, or rename one")
    return tuple(found.values())


def servers_of(program: Any) -> tuple[McpServer, ...]:
    """The MCP servers that a `dspy.Module` and the modules in it use.

    :raises ValueError: two different ones have one name.
    """
    return distinct(server for _, part in program.named_sub_modules() for server in getattr(part, "servers", ()))


# -- Tools ---------------------------------------------------------------------------------------------------------


def guarded(tools: Sequence[Any]) -> list["GuardedTool"]:
    """`tools` as tools that never raise and never block.

    :raises ValueError: one is not callable or not usable as a tool, or two have one name.
    """
    found: dict[str, GuardedTool] = {}
    for tool in tools:
        guard = tool if isinstance(tool, GuardedTool) else GuardedTool(_as_tool(tool))
        if guard.name in found or guard.name == FINISH:
            raise ValueError(f"there are two tools named {guard.name!r}: give one of them another name")
        found[guard.name] = guard
    return list(found.values())


def _as_tool(tool: Any) -> Any:
    if isinstance(tool, dspy.Tool):
        return tool
    if not callable(tool):
        raise ValueError(f"a tool must be a function or a dspy.Tool, not {type(tool).__name__}")
    try:
        return dspy.Tool(tool)
    except Exception as error:
        name = getattr(tool, "__name__", type(tool).__name__)
        raise ValueError(f"{name} cannot be a tool: {error}") from error


class GuardedTool(dspy.Tool):  # type: ignore[misc]
    """A `dspy.Tool` that returns its errors as text for the model and runs a sync function on a thread.

    Callbacks run around the call inside, so they see the error itself.
    """

    _plain: Any = PrivateAttr()
    _parameters: inspect.Signature | None = PrivateAttr(default=None)

    def __init__(self, plain_tool: Any) -> None:
        observing = plain_tool.model_copy(update={"func": observed(plain_tool.func, observation)})
        super().__init__(
            func=unblocking(observing.func, f"tool {plain_tool.name}"),
            name=plain_tool.name,
            desc=plain_tool.desc,
            args=plain_tool.args,
            arg_types=plain_tool.arg_types,
            arg_desc=plain_tool.arg_desc,
        )
        self.has_kwargs = plain_tool.has_kwargs
        self._plain = observing
        with contextlib.suppress(ValueError):  # some built-in functions have none
            self._parameters = inspect.signature(plain_tool.func)

    @property
    def server(self) -> str | None:
        """The name of the MCP server that the tool belongs to, if it does."""
        return getattr(self._plain, "server", None)

    async def acall(self, /, **args: Any) -> Any:
        try:
            return await self._run(args)
        except Exception as error:  # noqa: BLE001 -- whatever a tool raises is for the model to deal with
            return self._failure(error)

    def __call__(self, /, **args: Any) -> Any:
        try:
            self._refuse_reserved(args)
            return self._plain(**args)
        except Exception as error:  # noqa: BLE001 -- as above
            return self._failure(error)

    @with_callbacks  # type: ignore[untyped-decorator]
    async def _run(self, kwargs: dict[str, Any]) -> Any:
        """The call. Its arguments are no keywords: `self` may be among them. Callbacks see them as DSPy's own."""
        return await self.func(**self._validate_and_parse_args(**kwargs))

    def __str__(self) -> str:
        return f"{super().__str__()}{self._plain.note if isinstance(self._plain, McpTool) else ''}"

    def format_as_litellm_function_call(self) -> dict[str, Any]:
        if isinstance(self._plain, McpTool):
            return self._plain.format_as_litellm_function_call()
        return super().format_as_litellm_function_call()  # type: ignore[no-any-return]

    def _refuse_reserved(self, args: dict[str, Any]) -> None:
        """Names that DSPy's own calls use up: with them, the call would fail before it is checked."""
        for name in ("self", "instance"):
            if name in args:
                raise ToolError(f"it has no argument {name!r}; it takes {', '.join(self.args) or 'none'}")

    def _failure(self, error: Exception) -> str:
        if not isinstance(error, ToolError | ValueError):
            _log.warning("tool %s failed", self.name, exc_info=error)
        return f"Tool {self.name} failed: {public_message(error)}"

    def _validate_and_parse_args(self, /, **args: Any) -> dict[str, Any]:
        """DSPy's own checks, argument by argument, so that the message can name the one that is wrong; those of an MCP
        server's tool are its own."""
        if isinstance(self._plain, McpTool):
            return self._plain._validate_and_parse_args(**args)
        parsed: dict[str, Any] = {}
        for name, value in args.items():
            if name not in self.args and not self.has_kwargs:
                raise ToolError(f"it has no argument {name!r}; it takes {', '.join(self.args) or 'none'}")
            try:  # DSPy's own cannot be given a `self`
                parsed |= {name: value} if name == "self" else super()._validate_and_parse_args(**{name: value})
            except ValidationError as error:
                raise ToolError(f"argument {name!r}: {error.errors()[0]['msg']}") from error
        if self._parameters is not None:
            for name, parameter in self._parameters.parameters.items():
                if name not in parsed and parameter.default is parameter.empty and parameter.kind in _NAMED:
                    raise ToolError(f"missing a required argument: {name!r}")
        return parsed


class _Finish(dspy.Tool):  # type: ignore[misc]
    """Ends the loop, with whatever arguments the model gives; no step of the agent's, so no callback sees it."""

    def __init__(self, plain_tool: Any) -> None:
        super().__init__(func=_completed, name=plain_tool.name, desc=plain_tool.desc, args=plain_tool.args)

    async def acall(self, /, **_: Any) -> str:
        return _completed()

    def __call__(self, /, **_: Any) -> str:
        return _completed()


def _completed() -> str:
    return "Completed."


def _unknown_tool(name: str, known: list[str]) -> GuardedTool:
    def refuse(**_: Any) -> str:
        raise ToolError(f"there is no such tool; next_tool_name must be one of {', '.join(known)}")

    return GuardedTool(dspy.Tool(refuse, name=name, desc="", args={}))
