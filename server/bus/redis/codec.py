"""The bus's types, as Redis stores and publishes them.

A frame is its seq, flags and length (12 bytes, big endian), then its bytes; the scripts write the same form. An update
of a run is `F<epoch> <frames>`, or `H<epoch> <seq>[ ended]` after a rebase. A summary is a line of JSON (all fields but
`data`), then its data; a message has several, each after its length (4 bytes, big endian).
"""

import logging
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import orjson

from agentcast.server.bus.base import Announcement, Frame, Head, NewRun, RunInfo, Summary

logger = logging.getLogger(__name__)

INFO = ("agent", "principal", "thread", "epoch", "head", "status", "created", "ended", "oldest")
"""The fields of a run's hash that make its `RunInfo`."""
_LENGTH = struct.Struct(">I")
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


def update(run: str, message: bytes) -> Sequence[Frame] | Head:
    """The update in a message on the channel of `run`."""
    head, _, rest = message.partition(b" ")
    epoch = head[1:].decode()
    if head[:1] == b"F":
        return unpack(run, epoch, rest)
    seq, _, ended = rest.partition(b" ")
    return Head(run, epoch, int(seq), ended=bool(ended))


def infos(runs: Sequence[str], answers: Sequence[Any]) -> dict[str, RunInfo]:
    """The info of each run, from the answers to `HMGET … INFO`; leaves out unknown and unreadable ones."""
    known = {}
    for run, answer in zip(runs, answers, strict=True):
        if answer[3] is not None:
            try:
                known[run] = info(run, answer)
            except ValueError:
                logger.exception("what Redis holds of run %s cannot be read", run)
    return known


def info(run: str, answer: Sequence[bytes | None]) -> RunInfo:
    agent, principal, thread, epoch, head, status, created, ended, oldest = (
        value and value.decode() for value in answer
    )
    return RunInfo(
        run=run,
        agent=agent or "",
        principal=principal or "",
        thread=thread or None,
        epoch=epoch or "",
        head=int(head or 0),
        status=status,  # type: ignore[arg-type]  # only `append` and `rebase` write it
        created=float(created or 0.0),
        ended=None if ended is None else float(ended),
        oldest=int(oldest or 1),
    )


def pack_summary(record: Summary) -> bytes:
    fields = (record.run, record.epoch, record.seq, record.fence, record.principal, record.agent, record.thread)
    return orjson.dumps((*fields, record.status, record.created)) + b"\n" + record.data


def unpack_summary(packed: bytes) -> Summary:
    """:raises ValueError: it is none."""
    head, _, data = packed.partition(b"\n")
    run, epoch, seq, fence, principal, agent, thread, status, created = orjson.loads(head)
    return Summary(
        run=run,
        epoch=epoch,
        seq=seq,
        fence=fence,
        principal=principal,
        agent=agent,
        thread=thread,
        status=status,
        created=created,
        data=data,
    )


def published_summaries(message: bytes) -> list[Summary]:
    """The summaries in a message, without those that cannot be read."""
    return summaries(_split(message))


def _split(message: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(message):
        (size,) = _LENGTH.unpack_from(message, start)
        start += _LENGTH.size
        yield message[start : start + size]
        start += size


def summaries(stored: Iterable[bytes | None]) -> list[Summary]:
    """The stored summaries, without those that are missing or cannot be read."""
    readable = []
    for packed in stored:
        try:
            if packed is not None:
                readable.append(unpack_summary(packed))
        except (ValueError, TypeError):
            logger.exception("a summary cannot be read")
    return readable


def announcement(new: NewRun) -> bytes:
    return orjson.dumps([new.run, new.epoch, new.agent, new.thread, new.principal])


def announced(number: str, document: bytes) -> Announcement:
    run, epoch, agent, thread, principal = orjson.loads(document)
    return Announcement(f"{number}:{run}", run, epoch, agent, thread, principal)


def announcements(entries: Sequence[Any]) -> list[Announcement]:
    """The entries of the feed, without those that cannot be read."""
    readable = []
    for id, fields in entries:
        try:
            readable.append(announced(id.decode().partition("-")[0], fields[3]))
        except (ValueError, TypeError, IndexError):
            logger.exception("entry %s of the feed cannot be read", id)
    return readable


def entry_position(entry: Any) -> str:
    id, fields = entry
    return f"{id.decode().partition('-')[0]}:{fields[1].decode()}"
