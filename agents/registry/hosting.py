"""Agents made of a DSPy program or of a function: `spec` and `run`, as `agentcast.agents.base.Agent` asks.

They hold nothing of a run, so any number of runs of one agent may go on at once (G8).
"""

from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dspy
from pydantic import BaseModel, TypeAdapter, ValidationError

from agentcast.agents.base import AgentSpec, Emitter, Task
from agentcast.agents.context import Numbers, within
from agentcast.agents.inputs.contract import Call, Contract
from agentcast.agents.inputs.history import history_messages, history_text
from agentcast.agents.llm import RunModels
from agentcast.agents.mcp import servers_of
from agentcast.agents.streaming import replace_methods, run_program
from agentcast.agents.values import plain


class ProgramAgent:
    """Runs a `dspy.Module`. The result is the signature's output fields, or the whole prediction without one, the
    trajectory of a ReAct loop left out."""

    def __init__(
        self, spec: AgentSpec, program: Any, contract: Contract, messages: Collection[str] | None, lm: Any = None
    ) -> None:
        self.spec = spec
        self.program = program
        self.lm = lm
        self.servers = servers_of(program)
        """The MCP servers that it uses: the host keeps them running."""
        self._contract = contract
        self._messages = messages

    @property
    def unavailable(self) -> str | None:
        """Why it cannot run just now; see `agentcast.agents.base.unavailable`."""
        return next((reason for server in self.servers if (reason := server.unavailable) is not None), None)

    async def run(self, task: Task, emit: Emitter) -> Any:
        inputs = _fields(task.input)
        for name, kind in self._contract.history.items():
            inputs[name] = history_text(task.history) if kind is str else self._history(task)
        with _hosted(task, emit, self.lm):
            outcome = await run_program(self.program, inputs, emit, messages=self._messages, name=self.spec.name)
        return self._result(outcome.prediction)

    def _history(self, task: Task) -> Any:
        return history_messages(task.history, self.program, self.spec.input_model)

    def _result(self, prediction: Any) -> Any:
        outputs, result = self._contract.outputs, self._contract.result
        if result is not None:
            return _plain(result, prediction, by_alias=False)
        if not isinstance(prediction, dspy.Example | Mapping):
            return plain(prediction)
        values = dict(prediction.items())
        if outputs is None:
            return {key: plain(value) for key, value in values.items() if key != "trajectory"}
        return {key: _plain(adapter, values[key], by_alias=True) for key, adapter in outputs.items() if key in values}


class FunctionAgent:
    """Runs an async function."""

    def __init__(self, spec: AgentSpec, function: Callable[..., Awaitable[Any]], call: Call, lm: Any = None) -> None:
        self.spec = spec
        self.function = function
        self.lm = lm
        self._call = call

    async def run(self, task: Task, emit: Emitter) -> Any:
        call = self._call
        arguments: dict[str, Any] = {call.whole: task.input} if call.whole else _fields(task.input)
        for name in call.history:
            arguments[name] = history_messages(task.history, None, self.spec.input_model)
        if call.emit:
            arguments[call.emit] = emit
        if call.task:
            arguments[call.task] = task
        with _hosted(task, emit, self.lm):
            result = await self.function(**arguments)
        return result if call.result is None else self._checked(call.result, result)

    def _checked(self, adapter: TypeAdapter[Any], result: Any) -> Any:
        try:
            value = adapter.validate_python(result, by_alias=True, by_name=True)
            return adapter.dump_python(value, mode="json", by_alias=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(
                f"{self.spec.name} returned something else than it declares"
                f"{f' in {where}' if where else ''}: {first['msg']}"
            ) from error


@contextmanager
def _hosted(task: Task, emit: Emitter, lm: Any) -> Iterator[None]:
    """Inside is the run of `task`: events go to `emit`, plain LMs are called as `Model`s, `lm` is the one of predictors
    that have none (None: the process's), and DSPy's trace is a list of the run's own."""
    replace_methods()
    settings = {"trace": [], **({} if lm is None else {"lm": lm})}
    with dspy.context(**settings), within(emitter=emit, numbers=Numbers(), task=task, models=RunModels()):
        yield


def _fields(model: BaseModel) -> dict[str, Any]:
    return {name: getattr(model, name) for name in type(model).model_fields}


def _plain(adapter: TypeAdapter[Any], value: Any, *, by_alias: bool) -> Any:
    """`value` in the form that its schema describes, or if it is something else than its type says, as it is."""
    try:
        valid = adapter.validate_python(value, by_alias=True, by_name=True)
        return adapter.dump_python(valid, mode="json", by_alias=by_alias, warnings="error")
    except Exception:  # noqa: BLE001 -- whatever a validator or a serialiser raises
        return plain(value)
