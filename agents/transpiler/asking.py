"""How each kind of node does its work: one coroutine for an attempt, given the one before."""

import copy
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import dspy
from dspy.utils.exceptions import AdapterParseError
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from agentcast.agents.fields import is_text
from agentcast.agents.graph import StatefulNode
from agentcast.agents.graph.detaching import detached
from agentcast.agents.react import react_agent
from agentcast.agents.streaming import call_in_thread, is_async
from agentcast.agents.threads import unblocking
from agentcast.agents.transpiler.attempts import Ask, Rejected, answer_text
from agentcast.agents.transpiler.signatures import PREVIOUS_ANSWER, PROBLEMS, aliases, correcting, signature_of

T = TypeVar("T")

DEFAULT_RETRIES = 3
"""Of nodes that ask a language model; functions and modules are not called again unless the node says so."""


def module_of(node: StatefulNode) -> Any:
    """The DSPy module that does the node's work, or None.

    :raises ValueError: a tool is of no use, or the module is none.
    """
    if node.kind == "module":
        if not isinstance(node.module, dspy.Module):
            raise ValueError("module must be a dspy.Module; for functions there is fn")
        return node.module
    if node.kind == "function":
        return None
    signature = signature_of(node)
    if node.kind == "react":
        return react_agent(signature, node.tools)
    return dspy.ChainOfThought(signature) if node.use_cot else dspy.Predict(signature)


def parts_of(node: StatefulNode, module: Any) -> list[Any]:
    """The modules whose calls are the node's own work."""
    if node.kind == "react":
        return [module.react, module.extract, module.extract.predict]
    return [] if module is None else [module, _predictor(module)]


def retries_of(node: StatefulNode) -> int:
    if node.max_retries is not None:
        return node.max_retries
    return DEFAULT_RETRIES if node.kind in ("lm", "react") else 0


async def asker(node: StatefulNode, module: Any, given: BaseModel) -> Ask:
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
        return functools.partial(_ask_model, node, predictor, functools.partial(predictor.acall, **inputs))
    trajectory = await module.act(**inputs)
    return functools.partial(
        _ask_model, node, module.extract.predict, functools.partial(module.answer, trajectory, **inputs)
    )


def _predictor(module: Any) -> Any:
    return module.predict if isinstance(module, dspy.ChainOfThought) else module


# -- Language models -----------------------------------------------------------------------------------------------


async def _ask_model(node: StatefulNode, predictor: Any, call: Any, rejected: Rejected | None) -> dict[str, Any]:
    extra = {}
    if rejected is not None:
        extra = {
            "signature": correcting(predictor.signature, node),
            PREVIOUS_ANSWER: rejected.answer,
            PROBLEMS: rejected.problem,
        }
    try:
        with dspy.context(adapter=_one_shot_adapter()):
            prediction = await call(**extra)
    except AdapterParseError as error:
        answer = str(error.lm_response or "")
        raise Rejected(_reading_error(node, predictor.signature, answer), answer_text(answer)) from error
    return {name: prediction[name] for name in node.output_model.model_fields}


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


def _reading_error(node: StatefulNode, signature: Any, answer: str) -> ValidationError:
    """All that is wrong with an answer of which DSPy tells but the first problem."""
    model = node.output_model
    loose = dspy.Signature(
        {
            name: (str if is_text(info.annotation) else Any, dspy.OutputField())
            for name, info in signature.output_fields.items()
        },
        "",
    )
    try:
        found = (dspy.settings.adapter or _CHAT).parse(loose, answer)
    except AdapterParseError as error:
        found = error.parsed_result or {}
    missing = [name for name in signature.output_fields if name not in found]
    try:
        model.model_validate({name: value for name, value in found.items() if name not in missing}, by_name=True)
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
    names = node.output_model.model_fields
    if isinstance(result, node.output_model):
        return result
    if isinstance(result, BaseModel):
        return {name: getattr(result, name) for name in names if name in type(result).model_fields}
    if hasattr(result, "items"):
        found = dict(result.items())
        return {name: found[name] for name in names if name in found}
    return result
