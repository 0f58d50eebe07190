"""The facts that a bus takes and gives, and the callbacks that it calls. `bus.base` says what a bus does with them.

Frames and summaries carry run, epoch, seq and ready bytes, so routing parses nothing. This module must not know what is
inside those bytes.
"""

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

Status = Literal["queued", "running", "cancelling", "done", "failed", "cancelled"]
ACTIVE: frozenset[Status] = frozenset({"queued", "running", "cancelling"})


@dataclass(frozen=True, slots=True)
class Frame:
    """One event of a run, encoded. Clients with detail `progress` get it only if `progress` is set."""

    run: str
    epoch: str
    seq: int
    data: bytes
    progress: bool = True
    terminal: bool = False


@dataclass(frozen=True, slots=True)
class Head:
    """Where a log stands. Subscribers get it instead of frames after a `rebase`, or where they may have missed some."""

    run: str
    epoch: str
    seq: int
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Gone:
    """The bus has lost a run, and no owner has restored it."""

    run: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The encoded `RunState` after event `seq` of `epoch`."""

    run: str
    epoch: str
    seq: int
    state: bytes
    ended: bool = False
    """Whether `seq` is known to be the run's last event. `load_state` sets it; buses need not keep it."""


@dataclass(frozen=True, slots=True)
class Page:
    """The frames that follow a position, oldest first; empty at the head. `head` is the newest seq of the log."""

    frames: Sequence[Frame]
    head: int


class Ends(NamedTuple):
    """The data of the first and the last frame of a run (seq 1 and `head`), as far as the bus has them."""

    first: bytes | None
    last: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What the bus knows of a run without reading its log."""

    run: str
    agent: str
    principal: str
    thread: str | None
    epoch: str
    head: int
    status: Status
    created: float
    ended: float | None = None
    oldest: int = 1
    """The oldest seq that the log holds; beyond `head` if it holds none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run looks like in a list after event `seq` of `epoch`, written by the owner that holds `fence`.

    `data` is a JSON object that clients get unchanged. The other fields serve routing, filtering and sorting.
    """

    run: str
    epoch: str
    seq: int
    fence: int
    principal: str
    agent: str
    thread: str | None
    status: Status
    created: float
    data: bytes

    def replaces(self, other: "Summary | None") -> bool:
        """Whether this one is to be kept instead of `other`, another summary of the run."""
        return other is None or self.epoch != other.epoch or self.seq >= other.seq


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """A run to create. `first` is its first frame (seq 1). `fingerprint` shows whether a start that reuses `key` is the
    same start."""

    run: str
    epoch: str
    agent: str
    principal: str
    thread: str | None
    created: float
    first: Frame
    key: str | None = None
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a bus that has lost a run needs to create it again."""

    agent: str
    principal: str
    thread: str | None
    created: float


@dataclass(frozen=True, slots=True)
class Created:
    """The run that `create` made, with the fence of its owner; or, with `fence` None, the run that its key names."""

    run: str
    epoch: str
    fence: int | None


@dataclass(frozen=True, slots=True)
class Announcement:
    """A run was created. `position` is the feed's after this entry."""

    position: str
    run: str
    epoch: str
    agent: str
    thread: str | None
    principal: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which runs `list` returns, and in which order: by creation. None stands for any.

    `before` is the id of a run, which need not exist: only runs that come after it in the given order are returned.
    """

    principal: str | None = None
    agent: str | None = None
    thread: str | None = None
    statuses: Collection[Status] | None = None
    order: Literal["newest", "oldest"] = "newest"
    before: str | None = None
    limit: int = 100
    """At least 1."""

    def fits(self, info: RunInfo) -> bool:
        """Whether a run passes the filter; `before` is not looked at."""
        return (
            (self.principal is None or info.principal == self.principal)
            and (self.agent is None or info.agent == self.agent)
            and (self.thread is None or info.thread == self.thread)
            and (self.statuses is None or info.status in self.statuses)
        )


class Listing(list[RunInfo]):
    """One page of runs, which may hold fewer than its limit, or none, though there are more.

    `next` is what `Filter.before` takes to get the following page; None on the last page.
    """

    def __init__(self, runs: Iterable[RunInfo] = (), next: str | None = None) -> None:
        super().__init__(runs)
        self.next = next


Update = Sequence[Frame] | Head | Gone
"""What happened to a run: frames were appended, the log stands elsewhere, or the run is lost."""
Deliver = Callable[[Update], None]
"""Takes the updates of one run, in order, on the event loop. Must not block or raise."""
DeliverSummaries = Callable[[Sequence[Summary] | None], None]
"""Takes new summaries of any runs, or None when some may have been missed. Must not block or raise."""
Announce = Callable[[Announcement | None], None]
"""Takes one announcement, or None when some may have been missed: `read_feed` has them. Must not block or raise."""
CommandHandler = Callable[[str, Mapping[str, Any]], Awaitable[None]]
"""Handles a command to a run of this process: what a client asked for, or `{"op": "verify"}` when the bus may have lost
some of the run's log."""


class Subscription(Protocol):
    def close(self) -> None:
        """No delivery follows. Idempotent; never raises, never waits."""


class Registration:
    """A `Subscription` to anything: closing it calls `remove`, which may be called twice."""

    __slots__ = ("_remove",)

    def __init__(self, remove: Callable[[], object]) -> None:
        self._remove = remove

    def close(self) -> None:
        self._remove()


@dataclass(frozen=True, slots=True)
class Opened:
    """A run and the subscription to its updates: `info` misses nothing that came before the first delivery."""

    info: RunInfo
    subscription: Subscription
