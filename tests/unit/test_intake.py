"""What a client may send: frames one at a time, and a budget that fills with time."""

from hypothesis import given
from hypothesis import strategies as st

from agentcast.server.edge.intake import (
    BYTES_AT_ONCE,
    BYTES_PER_SECOND,
    FRAMES_AT_ONCE,
    FRAMES_PER_SECOND,
    FRAMES_PER_TURN,
    OVERSPENDING,
    Budget,
    FrameParser,
)
from tests.support.raw import frame

TEXT, PING = 1, 9


@given(st.lists(st.integers(1, 40)))
def test_frames_come_one_at_a_time_however_they_are_cut(cuts: list[int]) -> None:
    payloads = [b"a", b"", b"c" * 100, b"dd"]
    data = b"".join(frame(TEXT, payload) for payload in payloads)
    parser, found = FrameParser(), []
    for cut in [*cuts, len(data)]:
        parser.feed(data[:cut])
        data = data[cut:]
        while (one := parser.next_frame()) is not None:
            found.append(bytes(one.data))
    assert found == payloads
    assert parser.buffered == 0


def test_what_is_not_asked_for_is_not_parsed() -> None:
    parser = FrameParser()
    parser.feed(frame(PING, b"x") * 1_000)
    assert parser.next_frame() is not None
    assert parser.buffered == len(frame(PING, b"x")) * 999
    assert len(parser.data_to_send()) == 1


def test_after_an_error_what_comes_is_discarded() -> None:
    parser = FrameParser()
    parser.feed(b"\xff\xff" + frame(TEXT, b"x") * 100)
    assert parser.next_frame() is None
    assert parser.parser_exc is not None
    parser.feed(b"x" * 1_000)
    assert parser.next_frame() is None
    assert parser.buffered == 0


def test_a_message_over_the_limit_is_refused_at_its_header() -> None:
    parser = FrameParser()
    parser.feed(b"\x81\xff" + (300_000).to_bytes(8, "big"))
    assert parser.next_frame() is None
    assert parser.close_sent is not None
    assert parser.close_sent.code == 1009


def test_spent_budget_comes_back_with_time() -> None:
    budget = Budget(0.0)
    budget.spend(FRAMES_AT_ONCE, 0, 0.0)
    assert budget.spent
    assert budget.delay == FRAMES_PER_TURN / FRAMES_PER_SECOND
    budget.fill(budget.delay)
    assert not budget.spent


def test_bytes_are_counted_as_well_as_frames() -> None:
    budget = Budget(0.0)
    budget.spend(1, BYTES_AT_ONCE + BYTES_PER_SECOND // 2, 0.0)
    assert budget.spent
    assert budget.delay == 0.5


def test_no_more_is_saved_up_than_fits() -> None:
    budget = Budget(0.0)
    budget.fill(3_600.0)
    budget.spend(FRAMES_AT_ONCE, 0, 3_600.0)
    assert budget.spent


def test_a_client_is_exhausted_once_its_budget_was_never_full_for_long() -> None:
    budget, now = Budget(0.0), 0.0
    while now < OVERSPENDING:
        assert not budget.is_exhausted(now)
        budget.fill(now)
        budget.spend(FRAMES_AT_ONCE, 0, now)
        now += 1.0
    assert budget.is_exhausted(now)


def test_a_budget_that_was_full_again_is_forgiven() -> None:
    budget = Budget(0.0)
    budget.spend(FRAMES_AT_ONCE, 0, 0.0)
    budget.fill(OVERSPENDING)
    assert not budget.is_exhausted(OVERSPENDING)
