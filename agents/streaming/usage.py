"""What LM calls use. This module must not know events' ways or how programs are called."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from dspy.utils.usage_tracker import UsageTracker

from agentcast.agents.events import Usage


class Metered(Protocol):
    """An LM call."""

    usage: Usage | None


class Meter(UsageTracker):  # type: ignore[misc]  # dspy is untyped
    """What the LM calls of one run use, each and together."""

    def __init__(self, call_here: Callable[[], Metered | None]) -> None:
        super().__init__()
        self._call_here = call_here

    def __deepcopy__(self, memo: Any) -> "Meter":
        return self  # `dspy.Parallel` copies trackers for its threads, and drops the copies

    def add_usage(self, lm: str, usage_entry: dict[str, Any]) -> None:
        super().add_usage(lm, usage_entry)
        call = self._call_here()
        if call is not None and usage_entry:
            call.usage = _sum([usage_entry], call.usage)

    def add_cost(self, lm: str, dollars: float) -> None:
        call = self._call_here()
        if call is None or call.usage is None or call.usage.cost is None:
            self.add_usage(lm, {"cost": dollars})

    def total(self) -> Usage | None:
        return _sum(entry for entries in list(self.usage_data.values()) for entry in list(entries))

    def report(self, outer: Any) -> None:
        """Add it all to the tracker that was there before the run."""
        if outer is not None:
            for lm, entries in self.usage_data.items():
                outer.usage_data[lm].extend(entries)


def _sum(entries: Iterable[Mapping[str, Any]], start: Usage | None = None) -> Usage | None:
    total = start
    for entry in entries:
        usage = _usage(entry)
        total = usage if total is None else total + usage
    return total


def _usage(entry: Mapping[str, Any]) -> Usage:
    """A provider's usage report. Names differ; what is no number is left out."""
    details = entry.get("prompt_tokens_details") or entry.get("input_tokens_details") or {}
    if hasattr(details, "model_dump"):
        details = details.model_dump()
    cached = _number(details, "cached_tokens")
    cost = _number(entry, "cost")
    return Usage(
        input_tokens=int(_number(entry, "prompt_tokens", "input_tokens") or 0),
        output_tokens=int(_number(entry, "completion_tokens", "output_tokens") or 0),
        cached_tokens=None if cached is None else int(cached),
        cost=cost,
    )


def _number(entry: Any, *names: str) -> float | None:
    values = [entry.get(name) for name in names] if isinstance(entry, Mapping) else []
    return next((value for value in values if isinstance(value, int | float) and not isinstance(value, bool)), None)
