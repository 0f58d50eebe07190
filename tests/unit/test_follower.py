"""The states of a follower: which follows which, and what it wants (G1, G2)."""

import itertools

import pytest

from agentcast.server.hub.follower import Follower, IllegalTransition, State
from agentcast.server.hub.topic import RunTopic
from agentcast.server.protocol import Detail
from tests.support.following import Client, segment, snapshot, topic_at

J, B, L, R, D = State.JOINING, State.BEHIND, State.LIVE, State.RESYNC, State.DONE
LEGAL = {(J, B), (J, R), (J, D), (B, L), (B, R), (B, D), (L, B), (L, R), (L, D), (R, B), (R, D)}


def follower_that_is(state: State, topic: RunTopic) -> Follower:
    client = Client()
    if state is J:
        return client.joining(topic, 2)
    follower = client.live(topic) if state is L else client.follow(topic, None if state is R else 2)
    if state is D:
        topic.leave(follower)
    assert follower.state is state
    return follower


@pytest.mark.parametrize(("state", "target"), sorted(itertools.product(State, State), key=str))
def test_a_follower_goes_only_where_its_state_leads(state: State, target: State) -> None:
    topic = topic_at(5)
    follower = follower_that_is(state, topic)
    if (state, target) in LEGAL:
        topic._move(follower, target)
        assert follower.state is target
    else:
        with pytest.raises(IllegalTransition) as raised:
            topic._move(follower, target)
        assert follower.state is state
        assert (raised.value.run, raised.value.state, raised.value.target) == ("r", state, target)
        assert str(raised.value) == f"a follower of run r is {state.value}, and cannot become {target.value}"


@pytest.mark.parametrize(
    ("act", "allowed"),
    [
        ("admit", {J}),
        ("supply", {B}),
        ("supply_snapshot", {R}),
        ("lose", {J, B, L, R}),
        ("leave", set(State)),
        ("give_up", set(State)),
    ],
)
@pytest.mark.parametrize("state", State)
def test_what_a_topic_does_to_a_follower_in_another_state_than_it_is_for_raises_and_queues_nothing(
    act: str, allowed: set[State], state: State
) -> None:
    topic = topic_at(5)
    follower = follower_that_is(state, topic)
    acts = {
        "admit": lambda: topic.admit(follower),
        "supply": lambda: topic.supply(follower, segment(3, 5)),
        "supply_snapshot": lambda: topic.supply_snapshot(follower, snapshot(5)),
        "lose": lambda: topic.lose(follower, "trimmed"),
        "leave": lambda: topic.leave(follower),
        "give_up": lambda: topic.give_up(follower),
    }
    if state in allowed:
        acts[act]()
    else:
        with pytest.raises(IllegalTransition, match=f"is {state.value}, and cannot become"):
            acts[act]()
        assert (follower.state, len(follower.outbox)) == (state, 0)


def test_a_state_that_is_done_is_the_end() -> None:
    follower = follower_that_is(D, topic_at(5))

    assert follower.done
    assert not any(follower_that_is(state, topic_at(5)).done for state in State if state is not D)


@pytest.mark.parametrize(
    ("first", "second", "raised"),
    [("full", "progress", False), ("full", "full", False), ("progress", "progress", False), ("progress", "full", True)],
)
def test_the_detail_is_the_highest_that_is_wanted(first: Detail, second: Detail, raised: bool) -> None:
    follower = Follower(topic_at(5), Client().outbox, {"s1": first})

    assert follower.want({"s2": second}) is raised
    assert follower.full is ("full" in (first, second))

    follower.unwant("s2")
    assert follower.full is (first == "full")
    assert follower.wants == {"s1": first}
