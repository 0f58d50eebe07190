"""Tool calls while they are written: natively and as text, any arguments, any chunking."""

import json
from types import SimpleNamespace
from typing import Any

import dspy
import pytest
from dspy.clients.call_result import attributes
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentcast.agents.fields import Delta, Piece, Reader, piece_of
from agentcast.agents.fields.calls import CallFragment, CallSplitter
from agentcast.agents.fields.splitter import Restart
from agentcast.agents.values import clean_texts
from tests.support.lms import pieces

FIELDS = {"answer": str, "note": str, "items": list[Any]}
SPICE = [
    '"',
    "\\",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\n",
    "é",
    "😀",
    "\ud83d",
    "\\u",
    "word ",
    "</tool_calls>",
    "[[ ## x ## ]]",
]

texts = st.lists(st.sampled_from(SPICE) | st.text(max_size=6), max_size=8).map("".join)
arguments = st.fixed_dictionaries({"answer": texts, "note": texts}, optional={"items": st.lists(texts, max_size=3)})
others = st.lists(st.dictionaries(texts, texts | st.integers() | st.lists(texts), max_size=2), max_size=3)
sizes = st.integers(1, 30)


def joined(deltas: list[Delta]) -> dict[str, str]:
    values: dict[str, str] = {}
    for field, text in deltas:
        assert text
        values[field] = values.get(field, "") + text
    return values


def check(streamed: dict[str, str], args: dict[str, Any]) -> None:
    assert streamed.keys() == {name for name, value in args.items() if value != ""}
    for name, text in streamed.items():
        assert (text if isinstance(args[name], str) else json.loads(text)) == args[name]


def call(name: str, args: Any, form: str) -> Any:
    """A call in one of the forms in which `dspy.ToolCalls` reads it."""
    match form:
        case "args":
            return {"name": name, "args": args}
        case "arguments":
            return {"id": "c", "name": name, "arguments": args}
        case "text":
            return {"name": name, "arguments": json.dumps(args)}
        case _:
            return {"type": "function", "function": {"name": name, "arguments": json.dumps(args)}, "id": "c"}


@settings(max_examples=400)
@given(arguments, others, st.sampled_from(["args", "arguments", "text", "function"]), st.booleans(), sizes)
@example({"answer": "\ud83d", "note": "😀"}, [{"args": "x"}], "function", True, 1)
def test_arguments_written_as_text_are_streamed(
    args: dict[str, Any], before: list[dict[str, Any]], form: str, is_list: bool, size: int
):
    calls = [*(call("look", each, form) for each in before), call("submit", args, form)]
    text = json.dumps(calls if is_list else {"tool_calls": calls}, indent=1 if is_list else None)
    assert dspy.ToolCalls.model_validate(json.loads(text)).tool_calls[len(before)].args == args
    splitter = CallSplitter("submit", FIELDS)
    check(joined([delta for piece in pieces(text, size) for delta in splitter.feed(piece)]), args)


@settings(max_examples=400)
@given(arguments, others, st.booleans(), sizes, st.randoms(use_true_random=False))
def test_native_arguments_are_streamed_whichever_way_calls_interleave(
    args: dict[str, Any], before: list[dict[str, Any]], ascii_only: bool, size: int, random: Any
):
    if not ascii_only:  # LMs cannot send half a character unescaped
        args = clean_texts(args)
    streams = []
    for index, (name, value) in enumerate([*(("look", each) for each in before), ("submit", args)]):
        written = pieces(json.dumps(value, ensure_ascii=ascii_only), size)
        rest = [CallFragment(index, None, None, piece) for piece in written]
        streams.append([CallFragment(index, f"c{index}", name, ""), *rest])
    fragments = []
    while streams:
        stream = random.choice(streams)
        fragments.append(stream.pop(0))
        streams = [each for each in streams if each]
    splitter = CallSplitter("submit", FIELDS)
    check(joined([delta for fragment in fragments for delta in splitter.feed_native(fragment)]), args)


@pytest.mark.parametrize(
    "fragments",
    [
        [(0, "a", None, '{"answer": '), (0, None, "submit", '"yes"}')],  # the name comes late
        [(0, "a", "submit", '{"answer": '), (0, "a", "submit", '"yes"}')],  # id and name are repeated
        [(0, "a", "look", "{}"), (0, "b", "submit", '{"answer": "yes"}')],  # all calls have one index
    ],
)
def test_providers_differ_in_how_they_number_and_name_calls(fragments: list[Any]):
    splitter = CallSplitter("submit", FIELDS)
    deltas = [delta for fragment in fragments for delta in splitter.feed_native(CallFragment(*fragment))]
    assert joined(deltas) == {"answer": "yes"}


