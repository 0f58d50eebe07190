"""Splitters against the adapters' own `parse`: any text, any chunking."""

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import dspy
import pytest
from dspy.utils.exceptions import AdapterParseError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentcast.agents.events import MessageEnd, MessageRetracted, MessageStart
from agentcast.agents.fields import Delta, Messages, Piece, is_text, splitter_for
from agentcast.agents.fields.splitter import Restart
from agentcast.agents.values import clean_text

TEXT_FIELDS = {"reasoning": str, "answer": str}


def signature(fields: dict[str, Any]) -> Any:
    return dspy.Signature({"q": (str, dspy.InputField())} | {n: (t, dspy.OutputField()) for n, t in fields.items()})


SIGNATURE = signature(TEXT_FIELDS)


def split(adapter: type, fields: dict[str, Any], chunks: Iterable[str]) -> dict[str, str]:
    """The joined deltas of each field since it last restarted; asserts that none is empty."""
    splitter = splitter_for(adapter, fields)
    assert splitter is not None
    return joined([delta for chunk in chunks for delta in splitter.feed(chunk)] + splitter.finish())


def joined(deltas: Iterable[Delta]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for delta in deltas:
        assert delta.text or isinstance(delta, Restart)
        texts[delta.field] = ("" if isinstance(delta, Restart) else texts.get(delta.field, "")) + delta.text
    return {field: text for field, text in texts.items() if text}


def cut(text: str, sizes: Sequence[int]) -> list[str]:
    """`text` in chunks of `sizes`, over and over."""
    chunks, at, turn = [], 0, 0
    while at < len(text):
        size = sizes[turn % len(sizes)]
        chunks.append(text[at : at + size])
        at, turn = at + size, turn + 1
    return chunks


def parsed(adapter: type, sig: Any, text: str) -> dict[str, Any] | None:
    try:
        return dict(adapter().parse(sig, text))
    except AdapterParseError:
        return None


sizes = st.lists(st.integers(1, 40) | st.just(1), min_size=1, max_size=6)
HEADERS = [f"[[ ## {name} ## ]]" for name in ("answer", "reasoning", "completed", "other", "", "a b")]
PARTS = [
    "[",
    "]",
    "[[",
    "[[ ",
    "[[ ## ",
    " ## ]]",
    "##",
    '"',
    "\\",
    "{",
    "}",
    ":",
    ",",
    "<",
    ">",
    "&",
    "]]>",
    "</answer>",
]
SPACE = ["\n", "\n\n", "\r\n", "\r", " ", "  ", "\t", "\x85", "\u2028", "\x1f", "\x0b"]
spice = st.sampled_from([*HEADERS, *PARTS, *SPACE, "é", "😀", "x", "word"])
texts = st.lists(spice | st.text(max_size=8), max_size=12).map("".join)


@settings(max_examples=600)
@given(texts, texts, texts, texts, sizes)
@example("", "a", "b [", "", [1])
@example("  ", "x", "y", "", [3])
def test_chat_deltas_equal_the_parsed_field(before: str, one: str, two: str, after: str, sizes: list[int]):
    text = f"{before}[[ ## reasoning ## ]]\n{one}\n\n[[ ## answer ## ]]\n{two}\n\n{after}"
    expected = parsed(dspy.ChatAdapter, SIGNATURE, text)
    streamed = split(dspy.ChatAdapter, TEXT_FIELDS, cut(text, sizes))
    if expected is not None:
        assert streamed == {name: value for name, value in expected.items() if value}


@settings(max_examples=300)
@given(texts, sizes)
def test_chat_reads_any_text_as_the_adapter_does(text: str, sizes: list[int]):
    optional = signature({"reasoning": str | None, "answer": str | None})
    expected = parsed(dspy.ChatAdapter, optional, text)
    assert expected is not None
    streamed = split(dspy.ChatAdapter, TEXT_FIELDS, cut(text, sizes))
    assert streamed == {name: value for name, value in expected.items() if value}


@pytest.mark.parametrize("indent", ["", " ", "\t  ", " " * 40])
def test_text_on_an_indented_header_line_is_cut_as_the_adapter_cuts_it(indent: str):
    text = f"[[ ## reasoning ## ]] why  \nso\n{indent}[[ ## answer ## ]] forty two\n"
    expected = parsed(dspy.ChatAdapter, SIGNATURE, text)
    for size in range(1, 12):
        assert split(dspy.ChatAdapter, TEXT_FIELDS, cut(text, [size])) == expected


def test_chat_text_is_streamed_as_soon_as_it_is_certain():
    splitter = splitter_for(dspy.ChatAdapter, TEXT_FIELDS)
    assert splitter is not None
    assert splitter.feed("[[ ## answer ## ]]\nHel") == [("answer", "Hel")]
    assert splitter.feed("lo [") == [("answer", "lo [")]
    assert splitter.feed(" wor") == [("answer", " wor")]
    assert splitter.feed("ld\n") == [("answer", "ld")]
    assert splitter.feed("[[ ## re") == []
    assert splitter.feed("x\n") == [("answer", "\n[[ ## rex")]


@settings(max_examples=400)
@given(
    st.fixed_dictionaries({"reasoning": texts, "answer": texts}),
    st.booleans(),
    st.sampled_from([None, 2]),
    st.sampled_from(["", "```json\n", "Here it is:\n"]),
    sizes,
)
@example({"reasoning": "😀", "answer": "\ud83d"}, True, None, "", [1])
@example({"reasoning": "\ud83d\ud83d\ude00", "answer": "\\"}, True, None, "", [1])
def test_json_deltas_equal_the_parsed_field(
    fields: dict[str, str], ascii_only: bool, indent: int | None, before: str, sizes: list[int]
):
    text = json.dumps(fields, ensure_ascii=ascii_only, indent=indent)
    expected = parsed(dspy.JSONAdapter, SIGNATURE, text)
    assert expected is not None
    after = "\n```" if before.startswith("```") else ""
    streamed = split(dspy.JSONAdapter, TEXT_FIELDS, cut(before + text + after, sizes))
    assert streamed == {name: value for name, value in expected.items() if value}


values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200)
@given(values, texts, st.sampled_from([None, 2]), sizes)
def test_json_values_that_are_no_strings_come_as_they_are_written(
    value: Any, answer: str, indent: int | None, sizes: list[int]
):
    text = json.dumps({"hidden": value, "items": value, "answer": answer}, indent=indent)
    streamed = split(dspy.JSONAdapter, {"items": Any, "answer": str}, cut(text, sizes))
    assert streamed.get("answer", "") == answer
    written = streamed.get("items", "")
    if isinstance(value, str):
        assert written == value
    elif value is None:
        assert written == ""
    else:
        assert json.loads(written) == value


