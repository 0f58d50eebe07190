"""Self-correction: a node's output is asked for until its `output_model` takes it.

Each failed attempt is told of. Only what was accepted enters DSPy's trace, out of which optimizers take their examples,
and there as if it had been the first answer.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import dspy
import orjson
from pydantic import BaseModel, ValidationError

from agentcast.agents.base import public_message, redact
from agentcast.agents.graph import StatefulNode
from agentcast.agents.graph.errors import OutputError
from agentcast.agents.streaming import NodeSpan
from agentcast.agents.transpiler.signatures import PREVIOUS_ANSWER, PROBLEMS
from agentcast.agents.values import cut_text, plain

ErrorFormatter = Callable[[ValidationError], str]
"""Says what is wrong with an output, for people and for the language model."""

default_formatter: ErrorFormatter = public_message


class Rejected(Exception):
    """An output that breaks the contract. `answer` is its text."""

    def __init__(self, error: ValidationError, answer: str, problem: str = "") -> None:
        super().__init__(answer)
        self.error = error
        self.answer = answer
        self.problem = problem
        """What is wrong with it, as the formatter says."""


Ask = Callable[[Rejected | None], Awaitable[Any]]
"""Makes an attempt, given the one before; gives an `output_model`, or its fields by name. May raise `Rejected`."""


async def settle(node: StatefulNode, ask: Ask, span: NodeSpan, formatter: ErrorFormatter, retries: int) -> BaseModel:
    """The accepted output.

    :raises OutputError: all attempts have failed.
    """
    rejected: Rejected | None = None
    for attempt in range(1, retries + 2):
        span.attempt()
        try:
            return await _attempt(node, ask, rejected)
        except Rejected as failed:
            rejected = failed
            rejected.problem = cut_text(redact(str(formatter(failed.error))))  # it may quote the output (G9)
            fields = dict.fromkeys(str(problem["loc"][0]) for problem in failed.error.errors() if problem["loc"])
            span.reject(attempt, retries, rejected.problem, fields)
    assert rejected is not None  # noqa: S101 -- there is at least one attempt
    error = OutputError(node.name, rejected.problem, attempts=retries + 1, last_output=rejected.answer)
    raise error from rejected.error


async def _attempt(node: StatefulNode, ask: Ask, rejected: Rejected | None) -> BaseModel:
    trace = dspy.settings.trace
    if trace is None:
        return validated(node, await ask(rejected))
    made: list[Any] = []
    with dspy.context(trace=made):
        output = validated(node, await ask(rejected))
    trace.extend((predictor, _without_correction(inputs), prediction) for predictor, inputs, prediction in made)
    return output


def _without_correction(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in (PREVIOUS_ANSWER, PROBLEMS)}


def validated(node: StatefulNode, output: Any) -> BaseModel:
    """:raises Rejected: `output` breaks the node's `output_model`."""
    model = node.output_model
    try:
        if isinstance(output, dict):
            _refuse_unknown(model, output)
        return model.model_validate(output, by_name=True)
    except ValidationError as error:
        raise Rejected(error, answer_text(output)) from error


def _refuse_unknown(model: type[BaseModel], output: dict[Any, Any]) -> None:
    unknown = [name for name in output if name not in model.model_fields]
    if unknown and model.model_config.get("extra") is None:
        problems: list[Any] = [{"type": "extra_forbidden", "loc": (str(name),), "input": None} for name in unknown]
        raise ValidationError.from_exception_data(model.__name__, problems)


def answer_text(output: Any) -> str:
    if isinstance(output, str):
        return cut_text(output)
    return cut_text(orjson.dumps(plain(output), option=orjson.OPT_INDENT_2).decode())
