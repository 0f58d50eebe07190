"""What an MCP server says, as clients and LMs are shown it (G9), and messages that are too large (G3)."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp_types import CallToolResult, ImageContent, TextContent

from agentcast.agents import base
from agentcast.agents.base import ToolError, keep_secret, redact
from agentcast.agents.mcp.oversize import HEAD_BYTES, TAIL_BYTES, Lines, Oversize, salvage
from agentcast.agents.mcp.words import clean_error, observation
from agentcast.agents.values import VALUE_BYTES, text_bytes


@pytest.fixture(autouse=True)
def own_secrets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "_kept", set())


def result(*texts: str, structured: Any = None, is_error: bool = False) -> CallToolResult:
    content: list[Any] = [TextContent(type="text", text=text) for text in texts]
    return CallToolResult(content=content, structured_content=structured, is_error=is_error)


# -- Results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (result("one", "two"), "one\ntwo"),
        (result("3", structured={"result": 3}), 3),
        (result('{"a": 1}', structured={"a": 1}), {"a": 1}),
        (result('{\n "a": [1, 2]\n}', structured={"a": [1, 2]}), {"a": [1, 2]}),
        (result("1", '{"b": 2}', "c", structured={"result": [1, {"b": 2}, "c"]}), [1, {"b": 2}, "c"]),
        (result("text", structured={"result": "text"}), "text"),
        (result(structured={"a": None}), {"a": None}),
        (result("3 items", structured={"items": [1]}), {"text": "3 items", "data": {"items": [1]}}),
        (result(), ""),
    ],
    ids=["texts", "wrapped", "object", "spread", "list", "string", "structured", "both", "nothing"],
)
def test_result_is_the_data_and_no_part_of_it_twice_or_lost(given: CallToolResult, expected: Any):
    assert observation(given, {}) == expected


DATA = {"name": "Ünal", "n": [1, 2.0, None, True], "deep": {"a": {"b": []}}}
LONG = "line of a text\n" * 4_000
ROWS = [{"id": number, "name": f"row {number}"} for number in range(3)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (result(json.dumps(DATA), structured=DATA), DATA),
        (result(json.dumps(DATA, indent=4, sort_keys=True), structured=DATA), DATA),
        (result(json.dumps(DATA, ensure_ascii=False, separators=(",", ":")), structured=DATA), DATA),
        (result(f"\n{json.dumps(DATA)}\n\n", structured=DATA), DATA),
        (result('{"a": 1.0, "b": 2}', structured={"b": 2.0, "a": 1}), {"a": 1, "b": 2.0}),
        (result(json.dumps({"result": DATA}), structured={"result": DATA}), DATA),
        (result(json.dumps({"result": DATA}), structured=DATA), DATA),
        (result(json.dumps(DATA), structured={"data": DATA}), {"data": DATA}),
        (result("found", structured={"result": "found"}), "found"),
        (result(" found\n", structured={"result": "found"}), "found"),
        (result("found", structured={"text": "found"}), {"text": "found"}),
        (result("found", structured={"data": {"answer": "found"}}), {"data": {"answer": "found"}}),
        (result('{"answer": "found"}', structured={"data": {"answer": "found"}}), {"data": {"answer": "found"}}),
        (result('"found"', structured={"result": "found"}), "found"),
        (result('{"a": 1}', structured={"result": '{"a": 1}'}), '{"a": 1}'),
        (result("one", "two", structured={"result": ["one", "two"]}), ["one", "two"]),
        (result("one", "two", structured={"result": "one\ntwo"}), "one\ntwo"),
        (result("one\n", " two", structured={"lines": ["one", "two"]}), {"lines": ["one", "two"]}),
        (result(*map(json.dumps, ROWS), structured={"result": ROWS}), ROWS),
        (result(*(json.dumps(row, indent=2) for row in ROWS), structured={"rows": ROWS}), {"rows": ROWS}),
        (result(json.dumps(ROWS), structured={"result": ROWS}), ROWS),
        (result("\n".join(map(json.dumps, ROWS)), structured={"result": ROWS}), ROWS),
        (result(json.dumps(ROWS[0]), structured={"result": ROWS[:1]}), ROWS[:1]),
        (result("[]", structured={"result": []}), []),
        (result("true", structured={"result": True}), True),
        (result("null", structured={"result": None}), None),
        (result("3.0", structured={"result": 3}), 3),
        (result("a\ud83d", structured={"result": "a\ud83d"}), "a?"),
        (result(LONG, structured={"result": LONG}), LONG),
        (result(LONG, structured={"text": LONG}), {"text": LONG}),
        (result(json.dumps({"text": LONG}, indent=1), structured={"text": LONG}), {"text": LONG}),
    ],
)
def test_text_that_the_structure_holds_stands_once(given: CallToolResult, expected: Any):
    assert observation(given, {}) == expected


@pytest.mark.parametrize(
    ("texts", "structured"),
    [
        (["3 items"], {"items": [1, 2, 3]}),
        (["found it"], {"result": "found"}),
        (['{"a": 1}'], {"b": 1}),
        (['{"a": 1, "b": 2}'], {"a": 1}),
        (['{"a": 1}'], {"a": 1, "b": 2}),
        (["1"], {"a": 1, "b": 1}),
        (["1"], {"result": True}),
        (["one"], {"result": ["one", "two"]}),
        (["one", "two"], {"result": ["two", "one"]}),
        (["[1, 2"], {"result": [1, 2]}),
    ],
)
def test_text_that_says_something_else_stands_beside_the_structure(texts: list[str], structured: Any):
    shown = observation(result(*texts, structured=structured), {})
    data = structured.get("result", structured)
    assert shown == {"text": "\n".join(texts), "data": data}


def test_only_what_the_structure_does_not_hold_stands_beside_it():
    image = ImageContent(type="image", data="QUJD", mime_type="image/png")
    given = result(json.dumps(DATA), structured=DATA)
    given.content.append(image)
    assert observation(given, {}) == {"text": "[image, image/png, 3 bytes]", "data": DATA}
    assert observation(result("Found one:", json.dumps(DATA), structured=DATA), {}) == {
        "text": "Found one:",
        "data": DATA,
    }


def test_large_data_is_shown_as_its_text_and_takes_all_the_room():
    rows = {"rows": [[number, f"row {number}"] for number in range(20_000)]}
    shown = observation(result(json.dumps(rows), structured=rows), {})
    assert shown.startswith('{"rows": [[0, "row 0"], [1, "row 1"]')
    assert VALUE_BYTES * 0.9 < text_bytes(shown) <= VALUE_BYTES
    assert text_bytes(observation(result("y" * 10**6, structured={"result": "y" * 10**6}), {})) > VALUE_BYTES * 0.9


@pytest.mark.parametrize("structured", [None, {"result": "x" * 10**6}, {"rows": list(range(10**5))}])
def test_large_result_is_cut(structured: Any):
    shown = observation(result("y" * 10**6, structured=structured), {})
    assert len(json.dumps(shown)) <= VALUE_BYTES + 100


def test_secrets_in_results_and_errors_are_redacted():
    keep_secret("tok-0123456789", "short")
    given = {"env": {"TOKEN": "tok-0123456789", "tok-0123456789": ["short"]}}
    shown = {"env": {"TOKEN": "[redacted]", "[redacted]": ["short"]}}
    assert observation(result(structured=given), {}) == shown
    assert observation(result(json.dumps(given)), {}) == json.dumps(shown)
    with pytest.raises(ToolError, match=r"^denied for \[redacted\]$"):
        observation(result("denied for tok-0123456789", is_error=True), {})


def test_error_without_a_text_says_what_its_structure_says():
    with pytest.raises(ToolError, match=r'^\{"reason":"full"\}$'):
        observation(result(structured={"reason": "full"}, is_error=True), {})
    with pytest.raises(ToolError, match=r"^it gave no reason$"):
        observation(result(" ", is_error=True), {})


def test_longer_secret_hides_the_one_in_it():
    keep_secret("0123456789", "Bearer 0123456789")
    assert redact("Authorization: Bearer 0123456789") == "Authorization: [redacted]"


# -- Errors --------------------------------------------------------------------------------------------------------

PYTHON = """\
Error executing tool read
Traceback (most recent call last):
  File "/srv/app/tools.py", line 12, in read
    return open(path).read()
           ^^^^^^^^^^
