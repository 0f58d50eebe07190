"""Every error that a client can get, and every way in which a connection ends.

    AgentcastError
    ├── CommandError          a command cannot be done; has a protocol code
    │   ├── BadRequest        bad_request       the message is not a command
    │   ├── UnknownOp         unknown_op
    │   ├── UnknownAgent      unknown_agent
    │   ├── InvalidInput      invalid_input     details: pydantic's error list, without the input
    │   ├── NotFound          not_found
    │   ├── AlreadyFinished   already_finished
    │   ├── Conflict          conflict          an idempotency key was used for something else
    │   ├── TooMany           too_many
    │   ├── Forbidden         forbidden
    │   └── Unavailable       unavailable       retryable: the same command may work later
    ├── BusError              the bus will not do; stops the start
    └── LogError              an append was refused; never reaches a client
        ├── Fenced            another process owns the run now
        ├── Ended             the log has its terminal event
        └── HeadMismatch      the log is not what its owner thinks: `rebase`

What lives here must not know how errors travel. HTTP statuses stand beside the codes so that one table maps both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


class AgentcastError(Exception):
    """Base of all errors of the hub."""


class CommandError(AgentcastError):
    """A command cannot be done. `message` says what was wrong, where, and what to do."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, details: Any = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def wire(self) -> dict[str, Any]:
        """`{code, message, retryable, details?}` as in replies and HTTP errors."""
        error: dict[str, Any] = {"code": self.code, "message": self.message, "retryable": self.retryable}
        if self.details is not None:
            error["details"] = self.details
        return error


class BadRequest(CommandError):
    code, status = "bad_request", 400


class UnknownOp(CommandError):
    code, status = "unknown_op", 400


class UnknownAgent(CommandError):
    code, status = "unknown_agent", 404


class InvalidInput(CommandError):
    code, status = "invalid_input", 422


class NotFound(CommandError):
    code, status = "not_found", 404


class AlreadyFinished(CommandError):
    code, status = "already_finished", 409


class Conflict(CommandError):
    code, status = "conflict", 409


class TooMany(CommandError):
    code, status = "too_many", 429


class Forbidden(CommandError):
    code, status = "forbidden", 403


class Unavailable(CommandError):
    code, status, retryable = "unavailable", 503, True


def command_error(wire: Mapping[str, Any]) -> CommandError:
    """The error that `CommandError.wire` described, in another process perhaps."""
    kind = next((kind for kind in CommandError.__subclasses__() if kind.code == wire["code"]), CommandError)
    return kind(wire["message"], details=wire.get("details"))


class BusError(AgentcastError):
    """What the bus is to run on cannot be reached or will not do. The text says why and what to do."""


class LogError(AgentcastError):
    """An append to a run's log was refused."""

    def __init__(self, run: str) -> None:
        super().__init__(run)
        self.run = run

    def __str__(self) -> str:
        return f"run {self.run}: {type(self).__name__}"


class Fenced(LogError):
    """Another process has claimed the run."""


class Ended(LogError):
    """The log already has its terminal event."""


class HeadMismatch(LogError):
    """The batch does not follow the head of the log, which is at `head` in `epoch`."""

    def __init__(self, run: str, epoch: str, head: int) -> None:
        super().__init__(run)
        self.epoch = epoch
        self.head = head

    def __str__(self) -> str:
        return f"run {self.run}: the log is at {self.head} of epoch {self.epoch}"


@dataclass(frozen=True, slots=True)
class CloseReason:
    """Why the hub closes a connection. Codes 4500–4999 tell a client not to come back; 4000–4499 to."""

    code: int
    reason: str


SHUTTING_DOWN = CloseReason(4001, "shutting_down")
RUN_LOST = CloseReason(4003, "run_lost")
LIMIT_EXCEEDED = CloseReason(4504, "limit_exceeded")
PROTOCOL_ERROR = CloseReason(4503, "protocol_error")
BINARY_MESSAGE = CloseReason(1003, "send JSON as text messages")
MESSAGE_TOO_BIG = CloseReason(1009, "message over limits.message_bytes")
INTERNAL_ERROR = CloseReason(1011, "internal error")
