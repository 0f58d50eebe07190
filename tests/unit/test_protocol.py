"""The wire codec: every command, every malformed shape, every frame."""

import contextlib
import json
import re
import tracemalloc
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcast.server import protocol
from agentcast.server.errors import (
    AlreadyFinished,
    BadRequest,
    CommandError,
    Conflict,
    Forbidden,
    InvalidInput,
    NotFound,
    TooMany,
    Unavailable,
    UnknownAgent,
    UnknownOp,
)
from agentcast.server.protocol import (
    Cancel,
    List,
    Malformed,
    Ping,
    Position,
    Start,
    Subscribe,
    To,
    Unsubscribe,
    parse_command,
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    # Lone surrogates are no Unicode text: JSON on the wire cannot carry them.
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=20,
)


def refused(message: str | bytes | dict[str, Any]) -> Malformed:
    with pytest.raises(Malformed) as refusal:
        parse_command(orjson.dumps(message) if isinstance(message, dict) else message)
    return refusal.value


# -- Commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "command"),
    [
        ({"op": "ping"}, Ping(op="ping")),
        ({"op": "ping", "id": 6}, Ping(op="ping", id=6)),
        ({"op": "ping", "id": "six"}, Ping(op="ping", id="six")),
        ({"op": "ping", "id": None, "extra": [1]}, Ping(op="ping")),
        (
            {"op": "start", "agent": "echo", "input": {"a": [1, None]}},
            Start(op="start", agent="echo", input={"a": [1, None]}, subscribe=True, detail="full"),
        ),
        (
            {
                "op": "start",
                "id": 1,
                "agent": "echo",
                "input": {},
                "thread": "t",
                "key": "k",
                "subscribe": False,
                "detail": "progress",
            },
            Start(op="start", id=1, agent="echo", input={}, thread="t", key="k", subscribe=False, detail="progress"),
        ),
        ({"op": "subscribe", "to": {"run": "r"}}, Subscribe(op="subscribe", to=To(run="r"), since={})),
        ({"op": "subscribe", "to": {"thread": "t"}}, Subscribe(op="subscribe", to=To(thread="t"))),
        ({"op": "subscribe", "to": {"agent": "a"}}, Subscribe(op="subscribe", to=To(agent="a"))),
        (
            {
                "op": "subscribe",
                "to": {"all": True},
                "detail": "progress",
                "since": {"r": {"epoch": "e", "seq": 12}, "s": {"seq": 0}},
                "feed": "f",
            },
            Subscribe(
                op="subscribe",
                to=To(all=True),
                detail="progress",
                since={"r": Position(epoch="e", seq=12), "s": Position(seq=0)},
                feed="f",
            ),
        ),
        ({"op": "unsubscribe", "subscription": "s1"}, Unsubscribe(op="unsubscribe", subscription="s1")),
        ({"op": "cancel", "run": "r"}, Cancel(op="cancel", run="r")),
        ({"op": "cancel", "run": "r", "reason": "why"}, Cancel(op="cancel", run="r", reason="why")),
    ],
)
def test_command_is_read(message: dict[str, Any], command: protocol.Command) -> None:
    assert parse_command(orjson.dumps(message)) == command
    assert parse_command(orjson.dumps(message).decode()) == command


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ({"op": "ping", "id": 1.5}, ["id.constrained-str", "id.int"]),
        ({"op": "ping", "id": True}, ["id.constrained-str", "id.int"]),
        ({"op": "ping", "id": [1]}, ["id.constrained-str", "id.int"]),
        ({"op": "ping", "id": "x" * 129}, ["id.constrained-str", "id.int"]),
        ({"op": "start"}, ["agent", "input"]),
        ({"op": "start", "agent": "", "input": {}}, ["agent"]),
        ({"op": "start", "agent": "a" * 257, "input": {}}, ["agent"]),
        ({"op": "start", "agent": 1, "input": {}}, ["agent"]),
        ({"op": "start", "agent": "a", "input": []}, ["input"]),
        ({"op": "start", "agent": "a", "input": "{}"}, ["input"]),
        ({"op": "start", "agent": "a", "input": None}, ["input"]),
        ({"op": "start", "agent": "a", "input": {}, "thread": 5}, ["thread"]),
        ({"op": "start", "agent": "a", "input": {}, "key": ""}, ["key"]),
        ({"op": "start", "agent": "a", "input": {}, "subscribe": "yes"}, ["subscribe"]),
        ({"op": "start", "agent": "a", "input": {}, "subscribe": 1}, ["subscribe"]),
        ({"op": "start", "agent": "a", "input": {}, "detail": "some"}, ["detail"]),
        ({"op": "subscribe"}, ["to"]),
        ({"op": "subscribe", "to": "all"}, ["to"]),
        ({"op": "subscribe", "to": {}}, ["to"]),
        ({"op": "subscribe", "to": {"run": None}}, ["to"]),
        ({"op": "subscribe", "to": {"all": False}}, ["to.all"]),
        ({"op": "subscribe", "to": {"all": "yes"}}, ["to.all"]),
        ({"op": "subscribe", "to": {"run": ""}}, ["to.run"]),
        ({"op": "subscribe", "to": {"run": "r", "all": True}}, ["to"]),
        ({"op": "subscribe", "to": {"run": "r", "thread": None}}, ["to"]),
        ({"op": "subscribe", "to": {"everything": True}}, ["to"]),
        ({"op": "subscribe", "to": {"all": True}, "since": []}, ["since"]),
        ({"op": "subscribe", "to": {"all": True}, "since": {"r": 5}}, ["since.r"]),
        ({"op": "subscribe", "to": {"all": True}, "since": {"r": {}}}, ["since.r.seq"]),
        ({"op": "subscribe", "to": {"all": True}, "since": {"r": {"seq": -1}}}, ["since.r.seq"]),
        ({"op": "subscribe", "to": {"all": True}, "since": {"r": {"seq": 1.0}}}, ["since.r.seq"]),
        ({"op": "subscribe", "to": {"all": True}, "since": {"r": {"seq": "1"}}}, ["since.r.seq"]),
        ({"op": "subscribe", "to": {"all": True}, "since": {"r": {"seq": 1, "epoch": 1}}}, ["since.r.epoch"]),
        ({"op": "subscribe", "to": {"all": True}, "feed": 5}, ["feed"]),
        ({"op": "subscribe", "to": {"all": True}, "feed": "x" * 257}, ["feed"]),
        ({"op": "unsubscribe"}, ["subscription"]),
        ({"op": "unsubscribe", "subscription": 1}, ["subscription"]),
        ({"op": "cancel"}, ["run"]),
        ({"op": "cancel", "run": {}}, ["run"]),
        ({"op": "cancel", "run": "r", "reason": 5}, ["reason"]),
        ({"op": "cancel", "run": "r", "reason": "x" * 1_001}, ["reason"]),
    ],
)
def test_wrong_field_is_named(message: dict[str, Any], fields: list[str]) -> None:
    refusal = refused(message)

    assert refusal.error.code == "bad_request"
    named = [part.partition(":")[0] for part in re.split(r"; (?=[a-z.-]+: )", refusal.error.message)]
    assert set(named) == set(fields)
    assert {".".join(map(str, item["loc"])) for item in refusal.error.details} >= set(fields)
    assert all(item.keys() == {"loc", "msg", "type"} for item in refusal.error.details)


