"""Random logs of runs whose states are trimmed, as a recorder writes them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import pytest
from hypothesis import strategies as st

from agentcast.agents.events import (
    CancelRequested,
    Event,
    Failure,
    LmEnd,
    LmStart,
    MessageStart,
    NodeEnd,
    NodeStart,
    RunCancelled,
    RunEnd,
    RunError,
    RunFailure,
    RunQueued,
    StatePatch,
    Status,
    Terminal,
    ToolEnd,
    ToolProgress,
    ToolStart,
    Usage,
    ValidationFailed,
)
from agentcast.server.bus.base import Frame, Origin
from agentcast.server.bus.memory import MemoryBus
from agentcast.server.runs import trimming
from agentcast.server.runs.publisher import SummaryPublisher
from agentcast.server.runs.recorder import Recorder
from agentcast.server.runs.snapshots import Snapshots
from agentcast.server.state import STATE_BYTES, RunState


class Log:
    """What a recorder makes of events, folded as anybody else folds it; the bound is checked after each event."""

    def __init__(self, *, bound: int = STATE_BYTES, measure: int = 1) -> None:
        bus = MemoryBus()
        self.recorder = Recorder(
            bus, "r", Origin("echo", "ann", None, 1.0), "e", snapshots=Snapshots(), summaries=SummaryPublisher(bus)
        )
        self.folded = RunState.new("r", "echo")
        self.events: list[dict[str, Any]] = []
        self.largest = 0
        self._bound = bound
        self._measure = measure
        self.take(RunQueued(epoch="e", input={"q": 1}))

    def take(self, *events: Event) -> None:
        for event in events:
            self.recorder._stamp(1795180984.123456, event)
            self._fold()

    def token(self, message: str, delta: str) -> None:
        self.recorder._stamp_fact(1.0, {"event": "token", "message": message, "delta": delta})
        self._fold()

    def _fold(self) -> None:
        batch: list[Frame] = self.recorder._batch
        for frame in batch:
            event = orjson.loads(frame.data)
            self.folded.apply(event)
            self.events.append(event)
            assert len(frame.data) <= 256 * 1024
            if frame.seq % self._measure == 0 or frame.terminal or event["event"] == "state_trimmed":
                self.largest = max(self.largest, len(self.folded.encode()))
                assert self.largest <= self._bound
        if batch[-1].seq % self._measure == 0:
            assert self.folded.encode() == self.recorder.state.encode()
        batch.clear()

    def end(self, event: Terminal) -> dict[str, Any]:
        self.take(event)
        return self.folded.document

    @property
    def trims(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "state_trimmed"]


SMALL = 24 * 1024
ids = st.sampled_from([f"{letter}{n}" for letter in ("a", "é☃", "\x00" * 20) for n in range(12)])
texts = st.builds(lambda char, count: char * count, st.sampled_from("x☃\x00"), st.integers(0, 200))
patches = st.dictionaries(ids, texts, max_size=3)
failure = st.builds(Failure, code=st.sampled_from(["c", "cancelled"]), message=texts)
seconds = st.just(1.0)
random_events: st.SearchStrategy[Any] = st.one_of(
    st.builds(Status, message=texts),
    st.builds(NodeStart, span=ids, parent=ids, node=ids, kind=st.just("graph"), inputs=patches),
    st.builds(NodeEnd, span=ids, node=ids, patch=patches, duration=seconds),
    st.builds(ToolStart, span=ids, tool=ids, args=patches),
    st.builds(ToolProgress, span=ids, progress=st.floats(0, 1), message=texts),
    st.builds(ToolEnd, span=ids, tool=ids, duration=seconds, result=texts),
    st.builds(LmStart, span=ids, model=ids),
    st.builds(LmEnd, span=ids, duration=seconds, usage=st.builds(Usage), error=st.none() | failure),
    st.builds(ValidationFailed, span=ids, node=ids, attempt=st.just(1), max_retries=st.just(2), error=texts),
    st.builds(StatePatch, patch=patches),
    st.builds(MessageStart, message=ids, span=ids, field=ids),
    st.builds(CancelRequested, reason=texts),
    st.tuples(ids, texts),  # a token
)
ends = st.one_of(
    st.builds(RunEnd, result=texts, duration=seconds),
    st.builds(RunError, error=st.builds(RunFailure, code=ids, message=texts), duration=seconds),
    st.builds(RunCancelled, duration=seconds),
)


logs = st.tuples(st.lists(st.tuples(random_events, st.integers(1, 40)), max_size=60), ends)
"""Events, each with how many times it is repeated, and the last one. A tuple is a token."""


@contextmanager
def small_bound() -> Iterator[None]:
    """States are bounded by `SMALL`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trimming, "STATE_BYTES", SMALL)
        patch.setattr(trimming, "TRIM_FROM", SMALL * 3 // 8)
        patch.setattr(trimming, "TRIM_TO", SMALL // 4)
        patch.setattr(trimming, "ENDING", SMALL // 6)
        patch.setattr(trimming, "NAMES_BYTES", 200)
        yield


def trimmed_log(events: list[Any], end: Terminal) -> Log:
    """The log of a run with these events, its state bounded by `SMALL`."""
    with small_bound():
        log = Log(bound=SMALL)
        for event, times in events:
            for _ in range(times):
                if isinstance(event, tuple):
                    log.token(*event)
                else:
                    log.take(event)
        log.end(end)
    return log
