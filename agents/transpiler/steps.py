"""How a node does its work: attempts, until its `output_model` takes the output.

A failed attempt becomes an event, and a language model is shown what was wrong with it. Only an accepted attempt enters
DSPy's trace, out of which optimizers take their examples, and there as if it had been the first one.
"""

import copy
import functools
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, TypeVar

import dspy
import orjson
from dspy.utils.exceptions import AdapterParseError
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from agentcast.agents.base import public_message, redact
from agentcast.agents.fields import is_text
from agentcast.agents.graph import StatefulNode
from agentcast.agents.graph.errors import OutputError
from agentcast.agents.graph.state import detached
from agentcast.agents.react import ReAct
from agentcast.agents.streaming import NodeSpan, is_async
from agentcast.agents.streaming.calls import call_in_thread
from agentcast.agents.threads import unblocking
from agentcast.agents.transpiler.signatures import PREVIOUS_ANSWER, PROBLEMS, aliases, correcting, signature_of
from agentcast.agents.values import cut_text, plain

T = TypeVar("T")

DEFAULT_RETRIES = 3
"""Of nodes that ask a language model; functions and modules are not called again unless the node says so."""

ErrorFormatter = Callable[[ValidationError], str]
"""Says what is wrong with an output, for people and for the language model."""

default_formatter: ErrorFormatter = public_message


class Rejected(Exception):
    """An output that breaks the contract. `answer` is its text."""

    def __init__(self, error: ValidationError, answer: str, fields: Collection[str] | None = None) -> None:
        super().__init__(answer)
        self.error = error
        self.answer = answer
        self.fields = fields
        """The output fields of the predictor whose answer cannot be read; None: it was read."""
        self.problem = ""
        """What is wrong with it, as the formatter says."""


Attempt = Callable[[Rejected | None], Awaitable[Any]]
"""Makes an attempt, given the one before; gives an `output_model`, or its fields by name. May raise `Rejected`."""


# -- What does the work --------------------------------------------------------------------------------------------


def module_of(node: StatefulNode) -> Any:
    """The DSPy module that does the node's work, or None.

    :raises ValueError: a tool cannot be used, or the module is none.
    """
    if node.kind == "module":
        if not isinstance(node.module, dspy.Module):
            raise ValueError("module must be a dspy.Module; for functions there is fn")
        return node.module
    if node.kind == "function":
        return None
    signature = signature_of(node)
    if node.kind == "react":
        return ReAct(signature, node.tools)
    return dspy.ChainOfThought(signature) if node.use_cot else dspy.Predict(signature)


def parts_of(node: StatefulNode, module: Any) -> list[Any]:
    """The modules whose calls are the node's own work."""
    if node.kind == "react":
        return [module.react, module.extract, module.extract.predict]
    return [] if module is None else [module, _predictor(module)]


def retries_of(node: StatefulNode, default: int | None = None) -> int:
    """How often the node's output is asked for again. `default` is that of nodes that ask a language model."""
    if node.max_retries is not None:
        return node.max_retries
    if node.kind not in ("lm", "react"):
        return 0
    return DEFAULT_RETRIES if default is None else default


async def attempts_of(node: StatefulNode, module: Any, given: BaseModel) -> Attempt:
    """What makes the attempts of `node` with the input `given`. Tools are used here, once for all attempts."""
    values = {name: getattr(given, name) for name in node.input_model.model_fields}
    if node.kind == "function":
        return functools.partial(_call_function, node, given)
    if node.kind == "module":
        return functools.partial(_call_module, node, module, values)
    names = aliases(node)
    inputs = {names[name]: value for name, value in values.items()}
    if node.kind == "lm":
        predictor = _predictor(module)
        return functools.partial(_ask_model, node, functools.partial(predictor.acall, **inputs))
    trajectory = await module.act(**inputs)
    return functools.partial(_ask_model, node, functools.partial(module.answer, trajectory, **inputs))


def _predictor(module: Any) -> Any:
    return module.predict if isinstance(module, dspy.ChainOfThought) else module


# -- Attempts ------------------------------------------------------------------------------------------------------


async def accepted_output(
    node: StatefulNode, attempt: Attempt, span: NodeSpan, formatter: ErrorFormatter, retries: int
) -> tuple[BaseModel, int]:
    """The output that the node's `output_model` takes, and how many attempts failed before it.

    :raises OutputError: all attempts have failed.
    """
    rejected: Rejected | None = None
    for number in range(1, retries + 2):
        span.attempt()
        try:
            return await _traced(node, attempt, rejected), number - 1
        except Rejected as failed:
            rejected = failed
            rejected.problem = cut_text(redact(str(formatter(failed.error))))  # it may quote the output (G9)
            fields = dict.fromkeys(str(problem["loc"][0]) for problem in failed.error.errors() if problem["loc"])
            span.reject(number, retries, rejected.problem, fields)
    assert rejected is not None  # noqa: S101 -- there is at least one attempt
    error = OutputError(node.name, rejected.problem, attempts=retries + 1, last_output=rejected.answer)
    raise error from rejected.error


async def _traced(node: StatefulNode, attempt: Attempt, rejected: Rejected | None) -> BaseModel:
    trace = dspy.settings.trace
    if trace is None:
        return _validated(node, await attempt(rejected))
    made: list[Any] = []
    with dspy.context(trace=made):
        output = _validated(node, await attempt(rejected))
    trace.extend(made)
    return output


def _validated(node: StatefulNode, output: Any) -> BaseModel:
    """:raises Rejected: `output` breaks the node's `output_model`."""
    model = node.output_model
    try:
        if isinstance(output, dict):
            _refuse_unknown(model, output)
        return model.model_validate(output, by_name=True)
    except ValidationError as error:
        raise Rejected(error, _answer_text(output)) from error


