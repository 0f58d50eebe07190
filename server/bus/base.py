"""The bus: what a backend must do so that the guarantees hold. Memory and Redis pass one contract suite.

A run's log is a sequence of frames without holes, written by one owner. An *epoch* names one incarnation of the log:
positions of different epochs cannot be compared. A *fence* names one ownership: a newer claim makes the older one
void. A *snapshot* is the state after one seq, and the log may be trimmed up to the saved one. A *summary* is a small
record of a run for lists: only the newest counts.

Frames and summaries carry ready bytes, so routing parses nothing. This module must not know what is inside them, who
follows a run, or how agents work.

- G1, G2: `open` subscribes before it reads where each log stands, so a caller that then reads pages misses nothing; a
  page either continues exactly after the position asked for or is `None`.
- G5: `append` raises `Unavailable` while the bus cannot take a batch; the caller may try the same batch again.
- G7: `append` checks before it writes: after the terminal event, or from a fenced owner, nothing is written.
"""

import secrets
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import anyio
from anyio.abc import TaskStatus

from agentcast.server.bus.types import (
    ACTIVE,
    Announce,
    Announcement,
    CommandHandler,
    Created,
    Deliver,
    DeliverSummaries,
    Ends,
    Filter,
    Frame,
    Gone,
    Head,
    Listing,
    NewRun,
    Opened,
    Origin,
    Page,
    Registration,
    RunInfo,
    Snapshot,
    Status,
    Subscription,
    Summary,
    Update,
)

__all__ = [
    "ACTIVE",
    "Announce",
    "Announcement",
    "Bus",
    "CommandHandler",
    "Created",
    "Deliver",
    "DeliverSummaries",
    "Ends",
    "Filter",
    "Frame",
    "Gone",
    "Head",
    "Listing",
    "NewRun",
    "Opened",
    "Origin",
    "Page",
    "Registration",
    "RunInfo",
    "Snapshot",
    "Status",
    "Subscription",
    "Summary",
    "Update",
]

TTL = 24 * 3600.0
"""Seconds that a bus keeps an ended run, unless it bounds their number."""
KEY_TTL = 24 * 3600.0
"""Seconds that an idempotency key holds."""
LOG_EVENTS = 10_000
LOG_BYTES = 4 * 1024 * 1024
"""What a log keeps for replay, at least: it is trimmed to these once a snapshot covers the rest."""
FEED_LENGTH = 10_000
"""Announcements that the feed reaches back."""
APPEND_BYTES = 1024 * 1024
"""The most that one append takes, with all that a bus puts around the frames; also the largest published message."""
PAGE_EVENTS = 200
PAGE_BYTES = 1024 * 1024
"""A page is never larger, except by its last frame."""
SUMMARY_BYTES = 2 * 1024
"""The largest `data` of a summary."""
LIST_EXAMINED = 10_000
"""Runs that one `list` looks at, at most, however few of them pass the filter."""


_AROUND_FRAME, _AROUND_APPEND = 32, 4 * 1024


def append_size(frames: Iterable[Frame]) -> int:
    """The bytes that an append of these frames counts as."""
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
        raise ValueError(f"an append of {size} bytes; the limit is {APPEND_BYTES}")


