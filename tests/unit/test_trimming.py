"""The bound of a state as a whole: whatever legal events come, it holds after each of them (G10)."""

from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import given, settings

from agentcast.agents.events import (
    Event,
    Failure,
    LmEnd,
    LmStart,
    MessageStart,
    NodeEnd,
    NodeStart,
    RunEnd,
    RunStart,
    StatePatch,
    Status,
    ToolEnd,
    ToolProgress,
    ToolStart,
    ValidationFailed,
)
from agentcast.agents.values import VALUE_BYTES
from agentcast.server.runs import trimming
from agentcast.server.state import MAX_MESSAGES, MAX_SPANS, STATE_BYTES, RunState
from tests.support.trimmed import Log, logs, trimmed_log

BIG = "x" * (VALUE_BYTES - 100)
ID = "\x00" * 120
"""As many bytes of JSON as an id can take."""
END = RunEnd(result=BIG, duration=1.0)


def tools() -> Iterator[Event]:
    for n in range(110):
        yield ToolStart(span=f"s{n}", tool="t", args={"a": BIG, "b": BIG})
        yield ToolEnd(span=f"s{n}", tool="t", duration=1.0, result=BIG)


def long_ids() -> Iterator[Event]:
    for n in range(2_500):
        yield LmStart(span=f"{ID}{n}", parent=f"{ID}{n - 1}", model="\x00" * 256)


def errors() -> Iterator[Event]:
    for n in range(200):
        yield LmStart(span=f"s{n}", model="m")
        yield LmEnd(span=f"s{n}", duration=1.0, error=Failure(code="c", message=BIG))


def validation() -> Iterator[Event]:
    for n in range(200):
        yield ValidationFailed(
            span="s", node="n", attempt=n + 1, max_retries=9, error=BIG, failed_fields=("f" * 250,) * 90
        )


def fields() -> Iterator[Event]:
    for n in range(300):
        yield NodeStart(span=f"n{n}", node="n", kind="graph")
        yield NodeEnd(span=f"n{n}", node="n", patch={f"{ID}{n}": BIG, f"b{n}": BIG}, duration=1.0)


def progress() -> Iterator[Event]:
    for n in range(150):
        yield ToolStart(span=f"s{n}", tool="t", args={})
        yield ToolProgress(span=f"s{n}", progress=n, message=BIG)


KINDS = {
    "values": tools,
    "long ids": long_ids,
    "errors": errors,
    "validation": validation,
    "fields": fields,
    "progress": progress,
}


@pytest.mark.parametrize("kind", KINDS)
def test_state_stays_within_its_bytes_whatever_fills_it(kind: str) -> None:
    log = Log(measure=20)
    log.take(RunStart(worker="w"), *KINDS[kind](), Status(message=BIG))

    document = log.end(END)

    assert log.trims
    assert log.largest > STATE_BYTES // 2
    assert (document["status"], document["result"], document["input"]) == ("done", BIG, {"q": 1})
    assert document["dropped"] > 0


def test_texts_that_are_open_go_at_last() -> None:
    log = Log(measure=20)
    for n in range(100):
        log.take(MessageStart(message=f"m{n}", span="s", field="f"))
        log.token(f"m{n}", BIG)

    kept = [item["message"] for item in log.end(END)["messages"]]

    assert log.trims
    assert kept == [f"m{n}" for n in range(100 - len(kept), 100)]


def test_what_takes_the_most_gives_and_the_rest_stays() -> None:
    log = Log(measure=20)
    log.take(*tools(), StatePatch(patch={"plan": "short"}), ToolStart(span="open", tool="t", args={"a": "kept"}))
    log.take(MessageStart(message="m", span="s", field="f"))
    log.take(*(StatePatch(patch={f"f{n}": BIG}) for n in range(300)))

    document = log.folded.document

    assert all("validation_errors" not in trim and "messages" not in trim for trim in log.trims)
    assert next(span for span in document["spans"] if span["span"] == "open")["args"] == {"a": "kept"}
    assert [item["message"] for item in document["messages"]] == ["m"]


def test_oldest_finished_values_go_before_those_of_what_still_runs() -> None:
    log = Log(measure=20)
    log.take(ToolStart(span="running", tool="t", args={"a": BIG}), *list(tools())[:60])

    assert log.trims[0]["values"][:2] == ["s0", "s1"]
    assert all("running" not in trim["values"] for trim in log.trims)
    assert all(trim.keys() & {"spans", "messages", "fields"} == set() for trim in log.trims)


def test_states_that_fit_are_never_trimmed_however_long_the_log() -> None:
    log = Log(measure=1_000)
    log.take(*(StatePatch(patch={f"f{n}": BIG}) for n in range(trimming.TRIM_FROM // VALUE_BYTES - 1)))
    for n in range(200):
        log.take(StatePatch(patch={"same": BIG + str(n)}))
    assert log.trims == []
    assert "dropped" not in log.folded.document


def test_end_that_closes_all_that_is_open_fits_too() -> None:
    log = Log(measure=1_000)
    log.take(*(LmStart(span=f"s{n}", model="m") for n in range(MAX_SPANS)))
    for n in range(MAX_MESSAGES):
        log.take(MessageStart(message=f"m{n}", span="s", field="f"))
    while not log.trims:
        before, n = log.recorder.state.encode(), n + 1
        log.recorder._size.measured(len(before))  # as when a snapshot is saved
        log.take(StatePatch(patch={f"f{n}": "x" * 10_000}))

    full = RunState.decode(before)
    full.apply({"event": "run_cancelled", "ts": 1795180984.123456, "duration": 1.0})
    assert STATE_BYTES - 2 * trimming.ENDING < len(before)
    assert len(before) + 50_000 < len(full.encode()) <= STATE_BYTES


def test_measured_size_is_that_of_the_encoded_state_also_after_trimming() -> None:
    log = Log(measure=1_000)
    for n in range(40):
        log.take(ToolStart(span=f"s{n}", tool="t", args={"a": "x" * 10_000}))
        log.take(ToolEnd(span=f"s{n}", tool="t", duration=1.0, error=Failure(code="c", message=BIG)))
    state = log.recorder.state
    parts = trimming._Parts(state.document)
    assert len(state.encode()) <= parts.size <= 1.05 * len(state.encode())

    for event in parts.trim():
        state.apply(event)

    assert len(state.encode()) <= parts.size <= 1.05 * len(state.encode())
    assert trimming.TRIM_TO * 0.9 <= parts.size <= trimming.TRIM_TO


def test_trimming_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = 0
    original = trimming._Parts

    def count(document: dict[str, Any]) -> Any:
        nonlocal measured
        measured += 1
        return original(document)

    monkeypatch.setattr(trimming, "_Parts", count)
    log = Log(measure=1_000)
    log.take(*tools(), *fields(), *errors())

    size = sum(len(orjson.dumps(event)) for event in log.events)
    assert measured <= size / (STATE_BYTES / 8)


def test_many_long_names_are_spread_over_events() -> None:
    log = Log(measure=100)
    log.take(*long_ids())

    assert len(log.trims) > 2
    assert max(len(orjson.dumps(trim)) for trim in log.trims) < 2 * trimming.NAMES_BYTES


# -- Random events, with a small bound -----------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(logs)
def test_bound_holds_after_each_of_any_events_and_every_fold_agrees(log: Any) -> None:
    trimmed_log(*log)
