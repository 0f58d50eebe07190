"""What a connection is owed: the queue, the followers' two states, and the feed. No I/O (G1, G2, G4)."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcast.server import protocol
from agentcast.server.bus.base import Frame, Page, Snapshot
from agentcast.server.errors import TooMany
from agentcast.server.hub import outbox as module
from agentcast.server.hub.outbox import Follower, Outbox
from agentcast.server.protocol import Detail

RUN, EPOCH = "r", "e"


class Client:
    """An outbox whose callbacks are counted, and what was taken out of it."""

    def __init__(self, queue_frames: int = 100, queue_bytes: int = 1_000_000) -> None:
        self.woken = self.pulled = self.cut = 0
        self.outbox = Outbox(self._wake, self._pull, self._cut, queue_frames=queue_frames, queue_bytes=queue_bytes)

    def _wake(self) -> None:
        self.woken += 1

    def _pull(self) -> None:
        self.pulled += 1

    def _cut(self) -> None:
        self.cut += 1

    def follow(
        self,
        cursor: int = 0,
        detail: Detail = "full",
        *,
        run: str = RUN,
        subscription: str = "s1",
        live: bool = True,
        head: int | None = None,
    ) -> Follower:
        if subscription not in self.outbox.subscriptions:
            self.outbox.subscribe(subscription, single=True)
        follower = self.outbox.follow(Follower(run, EPOCH, cursor, wants={subscription: detail}))
        if live:
            self.outbox.add_page(follower, Page([], cursor), cursor if head is None else head)
        return follower

    def take(self) -> list[Any]:
        taken = []
        while frames := self.outbox.take():
            taken += [orjson.loads(frame) for frame in frames]
        return taken

    def seqs(self) -> list[int | str]:
        """What was queued: the seq of events and snapshots (as `=n`), the type of anything else."""
        return [
            frame["seq"] if frame["type"] == "event" else f"={frame['seq']}" if "seq" in frame else frame["type"]
            for frame in self.take()
        ]


def frame(
    seq: int, *, run: str = RUN, epoch: str = EPOCH, progress: bool = True, terminal: bool = False, size: int = 0
) -> Frame:
    data = orjson.dumps({"type": "event", "seq": seq}).ljust(size)
    return Frame(run, epoch, seq, data, progress, terminal)


def frames(first: int, last: int) -> list[Frame]:
    return [frame(seq) for seq in range(first, last + 1)]


def snapshot(seq: int, epoch: str = EPOCH) -> Snapshot:
    return Snapshot(RUN, epoch, seq, b"{}")


# -- The queue -----------------------------------------------------------------------------------------------------


def test_frames_are_taken_in_order_and_once() -> None:
    client = Client()
    for n in range(5):
        client.outbox.put(protocol.reply(n, {}))

    assert len(client.outbox) == 5
    assert [reply["id"] for reply in client.take()] == [0, 1, 2, 3, 4]
    assert client.outbox.take() == []
    assert client.woken == 5


def test_one_take_is_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TAKE_BYTES", 10)
    client = Client()
    for _ in range(3):
        client.outbox.put(b"123456")

    assert [len(client.outbox.take()) for _ in range(3)] == [2, 1, 0]


@pytest.mark.parametrize(("limit", "full_at"), [({"queue_frames": 3}, 3), ({"queue_bytes": 60}, 3)])
def test_full_queue_takes_replies_but_no_events(limit: dict[str, int], full_at: int) -> None:
    client = Client(**limit)
    follower = client.follow()
    client.outbox.deliver(follower, [frame(seq) for seq in range(1, 10)])

    assert client.outbox.full
    assert len(client.outbox) == full_at
    assert not follower.live
    for n in range(50):
        client.outbox.put(protocol.reply(n, {}))
    assert [item.get("id", item.get("seq")) for item in client.take()] == [1, 2, 3, *range(50)]


def test_queue_has_room_again_once_it_was_taken_from() -> None:
    client = Client(queue_bytes=25)
    client.outbox.deliver(client.follow(), [frame(seq) for seq in range(1, 10)])

    client.outbox.take()

    assert not client.outbox.full


def test_taking_asks_to_pull_only_if_somebody_is_behind() -> None:
    client = Client(queue_frames=2)
    follower = client.follow()
    client.pulled = 0
    client.outbox.deliver(follower, frames(1, 2))
    client.outbox.take()
    assert client.pulled == 0

    client.outbox.deliver(follower, frames(3, 5))
    assert client.pulled == 0  # there is no room for what would be pulled
    client.outbox.take()

    assert client.pulled == 1


# -- Live and behind -----------------------------------------------------------------------------------------------


def test_new_follower_is_behind_and_asks_to_pull() -> None:
    client = Client()

    follower = client.follow(live=False)

    assert not follower.live
    assert client.outbox.is_behind
    assert client.pulled == 1
    assert client.outbox.next_behind() is follower


def test_follower_behind_is_sent_no_news() -> None:
    client = Client()
    follower = client.follow(live=False)

    client.outbox.deliver(follower, frames(1, 3))

    assert client.seqs() == []
    assert follower.cursor == 0


def test_page_up_to_the_head_makes_a_follower_live() -> None:
    client = Client()
    follower = client.follow(live=False)

    client.outbox.add_page(follower, Page(frames(1, 3), 3), 3)
    client.outbox.deliver(follower, frames(4, 5))

    assert follower.live
    assert not client.outbox.is_behind
    assert client.seqs() == [1, 2, 3, 4, 5]


def test_page_short_of_the_head_leaves_it_behind() -> None:
    client = Client()
    follower = client.follow(live=False)

    client.outbox.add_page(follower, Page(frames(1, 3), 9), 9)

    assert not follower.live
    assert (follower.cursor, client.outbox.next_behind()) == (3, follower)


def test_page_is_queued_as_far_as_there_is_room() -> None:
    client = Client(queue_frames=2)
    follower = client.follow(live=False)

    client.outbox.add_page(follower, Page(frames(1, 5), 5), 5)

    assert (follower.cursor, follower.live) == (2, False)
    assert client.outbox.next_behind() is None
    assert client.seqs() == [1, 2]
    client.outbox.add_page(follower, Page(frames(3, 5), 5), 5)
    assert client.seqs() == [3, 4]


def test_page_and_news_that_overlap_are_sent_once() -> None:
    client = Client()
    follower = client.follow(live=False)
    client.outbox.add_page(follower, Page(frames(1, 4), 4), 4)

    client.outbox.deliver(follower, frames(3, 6))
    client.outbox.deliver(follower, frames(5, 6))

    assert client.seqs() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("news", [frame(5), frame(3, epoch="other")], ids=["after a hole", "of another epoch"])
def test_news_that_does_not_follow_the_cursor_makes_it_behind(news: Frame) -> None:
    client = Client()
    follower = client.follow(2)

    client.outbox.deliver(follower, [news])

    assert client.seqs() == []
    assert (follower.cursor, follower.live) == (2, False)


def test_followers_behind_take_turns() -> None:
    client = Client()
    followers = [client.follow(run=f"r{n}", subscription=f"s{n}", live=False) for n in range(3)]

    assert [client.outbox.next_behind() for _ in range(6)] == followers * 2


def test_progress_detail_leaves_full_only_events_out_but_counts_them() -> None:
    client = Client()
    follower = client.follow(detail="progress")

    client.outbox.deliver(follower, [frame(1), frame(2, progress=False), frame(3, progress=False), frame(4)])

    assert client.seqs() == [1, 4]
    assert follower.cursor == 4
    assert follower.live


# -- Resynchronising -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["trimmed", "overflow", "log_lost"])
def test_gap_names_the_reason_and_precedes_the_snapshot(reason: Any) -> None:
    client = Client()
    follower = client.follow(12)

    client.outbox.lose(follower, reason)
    client.outbox.deliver(follower, frames(13, 14))
    client.outbox.add_snapshot(follower, snapshot(40), 40, ended=False)
    client.outbox.deliver(follower, frames(41, 41))

    gap, state, event = client.take()
    assert gap == {"type": "gap", "run": RUN, "from": 13, "to": 40, "reason": reason}
    assert state == {"type": "snapshot", "run": RUN, "epoch": EPOCH, "seq": 40, "state": {}}
    assert event["seq"] == 41


def test_snapshot_that_was_asked_for_has_no_gap() -> None:
    client = Client()
    follower = client.follow(12)

    client.outbox.lose(follower, "asked")
    client.outbox.add_snapshot(follower, snapshot(40), 40, ended=False)

    assert client.seqs() == ["=40"]


def test_loss_outranks_what_was_asked_for_and_the_first_loss_stands() -> None:
    client = Client()
    follower = client.follow(12)
    for reason in ("asked", "trimmed", "asked", "log_lost"):
        client.outbox.lose(follower, reason)

    assert follower.resync == "trimmed"


def test_snapshot_moves_the_follower_to_its_epoch() -> None:
    client = Client()
    follower = client.follow(12)
    client.outbox.lose(follower, "log_lost")

    client.outbox.add_snapshot(follower, snapshot(20, "new"), 20, ended=False)
    client.outbox.deliver(follower, [frame(21, epoch="new")])

    assert client.seqs() == ["gap", "=20", 21]
    assert (follower.epoch, follower.cursor) == ("new", 21)


def test_snapshot_behind_the_head_is_followed_by_the_log() -> None:
    client = Client()
    follower = client.follow(12)
    client.outbox.lose(follower, "overflow")

    client.outbox.add_snapshot(follower, snapshot(20), 22, ended=False)
    assert client.outbox.is_behind
    client.outbox.add_page(follower, Page(frames(21, 22), 22), 22)

    assert follower.live
    assert client.seqs() == ["gap", "=20", 21, 22]


@pytest.mark.parametrize(("seq", "done"), [(20, True), (19, False)])
def test_snapshot_of_the_end_is_the_last_frame(seq: int, done: bool) -> None:
    client = Client()
    follower = client.follow(12)
    client.outbox.lose(follower, "overflow")

    client.outbox.add_snapshot(follower, snapshot(seq), 20, ended=True)

    assert follower.done is done
    assert (RUN in client.outbox.followers) is not done
    assert ("s1" in client.outbox.subscriptions) is not done


# -- Subscriptions -------------------------------------------------------------------------------------------------


def test_terminal_frame_ends_follower_and_single_subscription() -> None:
    client = Client()
    follower = client.follow()
    client.outbox.subscribe("all", single=False)
    client.follow(subscription="all")

    client.outbox.deliver(follower, [frame(1), frame(2, terminal=True)])

    assert follower.done
    assert client.outbox.followers == {}
    assert list(client.outbox.subscriptions) == ["all"]
    assert list(client.outbox.past) == [RUN]


def test_runs_that_ended_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PAST", 2)
    client = Client()
    for run in ("a", "b", "c"):
        client.outbox.deliver(client.follow(run=run), [frame(1, run=run, terminal=True)])

    assert list(client.outbox.past) == ["b", "c"]


def test_run_has_one_follower_however_many_subscriptions_want_it() -> None:
    client = Client()
    follower = client.follow(subscription="s1")

    assert client.follow(subscription="s2", live=False) is follower
    assert follower.live
    client.outbox.deliver(follower, frames(1, 2))

    assert client.seqs() == [1, 2]


def test_follower_stays_while_one_subscription_wants_it() -> None:
    client = Client()
    follower = client.follow(subscription="s1")
    client.follow(subscription="s2", live=False)

    assert client.outbox.unsubscribe("s1") == []
    client.outbox.deliver(follower, frames(1, 1))
    assert client.outbox.unsubscribe("s2") == [follower]
    client.outbox.deliver(follower, frames(2, 2))

    assert client.seqs() == [1]
    assert follower.done
    assert not client.outbox.is_behind


def test_raising_the_detail_sends_a_snapshot() -> None:
    client = Client()
    follower = client.follow(5, "progress")

    client.follow(subscription="s2", live=False)

    assert (follower.full, follower.live, follower.resync) == (True, False, "asked")


@pytest.mark.parametrize(("first", "second"), [("full", "progress"), ("full", "full"), ("progress", "progress")])
def test_widening_without_raising_changes_nothing(first: Detail, second: Detail) -> None:
    client = Client()
    follower = client.follow(5, first)

    client.follow(0, second, subscription="s2", live=False)

    assert (follower.live, follower.cursor, follower.resync) == (True, 5, None)


def test_detail_falls_back_with_the_subscription_that_raised_it() -> None:
    client = Client()
    follower = client.follow(detail="full", subscription="s1")
    client.follow(detail="progress", subscription="s2", live=False)

    client.outbox.unsubscribe("s1")
    client.outbox.deliver(follower, [frame(1, progress=False), frame(2)])

    assert client.seqs() == [2]


def test_subscriptions_are_bounded() -> None:
    client = Client()
    for n in range(protocol.MAX_SUBSCRIPTIONS):
        client.outbox.subscribe(f"s{n}", single=False)

    with pytest.raises(TooMany, match="128"):
        client.outbox.subscribe("one more", single=False)
    client.outbox.unsubscribe("s0")
    client.outbox.subscribe("one more", single=False)


def test_connection_that_lets_too_many_runs_pile_up_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FOLLOWED", 2)
    client = Client()
    for n in range(2):
        client.follow(run=f"r{n}", subscription=f"s{n}")
    assert client.cut == 0

    client.follow(run="r2", subscription="s2")

    assert client.cut == 1


# -- The feed ------------------------------------------------------------------------------------------------------


def announce(client: Client, position: str, *followers: Follower | None) -> None:
    for follower in followers:
        client.outbox.expect(position)
        client.outbox.announce(position, follower)


def test_feed_tells_the_newest_position_once() -> None:
    client = Client()
    announce(client, "f:1", None)
    announce(client, "f:2", None)

    client.outbox.put_feed()
    client.outbox.put_feed()

    assert client.take() == [{"type": "feed", "position": "f:2"}]


def test_feed_waits_until_the_run_was_shown() -> None:
    client = Client()
    first, second = (client.follow(run=run, subscription=run) for run in "ab")
    announce(client, "f:1", None)
    announce(client, "f:2", first)
    announce(client, "f:3", second)

    client.outbox.deliver(second, [frame(1, run="b")])
    client.outbox.put_feed()
    assert client.seqs() == [1, "feed"]
    client.outbox.put_feed()
    assert client.seqs() == []

    client.outbox.deliver(first, [frame(1, run="a")])
    client.outbox.put_feed()
    assert [item.get("position") for item in client.take()] == [None, "f:3"]


def test_feed_does_not_wait_for_a_run_that_nobody_wants_any_more() -> None:
    client = Client()
    announce(client, "f:1", client.follow(live=False))
    client.outbox.unsubscribe("s1")

    client.outbox.put_feed()

    assert client.take() == [{"type": "feed", "position": "f:1"}]


def test_snapshot_shows_a_run() -> None:
    client = Client()
    follower = client.follow(live=False)
    announce(client, "f:1", follower)
    client.outbox.lose(follower, "asked")

    client.outbox.add_snapshot(follower, snapshot(3), 3, ended=False)
    client.outbox.put_feed()

    assert client.seqs() == ["=3", "feed"]


def test_feed_waits_for_every_subscription_that_is_to_be_told() -> None:
    client = Client()
    for position in ("f:1", "f:2"):
        client.outbox.expect(position)
        client.outbox.expect(position)
    for position in ("f:1", "f:2"):  # the first subscription has got to both, the second to none
        client.outbox.announce(position, None)

    client.outbox.put_feed()
    assert client.take() == []

    client.outbox.announce("f:1", None)
    client.outbox.put_feed()
    assert client.take() == [{"type": "feed", "position": "f:1"}]


# -- Properties ----------------------------------------------------------------------------------------------------


acts = st.tuples(st.sampled_from(["grow", "pull", "take"]), st.integers(1, 5))


@given(
    acts=st.lists(acts, max_size=60),
    queue_frames=st.integers(1, 6),
    total=st.integers(1, 30),
    detail=st.sampled_from(["full", "progress"]),
)
def test_whatever_happens_all_comes_in_order_and_once(
    acts: list[tuple[str, int]], queue_frames: int, total: int, detail: Detail
) -> None:
    """A log that grows, news that come in batches, pages of any size, a client that reads when it likes."""
    log = [frame(seq, progress=seq % 3 != 0 or seq == total, terminal=seq == total) for seq in range(1, total + 1)]
    client = Client(queue_frames=queue_frames)
    follower = client.follow(detail=detail, live=False)
    head = 0
    seen: list[int | str] = []

    def act(what: str, size: int) -> None:
        nonlocal head, seen
        if what == "grow":
            client.outbox.deliver(follower, log[head : head + size])
            head = min(head + size, total)
        elif what == "take":
            seen += client.seqs()
        elif client.outbox.next_behind() is not None:
            page = log[follower.cursor : min(head, follower.cursor + size)]
            client.outbox.add_page(follower, Page(page, head), head)
        assert len(client.outbox) <= queue_frames

    for what, size in acts:
        act(what, size)
    act("grow", total)
    while not follower.done:
        act("take", 1)
        act("pull", 5)
    act("take", 1)

    assert seen == [item.seq for item in log if detail == "full" or item.progress]