def check_summaries(records: Iterable[Summary]) -> None:
    """:raises ValueError: a record is too large."""
    for record in records:
        if (size := len(record.data)) > SUMMARY_BYTES:
            raise ValueError(f"the summary of run {record.run} has {size} bytes; the limit is {SUMMARY_BYTES}")


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

        A run that failed with its second event never started, and releases its key: the bus may have carried out its
        `create` after the caller had given up, and a repeated start must get a new run then.

        :raises Conflict: the key was used with another fingerprint.
        """

    async def claim(self, run: str) -> int:
        """Become the owner; earlier owners are fenced off.

        :raises Ended: the log has its terminal event.
        """

    async def append(self, run: str, fence: int, frames: Sequence[Frame], status: Status) -> None:
        """Add frames after the head, all or none, and deliver them. A batch wholly at or below the head is a retry
        and changes nothing. Append more than `APPEND_BYTES` in parts (`first_part`).

        :raises ValueError: the batch is larger than that, and of more than one frame.
        :raises Fenced: another owner has claimed the run.
        :raises Ended: the log has its terminal event.
        :raises HeadMismatch: the batch neither follows the head nor is a retry.
        """

    async def rebase(
        self, run: str, fence: int, seq: int, state: bytes, status: Status, origin: Origin | None = None
    ) -> str:
        """Start a new epoch, whose log is empty, at `seq`, with the owner's state as its snapshot. A run that the bus
        has lost is created again from `origin`. Returns the new epoch.

        :raises Fenced: another owner has claimed the run.
        :raises Ended: the log has its terminal event.
        """

    async def info(self, runs: Collection[str]) -> dict[str, RunInfo]:
        """What the bus knows of each run; unknown ones are left out."""

    async def read(self, run: str, epoch: str, after: int) -> Page | None:
        """The page after `after`; None if the log of that epoch does not hold exactly what follows it."""

    async def read_ends(self, runs: Collection[str]) -> dict[str, Ends]:
        """The first and the last frame of each run; unknown runs are left out. Trimming keeps the first frame, and a
        `rebase` too. The number of round trips depends on the bytes only, not on the number of runs."""

    async def save_snapshot(self, fence: int, snapshot: Snapshot) -> None:
        """Replace the run's snapshot; the log may then be trimmed up to it.

        :raises Fenced: another owner has claimed the run.
        """

    async def load_snapshot(self, run: str) -> Snapshot | None:
        """The newest saved snapshot, if there is one."""

    async def open(self, deliver: Mapping[str, Deliver]) -> dict[str, Opened]:
        """Subscribe to the updates of many runs, and then read where each stands: no update falls between.

        Unknown runs are left out and not subscribed. When this raises or is cancelled, it leaves no subscription.
        Any number of runs needs the same few round trips (one more for every few hundred).
        """

    async def list(self, filter: Filter) -> Listing:
        """One page of the runs that pass the filter. Looks at `LIST_EXAMINED` runs at most, so a page may be short or
        empty before the last one: `Listing.next` says where to go on."""

    # Summaries: of each run only the newest counts.

    async def publish_summaries(self, records: Sequence[Summary]) -> None:
        """Replace the stored summary of each run, and deliver the new ones to all watchers of all processes.

        Silently skips a record whose run is unknown, whose fence or epoch is void, or which is older than the stored
        one of its epoch. A stored summary lives as long as its run.

        :raises ValueError: the `data` of a record exceeds `SUMMARY_BYTES`.
        """

    async def watch_summaries(self, deliver: DeliverSummaries) -> Subscription:
        """Deliver all summaries that are published from now on, in order; confirmed when this returns."""

    async def summaries(self, runs: Collection[str]) -> dict[str, Summary]:
        """The stored summary of each run; runs without one are left out."""

    # The feed, commands, ownership.

    async def watch_feed(self, announce: Announce) -> tuple[Subscription, str]:
        """Announce every run created from now on. Also returns the feed's current position."""

    async def read_feed(self, after: str) -> Sequence[Announcement] | None:
        """The announcements after a position, including all that were made before this call; None if the feed does not
        reach back to the position (or never had it)."""

    async def send_command(self, run: str, command: Mapping[str, Any]) -> None:
        """Have the run's owner, in whatever process, handle `command`; returns when it has.

        :raises Unavailable: no owner answers.
        """

    async def handle_commands(self, handler: CommandHandler) -> Subscription:
        """Handle the commands to runs that this process owns."""

    async def orphans(self, mine: Collection[str]) -> Sequence[str]:
        """Active runs that no process executes: their process has died, or is this one and they are not `mine`. Call
        this once a second; a process counts as dead only after several calls."""

    async def fenced(self, fences: Mapping[str, int]) -> Collection[str]:
        """Which of these runs another owner has claimed; `fences` has the fence that this process owned each under.
        Leaves out runs that the bus has lost. Call this once a second."""

    async def check(self) -> None:
        """Send a probe through the real path and wait for its arrival."""

    async def aclose(self) -> None:
        """Release everything."""


_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_last_stamp = 0


def stamp(micros: int) -> str:
    """The first characters of the ids of runs that were created at a Unix time, in microseconds."""
    digits = ""
    while micros:
        micros, digit = divmod(micros, 36)
        digits = _ALPHABET[digit] + digits
    return digits.rjust(11, "0")


def new_run_id() -> str:
    """A new id: sortable by creation (microseconds come first, and one process never repeats them), and unguessable
    (100 random bits follow)."""
    global _last_stamp
    _last_stamp = micros = max(_last_stamp + 1, time.time_ns() // 1_000)
    return stamp(micros) + "".join(secrets.choice(_ALPHABET) for _ in range(20))


def new_epoch() -> str:
    return secrets.token_hex(4)
