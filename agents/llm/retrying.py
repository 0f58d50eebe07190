"""When a failed LM call is made again, and after how long. Rules only: no clock, no waiting.

Repeating helps against what passes: too many requests, a provider that fails or is silent, a connection that breaks,
an answer that breaks off. It does not against a wrong key, model or request.
"""

import random
from dataclasses import dataclass

from dspy.utils.exceptions import LMError

from agentcast.agents.failures import RETRYABLE, lm_code, retry_after

MAX_BACKOFF = 30.0
"""Longest pause in seconds that the provider has not asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrying:
    """How LM calls are retried."""

    attempts: int = 4
    """The most attempts of one call."""
    patience: float = 120.0
    """Seconds after the start of the first attempt in which another one may begin."""
    backoff: float = 1.0
    """Seconds before the second attempt; doubled for each further one, up to `MAX_BACKOFF`."""
    idle: float = 120.0
    """Seconds without a byte from the provider after which an attempt has failed."""

    def pause(self, error: LMError, attempt: int, elapsed: float) -> float | None:
        """Seconds to wait before the next attempt, or None: it is not to be made.

        `attempt` counts from 1 and has failed with `error`; `elapsed` are seconds since the first one began. The pause
        is random, so that runs which failed together do not come back together: half to all of the backoff, which a
        `Retry-After` of the provider's is added to.
        """
        if attempt >= self.attempts or lm_code(error) not in RETRYABLE:
            return None
        backoff = min(self.backoff * 2 ** (attempt - 1), MAX_BACKOFF)
        pause = backoff * random.uniform(0.5, 1.0)  # noqa: S311 -- spreads load, protects nothing
        if (asked := retry_after(error)) is not None:
            pause = asked + min(pause, self.backoff)
        return pause if elapsed + pause <= self.patience else None