def test_refusal_does_not_echo_the_input() -> None:
    refusal = refused({"op": "cancel", "run": {"password": "hunter2"}, "reason": ["hunter2"]})

    assert b"hunter2" not in orjson.dumps(refusal.error.wire())


def test_too_many_positions_are_refused() -> None:
    since = {f"r{n}": {"seq": 0} for n in range(protocol.MAX_SINCE + 1)}

    refusal = refused({"op": "subscribe", "id": 3, "to": {"all": True}, "since": since})

    assert refusal.error.message.startswith("since: ")
    del since["r0"]
    assert isinstance(parse_command(orjson.dumps({"op": "subscribe", "to": {"all": True}, "since": since})), Subscribe)


def test_thousands_of_problems_give_a_short_list() -> None:
    since = {f"r{n}": None for n in range(protocol.MAX_SINCE)}

    refusal = refused({"op": "subscribe", "to": {"all": True}, "since": since})

    assert len(refusal.error.details) == 50


@pytest.mark.parametrize(
    "text",
    ["", " ", "{", "nope", '{"op":"ping"', '{"op":"ping"}}', '{"op":NaN}', '"\\ud800"', "\x00", "[" * 5_000],
)
def test_what_is_not_json_is_a_bad_request_without_id(text: str) -> None:
    refusal = refused(text)

    assert isinstance(refusal.error, BadRequest)
    assert "JSON" in refusal.error.message
    assert refusal.id is None


