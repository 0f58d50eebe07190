"""Which language model the process uses: DSPy is set up once, before anything runs.

`AGENTCAST_LM` takes any model string that `dspy.LM` takes ("openai/gpt-4o-mini", "anthropic/…", "ollama/…"); the
provider's usual variables give key and base URL. Without it the offline model runs. DSPy's cache, history and trace
are off: they are global, shared by all users, and grow without bound in a process that serves.

Importing this module, and using a model that DSPy serves natively, does not import litellm, which takes seconds.
"""

import importlib
import os
import threading
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.clients.backend_selection import select_backend

from agents.offline import offline_lm

VARIABLE = "AGENTCAST_LM"
OFFLINE = "offline"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is configured. `offline`: it is the built-in model that works by rules."""

    name: str
    offline: bool


class ModelError(Exception):
    """The model cannot be used. `model` is the string that was given."""

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(model, problem)
        self.model = model
        self.problem = problem

    def __str__(self) -> str:
        return (
            f"{VARIABLE}={self.model!r}: {self.problem}. Give a model as dspy.LM takes it, such as "
            f"'openai/gpt-4o-mini' or 'ollama/llama3.2', or '{OFFLINE}'."
        )


_lock = threading.Lock()
_configured: ModelInfo | None = None


def configure(model: str | None = None) -> ModelInfo:
    """Set DSPy up for this process: `model`, else `AGENTCAST_LM`, else the offline model.

    To be called once, at start. Calling it again with the same model does nothing.

    :raises ModelError: the model string is wrong, or the process uses another model already.
    """
    global _configured
    name = (model or os.environ.get(VARIABLE, "")).strip() or OFFLINE
    with _lock:
        if _configured is not None and _configured.name == name:
            return _configured
        lm = make_lm(name)
        try:
            dspy.configure(lm=lm, adapter=dspy.ChatAdapter(), disable_history=True, max_history_size=0, trace=None)
        except RuntimeError:  # DSPy allows it to the first task only
            current = "another model" if _configured is None else _configured.name
            raise ModelError(name, f"this process already uses {current}") from None
        _configured = ModelInfo(name=name, offline=name == OFFLINE)
        return _configured


def make_lm(name: str) -> Any:
    """The `dspy.LM` of a model string, cache off; its provider is checked, without a call to it.

    :raises ModelError: no provider takes such a model, or what it needs is not installed.
    """
    if name == OFFLINE:
        return offline_lm()
    try:
        lm = dspy.LM(name, cache=False)
        native = select_backend(lm).native
    except Exception as error:
        raise ModelError(name, str(error).strip().rstrip(".") or type(error).__name__) from error
    if not native:
        _check_with_litellm(name)
    return lm


def _check_with_litellm(name: str) -> None:
    """litellm serves what DSPy has no client for: ask it, as it would be asked at the first call."""
    try:
        litellm: Any = importlib.import_module("litellm")
    except ImportError:
        raise ModelError(name, "this provider needs the package litellm: pip install litellm") from None
    litellm.suppress_debug_info = True
    try:
        litellm.get_llm_provider(model=name)
    except litellm.exceptions.BadRequestError:
        raise ModelError(name, "no provider is known by that name") from None