def test_json_key_that_comes_again_is_left_to_the_end():
    assert split(dspy.JSONAdapter, TEXT_FIELDS, ['{"answer": "one", "answer": "two"}']) == {"answer": "one"}


def test_json_number_in_a_text_field_is_left_to_the_end():
    assert split(dspy.JSONAdapter, TEXT_FIELDS, ['{"reasoning": 1e5, "answer": "x"}']) == {"answer": "x"}


@pytest.mark.parametrize(
    "text",
    [
        "{'reasoning': 'a'}",
        '{"reasoning" "a"}',
        '{"reasoning": }',
        '{"reasoning": "a\\x"}',
        '{"reasoning": "\\u00zz"}',
        '{"reasoning": ',
        '{"reasoning": "a',
        '{"\\z": 1, "answer": "x"}',
        '["reasoning"]',
        "{]",
        "no object",
    ],
)
def test_json_that_is_broken_silences_the_splitter(text: str):
    streamed = split(dspy.JSONAdapter, TEXT_FIELDS, [*text, ', "answer": "never"}'])
    assert "answer" not in streamed
    assert streamed.get("reasoning", "") in ("", "a", "a, ")


def test_json_string_is_streamed_as_it_comes():
    splitter = splitter_for(dspy.JSONAdapter, TEXT_FIELDS)
    assert splitter is not None
    assert splitter.feed('{"answer": "Hel') == [("answer", "Hel")]
    assert splitter.feed("lo \\ud83d") == [("answer", "lo ")]
    assert splitter.feed("\\ude0") == []
    assert splitter.feed("0!\\") == [("answer", "😀!")]
    assert splitter.feed('n", ') == [("answer", "\n")]


def escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("]]>", "]]&gt;")


@settings(max_examples=400)
@given(texts, texts, texts, sizes)
@example("", "a&<b", " ]] \r", [1])
def test_xml_deltas_equal_the_parsed_field(before: str, one: str, two: str, sizes: list[int]):
    text = f"{escape(before)}<reasoning>\n{escape(one)}\n</reasoning>\n\n<answer>{escape(two)}</answer>"
    expected = parsed(dspy.XMLAdapter, SIGNATURE, text)
    streamed = split(dspy.XMLAdapter, TEXT_FIELDS, cut(text, sizes))
    if expected is not None:
        assert streamed == {name: value for name, value in expected.items() if value}


