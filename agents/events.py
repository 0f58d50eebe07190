"""The event vocabulary: every fact that a run can report, one frozen model each, one union.

Field names are those of the wire (docs/protocol.md). What the hub adds to each event (`run`, `seq`, `prev`, `ts`,
`agent`) is not part of the fact and not here. All user data is copied and bounded on construction (`values`), so an
event never aliases live state and always encodes.

`AgentEvent` is what an agent may emit; `Event` adds what only the hub says of a run.
"""

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from agentcast.agents.values import clean_text, cut_piece, cut_text, plain, plain_fields

NAME_BYTES = 256

Id = Annotated[str, Field(min_length=1, max_length=128)]
Name = Annotated[str, AfterValidator(lambda text: cut_text(text, NAME_BYTES))]
Text = Annotated[str, AfterValidator(cut_text)]
Value = Annotated[Any, BeforeValidator(plain)]
Result = Annotated[Any, BeforeValidator(lambda value: plain(value, strict=True))]
Fields = Annotated[dict[str, Any], BeforeValidator(lambda fields: plain_fields(dict(fields)))]
FieldNames = Annotated[tuple[Name, ...], AfterValidator(lambda names: names[:100])]
Number = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[Number, Field(ge=0)]


class _Fact(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    nullable: ClassVar[frozenset[str]] = frozenset()
    """Fields of user data in which `None` is a value of its own and goes to the wire as `null`."""

    def wire(self) -> dict[str, Any]:
        """The fact as the JSON object that goes over the wire: what has no value is left out."""
        return {
            name: value.wire() if isinstance(value, _Fact) else value
            for name, value in self.__dict__.items()
            if value is not None or name in self.nullable
        }


class Usage(_Fact):
    """Tokens of one LM call, or of a run. `cost` is in US dollars."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    cost: float | None = None

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            input_tokens=_within_64_bits(self.input_tokens + other.input_tokens),
            output_tokens=_within_64_bits(self.output_tokens + other.output_tokens),
            cached_tokens=_within_64_bits(_sum(self.cached_tokens, other.cached_tokens)),
            cost=_sum(self.cost, other.cost),
        )


class Failure(_Fact):
    """Why a node or a tool failed. `message` is fit for clients and LMs (G9)."""

    code: Name
    message: Text


class RunFailure(Failure):
    """Why a run failed. `retryable`: the same start may succeed later."""

    retryable: bool = False
    node: Name | None = None


# -- Events of agents ----------------------------------------------------------------------------------------------


class Status(_Fact):
    """Progress in words, for people."""

    event: Literal["status"] = "status"
    message: Text
    span: Id | None = None


class NodeStart(_Fact):
    event: Literal["node_start"] = "node_start"
    span: Id
    parent: Id | None = None
    node: Name
    kind: Literal["graph", "module", "agent"]
    inputs: Fields | None = None


class NodeEnd(_Fact):
    event: Literal["node_end"] = "node_end"
    span: Id
    node: Name
    patch: Fields | None = None
    duration: Seconds


class NodeError(_Fact):
    event: Literal["node_error"] = "node_error"
    span: Id
    node: Name
    error: Failure
    duration: Seconds


class ValidationFailed(_Fact):
    """An output broke its contract. `attempt` counts from 1; `error` is the text for people and for the LM."""

    event: Literal["validation_error"] = "validation_error"
    span: Id
    node: Name
    attempt: int = Field(ge=1)
    max_retries: int = Field(ge=0)
    error: Text
    failed_fields: FieldNames = ()


class StepLimit(_Fact):
    event: Literal["step_limit"] = "step_limit"
    max_steps: int
    message: Text


class LmStart(_Fact):
    event: Literal["lm_start"] = "lm_start"
    span: Id
    parent: Id | None = None
    model: Name


class LmEnd(_Fact):
    event: Literal["lm_end"] = "lm_end"
    span: Id
    duration: Seconds
    usage: Usage | None = None
    error: Failure | None = None


class ToolStart(_Fact):
    event: Literal["tool_start"] = "tool_start"
    span: Id
    parent: Id | None = None
    tool: Name
    args: Fields
    server: Name | None = None


class ToolProgress(_Fact):
    event: Literal["tool_progress"] = "tool_progress"
    span: Id
    progress: Number
    total: Number | None = None
    message: Text | None = None


class ToolEnd(_Fact):
    """Holds `result`, or `error` when the tool failed."""

    event: Literal["tool_end"] = "tool_end"
    span: Id
    tool: Name
    duration: Seconds
    result: Value = None
    error: Failure | None = None

    def wire(self) -> dict[str, Any]:
        return super().wire() | ({"result": self.result} if self.error is None else {})


class MessageStart(_Fact):
    """A text begins to stream: `field` of the output of `span`."""

    event: Literal["message_start"] = "message_start"
    message: Id
    span: Id
    field: Name


class Token(_Fact):
    """More of a text. Half of a surrogate pair at an end of `delta` is put together with the other half in the token
    before or after."""

    event: Literal["token"] = "token"
    message: Id
    delta: Annotated[str, AfterValidator(cut_piece)]

    def wire(self) -> dict[str, Any]:
        return super().wire() | {"delta": clean_text(self.delta)}


class MessageEnd(_Fact):
    """A text is whole. The hub makes `text` equal to the joined deltas, sending what is missing as one token."""

    event: Literal["message_end"] = "message_end"
    message: Id
    text: Annotated[str, AfterValidator(clean_text)]


class MessageRetracted(_Fact):
    """A text is void: its output failed validation, or the attempt was retried."""

    event: Literal["message_retracted"] = "message_retracted"
    message: Id
    reason: Text


class StatePatch(_Fact):
    """Sets fields of the agent's own shared state."""

    event: Literal["state"] = "state"
    patch: Fields


class Custom(_Fact):
    """Anything else. Transient: a late joiner does not see it."""

    event: Literal["custom"] = "custom"
    name: Name
    value: Value = None

    nullable = frozenset({"value"})


# -- Events of the hub ---------------------------------------------------------------------------------------------


class RunQueued(_Fact):
    event: Literal["run_queued"] = "run_queued"
    epoch: Id
    input: Fields
    thread: Text | None = None
    position: int | None = None


class RunPosition(_Fact):
    event: Literal["run_position"] = "run_position"
    position: int


class RunStart(_Fact):
    event: Literal["run_start"] = "run_start"
    worker: Name
    attempt: int = 1


class CancelRequested(_Fact):
    event: Literal["cancel_requested"] = "cancel_requested"
    reason: Text | None = None
    by: Name | None = None


class RunEnd(_Fact):
    event: Literal["run_end"] = "run_end"
    result: Result = None
    usage: Usage | None = None
    duration: Seconds

    nullable = frozenset({"result"})


class RunError(_Fact):
    event: Literal["run_error"] = "run_error"
    error: RunFailure
    usage: Usage | None = None
    duration: Seconds


class RunCancelled(_Fact):
    event: Literal["run_cancelled"] = "run_cancelled"
    reason: Text | None = None
    usage: Usage | None = None
    duration: Seconds


AgentEvent = (
    Status
    | NodeStart
    | NodeEnd
    | NodeError
    | ValidationFailed
    | StepLimit
    | LmStart
    | LmEnd
    | ToolStart
    | ToolProgress
    | ToolEnd
    | MessageStart
    | Token
    | MessageEnd
    | MessageRetracted
    | StatePatch
    | Custom
)
Terminal = RunEnd | RunError | RunCancelled
Event = AgentEvent | RunQueued | RunPosition | RunStart | CancelRequested | Terminal

AGENT_EVENTS: tuple[type[BaseModel], ...] = get_args(AgentEvent)
TERMINAL_EVENTS = frozenset({"run_end", "run_error", "run_cancelled"})
FULL_ONLY_EVENTS = frozenset({"token", "message_start", "tool_progress"})
"""Events that detail `progress` does not show."""


def _within_64_bits(count: Any) -> Any:
    """A count that can be encoded, or None: a model may report anything, and the run's last event holds the sum."""
    return None if count is None else max(-(2**63), min(count, 2**63 - 1))


def _sum(one: Any, other: Any) -> Any:
    return other if one is None else one if other is None else one + other
