"""Whatever is wrong with a command, its reply has the command's id, where there is one (G9)."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcast.server import protocol
from agentcast.server.errors import BadRequest
from agentcast.server.protocol import Malformed, Ping, Start, parse_command
from tests.support.agents import agent
from tests.support.hub import open_hub

HIGH, LOW = "\\ud83d", "\\ude00"
"""The halves of 😀 as escapes of JSON."""


def refused(text: str | bytes) -> Malformed:
    with pytest.raises(Malformed) as refusal:
        parse_command(text)
    return refusal.value


# -- What is no JSON -----------------------------------------------------------------------------------------------

START = '"op":"start","agent":"a"'


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"id":7,"op":"ping"', id="truncated at the end"),
        pytest.param('{"id":7,"op":"pi', id="truncated in a string"),
        pytest.param('{"id":7,"op":"start","input":{"a":[1,{"b":"c\\', id="truncated in an escape"),
        pytest.param('{"id":7,', id="truncated after the id"),
        pytest.param('{"op":"ping","id":7', id="a brace too few"),
        pytest.param('{"op":"ping","id":7}}', id="a brace too many"),
        pytest.param('{"op":"ping","id":7} and more', id="text after it"),
        pytest.param('{"op":"ping","id":7}{"op":"ping","id":8}', id="another command after it"),
        pytest.param('\ufeff{"op":"ping","id":7}', id="byte order mark"),
        pytest.param('data: {"op":"ping","id":7}', id="text before it"),
        pytest.param('{"op":"ping","id":7,}', id="comma too many"),
        pytest.param('{"op":"ping" "id":7}', id="comma missing"),
        pytest.param("{'op':'ping','id':7}", id="single quotes"),
        pytest.param('{"x":NaN,"id":7,"op":"ping"}', id="NaN before it"),
        pytest.param('{"id":7,"op":"ping","x":-Infinity}', id="infinity after it"),
        pytest.param('{"x":1e999,"id":7,"op":"ping"}', id="a number that is too large"),
        pytest.param('{"x":undefined,"id" : 7\n,"op":"ping"}', id="undefined"),
        pytest.param('{"x":"a\nb","id":7,"op":"ping"}', id="a line break in a string"),
        pytest.param('{"x":"\\x","id":7,"op":"ping"}', id="an escape that is none"),
        pytest.param('{"x":"\\u12","id":7,"op":"ping"}', id="an escape that is too short"),
        pytest.param('{"id":7,"x":' + "[" * 5_000, id="nested too deeply, truncated"),
        pytest.param('{"x":' + "[" * 5_000 + "]" * 5_000 + ',"id":7}', id="nested too deeply, before it"),
        pytest.param('{"x":' + '{"id":1,"x":' * 2_000 + "1" + "}" * 2_000 + ',"id":7}', id="nested ids, before it"),
        pytest.param('{"x":{"id":8},"y":[{"id":9}],"id":7,"op":"ping"', id="ids inside of others"),
        pytest.param('{"x":"\\"id\\":8,{","id":7,"op":"ping"', id="an id in a string"),
        pytest.param('{"id":8,"id":7,"op":"ping"', id="the later of two"),
        pytest.param(b'{"x":"\xff","id":7,"op":"ping"}', id="no UTF-8"),
        pytest.param(b'{"id":7,"op":"ping","x":"\xed\xa0\xbd"}', id="a surrogate in UTF-8"),
    ],
)
def test_a_message_that_is_no_json_is_answered_with_its_id(text: str | bytes) -> None:
    refusal = refused(text)

    assert refusal.error.code == "bad_request"
    assert "JSON" in refusal.error.message
    assert refusal.id == 7


@pytest.mark.parametrize(
    ("id", "found"),
    [
        ("0", 0),
        ("-12", -12),
        (str(2**70), 2**70),
        ('""', ""),
        ('"seven"', "seven"),
        ('"\\u0037\\n\\""', '7\n"'),
        (f'"{HIGH}{LOW}"', "😀"),
        (f'"a{HIGH}"', "a\ud83d"),
        ('"' + "x" * 128 + '"', "x" * 128),
        ('"' + "x" * 129 + '"', None),
        ('"' + "\\u0078" * 128 + '"', "x" * 128),
        ("1" * 129, None),
        ("1" * 10_000, None),
        ("1.5", None),
        ("1e3", None),
        ("01", None),
        ("true", None),
        ("null", None),
        ('["x"]', None),
        ('{"id":1}', None),
        ('"broken \\x escape"', None),
    ],
)
def test_an_id_is_found_in_what_is_no_json_exactly_if_it_is_one(id: str, found: int | str | None) -> None:
    refusal = refused(f'{{"op":"ping","id":{id},"x":NaN}}')

    assert refusal.id == found
    reply = json.loads(protocol.error_reply(refusal.id, refusal.error))
    assert reply.get("id") == found


@pytest.mark.parametrize("end", ['"id":1.', '"id":"ab', '"id":', '"id":"ab\\', '"i'])
def test_an_id_that_is_not_whole_is_not_given_back(end: str) -> None:
    assert refused('{"op":"ping",' + end).id is None


@pytest.mark.parametrize("text", ['[{"op":"ping","id":7}', '"id":7,', '["id",7', "nonsense", '{"x":{"id":7}', "7"])
def test_what_is_no_object_has_no_id(text: str) -> None:
    assert refused(text).id is None


@pytest.mark.parametrize("text", ['"', '\\"', '"\\', "{", "[{", '{"id":', "'id'", '"id"', "[", '{"', '"a":'])
def test_the_search_takes_linear_time(text: str) -> None:
    refused("{" + text * (protocol.MESSAGE_BYTES // len(text)))  # in quadratic time, beyond the limit of a test


@given(st.text(alphabet="{}[]:,\"\\'id0u ", max_size=40))
def test_no_text_breaks_the_search(text: str) -> None:
    for message in (text, '{"id":7,' + text):
        try:
            parse_command(message)
        except Malformed as malformed:
            protocol.error_reply(malformed.id, malformed.error)


# -- JSON that is no command ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", [0, 7, -1, 2**64 - 1, 2**64, 10**100, "seven", "", "\ud83d", "😀"])
@pytest.mark.parametrize(
    "fields",
    [
        '"op":"dance"',
        '"op":5',
        '"x":1',
        '"op":"cancel"',
        f'"op":"cancel","run":"r","reason":5,"x":"{HIGH}"',
        '"op":"start","agent":"a","input":[]',
        '"op":"start","agent":"a","input":{},"detail":"none"',
    ],
)
def test_a_command_with_something_wrong_is_answered_with_its_id(fields: str, id: int | str) -> None:
    for text in (f'{{"id":{json.dumps(id)},{fields}}}', f'{{{fields},"id":{json.dumps(id)}}}'):
        refusal = refused(text)

        assert refusal.id == id
        assert json.loads(protocol.error_reply(refusal.id, refusal.error))["id"] == id


def test_an_integer_beyond_64_bits_is_no_id_but_comes_back() -> None:
    refusal = refused(f'{{"op":"ping","id":{2**70}}}')

    assert refusal.error.message.startswith("id")
    assert refusal.id == 2**70


# -- Lone surrogates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (HIGH, "?"),
        (LOW, "?"),
        (f"a{HIGH}b{LOW}c", "a?b?c"),
        (f"{LOW}{HIGH}", "??"),
        (f"{HIGH}{HIGH}{LOW}", "?😀"),
        (f"{HIGH}{LOW}{LOW}", "😀?"),
        (f"{HIGH}\\n{LOW}", "?\n?"),
        ("\\uD83D", "?"),
        (f"{HIGH}{LOW}", "😀"),
        (f"\\\\ud83d{HIGH}", "\\ud83d?"),
        (f"\\\\{HIGH}", "\\?"),
        (f"{HIGH}\\u0041", "?A"),
    ],
)
def test_half_a_surrogate_pair_counts_as_the_question_mark(written: str, read: str) -> None:
    command = parse_command(f'{{"op":"start","id":1,"agent":"a","input":{{"{written}":["{written}"]}}}}')

    assert isinstance(command, Start)
    assert command.input == {read: [read]}


@pytest.mark.parametrize(("id", "read"), [(f'"{HIGH}"', "\ud83d"), (f'"{HIGH}{LOW}"', "😀"), ("5", 5)])
def test_an_id_comes_back_as_it_was_even_with_half_a_pair(id: str, read: Any) -> None:
    command = parse_command(f'{{"op":"ping","id":{id},"x":"{HIGH}"}}')

    assert isinstance(command, Ping)
    assert command.id == read
    assert json.loads(protocol.reply(command.id, {}))["id"] == read


def test_what_is_wrong_besides_half_a_pair_is_reported() -> None:
    refusal = refused(f'{{"op":"ping","id":7,"x":"{HIGH}","y":NaN}}')

    assert "surrogate" not in refusal.error.message
    assert refusal.id == 7


# -- Through the hub -----------------------------------------------------------------------------------------------


@agent("echo")
async def echo(input: Any, emit: Any) -> Any:
    return input.model_dump()


async def test_the_hub_answers_each_with_its_id_and_the_connection_stays() -> None:
    texts = {
        1: '{"op":"ping","id":1',
        2: f'{{"op":"dance","id":2,"x":"{HIGH}"}}',
        3: '{"op":"ping","x":NaN,"id":3}',
        "four": '{"x":' + "[" * 3_000 + "]" * 3_000 + ',"op":"ping","id":"four"}',
        5: f'{{"op":"start","agent":"nobody{HIGH}","input":{{}},"id":5}}',
    }
    async with open_hub(echo) as hub, hub.client() as client:
        for id, text in texts.items():
            await client.ws.send(text)
            reply = await client.frame()
            assert (reply["type"], reply["id"], reply["ok"]) == ("reply", id, False)
        assert (await client.call("ping", id=6))["ok"]


async def test_half_a_pair_in_the_input_reaches_the_agent_as_the_question_mark() -> None:
    body = f'{{"agent":"echo","input":{{"text":"cut {HIGH}"}}}}'
    async with open_hub(echo) as hub, hub.http() as http, hub.client() as client:
        await client.follow_all()
        response = await http.post("/v1/runs", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 200
        view = await client.view(response.json()["run"])
        assert view.document["input"] == view.document["result"] == {"text": "cut ?"}


def test_a_body_that_is_no_json_says_where() -> None:
    with pytest.raises(BadRequest, match="line 1 column 13"):
        protocol.read_json(b'{"agent": 5 5}')


def test_thousands_of_halves_are_read_in_linear_time() -> None:
    halves = protocol.MESSAGE_BYTES // len(HIGH)

    assert protocol.read_json(f'["{HIGH * halves}"]') == ["?" * halves]


def test_what_is_read_always_encodes() -> None:
    document = protocol.read_json(f'{{"{LOW}":["{HIGH}"]}}')

    assert orjson.loads(orjson.dumps(document)) == document
