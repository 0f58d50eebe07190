"""Earlier turns of a thread as input: as text, or as a `dspy.History`.

DSPy shows a history to each predictor through the fields of its signature, and shows nothing of what has other names.
Turns may have such: those of another agent, results without names, a loop of tools, whose steps give no answer. So a
message gets the fields of every predictor that will be shown it. This module must not know runs or agents.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dspy
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from agentcast.agents._dspy.names import format_field_value
from agentcast.agents.base import Turn
from agentcast.agents.inputs.contract import is_history
from agentcast.agents.inputs.media import holds_media, media_validator
from agentcast.agents.values import cut_text, plain, was_cut

HISTORY_TURNS = 20
HISTORY_VALUE_BYTES = 4 * 1024

_FIELD = FieldInfo(annotation=Any)
_LAST_STEP = {"next_tool_name": "finish", "next_tool_args": {}}
"""What a turn is to the steps of `dspy.ReAct`, besides a thought."""


def history_text(turns: Iterable[Turn]) -> str:
    """Earlier turns as text: a line for each named value, an empty line between turns, the last ones only."""
    return "\n\n".join(
        "\n".join([*_lines(_named(turn.input, "input")), *_lines(_named(turn.result, "result"))])
        for turn in list(turns)[-HISTORY_TURNS:]
    )


def history_messages(turns: Iterable[Turn], program: Any, input_model: type[BaseModel]) -> Any:
    """Earlier turns, the last ones only, as a `dspy.History` for the predictors of `program` that take one."""
    predictors = [] if program is None else [predictor for _, predictor in program.named_predictors()]
    shown = [predictor.signature for predictor in predictors if _takes_history(predictor.signature)]
    return dspy.History(messages=[_message(turn, shown, input_model) for turn in list(turns)[-HISTORY_TURNS:]])


def history_as_text(inputs: dict[str, Any], signature: Any, shown: Any) -> dict[str, Any]:
    """`inputs` of a predictor with the signature `shown`, with each `dspy.History` of turns of `signature` as text, and
    with a signature in which its field is one of text."""
    texts = {
        name: _conversation(value, signature)
        for name, value in inputs.items()
        if isinstance(value, dspy.History) and value.messages
    }
    if not texts:
        return inputs
    return inputs | texts | {"signature": _with_texts(inputs.get("signature", shown), tuple(texts))}


@functools.lru_cache(maxsize=256)
def _with_texts(signature: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        signature = signature.with_updated_fields(name, type_=str)
    return signature


def _conversation(history: Any, signature: Any) -> str:
    turns = []
    for message in history.messages:
        names = [name for name in signature.fields if name in message] or list(message)
        turns.append("\n".join(f"{name}: {format_field_value(_FIELD, message[name])}" for name in names))
    return "\n\n".join(turns)


def _takes_history(signature: Any) -> bool:
    return any(is_history(info.annotation) for info in signature.input_fields.values())


def _message(turn: Turn, shown: Sequence[Any], input_model: type[BaseModel]) -> dict[str, Any]:
    asked, answered = _named(turn.input, "input"), _named(turn.result, "result")
    message = {key: _kept(key, value, input_model) for key, value in asked.items()}
    message |= {key: plain(value, HISTORY_VALUE_BYTES) for key, value in answered.items()}
    fields = {key: info for signature in shown for key, info in signature.fields.items()}
    outputs = {key for signature in shown for key in signature.output_fields} - message.keys()
    inputs = {_text_input(signature) for signature in shown if signature.input_fields.keys().isdisjoint(message)}
    for key in _texts(fields):
        if isinstance(message.get(key), list):  # DSPy would take it for one of texts, and might fail
            message[key] = format_field_value(_FIELD, message[key])
        said = [_text(asked)] * (key in inputs) + [_text(answered)] * (key in outputs)
        if said:
            message[key] = "\n".join(said)
    return message | {key: value for key, value in _LAST_STEP.items() if key in outputs}


def _text_input(signature: Any) -> str | None:
    return next(iter(_texts(signature.input_fields)), None)


def _kept(name: str, value: Any, input_model: type[BaseModel]) -> Any:
    """A value of the input: media as such, as long as they are whole."""
    validator = _media_validator(input_model, name)
    if validator is None:
        return plain(value, HISTORY_VALUE_BYTES)
    try:
        if not was_cut(value):
            return validator.validate_python(value)
    except ValueError:
        pass
    return "(too large to be kept)"


@functools.lru_cache(maxsize=256)
def _media_validator(input_model: type[BaseModel], name: str) -> Any:
    """The validator of a field that may have media in it, or None."""
    info = input_model.model_fields.get(name)
    return media_validator(info.annotation) if info is not None and holds_media(info.annotation) else None


def _texts(fields: Mapping[str, Any]) -> list[str]:
    return [key for key, info in fields.items() if info.annotation is str or info.annotation is dspy.Reasoning]


def _text(values: Mapping[str, Any]) -> str:
    """All of `values` as one text; of one value, that alone."""
    if len(values) == 1:
        (value,) = values.values()
        return _cut(value)
    return "\n".join(_lines(values))


def _named(value: Any, name: str) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {name: value}


def _lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}: {_cut(item)}" for key, item in values.items()]


def _cut(value: Any) -> str:
    return cut_text(value if isinstance(value, str) else str(value), HISTORY_VALUE_BYTES)
