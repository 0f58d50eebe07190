"""The reducer: what each event does to a run's state, its bounds, and that a snapshot is as good as the log (G10)."""

from collections.abc import Generator
from typing import Any, TypeVar

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcast.server import state as module
from agentcast.server.state import RunState

T = TypeVar("T")
QUEUED = {"event": "run_queued", "epoch": "e", "input": {"q": None}}
FAILURE = {"code": "agent_error", "message": "no"}
STOPPED = {"code": "cancelled", "message": "cancelled"}
TERMINAL = [
    {"event": "run_end", "result": {"a": None}, "duration": 1.0, "usage": {"input_tokens": 3, "output_tokens": 4}},
    {"event": "run_error", "error": FAILURE | {"retryable": False}, "duration": 1.0},
    {"event": "run_cancelled", "reason": "why", "duration": 1.0},
]


def fold(*events: dict[str, Any], state: RunState | None = None, first: int = 1) -> RunState:
    """Fold events that get a seq, and a time of ten times that."""
    state = state or RunState.new("r", "echo")
    for seq, event in enumerate(events, start=first):
        state.apply({"seq": seq, "ts": seq * 10.0} | event)
    return state


def started(*events: dict[str, Any]) -> dict[str, Any]:
    return fold(QUEUED, {"event": "run_start", "worker": "w", "attempt": 1}, *events).document


def span(name: str = "s", **fields: Any) -> dict[str, Any]:
    return {"event": "tool_start", "span": name, "tool": "search", "args": {"n": 1}} | fields


def end_span(name: str = "s", **fields: Any) -> dict[str, Any]:
    return {"event": "tool_end", "span": name, "tool": "search", "duration": 1.0} | fields


def message(name: str = "m") -> dict[str, Any]:
    return {"event": "message_start", "message": name, "span": "s", "field": "answer"}


def token(delta: str, name: str = "m") -> dict[str, Any]:
    return {"event": "token", "message": name, "delta": delta}


def end_message(text: str, name: str = "m") -> dict[str, Any]:
    return {"event": "message_end", "message": name, "text": text}


# -- The run -------------------------------------------------------------------------------------------------------


def test_state_before_the_first_event_has_no_nulls() -> None:
    assert RunState.new("r", "echo").document == {
        "run": "r",
        "agent": "echo",
        "status": "queued",
        "input": {},
        "created": 0.0,
        "spans": [],
        "messages": [],
        "validation_errors": [],
        "state": {},
    }


def test_queued_run_has_its_input_thread_and_position() -> None:
    document = fold(QUEUED | {"thread": "t", "position": 4}).document

    assert (document["input"], document["thread"], document["position"]) == ({"q": None}, "t", 4)
    assert (document["status"], document["created"]) == ("queued", 10.0)


def test_position_is_that_of_now_until_the_run_starts() -> None:
    queued = fold(QUEUED | {"position": 4}, {"event": "run_position", "position": 2})
    assert queued.document["position"] == 2

    queued.apply({"event": "run_start", "worker": "w", "attempt": 2, "seq": 3, "ts": 30.0})

    assert "position" not in queued.document
    assert (queued.document["status"], queued.document["started"], queued.document["attempt"]) == ("running", 30.0, 2)


def test_last_status_message_stays() -> None:
    document = started({"event": "status", "message": "one"}, {"event": "status", "message": "two", "span": "s"})

    assert document["status_message"] == "two"


def test_run_asked_to_stop_is_cancelling() -> None:
    assert started({"event": "cancel_requested", "reason": "why"})["status"] == "cancelling"


@pytest.mark.parametrize("terminal", TERMINAL, ids=lambda event: event["event"])
@pytest.mark.parametrize("before", [[], [{"event": "cancel_requested"}]], ids=["running", "cancelling"])
def test_terminal_event_closes_what_is_open(terminal: dict[str, Any], before: list[dict[str, Any]]) -> None:
    closed = {"run_end": "done", "run_error": "error", "run_cancelled": "cancelled"}[terminal["event"]]
    status = {"run_end": "done", "run_error": "failed", "run_cancelled": "cancelled"}[terminal["event"]]

    document = started(
        span("open"),
        span("finished"),
        end_span("finished", result=1),
        message("open"),
        token("x", "open"),
        message("whole"),
        end_message("", "whole"),
        message("void"),
        {"event": "message_retracted", "message": "void", "reason": "no"},
        *before,
        terminal,
    )

    ts = (11 + len(before) + 1) * 10.0
    assert (document["status"], document["ended"]) == (status, ts)
    assert [(item["span"], item["status"], item["ended"]) for item in document["spans"]] == [
        ("open", closed, ts),
        ("finished", "done", 50.0),
    ]
    assert [(item["message"], item["status"]) for item in document["messages"]] == [
        ("open", closed),
        ("whole", "done"),
        ("void", "retracted"),
    ]
    for field in ("result", "error", "usage"):
        assert document.get(field) == terminal.get(field)
        assert (field in document) == (field in terminal)


