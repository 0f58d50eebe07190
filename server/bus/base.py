"""The bus: what a backend must do so that the guarantees hold. Memory and Redis pass one contract suite.

A run's log is a sequence of frames without holes, written by one owner. An *epoch* names one incarnation of the log:
positions of different epochs cannot be compared. A *fence* names one ownership: a newer claim makes the older one
void. A *snapshot* is the state after one seq, and the log may be trimmed up to the saved one.

Frames carry run, epoch, seq and ready bytes, so routing parses nothing. This module must not know what is inside a
frame, who follows a run, or how agents work.

- G1, G2: `subscribe` is confirmed when it returns, so who then reads heads and pages misses nothing; a page either
  continues exactly after the position asked for or is `None`.
- G5: `append` raises `Unavailable` while the bus cannot take a batch; the same batch may be tried again at will.
- G7: `append` checks before it writes: after the terminal event, or from a fenced owner, nothing is written.
"""

import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import anyio
from anyio.abc import TaskStatus

Status = Literal["queued", "running", "cancelling", "done", "failed", "cancelled"]
ACTIVE: frozenset[Status] = frozenset({"queued", "running", "cancelling"})

TTL = 24 * 3600.0
"""Seconds that an ended run stays, where it is not the number of runs that decides."""
KEY_TTL = 24 * 3600.0
"""Seconds that an idempotency key holds."""
LOG_EVENTS = 10_000
LOG_BYTES = 4 * 1024 * 1024
"""What a log keeps for replay, at least: it is trimmed to these once a snapshot covers what goes."""
FEED_LENGTH = 10_000
"""Announcements that the feed reaches back."""
APPEND_BYTES = 1024 * 1024
"""What one append takes at most, and what is published of it, with all that a bus puts around the frames."""
PAGE_EVENTS = 200
PAGE_BYTES = 1024 * 1024
"""A page is never larger, except by its last frame."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One event of a run, encoded. At detail `progress` it is shown only if `progress` is set."""

    run: str
    epoch: str
    seq: int
    data: bytes
    progress: bool = True
    terminal: bool = False


_AROUND_FRAME, _AROUND_APPEND = 32, 4 * 1024


def append_size(frames: Iterable[Frame]) -> int:
    """The bytes that an append of these frames is taken for."""
    return _AROUND_APPEND + sum(len(frame.data) + _AROUND_FRAME for frame in frames)


def first_part(frames: Sequence[Frame]) -> Sequence[Frame]:
    """As many of the frames, from the first on, as one append takes; at least one."""
    size = append_size(())
    for count, frame in enumerate(frames):
        size += len(frame.data) + _AROUND_FRAME
        if count and size > APPEND_BYTES:
            return frames[:count]
    return frames


def check_append(frames: Sequence[Frame]) -> None:
    """:raises ValueError: the frames are too many for one append. A single frame never is: its event is bounded."""
    if len(frames) > 1 and (size := append_size(frames)) > APPEND_BYTES:
        raise ValueError(f"an append of {size} bytes; it takes {APPEND_BYTES} at most")


@dataclass(frozen=True, slots=True)
class Head:
    """Where a log stands. Delivered to subscribers instead of frames after a `rebase`, or where some may be missed."""

    run: str
    epoch: str
    seq: int
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Gone:
    """The bus has lost a run, and no owner has restored it. Delivered to its subscribers."""

    run: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The encoded `RunState` after event `seq` of `epoch`."""

    run: str
    epoch: str
    seq: int
    state: bytes
    ended: bool = False
    """Whether `seq` is known to be the last event of all. Told by `load_state`; buses need not keep it."""


@dataclass(frozen=True, slots=True)
class Page:
    """The frames that follow a position, oldest first; empty at the head. `head` is the newest seq of the log."""

    frames: Sequence[Frame]
    head: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What the bus knows of a run without looking into its log."""

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
    """The oldest seq that the log holds; beyond `head` if it holds nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """A run to create. `first` is its first frame (seq 1). `fingerprint` tells whether a reused `key` means the same
    start."""

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
    """What a run's log began with, and is begun with anew if the bus loses it."""

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
    """Which runs `list` is to give: newest first, created before run `before`. None means any."""

    principal: str | None = None
    agent: str | None = None
    thread: str | None = None
    statuses: Collection[Status] | None = None
    before: str | None = None
    limit: int = 100

    def fits(self, info: RunInfo) -> bool:
        """Whether a run fits, its place aside."""
        return (
            (self.principal is None or info.principal == self.principal)
            and (self.agent is None or info.agent == self.agent)
            and (self.thread is None or info.thread == self.thread)
            and (self.statuses is None or info.status in self.statuses)
        )


Deliver = Callable[[Sequence[Frame] | Head | Gone], None]
"""Takes news of one run, in order, on the event loop. Must not block or raise."""
Announce = Callable[[Announcement | None], None]
"""Takes one announcement, or None: some may have been missed, which `read_feed` tells. Must not block or raise."""
CommandHandler = Callable[[str, Mapping[str, Any]], Awaitable[None]]
"""Handles a command to a run of this process: what a client asked for, or `{"op": "verify"}` when the bus may have lost
some of the run's log."""


