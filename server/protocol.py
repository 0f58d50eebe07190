"""The wire protocol `agentcast.v1`, without I/O: text in, commands out; facts in, frames out.

Rules and their reasons are in docs/protocol.md. Frames are JSON documents as bytes, each encoded once; an event's
bytes are the same for every client. This module must not know sockets, the hub or how runs work.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, get_args

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from agentcast.agents.inputs.checking import problems
from agentcast.server.errors import BadRequest, CommandError, UnknownOp

SUBPROTOCOL = "agentcast.v1"
VERSION = 1
MESSAGE_BYTES = 256 * 1024
MAX_SUBSCRIPTIONS = 128
MAX_COMMANDS = 64
MAX_SINCE = 5_000
MAX_RUNS = 5_000
"""Runs that one subscription may name."""
MAX_PAGE = 1_000
"""Runs of one page of the list."""
PROTOCOL_ERRORS_PER_MINUTE = 20

ID_CHARS = 128

Detail = Literal["full", "progress"]
"""Which events of a run."""
AnyDetail = Literal["full", "progress", "summary"]
Status = Literal["queued", "running", "cancelling", "done", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = get_args(Status)
CommandId = Annotated[str, StringConstraints(max_length=ID_CHARS)] | int
Key = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class _Shape(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Position(_Shape):
    """How much of a run's log a client has: `seq` of `epoch`. `seq` 0 without an epoch means nothing of it."""

    seq: int = Field(ge=0)
    epoch: Key | None = None


def _exactly_true(value: object) -> object:
    """1 equals True in Python, but not in JSON."""
    return value if value is True else None


class To(_Shape):
    """What a subscription is to: exactly one of the fields."""

    run: Key | None = None
    runs: Annotated[list[Key], Field(min_length=1, max_length=MAX_RUNS)] | None = None
    thread: Key | None = None
    agent: Key | None = None
    all: Annotated[Literal[True], BeforeValidator(_exactly_true)] | None = None

    def model_post_init(self, context: Any) -> None:
        if len(self.model_fields_set) != 1 or not any(self.__dict__.values()):
            raise ValueError(
                'give exactly one of {"run": id}, {"runs": [id, …]}, {"thread": id}, {"agent": name}, {"all": true}'
            )

    @property
    def named(self) -> Sequence[str] | None:
        """The runs that it names; None if it is open-ended."""
        return self.runs if self.run is None else (self.run,)

    def key(self, principal: str) -> tuple[str, str, str]:
        """What an open-ended one asks for: principal, kind, value."""
        if self.agent is not None:
            return principal, "agent", self.agent
        return (principal, "all", "") if self.thread is None else (principal, "thread", self.thread)


class _Command(_Shape):
    id: CommandId | None = None


class Start(_Command):
    op: Literal["start"]
    agent: Key
    input: dict[str, Any]
    thread: Key | None = None
    key: Key | None = None
    subscribe: bool = True
    detail: AnyDetail = "full"


class Subscribe(_Command):
    op: Literal["subscribe"]
    to: To
    detail: AnyDetail = "full"
    since: dict[str, Position] = Field(default_factory=dict, max_length=MAX_SINCE)
    feed: Key | None = None

    def model_post_init(self, context: Any) -> None:
        if self.detail != "summary" and self.to.runs is not None:
            raise ValueError('`to.runs` needs "detail": "summary"; for the events of runs, subscribe to each of them')
        if self.detail == "summary" and (self.since or self.feed is not None):
            raise ValueError(
                'detail "summary" has no positions: leave out `since` and `feed`; the present records always come'
            )


class Unsubscribe(_Command):
    op: Literal["unsubscribe"]
    subscription: Key


class Cancel(_Command):
    op: Literal["cancel"]
    run: Key
    reason: Annotated[str, StringConstraints(max_length=1_000)] | None = None


class List(_Command):
    op: Literal["list"]
    agent: Key | None = None
    thread: Key | None = None
    status: Annotated[list[Status], Field(min_length=1, max_length=len(STATUSES))] | None = None
    order: Literal["newest", "oldest"] = "newest"
    limit: int = Field(default=100, ge=1, le=MAX_PAGE)
    after: Key | None = None
    subscribe: bool = False


