"""Replies that no MCP server should send: each ends its call at once, with what can be used of it or with an error."""

import json
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp.server.mcpserver import Context, MCPServer
from mcp_types import CallToolResult

from agentcast.agents.base import ToolError
from agentcast.agents.events import ToolProgress
from agentcast.agents.mcp import McpServer, mcp_server, running
from agentcast.agents.react import ReAct
from agentcast.agents.values import text_bytes
from tests.support.mcp import PATIENCE, play, raw

TRANSPORTS = pytest.mark.parametrize("kind", ["stdio", "http", "sse"])


def reply(result: Any) -> str:
    """A reply whose result is `result`: JSON text, or data."""
    return f'{{"jsonrpc":"2.0","id":$ID,"result":{result if isinstance(result, str) else json.dumps(result)}}}'


def blocks(*given: Any, **rest: Any) -> str:
    return reply({"content": list(given), **rest})


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


NINES = "9" * 30
DEEP = "[" * 5_000 + "]" * 5_000
GOOD = blocks(text("good"))
UTF8 = blocks(text("PLACE")).replace("PLACE", "é☃".encode().decode("latin-1"))

USABLE: dict[str, tuple[str, Any]] = {
    "as it should be": (GOOD, "good"),
    "lone surrogate": (reply(r'{"content":[{"type":"text","text":"a\ud83db"}]}'), "a?b"),
    "lone low surrogate": (reply(r'{"content":[{"type":"text","text":"\ude00"}]}'), "?"),
    "pair of surrogates": (reply(r'{"content":[{"type":"text","text":"\ud83d\ude00"}]}'), "😀"),
    "surrogate as a key": (reply(r'{"content":[],"structuredContent":{"\ud83d":1,"b":2}}'), {"?": 1, "b": 2}),
    "utf-8": (UTF8, "é☃"),
    "invalid utf-8": (blocks(text("aPLACEb")).replace("PLACE", "\xff"), "a\N{REPLACEMENT CHARACTER}b"),
    "byte order mark": ("\xef\xbb\xbf" + GOOD, "good"),
    "carriage return": (GOOD + "\r", "good"),
    "NUL bytes around": ("\0" + GOOD + "\0", "good"),
    "NUL byte in a text": (blocks(text("aPLACEb")).replace("PLACE", "\0"), "a\0b"),
    "tab in a text": (blocks(text("aPLACEb")).replace("PLACE", "\t"), "a\tb"),
    "NaN": (reply('{"content":[],"structuredContent":{"a":NaN,"b":-Infinity}}'), {"a": "nan", "b": "-inf"}),
    "gigantic integer": (
        reply(f'{{"content":[],"structuredContent":{{"a":{"9" * 30},"b":1}}}}'),
        {"a": "9" * 30, "b": 1},
    ),
    "endless integer": (reply(f'{{"structuredContent":{{"a":{"9" * 5_000}}}}}'), {"a": f"{'9' * 20}… [5000 digits]"}),
    "gigantic float": (reply('{"content":[],"structuredContent":{"a":1e999,"b":1}}'), {"a": "inf", "b": 1}),
    "key twice": (reply('{"content":[],"content":[{"type":"text","text":"last"}]}'), "last"),
    "structure alone": (reply({"structuredContent": {"a": [1]}}), {"a": [1]}),
    "structure that is a list": (reply({"content": [], "structuredContent": [1, 2]}), [1, 2]),
    "structure that is a text": (reply({"structuredContent": "found"}), "found"),
    "structure that is false": (reply({"structuredContent": False}), False),
    "structure that is null": (blocks(text("good"), structuredContent=None), "good"),
    "no content": (reply({}), ""),
    "content that is null": (reply({"content": None, "isError": None}), ""),
    "content that is a text": (reply({"content": "good"}), "good"),
    "content that is one block": (reply({"content": text("good")}), "good"),
    "content of texts": (blocks("good", "too"), "good\ntoo"),
    "other keys": (reply({"temperature": 20}), {"temperature": 20}),
    "result that is a text": (reply('"good"'), "good"),
    "result that is a list of blocks": (reply([text("good")]), "good"),
    "result that is a list": (reply([1, 2]), [1, 2]),
    "result that is a number": (reply("7"), 7),
    "result that is null": (reply("null"), ""),
    "unknown block": (blocks(text("good"), {"type": "chart", "points": [1]}), "good\n[chart]"),
    "unknown block with a text": (blocks({"type": "markdown", "text": "# good"}), "[markdown] # good"),
    "block without type": (blocks({"text": "good"}), "good"),
    "block of no type at all": (blocks({"a": 1}), "[unknown]"),
    "block that is a number": (blocks(5, None), "[unknown]\n[unknown]"),
    "text that is a number": (blocks({"type": "text", "text": 5}), "5"),
    "text that is null": (blocks(text("good"), {"type": "text", "text": None}), "good\n[text]"),
    "image without type": (blocks({"type": "image", "data": "QUJD"}), "[image, of unknown type, 3 bytes]"),
    "image without data": (blocks({"type": "image", "mimeType": "image/png"}), "[image]"),
    "resource without address": (blocks({"type": "resource", "resource": {"text": "n"}}), "[resource 1 characters]\nn"),
    "resource without content": (blocks({"type": "resource", "resource": {"uri": "file:///a"}}), "[resource]"),
    "link without a name": (blocks({"type": "resource_link", "uri": "file:///a"}), "[resource file:///a, file:///a]"),
    "wrong annotation": (blocks(text("good") | {"annotations": {"audience": "all", "priority": 9}}), "good"),
    "wrong metadata": (blocks(text("good") | {"_meta": 5}, _meta=[1]), "good"),
    "error that is a word": (blocks(text("good"), isError="false"), "good"),
    "id as a text": (GOOD.replace("$ID", '"$ID"'), "good"),
    "id as a float": (GOOD.replace("$ID", "$ID.0"), "good"),
    "other version": (GOOD.replace("2.0", "1.0"), "good"),
    "no version": (GOOD.replace('"jsonrpc":"2.0",', ""), "good"),
    "null error beside": (GOOD.replace('"result"', '"error":null,"result"'), "good"),
    "method beside": (GOOD.replace('"result"', '"method":"tools/call","result"'), "good"),
    "in a batch": (f"[{GOOD}]", "good"),
    "in a batch with others": (f'[{{"jsonrpc":"2.0","method":"notifications/x"}},5,{GOOD},{{}}]', "good"),
    "two on a line": (f'{{"jsonrpc":"2.0","method":"notifications/x"}}{GOOD}', "good"),
    "after a word on its line": ("Loading [50 %] … ".encode().decode("latin-1") + GOOD, "good"),
    "garbage behind": (GOOD + " }]}", "good"),
    "very deep": (reply(f'{{"content":[{{"type":"text","text":"good"}}],"structuredContent":{{"a":{DEEP}}}}}'), ...),
    "cut off": (GOOD[:-5], "good\n[the rest of the answer cannot be read]"),
    "cut off in the text": (GOOD[:-6], "goo\n[the rest of the answer cannot be read]"),
    "after notifications that cannot be read": (
        '{"jsonrpc":"2.0","method":"notifications/message","params":[1]}\n'
        '{"jsonrpc":"2.0","method":"notifications/message","params":{"level":5}}\n'
        r'{"jsonrpc":"2.0","method":"notifications/message","params":{"data":"\ud83d"}}' + "\n"
        '{"jsonrpc":"2.0","method":"notifications/tools/list_changed","params":7}\n'
        '{"jsonrpc":"2.0","method":7}\n' + GOOD,
        "good",
    ),
    "after odd progress": (
        "\n".join(
            f'{{"jsonrpc":"2.0","method":"notifications/progress","params":{params}}}'
            for params in (
                '{"progressToken":$ID,"progress":1' + "0" * 400 + "}",
                '{"progressToken":$ID,"progress":1,"total":1' + "0" * 400 + "}",
                '{"progressToken":$ID,"progress":NaN}',
                '{"progressToken":$ID,"progress":"half"}',
                '{"progressToken":$ID,"progress":1,"total":"x","message":5}',
                '{"progressToken":{},"progress":1}',
                '{"progressToken":[$ID]}',
                "[]",
                "null",
            )
        )
        + "\n"
        + GOOD,
        "good",
    ),
    "after requests of the server": (
        '{"jsonrpc":"2.0","id":"s1","method":"no/such","params":{}}\n'
        '{"jsonrpc":"2.0","id":"s2","method":"ping","params":[]}\n'
        '{"jsonrpc":"2.0","id":2.5,"method":"ping"}\n'
        '{"jsonrpc":"2.0","id":null,"method":"sampling/createMessage","params":{"messages":5}}\n' + GOOD,
        "good",
    ),
    "after an answer to nothing": (
        '{"jsonrpc":"2.0","id":null,"error":{"code":-32700,"message":"Parse error"}}\n'
        '{"jsonrpc":"2.0","id":987654,"result":{}}\n{"jsonrpc":"2.0","id":true,"result":{}}\n'
        '{"jsonrpc":"2.0","id":{"a":1},"result":{}}\n{"jsonrpc":"2.0","result":{}}\n' + GOOD,
        "good",
    ),
}
"""What is sent, and what the agent gets."""

