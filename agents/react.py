"""ReAct agents: `dspy.ReAct` whose loop goes on.

A tool that fails, or a reply of the model that cannot be read, becomes an observation which says what was wrong,
without traceback or path (G9), while callbacks, and with them the event stream, still see the tool fail. So it is
inside of runs and outside, awaited and called. Awaited, synchronous tools run on threads (G3). Prompts are byte for
byte those of `dspy.ReAct`. The tools of MCP servers are looked up at the start of each run, since they are known only
while a server is connected, and may change.

This module must not know runs or registries.
"""

import contextlib
import inspect
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
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
from agentcast.agents.inputs.history import history_as_text
from agentcast.agents.mcp import TOOLS_AT_ONCE, McpServer, McpTool, distinct, with_distinct_names
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


@dataclass(frozen=True)
class Toolset:
    """The tools of one moment by name, and the signature whose prompt lists them."""

    tools: Mapping[str, Any]
    signature: Any


class ReAct(dspy.ReAct):  # type: ignore[misc]
    """A ReAct program for `signature` (a `dspy.Signature` class or "question -> answer").

    `tools` are functions with type hints, sync or async, `dspy.Tool` objects, or MCP servers
    (`agentcast.mcp_server`), which stand for all tools that they have; `max_iters` is the most tool calls.
    `message_fields` are the outputs worth streaming as text; `servers` the MCP servers among the tools.

    :raises ValueError: a tool is unusable: its name is taken, or it is not callable; or `max_iters` is below 1.
    """

    observes = True
    """It turns results and failures of tools into observations itself; see `streaming.view`."""

    def __init__(self, signature: Any, tools: Sequence[Any], max_iters: int = DEFAULT_MAX_ITERS) -> None:
        if max_iters < 1:
            raise ValueError(f"max_iters is {max_iters}; it must be 1 or more")
        super().__init__(signature, _loop_tools([tool for tool in tools if not isinstance(tool, McpServer)]), max_iters)
        self.servers = distinct(tool for tool in tools if isinstance(tool, McpServer))
        self._extended: tuple[tuple[Any, ...], Toolset] | None = None

    @property
    def message_fields(self) -> Collection[str]:
        texts = [name for name, info in self.signature.output_fields.items() if info.annotation is str]
        return ("next_thought", "reasoning", *texts)

    async def aforward(self, **inputs: Any) -> Any:
        """Run the loop, then answer."""
        trajectory = await self.act(**inputs)
        inputs.pop("max_iters", None)
        return dspy.Prediction(trajectory=trajectory, **await self.answer(trajectory, **inputs))

    def forward(self, **inputs: Any) -> Any:
        """As `aforward`; without MCP servers only.

        :raises ValueError: it has some.
        """
        if self.servers:
            raise ValueError("an agent with MCP servers can be awaited only: use `await agent.acall(…)`")
        trajectory = _result_of(self._act(inputs, awaits=False))
        inputs.pop("max_iters", None)
        answer = self._call_with_potential_trajectory_truncation(self.extract, trajectory, **inputs)
        return dspy.Prediction(trajectory=trajectory, **answer)

    async def answer(self, trajectory: dict[str, Any], **inputs: Any) -> Any:
        """The prediction of the output fields, out of what was done."""
        return await self._async_call_with_potential_trajectory_truncation(self.extract, trajectory, **inputs)

    async def act(self, **inputs: Any) -> dict[str, Any]:
        """Run the loop: what was thought, done and seen."""
        return await self._act(inputs, awaits=True)

    async def _act(self, inputs: Mapping[str, Any], *, awaits: bool) -> dict[str, Any]:
        """The loop. Unless it `awaits`, model and tools are called, and it never waits."""
        predict = (
            self._async_call_with_potential_trajectory_truncation
            if awaits
            else _immediate(self._call_with_potential_trajectory_truncation)
        )
        limit = inputs.get("max_iters", self.max_iters)
        given = {name: value for name, value in inputs.items() if name != "max_iters"}
        toolset = await self._toolset()
        trajectory: dict[str, Any] = {}
        misread = 0
        for turn in range(limit):
            try:
                move = await predict(self.react, trajectory, signature=toolset.signature, **given)
                thought, name, args = (getattr(move, field) for field in TURN_FIELDS)
                misread = 0
            except ContextWindowExceededError:
                _log.warning("the trajectory no longer fits the model's context: answering from what there is")
                break
            except (AdapterParseError, ValidationError) as error:
                if (misread := misread + 1) == MAX_MISREAD:
                    raise
                thought, name, args, problem = _recover(toolset.tools, error)
            else:
                problem = None
            seen = problem or await _observe(toolset.tools, name, args, awaits)
            trajectory |= {f"thought_{turn}": thought, f"tool_name_{turn}": name}
            trajectory |= {f"tool_args_{turn}": args, f"observation_{turn}": seen}
            if name == FINISH:
                break
        else:
            emit_event(StepLimit(max_steps=limit, message=f"No answer after {limit} steps; answering from these."))
        return trajectory

    async def _toolset(self) -> Toolset:
        """The tools as they are now. They are built again only when a server has listed others.

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
        return super()._call_with_potential_trajectory_truncation(module, trajectory, **self._shown(module, inputs))

    async def _async_call_with_potential_trajectory_truncation(
        self, module: Any, trajectory: Any, **inputs: Any
    ) -> Any:
        shown = self._shown(module, inputs)
        return await super()._async_call_with_potential_trajectory_truncation(module, trajectory, **shown)

    def _shown(self, module: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs` for `module`, in which a conversation is text where the module is a step of the loop: DSPy would
        show of it what fits a step's fields, and thus no answers."""
        return history_as_text(inputs, self.signature, module.signature) if module is self.react else inputs

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
    for number, tool in enumerate(with_distinct_names(own, listings)):
        if number % TOOLS_AT_ONCE == 0:
            await checkpoint()
        tools[tool.name] = _loop_tool(tool)
    tools[FINISH] = own[FINISH]
    before, after = _numbered(own), _numbered(tools)
    text = signature.instructions
    text = text.replace(before, after) if before in text else f"{text}\n{after}"  # an optimizer may have rewritten it
    typed = signature.with_updated_fields("next_tool_name", type_=Literal[tuple(tools)])
    return Toolset(tools, typed.with_instructions(text))


