"""The reducer: folding a run's events, as they go over the wire, gives its `RunState` (G10).

The fold is a pure function of the events and their order, so server, browser and Python reach the same state, and a
snapshot, a replay and a live view can be compared for equality. It takes wire documents (JSON objects with `event`,
`seq`, `ts`, …), not models: a page folds the very same. Unknown events change nothing.

Its size is bounded: past the caps, the oldest finished spans, messages and validation errors go, new fields of `state`
are refused, and `dropped` counts both; and only the newest spans keep their values. As a whole it takes `STATE_BYTES`
at most: the run's owner measures it, and says with `state_trimmed` what goes.

A state is encoded as one item per line, so that a large one can be encoded, decoded and measured in steps.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import orjson

STATE_BYTES = 4 * 1024 * 1024
"""The most that an encoded state takes."""
MAX_SPANS = 2_000
MAX_MESSAGES = 500
MAX_VALIDATION_ERRORS = 200
MAX_STATE_FIELDS = 500
MAX_DETAILED = 100
"""Spans, the newest, that keep the values they worked on."""
VALUES = ("args", "inputs", "result", "patch")

Wire = Mapping[str, Any]
Item = dict[str, Any]

CLOSED_BY = {"run_end": "done", "run_error": "error", "run_cancelled": "cancelled"}
_LISTS = ("spans", "messages", "validation_errors")
STATUS_AFTER = {"run_end": "done", "run_error": "failed", "run_cancelled": "cancelled"}


class RunState:
    """The state of one run. `document` is what a `snapshot` carries as `state`; treat it as read-only."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self._spans: dict[str, Item] = {item["span"]: item for item in document["spans"]}
        self._messages: dict[str, Item] = {item["message"]: item for item in document["messages"]}

    @classmethod
    def new(cls, run: str, agent: str) -> "RunState":
        """The state before the first event."""
        return cls(
            {
                "run": run,
                "agent": agent,
                "status": "queued",
                "input": {},
                "created": 0.0,
                "spans": [],
                "messages": [],
                "validation_errors": [],
                "state": {},
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> "RunState":
        return cls(orjson.loads(data))

    @classmethod
    def decode_steps(cls, data: bytes) -> "Generator[None, None, RunState]":
        """`decode`, to be interrupted after each line. What has no lines is decoded at once."""
        if not data.startswith(b"{\n"):
            return cls.decode(data)
        document: dict[str, Any] = {}
        within: Any = None
        for line in data.split(b"\n")[1:-1]:
            line = line.removesuffix(b",")
            if line in (b"]", b"}"):
                within = None
            elif line.endswith((b":[", b":{")):  # a whole value ends with neither
                within = [] if line.endswith(b"[") else {}
                document[orjson.loads(line[:-2])] = within
            elif isinstance(within, list):
                within.append(orjson.loads(line))
            else:
                (document if within is None else within).update(orjson.loads(b"{" + line + b"}"))
            yield
        return cls(document)

    def encode(self) -> bytes:
        return b"\n".join(self.lines())

    def encode_steps(self) -> Generator[None, None, bytes]:
        """`encode`, to be interrupted after each line. The state must not change meanwhile."""
        lines = []
        for line in self.lines():
            lines.append(line)
            yield
        return b"\n".join(lines)

    def lines(self) -> Iterator[bytes]:
        """The encoded state, line by line."""
        yield b"{"
        rest = len(self.document)
        for field, value in self.document.items():
            rest -= 1
            name, comma = orjson.dumps(field) + b":", b"," if rest else b""
            if field in _LISTS:
                yield name + b"["
                yield from _separated(map(orjson.dumps, value))
                yield b"]" + comma
            elif field == "state":
                yield name + b"{"
                yield from _separated(orjson.dumps(key) + b":" + orjson.dumps(item) for key, item in value.items())
                yield b"}" + comma
            else:
                yield name + orjson.dumps(value) + comma
        yield b"}"

    def apply(self, event: Wire) -> None:
        """Fold one event."""
        fold = _FOLDS.get(event["event"])
        if fold is not None:
            fold(self, event)

    # -- The run itself --------------------------------------------------------------------------------------------

    def _run_queued(self, event: Wire) -> None:
        self.document.update(input=event["input"], created=event["ts"])
        self._set(event, "thread", "position")

    def _run_position(self, event: Wire) -> None:
        self._set(event, "position")

    def _run_start(self, event: Wire) -> None:
        self.document.update(status="running", started=event["ts"], attempt=event["attempt"])
        self.document.pop("position", None)

    def _status(self, event: Wire) -> None:
        self.document["status_message"] = event["message"]

    def _state(self, event: Wire) -> None:
        state = self.document["state"]
        for name, value in event["patch"].items():
            if name in state or len(state) < MAX_STATE_FIELDS:
                state[name] = value
            else:
                self._drop()

    def _state_trimmed(self, event: Wire) -> None:
        for id in event.get("values", ()):
            for name in VALUES:
                self._spans.get(id, {}).pop(name, None)
        self._remove("spans", event.get("spans", ()), self._spans, "span")
        self._remove("messages", event.get("messages", ()), self._messages, "message")
        errors = event.get("validation_errors", 0)
        del self.document["validation_errors"][:errors]
        for name in event.get("fields", ()):
            self.document["state"].pop(name, None)
        self._drop(errors + sum(len(event.get(kind, ())) for kind in ("values", "spans", "messages", "fields")))

    def _cancel_requested(self, event: Wire) -> None:
        self.document["status"] = "cancelling"

    def _terminal(self, event: Wire) -> None:
        self.document.update(status=STATUS_AFTER[event["event"]], ended=event["ts"])
        self.document.pop("position", None)
        self._set(event, "usage", "result", "error")
        closed = CLOSED_BY[event["event"]]
        for span in self.document["spans"]:
            if span["status"] == "running":
                span.update(status=closed, ended=event["ts"])
        for message in self.document["messages"]:
            if message["status"] == "open":
                message["status"] = closed

    # -- Spans -----------------------------------------------------------------------------------------------------

    def _span_start(self, event: Wire) -> None:
        kind = event["event"].removesuffix("_start")
        name = event["model"] if kind == "lm" else event[kind]
        span = {"span": event["span"], "kind": kind, "name": name, "status": "running", "started": event["ts"]}
        span.update({field: event[field] for field in ("parent", "args", "inputs") if field in event})
        if event["span"] in self._spans:
            return
        self._spans[event["span"]] = span
        self.document["spans"].append(span)
        self._trim("spans", MAX_SPANS, "running", self._spans, "span")
        for old in self.document["spans"][-MAX_DETAILED - 1 : -MAX_DETAILED]:
            for name in VALUES:
                old.pop(name, None)

    def _span_end(self, event: Wire) -> None:
        span = self._spans.get(event["span"])
        if span is None or span["status"] != "running":
            return
        span.update(status=_outcome(event), ended=event["ts"])
        recent = any(span is item for item in self.document["spans"][-MAX_DETAILED:])
        kept = ("result", "patch", "error", "usage") if recent else ("error", "usage")
        span.update({field: event[field] for field in kept if field in event})

    def _node_end(self, event: Wire) -> None:
        self._span_end(event)
        if "patch" in event:
            self._state(event)

    def _tool_progress(self, event: Wire) -> None:
        span = self._spans.get(event["span"])
        if span is not None and span["status"] == "running":
            span["progress"] = {field: event[field] for field in ("progress", "total", "message") if field in event}

    def _validation_error(self, event: Wire) -> None:
        fields = ("span", "node", "attempt", "max_retries", "error", "failed_fields")
        errors = self.document["validation_errors"]
        errors.append({field: event[field] for field in fields if field in event})
        if len(errors) > MAX_VALIDATION_ERRORS:
            del errors[0]
            self._drop()

    # -- Messages --------------------------------------------------------------------------------------------------

    def _message_start(self, event: Wire) -> None:
        if event["message"] in self._messages:
            return
        message = {field: event[field] for field in ("message", "span", "field")} | {"text": "", "status": "open"}
        self._messages[event["message"]] = message
        self.document["messages"].append(message)
        self._trim("messages", MAX_MESSAGES, "open", self._messages, "message")

    def _token(self, event: Wire) -> None:
        message = self._messages.get(event["message"])
        if message is not None and message["status"] == "open":
            message["text"] += event["delta"]

    def _message_end(self, event: Wire) -> None:
        message = self._messages.get(event["message"])
        if message is not None and message["status"] == "open":
            message.update(text=event["text"], status="done")

    def _message_retracted(self, event: Wire) -> None:
        message = self._messages.get(event["message"])
        if message is not None:
            message["status"] = "retracted"

    # -- Shared ----------------------------------------------------------------------------------------------------

    def _set(self, event: Wire, *fields: str) -> None:
        self.document.update({field: event[field] for field in fields if field in event})

    def _drop(self, items: int = 1) -> None:
        self.document["dropped"] = self.document.get("dropped", 0) + items

    def _remove(self, name: str, ids: Sequence[str], index: dict[str, Item], key: str) -> None:
        if ids:
            for id in ids:
                index.pop(id, None)
            self.document[name] = [item for item in self.document[name] if item[key] in index]

    def _trim(self, name: str, cap: int, unfinished: str, index: dict[str, Item], key: str) -> None:
        """Past the cap, the oldest finished item goes; the very oldest if none is finished."""
        items: list[Item] = self.document[name]
        if len(items) > cap:
            place = next((i for i, item in enumerate(items) if item["status"] != unfinished), 0)
            del index[items.pop(place)[key]]
            self._drop()


def _separated(items: Iterable[bytes]) -> Iterator[bytes]:
    """The items, each but the last with a comma."""
    before = None
    for item in items:
        if before is not None:
            yield before + b","
        before = item
    if before is not None:
        yield before


def _outcome(event: Wire) -> str:
    """The status of a span after its last event."""
    if "error" not in event:
        return "done"
    return "cancelled" if event["error"].get("code") == "cancelled" else "error"


_FOLDS: dict[str, Callable[[RunState, Wire], None]] = {
    "run_queued": RunState._run_queued,
    "run_position": RunState._run_position,
    "run_start": RunState._run_start,
    "status": RunState._status,
    "node_start": RunState._span_start,
    "lm_start": RunState._span_start,
    "tool_start": RunState._span_start,
    "node_end": RunState._node_end,
    "node_error": RunState._span_end,
    "lm_end": RunState._span_end,
    "tool_end": RunState._span_end,
    "tool_progress": RunState._tool_progress,
    "validation_error": RunState._validation_error,
    "message_start": RunState._message_start,
    "token": RunState._token,
    "message_end": RunState._message_end,
    "message_retracted": RunState._message_retracted,
    "state": RunState._state,
    "state_trimmed": RunState._state_trimmed,
    "cancel_requested": RunState._cancel_requested,
    "run_end": RunState._terminal,
    "run_error": RunState._terminal,
    "run_cancelled": RunState._terminal,
}
