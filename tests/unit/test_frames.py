"""Frames as they go over the wire."""

import pytest
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from agentcast.server.hub.frames import Batch


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 300_000])
def test_a_client_reads_what_was_framed(size: int) -> None:
    payloads = [b"a", b"x" * size, b"b"]
    client = ClientProtocol(parse_uri("ws://localhost/"), state=State.OPEN, max_size=None)
    client.receive_data(Batch(payloads).framed)
    frames = client.events_received()
    assert all(isinstance(frame, Frame) and frame.opcode is Opcode.TEXT and frame.fin for frame in frames)
    assert [bytes(frame.data) for frame in frames if isinstance(frame, Frame)] == payloads


def test_a_batch_is_framed_once_and_knows_its_size() -> None:
    batch = Batch([b"one", b"three"])
    assert batch.framed is batch.framed
    assert (len(batch), batch.size) == (2, 8)