TAGS = ["<b>", "</b>", "<br/>", "<i a='1' b=\"&quot;'\">", "</i>"]
MARKUP = [*TAGS, "<!-- c -->", "<![CDATA[<&]]>", "&lt;", "&amp;", "&#233;"]
marked = st.lists(st.sampled_from([*MARKUP, *SPACE, "x", "word", ">", '"']), max_size=10).map("".join)


@settings(max_examples=600)
@given(marked | texts, marked, sizes)
@example("\n use <b>x</b> &lt; y\n", " a<br/>", [1])
@example("<b>", "</b>", [2])
def test_xml_text_with_markup_is_what_the_adapter_reads(one: str, two: str, sizes: list[int]):
    document = f"<reasoning>{one}</reasoning><answer>{two}</answer>"
    expected = parsed(dspy.XMLAdapter, SIGNATURE, document)
    streamed = split(dspy.XMLAdapter, TEXT_FIELDS, cut(document, sizes))
    if expected is not None:
        assert streamed == {name: value for name, value in expected.items() if value}


def test_xml_text_with_markup_is_streamed_as_it_comes_and_restarts_only_for_white_space_before_it():
    splitter = splitter_for(dspy.XMLAdapter, TEXT_FIELDS)
    assert splitter is not None
    assert splitter.feed("<answer>Use") == [("answer", "Use")]
    assert splitter.feed(" <b") == []
    assert splitter.feed(">x</b> or") == [("answer", " <b>x</b> or")]
    assert splitter.feed(" <br/> \n") == [("answer", " <br /> \n")]
    deltas = splitter.feed("</answer><reasoning>\nUse <b>x")
    assert deltas == [("reasoning", "Use"), ("reasoning", "\nUse <b>x")]
    assert [isinstance(delta, Restart) for delta in deltas] == [False, True]


def test_xml_raw_text_never_restarts():
    splitter = splitter_for(dspy.XMLAdapter, TEXT_FIELDS, raw=True)
    assert splitter is not None
    deltas = [*splitter.feed("<reasoning>\nUse <b>x</b>"), *splitter.feed("</reasoning><reasoning>again</reasoning>")]
    assert not any(isinstance(delta, Restart) for delta in deltas)
    assert joined(deltas) == {"reasoning": "Use <b>x</b>"}


def test_xml_field_that_comes_twice_and_namespaces_are_left_to_the_end():
    twice = "<reasoning>one</reasoning><answer>a <p:b xmlns:p='u'>c</p:b></answer><reasoning>two</reasoning>"
    assert split(dspy.XMLAdapter, TEXT_FIELDS, [twice]) == {}


def test_xml_entry_with_a_fields_key_is_the_field():
    assert split(dspy.XMLAdapter, TEXT_FIELDS, ["<entry key='answer'>42</entry>"]) == {"answer": "42"}


def test_xml_values_come_as_they_are_written_unless_they_are_trees():
    text = "<items><item>1</item></items><list>x<item/></list><count> 12\n</count><pair>[1, 2]</pair><answer>x</answer>"
    fields = {"items": list[int], "list": list[str], "count": int, "pair": list[int], "answer": str | None}
    for size in (1, 3, len(text)):
        streamed = split(dspy.XMLAdapter, fields, cut(text, [size]))
        assert streamed == {"count": "12", "pair": "[1, 2]", "answer": "x"}


def test_an_adapter_that_is_not_known_by_its_exact_class_has_no_splitter():
    class Mine(dspy.ChatAdapter):  # type: ignore[misc]
        pass

    assert splitter_for(Mine, TEXT_FIELDS) is None
    assert splitter_for(dspy.TwoStepAdapter, TEXT_FIELDS) is None


def test_text_types():
    assert is_text(str)
    assert is_text(str | None)
    assert is_text(dspy.Reasoning)
    assert is_text(dspy.Reasoning | None)
    assert not any(map(is_text, [int, str | dspy.Reasoning, list[str], str | int, Literal["a"], None, dict[str, Any]]))


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter])
def test_reading_takes_linear_time(adapter: type):
    """A header that never ends, a run of spaces, a long key: a character at a time, in far less than the time limit."""
    for filler in ("[[ ## " + "a" * 50_000, " " * 50_000, '{"answer": "' + "a" * 50_000, "<answer>" + "a" * 50_000):
        split(adapter, TEXT_FIELDS, filler)


# -- For listeners -----------------------------------------------------------------------------------------------------


