"""The board's rules, without a bus: the latest wins, each run once a flush, bounded memory, last records arrive."""

import random
from collections.abc import Collection
from typing import Any

import orjson
import pytest

from agentcast.server.bus.base import Summary
from agentcast.server.hub import board as module
from agentcast.server.hub import viewers
from agentcast.server.hub.board import Board, run_key
from agentcast.server.hub.viewers import Key, Watch
from tests.support.following import Client

ALL: Key = ("ann", "all", "")


def record(run: str, at: int = 1, *, size: int = 0, **fields: Any) -> Summary:
    known: dict[str, Any] = {
        "run": run,
        "epoch": "e",
        "seq": at,
        "fence": 1,
        "principal": "ann",
        "agent": "echo",
        "thread": None,
        "status": "running",
        "created": 1.0,
        "data": orjson.dumps({"run": run, "at": at, "x": "x" * size}),
    }
    return Summary(**known | fields)


def ended(run: str, at: int = 99, **fields: Any) -> Summary:
    return record(run, at, status="done", **fields)


def flush(board: Board) -> int:
    """Flush to the end; gives the number of slices."""
    return sum(1 for _ in board.flush())


def watching(board: Board, *keys: Key, name: str = "s", client: Client | None = None) -> Client:
    client = client or Client()
    watch = begin(board, client, name, keys or (ALL,))
    assert watch.begun
    return client


def begin(board: Board, client: Client, name: str, keys: Collection[Key], awaited: Collection[str] = ()) -> Watch:
    client.outbox.subscribe(name, single=True)
    watch = board.watch(client.outbox, name, keys)
    board.begin(watch, {run: slot for group in watch.groups for run, slot in group.slots.items()}, awaited)
    return watch


def shown(client: Client) -> list[tuple[str, int]]:
    """The records that were queued, in order."""
    frames = client.take()
    assert all(frame["type"] == "summary" and frame["runs"] for frame in frames), frames
    return [(item["run"], item["at"]) for frame in frames for item in frame["runs"]]


def test_a_record_reaches_those_whose_key_covers_it_and_nobody_else() -> None:
    board = Board()
    everything = watching(board)
    agent = watching(board, ("ann", "agent", "echo"))
    thread = watching(board, ("ann", "thread", "t"))
    one = watching(board, run_key("ann", "b"))
    others = watching(board, ("bob", "all", ""))

    board.take(record("a"))
    board.take(record("b", agent="other", thread="t"))
    flush(board)

    assert shown(everything) == [("a", 1), ("b", 1)]
    assert shown(agent) == [("a", 1)]
    assert shown(thread) == shown(one) == [("b", 1)]
    assert shown(others) == []


def test_what_nobody_watches_is_not_kept() -> None:
    board = Board()
    watching(board, ("ann", "agent", "other"))

    assert board.take(record("a")) is None
    assert (len(board), board.due) == (0, False)


def test_of_each_run_one_record_is_sent_a_flush_the_latest() -> None:
    board = Board()
    client = watching(board)
    for at in range(1, 50):
        board.take(record("a", at))
        board.take(record("b", at))

    flush(board)
    assert shown(client) == [("a", 49), ("b", 49)]
    flush(board)
    assert shown(client) == [], "nothing has changed"


def test_nothing_is_sent_before_the_subscription_begins() -> None:
    board, client = Board(), Client()
    watch = board.watch(client.outbox, "s", [ALL])
    slot = board.take(record("a"))
    assert slot is not None
    flush(board)
    assert client.take() == []

    board.begin(watch, {"a": slot})
    flush(board)

    assert shown(client) == [("a", 1)]


def test_a_subscription_begins_with_the_active_runs_as_they_are_when_it_is_flushed() -> None:
    board = Board()
    first, client, left = watching(board), Client(), Client()
    for run in "abc":
        board.take(record(run))
    flush(board)
    for one in (client, left):
        one.outbox.subscribe("s", single=True)
        board.begin(board.watch(one.outbox, "s", [ALL]))
    assert client.take() == []
    board.take(record("a", 2))
    with board.reading():
        board.take(ended("b"))
    board.leave(left.outbox, "s")
    flush(board)

    assert sorted(shown(client)) == [("a", 2), ("b", 99), ("c", 1)]
    assert shown(first)[3:] == [("a", 2), ("b", 99)]
    assert shown(left) == []
    assert not board.due


def test_subscriptions_that_overlap_bring_a_run_once() -> None:
    board = Board()
    client = watching(board)
    watching(board, ("ann", "agent", "echo"), run_key("ann", "a"), name="s2", client=client)

    board.take(record("a"))
    flush(board)

    assert shown(client) == [("a", 1)]