def test_of_two_calls_it_is_not_known_which_one_counts():
    splitter = CallSplitter("submit", FIELDS)
    assert splitter.feed_native(CallFragment(0, "a", "submit", '{"answer": "y')) == [("answer", "y")]
    (void,) = splitter.feed_native(CallFragment(1, "b", "submit", '{"answer": "no'))
    assert void == Restart("answer", "")
    assert isinstance(void, Restart)
    assert splitter.feed_native(CallFragment(0, None, None, 'es"}')) == []
    assert splitter.feed_native(CallFragment(1, None, None, '"}')) == []


@pytest.mark.parametrize(
    "text",
    [
        '{"args": {"answer": "early"}, "name": "submit"}',
        '{"name": "look", "args": {"answer": "other"}}',
        '{"name": "submit", "args": null}',
        '{"name": "submit", "args": ["answer"]}',
        "I call {submit}.",
        "",
    ],
)
def test_calls_that_cannot_be_known_in_advance_stream_nothing(text: str):
    assert CallSplitter("submit", FIELDS).feed(text) == []


ADAPTERS = [dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_reader_divides_what_is_submitted_from_the_predictors_own_fields(adapter: Any):
    fields = {"next_thought": dspy.Reasoning, "tool_calls": dspy.ToolCalls}
    calls = '{"tool_calls": [{"name": "submit", "args": {"answer": "yes", "next_thought": "mine"}}]}'
    text = {
        dspy.ChatAdapter: f"[[ ## next_thought ## ]]\nhm\n[[ ## tool_calls ## ]]\n{calls}\n[[ ## completed ## ]]",
        dspy.JSONAdapter: f'{{"next_thought": "hm", "tool_calls": {calls}}}',
        dspy.XMLAdapter: f"<next_thought>hm</next_thought>\n<tool_calls>{calls}</tool_calls>",
    }[adapter]
    for size in (1, 9, len(text)):
        reader = Reader(adapter, fields, answer={"answer": str, "next_thought": str})
        reads = [*(reader.feed(Piece(piece)) for piece in pieces(text, size)), reader.finish()]
        assert joined([delta for read in reads for delta in read.own]) == {"next_thought": "hm", "tool_calls": calls}
        assert joined([delta for read in reads for delta in read.answer]) == {"answer": "yes", "next_thought": "mine"}


def test_a_models_own_reasoning_is_the_thought_whatever_its_text_says():
    fields = {"next_thought": dspy.Reasoning, "answer": str}
    reader = Reader(dspy.ChatAdapter, fields, thoughts=["next_thought"])
    assert reader.feed(Piece(thought="I th\ud83d")).own == [("next_thought", "I th")]
    assert reader.feed(Piece(thought="\ude00ink.")).own == [("next_thought", "😀ink.")]
    assert reader.feed(Piece("[[ ## next_thought ## ]]\nno\n[[ ## answer ## ]]\nyes")).own == [("answer", "yes")]


def holder(**values: Any) -> Any:
    """An object with the attributes that LiteLLM's have."""
    return SimpleNamespace(**values)


@pytest.mark.parametrize("make", [holder, lambda **values: attributes(values)], ids=["LiteLLM's", "DSPy's"])
def test_a_chunk_is_read_for_its_first_candidate(make: Any):
    function = make(name="submit", arguments='{"a')
    calls = [make(index=1, id="c", type="function", function=function), make(index=2, function=make(arguments=None))]
    delta = make(content=None, reasoning_content="hm", tool_calls=calls)
    chunk = make(choices=[make(index=1, delta=make(content="no")), make(index=0, delta=delta, finish_reason=None)])
    assert piece_of(chunk) == Piece(
        thought="hm", calls=(CallFragment(1, "c", "submit", '{"a'), CallFragment(2, None, None, ""))
    )
    assert piece_of(make(choices=[make(index=0, delta=make(content="x"), finish_reason="stop")])) == Piece(
        "x", is_last=True
    )
    assert piece_of(make(choices=[])) is None
    assert piece_of(make(choices=[make(index=1, delta=delta)])) is None
