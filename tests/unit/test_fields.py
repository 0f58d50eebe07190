"""Splitters against the adapters' own `parse`: any text, any chunking."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import dspy
import pytest
from dspy.utils.exceptions import AdapterParseError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentcast.agents.fields import is_text, splitter_for

TEXT_FIELDS = {"reasoning": str, "answer": str}


def signature(fields: dict[str, Any]) -> Any:
    return dspy.Signature({"q": (str, dspy.InputField())} | {n: (t, dspy.OutputField()) for n, t in fields.items()})


SIGNATURE = signature(TEXT_FIELDS)


def split(adapter: type, fields: dict[str, Any], chunks: Iterable[str]) -> dict[str, str]:
    """The joined deltas of each field; asserts that none is empty."""
    splitter = splitter_for(adapter, fields)
    assert splitter is not None
    deltas = [delta for chunk in chunks for delta in splitter.feed(chunk)] + splitter.finish()
    assert all(delta.text for delta in deltas)
    joined: dict[str, str] = {}
    for field, text in deltas:
        joined[field] = joined.get(field, "") + text
    return joined


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
    joined = split(dspy.ChatAdapter, TEXT_FIELDS, cut(text, sizes))
    if expected is not None:
        assert joined == {name: value for name, value in expected.items() if value}


@settings(max_examples=300)
@given(texts, sizes)
def test_chat_reads_any_text_as_the_adapter_does(text: str, sizes: list[int]):
    optional = signature({"reasoning": str | None, "answer": str | None})
    expected = parsed(dspy.ChatAdapter, optional, text)
    assert expected is not None
    joined = split(dspy.ChatAdapter, TEXT_FIELDS, cut(text, sizes))
    assert joined == {name: value for name, value in expected.items() if value}


@pytest.mark.parametrize("indent", ["", " ", "\t  ", " " * 40])
def test_text_on_an_indented_header_line_is_cut_as_the_adapter_cuts_it(indent: str):
    text = f"[[ ## reasoning ## ]] why  \nso\n{indent}[[ ## answer ## ]] forty two\n"
    expected = parsed(dspy.ChatAdapter, SIGNATURE, text)
    for size in range(1, 12):
        assert split(dspy.ChatAdapter, TEXT_FIELDS, cut(text, [size])) == expected


def test_chat_text_is_told_as_soon_as_it_is_certain():
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
    joined = split(dspy.JSONAdapter, TEXT_FIELDS, cut(before + text + after, sizes))
    assert joined == {name: value for name, value in expected.items() if value}


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
    joined = split(dspy.JSONAdapter, {"items": Any, "answer": str}, cut(text, sizes))
    assert joined.get("answer", "") == answer
    written = joined.get("items", "")
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
    joined = split(dspy.JSONAdapter, TEXT_FIELDS, [*text, ', "answer": "never"}'])
    assert "answer" not in joined
    assert joined.get("reasoning", "") in ("", "a", "a, ")


def test_json_string_is_told_as_it_comes():
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
    joined = split(dspy.XMLAdapter, TEXT_FIELDS, cut(text, sizes))
    if expected is not None:
        assert joined == {name: value for name, value in expected.items() if value}


@settings(max_examples=200)
@given(texts, sizes)
def test_xml_never_fails_and_never_tells_more_than_the_adapter_reads(text: str, sizes: list[int]):
    document = f"<reasoning>{text}</reasoning><answer>{text}</answer>"
    expected = parsed(dspy.XMLAdapter, SIGNATURE, document)
    joined = split(dspy.XMLAdapter, TEXT_FIELDS, cut(document, sizes))
    if expected is not None:
        for name, value in joined.items():
            assert expected[name].strip().startswith(value)


def test_xml_markup_inside_a_field_silences_it_and_an_entry_with_its_key_is_the_field():
    text = "<reasoning>a <b>bold</b> c</reasoning><entry key='answer'>42</entry><answer>again</answer>"
    assert split(dspy.XMLAdapter, TEXT_FIELDS, [text]) == {"reasoning": "a", "answer": "42"}


def test_xml_tells_nothing_of_fields_that_are_trees():
    text = "<items><item>1</item></items><answer>x</answer>"
    assert split(dspy.XMLAdapter, {"items": list[int], "answer": str | None}, [text]) == {"answer": "x"}


def test_an_adapter_that_is_not_known_by_its_exact_class_has_no_splitter():
    class Mine(dspy.ChatAdapter):  # type: ignore[misc]
        pass

    assert splitter_for(Mine, TEXT_FIELDS) is None
    assert splitter_for(dspy.TwoStepAdapter, TEXT_FIELDS) is None


def test_text_types():
    assert is_text(str)
    assert is_text(str | None)
    assert not any(map(is_text, [int, list[str], str | int, Literal["a"], None, dict[str, Any]]))


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
    joined = {"reasoning": "", "answer": ""}
    for chunk in cut(json.dumps(values, indent=indent, ensure_ascii=len(sizes) % 2 == 0), sizes):
        for field, text in splitter.feed(chunk):
            joined[field] += text
    assert {field: json.loads(text) for field, text in joined.items()} == values


def test_raw_json_tells_values_of_any_type_and_null():
    text = '{"reasoning": null, "answer": {"a": ["]", 1]}, "other": 1}'
    splitter = splitter_for(dspy.JSONAdapter, TEXT_FIELDS, raw=True)
    assert splitter is not None
    assert splitter.feed(text) == [("reasoning", "null"), ("answer", '{"a": ["]", 1]}')]


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter])
def test_a_splitter_tells_which_field_is_open(adapter: type):
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


def test_the_chat_splitter_tells_when_the_field_may_be_about_to_end():
    splitter = splitter_for(dspy.ChatAdapter, TEXT_FIELDS)
    assert splitter is not None
    undecided = []
    for chunk in ("[[ ## answer ## ]]\n", "a [[", "\n", " [[ #", "# no", "\n[[ ## completed ##", " ]]"):
        splitter.feed(chunk)
        undecided.append(splitter.undecided)
    assert undecided == [False, False, False, True, True, True, False]