@pytest.mark.parametrize("terminal", TERMINAL, ids=lambda event: event["event"])
def test_run_that_ends_in_the_queue_has_no_position(terminal: dict[str, Any]) -> None:
    assert "position" not in fold(QUEUED | {"position": 3}, terminal).document


def test_null_result_is_kept() -> None:
    document = started({"event": "run_end", "result": None, "duration": 1.0})

    assert document["result"] is None


@pytest.mark.parametrize(
    "event", [{"event": "custom", "name": "n", "value": 1}, {"event": "step_limit"}, {"event": "from the future"}]
)
def test_event_without_effect_changes_nothing(event: dict[str, Any]) -> None:
    assert started(event) == started()


# -- Spans ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "kind", "name", "extra"),
    [
        ({"event": "tool_start", "tool": "search", "args": {"n": None}}, "tool", "search", {"args": {"n": None}}),
        ({"event": "lm_start", "model": "gpt"}, "lm", "gpt", {}),
        ({"event": "node_start", "node": "plan", "kind": "graph", "inputs": {}}, "node", "plan", {"inputs": {}}),
        ({"event": "node_start", "node": "plan", "kind": "agent", "parent": "p"}, "node", "plan", {"parent": "p"}),
    ],
)
def test_span_starts(start: dict[str, Any], kind: str, name: str, extra: dict[str, Any]) -> None:
    assert started(start | {"span": "s"})["spans"] == [
        {"span": "s", "kind": kind, "name": name, "status": "running", "started": 30.0} | extra
    ]


@pytest.mark.parametrize(
    ("end", "status", "extra"),
    [
        ({"event": "tool_end", "result": None}, "done", {"result": None}),
        ({"event": "tool_end", "error": FAILURE}, "error", {"error": FAILURE}),
        ({"event": "lm_end", "usage": {"input_tokens": 1}}, "done", {"usage": {"input_tokens": 1}}),
        ({"event": "lm_end", "error": FAILURE}, "error", {"error": FAILURE}),
        ({"event": "node_end", "patch": {"a": 1}}, "done", {"patch": {"a": 1}}),
        ({"event": "node_end"}, "done", {}),
        ({"event": "node_error", "error": FAILURE}, "error", {"error": FAILURE}),
        ({"event": "node_error", "error": STOPPED}, "cancelled", {"error": STOPPED}),
    ],
)
def test_span_ends(end: dict[str, Any], status: str, extra: dict[str, Any]) -> None:
    (item,) = started(span(), end | {"span": "s", "duration": 1.0})["spans"]

    assert (
        item
        == {
            "span": "s",
            "kind": "tool",
            "name": "search",
            "args": {"n": 1},
            "started": 30.0,
            "status": status,
            "ended": 40.0,
        }
        | extra
    )


def test_progress_is_the_last_and_whole() -> None:
    document = started(
        span(),
        {"event": "tool_progress", "span": "s", "progress": 1.0, "total": 3.0, "message": "one"},
        {"event": "tool_progress", "span": "s", "progress": 2.0},
    )

    assert document["spans"][0]["progress"] == {"progress": 2.0}


@pytest.mark.parametrize(
    "event",
    [
        end_span("other"),
        {"event": "tool_progress", "span": "other", "progress": 1.0},
        {"event": "node_error", "span": "other", "node": "n", "error": FAILURE},
    ],
)
def test_event_of_an_unknown_span_changes_nothing(event: dict[str, Any]) -> None:
    assert started(span(), event) == started(span())


def test_ended_span_does_not_change_any_more() -> None:
    once = started(span(), end_span(result=1))

    assert started(span(), end_span(result=1), end_span(error=FAILURE)) == once
    assert started(span(), end_span(result=1), {"event": "tool_progress", "span": "s", "progress": 1.0}) == once
    assert started(span(), end_span(result=1), span(tool="again")) == once


def test_patch_of_an_ended_node_sets_state_all_the_same() -> None:
    assert started({"event": "node_end", "span": "gone", "node": "n", "patch": {"a": None}})["state"] == {"a": None}


def test_patches_set_fields_in_order() -> None:
    document = started(
        {"event": "state", "patch": {"a": 1, "b": {"deep": 1}}},
        {"event": "node_end", "span": "s", "node": "n", "patch": {"b": {"other": 2}, "c": None}},
        {"event": "state", "patch": {}},
    )

    assert document["state"] == {"a": 1, "b": {"other": 2}, "c": None}


