"""DSPy is set up once; models are made of strings.

`AGENTCAST_LM` takes any model string that `dspy.LM` takes ("openai/gpt-5-mini", "anthropic/…", "ollama/…"); the
provider's usual variables give key and base URL. Without it the offline model runs. DSPy's cache and history are off,
and its trace keeps nothing: they are global, shared by all users, and grow in a process that serves. A run has a trace
of its own.
"""

import importlib
import logging
import os
import threading
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.lm15 import LMRouter, NotConfiguredError, RouterConfig

from agentcast.agents._dspy.names import select_backend
from agentcast.agents.context import SETTING, RunContext
from agentcast.agents.llm.model import as_model
from agentcast.agents.llm.retrying import Retrying
from agentcast.agents.offline import offline_lm

VARIABLE = "AGENTCAST_LM"
OFFLINE = "offline"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is configured. `offline`: it is the built-in model that works by rules. `missing_key`: the variables of
    which one must be set before it can be called."""

    name: str
    offline: bool
    missing_key: str | None = None


class ModelError(Exception):
    """The model cannot be used. `model` is the string that was given."""

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(model, problem)
        self.model = model
        self.problem = problem

    def __str__(self) -> str:
        return (
            f"{VARIABLE}={self.model!r}: {self.problem}. Give a model as dspy.LM takes it, such as "
            f"'openai/gpt-5-mini' or 'ollama/llama3.2', or '{OFFLINE}'."
        )


class _NoTrace(list[Any]):
    """A trace that keeps nothing. DSPy's modules expect a list."""

    def append(self, entry: Any) -> None: ...

    def extend(self, entries: Any) -> None: ...


_lock = threading.Lock()
_configured: ModelInfo | None = None


def configure(model: str | None = None, retrying: Retrying | None = None) -> ModelInfo:
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
        context = RunContext(retrying=retrying or Retrying())
        settings = {"disable_history": True, "max_history_size": 0, "trace": _NoTrace(), SETTING: context}
        try:
            dspy.configure(lm=lm, adapter=dspy.ChatAdapter(), **settings)
        except RuntimeError:  # DSPy allows it to the first task only
            current = "another model" if _configured is None else _configured.name
            raise ModelError(name, f"this process already uses {current}") from None
        dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
        _configured = ModelInfo(name=name, offline=name == OFFLINE, missing_key=missing_key(lm))
        return _configured


def make_lm(name: str) -> Any:
    """The LM of a model string, cache off; its provider is checked, without a call to it.

    :raises ModelError: no provider takes such a model, or what it needs is not installed.
    """
    if name == OFFLINE:
        return offline_lm()
    try:
        lm = as_model(dspy.LM(name, cache=False))
        native = select_backend(lm).native
    except Exception as error:
        raise ModelError(name, str(error).strip().rstrip(".") or type(error).__name__) from error
    if not native:
        _check_with_litellm(name)
    return lm


def missing_key(lm: Any) -> str | None:
    """The variables of which one must be set before `lm` can be called: "OPENAI_API_KEY". None: no key is missing, or
    only a call would show."""
    if not isinstance(getattr(lm, "engine", None), str) or not (selection := select_backend(lm)).native:
        return None
    route, clients = selection.resolution, selection.clients
    keys = {route.provider: clients["api_key"]} if clients.get("api_key") else None
    url = clients.get("api_base") or clients.get("base_url")
    with LMRouter(RouterConfig(api_keys=keys, base_urls={route.provider: url} if url else None)) as router:
        try:
            router.lm(f"{route.provider}:{route.model}")
        except NotConfiguredError as error:
            return " or ".join(error.env_keys) or None
    return None


def takes_litellm(lm: Any) -> bool:
    """Whether `lm` is called through litellm."""
    return isinstance(getattr(lm, "engine", None), str) and not select_backend(lm).native


def _check_with_litellm(name: str) -> None:
    """litellm serves what DSPy has no client for: ask it, as it would be asked at the first call."""
    try:
        litellm: Any = importlib.import_module("litellm")
    except ImportError:
        raise ModelError(name, "this provider needs the package litellm: pip install litellm") from None
    litellm.suppress_debug_info = True
    logging.getLogger("LiteLLM").setLevel(logging.WARNING)
    try:
        litellm.get_llm_provider(model=name)
    except litellm.exceptions.BadRequestError:
        raise ModelError(name, "no provider is known by that name") from None
