"""Agents made of a DSPy program or of a function: `spec` and `run`, as `agents.base.Agent` asks.

They hold nothing of a run, so any number of runs of one agent may go on at once (G8).
"""

from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import dspy
from pydantic import BaseModel, TypeAdapter, ValidationError

from agents.base import AgentSpec, Emitter, Task
from agents.contract import Call, Contract
from agents.current import emitting
from agents.history import history_messages, history_text
from agents.react import servers_of
from agents.streaming import run_program
from agents.values import plain


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
        """The MCP servers that it uses: whoever hosts it keeps them running."""
        self._contract = contract
        self._messages = messages

    @property
    def unavailable(self) -> str | None:
        """Why it cannot run just now; see `agents.base.unavailable`."""
        return next((reason for server in self.servers if (reason := server.unavailable) is not None), None)

    async def run(self, task: Task, emit: Emitter) -> Any:
        inputs = _fields(task.input)
        for name, kind in self._contract.history.items():
            inputs[name] = history_text(task.history) if kind is str else self._history(task)
        with emitting(emit), _using(self.lm):
            outcome = await run_program(self.program, inputs, emit, messages=self._messages, name=self.spec.name)
        return self._result(outcome.prediction)

    def _history(self, task: Task) -> Any:
        return history_messages(task.history, self.program, self.spec.input_model)

    def _result(self, prediction: Any) -> Any:
        outputs = self._contract.outputs
        if not hasattr(prediction, "items"):
            return plain(prediction)
        if outputs is None:
            return {key: plain(value) for key, value in prediction.items() if key != "trajectory"}
        values = dict(prediction.items())
        return {key: _plain(adapter, values[key]) for key, adapter in outputs.items() if key in values}


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
        with emitting(emit), _using(self.lm):
            result = await self.function(**arguments)
        return result if call.result is None else self._checked(call.result, result)

    def _checked(self, adapter: TypeAdapter[Any], result: Any) -> Any:
        try:
            return adapter.dump_python(adapter.validate_python(result), mode="json")
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(
                f"{self.spec.name} returned something else than it declares"
                f"{f' in {where}' if where else ''}: {first['msg']}"
            ) from error


def _using(lm: Any) -> AbstractContextManager[Any]:
    """Inside, `lm` is the language model, unless it is None."""
    context: AbstractContextManager[Any] = nullcontext() if lm is None else dspy.context(lm=lm)
    return context


def _fields(model: BaseModel) -> dict[str, Any]:
    return {name: getattr(model, name) for name in type(model).model_fields}


def _plain(adapter: TypeAdapter[Any], value: Any) -> Any:
    try:
        return adapter.dump_python(value, mode="json", warnings="error")
    except ValueError:  # a program may return something else than its signature says
        return plain(value)