def test_viewers_that_one_group_concerns_get_the_same_bytes() -> None:
    board = Board()
    clients = [watching(board) for _ in range(3)]
    for number in range(1_000):
        board.take(record(str(number), size=200))

    flush(board)

    taken = [client.outbox.take() for client in clients]
    assert len(taken[0]) > 1
    for batches in taken[1:]:
        assert all(one is other for one, other in zip(taken[0], batches, strict=True))


def test_frames_are_bounded_and_hold_each_run_once() -> None:
    board = Board()
    joined, late = watching(board), Client()
    for number in range(1_000):
        board.take(record(str(number), size=300))
    flush(board)
    begin(board, late, "s", [ALL])
    flush(board)

    for client in (joined, late):
        batches = []
        while taken := client.outbox.take():
            batches += taken
        assert max(batch.size for batch in batches) <= viewers.FRAME_BYTES
        runs = [item["run"] for batch in batches for item in orjson.loads(batch.payloads[0])["runs"]]
        assert sorted(runs) == sorted(str(number) for number in range(1_000))


def test_a_slow_viewer_holds_a_bounded_queue_and_then_gets_the_latest_of_each_run() -> None:
    board = Board()
    slow, fast = Client(queue_bytes=50_000), watching(board)
    begin(board, slow, "s", [ALL])
    runs = [str(number) for number in range(300)]
    for at in range(1, 40):
        for run in runs:
            board.take(record(run, at, size=200))
        flush(board)
        assert dict(shown(fast)) == dict.fromkeys(runs, at)
        assert sum(batch.size for batch in slow.outbox._queue) <= 50_000
    viewer = board._viewers[slow.outbox]
    assert len(viewer.behind) <= len(runs)

    seen: list[tuple[str, int]] = []
    while board.due:
        seen += shown(slow)
        flush(board)
    seen += shown(slow)

    assert dict(seen) == dict.fromkeys(runs, 39)
    assert len(seen) <= 3 * len(runs), "what it was late for was not sent"


def test_a_full_queue_delays_nobody_else_and_asks_for_another_flush() -> None:
    board = Board()
    stuck, client = Client(queue_frames=1), watching(board)
    begin(board, stuck, "s", [ALL])
    stuck.outbox.put(b'{"type":"ping"}')

    board.take(record("a"))
    flush(board)

    assert shown(client) == [("a", 1)]
    assert board.due
    assert [frame["type"] for frame in stuck.take()] == ["ping"]
    flush(board)
    assert shown(stuck) == [("a", 1)]
    assert not board.due


def test_what_changes_all_the_time_does_not_keep_back_what_changed_before() -> None:
    board = Board()
    client = Client(queue_bytes=100)
    begin(board, client, "s", [ALL])
    seen: list[str] = []
    for at in range(1, 8):
        for run in "abcd":
            board.take(record(run, at))
        flush(board)
        seen += [run for run, _ in shown(client)]

    counts = [seen.count(run) for run in "abcd"]
    assert len(seen) < 7 * 4, "the queue was too small for all of it"
    assert max(counts) - min(counts) <= 1


# -- Ends ----------------------------------------------------------------------------------------------------------


def test_the_last_record_is_delivered_and_the_run_leaves_the_board() -> None:
    board = Board()
    client, slow = watching(board), Client(queue_frames=1)
    begin(board, slow, "s", [ALL])
    slow.outbox.put(b'{"type":"ping"}')
    board.take(record("a"))
    flush(board)
    board.take(ended("a"))
    flush(board)

    assert shown(client) == [("a", 1), ("a", 99)]
    assert len(board) == 0
    slow.take()
    flush(board)
    assert shown(slow) == [("a", 99)], "who is behind gets it from what it kept"
    assert not board.due


def test_an_old_answer_does_not_bring_back_a_run_that_ended_meanwhile() -> None:
    board = Board()
    client = watching(board)
    board.take(record("a", 1))
    with board.reading() as read:
        board.take(ended("a"))
        flush(board)
        board.take(record("a", 1), read)
        board.take(record("b", 1), read)
    flush(board)
    flush(board)

    assert shown(client) == [("a", 99), ("b", 1)]
    assert len(board) == 1


def test_what_is_read_replaces_only_what_was_known_before() -> None:
    board = Board()
    client = watching(board)
    board.take(record("a", 1))
    with board.reading() as read:
        board.take(record("a", 5), read)
        board.take(record("a", 5), read)
    flush(board)
    assert shown(client) == [("a", 5)]
    with board.reading() as read:
        board.take(record("a", 5), read)
    flush(board)
    assert shown(client) == [], "the same again is no change"