SEVERAL_LINES = {"after an answer to nothing", "after notifications that cannot be read", "after odd progress"}
SEVERAL_LINES |= {"after requests of the server"}
"""Those of several lines: no JSON body, and over SSE the first answer ends the call, whatever its id."""

FAILING: dict[str, tuple[str, str]] = {
    "failed tool": (blocks(text("no luck"), isError=True), "no luck"),
    "failed tool with an unknown block": (blocks({"type": "chart"}, isError=True), "[chart]"),
    "error": ('{"jsonrpc":"2.0","id":$ID,"error":{"code":-32000,"message":"no luck"}}', "no luck"),
    "error and result": (GOOD.replace('"result"', '"error":{"code":1,"message":"no luck"},"result"'), "no luck"),
    "error without a code": ('{"jsonrpc":"2.0","id":$ID,"error":{"message":"no luck"}}', "no luck"),
    "error with a word for a code": ('{"jsonrpc":"2.0","id":$ID,"error":{"code":"E1","message":"no luck"}}', "no luck"),
    "error with a float for a code": ('{"jsonrpc":"2.0","id":$ID,"error":{"code":1.5,"message":"no luck"}}', "no luck"),
    "error without a message": ('{"jsonrpc":"2.0","id":$ID,"error":{"code":-32050}}', "error -32050"),
    "error with a message that is no text": (
        '{"jsonrpc":"2.0","id":$ID,"error":{"code":1,"message":{"a":1}}}',
        '{"a":1}',
    ),
    "error that is a text": ('{"jsonrpc":"2.0","id":$ID,"error":"no luck"}', "no luck"),
    "error that is a list": ('{"jsonrpc":"2.0","id":$ID,"error":["no luck"]}', '["no luck"]'),
    "error that is empty": ('{"jsonrpc":"2.0","id":$ID,"error":{}}', "error -32603"),
    "neither": ('{"jsonrpc":"2.0","id":$ID}', "its answer holds neither a result nor an error"),
    "garbled": (
        '{"jsonrpc":"2.0","id":$ID,"result":{"content":[{"type":"text" "text":"good"}]}}',
        "its answer could not be read: it is no valid JSON",
    ),
}
"""What is sent, and the error that it is."""