class Subscription(Protocol):
    def close(self) -> None:
        """No delivery follows. Idempotent; never raises, never waits."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A run whose news is delivered."""

    info: RunInfo
    subscription: Subscription


class Registration:
    """A `Subscription` to anything: closing it takes the entry out again. `remove` may be called twice."""

    def __init__(self, remove: Callable[[], object]) -> None:
        self._remove = remove

    def close(self) -> None:
        self._remove()


class Bus(Protocol):
    """Every method may raise `Unavailable`; unknown runs raise `NotFound` unless said otherwise."""

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Do the bus's own work until cancelled. Must be running while the rest is used."""

    @property
    def degraded(self) -> str | None:
        """Why the bus does not work at the moment, for people; None if it does."""

    @property
    def counters(self) -> Mapping[str, int]:
        """What the bus counts of its own work, for operators."""

    async def create(self, new: NewRun) -> Created:
        """Create the log with its first frame and announce it in the feed; one wins if several try with one key.

        A run that failed with its second event, and so never began, gives its key back: its `create` may have been
        carried out after its caller had given up, and a repeated start must not find nothing but that.

        :raises Conflict: the key was used with another fingerprint.
        """

    async def claim(self, run: str) -> int:
        """Become the owner; earlier owners are fenced off.

        :raises Ended: the log has its terminal event.
        """

    async def append(self, run: str, fence: int, frames: Sequence[Frame], status: Status) -> None:
        """Add frames after the head, all or none, and deliver them. A batch wholly at or below the head is a retry
        and changes nothing. More than `APPEND_BYTES` is to be appended in parts (`first_part`).

        :raises ValueError: the batch is larger than that, and of more than one frame.
        :raises Fenced: another owner has claimed the run.
        :raises Ended: the log has its terminal event.
        :raises HeadMismatch: the batch neither follows the head nor is a retry.
        """

    async def rebase(
        self, run: str, fence: int, seq: int, state: bytes, status: Status, origin: Origin | None = None
    ) -> str:
        """Begin a new epoch, whose log is empty, at `seq` with the owner's state as its snapshot. A run that the bus
        has lost is created anew from `origin`. Gives the new epoch.

        :raises Fenced: another owner has claimed the run.
        :raises Ended: the log has its terminal event.
        """

    async def info(self, runs: Collection[str]) -> dict[str, RunInfo]:
        """What is known of each run; unknown ones are left out."""

    async def read(self, run: str, epoch: str, after: int) -> Page | None:
        """The page after `after`; None if the log of that epoch does not hold exactly what follows it."""

    async def save_snapshot(self, fence: int, snapshot: Snapshot) -> None:
        """Replace the run's snapshot; the log may then be trimmed up to it.

        :raises Fenced: another owner has claimed the run.
        """

    async def load_snapshot(self, run: str) -> Snapshot | None:
        """The newest saved snapshot, if there is one."""

    async def open(self, deliver: Mapping[str, Deliver]) -> dict[str, Opened]:
        """Deliver all news of these runs from now on, and tell where they stand."""

    async def subscribe(self, run: str, deliver: Deliver) -> Subscription:
        """Deliver all news of `run` from now on; confirmed when this returns."""

    async def list(self, filter: Filter) -> Sequence[RunInfo]:
        """The runs that fit, newest first."""

    async def watch_feed(self, announce: Announce) -> tuple[Subscription, str]:
        """Announce every run created from now on; with the feed's position now."""

    async def read_feed(self, after: str) -> Sequence[Announcement] | None:
        """The announcements after a position, with all that were made before this was asked; None if the feed does not
        reach back to it (or never had it)."""

    async def send_command(self, run: str, command: Mapping[str, Any]) -> None:
        """Have the run's owner, in whatever process, handle `command`; returns when it has.

        :raises Unavailable: no owner answers.
        """

    async def handle_commands(self, handler: CommandHandler) -> Subscription:
        """Handle the commands to runs that this process owns."""

    async def orphans(self, mine: Collection[str]) -> Sequence[str]:
        """Active runs that nobody executes: their process is gone, or is this one and they are not `mine`. To be asked
        about once a second; a process is taken for gone only after several askings."""

    async def fenced(self, fences: Mapping[str, int]) -> Collection[str]:
        """Which of these runs another owner has claimed, each given with the fence that it was owned under. Runs that
        the bus has lost are not among them. To be asked about once a second.
        """

    async def check(self) -> None:
        """Send a probe through the real path and see it arrive."""

    async def aclose(self) -> None:
        """Let go of everything."""


_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_last_stamp = 0


def stamp(micros: int) -> str:
    """How the ids of runs begin that were created at a Unix time, in microseconds."""
    digits = ""
    while micros:
        micros, digit = divmod(micros, 36)
        digits = _ALPHABET[digit] + digits
    return digits.rjust(11, "0")


def new_run_id() -> str:
    """Sortable by creation (microseconds first, never twice the same in one process), and unguessable: 100 random
    bits follow."""
    global _last_stamp
    _last_stamp = micros = max(_last_stamp + 1, time.time_ns() // 1_000)
    return stamp(micros) + "".join(secrets.choice(_ALPHABET) for _ in range(20))


def new_epoch() -> str:
    return secrets.token_hex(4)
