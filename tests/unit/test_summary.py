"""The summary of a run: what its record says after which events, and that it stays small."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcast.agents.events import (
    CancelRequested,
    Event,
    Failure,
    LmEnd,
    LmStart,
    NodeEnd,
    NodeError,
    NodeStart,
    RunCancelled,
    RunEnd,
    RunError,
    RunFailure,
    RunStart,
    StatePatch,
    Status,
    Token,
    ToolEnd,
    ToolProgress,
    ToolStart,
    Usage,
    ValidationFailed,
)
from agentcast.server.bus.base import SUMMARY_BYTES
from agentcast.server.runs.summary import RunSummary
from agentcast.server.state import RunState

FAILURE = RunFailure(code="agent_error", message="no")


def fold(*events: Event, thread: str | None = None) -> RunSummary:
    """Fold events, the first of them at 10.0 s, each ten seconds after the one before."""
    summary = RunSummary("r", "echo", thread, 1.0)
    for number, event in enumerate(events, start=1):
        summary.apply(event.wire() | {"ts": number * 10.0, "seq": number})
    return summary


def record(*events: Event, thread: str | None = None) -> dict[str, Any]:
    document: dict[str, Any] = orjson.loads(fold(*events, thread=thread).encode(len(events)))
    return document


def counts(**fields: int) -> dict[str, int]:
    return dict.fromkeys(("events", "steps", "tools", "lm_calls", "validation_errors"), 0) | fields


def node(name: str, span: str | None = None) -> NodeStart:
    return NodeStart(span=span or name, node=name, kind="graph")


def tool(name: str, span: str | None = None) -> ToolStart:
    return ToolStart(span=span or name, tool=name, args={})


def test_record_of_a_queued_run_has_no_nulls() -> None:
    assert record(thread="t") == {
        "run": "r",
        "agent": "echo",
        "thread": "t",
        "status": "queued",
        "counts": counts(),
        "created": 1.0,
    }


def test_record_of_a_run_that_was_through_everything() -> None:
    document = record(
        RunStart(worker="w"),
        node("plan"),
        LmStart(span="l", model="gpt"),
        Status(message="thinking"),
        LmEnd(span="l", duration=1.0, usage=Usage(input_tokens=3, output_tokens=4, cost=0.5)),
        LmStart(span="l2", model="gpt"),
        LmEnd(span="l2", duration=1.0, usage=Usage(input_tokens=1, output_tokens=1, cost=0.25)),
        ValidationFailed(span="plan", node="plan", attempt=1, max_retries=2, error="no"),
        tool("search"),
        ToolProgress(span="search", progress=1, total=4, message="page 1"),
        ToolEnd(span="search", tool="search", duration=1.0, result=[]),
        NodeEnd(span="plan", node="plan", duration=1.0),
        RunError(error=FAILURE, duration=1.0),
    )

    assert document == {
        "run": "r",
        "agent": "echo",
        "status": "failed",
        "status_message": "thinking",
        "counts": counts(events=13, steps=1, tools=1, lm_calls=2, validation_errors=1),
        "usage": {"input_tokens": 4, "output_tokens": 5, "cost": 0.75},
        "error": {"code": "agent_error", "message": "no"},
        "created": 1.0,
        "started": 10.0,
        "ended": 130.0,
    }


@pytest.mark.parametrize(
    ("events", "step"),
    [
        ([node("a"), tool("t")], {"kind": "tool", "name": "t"}),
        ([node("a"), node("b")], {"kind": "node", "name": "b"}),
        ([node("a"), tool("t"), ToolEnd(span="t", tool="t", duration=1.0)], {"kind": "node", "name": "a"}),
        ([node("a"), LmStart(span="l", model="gpt")], {"kind": "node", "name": "a"}),
        ([tool("t"), tool("u"), ToolEnd(span="t", tool="t", duration=1.0)], {"kind": "tool", "name": "u"}),
        ([node("a"), NodeEnd(span="a", node="a", duration=1.0)], None),
        ([node("a"), NodeError(span="a", node="a", duration=1.0, error=Failure(code="c", message="m"))], None),
        ([node("a"), RunEnd(result=1, duration=1.0)], None),
    ],
)
def test_step_is_the_innermost_open_node_or_tool(events: list[Event], step: dict[str, str] | None) -> None:
    assert record(*events).get("step") == step


@pytest.mark.parametrize(
    ("events", "progress"),
    [
        ([tool("t"), ToolProgress(span="t", progress=1, total=4)], {"progress": 1, "total": 4}),
        ([tool("t"), ToolProgress(span="t", progress=1, total=4), ToolProgress(span="t", progress=2)], {"progress": 2}),
        (
            [tool("t"), tool("u"), ToolProgress(span="t", progress=1), ToolEnd(span="u", tool="u", duration=1.0)],
            {"progress": 1},
        ),
        ([tool("t"), ToolProgress(span="t", progress=1), ToolEnd(span="t", tool="t", duration=1.0)], None),
        ([tool("t"), ToolProgress(span="t", progress=1), RunCancelled(duration=1.0)], None),
        ([ToolProgress(span="t", progress=1)], None),
    ],
)
def test_progress_is_the_last_of_a_tool_that_works(events: list[Event], progress: dict[str, float] | None) -> None:
    assert record(*events).get("progress") == progress


@pytest.mark.parametrize(
    ("events", "status"),
    [
        ([RunStart(worker="w")], "running"),
        ([RunStart(worker="w"), CancelRequested()], "cancelling"),
        ([RunEnd(result=1, duration=1.0)], "done"),
        ([RunError(error=FAILURE, duration=1.0)], "failed"),
        ([RunCancelled(duration=1.0)], "cancelled"),
    ],
)
def test_status_is_that_of_the_run(events: list[Event], status: str) -> None:
    assert record(*events)["status"] == fold(*events).status == status


@pytest.mark.parametrize("event", [Token(message="m", delta="x"), StatePatch(patch={"a": 1})])
def test_event_that_a_list_does_not_show_changes_only_the_number_of_events(event: Event) -> None:
    summary = fold()

    assert not summary.apply(event.wire() | {"ts": 1.0, "seq": 1})
    assert orjson.loads(summary.encode(1)) == record() | {"counts": counts(events=1)}
    assert summary.apply(Status(message="x").wire() | {"ts": 1.0, "seq": 2})


def test_spans_that_never_end_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentcast.server.runs.summary.MAX_SPANS", 2)
    spans = [node("a"), node("b"), node("c")]
    ends = [NodeEnd(span=name, node=name, duration=1.0) for name in ("c", "b")]

    assert record(*spans, ends[0])["step"] == {"kind": "node", "name": "b"}
    assert "step" not in record(*spans, *ends)


def test_summary_is_made_of_a_state_that_was_taken_over() -> None:
    events: list[Event] = [
        RunStart(worker="w"),
        node("plan"),
        LmStart(span="l", model="gpt"),
        LmEnd(span="l", duration=1.0, usage=Usage(input_tokens=3, output_tokens=4)),
        Status(message="thinking"),
        ValidationFailed(span="plan", node="plan", attempt=1, max_retries=2, error="no"),
        tool("search"),
    ]
    state = RunState.new("r", "echo")
    queued = {"event": "run_queued", "ts": 1.0, "seq": 0, "epoch": "e", "input": {}, "thread": "t"}
    for number, event in enumerate([queued, *(event.wire() for event in events)]):
        state.apply({"ts": max(1.0, number * 10.0), "seq": number} | event)

    assert orjson.loads(RunSummary.of_state(state.document).encode(7)) == record(*events, thread="t")


texts = st.text(max_size=50) | st.sampled_from(
    ["x" * 70_000, "\x00" * 5_000, "😀" * 5_000, "\ud83d" * 500, '"\\' * 900]
)
ints = st.integers(0, 2**62)
long = [
    RunStart(worker="w"),
    *(event for count in range(3) for event in (node("\x00" * 256, f"s{count}"), tool("\x00" * 256, f"t{count}"))),
    Status(message="\x00" * 60_000),
    ToolProgress(span="t2", progress=-1.7976931348623157e308, total=-1.7976931348623157e308),
    LmEnd(
        span="l",
        duration=1.0,
        usage=Usage(input_tokens=2**62, output_tokens=2**62, cached_tokens=2**62, cost=1.7976931348623157e308),
    ),
]


def test_largest_record_fits() -> None:
    end = RunError(error=RunFailure(code="\x00" * 256, message="\x00" * 60_000), duration=1.0)
    for events in (long, [*long[:-2], CancelRequested(), *long[-2:]], [*long, end]):
        summary = RunSummary("0" * 31, "\x00" * 10_000, "\x00" * 10_000, 1795180984.123456)
        for number, event in enumerate(events, start=1):
            summary.apply(event.wire() | {"ts": 1795180984.123456, "seq": number})

        assert len(summary.encode(2**62)) <= SUMMARY_BYTES


@given(
    agent=texts, thread=texts, name=texts.filter(bool), message=texts, input_tokens=ints, progress=st.floats(0, 1e300)
)
def test_record_is_small_and_valid_whatever_the_texts(
    agent: str, thread: str, name: str, message: str, input_tokens: int, progress: float
) -> None:
    summary = RunSummary("0" * 31, agent, thread, 1.0)
    for event in (
        tool(name, "s"),
        ToolProgress(span="s", progress=progress),
        Status(message=message),
        LmEnd(span="l", duration=1.0, usage=Usage(input_tokens=input_tokens)),
    ):
        summary.apply(event.wire() | {"ts": 1.0, "seq": 1})

    data = summary.encode(1)
    assert len(data) <= SUMMARY_BYTES
    assert orjson.loads(data)["progress"] == {"progress": progress}


@pytest.mark.parametrize("tokens", [2**63, -(2**63)])
def test_a_sum_of_tokens_beyond_64_bits_stays_what_json_can_hold(tokens: int) -> None:
    summary = RunSummary("r", "echo", None, 1.0)
    usage = Usage(input_tokens=tokens, output_tokens=tokens, cached_tokens=tokens)
    for span in ("a", "b", "c"):
        summary.apply(LmEnd(span=span, duration=1.0, usage=usage).wire() | {"ts": 1.0, "seq": 1})

    data = summary.encode(1)

    assert summary.usage is not None
    assert orjson.loads(data)["usage"] == summary.usage.wire()
    assert orjson.dumps(RunEnd(result=None, usage=summary.usage, duration=1.0).wire())
