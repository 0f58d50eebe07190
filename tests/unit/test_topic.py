"""A topic: a run's head, its newest frames, its snapshot, and who follows it. No I/O (G1, G2, G4)."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcast.server.bus.base import Frame, Gone, Head
from agentcast.server.errors import RUN_LOST
from agentcast.server.hub import topic as module
from agentcast.server.hub.follower import State
from agentcast.server.hub.frames import Segment
from agentcast.server.hub.outbox import Outbox
from agentcast.server.hub.ring import Rings
from agentcast.server.hub.topic import RunTopic
from agentcast.server.protocol import Detail, Position
from tests.support.following import EPOCH, RUN, Client, frame, frames, info, segment, snapshot, topic_at


def broken(*args: Any) -> None:
    raise RuntimeError("broken on purpose")


def stands_at(topic: RunTopic) -> tuple[str, int, bool]:
    return topic.epoch, topic.head, topic.ended


# -- The log -------------------------------------------------------------------------------------------------------


def test_a_log_that_replaces_an_ended_one_is_not_taken_for_ended() -> None:
    topic = topic_at(57, ended=True)

    assert topic.advance("two", 40, ended=False)

    assert stands_at(topic) == ("two", 40, False)


def test_late_deliveries_of_a_past_epoch_change_nothing() -> None:
    topic = topic_at(5)
    topic.advance("two", 3, ended=False)

    assert not topic.advance(EPOCH, 6, ended=True)
    topic.deliver(frames(6, 7))
    topic.deliver(Head(RUN, EPOCH, 9, ended=True))

    assert stands_at(topic) == ("two", 3, False)


def test_a_log_never_gets_shorter_within_an_epoch() -> None:
    topic = topic_at(5)

    assert topic.advance(EPOCH, 3, ended=False)

    assert stands_at(topic) == (EPOCH, 5, False)


def test_what_was_delivered_while_the_topic_was_being_opened_stands() -> None:
    topic = RunTopic(RUN, lambda _: None, Rings())
    topic.deliver(frames(3, 4))

    topic.open(info(2))

    assert stands_at(topic) == (EPOCH, 4, False)


def test_an_answer_of_an_epoch_that_was_replaced_meanwhile_does_not_bring_it_back() -> None:
    topic = RunTopic(RUN, lambda _: None, Rings())
    topic.deliver(frames(3, 4))
    topic.deliver(Head(RUN, "two", 1))

    topic.open(info(2))

    assert stands_at(topic) == ("two", 1, False)


def test_a_new_epoch_is_a_loss_for_every_follower_but_not_for_those_at_its_own() -> None:
    topic = topic_at(5)
    live, behind, asked = Client(), Client(), Client()
    followers = [live.live(topic), behind.follow(topic, 2), asked.follow(topic, None)]

    topic.deliver(Head(RUN, "two", 3))

    assert [follower.state for follower in followers] == [State.RESYNC] * 3
    assert [follower.resync for follower in followers] == ["log_lost"] * 3
    assert [follower.cursor for follower in followers] == [5, 2, 0]


def test_a_follower_that_breaks_is_its_own_connections_end_and_the_others_learn_of_the_new_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    topic = topic_at(5)
    clients = [Client() for _ in range(3)]
    for client in clients:
        client.live(topic)
    stand = Outbox.stand
    broke = clients[1].outbox
    monkeypatch.setattr(Outbox, "stand", lambda box, one: broken() if box is broke else stand(box, one))

    topic.deliver(Head(RUN, "two", 3))

    assert [[str(error) for error in client.link.failures] for client in clients] == [[], ["broken on purpose"], []]
    assert [client.outbox.broken for client in clients] == [False, True, False]
    assert [client.outbox.followers[RUN].resync for client in (clients[0], clients[2])] == ["log_lost"] * 2


@pytest.mark.parametrize("breaks", ["fits", "send"])
def test_a_delivery_that_breaks_for_one_follower_reaches_the_others(
    breaks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = topic_at(0)
    clients = [Client() for _ in range(3)]
    for client in clients:
        client.live(topic)
    works, broke = getattr(Outbox, breaks), clients[1].outbox
    monkeypatch.setattr(Outbox, breaks, lambda box, batch: broken() if box is broke else works(box, batch))

    topic.deliver(frames(1, 2))
    monkeypatch.undo()

    assert [client.seqs() for client in clients] == [[1, 2], [], [1, 2]]
    assert [len(client.link.failures) for client in clients] == [0, 1, 0]


# -- Live and behind -----------------------------------------------------------------------------------------------


def test_a_new_follower_is_behind_and_asks_to_pull() -> None:
    client, topic = Client(), topic_at(5)

    follower = client.follow(topic, 2)

    assert follower.state is State.BEHIND
    assert client.outbox.is_behind
    assert client.link.pulled == 1


def test_a_follower_that_is_joining_is_sent_nothing() -> None:
    client, topic = Client(), topic_at(5)
    follower = client.joining(topic, 5)

    topic.deliver(frames(6, 7))

    assert (client.seqs(), client.outbox.followers, follower.cursor) == ([], {}, 5)


def test_a_follower_behind_is_sent_no_deliveries() -> None:
    client, topic = Client(), topic_at(0)
    follower = client.follow(topic)

    topic.deliver(frames(1, 3))

    assert (client.seqs(), follower.cursor) == ([], 0)


def test_a_page_up_to_the_head_makes_a_follower_live() -> None:
    client, topic = Client(), topic_at(3)
    follower = client.follow(topic)

    assert not topic.supply(follower, segment(1, 3))
    topic.deliver(frames(4, 5))

    assert follower.state is State.LIVE
    assert not client.outbox.is_behind
    assert client.seqs() == [1, 2, 3, 4, 5]


def test_a_page_short_of_the_head_leaves_it_behind() -> None:
    client, topic = Client(), topic_at(9)
    follower = client.follow(topic)

    assert not topic.supply(follower, segment(1, 3))

    assert (follower.state, follower.cursor) == (State.BEHIND, 3)
    assert client.outbox.is_behind


def test_a_page_is_queued_as_far_as_there_is_room() -> None:
    client, topic = Client(queue_frames=2), topic_at(5)
    follower = client.follow(topic)

    assert topic.supply(follower, segment(1, 5)), "something is left for it"

    assert (follower.cursor, follower.state) == (2, State.BEHIND)
    assert client.outbox.claim() is None
    assert client.seqs() == [1, 2]
    assert topic.supply(follower, segment(3, 5))
    assert client.seqs() == [3, 4]


def test_a_page_beyond_the_head_is_queued_up_to_the_head_and_what_is_delivered_follows() -> None:
    client, topic = Client(), topic_at(2)
    follower = client.follow(topic)

    topic.supply(follower, segment(1, 4))
    assert (follower.state, follower.cursor) == (State.LIVE, 2)
    topic.deliver(frames(3, 4))

    assert client.seqs() == [1, 2, 3, 4]


def test_pages_and_deliveries_that_overlap_are_sent_once() -> None:
    client, topic = Client(), topic_at(4)
    follower = client.follow(topic)
    topic.supply(follower, segment(1, 4))

    topic.deliver(frames(3, 6))
    topic.deliver(frames(5, 6))

    assert client.seqs() == [1, 2, 3, 4, 5, 6]


def test_a_page_that_comes_late_brings_only_what_the_follower_lacks() -> None:
    client, topic = Client(), topic_at(6)
    follower = client.follow(topic)
    topic.supply(follower, segment(1, 4))

    topic.supply(follower, segment(1, 3))
    topic.supply(follower, segment(1, 5))

    assert client.seqs() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "delivery", [frames(4, 4), Head(RUN, EPOCH, 4)], ids=["frames after a hole", "a head beyond what was delivered"]
)
def test_a_delivery_that_leaves_a_hole_puts_a_live_follower_behind(delivery: Any) -> None:
    client, topic = Client(), topic_at(2)
    follower = client.live(topic)

    topic.deliver(delivery)

    assert client.seqs() == []
    assert (follower.state, follower.cursor, topic.head) == (State.BEHIND, 2, 4)
    assert topic.recent(follower) == []
    topic.supply(follower, segment(3, 4))
    topic.deliver(frames(5, 5))
    assert client.seqs() == [3, 4, 5]


def test_frames_of_another_epoch_make_a_live_follower_lose_its_place() -> None:
    client, topic = Client(), topic_at(2)
    follower = client.live(topic)

    topic.deliver([frame(3, epoch="two")])

    assert client.seqs() == []
    assert (follower.state, follower.resync, stands_at(topic)) == (State.RESYNC, "log_lost", ("two", 3, False))


def test_a_slow_follower_falls_behind_and_the_others_are_sent_everything() -> None:
    slow, quick, topic = Client(queue_frames=3), Client(), topic_at(0)
    follower = slow.live(topic)
    quick.live(topic)

    topic.deliver(frames(1, 2))
    topic.deliver(frames(3, 4))

    assert (follower.state, follower.cursor) == (State.BEHIND, 2)
    assert (slow.seqs(), quick.seqs()) == ([1, 2], [1, 2, 3, 4])
    for part in topic.recent(follower):
        topic.supply(follower, part)
    topic.deliver(frames(5, 5))
    assert (slow.seqs(), quick.seqs()) == ([3, 4, 5], [5])


def test_progress_detail_leaves_full_only_events_out_but_counts_them() -> None:
    client, topic = Client(), topic_at(0)
    follower = client.live(topic, "progress")

    topic.deliver([frame(1), frame(2, progress=False)])
    topic.deliver([frame(3, progress=False)])
    topic.deliver([frame(4)])

    assert client.seqs() == [1, 4]
    assert follower.state is State.LIVE
    topic.leave(follower)
    assert follower.cursor == 4


def test_live_followers_of_one_detail_are_queued_the_same_batch() -> None:
    topic, clients = topic_at(0), [Client() for _ in range(3)]
    for client in clients:
        client.live(topic)

    topic.deliver(frames(1, 2))

    (first,), (second,), (third,) = (client.outbox.take() for client in clients)
    assert first is second is third
    assert first.framed is third.framed


@pytest.mark.parametrize("writable", [False, True], ids=["queued", "written at once"])
def test_a_follower_counts_as_shown_once_something_of_the_run_was_sent(writable: bool) -> None:
    topic, client = topic_at(0), Client()
    follower = client.live(topic, "progress")
    client.link.writable = writable

    topic.deliver([frame(1, progress=False)])
    before = follower.shown
    topic.deliver([frame(2)])
    assert (before, follower.shown) == (False, True)

    behind = Client()
    behind.link.writable = writable
    late = behind.follow(topic_at(3), detail="progress")
    late.topic.supply(late, Segment([frame(1, progress=False)]))
    before = late.shown
    late.topic.supply(late, Segment([frame(2), frame(3)]))
    assert (before, late.shown) == (False, True)


# -- Where a follower begins ---------------------------------------------------------------------------------------


def joins_at(topic: RunTopic, position: Position | None, *, whole: bool = False) -> tuple[str | None, int]:
    follower = Client().joining(topic)
    follower.resync = None
    topic.place(follower, position, whole=whole)
    return follower.resync, follower.cursor


def test_a_position_is_replayed_from_or_the_reason_is_named_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DISTANCE", 10)
    topic = topic_at(50, oldest=31)

    assert joins_at(topic, None) == ("asked", 0)
    assert joins_at(topic, Position(seq=45, epoch=EPOCH)) == (None, 45)
    assert joins_at(topic, Position(seq=50, epoch=EPOCH)) == (None, 50)
    assert joins_at(topic, Position(seq=51, epoch=EPOCH)) == ("log_lost", 51)
    assert joins_at(topic, Position(seq=45, epoch="other")) == ("log_lost", 45)
    assert joins_at(topic, Position(seq=45)) == ("log_lost", 45), "no epoch: nobody knows of which log that is"
    assert joins_at(topic, Position(seq=39, epoch=EPOCH)) == ("overflow", 39)
    assert joins_at(topic, Position(seq=39, epoch=EPOCH), whole=True) == (None, 39)
    assert joins_at(topic, Position(seq=29, epoch=EPOCH), whole=True) == ("trimmed", 29)
    assert joins_at(topic, Position(seq=30, epoch=EPOCH), whole=True) == (None, 30)
    assert joins_at(topic, Position(seq=0)) == ("trimmed", 0)
    assert joins_at(topic_at(50), Position(seq=0)) == (None, 0), "all of the log, however long it is"


def test_a_follower_that_goes_on_where_its_client_left_gets_what_came_since() -> None:
    topic, client = topic_at(3), Client()
    topic.pins = 1
    left = client.live(topic)
    topic.leave(left)
    topic.deliver(frames(4, 5))

    follower = Client().joining(topic)
    topic.resume(follower, left)

    assert (follower.cursor, follower.epoch, follower.resync, follower.shown) == (3, EPOCH, None, True)


@pytest.mark.parametrize("change", ["its detail is raised", "its log was lost", "it was to get a snapshot"])
def test_a_follower_that_cannot_go_on_where_its_client_left_gets_a_snapshot(change: str) -> None:
    topic, client = topic_at(3), Client()
    topic.pins = 1
    left = client.live(topic, "progress" if change == "its detail is raised" else "full")
    if change == "it was to get a snapshot":
        topic.lose(left, "overflow")
    topic.leave(left)
    if change == "its log was lost":
        topic.advance("two", 1, ended=False)

    follower = Client().joining(topic)
    topic.resume(follower, left)

    assert follower.resync == {"its detail is raised": "asked", "its log was lost": "log_lost"}.get(change, "overflow")


def test_what_happens_between_placing_and_letting_in_is_noticed() -> None:
    topic, client = topic_at(3), Client()
    follower = client.joining(topic, 3)
    topic.advance("two", 1, ended=False)

    topic.admit(follower)

    assert (follower.state, follower.resync) == (State.RESYNC, "log_lost")


# -- Letting in ----------------------------------------------------------------------------------------------------


def test_a_run_has_one_follower_however_many_subscriptions_want_it() -> None:
    client, topic = Client(), topic_at(0)
    follower = client.live(topic)

    second = client.joining(topic, 0, subscription="s2")
    assert topic.admit(second) is follower
    topic.deliver(frames(1, 2))

    assert (second.state, follower.state) == (State.DONE, State.LIVE)
    assert list(topic.followers) == [follower]
    assert follower.wants == {"s1": "full", "s2": "full"}
    assert client.seqs() == [1, 2]


def test_raising_the_detail_sends_a_snapshot() -> None:
    client, topic = Client(), topic_at(5)
    follower = client.live(topic, "progress")

    client.follow(topic, 5, "full", subscription="s2")

    assert (follower.full, follower.state, follower.resync, follower.cursor) == (True, State.RESYNC, "asked", 5)


@pytest.mark.parametrize(("first", "second"), [("full", "progress"), ("full", "full"), ("progress", "progress")])
def test_widening_without_raising_changes_nothing(first: Detail, second: Detail) -> None:
    client, topic = Client(), topic_at(5)
    follower = client.live(topic, first)

    client.follow(topic, 0, second, subscription="s2")

    assert (follower.state, follower.resync) == (State.LIVE, None)


def test_detail_falls_back_with_the_subscription_that_raised_it() -> None:
    client, topic = Client(), topic_at(0)
    follower = client.live(topic, "full")
    client.follow(topic, 0, "progress", subscription="s2")

    follower.unwant("s1")
    topic.deliver([frame(1, progress=False), frame(2)])

    assert client.seqs() == [2]


@pytest.mark.parametrize(
    ("known", "joins", "recovered"),
    [
        (None, ("full", 5), True),
        (None, ("full", None), False),
        ("full", ("full", 5), True),
        ("full", ("progress", None), True),
        ("progress", ("progress", None), True),
        ("progress", ("full", 5), False),
    ],
)
def test_a_reply_says_whether_a_snapshot_is_to_come(
    known: Detail | None, joins: tuple[Detail, int | None], recovered: bool
) -> None:
    client, topic = Client(), topic_at(5)
    if known is not None:
        client.live(topic, known)
    follower = client.joining(topic, joins[1], joins[0], subscription="s2")

    said = topic.described(follower)
    assert said == {"run": RUN, "epoch": EPOCH, "seq": 5, "recovered": recovered}

    topic.admit(follower)
    assert (client.outbox.followers[RUN].state is State.RESYNC) is not recovered


# -- Resynchronising -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["trimmed", "overflow", "log_lost"])
def test_a_gap_names_the_reason_and_precedes_the_snapshot(reason: Any) -> None:
    client, topic = Client(), topic_at(12)
    follower = client.live(topic)

    topic.lose(follower, reason)
    topic.deliver(frames(13, 40))
    topic.supply_snapshot(follower, snapshot(40))
    topic.deliver(frames(41, 41))

    gap, state, event = client.take()
    assert gap == {"type": "gap", "run": RUN, "from": 13, "to": 40, "reason": reason}
    assert state == {"type": "snapshot", "run": RUN, "epoch": EPOCH, "seq": 40, "state": {}}
    assert event["seq"] == 41


def test_a_snapshot_that_was_asked_for_has_no_gap() -> None:
    client, topic = Client(), topic_at(40)
    follower = client.follow(topic, None)

    topic.supply_snapshot(follower, snapshot(40))

    assert client.seqs() == ["=40"]
    assert (follower.state, follower.resync, follower.shown) == (State.LIVE, None, True)


def test_a_loss_outranks_what_was_asked_for_and_the_first_loss_stands() -> None:
    client, topic = Client(), topic_at(12)
    follower = client.live(topic)
    for reason in ("asked", "trimmed", "asked", "log_lost"):
        topic.lose(follower, reason)

    assert follower.resync == "trimmed"


def test_a_snapshot_moves_the_follower_to_its_epoch() -> None:
    client, topic = Client(), topic_at(12)
    follower = client.live(topic)
    topic.deliver(Head(RUN, "new", 20))

    topic.supply_snapshot(follower, snapshot(20, "new"))
    topic.deliver([frame(21, epoch="new")])

    assert client.seqs() == ["gap", "=20", 21]
    assert (follower.epoch, follower.state) == ("new", State.LIVE)


def test_a_snapshot_behind_the_head_is_followed_by_the_log() -> None:
    client, topic = Client(), topic_at(22)
    follower = client.follow(topic, None)

    topic.supply_snapshot(follower, snapshot(20))
    assert (follower.state, follower.cursor) == (State.BEHIND, 20)
    assert client.outbox.is_behind
    topic.supply(follower, segment(21, 22))

    assert follower.state is State.LIVE
    assert client.seqs() == ["=20", 21, 22]


@pytest.mark.parametrize("delivery", [frames(21, 23), Head(RUN, EPOCH, 23)], ids=["frames", "a head"])
def test_a_snapshot_ahead_of_the_head_waits_for_what_is_delivered_to_get_there(delivery: Any) -> None:
    """The state was read after the frames were appended, and before they were delivered here."""
    client, topic = Client(), topic_at(20)
    follower = client.follow(topic, None)

    topic.supply_snapshot(follower, snapshot(22))
    assert (follower.state, client.outbox.is_behind) == (State.BEHIND, False), "nothing is to be pulled for it"
    topic.deliver(delivery)

    assert (follower.state, client.outbox.is_behind) == (State.BEHIND, True)
    topic.supply(follower, segment(23, 23))
    assert (follower.state, client.outbox.is_behind) == (State.LIVE, False)
    assert client.seqs() == ["=22", 23]


def test_a_snapshot_just_ahead_of_the_head_is_live_once_that_is_delivered() -> None:
    client, topic = Client(), topic_at(20)
    follower = client.follow(topic, None)
    topic.supply_snapshot(follower, snapshot(22))

    topic.deliver(frames(21, 22))
    topic.deliver(frames(23, 23))

    assert follower.state is State.LIVE
    assert client.seqs() == ["=22", 23]


# -- The end -------------------------------------------------------------------------------------------------------


def test_the_last_event_ends_the_follower_and_subscriptions_to_that_run_alone() -> None:
    closed: list[RunTopic] = []
    client, topic = Client(), topic_at(0, closed=closed)
    follower = client.live(topic)
    client.outbox.subscribe("all", single=False)
    client.follow(topic, 0, subscription="all")

    topic.deliver([frame(1), frame(2, terminal=True)])

    assert client.seqs() == [1, 2]
    assert follower.done
    assert client.outbox.followers == {}
    assert list(client.outbox.subscriptions) == ["all"]
    assert [(run, past.left) for run, past in client.outbox.feed.past.items()] == [(RUN, None)]
    assert closed == [topic]


def test_a_run_that_has_ended_ends_for_a_follower_once_it_has_everything() -> None:
    client, topic = Client(), topic_at(3, ended=True)
    follower = client.follow(topic)
    done = [follower.done]
    for seqs in ((1, 2), (3, 3)):
        topic.supply(follower, segment(*seqs))
        done.append(follower.done)

    assert done == [False, False, True]
    assert client.seqs() == [1, 2, 3]


def test_a_head_that_has_ended_ends_live_followers_at_it_and_lets_others_catch_up() -> None:
    here, there = Client(), Client()
    topic = topic_at(3)
    live, behind = here.live(topic), there.follow(topic, 1)

    topic.deliver(Head(RUN, EPOCH, 3, ended=True))
    assert (live.state, behind.state) == (State.DONE, State.BEHIND)
    topic.supply(behind, segment(2, 3))

    assert behind.done
    assert (here.seqs(), there.seqs()) == ([], [2, 3])


@pytest.mark.parametrize(("ended", "done"), [(True, True), (False, False)])
def test_a_snapshot_of_the_end_is_the_last_frame(ended: bool, done: bool) -> None:
    client, topic = Client(), topic_at(20)
    follower = client.live(topic)
    topic.lose(follower, "overflow")

    topic.supply_snapshot(follower, snapshot(20, ended=ended))

    assert follower.done is done
    assert (RUN in client.outbox.followers) is not done
    assert ("s1" in client.outbox.subscriptions) is not done


def test_a_run_that_the_bus_has_lost_cuts_every_connection_that_follows_it() -> None:
    topic = topic_at(5)
    clients = [Client() for _ in range(3)]
    followers = [clients[0].live(topic), clients[1].follow(topic, 2), clients[2].follow(topic, None)]

    topic.deliver(Gone(RUN))

    assert [client.link.cuts for client in clients] == [[RUN_LOST]] * 3
    assert all(follower.done for follower in followers)
    topic.give_up(followers[0])
    assert clients[0].link.cuts == [RUN_LOST], "once"


@pytest.mark.parametrize("state", ["live", "behind", "resync"])
def test_a_run_that_was_left_is_sent_nothing_of_and_its_place_is_known(state: str) -> None:
    client, topic = Client(), topic_at(5)
    follower = client.live(topic) if state == "live" else client.follow(topic, 2)
    if state == "resync":
        topic.lose(follower, "trimmed")

    topic.leave(follower)
    topic.deliver(frames(6, 7))

    assert client.seqs() == []
    assert (follower.state, follower.cursor) == (State.DONE, 5 if state == "live" else 2)
    assert not client.outbox.is_behind
    assert (client.outbox.followers, client.outbox.subscriptions) == ({}, {})


def test_a_topic_closes_with_its_last_follower_and_its_last_pin() -> None:
    closed: list[RunTopic] = []
    topic = topic_at(5, closed=closed)
    topic.pins = 1
    first, second = Client().live(topic), Client().live(topic)

    topic.leave(first)
    topic.drop(second)
    assert closed == []
    topic.unpin()
    assert closed == [topic]
    third = Client().live(topic)
    topic.leave(third)

    assert closed == [topic, topic]
    assert (second.state, topic.followers) == (State.DONE, {})


def test_a_dropped_follower_is_sent_nothing() -> None:
    client, topic = Client(), topic_at(5)
    follower = client.live(topic)

    topic.drop(follower)
    topic.deliver(frames(6, 7))

    assert client.seqs() == []


# -- The ring ------------------------------------------------------------------------------------------------------


def recent(topic: RunTopic, at: int) -> list[int]:
    follower = Client().follow(topic, at)
    return [one.seq for part in topic.recent(follower) for one in part.frames]


def test_what_was_delivered_lately_is_pulled_without_the_bus() -> None:
    topic = topic_at(5)
    topic.deliver(frames(6, 8))
    topic.deliver(frames(9, 9))

    assert recent(topic, 5) == [6, 7, 8, 9]
    assert recent(topic, 7) == [8, 9]
    assert recent(topic, 9) == []
    assert recent(topic, 4) == [], "it does not reach back so far"


def test_what_the_ring_keeps_is_bounded_by_bytes() -> None:
    topic = topic_at(0, ring_bytes=250)
    for seq in range(1, 21):
        topic.deliver([frame(seq, size=100)])
        assert sum(one.size for one in topic._ring.after(0)) == topic._ring.size <= 250

    assert recent(topic, 18) == [19, 20]
    assert recent(topic, 17) == []
    topic.deliver([frame(21, size=300)])
    assert not topic._ring.size, "one that is larger than the ring is not kept either"


@pytest.mark.parametrize("delivery", [Head(RUN, EPOCH, 9), Head(RUN, "two", 7), frames(9, 9)])
def test_the_ring_never_bridges_a_hole(delivery: Any) -> None:
    topic = topic_at(5)
    topic.deliver(frames(6, 7))

    topic.deliver(delivery)
    topic.deliver([frame(topic.head + 1, epoch=topic.epoch)])

    assert recent(topic, 6) == []
    assert recent(topic, topic.head - 1) == [topic.head]


def test_the_snapshot_is_let_go_of_once_the_ring_does_not_reach_back_to_it() -> None:
    topic = topic_at(5, ring_bytes=250)
    topic.snapshot = snapshot(5)
    for seq in (6, 7):
        topic.deliver([frame(seq, size=100)])
        assert topic.snapshot is not None

    topic.deliver([frame(8, size=100)])

    assert topic.snapshot is None


@pytest.mark.parametrize("delivery", [Head(RUN, EPOCH, 9), Head(RUN, "two", 5)])
def test_the_snapshot_is_let_go_of_where_nothing_here_goes_on_from_it(delivery: Head) -> None:
    topic = topic_at(5)
    topic.snapshot = snapshot(5)

    topic.deliver(delivery)

    assert topic.snapshot is None


# -- Properties ----------------------------------------------------------------------------------------------------

acts = st.tuples(
    st.sampled_from(["grow", "grow", "lose", "repeat", "pull", "late pull", "take"]),
    st.integers(1, 5),
    st.booleans(),
)


class Stage:
    """A log, its topic, and a client whose only follower is pulled for as `catch_up` does it."""

    def __init__(self, log: list[Frame], queue_frames: int, detail: Detail, ring_bytes: int) -> None:
        self.log = log
        self.topic = topic_at(0, ring_bytes=ring_bytes)
        self.clients = [Client(queue_frames=queue_frames) for _ in range(2)]
        self.followers = [client.follow(self.topic, 0, detail) for client in self.clients]
        self.seen: list[list[int | str]] = [[], []]
        self.pages: list[list[Frame]] = [[], []]
        """What was read of the log for each client, and not used yet."""

    def act(self, what: str, size: int, which: bool) -> None:
        head, client, follower = self.topic.head, self.clients[which], self.followers[which]
        match what:
            case "grow" if delivery := self.log[head : head + size]:
                self.topic.deliver(delivery)
            case "lose" if delivery := self.log[head : head + size]:
                self.topic.deliver(Head(RUN, EPOCH, delivery[-1].seq, ended=delivery[-1].terminal))
            case "repeat" if delivery := self.log[max(head - size, 0) : head + 1]:
                self.topic.deliver(delivery)
            case "take":
                self.seen[which] += client.seqs()
            case "pull":
                self.pull(which, size)
            case "late pull":  # the page is older than what was pulled since
                if not self.pages[which]:
                    self.pages[which] = self.log[follower.cursor : follower.cursor + size]
                elif follower.state is State.BEHIND:
                    self.topic.supply(follower, Segment(self.pages[which]))
                    self.pages[which] = []
        assert all(len(client.outbox) <= client.outbox._queue_frames for client in self.clients)

    def pull(self, which: int, size: int) -> None:
        follower = self.clients[which].outbox.claim()
        if follower is None:
            return
        parts = self.topic.recent(follower)
        if not parts and (page := self.log[follower.cursor : follower.cursor + size]):
            parts = [Segment(page)]
        for part in parts:
            if self.topic.supply(follower, part):
                break
        self.topic.rest(follower)
        self.clients[which].outbox.release(follower)


@given(
    acts=st.lists(acts, max_size=80),
    queue_frames=st.integers(1, 6),
    total=st.integers(1, 30),
    detail=st.sampled_from(["full", "progress"]),
    ring_bytes=st.sampled_from([0, 100, 10_000]),
)
def test_whatever_happens_all_comes_in_order_and_once(
    acts: list[tuple[str, int, bool]], queue_frames: int, total: int, detail: Detail, ring_bytes: int
) -> None:
    """A log that grows, frames that come in batches, again or not at all, pages of any size and age, and clients that
    read when they like."""
    log = [frame(seq, progress=seq % 3 != 0 or seq == total, terminal=seq == total) for seq in range(1, total + 1)]
    stage = Stage(log, queue_frames, detail, ring_bytes)
    for what, size, which in acts:
        stage.act(what, size, which)
    while stage.topic.head < total:
        stage.act("grow", 5, False)
    for which in (False, True):
        while not stage.followers[which].done:
            stage.act("take", 1, which)
            stage.act("pull", 5, which)
        stage.act("take", 1, which)

    wanted = [item.seq for item in log if detail == "full" or item.progress]
    assert stage.seen == [wanted, wanted]
