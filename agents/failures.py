"""Why a run failed, as clients see it: a code, a text that says what to do, and whether trying again may help (G9).

DSPy has one family of errors for language models, whichever client raised them; here each gets a code of `lm_…`. The
texts are ours. Of the provider's own, only what it says about a request that it refuses is passed on.

This module must not know runs, streams or how calls are made.
"""

import asyncio
import contextlib
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import anyio
from dspy.utils.exceptions import (
    ContextWindowExceededError,
    LMAuthError,
    LMBillingError,
    LMConfigurationError,
    LMError,
    LMInvalidRequestError,
    LMLockTimeoutError,
    LMNotConfiguredError,
    LMProviderError,
    LMRateLimitError,
    LMServerError,
    LMStreamAssemblyError,
    LMTimeoutError,
    LMTransportError,
    LMUnexpectedError,
    LMUnsupportedFeatureError,
    LMUnsupportedModelError,
)

from agentcast.agents.base import public_message, redact
from agentcast.agents.events import RunFailure
from agentcast.agents.values import cut_text

RETRYABLE = frozenset({"lm_rate_limited", "lm_timeout", "lm_unavailable", "lm_bad_response"})
"""Codes of what may be over when the call is made again."""

_CODES: tuple[tuple[type[LMError], str], ...] = (
    (ContextWindowExceededError, "lm_context_window"),
    (LMNotConfiguredError, "lm_auth"),
    (LMAuthError, "lm_auth"),
    (LMBillingError, "lm_billing"),
    (LMRateLimitError, "lm_rate_limited"),
    (LMUnsupportedModelError, "lm_not_found"),
    (LMInvalidRequestError, "lm_bad_request"),
    (LMUnsupportedFeatureError, "lm_bad_request"),
    (LMConfigurationError, "lm_bad_request"),
    (LMTimeoutError, "lm_timeout"),
    (LMServerError, "lm_unavailable"),
    (LMTransportError, "lm_unavailable"),
    (LMLockTimeoutError, "lm_unavailable"),
    (LMStreamAssemblyError, "lm_bad_response"),
)
"""Specific classes before their parents."""

_STATUSES = {
    401: "lm_auth",
    402: "lm_billing",
    403: "lm_auth",
    404: "lm_not_found",
    408: "lm_timeout",
    429: "lm_rate_limited",
}

_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_SAID_CHARS = 500


def failure_of(error: BaseException) -> RunFailure:
    """What `error`, raised by an agent, ends its run with. A group of one error is that error."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    node = getattr(error, "node", None)  # of a graph
    node = node if isinstance(node, str) else None
    if not isinstance(error, LMError):
        return RunFailure(code="agent_error", message=public_message(error), node=node)
    code = lm_code(error)
    model = redact(_USER_IN_URL.sub("", str(error.model or "the model")))
    return RunFailure(code=code, message=f"{model}: {_TEXTS[code](error)}", retryable=code in RETRYABLE, node=node)


def is_failure(error: BaseException) -> bool:
    """Whether `error`, just raised here, is a failure of what raised it, and not the end of the run.

    So is a cancellation that nobody has asked this task for: that of a library's own timeout, or of other work that
    was waited for. And so is `sys.exit()`.
    """
    if not isinstance(error, asyncio.CancelledError):
        return isinstance(error, Exception | SystemExit)
    try:
        task = asyncio.current_task()
    except RuntimeError:  # in a thread, which no cancellation reaches
        return True
    return task is None or not (task.cancelling() or anyio.current_effective_deadline() == -math.inf)


def lm_code(error: LMError) -> str:
    """The code of a failed LM call, `lm_error` if nothing is known of it."""
    if isinstance(error, LMInvalidRequestError) and error.status == 404:
        return "lm_not_found"
    if isinstance(error, LMTransportError) and any(_is_timeout(cause) for cause in _causes(error)):
        return "lm_timeout"
    if type(error) is LMUnexpectedError and isinstance(error.__cause__, ValueError):
        return "lm_bad_response"  # the provider's bytes are no JSON, or no text
    if type(error) is LMProviderError:
        return _unclassified(error)
    return next((code for kind, code in _CODES if isinstance(error, kind)), "lm_error")


def _unclassified(error: LMProviderError) -> str:
    """The code of an error of the provider's that DSPy has no class for, such as one that comes in a stream that has
    begun: there gateways give the status as the error's code, and others have words of their own for their failures."""
    given = str(error.provider_code or "")
    status = error.status or (int(given) if given.isdecimal() and len(given) == 3 else 500)
    return _STATUSES.get(status, "lm_bad_request" if 300 <= status < 500 else "lm_unavailable")