async def call_all(server: McpServer, names: Any) -> dict[str, Any]:
    """What each tool gives, or the text of its error; all are called at once."""
    got: dict[str, Any] = {}

    async def call(name: str) -> None:
        try:
            got[name] = await server.call(name, {})
        except ToolError as error:
            got[name] = f"failed: {error}"

    with anyio.fail_after(PATIENCE / 2):
        async with anyio.create_task_group() as tasks:
            for name in names:
                tasks.start_soon(call, name)
    return got


@TRANSPORTS
async def test_every_reply_ends_its_call_with_what_can_be_used_of_it(kind: str, tmp_path: Path):
    cases = {name: case for name, case in USABLE.items() if kind == "stdio" or name not in SEVERAL_LINES}
    async with raw(kind, tmp_path / "script", replies={name: sent for name, (sent, _) in cases.items()}) as server:
        got = await call_all(server, cases)
        deep = got.pop("very deep")
        assert not isinstance(deep, str), deep
        assert deep["text"] == "good"
        assert json.dumps(deep["data"]).startswith('{"a": [[[')
        assert got == {name: expected for name, (_, expected) in cases.items() if expected is not ...}
        assert await server.call("echo", {"still": "there"}) == '{"still": "there"}'
        assert server.status.state == "up"


@TRANSPORTS
async def test_every_error_ends_its_call_and_says_what_is_wrong(kind: str, tmp_path: Path):
    async with raw(kind, tmp_path / "script", replies={name: sent for name, (sent, _) in FAILING.items()}) as server:
        got = await call_all(server, FAILING)
        assert got == {name: f"failed: {message}" for name, (_, message) in FAILING.items()}
        assert server.status.state == "up"