def _numbered(tools: Mapping[str, Any]) -> str:
    return "\n".join(f"({number}) {tool}" for number, tool in enumerate(tools.values(), start=1))


async def _observe(tools: Mapping[str, Any], name: str, args: dict[str, Any], awaits: bool) -> Any:
    if name == FINISH:  # which takes whatever arguments the model gives, and is no step of the agent's
        return "Completed."
    tool = tools.get(name) or _unknown_tool(name, tools)
    try:
        return await (tool.acall if awaits else _immediate(tool))(**args)
    except Exception as error:  # noqa: BLE001 -- whatever a tool raises is for the model to deal with
        if not isinstance(error, ToolError | ValueError):
            _log.warning("tool %s failed", name, exc_info=error)
        return f"Tool {name} failed: {public_message(error)}"


def _immediate(function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    """`function` as one to await, which never waits."""

    async def call(*args: Any, **named: Any) -> Any:
        return function(*args, **named)

    return call


def _result_of(work: Coroutine[Any, Any, Any]) -> Any:
    """What `work` returns, which never waits."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("the loop waited, though everything in it is synchronous")


def _recover(tools: Mapping[str, Any], error: Exception) -> tuple[str, str, dict[str, Any], str | None]:
    """Thought, tool and arguments of a reply that does not fit the format, as far as they can be read, and what is
    wrong with it. That is None if the reply names a tool that does not exist: then the call says so."""
    reply = getattr(error, "lm_response", "") or ""
    thought, name = _section(reply, "next_thought"), _section(reply, "next_tool_name")
    if name and name not in tools:
        return thought, name, {}, None
    options = ", ".join(tools)
    problem = f"next_tool_name must be one of {options}" if not name else "next_tool_args must be a JSON object"
    return thought, name or "none", {}, f"Your reply could not be read: {problem}."


def _section(reply: str, name: str) -> str:
    match = re.search(rf"\[\[ ## {name} ## \]\]\s*(.*?)\s*(?=\[\[ ## |\Z)", reply, re.S)
    return cut_text(match[1], 4_096) if match else ""


# -- Tools ---------------------------------------------------------------------------------------------------------


def _loop_tools(tools: Sequence[Any]) -> list[Any]:
    """`tools` as the loop calls them.

    :raises ValueError: one is not callable or not usable as a tool, or two have one name.
    """
    found: dict[str, Any] = {}
    for tool in map(_loop_tool, tools):
        if tool.name in found or tool.name == FINISH:
            raise ValueError(f"there are two tools named {tool.name!r}: give one of them another name")
        found[tool.name] = tool
    return list(found.values())


def _loop_tool(tool: Any) -> Any:
    """`tool` as the loop calls it; what it returns is an observation for callbacks, too."""
    if isinstance(tool, McpTool):
        return tool.model_copy(update={"func": observed(tool.func, observation)})
    return tool if isinstance(tool, LoopTool) else LoopTool(_as_tool(tool))


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


class LoopTool(dspy.Tool):  # type: ignore[misc]
    """A copy of a `dspy.Tool` whose results are observations. Its arguments may have any names, and where they are
    wrong, the error says which of them is. Awaited, a synchronous function runs on a thread."""

    _required: list[str] = PrivateAttr(default_factory=list)

    def __init__(self, tool: Any) -> None:
        copied = {name: getattr(tool, name) for name in ("name", "desc", "args", "arg_types", "arg_desc")}
        super().__init__(func=observed(tool.func, observation), **copied)
        self.has_kwargs = tool.has_kwargs
        with contextlib.suppress(ValueError):  # some built-in functions have no signature
            parameters = inspect.signature(tool.func).parameters.values()
            self._required = [item.name for item in parameters if item.default is item.empty and item.kind in _NAMED]

    async def acall(self, /, **args: Any) -> Any:
        return await self._acall(args)

    @with_callbacks  # type: ignore[untyped-decorator]
    async def _acall(self, kwargs: dict[str, Any]) -> Any:
        """The call. Its arguments are no keywords: `self` may be among them. Callbacks see them as DSPy's own."""
        return await unblocking(self.func, f"tool {self.name}")(**self._validate_and_parse_args(**kwargs))

    def __call__(self, /, **args: Any) -> Any:
        for name in ("self", "instance"):  # with them, DSPy's own call would fail before they are checked
            if name in args:
                raise self._unexpected(name)
        return super().__call__(**args)

    def _validate_and_parse_args(self, /, **args: Any) -> dict[str, Any]:
        """DSPy's own checks, argument by argument."""
        parsed: dict[str, Any] = {}
        for name, value in args.items():
            if name not in self.args and not self.has_kwargs:
                raise self._unexpected(name)
            try:  # DSPy's own cannot be given a `self`
                parsed |= {name: value} if name == "self" else super()._validate_and_parse_args(**{name: value})
            except ValidationError as error:
                raise ToolError(f"argument {name!r}: {error.errors()[0]['msg']}") from error
        for name in self._required:
            if name not in parsed:
                raise ToolError(f"missing a required argument: {name!r}")
        return parsed

    def _unexpected(self, name: str) -> ToolError:
        return ToolError(f"it has no argument {name!r}; it takes {', '.join(self.args) or 'none'}")


def _unknown_tool(name: str, known: Iterable[str]) -> LoopTool:
    def refuse(**_: Any) -> str:
        raise ToolError(f"there is no such tool; next_tool_name must be one of {', '.join(known)}")

    return LoopTool(dspy.Tool(refuse, name=name, desc="", args={}))