@given(
    values=st.fixed_dictionaries({"reasoning": st.text(max_size=20), "answer": st.text(max_size=20)}),
    sizes=sizes,
    indent=st.sampled_from([None, 2]),
)
@settings(max_examples=100, deadline=None)
def test_raw_json_is_the_json_of_the_value(values: dict[str, str], sizes: list[int], indent: int | None):
    splitter = splitter_for(dspy.JSONAdapter, TEXT_FIELDS, raw=True)
    assert splitter is not None
    streamed = {"reasoning": "", "answer": ""}
    for chunk in cut(json.dumps(values, indent=indent, ensure_ascii=len(sizes) % 2 == 0), sizes):
        for field, text in splitter.feed(chunk):
            streamed[field] += text
    assert {field: json.loads(text) for field, text in streamed.items()} == values


def test_raw_json_gives_values_of_any_type_and_null():
    text = '{"reasoning": null, "answer": {"a": ["]", 1]}, "other": 1}'
    splitter = splitter_for(dspy.JSONAdapter, TEXT_FIELDS, raw=True)
    assert splitter is not None
    assert splitter.feed(text) == [("reasoning", "null"), ("answer", '{"a": ["]", 1]}')]


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter])
def test_a_splitter_knows_which_field_is_open(adapter: type):
    texts = {
        dspy.ChatAdapter: "[[ ## answer ## ]]\nyes\n[[ ## completed ## ]]\n",
        dspy.JSONAdapter: '{"answer": "yes"}',
        dspy.XMLAdapter: "<answer>yes</answer>",
    }
    splitter = splitter_for(adapter, TEXT_FIELDS)
    assert splitter is not None
    seen: list[str | None] = []
    for char in texts[adapter]:
        splitter.feed(char)
        if not seen or seen[-1] != splitter.field:
            seen.append(splitter.field)
    assert seen == [None, "answer", None]


def test_the_chat_splitter_knows_when_the_field_may_be_about_to_end():
    splitter = splitter_for(dspy.ChatAdapter, TEXT_FIELDS)
    assert splitter is not None
    undecided = []
    for chunk in ("[[ ## answer ## ]]\n", "a [[", "\n", " [[ #", "# no", "\n[[ ## completed ##", " ]]"):
        splitter.feed(chunk)
        undecided.append(splitter.undecided)
    assert undecided == [False, False, False, True, True, True, False]


# -- Messages ----------------------------------------------------------------------------------------------------------


def on_the_wire(adapter: type, fields: dict[str, str]) -> str:
    """`fields` in the form of the adapter, with as little escaped as a model may get away with."""
    if adapter is dspy.JSONAdapter:
        return json.dumps(fields, ensure_ascii=False)
    if adapter is dspy.XMLAdapter:
        return "\n".join(f"<{name}>{text}</{name}>" for name, text in fields.items())
    return "\n".join(f"[[ ## {name} ## ]]\n{text}" for name, text in fields.items())


@settings(max_examples=600)
@given(
    st.sampled_from([dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter]),
    st.sampled_from([str, str | None, dspy.Reasoning]),
    st.fixed_dictionaries({"reasoning": marked | texts, "answer": marked | texts}),
    sizes,
)
@example(dspy.ChatAdapter, dspy.Reasoning, {"reasoning": '"quoted"', "answer": "x"}, [1])
def test_messages_end_with_what_the_adapter_reads_and_are_rarely_retracted(
    adapter: type, kind: Any, fields: dict[str, str], sizes: list[int]
):
    text = on_the_wire(adapter, fields)
    sig = signature({"reasoning": kind, "answer": str})
    expected = parsed(adapter, sig, clean_text(text))
    if expected is None:
        return
    messages = Messages("1", None, map(str, itertools.count()).__next__, {"reasoning": kind, "answer": str})
    messages.expect(adapter, {"reasoning": kind, "answer": str})
    events = messages.begin()
    for chunk in cut(text, sizes):
        events += messages.feed(Piece(chunk))
    events += [*messages.finish(), *messages.settle(expected)]

    names = {event.message: event.field for event in events if isinstance(event, MessageStart)}
    ended = {names[event.message]: event.text for event in events if isinstance(event, MessageEnd)}
    assert ended == {name: str(value) for name, value in expected.items() if value is not None and str(value)}
    for event in events:
        if isinstance(event, MessageRetracted):
            name = names[event.message]
            white_before_markup = adapter is dspy.XMLAdapter and fields[name][:1].isspace() and "<" in fields[name]
            read_as_json = kind is dspy.Reasoning and name == "reasoning"
            assert white_before_markup or read_as_json
