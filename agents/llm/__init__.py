"""Which language models the process uses, and how their calls are made.

`setup` sets DSPy up, once, before anything runs; `model` makes the calls, again where that can help; `retrying` says
when. Importing this, and using a model that DSPy serves natively, does not import litellm, which takes seconds.
"""

from agentcast.agents.llm.model import Model, RunModels, as_model, close_connections
from agentcast.agents.llm.retrying import Retrying
from agentcast.agents.llm.setup import (
    OFFLINE,
    VARIABLE,
    ModelError,
    ModelInfo,
    configure,
    make_lm,
    missing_key,
    takes_litellm,
)

__all__ = [
    "OFFLINE",
    "VARIABLE",
    "Model",
    "ModelError",
    "ModelInfo",
    "Retrying",
    "RunModels",
    "as_model",
    "close_connections",
    "configure",
    "make_lm",
    "missing_key",
    "takes_litellm",
]