@pytest.mark.parametrize("kind", ["stdio", "sse"])
async def test_requests_of_the_server_are_answered_at_once(kind: str, tmp_path: Path):
    asked, _ = USABLE["after requests of the server"]
    async with raw(kind, tmp_path / "script", replies={"ask": asked}) as server:
        with anyio.fail_after(PATIENCE):
            assert await server.call("ask", {}) == "good"
            while len(answers := json.loads(await server.call("received", {}))) < 2:
                pass
    assert [(answer["id"], answer.get("error", {}).get("code")) for answer in answers] == [("s1", -32601), ("s2", None)]


async def test_event_that_cannot_be_read_does_not_end_the_call(tmp_path: Path):
    """Over SSE, where it comes before the answer."""
    sent = '{"jsonrpc":"2.0","method":"notifications/message","params":[1]}\nDEBUG\n[]\n\n' + GOOD
    odd = USABLE["after odd progress"][0]
    async with raw("sse", tmp_path / "script", replies={"noisy": sent, "odd": odd}) as server:
        assert await call_all(server, ["noisy", "odd"]) == {"noisy": "good", "odd": "good"}


@pytest.mark.parametrize("kind", ["http", "sse"])
async def test_body_without_an_answer_ends_the_call(kind: str, tmp_path: Path):
    """There is nothing else to come."""
    sent = {
        "nothing": "",
        "words": "it works",
        "a list": "[]",
        "a number": "5",
        "a notification": '{"jsonrpc":"2.0","method":"notifications/message","params":{"level":"info","data":1}}',
    }
    async with raw(kind, tmp_path / "script", replies=sent | {"other id": GOOD.replace("$ID", "4711")}) as server:
        got = await call_all(server, [*sent, "other id"])
        assert got.pop("other id") == "good"
        assert got.keys() == sent.keys()
        assert all(error.startswith("failed: ") for error in got.values())


@pytest.mark.parametrize("kind", ["http --gzip", "sse --gzip"])
async def test_body_that_is_compressed_against_our_wish_is_read_all_the_same(kind: str, tmp_path: Path):
    async with raw(kind, tmp_path / "script", replies={"good": GOOD}) as server:
        assert await call_all(server, ["good"]) == {"good": "good"}