@pytest.mark.parametrize("text", ["[]", "5", "null", '"ping"', "true", '[{"op":"ping"}]'])
def test_what_is_no_object_is_a_bad_request(text: str) -> None:
    refusal = refused(text)

    assert refusal.error.code == "bad_request"
    assert "object" in refusal.error.message


@pytest.mark.parametrize("message", [{"id": 7}, {"id": 7, "op": None}, {"id": 7, "op": 5}, {"id": 7, "op": ["ping"]}])
def test_missing_op_lists_the_known_ones(message: dict[str, Any]) -> None:
    refusal = refused(message)

    assert (refusal.error.code, refusal.id) == ("bad_request", 7)
    assert "start, subscribe, unsubscribe, cancel, list, ping" in refusal.error.message


def test_unknown_op_is_named_and_lists_the_known_ones() -> None:
    refusal = refused({"id": "a", "op": "dance" * 100})

    assert isinstance(refusal.error, UnknownOp)
    assert refusal.id == "a"
    assert "dance" in refusal.error.message
    assert "unsubscribe" in refusal.error.message
    assert len(refusal.error.message) < 200


@pytest.mark.parametrize("id", [0, -1, 2**64 - 1, "", "x" * 128, "☃"])
def test_id_of_a_malformed_command_is_echoed(id: int | str) -> None:
    assert refused({"id": id, "op": "cancel"}).id == id


@pytest.mark.parametrize("id", [None, True, 1.5, "x" * 129, [], {}])
def test_id_that_is_none_is_not_echoed(id: Any) -> None:
    assert refused({"id": id, "op": "cancel"}).id is None


@given(st.text() | st.binary())
def test_no_text_does_worse_than_malformed(text: str | bytes) -> None:
    with contextlib.suppress(Malformed):
        parse_command(text)


@given(
    st.fixed_dictionaries(
        {"op": st.sampled_from(["start", "subscribe", "unsubscribe", "cancel", "ping", "x"])},
        optional=dict.fromkeys(
            ("id", "agent", "input", "to", "since", "feed", "detail", "subscription", "run", "reason", "key"),
            json_values,
        ),
    )
)
def test_no_document_does_worse_than_malformed(document: dict[str, Any]) -> None:
    try:
        parse_command(orjson.dumps(document))
    except Malformed as refusal:
        reply = orjson.loads(protocol.error_reply(refusal.id, refusal.error))
    else:
        return
    assert reply["error"]["message"]


# -- Frames --------------------------------------------------------------------------------------------------------


def test_hello_states_the_limits() -> None:
    assert orjson.loads(protocol.hello("s", "agentcast/1", 25.0)) == {
        "type": "hello",
        "protocol": 1,
        "session": "s",
        "server": "agentcast/1",
        "heartbeat": 25.0,
        "limits": {"message_bytes": 262144, "subscriptions": 128, "commands": 64},
    }


@pytest.mark.parametrize(
    ("id", "echoed"), [(None, {}), (0, {"id": 0}), (7, {"id": 7}), ("", {"id": ""}), ("a", {"id": "a"})]
)
def test_reply_carries_the_id_if_there_is_one(id: int | str | None, echoed: dict[str, Any]) -> None:
    assert orjson.loads(protocol.reply(id, {"run": "r"})) == {
        "type": "reply",
        **echoed,
        "ok": True,
        "result": {"run": "r"},
    }
    assert orjson.loads(protocol.error_reply(id, NotFound("gone"))) == {
        "type": "reply",
        **echoed,
        "ok": False,
        "error": {"code": "not_found", "message": "gone", "retryable": False},
    }


