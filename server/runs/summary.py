"""The summary of a run: its events folded into one small record, for lists of thousands of runs.

The shape of the record is in docs/protocol.md. It takes at most `SUMMARY_BYTES`, whatever the events hold. This module
must not know the bus, or when a record is published.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

from agentcast.agents.events import Usage
from agentcast.agents.values import cut_text
from agentcast.server.bus.base import Status
from agentcast.server.protocol import encode
from agentcast.server.state import MAX_SPANS, STATUS_AFTER

TEXT_BYTES = 240
"""The most that one text of a record takes, in bytes of JSON: a record of the longest stays under `SUMMARY_BYTES`."""
CODE_BYTES = 64

Wire = Mapping[str, Any]


class RunSummary:
    """The summary of one run. It takes the same wire documents as a `RunState`."""

    __slots__ = (
        "_agent",
        "_created",
        "_ended",
        "_error",
        "_lm_calls",
        "_open",
        "_progress",
        "_run",
        "_started",
        "_status_message",
        "_steps",
        "_thread",
        "_tools",
        "_validation_errors",
        "status",
        "usage",
    )

    def __init__(self, run: str, agent: str, thread: str | None, created: float) -> None:
        self.status: Status = "queued"
        self.usage: Usage | None = None
        """The sum of all LM calls so far."""
        self._run = run
        self._agent = _short(agent)
        self._thread = None if thread is None else _short(thread)
        self._created = created
        self._started: float | None = None
        self._ended: float | None = None
        self._status_message: str | None = None
        self._progress: tuple[str, Wire] | None = None
        """The span that reported it last, and what it reported."""
        self._error: Wire | None = None
        self._open: dict[str, Wire] = {}
        """What `step` says of each open span of a node or tool, in the order of their start."""
        self._steps = self._tools = self._lm_calls = self._validation_errors = 0

    @classmethod
    def of_state(cls, document: Wire) -> "RunSummary":
        """The summary of a run of which only its state is known. What the state has dropped is not counted."""
        summary = cls(document["run"], document["agent"], document.get("thread"), document["created"])
        summary.status, summary._started = document["status"], document.get("started")
        if "status_message" in document:
            summary._status_message = _short(document["status_message"])
        for span in document["spans"]:
            summary._count(span["kind"])
            if span["kind"] != "lm" and span["status"] == "running":
                summary._enter(span["span"], span["kind"], span["name"])
            summary._use(span.get("usage"))
        summary._validation_errors = len(document["validation_errors"])
        return summary

    def apply(self, event: Wire) -> bool:
        """Fold one event; whether a list shows anything else now, apart from the number of events."""
        fold = _FOLDS.get(event["event"])
        if fold is None:
            return False
        fold(self, event)
        return True

    def encode(self, events: int) -> bytes:
        """The record after so many events."""
        record = {
            "run": self._run,
            "agent": self._agent,
            "thread": self._thread,
            "status": self.status,
            "step": next(reversed(self._open.values()), None),
            "status_message": self._status_message,
            "progress": None if self._progress is None else self._progress[1],
            "counts": {
                "events": events,
                "steps": self._steps,
                "tools": self._tools,
                "lm_calls": self._lm_calls,
                "validation_errors": self._validation_errors,
            },
            "usage": None if self.usage is None else self.usage.wire(),
            "error": self._error,
            "created": self._created,
            "started": self._started,
            "ended": self._ended,
        }
        return encode({field: value for field, value in record.items() if value is not None})

    # -- Folding ---------------------------------------------------------------------------------------------------

    def _run_start(self, event: Wire) -> None:
        self.status, self._started = "running", event["ts"]

    def _status_said(self, event: Wire) -> None:
        self._status_message = _short(event["message"])

    def _span_start(self, event: Wire) -> None:
        kind = event["event"].removesuffix("_start")
        self._count(kind)
        if kind != "lm":
            self._enter(event["span"], kind, event[kind])

    def _count(self, kind: str) -> None:
        if kind == "node":
            self._steps += 1
        elif kind == "tool":
            self._tools += 1
        else:
            self._lm_calls += 1

    def _enter(self, span: str, kind: str, name: str) -> None:
        self._open[span] = {"kind": kind, "name": _short(name)}
        if len(self._open) > MAX_SPANS:
            del self._open[next(iter(self._open))]

    def _span_end(self, event: Wire) -> None:
        self._open.pop(event["span"], None)
        if self._progress is not None and self._progress[0] == event["span"]:
            self._progress = None

    def _lm_end(self, event: Wire) -> None:
        self._use(event.get("usage"))

    def _use(self, usage: Wire | None) -> None:
        if usage is not None:
            call = Usage(**{field: usage[field] for field in Usage.model_fields if field in usage})
            self.usage = call if self.usage is None else self.usage + call

    def _tool_progress(self, event: Wire) -> None:
        if event["span"] in self._open:
            shown = {field: event[field] for field in ("progress", "total") if field in event}
            self._progress = (event["span"], shown)

    def _validation_error(self, event: Wire) -> None:
        self._validation_errors += 1

    def _cancel_requested(self, event: Wire) -> None:
        self.status = "cancelling"

    def _terminal(self, event: Wire) -> None:
        self.status = cast(Status, STATUS_AFTER[event["event"]])
        self._ended, self._progress = event["ts"], None
        self._open.clear()
        if "error" in event:
            error = event["error"]
            self._error = {"code": cut_text(error["code"], CODE_BYTES), "message": _short(error["message"])}


def _short(text: str) -> str:
    return cut_text(text, TEXT_BYTES)


_FOLDS: dict[str, Callable[[RunSummary, Wire], None]] = {
    "run_start": RunSummary._run_start,
    "status": RunSummary._status_said,
    "node_start": RunSummary._span_start,
    "lm_start": RunSummary._span_start,
    "tool_start": RunSummary._span_start,
    "node_end": RunSummary._span_end,
    "node_error": RunSummary._span_end,
    "tool_end": RunSummary._span_end,
    "lm_end": RunSummary._lm_end,
    "tool_progress": RunSummary._tool_progress,
    "validation_error": RunSummary._validation_error,
    "cancel_requested": RunSummary._cancel_requested,
    "run_end": RunSummary._terminal,
    "run_error": RunSummary._terminal,
    "run_cancelled": RunSummary._terminal,
}
