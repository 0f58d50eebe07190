"""A connection that only counts what its outbox asks of it."""

from agentcast.server.errors import CloseReason
from agentcast.server.hub.frames import Batch


class Link:
    """Stands in for a socket."""

    def __init__(self) -> None:
        self.writable = False
        self.written: list[bytes] = []
        self.woken = 0
        self.pulled = 0
        self.cuts: list[CloseReason] = []
        self.failures: list[Exception] = []

    def write(self, batch: Batch) -> bool:
        if self.writable:
            self.written += batch.payloads
        return self.writable

    def wake(self) -> None:
        self.woken += 1

    def pull(self) -> None:
        self.pulled += 1

    def cut(self, reason: CloseReason) -> None:
        self.cuts.append(reason)

    def fail(self, error: Exception) -> None:
        self.failures.append(error)
