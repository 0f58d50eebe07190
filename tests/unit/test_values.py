"""Plain, bounded data out of anything."""

import dataclasses
import datetime
import enum
import math
import re
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from agentcast.agents.values import (
    COUNT_BYTES,
    FIELDS_BYTES,
    VALUE_BYTES,
    clean_text,
    cut_text,
    plain,
    plain_fields,
    text_bytes,
)


class Colour(enum.Enum):
    RED = "red"
    ODD = object()


class Level(enum.IntEnum):
    HIGH = 3


class Model(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    value: Any = None


@dataclasses.dataclass
class Record:
    value: Any
    other: int = 1


class Secretive:
    def __repr__(self) -> str:
        return "<Secretive password=hunter2>"

    __str__ = __repr__


class Lookup(Mapping[str, int]):
    def __getitem__(self, key: str) -> int:
        return {"a": 1}[key]

    def __iter__(self) -> Iterator[str]:
        return iter(["a"])

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (0, 0),
        (-(2**63), -(2**63)),
        (2**63, str(2**63)),
        (10**400, str(10**400)),
        (1.5, 1.5),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        ("é☃\x00\n", "é☃\x00\n"),
        ("a\ud800b", "a?b"),
        (["a\ud800b"], ["a?b"]),
        ({"a\ud800b": 1}, {"a?b": 1}),
        ((1, [2, (3,)]), [1, [2, [3]]]),
        ({1}, [1]),
        (frozenset(), []),
        (OrderedDict(a=1), {"a": 1}),
        (Lookup(), {"a": 1}),
        ({1: "a", None: "b", False: "c"}, {"1": "a", "None": "b", "False": "c"}),
        (b"abc", "<3 bytes>"),
        (bytearray(2), "<2 bytes>"),
        (memoryview(b"abcd"), "<4 bytes>"),
        (datetime.date(2024, 2, 29), "2024-02-29"),
        (datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.UTC), "2024-02-29 12:30:00+00:00"),
        (datetime.time(1, 2), "01:02:00"),
        (datetime.timedelta(seconds=5), "0:00:05"),
        (Colour.RED, "red"),
        (Colour.ODD, "<object>"),
        (Level.HIGH, 3),
        (Model(value={"a": (1, None)}), {"value": {"a": [1, None]}}),
        ([Model(value=Model(value=1))], [{"value": {"value": 1}}]),
        (Record(value={2}), {"value": [2], "other": 1}),
        (Record, "<type>"),
        (Secretive(), "<Secretive>"),
        ({"a": Secretive()}, {"a": "<Secretive>"}),
        (Record(value=Secretive()), {"value": "<Secretive>", "other": 1}),
        (Model(value=Secretive()), {"value": "<Secretive>"}),
        (iter([1]), "<list_iterator>"),
        (len, "<builtin_function_or_method>"),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", repr(value)),  # workers of pytest-xdist compare the ids
)
def test_value_becomes_plain(value: Any, expected: Any) -> None:
    assert plain(value) == expected
    assert orjson.loads(orjson.dumps(plain(value))) == expected


def test_huge_integer_is_described_without_working_it_out() -> None:
    assert plain(1 << 5_000) == "<integer of 5001 bits>"
    assert plain(-(1 << 10_000_000)) == "<integer of 10000001 bits>"


def test_copy_never_aliases() -> None:
    inner: list[Any] = [1]
    value = {"list": inner, "deep": {"list": inner}}

    copy = plain(value)
    inner.append(2)
    value["new"] = inner

    assert copy == {"list": [1], "deep": {"list": [1]}}
    assert copy["list"] is not copy["deep"]["list"]


def test_fields_never_alias() -> None:
    inner = [1]

    copy = plain_fields({"a": inner})
    inner.append(2)

    assert copy == {"a": [1]}


def cyclic_list() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


def cyclic_and_branching() -> Any:
    value: dict[str, Any] = {}
    value.update({str(n): value for n in range(10)})
    return value


def cyclic_record() -> Any:
    record = Record(value=None)
    record.value = [record, record]
    return record


def deep() -> Any:
    value: Any = "bottom"
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize("make", [cyclic_list, cyclic_and_branching, cyclic_record, deep])
def test_endless_value_has_an_end(make: Any) -> None:
    value = make()

    encoded = orjson.dumps(plain(value))

    assert len(encoded) <= VALUE_BYTES
    assert orjson.loads(encoded)
    while isinstance(value, list) and value and value[0] is not value:  # the interpreter would recurse to free it
        value = value[0]


def test_nesting_is_cut_at_its_depth() -> None:
    value: Any = "bottom"
    for _ in range(64):
        value = [value]
    assert "bottom" in str(plain(value))

    assert "…" in str(plain([value]))