class Ping(_Command):
    op: Literal["ping"]


Command = Start | Subscribe | Unsubscribe | Cancel | List | Ping
_COMMANDS: dict[str, TypeAdapter[Command]] = {
    "start": TypeAdapter(Start),
    "subscribe": TypeAdapter(Subscribe),
    "unsubscribe": TypeAdapter(Unsubscribe),
    "cancel": TypeAdapter(Cancel),
    "list": TypeAdapter(List),
    "ping": TypeAdapter(Ping),
}


class Malformed(Exception):
    """A message that is no command. `id` is the command's where it could be read, `error` what to reply."""

    def __init__(self, error: CommandError, id: CommandId | None) -> None:
        super().__init__(error.message)
        self.error = error
        self.id = id


def parse_command(text: str | bytes) -> Command:
    """The command in one text message.

    :raises Malformed: not JSON, no object, an unknown `op`, or a field that is missing or of the wrong type.
    """
    try:
        document = read_json(text)
    except BadRequest as error:
        raise Malformed(error, find_id(text)) from None
    if not isinstance(document, dict):
        raise Malformed(BadRequest("a message must be one JSON object"), None)
    id = document.get("id")
    if isinstance(id, float) or (isinstance(id, str) and "?" in id):  # it may have been another one when it came
        id = find_id(text)
    id = id if (isinstance(id, str) and len(id) <= ID_CHARS) or type(id) is int else None
    op = document.get("op")
    if not isinstance(op, str):
        raise Malformed(BadRequest(f"`op` is missing; known are {_known_ops()}"), id)
    if op not in _COMMANDS:
        raise Malformed(UnknownOp(f"unknown op {op[:64]!r}; known are {_known_ops()}"), id)
    try:
        command: Command = parse(_COMMANDS[op], document)
    except BadRequest as error:
        raise Malformed(error, id) from None
    return command if command.id == id else command.model_copy(update={"id": id})


def read_json(text: str | bytes) -> Any:
    """The JSON document in `text`. Where an escape is half of a surrogate pair, it holds a question mark: UTF-8 has no
    place for such halves, but JavaScript writes them (a text that was cut inside of an emoji).

    :raises BadRequest: it is not JSON; the message says where.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        problem = error
    whole = _replace_half_pairs(text)
    if whole != text:
        try:
            return orjson.loads(whole)
        except orjson.JSONDecodeError as error:
            problem = error
    raise BadRequest(f"not valid JSON: {problem}")


_HALF_PAIR = r"\\(?:u[dD][89abAB][\da-fA-F]{2}\\u[dD][c-fC-F][\da-fA-F]{2}|(u[dD][89a-fA-F][\da-fA-F]{2})|.)"
_ESCAPE = re.compile(_HALF_PAIR, re.DOTALL)
_ESCAPE_BYTES = re.compile(_HALF_PAIR.encode(), re.DOTALL)


def _replace_half_pairs(text: str | bytes) -> str | bytes:
    if isinstance(text, bytes):
        return _ESCAPE_BYTES.sub(lambda match: rb"\u003f" if match[1] else match[0], text)
    return _ESCAPE.sub(lambda match: r"\u003f" if match[1] else match[0], text)


_TOKEN = re.compile(r"""'id'|"(?:[^"\\]++|\\.)*+"?|(?P<open>[{\[]+)|(?P<close>[}\]]+)""", re.DOTALL)
_ID = re.compile(r"""\s*:\s*(?:("(?:[^"\\]|\\.)*+")|(0|-?[1-9]\d{0,127})(?=[\s,}\]]|$))""")


def find_id(text: str | bytes) -> CommandId | None:
    """The `id` of the outermost object in a text that may be no JSON, or None; the last one, as for a parser.

    Linear in the length of the text, however it is nested.
    """
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    depth, id = 0, None
    for token in _TOKEN.finditer(text):
        if token["open"]:
            if depth == 0 and token["open"].startswith("["):
                break
            depth += len(token["open"])
        elif token["close"]:
            depth -= len(token["close"])
            if depth <= 0:
                break
        elif depth == 1 and token.group() in ('"id"', "'id'") and (value := _ID.match(text, token.end())):
            id = _id_of(value)
    return id


