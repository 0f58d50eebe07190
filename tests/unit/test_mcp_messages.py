"""Messages read leniently: whatever a server writes, a request that it answers is answered, in a form the SDK takes."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp_types import CallToolResult, InitializeResult, ListToolsResult, jsonrpc_message_adapter, methods

from agentcast.agents.mcp.arguments import SCHEMA
from agentcast.agents.mcp.http import _Document, _Events
from agentcast.agents.mcp.messages import MAX_DEPTH, _shallow, encoded, is_answer, read
from agentcast.agents.mcp.oversize import Lines, Oversize
from agentcast.agents.mcp.results import LEFT_OUT, error_data, fitted

VERSIONS = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25", "2026-07-28")
MODELS: dict[str, Any] = {"tools/call": CallToolResult, "tools/list": ListToolsResult, "initialize": InitializeResult}

names = st.sampled_from(
    (
        "content structuredContent isError type text data uri resource tools name inputSchema properties required "
        "$schema nextCursor capabilities serverInfo protocolVersion resultType _meta x"
    ).split()
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["text", "image", "resource", "object"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=20,
)


def taken(method: str, result: dict[str, Any]) -> None:
    """As the SDK takes it, whatever protocol was agreed on."""
    for version in VERSIONS:
        if method != "initialize" or version != VERSIONS[-1]:
            methods.validate_server_result(method, version, result)
    MODELS[method].model_validate(result, by_name=False)


@pytest.mark.parametrize("kind", ["text", "complete", "input_required", "task", "", None, 3])
@pytest.mark.parametrize("content", [None, "x", [], [{"type": "text", "text": "said"}]])
def test_a_result_of_any_type_answers_its_call(kind: Any, content: Any):
    fitting = fitted("tools/call", {"resultType": kind, "content": content})
    assert fitting is not None
    taken("tools/call", fitting)
    assert fitting["content"] == [{"type": "text", "text": "said"}] or content != [{"type": "text", "text": "said"}]


def test_a_request_for_input_is_left_as_it_is():
    asking = {"resultType": "input_required", "requestState": "s"}
    assert fitted("tools/call", asking) == asking


@given(st.sampled_from(list(MODELS)), values)
def test_any_result_answers_its_request(method: str, result: Any):
    [message] = read(json.dumps({"jsonrpc": "2.0", "id": 3, "result": result}).encode(), {3: method})
    assert message["id"] == 3
    jsonrpc_message_adapter.validate_python(message, by_name=False)
    if "result" in message:
        taken(method, message["result"])
    jsonrpc_message_adapter.validate_json(encoded(message), by_name=False)


@given(values)
def test_any_error_answers_its_request(error: Any):
    [message] = read(json.dumps({"id": 3, "error": error}).encode(), {3: "tools/call"})
    assert message["id"] == 3
    jsonrpc_message_adapter.validate_python(message, by_name=False)
    jsonrpc_message_adapter.validate_json(encoded(message), by_name=False)


@given(st.dictionaries(st.sampled_from(["jsonrpc", "id", "method", "params", "result", "error", "x"]), values))
def test_any_document_is_a_message_or_none(document: dict[str, Any]):
    for message in read(json.dumps(document).encode(), {3: "tools/call"}):
        jsonrpc_message_adapter.validate_python(message, by_name=False)
        jsonrpc_message_adapter.validate_json(encoded(message), by_name=False)


@given(st.binary() | st.text().map(str.encode) | st.text('{}[]":,\\ud83 id1', max_size=40).map(str.encode))
def test_any_bytes_are_read(data: bytes):
    for message in read(data, {3: "tools/call"}):
        jsonrpc_message_adapter.validate_python(message, by_name=False)


@given(st.binary())
def test_any_body_answers_its_request(body: bytes):
    document = _Document({3: "tools/call"})
    assert not list(document.feed(body))
    message = jsonrpc_message_adapter.validate_json(b"".join(document.end()), by_name=False)
    assert message.id == 3  # type: ignore[union-attr]


ANSWER = {"jsonrpc": "2.0", "id": 3, "result": {"content": [{"type": "text", "text": 'some "text" {[ä'}]}}


@given(st.integers(0, 30), st.integers(0, 120), st.binary(max_size=4))
def test_answer_with_a_few_wrong_bytes_still_answers(length: int, at: int, wrong: bytes):
    line = json.dumps(ANSWER, ensure_ascii=False).encode()
    at = 27 + at % (len(line) - 27)  # behind its id
    garbled = (line[:at] + wrong + line[at + length :]).replace(b"\n", b" ")
    answers = [message for message in read(garbled, {3: "tools/call"}) if is_answer(message)]
    assert [message["id"] for message in answers] == [3]
    jsonrpc_message_adapter.validate_python(answers[0], by_name=False)


def depth(value: Any) -> int:
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@given(st.integers(0, 5), st.lists(st.integers(1, 5 * MAX_DEPTH), min_size=1, max_size=5))
def test_deep_parts_are_replaced_and_all_others_stay(spaces: int, depths: list[int]):
    parts = [f'[{"[" * levels}{" " * spaces}{"]" * levels}, "a]\\"["]' for levels in depths]
    read_ = json.loads(_shallow(f"[{','.join(parts)}]".encode()))
    assert [part[1] for part in read_] == ['a]"['] * len(depths)
    assert [depth(part[0]) for part in read_] == [min(levels, MAX_DEPTH - 2) for levels in depths]


# -- What is no answer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"DEBUG ready",
        b'{"level": "info", "id": 3, "msg": "called"}',
        b'{"id": 3, "name": "x"}',
        b"[1, 2]",
        b"5",
        b'"text"',
        b'got {"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": {}}',
        b'got {"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": {"result": 1',
        b'{"jsonrpc": "2.0", "method": "notifications/no_such"}',
        b'{"jsonrpc": "2.0", "method": 7}',
        b'{"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": 3}}',
    ],
)
def test_lines_that_answer_nothing(line: bytes):
    assert read(line, {3: "tools/call"}) == []


def test_requests_of_a_server_keep_their_id_and_get_parameters():
    sent = {"jsonrpc": "2.0", "id": "7", "method": "roots/list", "params": [1]}
    assert read(json.dumps(sent).encode(), {7: "tools/call"}) == [sent | {"params": {}}]


def test_progress_is_taken_as_far_as_it_can_be():
    def params(**given: Any) -> Any:
        sent = {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": 3, **given}}
        return [message["params"] for message in read(json.dumps(sent).encode(), {})]

    assert params(progress=1, total=10**400, message=["x"]) == [{"progressToken": 3, "progress": 1}]
    assert params(progress=0.5, total=None, message="m") == [{"progressToken": 3, "progress": 0.5, "message": "m"}]
    assert params(progress=10**400) == params(progress="1") == params(progress=True) == []


# -- Listings and errors -------------------------------------------------------------------------------------------


def test_listing_names_what_it_leaves_out():
    listing = fitted("tools/list", {"tools": [5, {"name": ""}, {"inputSchema": {}}, {"name": "a"}], "nextCursor": 2})
    assert listing is not None
    assert [tool["name"] for tool in listing["tools"]] == ["a"]
    assert listing["nextCursor"] == "2"
    assert [reason.partition(": ")[2] for _, reason in listing["_meta"][LEFT_OUT]] == [
        "it is no object",
        "it has no name",
        "it has no name",
    ]


def test_tool_that_the_sdk_will_leave_out_is_named():
    schema = {"type": "object", "properties": {"a": {"type": "string", "x-mcp-header": "not a token"}}}
    listing = fitted("tools/list", {"tools": [{"name": "a", "inputSchema": schema}]})
    assert listing is not None
    [(name, reason)] = listing["_meta"][LEFT_OUT]
    assert name == "a"
    assert reason.startswith("tool 'a' is left out: property 'a': x-mcp-header")


def test_schema_that_the_sdk_rejects_goes_along():
    odd = {"properties": {"a": 5}, "required": "a", "$schema": 4, "x": 1}
    listing = fitted("tools/list", {"tools": [{"name": "a", "inputSchema": odd, "annotations": 5, "description": 7}]})
    assert listing is not None
    assert listing["tools"] == [{"name": "a", "inputSchema": {"type": "object", "x": 1}, "_meta": {SCHEMA: odd}}]


def test_error_keeps_its_data():
    data = {"supported": ["2026-07-28"], "requested": "x"}
    assert error_data({"code": "-32022", "message": "no", "data": data}) == {
        "code": -32022,
        "message": "no",
        "data": data,
    }


# -- Events --------------------------------------------------------------------------------------------------------


def sse(*parts: bytes, requests: dict[Any, str] | None = None) -> bytes:
    events = _Events({3: "tools/call"} if requests is None else requests)
    return b"".join([*(event for part in parts for event in events.feed(part)), *events.end()])


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_events_are_the_same_however_their_bytes_arrive(end: bytes):
    body = end.join(
        [b"\xef\xbb\xbfid: 7", b": ping", b'data: {"id": 3, "jsonrpc": "2.0",', b'data: "result": {}}', b"", b""]
    )
    whole = sse(body)
    assert whole.startswith(b'id: 7\ndata: {"jsonrpc":"2.0","id":3,"result":{')
    assert sse(*(body[at : at + 1] for at in range(len(body)))) == whole


def test_events_without_a_message_keep_what_is_needed_to_resume():
    assert sse(b": keep-alive\n\nid: 1\nretry: 5\ndata:\n\nid: 2\ndata: DEBUG\n\nevent: other\ndata: x\n\n") == (
        b"id: 1\nretry: 5\n\nid: 2\n\n"
    )


def test_answer_of_a_batch_comes_last_in_its_event():
    batch = [ANSWER, {"jsonrpc": "2.0", "method": "notifications/tools/list_changed"}]
    events = sse(b"data: " + json.dumps(batch).encode() + b"\n\n").split(b"\n\n")
    assert b"list_changed" in events[0]
    assert b'"id":3' in events[1]


def test_large_event_answers_with_its_beginning():
    line = json.dumps({"jsonrpc": "2.0", "id": 3, "result": {"content": [{"type": "text", "text": "x" * 5_000_000}]}})
    assert b"[cut, the result has 5,000,0" in sse(b"data: " + line.encode() + b"\n\n")


def test_large_answer_to_anything_but_a_call_is_an_error():
    [line] = Lines(1_000).feed(
        json.dumps({"jsonrpc": "2.0", "id": 3, "result": {"tools": ["x" * 10_000]}}).encode() + b"\n"
    )
    assert isinstance(line, Oversize)
    [message] = read(line, {3: "tools/list"})
    assert message["error"]["message"] == "its answer has 10,054 bytes, which is too much"