def test_a_run_that_had_ended_is_shown_only_to_those_who_ask_for_it_by_name() -> None:
    board = Board()
    everything = watching(board)
    one = watching(board, run_key("ann", "a"))
    with board.reading() as read:
        board.take(ended("a"), read)
    flush(board)

    assert shown(everything) == []
    assert shown(one) == [("a", 99)]


def test_a_subscription_by_name_ends_after_the_last_record_of_all_its_runs() -> None:
    board, client = Board(), Client()
    begin(board, client, "s", [run_key("ann", run) for run in "ab"], awaited="ab")
    other = watching(board, run_key("ann", "a"))
    board.take(record("a"))
    board.take(ended("b"))
    flush(board)
    assert "s" in client.outbox.subscriptions
    board.take(ended("a"))
    flush(board)

    assert shown(client) == [("a", 1), ("b", 99), ("a", 99)]
    assert client.outbox.subscriptions == {}
    board.disconnect(other.outbox)
    assert board.unwatched
    assert not board._viewers
    assert board.named(client.outbox) == 0


# -- Leaving -------------------------------------------------------------------------------------------------------


def test_after_leaving_nothing_comes_that_only_that_subscription_asked_for() -> None:
    board = Board()
    client = watching(board, ("ann", "agent", "echo"))
    watching(board, run_key("ann", "b"), name="s2", client=client)
    for run in "ab":
        board.take(record(run))

    board.leave(client.outbox, "s")
    board.leave(client.outbox, "s")
    flush(board)

    assert shown(client) == [("b", 1)]


def test_who_leaves_in_the_midst_of_a_flush_gets_no_more_of_it() -> None:
    board = Board()
    client, behind = watching(board), watching(board)
    begin(board, behind, "s2", [("ann", "agent", "echo")])
    for number in range(2_000):
        board.take(record(str(number), size=100))
    for _ in board.flush():
        board.leave(client.outbox, "s")
        board.disconnect(behind.outbox)

    assert shown(client) == shown(behind) == []
    assert (len(board), board.unwatched, board.due) == (0, True, False)


def test_who_leaves_one_of_two_subscriptions_before_its_turn_gets_what_the_other_covers() -> None:
    board = Board()
    first, client = watching(board), watching(board)
    watching(board, ("ann", "agent", "echo"), name="s2", client=client)
    board.take(record("a"))
    board.take(record("b", agent="other"))
    flushing = board.flush()
    next(flushing)
    assert shown(first) == [("a", 1), ("b", 1)], "it is served before"
    board.leave(client.outbox, "s")
    for _ in flushing:
        pass

    assert shown(client) == [("a", 1)]