def _id_of(value: re.Match[str]) -> CommandId | None:
    if value[2]:
        return int(value[2])
    try:
        id: str = json.loads(value[1])
    except ValueError:
        return None
    return id if len(id) <= ID_CHARS else None


def parse(shape: TypeAdapter[Any], document: Any) -> Any:
    """`document` checked against `shape`.

    :raises BadRequest: naming each field that does not fit; `details` is pydantic's list, without the input.
    """
    try:
        return shape.validate_python(document)
    except ValidationError as error:
        details = problems(error)
        where = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'message'}: {item['msg']}" for item in details)
        raise BadRequest(where, details=details) from None


def _known_ops() -> str:
    return ", ".join(_COMMANDS)


# -- Frames --------------------------------------------------------------------------------------------------------


def encode(document: Any) -> bytes:
    """`document` as JSON bytes."""
    # Copied, since orjson gives each text a buffer of 4 KiB at least, which a frame in a log would go on holding.
    return bytes(memoryview(orjson.dumps(document)))


def encode_event(run: str, agent: str, seq: int, prev: int, ts: float, fact: dict[str, Any]) -> bytes:
    """One run event; `fact` is the wire form of the event itself."""
    return encode(
        {"type": "event", "event": fact["event"], "run": run, "seq": seq, "prev": prev, "ts": ts, "agent": agent} | fact
    )


def hello(session: str, server: str, heartbeat: float) -> bytes:
    return encode(
        {
            "type": "hello",
            "protocol": VERSION,
            "session": session,
            "server": server,
            "heartbeat": heartbeat,
            "limits": {
                "message_bytes": MESSAGE_BYTES,
                "subscriptions": MAX_SUBSCRIPTIONS,
                "commands": MAX_COMMANDS,
            },
        }
    )


def reply(id: CommandId | None, result: dict[str, Any]) -> bytes:
    return encode({"type": "reply", **_id(id), "ok": True, "result": result})


def error_reply(id: CommandId | None, error: CommandError) -> bytes:
    return encode({"type": "reply", **_id(id), "ok": False, "error": error.wire()})


def snapshot(run: str, epoch: str, seq: int, state: bytes) -> bytes:
    """`state` is an encoded `RunState`, put in as it is."""
    head = encode({"type": "snapshot", "run": run, "epoch": epoch, "seq": seq})
    return head[:-1] + b',"state":' + state + b"}"


def gap(run: str, first: int, last: int, reason: Literal["trimmed", "overflow", "log_lost"]) -> bytes:
    return encode({"type": "gap", "run": run, "from": first, "to": last, "reason": reason})


def truncated(subscription: str, runs: int) -> bytes:
    """So many runs more are covered by a subscription than the connection may follow."""
    return encode({"type": "truncated", "subscription": subscription, "runs": runs})


def summaries(records: Iterable[bytes]) -> bytes:
    """The newest summaries of some runs, each an encoded object, put in as it is."""
    return b'{"type":"summary","runs":[' + b",".join(records) + b"]}"


def page(subscription: str, runs: Sequence[str], next: str | None) -> bytes:
    """What a page of the list that a client watches shows now, in its order."""
    following = {} if next is None else {"next": next}
    return encode({"type": "list", "subscription": subscription, "runs": runs, **following})


def feed(position: str) -> bytes:
    return encode({"type": "feed", "position": position})


PING = encode({"type": "ping"})


def degraded_ping(reason: str) -> bytes:
    """A `ping` that says why runs stand still at the moment."""
    return encode({"type": "ping", "degraded": reason})


def _id(id: CommandId | None) -> dict[str, orjson.Fragment]:
    """An id is given back as it came, even as half of a surrogate pair or as an integer beyond 64 bits."""
    return {} if id is None else {"id": orjson.Fragment(json.dumps(id))}
