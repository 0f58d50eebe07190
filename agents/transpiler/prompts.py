"""The prompts of a compiled graph in a JSON file: the instructions and demos of each node's predictors. Values of demos
are saved as JSON, of which adapters make the same prompt.

{"agentcast_prompts": 1,
 "nodes": {"write": {"predict": {"instructions": "…", "demos": [{"topic": "…", "text": "…"}]}}}}
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import dspy
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticSerializationError, to_jsonable_python

from agentcast.agents.base import public_message
from agentcast.agents.values import clean_texts


class _Prompt(BaseModel):
    model_config = ConfigDict(extra="forbid")

    instructions: str
    demos: list[dict[str, Any]]


class _Prompts(BaseModel):
    model_config = ConfigDict(extra="forbid")

    agentcast_prompts: Literal[1]
    """The version of the format."""
    nodes: dict[str, dict[str, _Prompt]]


def save_prompts(steps: Mapping[str, Any], path: str | Path) -> None:
    """See `Program.save_prompts`. `steps` are the nodes' modules."""
    nodes = {
        node: {
            name: {
                "instructions": predictor.signature.instructions,
                "demos": [_dumped(demo, node) for demo in predictor.demos],
            }
            for name, predictor in predictors.items()
        }
        for node, predictors in _predictors(steps).items()
    }
    text = json.dumps(clean_texts({"agentcast_prompts": 1, "nodes": nodes}), ensure_ascii=False, indent=2)
    Path(path).write_text(text + "\n", encoding="utf-8")


def load_prompts(steps: Mapping[str, Any], path: str | Path) -> None:
    """See `Program.load_prompts`."""
    try:
        prompts = _Prompts.model_validate(clean_texts(json.loads(Path(path).read_text(encoding="utf-8"))))
    except ValidationError as error:
        raise ValueError(f"{path} is no file of prompts: {public_message(error)}") from error
    except (ValueError, RecursionError) as error:  # neither UTF-8 nor JSON, or nested too deeply
        raise ValueError(f"{path} is no file of prompts: {error}") from error
    predictors = _predictors(steps)
    problems = [*_differences("node", prompts.nodes, predictors)]
    for node in filter(predictors.__contains__, prompts.nodes):
        problems += _differences(f"node {node!r}: predictor", prompts.nodes[node], predictors[node])
    if problems:
        raise ValueError(f"{path} has the prompts of another graph: {'; '.join(problems)}")
    for node, found in prompts.nodes.items():
        for name, prompt in found.items():
            predictor = predictors[node][name]
            predictor.signature = predictor.signature.with_instructions(prompt.instructions)
            predictor.demos = [dspy.Example(demo) for demo in prompt.demos]


def _predictors(steps: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Node → predictor by its name in the node. That of `dspy.Predict` and of `dspy.ChainOfThought` is "predict"."""
    found = {node: dict(module.named_predictors()) for node, module in steps.items()}
    return {
        node: {"predict" if name == "self" else name: predictor for name, predictor in predictors.items()}
        for node, predictors in found.items()
        if predictors
    }


def _differences(what: str, given: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    missing = [f"it lacks {what} {name!r}" for name in own if name not in given]
    return missing + [f"the program has no {what} {name!r}" for name in given if name not in own]


def _dumped(demo: Any, node: str) -> dict[str, Any]:
    dumped = {}
    for name, value in demo.items():
        try:
            dumped[name] = to_jsonable_python(value, by_alias=False)
        except (PydanticSerializationError, ValueError) as error:
            problem = f"JSON cannot hold {name!r} of a demo, which is of type {type(value).__name__}"
            raise ValueError(f"node {node!r}: {problem}") from error
    return dumped