def test_validation_error_is_listed_without_what_the_hub_adds() -> None:
    error = {"span": "s", "node": "n", "attempt": 1, "max_retries": 2, "error": "no", "failed_fields": ["a"]}

    assert started({"event": "validation_error"} | error)["validation_errors"] == [error]


# -- Messages ------------------------------------------------------------------------------------------------------


def test_message_grows_with_its_tokens_and_ends_with_its_text() -> None:
    open_message = {"message": "m", "span": "s", "field": "answer", "text": "ab", "status": "open"}

    assert started(message(), token("a"), token("b"))["messages"] == [open_message]
    assert started(message(), token("a"), end_message("abc"))["messages"] == [
        open_message | {"text": "abc", "status": "done"}
    ]


@pytest.mark.parametrize("before", [[], [end_message("")]], ids=["open", "done"])
def test_retracted_message_keeps_its_text_and_takes_no_more(before: list[dict[str, Any]]) -> None:
    retracted = {"event": "message_retracted", "message": "m", "reason": "no"}
    events = [message(), *before, retracted]

    assert started(*events)["messages"][0]["status"] == "retracted"
    assert started(*events, token("x"), end_message("y"), message()) == started(*events)


@pytest.mark.parametrize(
    "event", [token("x"), end_message("x"), {"event": "message_retracted", "message": "m", "reason": "no"}]
)
def test_event_of_an_unknown_message_changes_nothing(event: dict[str, Any]) -> None:
    assert started(event) == started()


def test_messages_grow_side_by_side_in_start_order() -> None:
    document = started(message("b"), message("a"), token("1", "a"), token("2", "b"), token("3", "a"))

    assert [(item["message"], item["text"]) for item in document["messages"]] == [("b", "2"), ("a", "13")]


# -- Bounds --------------------------------------------------------------------------------------------------------


def test_oldest_finished_span_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SPANS", 3)

    document = started(span("a"), span("b"), span("c"), end_span("b"), end_span("c"), span("d"), span("e"))

    assert [item["span"] for item in document["spans"]] == ["a", "d", "e"]
    assert document["dropped"] == 2


def test_oldest_span_goes_when_none_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SPANS", 2)

    document = started(span("a"), span("b"), span("c"), end_span("a"), end_span("b"))

    assert [(item["span"], item["status"]) for item in document["spans"]] == [("b", "done"), ("c", "running")]
    assert document["dropped"] == 1


def test_oldest_message_goes_past_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MESSAGES", 2)

    document = started(message("a"), message("b"), end_message("", "b"), message("c"), token("x", "a"), message("d"))

    assert [(item["message"], item["text"]) for item in document["messages"]] == [("c", ""), ("d", "")]
    assert document["dropped"] == 2


def test_only_the_newest_spans_keep_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DETAILED", 2)
    names = ("a", "b", "c", "d")
    starts = [{"event": "tool_start", "span": name, "tool": "t", "args": {"of": name}} for name in names]
    ends = [{"event": "tool_end", "span": name, "tool": "t", "duration": 1, "result": name} for name in names]

    spans = started(starts[0], ends[0], *starts[1:], *ends[1:])["spans"]

    assert [item.get("args") for item in spans] == [None, None, {"of": "c"}, {"of": "d"}]
    assert [item.get("result") for item in spans] == [None, None, "c", "d"]
    assert {item["status"] for item in spans} == {"done"}


def test_oldest_validation_error_goes_and_new_state_fields_are_refused_past_the_cap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_VALIDATION_ERRORS", 2)
    monkeypatch.setattr(module, "MAX_STATE_FIELDS", 2)
    error = {"event": "validation_error", "span": "s", "node": "n", "max_retries": 9, "error": "no"}

    document = started(
        *(error | {"attempt": attempt} for attempt in (1, 2, 3)),
        {"event": "state", "patch": {"a": 1, "b": 1, "c": 1}},
        {"event": "state", "patch": {"b": 2}},
    )

    assert [item["attempt"] for item in document["validation_errors"]] == [2, 3]
    assert document["state"] == {"a": 1, "b": 2}
    assert document["dropped"] == 2


def test_caps_are_those_of_the_protocol() -> None:
    assert (module.MAX_SPANS, module.MAX_MESSAGES, module.MAX_VALIDATION_ERRORS) == (2_000, 500, 200)


# -- Snapshots -----------------------------------------------------------------------------------------------------

ids = st.sampled_from(["a", "b", "c", "d", "e"])
values = st.none() | st.integers(-5, 5) | st.floats(allow_nan=False, allow_infinity=False) | st.text("aé☃", max_size=3)
patches = st.dictionaries(ids, values, max_size=3)


def event(kind: str, /, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"event": st.just(kind)} | fields)