def _refuse_unknown(model: type[BaseModel], output: dict[Any, Any]) -> None:
    unknown = [name for name in output if name not in model.model_fields]
    if unknown and model.model_config.get("extra") is None:
        problems: list[Any] = [{"type": "extra_forbidden", "loc": (str(name),), "input": None} for name in unknown]
        raise ValidationError.from_exception_data(model.__name__, problems)


def _answer_text(output: Any) -> str:
    if isinstance(output, str):
        return cut_text(output)
    return cut_text(orjson.dumps(plain(output), option=orjson.OPT_INDENT_2).decode())


# -- Language models -----------------------------------------------------------------------------------------------


async def _ask_model(node: StatefulNode, call: Callable[[], Awaitable[Any]], rejected: Rejected | None) -> Any:
    adapter = _one_shot_adapter()
    fields = node.output_model.model_fields
    if rejected is not None:
        adapter = correcting_adapter(adapter, node, rejected, fields)
    with dspy.context(adapter=adapter):
        prediction = await rejecting_unreadable(node, call)
    return {name: prediction[name] for name in fields}


async def rejecting_unreadable(node: StatefulNode, call: Callable[[], Awaitable[Any]]) -> Any:
    """What `call()` gives.

    :raises Rejected: a language model's answer cannot be read.
    """
    try:
        return await call()
    except AdapterParseError as error:
        answer, fields = str(error.lm_response or ""), error.signature.output_fields
        raise Rejected(_reading_error(node.output_model, fields, answer), _answer_text(answer), fields) from error


def correcting_adapter(adapter: Any, node: StatefulNode, rejected: Rejected, fields: Collection[str]) -> Any:
    """`adapter`, but predictors that write one of `fields` are shown the rejected answer and what is wrong with it. If
    the answer could not be read, it is the predictor that gave it.

    DSPy's trace has what a predictor was given, without what is added here.
    """
    written = set(fields if rejected.fields is None else rejected.fields)
    shown = {PREVIOUS_ANSWER: rejected.answer, PROBLEMS: rejected.problem}

    def corrected(signature: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        is_corrected = PREVIOUS_ANSWER in signature.input_fields  # by a step inside this one
        if is_corrected or written.isdisjoint(signature.output_fields):
            return {"signature": signature, "inputs": inputs}
        return {"signature": correcting(signature, node), "inputs": inputs | shown}

    class Correcting:  # `dspy.Refine` makes an adapter of a subclass, without arguments
        def __call__(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: dict[str, Any]) -> Any:
            return adapter(lm, lm_kwargs, demos=demos, **corrected(signature, inputs))

        async def acall(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: dict[str, Any]) -> Any:
            return await adapter.acall(lm, lm_kwargs, demos=demos, **corrected(signature, inputs))

        def __getattr__(self, name: str) -> Any:
            return getattr(adapter, name)

    return Correcting()


def _one_shot_adapter() -> Any:
    """The adapter in use, but one that does not ask again by itself when it cannot read an answer."""
    adapter = dspy.settings.adapter
    if adapter is None:
        return _CHAT
    if isinstance(adapter, dspy.ChatAdapter) and adapter.use_json_adapter_fallback:  # the other ones are kinds of it
        adapter = copy.copy(adapter)
        adapter.use_json_adapter_fallback = False
    return adapter


_CHAT = dspy.ChatAdapter(use_json_adapter_fallback=False)


def _reading_error(model: type[BaseModel], fields: Mapping[str, Any], answer: str) -> ValidationError:
    """All that is wrong with an answer of which DSPy names only the first problem."""
    loose = dspy.Signature(
        {name: (str if is_text(info.annotation) else Any, dspy.OutputField()) for name, info in fields.items()}, ""
    )
    try:
        found = (dspy.settings.adapter or _CHAT).parse(loose, answer)
    except AdapterParseError as error:
        found = error.parsed_result or {}
    missing = [name for name in fields if name not in found]
    if model.model_fields.keys() <= fields.keys():
        try:
            model.model_validate({name: found[name] for name in fields if name in found}, by_name=True)
        except ValidationError as error:
            return error
    details: list[Any] = [{"type": "missing", "loc": (name,), "input": None} for name in missing]
    if not missing:  # DSPy is stricter than the model
        details = [{"type": PydanticCustomError("unreadable", "The answer does not have the form that was asked for")}]
    return ValidationError.from_exception_data(model.__name__, details)


# -- Functions and modules -----------------------------------------------------------------------------------------


async def _call_function(node: StatefulNode, given: BaseModel, _: Rejected | None) -> Any:
    function = node.fn
    assert function is not None  # noqa: S101 -- it is a function node
    result = await unblocking(function, f"node {node.name}")(_fresh(node, given))
    return dict(result) if isinstance(result, Mapping) else result


def _fresh(node: StatefulNode, given: T) -> T:
    """What an attempt may change without the next one seeing it."""
    return detached(given) if retries_of(node) else given


async def _call_module(node: StatefulNode, module: Any, values: dict[str, Any], _: Rejected | None) -> Any:
    values = _fresh(node, values)
    if is_async(module):
        result = await module.acall(**values)
    else:
        result = await call_in_thread(functools.partial(module, **values), f"node {node.name}")
    return fields_of(node.output_model, result)


def fields_of(model: type[BaseModel], result: Any) -> Any:
    """What `result`, of a module, has of the fields of `model`."""
    names = model.model_fields
    if isinstance(result, model):
        return result
    if isinstance(result, BaseModel):
        return {name: getattr(result, name) for name in names if name in type(result).model_fields}
    if hasattr(result, "items"):
        found = dict(result.items())
        return {name: found[name] for name in names if name in found}
    return result