@pytest.mark.parametrize(
    "value",
    [
        ["x" * 100] * 10_000,
        {f"key{n}": n for n in range(100_000)},
        list(range(1_000_000)),
        {"a": "é" * VALUE_BYTES},
        [[1.5] * 10] * 10_000,
        ["\x00" * 1_000] * 20,
        ["\\" * VALUE_BYTES],
    ],
    ids=["texts", "keys", "numbers", "one text", "nested", "escapes", "backslashes"],
)
def test_large_value_is_cut_and_says_so(value: Any) -> None:
    copy = plain(value)

    assert copy.keys() == {"truncated", "bytes", "head"}
    assert copy["truncated"] is True
    assert copy["bytes"] > VALUE_BYTES
    assert isinstance(copy["head"], str)
    assert len(orjson.dumps(copy)) <= VALUE_BYTES


def test_head_of_a_cut_value_shows_its_beginning() -> None:
    assert plain(["hello", *["x" * 100] * 10_000])["head"].startswith("hello x")
    assert plain(["hello", *["x" * 100] * 1_000])["head"].startswith('["hello","xxx')


def test_cutting_takes_no_time() -> None:
    value = [["x" * 50] * 1_000] * 10_000  # half a gigabyte of JSON

    start = time.perf_counter()
    plain(value)

    assert time.perf_counter() - start < 0.5


def test_value_just_under_the_cap_is_whole() -> None:
    value = ["x" * (VALUE_BYTES - 4)]

    assert plain(value) == value
    assert plain(["x" * (VALUE_BYTES - 3)])["truncated"] is True


# -- Texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("character", ["x", "é", "☃", "😀", '"', "\\", "\n", "\x00", "\ud800"])
def test_long_text_is_cut_to_the_cap_with_a_mark(character: str) -> None:
    text = character * VALUE_BYTES * 2

    cut = cut_text(text)

    assert text_bytes(cut) <= VALUE_BYTES
    assert text_bytes(cut) > VALUE_BYTES - 200
    assert cut.endswith(f"… [cut, {len(text)} characters in all]")
    assert cut.startswith(clean_text(character))


@given(st.text(), st.integers(200, 400))
def test_text_that_fits_is_left_alone(text: str, limit: int) -> None:
    text = clean_text(text)
    cut = cut_text(text, limit)

    assert text_bytes(cut) <= limit
    assert (cut == text) == (text_bytes(text) <= limit)


@given(st.text(st.characters()))
def test_cleaned_text_always_encodes(text: str) -> None:
    cleaned = clean_text(text)

    assert orjson.loads(orjson.dumps(cleaned)) == cleaned
    assert clean_text(cleaned) == cleaned


# -- Fields --------------------------------------------------------------------------------------------------------


def test_fields_are_capped_one_by_one() -> None:
    fields = plain_fields({"small": 1, "large": "x" * 10 * VALUE_BYTES, "last": None})

    assert list(fields) == ["small", "large", "last"]
    assert (fields["small"], fields["last"]) == (1, None)
    assert text_bytes(fields["large"]) <= VALUE_BYTES


def test_fields_are_capped_together() -> None:
    fields = plain_fields({f"field{n}": "x" * 5_000 for n in range(1_000)})

    assert len(orjson.dumps(fields)) <= FIELDS_BYTES + 10_000
    left = 1_000 - (len(fields) - 1)
    assert fields["…"] == {"truncated": True, "bytes": FIELDS_BYTES, "head": f"{left} more fields"}


def test_long_field_name_is_cut() -> None:
    (name,) = plain_fields({"n" * 1_000: 1})

    assert text_bytes(name) <= 256


# -- Properties ----------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=50,
)
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary()
    | st.dates()
    | st.sampled_from([Colour.RED, Level.HIGH, object(), Secretive()]),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(st.characters()) | st.integers(), inner)
        | inner.map(Record)
    ),
    max_leaves=50,
)


@given(json_values)
def test_small_json_is_copied_as_it_is(value: Any) -> None:
    copy = plain(value)

    assert copy == value
    assert orjson.dumps(copy) == orjson.dumps(value)


@given(value=anything, limit=st.integers(4_000, VALUE_BYTES), times=st.integers(1, 5_000))
def test_anything_encodes_under_the_cap(value: Any, limit: int, times: int) -> None:
    for candidate in (value, [value] * times, {"a": [value] * times}):
        encoded = orjson.dumps(plain(candidate, limit))
        assert len(encoded) <= max(limit, 6_200)
        assert b"hunter2" not in encoded


@given(st.dictionaries(st.text(st.characters()), anything))
def test_any_fields_encode_under_the_cap(fields: dict[str, Any]) -> None:
    assert len(orjson.dumps(plain_fields(fields))) <= FIELDS_BYTES + COUNT_BYTES // 16


class Node(BaseModel):
    next: "Node | None" = None


def test_a_model_that_contains_itself_is_named() -> None:
    node = Node()
    node.next = node
    assert plain({"node": node}) == {"node": "<Node>"}


def test_keys_that_are_no_plain_data_are_named() -> None:
    assert plain({object(): 1, 2: 3, None: 4}) == {"<object>": 1, "2": 3, "None": 4}


@pytest.mark.parametrize("limit", range(0, 60, 7))
def test_a_limit_below_the_mark_itself_leaves_the_mark(limit: int) -> None:
    assert cut_text("☃" * 100, limit).endswith("… [cut, 100 characters in all]")
