"""One run of the memory bus: its log, and who gets its updates. The rules of writing are in `memory`."""

from dataclasses import dataclass, field, replace

from agentcast.server.bus.base import (
    Deliver,
    Ends,
    Frame,
    Registration,
    RunInfo,
    Snapshot,
    Subscription,
    Summary,
    Update,
)


@dataclass(slots=True, eq=False)
class Log:
    """The newest frames of a run, without holes up to the head, and what else the bus keeps of it."""

    info: RunInfo
    fence: int = 1
    frames: list[Frame] = field(default_factory=list)
    stored: int = 0
    """Bytes of `frames`."""
    first: bytes | None = None
    """The data of the first frame, once `frames` does not have it any more."""
    snapshot: Snapshot | None = None
    summary: Summary | None = None
    subscribers: dict[object, Deliver] = field(default_factory=dict)

    @property
    def size(self) -> int:
        size = self.stored + len(self.first or b"")
        size += len(self.snapshot.state) if self.snapshot else 0
        return size + (len(self.summary.data) if self.summary else 0)

    @property
    def ended(self) -> bool:
        return self.info.ended is not None

    @property
    def ends(self) -> Ends:
        if not self.frames:
            return Ends(self.first, None)
        first = self.frames[0]
        return Ends(first.data if first.seq == 1 else self.first, self.frames[-1].data)

    def subscribe(self, deliver: Deliver) -> Subscription:
        token = object()
        self.subscribers[token] = deliver
        return Registration(lambda: self.subscribers.pop(token, None))

    def deliver(self, update: Update) -> None:
        for token, deliver in list(self.subscribers.items()):
            if token in self.subscribers:  # one delivery may close another's subscription
                deliver(update)

    def empty(self) -> None:
        """Drop all frames; what `ends` says of the first one stays."""
        self.first = self.ends.first
        self.frames, self.stored = [], 0

    def trim(self, covered: int, events: int, most_bytes: int) -> None:
        """Drop the oldest frames that a snapshot covers, down to `events` and `most_bytes`."""
        drop = 0
        for frame in self.frames:
            over = len(self.frames) - drop > events or self.stored > most_bytes
            if not over or frame.seq > covered:
                break
            drop += 1
            self.stored -= len(frame.data)
        if drop:
            self.first = self.ends.first
            del self.frames[:drop]
            self.info = replace(self.info, oldest=self.info.oldest + drop)
