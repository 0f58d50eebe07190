"""DSPy signatures of nodes: one field for each field of its models, and those that a correction adds."""

from typing import Any

import dspy
from pydantic.fields import FieldInfo

from agentcast.agents.graph import StatefulNode

PREVIOUS_ANSWER = "previous_answer"
PROBLEMS = "problems"
REPAIR = (
    "Your previous answer was rejected. Answer again, in full: keep what was right in it, and repair every problem "
    "that is named."
)


def aliases(node: StatefulNode) -> dict[str, str]:
    """Input field → its name in the signature, which is another one where an output field has the same."""
    taken = {*node.input_model.model_fields, *node.output_model.model_fields}
    found = {}
    for name in node.input_model.model_fields:
        alias = name
        if name in node.output_model.model_fields:
            alias = f"current_{name}"
            while alias in taken:
                alias += "_"
        found[name] = alias
    return found


def signature_of(node: StatefulNode) -> Any:
    """The `dspy.Signature` of a node that asks a language model."""
    names = aliases(node)
    fields: dict[str, Any] = {}
    for name, info in node.input_model.model_fields.items():
        fields[names[name]] = (info.annotation, dspy.InputField(**_description(info)))
    for name, info in node.output_model.model_fields.items():
        fields[name] = (info.annotation, dspy.OutputField(**_description(info), **_constraints(info), **_default(info)))
    return dspy.Signature(fields, node.instructions)


def correcting(signature: Any, node: StatefulNode) -> Any:
    """`signature`, which is the predictor's own and may have been tuned, with the fields of a correction."""
    instructions = f"{signature.instructions}\n\n{node.refine_instructions or REPAIR}"
    answer = dspy.InputField(desc="Your previous answer, which was rejected.")
    problems = dspy.InputField(desc="What is wrong with it: fields and reasons.")
    extended = signature.with_instructions(instructions).append(PREVIOUS_ANSWER, answer, str)
    return extended.append(PROBLEMS, problems, str)


def _description(info: FieldInfo) -> dict[str, Any]:
    return {"desc": info.description} if info.description else {}


def _default(info: FieldInfo) -> dict[str, Any]:
    if info.is_required():
        return {}
    return {"default_factory": info.default_factory} if info.default_factory else {"default": info.default}


_CONSTRAINTS = ("gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length")


def _constraints(info: FieldInfo) -> dict[str, Any]:
    """The limits of a field that the prompt names; the node's `output_model` checks them."""
    return {
        name: value
        for item in info.metadata
        for name in _CONSTRAINTS
        if (value := getattr(item, name, None)) is not None
    }