def test_a_connection_that_fails_does_not_keep_the_others_from_their_records(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board()
    broken, client = watching(board), watching(board)

    class Broken:
        def fits(self, batch: object) -> bool:
            raise RuntimeError("broken")

        fail = broken.link.fail

    board._viewers[broken.outbox].outbox = Broken()  # type: ignore[assignment]
    board.take(record("a"))
    flush(board)

    assert shown(client) == [("a", 1)]
    assert [str(error) for error in broken.link.failures] == ["broken"]


# -- Bounds --------------------------------------------------------------------------------------------------------


def test_past_its_cap_the_board_leaves_runs_out_and_says_so_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RECORDS", 2)
    board = Board()
    client = watching(board)
    for at in (1, 2):
        for run in "abcd":
            board.take(record(run, at))
    flush(board)
    client.outbox.put_notices()

    frames = client.take()
    assert frames[-1] == {"type": "truncated", "subscription": "s", "runs": 2}
    assert len(board) == 2
    assert client.link.cuts == []

    board.take(ended("a"))
    flush(board)
    board.take(record("c", 3))
    flush(board)
    assert shown(client) == [("a", 99), ("c", 3)], "there is room again"


def test_a_viewer_that_is_behind_with_too_many_ends_loses_the_oldest_and_is_notified(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(viewers, "MAX_BEHIND", 20)
    monkeypatch.setattr(viewers, "BEHIND_MARGIN", 0)
    board = Board()
    stuck = Client(queue_frames=1)
    begin(board, stuck, "s", [ALL])
    stuck.outbox.put(b'{"type":"ping"}')
    board.take(record("active"))
    for number in range(100):
        board.take(ended(str(number)))
        flush(board)

    assert len(board._viewers[stuck.outbox].behind) == 20
    assert len(board) == 1
    stuck.take()
    flush(board)
    stuck.outbox.put_notices()
    frames = stuck.take()
    assert [item["run"] for item in frames[0]["runs"]] == ["active", *map(str, range(81, 100))]
    assert frames[1] == {"type": "truncated", "subscription": "s", "runs": 81}


def test_thousands_of_changes_are_flushed_in_slices() -> None:
    board = Board()
    clients = [watching(board) for _ in range(5)]
    for number in range(10_000):
        board.take(record(str(number)))

    slices = flush(board)

    assert slices >= 10_000 / module.SLICE + len(clients)
    assert all(len(shown(client)) == 10_000 for client in clients)


def test_slow_viewers_are_not_all_served_in_one_slice() -> None:
    board = Board()
    clients = [watching(board, client=Client(queue_frames=1)) for _ in range(20)]
    for client in clients:
        client.outbox.put(b"{}")

    for at in (1, 2):  # those that are up to date, and those that are behind
        board.take(record("a", at))
        assert flush(board) >= len(clients)


def test_one_viewer_costs_the_same_however_often_it_subscribes(monkeypatch: pytest.MonkeyPatch) -> None:
    board, client = Board(), Client()
    for number in range(100):
        client.outbox.subscribe(f"s{number}", single=True)
    watches = [board.watch(client.outbox, f"s{number}", [ALL]) for number in range(100)]
    for number in range(50):
        board.take(record(str(number)))
    looked_at = 0
    lag = viewers.Viewer.lag

    def count(viewer: viewers.Viewer, slots: Collection[viewers.Slot]) -> None:
        nonlocal looked_at
        looked_at += len(slots)
        lag(viewer, slots)

    monkeypatch.setattr(viewers.Viewer, "lag", count)
    for watch in watches:
        board.begin(watch)
    flush(board)
    assert len(shown(client)) == 50
    assert looked_at == 50

    watching(board, ("ann", "agent", "echo"), name="more", client=client)
    looked_at = 0
    for number in range(50):
        board.take(record(str(number), 2))
    flush(board)

    assert len(shown(client)) == 50
    assert looked_at == 2 * 50, "two groups concern it"


def test_a_run_that_many_watch_by_name_is_flushed_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE", 10)
    board = Board()
    runs = [str(number) for number in range(5)]
    clients = [watching(board, *[run_key("ann", run) for run in runs]) for _ in range(20)]
    for run in runs:
        board.take(record(run))
    flushing = board.flush()
    before = 0
    while not clients[0].take():
        next(flushing)
        before += 1
    for _ in flushing:
        pass

    assert before >= len(runs), "each of them is a slice of its own"
    assert len(shown(clients[-1])) == 5


# -- Any order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_who_keeps_up_has_the_newest_of_each_run_it_covers(seed: int) -> None:
    rng = random.Random(seed)
    board = Board()
    clients = [Client(queue_bytes=rng.choice([300, 1_000_000])) for _ in range(4)]
    keys: dict[tuple[int, str], Key] = {}
    newest: dict[str, Summary] = {}
    seen: list[dict[str, int]] = [{} for _ in clients]
    since_flush = [set[str]() for _ in clients]

    def step() -> None:
        match rng.randrange(8):
            case 0:
                number, name = rng.randrange(len(clients)), rng.choice("st")
                if (number, name) not in keys:
                    run = str(rng.randrange(10))
                    key = rng.choice([ALL, ("ann", "agent", "a0"), ("ann", "thread", "t1"), run_key("ann", run)])
                    keys[number, name] = key
                    watch = board.watch(clients[number].outbox, name, [key])
                    with board.reading() as read:
                        for one in newest.values():
                            board.take(one, read)
                    board.begin(watch, {run: slot for group in watch.groups for run, slot in group.slots.items()})
            case 1:
                if keys and rng.random() < 0.5:
                    number, name = rng.choice(list(keys))
                    del keys[number, name]
                    board.leave(clients[number].outbox, name)
            case _:
                place = rng.randrange(10)
                run = str(place)
                at = newest[run].seq + 1 if run in newest else 1
                one = newest[run] = record(run, at, agent=f"a{place % 2}", thread=f"t{place % 3}")
                board.take(one)

    def take() -> None:
        for number, client in enumerate(clients):
            for run, at in shown(client):
                assert run not in since_flush[number], "twice in one flush"
                assert at > seen[number].get(run, 0) or run in seen[number]
                since_flush[number].add(run)
                seen[number][run] = at

    for _ in range(60):
        for _ in range(rng.randrange(1, 10)):
            step()
        for runs in since_flush:
            runs.clear()
        for _ in board.flush():
            if rng.random() < 0.2:
                step()
        take()
    while board.due:
        for runs in since_flush:
            runs.clear()
        flush(board)
        take()

    for number in range(len(clients)):
        mine = {key for (client, _), key in keys.items() if client == number}
        for run, one in newest.items():
            covering = {ALL, ("ann", "agent", one.agent), ("ann", "thread", one.thread), run_key("ann", run)}
            if mine & covering:
                assert seen[number].get(run) == one.seq, (number, run)