FileNotFoundError: [Errno 2] No such file or directory: '/srv/data/private/notes.txt'
"""
NODE = """\
Error: ENOENT: no such file, open '/srv/data/notes.txt'
    at Object.openSync (node:fs:573:18)
    at /srv/app/index.js:10:5
"""


@pytest.mark.parametrize(
    ("text", "known", "shown"),
    [
        (
            PYTHON,
            "",
            "Error executing tool read\nFileNotFoundError: [Errno 2] No such file or directory: 'notes.txt'",
        ),
        (NODE, "", "Error: ENOENT: no such file, open 'notes.txt'"),
        ("no '/docs/a/b.txt' here", "{'path': '/docs/a/b.txt'}", "no '/docs/a/b.txt' here"),
        ("see https://example.org/a/b and 1/2 or a/b", "", "see https://example.org/a/b and 1/2 or a/b"),
        (r"C:\Users\me\x.txt is locked", "", "x.txt is locked"),
    ],
    ids=["python", "node", "path of the call", "no path", "windows"],
)
def test_error_keeps_what_it_says_and_loses_traceback_and_folders(text: str, known: str, shown: str):
    assert clean_error(text, known) == shown


@given(st.text())
def test_any_text_can_be_an_error(text: str):
    assert text_bytes(clean_error(text)) <= 2_000


# -- Oversize messages ---------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=30)), st.integers(1, 40))
def test_lines_are_the_same_however_the_bytes_arrive(parts: list[bytes], limit: int):
    data = b"".join(parts)
    expected = data.split(b"\n")[:-1]
    lines = Lines(limit)
    got = [line for part in parts for line in lines.feed(part)]
    assert len(got) == len(expected)
    for line, whole in zip(got, expected, strict=True):
        if len(whole) <= limit:
            assert line == whole
        else:
            assert isinstance(line, Oversize)
            assert whole.startswith(line.head)
            assert len(line.head) > limit
            assert line.tail == whole[-TAIL_BYTES:]
            assert line.size == len(whole)


def test_a_line_without_end_is_held_in_part_only():
    lines = Lines()
    for _ in range(2_000):
        assert not list(lines.feed(b"z" * 65_536))
    held = lines._line
    assert sum(map(len, held._parts)) + len(held._tail) <= HEAD_BYTES + TAIL_BYTES


def oversize(message: Any) -> Oversize:
    lines = Lines(1_000)
    [line] = lines.feed(json.dumps(message).encode() + b"\n")
    assert isinstance(line, Oversize)
    return line


@pytest.mark.parametrize("id", [7, "a-7"])
@pytest.mark.parametrize("id_first", [True, False])
def test_beginning_of_a_large_result_answers_the_call(id: int | str, id_first: bool):
    text = {"content": [{"type": "text", "text": "head" + "x" * 10**6}], "structuredContent": {"result": "x"}}
    message = {"jsonrpc": "2.0", "id": id, "result": text} if id_first else {"result": text, "jsonrpc": "2.0", "id": id}
    answer = salvage(oversize(message))
    assert answer is not None
    assert answer.id == id
    [block] = answer.result["content"]
    assert block["text"].startswith("headxxx")
    assert block["text"].endswith("x… [cut, the result has 1,000,1" + block["text"][-9:])
    assert text_bytes(block["text"]) <= VALUE_BYTES
    assert answer.result["isError"] is False


def test_large_structured_content_alone_answers_with_its_size():
    answer = salvage(oversize({"jsonrpc": "2.0", "id": 1, "result": {"structuredContent": ["x" * 10**6]}}))
    assert answer is not None
    assert answer.result["content"][0]["text"].startswith("… [cut, the result has 1,000,")


@pytest.mark.parametrize(
    "message",
    [
        {"jsonrpc": "2.0", "method": "notifications/message", "params": {"id": 3, "data": "x" * 10**4}},
        {"jsonrpc": "2.0", "result": {"text": "x" * 10**4}},
        ["x" * 10**4],
        "x" * 10**4,
    ],
    ids=["notification", "no id", "list", "text"],
)
def test_large_message_that_answers_nothing_is_dropped(message: Any):
    assert salvage(oversize(message)) is None
