"""How frames and news travel through Redis.

A frame is its seq, flags and length (12 bytes, big endian), then its bytes; the scripts write the same form. News are
`F<epoch> <frames>`, or `H<epoch> <seq>[ ended]` after a rebase.
"""

import struct
from collections.abc import Sequence

from server.bus.base import Frame, Head

_HEADER = struct.Struct(">III")
_PROGRESS, _TERMINAL = 1, 2


def flags(frame: Frame) -> int:
    return (_PROGRESS if frame.progress else 0) | (_TERMINAL if frame.terminal else 0)


def unpack(run: str, epoch: str, packed: bytes) -> list[Frame]:
    frames = []
    start = 0
    while start < len(packed):
        seq, marks, size = _HEADER.unpack_from(packed, start)
        start += _HEADER.size
        data = packed[start : start + size]
        frames.append(Frame(run, epoch, seq, data, bool(marks & _PROGRESS), bool(marks & _TERMINAL)))
        start += size
    return frames


def news(run: str, message: bytes) -> Sequence[Frame] | Head:
    """What a message on the channel of `run` says."""
    head, _, rest = message.partition(b" ")
    epoch = head[1:].decode()
    if head[:1] == b"F":
        return unpack(run, epoch, rest)
    seq, _, ended = rest.partition(b" ")
    return Head(run, epoch, int(seq), ended=bool(ended))
