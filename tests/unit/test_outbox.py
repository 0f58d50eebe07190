"""What one connection still has to be sent: the queue, the line, subscriptions, notices. No I/O (G1, G2, G4)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcast.server import protocol
from agentcast.server.errors import LIMIT_EXCEEDED, TooMany
from agentcast.server.hub import feed_place
from agentcast.server.hub import outbox as module
from agentcast.server.hub.feed_place import FeedPosition
from agentcast.server.hub.follower import State
from agentcast.server.hub.frames import Batch, Segment
from agentcast.server.hub.outbox import Outbox
from tests.support.following import RUN, Client, frame, frames, segment, topic_at

# -- The queue -----------------------------------------------------------------------------------------------------


def test_frames_are_taken_in_order_and_once() -> None:
    client = Client()
    for n in range(5):
        client.outbox.put(protocol.reply(n, {}))

    assert len(client.outbox) == 5
    assert [reply["id"] for reply in client.take()] == [0, 1, 2, 3, 4]
    assert client.outbox.take() == []
    assert len(client.outbox) == 0
    assert client.link.woken == 5


def test_what_the_socket_takes_at_once_is_not_queued() -> None:
    client, topic = Client(), topic_at(0)
    client.live(topic)
    client.link.writable = True

    topic.deliver([frame(1)])
    client.outbox.put(b"reply")

    assert client.link.written == [frame(1).data, b"reply"]
    assert (len(client.outbox), client.link.woken) == (0, 0)


def test_nothing_overtakes_what_is_queued() -> None:
    client, topic = Client(), topic_at(0)
    client.live(topic)
    topic.deliver([frame(1)])
    client.link.writable = True

    topic.deliver([frame(2)])
    client.outbox.put(b"reply")

    assert client.link.written == []
    assert [payload for batch in client.outbox.take() for payload in batch.payloads] == [
        frame(1).data,
        frame(2).data,
        b"reply",
    ]


def test_a_batch_is_taken_as_it_was_put() -> None:
    client, batch = Client(), Batch((b"1", b"2"))
    client.outbox.push(batch)

    assert len(client.outbox) == 2
    (taken,) = client.outbox.take()
    assert taken is batch


def test_one_take_is_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TAKE_BYTES", 10)
    client = Client()
    for _ in range(3):
        client.outbox.put(b"123456")

    assert [len(client.outbox.take()) for _ in range(3)] == [2, 1, 0]


@pytest.mark.parametrize("limit", [{"queue_frames": 3}, {"queue_bytes": 60}], ids=["frames", "bytes"])
def test_a_full_queue_takes_replies_but_no_events(limit: dict[str, int]) -> None:
    client, topic = Client(**limit), topic_at(0)
    follower = client.live(topic)
    topic.deliver(frames(1, 9))
    topic.supply(follower, segment(1, 9))

    assert client.outbox.full
    assert len(client.outbox) == 3
    assert follower.state is State.BEHIND
    topic.supply(follower, segment(4, 9))
    for n in range(50):
        client.outbox.put(protocol.reply(n, {}))
    assert [item.get("id", item.get("seq")) for item in client.take()] == [1, 2, 3, *range(50)]


def test_the_queue_has_room_again_once_it_was_taken_from() -> None:
    client = Client(queue_bytes=25)
    client.outbox.offer(segment(1, 9), full=True)
    assert client.outbox.full

    client.outbox.take()

    assert not client.outbox.full


def test_what_fits_is_what_leaves_the_queue_within_its_bounds() -> None:
    client = Client(queue_frames=3, queue_bytes=100)

    assert client.outbox.fits(Batch((b"x",) * 3))
    assert not client.outbox.fits(Batch((b"x",) * 4))
    assert client.outbox.fits(Batch((b"x" * 100,)))
    assert not client.outbox.fits(Batch((b"x" * 101,)))
    client.outbox.put(b"x" * 60)
    assert not client.outbox.fits(Batch((b"x" * 41,)))
    assert client.outbox.fits(Batch(()))


def test_a_segment_that_fits_is_queued_as_one_batch_and_shared() -> None:
    client, part = Client(), segment(1, 3)

    assert client.outbox.offer(part, full=True)[0] == 3

    (taken,) = client.outbox.take()
    assert taken is part.batch(full=True)


@pytest.mark.parametrize(
    ("limit", "reached"), [({"queue_frames": 2}, 2), ({"queue_bytes": 30}, 2), ({"queue_bytes": 5}, 1)]
)
def test_a_segment_is_queued_as_far_as_there_is_room_and_then_not_at_all(limit: dict[str, int], reached: int) -> None:
    client = Client(**limit)

    assert client.outbox.offer(segment(1, 9), full=True)[0] == reached
    assert client.outbox.full
    assert client.outbox.offer(segment(reached + 1, 9), full=True)[0] == reached
    assert client.seqs() == list(range(1, reached + 1))


def test_what_a_detail_leaves_out_takes_no_room() -> None:
    client = Client(queue_frames=1)
    client.outbox.put(b"{}")
    unseen = Segment([frame(1, progress=False), frame(2, progress=False)])

    assert client.outbox.offer(unseen, full=False)[0] == 2
    assert len(client.outbox.take()) == 1
    assert client.link.woken == 1


@given(
    shown=st.lists(st.booleans(), min_size=1, max_size=30),
    queue_frames=st.integers(1, 10),
    queue_bytes=st.integers(1, 400),
    full=st.booleans(),
)
def test_offers_bring_a_segment_whole_and_never_more_than_one_frame_beyond_the_bounds(
    shown: list[bool], queue_frames: int, queue_bytes: int, full: bool
) -> None:
    client = Client(queue_frames=queue_frames, queue_bytes=queue_bytes)
    rest: Segment | None = Segment([frame(seq, progress=show) for seq, show in enumerate(shown, 1)])
    seen: list[int | str] = []
    while rest is not None:
        before = rest.first
        reached, _ = client.outbox.offer(rest, full=full)
        assert reached >= before, "an empty queue takes at least one"
        assert len(client.outbox) <= queue_frames
        assert client.outbox._bytes < queue_bytes + len(frame(30).data)
        rest = rest.after(reached)
        seen += client.seqs()
    assert seen == [seq for seq, show in enumerate(shown, 1) if full or show]


# -- The line ------------------------------------------------------------------------------------------------------


def standing(client: Client, count: int) -> list[object]:
    return [client.follow(topic_at(5, run=f"r{n}"), 2, subscription=f"s{n}") for n in range(count)]


def test_taking_asks_to_pull_only_if_somebody_is_behind() -> None:
    client, topic = Client(queue_frames=2), topic_at(0)
    client.live(topic)
    asked = client.link.pulled
    topic.deliver(frames(1, 2))
    client.outbox.take()
    assert client.link.pulled == asked

    topic.deliver(frames(3, 4))
    topic.deliver(frames(5, 5))
    assert client.outbox.is_behind
    assert client.link.pulled == asked, "there is no room for what would be pulled"
    client.outbox.take()

    assert client.link.pulled == asked + 1


def test_nothing_is_pulled_for_until_what_was_taken_leaves_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TAKE_BYTES", 1)
    client = Client(queue_frames=2)
    standing(client, 1)
    asked = client.link.pulled
    for _ in range(3):
        client.outbox.put(b"{}")

    pulled = []
    while client.outbox.take():
        pulled.append(client.link.pulled - asked)

    assert pulled == [0, 1, 2]


def test_followers_behind_take_turns() -> None:
    client = Client()
    followers = standing(client, 3)

    turns = []
    for _ in range(6):
        follower = client.outbox.claim()
        assert follower is not None
        turns.append(follower)
        client.outbox.release(follower)

    assert turns == followers * 2


def test_a_follower_that_is_being_pulled_for_is_not_pulled_for_by_another() -> None:
    client = Client()
    followers = standing(client, 3)

    assert [client.outbox.claim() for _ in range(4)] == [*followers, None]
    assert (client.outbox.behind, client.outbox.is_behind) == (0, True)
    client.outbox.release(followers[1])  # type: ignore[arg-type]
    assert client.outbox.behind == 1
    assert client.outbox.claim() is followers[1]


def test_nobody_is_pulled_for_while_there_is_no_room() -> None:
    client = Client(queue_frames=1)
    (follower,) = standing(client, 1)
    client.outbox.put(b"{}")

    assert client.outbox.claim() is None
    client.outbox.take()

    assert client.outbox.claim() is follower


def test_a_follower_that_was_left_while_it_was_being_pulled_for_does_not_come_back_into_the_line() -> None:
    client, topic = Client(), topic_at(5)
    client.follow(topic, 2)
    follower = client.outbox.claim()
    assert follower is not None

    topic.leave(follower)
    client.outbox.release(follower)

    assert (client.outbox.claim(), client.outbox.is_behind, client.outbox.behind) == (None, False, 0)


def test_nothing_is_pulled_for_a_closed_outbox() -> None:
    client = Client()
    standing(client, 3)

    client.outbox.close()

    assert client.outbox.claim() is None
    assert (client.outbox.followers, client.outbox.subscriptions) == ({}, {})


# -- Subscriptions -------------------------------------------------------------------------------------------------


def test_subscriptions_are_bounded() -> None:
    client = Client()
    for n in range(protocol.MAX_SUBSCRIPTIONS):
        client.outbox.subscribe(f"s{n}", single=False)
    client.outbox.subscribe("s5", single=False)  # one that there is

    with pytest.raises(TooMany, match="128"):
        client.outbox.subscribe("one more", single=False)
    del client.outbox.subscriptions["s0"]
    client.outbox.subscribe("one more", single=False)


def test_what_was_shown_before_the_first_open_ended_subscription_need_not_be_remembered() -> None:
    client = Client()
    client.live(topic_at(0)).topic.deliver([frame(1, terminal=True)])
    before = client.outbox.open_ended, list(client.outbox.feed.past)

    client.outbox.subscribe("all", single=False)

    assert before == (False, [RUN])
    assert (client.outbox.open_ended, list(client.outbox.feed.past)) == (True, [])


def test_a_run_that_is_followed_again_is_not_among_the_past() -> None:
    client, topic = Client(), topic_at(5)
    follower = client.live(topic)
    topic.leave(follower)
    client.outbox.remember(RUN, follower)

    client.live(topic)

    assert not client.outbox.feed.past


@pytest.mark.parametrize("open_ended", [True, False])
def test_a_connection_with_too_much_of_the_past_is_closed_if_any_of_it_may_be_announced(
    open_ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_place, "MAX_PAST", 2)
    client = Client()
    client.outbox.subscribe("s", single=not open_ended)
    client.outbox.feed.source = FeedPosition("f:1", begun=3, handed_out=0)
    for run in ("a", "b"):
        client.outbox.remember(run, None)
    assert client.link.cuts == []

    client.outbox.remember("c", None)

    assert client.link.cuts == ([LIMIT_EXCEEDED] if open_ended else [])
    assert list(client.outbox.feed.past) == ["b", "c"]
    assert (LIMIT_EXCEEDED.code, LIMIT_EXCEEDED.reason) == (4504, "limit_exceeded")


def test_runs_that_one_connection_follows_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FOLLOWED", 3)
    client = Client()
    assert client.outbox.room == 3

    standing(client, 3)

    assert client.outbox.room == 0


# -- What is said in between ---------------------------------------------------------------------------------------


def test_runs_left_out_are_said_once_with_their_number() -> None:
    client = Client()
    for subscription in ("s1", "s2"):
        client.outbox.subscribe(subscription, single=True)
    for subscription in ("s1", "s1", "s2", "unknown"):
        client.outbox.truncate(subscription)
    assert client.take() == [], "once a second"

    client.outbox.put_notices()
    client.outbox.put_notices()

    assert client.take() == [
        {"type": "truncated", "subscription": "s1", "runs": 2},
        {"type": "truncated", "subscription": "s2", "runs": 1},
    ]


def test_a_subscription_that_has_ended_is_not_said_to_be_truncated() -> None:
    client = Client()
    client.outbox.subscribe("s1", single=True)
    client.outbox.truncate("s1")
    del client.outbox.subscriptions["s1"]

    client.outbox.put_notices()

    assert client.take() == []


def test_the_feeds_position_is_sent_to_clients_that_wait_for_runs_to_come() -> None:
    client = Client()
    client.outbox.feed.source = FeedPosition("f:1")
    client.outbox.subscribe("s1", single=True)
    client.outbox.put_notices()
    assert client.take() == []

    client.outbox.subscribe("all", single=False)
    client.outbox.put_notices()
    client.outbox.put_notices()

    assert client.take() == [{"type": "feed", "position": "f:1"}]


def test_a_failure_is_the_connections_and_says_that_its_books_may_be_wrong() -> None:
    client, error = Client(), RuntimeError("broken")
    assert not client.outbox.broken

    client.outbox.fail(error)

    assert (client.outbox.broken, client.link.failures) == (True, [error])


def test_an_outbox_has_no_dictionary_of_attributes() -> None:
    """There is one for each connection."""
    assert not hasattr(Outbox(Client().link), "__dict__")
