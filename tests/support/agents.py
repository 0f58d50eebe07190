"""Agents for tests: plain classes of the shape that a hub asks for, made of a function."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from pydantic import BaseModel, ConfigDict

from agentcast.agents.base import AgentSpec, Emitter, Task

Function = Callable[[Any, Emitter], Awaitable[Any]]


class Anything(BaseModel):
    """An input without fields of its own: everything fits."""

    model_config = ConfigDict(extra="allow")


@dataclass(frozen=True)
class FunctionAgent:
    """Runs a function that takes the input and the emitter."""

    spec: AgentSpec
    function: Function

    async def run(self, task: Task, emit: Emitter) -> Any:
        return await self.function(task.input, emit)


def agent(
    name: str, *, input: type[BaseModel] = Anything, timeout: float = 50.0, max_concurrent: int = 100
) -> Callable[[Function], FunctionAgent]:
    """Decorates an async function of (input, emit)."""
    spec = AgentSpec(
        name=name, description=f"{name} of a test", input_model=input, timeout=timeout, max_concurrent=max_concurrent
    )
    return lambda function: FunctionAgent(spec, function)


OFFLINE: Any = SimpleNamespace(name="none", offline=True)
"""What stands for the language model: the agents here need none."""