@pytest.mark.parametrize(
    ("error", "code", "status", "retryable"),
    [
        (BadRequest, "bad_request", 400, False),
        (UnknownOp, "unknown_op", 400, False),
        (UnknownAgent, "unknown_agent", 404, False),
        (InvalidInput, "invalid_input", 422, False),
        (NotFound, "not_found", 404, False),
        (AlreadyFinished, "already_finished", 409, False),
        (Conflict, "conflict", 409, False),
        (TooMany, "too_many", 429, False),
        (Forbidden, "forbidden", 403, False),
        (Unavailable, "unavailable", 503, True),
        (CommandError, "internal", 500, False),
    ],
)
def test_error_has_its_code_status_and_whether_to_retry(
    error: type[CommandError], code: str, status: int, retryable: bool
) -> None:
    assert error("why", details=[1]).wire() == {
        "code": code,
        "message": "why",
        "retryable": retryable,
        "details": [1],
    }
    assert error.status == status


def test_event_puts_the_fact_beside_what_the_hub_knows() -> None:
    frame = protocol.encode_event("r", "echo", 3, 1, 5.5, {"event": "token", "message": "m", "delta": "é☃"})

    assert orjson.loads(frame) == {
        "type": "event",
        "event": "token",
        "run": "r",
        "seq": 3,
        "prev": 1,
        "ts": 5.5,
        "agent": "echo",
        "message": "m",
        "delta": "é☃",
    }


@given(json_values)
def test_snapshot_holds_the_state_as_it_is(state: Any) -> None:
    assert orjson.loads(protocol.snapshot('r"', "e", 57, orjson.dumps(state))) == {
        "type": "snapshot",
        "run": 'r"',
        "epoch": "e",
        "seq": 57,
        "state": state,
    }


def test_other_frames_have_their_shape() -> None:
    assert orjson.loads(protocol.gap("r", 12, 40, "trimmed")) == {
        "type": "gap",
        "run": "r",
        "from": 12,
        "to": 40,
        "reason": "trimmed",
    }
    assert orjson.loads(protocol.feed("f:1")) == {"type": "feed", "position": "f:1"}
    assert orjson.loads(protocol.PING) == {"type": "ping"}


def test_encoded_event_holds_no_more_memory_than_it_has_bytes() -> None:
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        kept = [
            protocol.encode_event("r" * 30, "a", seq, 0, 1.5, {"event": "token", "delta": "x"}) for seq in range(500)
        ]
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 2 * sum(map(len, kept)) + 50_000


# -- Summaries and the list ----------------------------------------------------------------------------------------


def test_a_list_asks_for_the_newest_hundred_unless_it_says_otherwise() -> None:
    command = parse_command('{"op":"list"}')

    assert isinstance(command, List)
    assert (command.order, command.limit, command.subscribe) == ("newest", 100, False)
    assert (command.agent, command.thread, command.status, command.after) == (None, None, None, None)


@pytest.mark.parametrize(
    ("to", "key", "named"),
    [
        ({"all": True}, ("ann", "all", ""), None),
        ({"agent": "a"}, ("ann", "agent", "a"), None),
        ({"thread": "t"}, ("ann", "thread", "t"), None),
        ({"run": "r"}, None, ["r"]),
        ({"runs": ["r", "s"]}, None, ["r", "s"]),
    ],
)
def test_a_subscription_asks_for_a_key_or_names_runs(to: dict[str, Any], key: Any, named: list[str] | None) -> None:
    asked = To(**to)

    assert (None if asked.named is None else list(asked.named)) == named
    if named is None:
        assert asked.key("ann") == key


def test_summaries_are_put_into_a_frame_as_they_are() -> None:
    frame = protocol.summaries([b'{"run":"a", "x":1}', b'{"run":"b"}'])

    assert frame == b'{"type":"summary","runs":[{"run":"a", "x":1},{"run":"b"}]}'
    assert json.loads(protocol.summaries([])) == {"type": "summary", "runs": []}
    assert json.loads(protocol.page("s1", ["a"], None)) == {"type": "list", "subscription": "s1", "runs": ["a"]}
    assert json.loads(protocol.page("s1", [], "b"))["next"] == "b"
