"""One connection's place in one run, and the states that it goes through.

    joining → behind ⇄ live → done
    joining, behind, live → resync → behind

Only the run's topic changes the state (`RunTopic`); anything else is an `IllegalTransition`.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

from agentcast.server.protocol import Detail

if TYPE_CHECKING:
    from agentcast.server.hub.outbox import Outbox
    from agentcast.server.hub.topic import RunTopic

GapReason = Literal["trimmed", "overflow", "log_lost"]
ResyncReason = GapReason | Literal["asked"]


class State(Enum):
    """What a follower is sent, and by whom."""

    JOINING = "joining"
    """Nothing yet: the reply to the command that made it is still to come."""
    BEHIND = "behind"
    """The log after its cursor, pulled while the connection has room."""
    LIVE = "live"
    """Each new frame, as it is delivered. It has everything up to the head."""
    RESYNC = "resync"
    """A snapshot: what follows its cursor cannot, or is not to, be replayed."""
    DONE = "done"
    """Nothing more."""


NEXT: dict[State, frozenset[State]] = {
    State.JOINING: frozenset({State.BEHIND, State.RESYNC, State.DONE}),
    State.BEHIND: frozenset({State.LIVE, State.RESYNC, State.DONE}),
    State.LIVE: frozenset({State.BEHIND, State.RESYNC, State.DONE}),
    State.RESYNC: frozenset({State.BEHIND, State.DONE}),
    State.DONE: frozenset(),
}


class IllegalTransition(RuntimeError):
    """A follower was to leave its state for one that does not follow it."""

    def __init__(self, run: str, state: State, target: State) -> None:
        super().__init__(run, state, target)
        self.run = run
        self.state = state
        self.target = target

    def __str__(self) -> str:
        return f"a follower of run {self.run} is {self.state.value}, and cannot become {self.target.value}"


@dataclass(slots=True, eq=False)
class Follower:
    """It has everything up to `cursor` of `epoch`; while it is live, everything up to the topic's head."""

    topic: "RunTopic"
    outbox: "Outbox"
    wants: dict[str, Detail]
    """Subscription → the detail that it asked for."""
    epoch: str = field(init=False)
    cursor: int = 0
    state: State = State.JOINING
    resync: ResyncReason | None = None
    """Why a snapshot is due, if one is. Except where it was asked for, a `gap` with this reason precedes it."""
    whole: bool = False
    """The log was asked for from its start: being far from the head is no reason for a snapshot."""
    shown: bool = False
    """Something of the run was queued, so the client knows of it."""
    full: bool = field(init=False)
    """Whether any subscription wants every event."""

    def __post_init__(self) -> None:
        self.epoch = self.topic.epoch
        self.full = "full" in self.wants.values()

    @property
    def run(self) -> str:
        return self.topic.run

    @property
    def done(self) -> bool:
        return self.state is State.DONE

    def want(self, wants: dict[str, Detail]) -> bool:
        """Add subscriptions; whether that raises the detail."""
        before = self.full
        self.wants.update(wants)
        self.full = "full" in self.wants.values()
        return self.full and not before

    def unwant(self, subscription: str) -> None:
        """Take a subscription away."""
        self.wants.pop(subscription, None)
        self.full = "full" in self.wants.values()