failures = st.just(FAILURE)
events = st.one_of(
    event("run_position", position=st.integers(0, 9)),
    event("run_start", worker=ids, attempt=st.integers(1, 3)),
    event("status", message=ids),
    event("node_start", span=ids, node=ids, kind=st.just("module"), inputs=patches, parent=ids),
    event("node_end", span=ids, node=ids, patch=patches, duration=st.just(1.0)),
    event("node_error", span=ids, node=ids, error=failures, duration=st.just(1.0)),
    event("validation_error", span=ids, node=ids, attempt=st.just(1), max_retries=st.just(2), error=ids),
    event("lm_start", span=ids, model=ids),
    event("lm_end", span=ids, duration=st.just(1.0), usage=patches),
    event("tool_start", span=ids, tool=ids, args=patches),
    event("tool_progress", span=ids, progress=st.floats(0, 1)),
    event("tool_end", span=ids, tool=ids, duration=st.just(1.0), result=values),
    event("tool_end", span=ids, tool=ids, duration=st.just(1.0), error=failures),
    event("message_start", message=ids, span=ids, field=ids),
    event("token", message=ids, delta=st.text("aé☃", max_size=3)),
    event("message_end", message=ids, text=st.text("aé☃", max_size=3)),
    event("message_retracted", message=ids, reason=ids),
    event("state", patch=patches),
    event("custom", name=ids, value=values),
    event("cancel_requested"),
    event("unheard_of", anything=values),
    st.sampled_from(TERMINAL),
)
logs = st.lists(events, max_size=40).map(lambda rest: [QUEUED | {"position": 3}, *rest])


@given(log=logs, cut=st.integers(0, 40))
def test_snapshot_and_the_rest_give_the_same_state_as_the_whole_log(log: list[dict[str, Any]], cut: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_SPANS", 3)
        patch.setattr(module, "MAX_MESSAGES", 2)
        patch.setattr(module, "MAX_VALIDATION_ERRORS", 2)
        patch.setattr(module, "MAX_STATE_FIELDS", 3)
        whole = fold(*log)

        resumed = RunState.decode(fold(*log[:cut]).encode())
        fold(*log[cut:], state=resumed, first=len(log[:cut]) + 1)

        assert resumed.encode() == whole.encode()
        assert len(whole.document["spans"]) <= 3
        assert len(whole.document["messages"]) <= 2
        assert len(whole.document["validation_errors"]) <= 2
        assert len(whole.document["state"]) <= 3


@given(log=logs)
def test_state_is_encoded_as_one_item_per_line_and_decoded_from_that_in_steps(log: list[dict[str, Any]]) -> None:
    state = fold(*log)
    encoded = state.encode()

    assert orjson.loads(encoded) == state.document
    assert list(orjson.loads(encoded)) == list(state.document)
    assert finish(state.encode_steps()) == (encoded, len(encoded.splitlines()))
    decoded, steps = finish(RunState.decode_steps(encoded))
    assert decoded.document == RunState.decode(encoded).document
    assert steps == len(encoded.splitlines()) - 2
    items = sum(len(state.document[name]) for name in ("spans", "messages", "validation_errors", "state"))
    assert len(encoded.splitlines()) == 2 + len(state.document) + 4 + items


def test_texts_that_look_like_the_end_of_a_line_are_decoded_too() -> None:
    texts = ["\n", ":[", ":{", "]", "}", '",\n"', "a:{\n"]
    state = fold(
        QUEUED | {"input": {text: [text, {text: {}}] for text in texts}},
        *({"event": "state", "patch": {text: value}} for text in texts for value in (text, [text], {"": text})),
        *(span(text, args={text: text}) for text in texts),
        message(":["),
        token(":[", ":["),
    )

    assert finish(RunState.decode_steps(state.encode()))[0].document == state.document


def test_state_of_one_line_is_decoded_in_steps_as_well() -> None:
    state = fold(QUEUED, span())

    assert finish(RunState.decode_steps(orjson.dumps(state.document)))[0].document == state.document


def finish(steps: Generator[None, None, T]) -> tuple[T, int]:
    """What the steps return, and how many there were."""
    count = 0
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value, count
        count += 1


@given(log=logs)
def test_events_are_left_as_they_were(log: list[dict[str, Any]]) -> None:
    before = orjson.dumps(log)

    fold(*log)

    assert orjson.dumps(log) == before


@given(log=logs)
def test_state_has_no_null_but_in_user_data(log: list[dict[str, Any]]) -> None:
    user_data = {"input", "patch", "result", "args", "inputs", "state", "usage"}

    def check(value: Any) -> None:
        assert value is not None
        for item in value if isinstance(value, list) else []:
            check(item)
        for name, item in value.items() if isinstance(value, dict) else ():
            if name not in user_data:
                check(item)

    check(fold(*log).document)
