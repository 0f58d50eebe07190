"""Who sees what: the state of a run, and the copies that keep nodes from changing it."""

import enum
import operator
import threading
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, PrivateAttr, RootModel

from agentcast.agents.graph.errors import ConflictError
from agentcast.agents.graph.flow import START, Step
from agentcast.agents.graph.state import State, View, detached

ADD = {"notes": operator.add}


def step(id: int, *before: Step, node: str = "") -> Step:
    past = 1 << START
    for other in before:
        past |= other.sight
    depth = max((other.rank[0] for other in before), default=0) + 1
    return Step(id, node or f"n{id}", past, (depth, id, id))


def test_value_takes_the_place_of_the_one_before():
    first = step(1)
    second = step(2, first)
    state = State({}, {"x": 0, "list": [1]})
    state.set(first, {"x": 1, "list": [2]})
    state.set(second, {"x": 2})
    assert state.values() == {"x": 2, "list": [2]}
    assert state.values(["x"], first.past) == {"x": 0}
    assert state.values(["x"], first.sight) == {"x": 1}
    assert state.values(["x", "nothing"], second.past) == {"x": 1}


def test_parallel_branches_do_not_see_each_other_until_they_join():
    fork = step(1)
    left, right = step(2, fork), step(3, fork)
    after = step(4, right)
    join = step(5, left, after)
    state = State({}, {})
    state.set(left, {"x": "left"})
    assert not state.has("x", right.past)
    assert not state.has("x", after.past)
    assert state.value("x", join.past) == "left"


def test_parallel_nodes_that_set_one_field_are_named():
    left, right = step(1, node="left"), step(2, node="right")
    state = State({}, {"x": 0})
    state.set(left, {"x": 1, "y": 1})
    with pytest.raises(ConflictError, match=r"'right': it sets 'x', which 'left' sets in parallel") as error:
        state.set(right, {"z": 2, "x": 2})
    assert error.value.nodes == ("left", "right")
    assert error.value.field == "x"
    assert state.values() == {"x": 1, "y": 1}, "nothing of a conflicting patch is set"


def test_one_after_the_other_is_no_conflict_even_through_a_join():
    left, right = step(1), step(2)
    join = step(3, left, right)
    state = State({}, {})
    state.set(left, {"x": 1})
    state.set(right, {"y": 1})
    state.set(join, {"x": 2, "y": 2})
    assert state.values() == {"x": 2, "y": 2}


@given(st.permutations([1, 2, 3]))
def test_reducer_merges_in_an_order_that_does_not_depend_on_timing(order: list[int]):
    steps = {id: step(id) for id in (1, 2, 3)}
    state = State(ADD, {"notes": ["in"]})
    for id in order:
        state.set(steps[id], {"notes": [id]})
    join = step(4, *steps.values())
    assert state.value("notes", join.past) == ["in", 1, 2, 3]
    assert state.value("notes", steps[2].sight) == ["in", 2]
    state.set(join, {"notes": ["out"]})
    assert state.values() == {"notes": ["in", 1, 2, 3, "out"]}


def test_reducer_is_not_called_for_the_first_value_and_cannot_change_what_is_there():
    def greedy(before: list[int], new: list[int]) -> list[int]:
        before.extend(new)
        return before

    one = step(1)
    state = State({"notes": greedy}, {})
    state.set(one, {"notes": [1]})
    two = step(2, one)
    state.set(two, {"notes": [2]})
    assert state.value("notes", one.sight) == [1]
    assert state.value("notes", two.sight) == [1, 2]


def test_what_was_returned_can_be_changed_without_changing_the_state():
    mine: dict[str, Any] = {"deep": [1]}
    state = State({}, {"given": mine})
    state.set(step(1), {"x": mine})
    mine["deep"].append(2)
    assert state.values() == {"given": {"deep": [1]}, "x": {"deep": [1]}}


def test_router_sees_fields_by_name_and_cannot_change_them():
    values = {"x": [1], "items": 3}
    view = View(values)
    view.x.append(2)
    view["x"].append(3)
    assert values == {"x": [1], "items": 3}
    assert dict(view) == values
    with pytest.raises(AttributeError, match="no field 'y' yet; it has x, items"):
        _ = view.y


# -- Copies ----------------------------------------------------------------------------------------------------------


class Color(enum.Enum):
    RED = 1


@dataclass
class Point:
    at: list[int]


class Inner(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    tags: list[str]
    _seen: list[int] = PrivateAttr(default_factory=list)


class Outer(BaseModel):
    inner: Inner
    more: dict[str, list[Inner]] = {}
    anything: Any = None


class Roots(RootModel[list[int]]):
    pass


def test_copies_share_nothing_that_can_be_changed():
    inner = Inner.model_validate({"tags": ["a"], "extra": [1]})
    inner._seen.append(7)
    outer = Outer(inner=inner, more={"k": [inner]}, anything={"p": Point([1]), "s": {1}, "t": ([1], Roots([2]))})
    copy = detached(outer)
    assert copy == outer
    assert copy.model_fields_set == outer.model_fields_set
    assert copy.inner.model_extra == {"extra": [1]}
    assert copy.inner._seen == [7]
    copy.inner.tags.append("b")
    copy.inner.extra.append(2)
    copy.inner._seen.append(8)
    copy.more["k"][0].tags.append("c")
    copy.anything["p"].at.append(2)
    copy.anything["s"].add(2)
    copy.anything["t"][0].append(2)
    copy.anything["t"][1].root.append(3)
    assert inner.tags == ["a"]
    assert inner.model_extra == {"extra": [1]}
    assert inner._seen == [7]
    assert outer.anything == {"p": Point([1]), "s": {1}, "t": ([1], Roots([2]))}


def test_what_cannot_be_copied_is_shared():
    lock = threading.Lock()
    copy = detached({"lock": lock, "color": Color.RED, "type": int})
    assert copy["lock"] is lock
    assert copy["color"] is Color.RED
    assert copy["type"] is int


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_copies_of_plain_data_are_equal(value: Any):
    assert detached(value) == value
