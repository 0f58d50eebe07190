"""How far a connection has got in the feed: never ahead of what was shown, and nothing is brought twice (G1, G2)."""

import pytest

from agentcast.server.hub import feed_place as module
from agentcast.server.hub.feed_place import FeedPlace, FeedPosition
from agentcast.server.hub.follower import Follower
from tests.support.following import Client, frame, snapshot, topic_at


def place_at(position: str = "f:0", *, begun: int = 0, handed_out: int = 0) -> tuple[FeedPlace, FeedPosition]:
    place, source = FeedPlace(), FeedPosition(position, begun, handed_out)
    place.source = source
    return place, source


def announce(place: FeedPlace, source: FeedPosition, run: str, follower: Follower | None = None) -> None:
    place.expect(run, source.position)
    source.position = f"f:{int(source.position[2:]) + 1}"
    place.applied(run, follower)


def following(run: str) -> tuple[Client, Follower]:
    client = Client()
    return client, client.live(topic_at(0, run=run))


# -- The position --------------------------------------------------------------------------------------------------


def test_the_newest_position_is_sent_once() -> None:
    place, source = place_at()
    announce(place, source, "a")
    announce(place, source, "b")

    assert [place.next_position(), place.next_position()] == ["f:2", None]
    announce(place, source, "c")
    assert place.next_position() == "f:3"


def test_the_position_stops_before_the_first_run_of_which_nothing_was_shown() -> None:
    place, source = place_at()
    announce(place, source, "nobody")
    (_, first), (_, second) = following("a"), following("b")
    announce(place, source, "a", first)
    announce(place, source, "b", second)

    second.topic.deliver([frame(1, run="b")])
    assert place.next_position() == "f:1"
    assert place.next_position() is None
    first.topic.deliver([frame(1, run="a")])

    assert place.next_position() == "f:3"


def test_the_position_does_not_wait_for_a_run_that_nobody_wants_any_more() -> None:
    place, source = place_at()
    _, follower = following("a")
    announce(place, source, "a", follower)
    assert place.next_position() == "f:0"

    follower.topic.leave(follower)

    assert place.next_position() == "f:1"


def test_a_snapshot_shows_a_run() -> None:
    place, source = place_at()
    follower = Client().follow(topic_at(3), None)
    announce(place, source, "r", follower)
    assert place.next_position() == "f:0"

    follower.topic.supply_snapshot(follower, snapshot(3))

    assert place.next_position() == "f:1"


def test_the_position_waits_for_every_rule_that_is_to_be_applied() -> None:
    place, source = place_at()
    place.expect("a", "f:0")
    place.expect("a", "f:0")
    place.expect("b", "f:1")
    source.position = "f:2"
    place.applied("b")
    place.applied("a")
    assert place.next_position() == "f:0"

    place.applied("a")

    assert place.next_position() == "f:2"


def test_the_position_waits_until_every_rule_has_begun() -> None:
    place, source = place_at()
    place.beginning = 1
    announce(place, source, "a")
    assert place.next_position() is None

    place.beginning = 0

    assert place.next_position() == "f:1"


def test_there_is_no_position_before_there_is_an_open_ended_subscription() -> None:
    assert FeedPlace().next_position() is None


def test_applying_what_was_not_expected_changes_nothing() -> None:
    place, _ = place_at("f:3")
    place.applied("a", following("a")[1])

    assert place.next_position() == "f:3"


# -- What was shown before -----------------------------------------------------------------------------------------


def test_a_run_announced_in_the_first_read_after_it_was_shown_is_the_one_that_was_shown() -> None:
    place, _ = place_at(begun=4, handed_out=3)
    place.remember("a", None)

    assert [place.place_of("a", read) is not None for read in (3, 4, 5, 6)] == [True, True, True, False]
    assert place.place_of("b", 4) is None


def test_the_place_at_which_a_run_was_left_is_known() -> None:
    place, _ = place_at(begun=4)
    _, follower = following("a")
    place.remember("a", follower)
    place.remember("b", None)

    left, ended = place.place_of("a", 4), place.place_of("b", 4)

    assert left is not None
    assert left.left is follower
    assert ended is not None
    assert ended.left is None


def test_what_was_shown_is_forgotten_once_its_announcement_has_passed() -> None:
    place, source = place_at(begun=4, handed_out=3)
    place.remember("a", None)
    for source.handed_out in (3, 4):
        place.forget()
        assert list(place.past) == ["a"]

    source.handed_out = 5
    place.forget()

    assert not place.past


@pytest.mark.parametrize("why", ["a rule is yet to begin", "it is expected"])
def test_what_may_still_be_announced_is_not_forgotten(why: str) -> None:
    place, _ = place_at(begun=4, handed_out=9)
    place.remember("a", None)
    if why == "a rule is yet to begin":
        place.beginning = 1
    else:
        place.expect("a", "f:0")

    place.forget()

    assert list(place.past) == ["a"]


def test_what_is_remembered_is_bounded_and_the_newest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PAST", 3)
    place, source = place_at(begun=4, handed_out=3)

    assert [place.remember(run, None) for run in "abcacde"] == [True, True, True, True, True, False, False]
    assert list(place.past) == ["c", "d", "e"]

    source.begun = source.handed_out = 6
    assert place.remember("f", None), "the others are forgotten first"
    assert list(place.past) == ["f"]


def test_without_a_feed_nothing_is_looked_through_for_what_can_be_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PAST", 3)
    monkeypatch.setattr(FeedPlace, "forget", lambda place: pytest.fail("nothing can be forgotten"))
    place = FeedPlace()

    for run in "abcdefg":
        place.remember(run, None)

    assert list(place.past) == ["e", "f", "g"]