def retry_after(error: LMError) -> float | None:
    """Seconds that the provider asks to wait, if it does."""
    if error.retry_after is not None:
        return float(error.retry_after)
    for cause in _causes(error):  # litellm keeps them where DSPy does not look
        with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError):
            headers: Any = cause.litellm_response_headers  # type: ignore[attr-defined]
            return float(headers["retry-after"])
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause = error.__cause__
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _is_timeout(error: BaseException) -> bool:
    return isinstance(error, TimeoutError) or type(error).__name__.endswith("Timeout")


# -- What to do --------------------------------------------------------------------------------------------------------


def _auth(error: LMError) -> str:
    keys = " or ".join(getattr(error, "env_keys", ())) or _key_variable(error)
    if isinstance(error, LMNotConfiguredError):
        return f"there is no key for it; set {keys} where the hub runs"
    if error.status == 403:
        return f"the provider refuses access (403); check that the key in {keys} may use this model"
    return f"the provider does not accept the key; check {keys} where the hub runs"


def _key_variable(error: LMError) -> str:
    provider, slash, _ = str(error.model or "").partition("/")
    return f"{provider.upper()}_API_KEY" if slash else "the provider's key"


def _rate_limited(error: LMError) -> str:
    hint = retry_after(error)
    wait = "wait a moment" if hint is None else f"the provider asks to wait {hint:g} s"
    return f"too many requests (429); {wait}, or run fewer at once"


def _unavailable(error: LMError) -> str:
    if error.status is not None:
        return f"the provider failed ({error.status}); try again in a moment"
    if isinstance(error, LMProviderError):
        return "the provider failed while it answered; try again in a moment"
    reason = next((f" ({_os_reason(cause)})" for cause in _causes(error) if isinstance(cause, OSError)), "")
    return f"the provider cannot be reached, or hung up{reason}; check the network and the base URL, or try again"


def _os_reason(error: OSError) -> str:
    """asyncio puts the address into `strerror`."""
    known = os.strerror(error.errno) if isinstance(error.errno, int) and error.errno > 0 else error.strerror
    return known or type(error).__name__


def _bad_request(error: LMError) -> str:
    return f"the provider refuses the request: {_said(error)}"


def _said(error: LMError) -> str:
    """The first line of what the provider says."""
    line = next(iter((error.message or "").strip().splitlines()), "") or "it gives no reason"
    return cut_text(redact(_USER_IN_URL.sub("", line)), _SAID_CHARS)


def _unknown(error: LMError) -> str:
    cause = error.__cause__ or error
    return f"the call failed ({type(cause).__name__}); the hub's log has more"


_TEXTS: dict[str, Any] = {
    "lm_auth": _auth,
    "lm_billing": lambda _: "the account's quota or credit is used up; see the provider's billing page",
    "lm_rate_limited": _rate_limited,
    "lm_not_found": lambda _: "the provider does not know this model (404); check the model's name and the base URL",
    "lm_context_window": lambda _: "the prompt is longer than the model takes; give it less text, or a larger model",
    "lm_bad_request": _bad_request,
    "lm_timeout": lambda _: "the provider was silent for too long; try again, or raise AGENTCAST_LM_IDLE",
    "lm_unavailable": _unavailable,
    "lm_bad_response": lambda _: "the answer broke off, or could not be read; try again",
    "lm_error": _unknown,
}
