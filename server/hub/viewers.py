"""What the board is made of, and what one connection is yet to be sent of it. See `board`.

A *viewer* is a connection with the runs that it is behind with: it is sent the newest record of each, however often
that has changed (latest wins), and only as far as its outbox has room. Without I/O.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, takewhile

from agentcast.server import protocol
from agentcast.server.bus.base import ACTIVE, Summary
from agentcast.server.hub.frames import Batch
from agentcast.server.hub.outbox import Outbox

MAX_RECORDS = 20_000
"""Runs on the board of a process. Others that somebody watches are left out, and it is said so."""
MAX_BEHIND = MAX_RECORDS
"""Runs that a viewer may be behind with; past it, it is not sent the ends of those that ended first."""
BEHIND_MARGIN = 200
"""How many of them are forgotten at a time, at least."""
FRAME_BYTES = 64 * 1024
"""Records that share a frame."""

Key = tuple[str, str, str]
"""Principal, kind and value of what is watched."""


@dataclass(slots=True, eq=False)
class Slot:
    """A run on the board."""

    record: Summary
    number: int
    """The board's, when the record was taken."""
    groups: dict["Group", None] = field(default_factory=dict)
    """That cover it. It keeps them when it leaves the board: a viewer may yet be behind with it."""

    @property
    def ended(self) -> bool:
        return self.record.status not in ACTIVE


@dataclass(slots=True, eq=False)
class Group:
    """The runs under one key, while somebody watches them."""

    key: Key
    slots: dict[str, Slot] = field(default_factory=dict)
    watches: dict["Watch", None] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    """Active runs that the board has no room for, as far as known."""
    complete: bool = False
    """Whether all its active runs are here, but those left out."""


@dataclass(slots=True, eq=False)
class Watch:
    """One subscription of a viewer. It adds no frame before `Board.begin`."""

    viewer: "Viewer"
    subscription: str
    groups: dict[Group, None]
    named: bool
    """Whether the client has named each of the runs."""
    awaited: set[str] = field(default_factory=set)
    """Runs that it was made for by name: once the last record of all of them was queued, it ends."""
    begun: bool = False


@dataclass(slots=True, eq=False)
class Viewer:
    """One connection."""

    outbox: Outbox
    watches: dict[str, Watch] = field(default_factory=dict)
    groups: dict[Group, int] = field(default_factory=dict)
    """With the number of watches that have begun."""
    behind: dict[str, Slot] = field(default_factory=dict)
    """Runs of which it lacks the newest record, in the order in which they changed."""
    awaiting: dict[str, dict[Watch, None]] = field(default_factory=dict)
    """Run → watches that end with it."""
    joined: dict[Watch, None] = field(default_factory=dict)
    """Watches whose active runs are yet to be shown."""

    def enter(self) -> None:
        """It is behind with the active runs of the watches that have begun."""
        for group in {group: None for watch in self.joined for group in watch.groups}:
            self.lag([slot for slot in group.slots.values() if not slot.ended])
        self.joined.clear()

    def lag(self, slots: Collection[Slot]) -> None:
        """These have changed, and cannot be queued at once."""
        self.behind.update((slot.record.run, slot) for slot in slots)
        if len(self.behind) > MAX_BEHIND:
            self._forget_ends()

    def _forget_ends(self) -> None:
        ended = [slot for slot in self.behind.values() if slot.ended]
        for slot in ended[: len(self.behind) - MAX_BEHIND + BEHIND_MARGIN]:
            del self.behind[slot.record.run]
            for watch in self.watches.values():
                if not slot.groups.keys().isdisjoint(watch.groups):
                    self.outbox.truncate(watch.subscription)

    def forget_uncovered(self) -> None:
        """It has left groups."""
        self.behind = {run: slot for run, slot in self.behind.items() if not slot.groups.keys().isdisjoint(self.groups)}

    def share(self, group: Group, cohort: "Cohort") -> Iterator[Collection[Slot]]:
        """Queue what has changed in a group, which is all that concerns this viewer. Yields what was queued, at most a
        frame at a time."""
        number = 0
        while group in self.groups and (frame := cohort.frame(number)) is not None:
            if not self.outbox.fits(frame.batch):
                self.lag(cohort.slots[frame.first :])
                return
            self.outbox.push(frame.batch)
            yield cohort.slots[frame.first : frame.end]
            number += 1

    def catch_up(self) -> Iterator[Collection[Slot]]:
        """Queue the newest records of what it is behind with, each once, in the same way."""
        queued: set[str] = set()
        while True:
            rest = takewhile(lambda slot: slot.record.run not in queued, self.behind.values())
            slots = _fitting(rest, min(FRAME_BYTES, self.outbox.space))
            if not slots:
                return
            for slot in slots:
                del self.behind[slot.record.run]
                queued.add(slot.record.run)
            self.outbox.push(_framed(slots))
            yield slots


@dataclass(frozen=True, slots=True)
class _Frame:
    batch: Batch
    first: int
    end: int


class Cohort:
    """What has changed in one group, framed once for all that get just that."""

    __slots__ = ("_frames", "slots")

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self._frames: list[_Frame] = []

    def frame(self, number: int) -> _Frame | None:
        """The frame with this number, counted from 0; None after the last."""
        if number == len(self._frames):
            first = self._frames[-1].end if self._frames else 0
            slots = _fitting(islice(self.slots, first, None), FRAME_BYTES)
            if not slots:
                return None
            self._frames.append(_Frame(_framed(slots), first, first + len(slots)))
        return self._frames[number]


def _fitting(slots: Iterable[Slot], size: int) -> list[Slot]:
    """As many, from the first on, as fit into a frame of that size."""
    found: list[Slot] = []
    left = size - len(protocol.summaries(()))
    for slot in slots:
        left -= len(slot.record.data) + 1
        if left < 0:
            break
        found.append(slot)
    return found


def _framed(slots: Collection[Slot]) -> Batch:
    return Batch((protocol.summaries([slot.record.data for slot in slots]),))