@TRANSPORTS
async def test_large_answer_is_cut_whatever_it_is(kind: str, tmp_path: Path):
    large = "x" * 5_000_000
    sent = {
        "text": blocks(text(large)),
        "surrogate": reply(r'{"content":[{"type":"text","text":"x\ud83d' + large + '"}]}'),
        "byte order mark": "\xef\xbb\xbf" + blocks(text(large)),
        "error": f'{{"jsonrpc":"2.0","id":$ID,"error":{{"code":1,"message":"{large}"}}}}',
    }
    async with raw(kind, tmp_path / "script", replies=sent) as server:
        got = await call_all(server, sent)
    assert got.pop("error").startswith("failed: xxx")
    for answer in got.values():
        assert answer.startswith("x")
        assert "[cut, the result has 5,000,0" in answer
        assert text_bytes(answer) < 70_000


@pytest.mark.parametrize("kind", ["stdio", "http"])
@pytest.mark.parametrize(
    "results",
    [
        {"initialize": {"protocolVersion": "2025-06-18"}},
        {"initialize": {"protocolVersion": "2025-06-18", "capabilities": None, "serverInfo": None}},
        {
            "initialize": {
                "protocolVersion": 2025,
                "capabilities": {"tools": True, "prompts": []},
                "serverInfo": {"name": 5},
            }
        },
        {"initialize": {"protocolVersion": "2025-06-18", "instructions": ["a"], "_meta": 3, "serverInfo": "raw"}},
        {"ping": None},
        {"ping": "pong"},
    ],
)
async def test_odd_handshake_is_taken(
    kind: str, results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("agentcast.agents.mcp.connection.PING_EVERY", 0.01)
    async with raw(kind, tmp_path / "script", results=results, tools=[{"name": "a", "inputSchema": {}}]) as server:
        assert server.status.reason is None
        assert await server.call("echo", {}) == "{}"
        assert server.status.state == "up"


# -- What cannot be sent -------------------------------------------------------------------------------------------


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


@TRANSPORTS
async def test_arguments_that_json_cannot_carry_cost_their_own_call_only(kind: str, tmp_path: Path):
    async with raw(kind, tmp_path / "script") as server:
        with anyio.fail_after(PATIENCE):
            assert json.loads(await server.call("echo", {"a\ud83d": ["b\ude00c"]})) == {"a?": ["b?c"]}
            assert json.loads(await server.call("echo", {"a": 10**30})) == {"a": 10**30}
            for wrong in ({"a": float("nan")}, {"a": [{"b": float("-inf")}]}, {"a": nested(200)}, {"a": object()}):
                with pytest.raises(ToolError, match="arguments cannot be sent"):
                    await server.call("echo", wrong)
            assert await server.call("echo", {}) == "{}"
        assert server.status.state == "up"


# -- A server in this process --------------------------------------------------------------------------------------


async def test_odd_answers_of_a_server_object_end_their_calls():
    mine = MCPServer("mine")

    @mine.tool()
    async def surrogate() -> str:
        return "a\ud83d"

    @mine.tool()
    async def hollow() -> CallToolResult:
        return CallToolResult.model_construct(content=None, structured_content={"a": 1})

    @mine.tool()
    async def progress(ctx: Context) -> str:
        for number in (float("nan"), 1.0, float("inf")):
            await ctx.report_progress(number, number)
        return "done"

    server = mcp_server("mine", server=mine, timeout=PATIENCE)
    async with running(server):
        assert await call_all(server, ["surrogate", "hollow", "progress"]) == {
            "surrogate": "a?",
            "hollow": "failed: its answer could not be read (ValidationError)",
            "progress": "done",
        }
        with anyio.fail_after(PATIENCE):
            played = await play(ReAct("question -> answer", [server]), [("progress", {})])
    assert [(event.progress, event.total) for event in played.heard.of(ToolProgress)] == [(1.0, 1.0)]
