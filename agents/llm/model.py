"""`Model`: a `dspy.LM` whose calls survive what passes. The one place where LM calls are retried.

DSPy itself retries too, but in silence, without jitter, blocking its thread, and never once text has been streamed.
Here each attempt is a call of its own, with a span of its own: when one breaks, its text is retracted (by the bridge,
as for any failed call), a `status` says what happens, and the next attempt streams from the start. A stream
that knows no retraction, such as `streamify`'s, is not repeated once it has shown text.

Also here, since DSPy keeps it to its history, which is off: what a call cost.
"""

import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import anyio
import dspy
from dspy.utils.exceptions import LMError

from agentcast.agents._dspy.names import adapter_fallback_scope
from agentcast.agents.base import keep_secret
from agentcast.agents.context import current, status, wait_in_thread
from agentcast.agents.failures import failure_of
from agentcast.agents.llm.retrying import Retrying
from agentcast.agents.streaming import add_cost
from agentcast.agents.threads import is_in_loop

CONNECT = 10.0
"""Seconds that connecting may take."""
QUEUE = 86_400.0
"""Seconds that a call waits for one of the client's 100 connections: it is not the provider that keeps it waiting. Runs
have a timeout of their own."""


_called: weakref.WeakSet[Any] = weakref.WeakSet()
"""LMs whose connections may be open; copies of one share them."""
_lock = threading.Lock()


async def close_connections() -> None:
    """Close what calls on this event loop, and on threads, have left open to providers, so that the loop can close."""
    with _lock:
        models = list(_called)
    for model in models:
        await model.aclose()
    litellm: Any = sys.modules.get("litellm")
    if litellm is not None:
        await litellm.close_litellm_async_clients()


class Model(dspy.LM):  # type: ignore[misc]  # dspy is untyped
    """A `dspy.LM` that retries as `Retrying` says and gives up on a silent provider."""

    def __call__(self, prompt: Any = None, *, messages: Any = None, **options: Any) -> Any:
        attempts = _Attempts(self, options)
        while True:
            try:
                with attempts.one():
                    return super().__call__(prompt, messages=messages, **attempts.options, **options)
            except LMError as error:
                if is_in_loop():  # which waiting would block
                    raise
                pause = attempts.pause_after(error)
            wait_in_thread(pause)

    async def acall(self, prompt: Any = None, *, messages: Any = None, **options: Any) -> Any:
        attempts = _Attempts(self, options)
        while True:
            try:
                with attempts.one():
                    return await super().acall(prompt, messages=messages, **attempts.options, **options)
            except LMError as error:
                pause = attempts.pause_after(error)
            await anyio.sleep(pause)

    def update_history(self, entry: dict[str, Any]) -> None:
        """Report to the run what a call cost, and keep nothing of the entry."""
        if entry.get("cost") is not None:
            add_cost(self.model, entry["cost"])


_GATEWAYS = {
    "openai": (("OPENAI_BASE_URL", "OPENAI_API_BASE"), ""),
    "anthropic": (("ANTHROPIC_BASE_URL", "ANTHROPIC_API_BASE"), "/v1"),
    "ollama": (("OLLAMA_API_BASE", "OLLAMA_BASE_URL"), "/v1"),
    "ollama_chat": (("OLLAMA_API_BASE", "OLLAMA_BASE_URL"), "/v1"),
}
"""Provider → the usual variables of its base URL, and what these leave out of it. DSPy would take any of them as a
reason to load litellm."""


def as_model(lm: Any) -> Any:
    """`lm` as a `Model`, if it is a plain `dspy.LM` that reaches a provider by itself; any other as it is."""
    if type(lm) is not dspy.LM or not isinstance(lm.engine, str):
        return lm
    # Prices come with DSPy; by default it would look for newer ones in the network, at the first call.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    model = lm.copy(num_retries=0, **_gateway(lm))
    model.__class__ = Model
    return model


def _gateway(lm: Any) -> dict[str, Any]:
    """Options for a base URL that the environment gives, unless `lm` has its own."""
    variables, path = _GATEWAYS.get(lm.model.partition("/")[0], ((), ""))
    url = next((url for variable in variables if (url := os.environ.get(variable, "").strip().rstrip("/"))), None)
    if url is None or lm.engine != "auto" or lm.kwargs.get("api_base") or lm.kwargs.get("base_url"):
        return {}
    return {"api_base": url.removesuffix(path) + path, "engine": "lm15"}


class RunModels:
    """The LMs of one run as they are called in it: a plain `dspy.LM` as a `Model`, any other as it is."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, Any]] = {}

    def __call__(self, lm: Any) -> Any:
        if id(lm) not in self._made:
            model = as_model(lm)
            if model is not lm:
                with _lock:
                    _called.add(lm)  # whose connections outlive the run, and with it the model
            self._made[id(lm)] = lm, model  # `lm` is kept so that no other one gets its id
        return self._made[id(lm)][1]


class _Attempts:
    """The attempts of one LM call."""

    def __init__(self, lm: Model, options: Mapping[str, Any]) -> None:
        self._retrying: Retrying = current().retrying or Retrying()
        self._started = time.monotonic()
        self._made = 0
        self._showed_text = False
        self.options: dict[str, Any] = {}
        """Options of the call that nobody has given."""
        if "timeout" not in lm.kwargs and "timeout" not in options:
            import httpx  # for a real provider only: importing it takes 40 ms

            self.options["timeout"] = httpx.Timeout(self._retrying.idle, connect=CONNECT, pool=QUEUE)
        if isinstance(key := lm.kwargs.get("api_key"), str):
            keep_secret(key)
        with _lock:
            _called.add(lm)

    @contextmanager
    def one(self) -> Iterator[None]:
        """One attempt."""
        self._made += 1
        with adapter_fallback_scope() as progress, dspy.context(disable_history=False):
            try:
                yield
            finally:
                self._showed_text = progress.emitted

    def pause_after(self, error: LMError) -> float:
        """Seconds until the next attempt, which a status announces.

        :raises LMError: `error`, if there is none.
        """
        pause = self._retrying.pause(error, self._made, time.monotonic() - self._started)
        if pause is None or (self._showed_text and not _can_retract()):
            raise error
        what = failure_of(error).message.partition(";")[0]
        status(f"{what}; trying again in {pause:.1f} s (attempt {self._made + 1} of {self._retrying.attempts})")
        return pause


def _can_retract() -> bool:
    """Whether text that an LM call streams here is void once the call fails, so that the call may be made again."""
    observer = current().observer
    return dspy.settings.send_stream is None or (observer is not None and observer.retracts)
