"""Batches as a WebSocket client parses them, and stretches of a log that are cut (G2)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.frames import Frame as WireFrame
from websockets.frames import Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from agentcast.server.hub.frames import Batch, Segment
from tests.support.following import frame, frames, segment


def parsed(data: bytes) -> list[WireFrame]:
    """What a client makes of the bytes that a server sends."""
    client = ClientProtocol(parse_uri("ws://hub/ws"), state=State.OPEN, max_size=None)
    client.receive_data(data)
    assert client.parser_exc is None
    return [event for event in client.events_received() if isinstance(event, WireFrame)]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, 1_000_000])
def test_a_payload_of_any_size_arrives_as_one_text_message(size: int) -> None:
    (message,) = parsed(Batch((b"x" * size,)).framed)

    assert (message.opcode, message.fin, message.data) == (Opcode.TEXT, True, b"x" * size)


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_a_batch_arrives_as_its_payloads_in_order(payloads: list[bytes]) -> None:
    batch = Batch(tuple(payloads))

    assert [bytes(message.data) for message in parsed(batch.framed)] == payloads
    assert (len(batch), batch.size) == (len(payloads), sum(map(len, payloads)))


def test_a_batch_is_framed_once_and_a_segment_gives_each_detail_one_batch() -> None:
    part = Segment([frame(1), frame(2, progress=False)])

    assert part.batch(full=True).framed is part.batch(full=True).framed
    assert part.batch(full=True) is part.batch(full=True)
    assert part.batch(full=False) is part.batch(full=False)
    assert part.batch(full=False).payloads == (frame(1).data,)


def test_both_details_share_a_batch_where_progress_shows_everything() -> None:
    part = segment(1, 3)

    assert part.batch(full=False) is part.batch(full=True)


def test_a_segment_may_show_nothing_at_detail_progress() -> None:
    part = Segment([frame(1, progress=False)])

    assert (part.batch(full=False).payloads, part.batch(full=False).framed) == ((), b"")


@given(first=st.integers(1, 50), count=st.integers(1, 30), seq=st.integers(0, 100))
def test_after_and_until_divide_a_segment_at_a_seq(first: int, count: int, seq: int) -> None:
    part = segment(first, first + count - 1)
    later = part.after(seq)

    earlier = list(part.until(seq).frames) if seq >= first else []
    assert [*earlier, *(later.frames if later else [])] == part.frames
    if later is not None:
        assert later.first == max(seq + 1, first)
        assert (later.epoch, later.last) == (part.epoch, part.last)


@given(count=st.integers(1, 20), fitting=st.integers(-2, 25), size=st.integers(0, 800))
def test_the_head_of_a_segment_takes_what_fits_and_the_frame_that_exceeds_it(
    count: int, fitting: int, size: int
) -> None:
    part = segment(1, count, size=40)
    head = part.head(fitting, size)

    assert 1 <= len(head.frames) <= max(fitting, 1)
    assert head.frames == part.frames[: len(head.frames)]
    assert sum(len(one.data) for one in head.frames[:-1]) < max(size, 1)
    if len(head.frames) < count:
        assert len(head.frames) == max(fitting, 1) or head.size >= size


def test_a_segment_knows_what_it_spans() -> None:
    part = Segment([*frames(3, 4), frame(5, terminal=True)])

    assert (part.epoch, part.first, part.last, part.terminal) == ("e", 3, 5, True)
    assert part.size == sum(len(one.data) for one in part.frames)
    assert not part.until(4).terminal
