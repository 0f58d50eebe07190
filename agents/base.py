"""The agent contract: what an agent is given, what it may emit, how it fails.

An agent is a coroutine, not an async generator: a generator that holds a task group and is abandoned raises "cancel
scope in a different task" somewhere else. It is given a `Task` and an `Emitter` and returns its result.

Nothing here may know how events travel (`channel`), what DSPy is (`streaming`), or that there is a server.
"""

import asyncio
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError

from agentcast.agents.events import AgentEvent
from agentcast.agents.values import cut_text

DEFAULT_TIMEOUT = 600.0
DEFAULT_MAX_CONCURRENT = 32


@dataclass(frozen=True, slots=True)
class Turn:
    """An earlier finished run of the same thread: its input and its result, as plain JSON data."""

    input: Mapping[str, Any]
    result: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one run is asked to do."""

    run: str
    """The run's id."""
    input: BaseModel
    """The validated input: an instance of the agent's `AgentSpec.input_model`."""
    thread: str | None = None
    history: tuple[Turn, ...] = ()
    """Earlier turns of the thread, oldest first."""
    deadline: float | None = None
    """When the run times out, in Unix seconds."""


class Emitter(Protocol):
    """Where an agent's events go: in order, none dropped, from any thread."""

    async def send(self, event: AgentEvent) -> None:
        """Emit, waiting while the run's stream is full.

        :raises Stopped: the run has ended, or is to end now.
        """

    def nowait(self, event: AgentEvent) -> None:
        """Emit from synchronous code. On the event loop this never waits: the agent's coroutine is instead not resumed
        until there is room. Tasks that the agent starts are not held back, so let them `send`. In any other thread this
        waits for room.

        :raises Stopped: the run has ended, or is to end now, or emitted more than may be held.
        """


@dataclass(frozen=True, kw_only=True)
class AgentSpec:
    """What the hub needs to know of an agent in order to offer it, to check its input and to bound its runs."""

    name: str
    description: str
    input_model: type[BaseModel]
    output_schema: Mapping[str, Any] = field(default_factory=dict)
    """JSON Schema of the result."""
    timeout: float = DEFAULT_TIMEOUT
    """Seconds that one run may take, from its start (not counting the queue)."""
    max_concurrent: int = DEFAULT_MAX_CONCURRENT
    """Runs at once, in one hub process; more wait in the queue."""
    graph: Mapping[str, Any] | None = None
    """Of a compiled graph: its nodes, edges and entry, for a page that draws it."""


class Agent(Protocol):
    """Anything that runs. Most are made by a `Registry`; any class of this shape will do."""

    @property
    def spec(self) -> AgentSpec: ...

    async def run(self, task: Task, emit: Emitter) -> Any:
        """Do the task and return the result: plain data, a pydantic model or a dataclass.

        What it raises ends the run with `run_error`; `public_message` gives what clients see of it.
        """


def unavailable(agent: Agent) -> str | None:
    """Why `agent` cannot run just now, for people; `None`: it can. To be asked each time.

    An agent that depends on something outside has a property `unavailable` that says so.
    """
    return getattr(agent, "unavailable", None)


class ToolError(Exception):
    """A tool failed in a way that the LM, and people, should know about: both see the text as it is."""


class Stopped(BaseException):
    """The run is over and its agent must not go on.

    A `BaseException`, since DSPy logs and swallows every `Exception` raised in a callback, which is where synchronous
    programs learn that they were cancelled.
    """


def public_message(error: BaseException) -> str:
    """What clients and LMs may see of `error`: no traceback, no path, no secret (G9).

    The text of `ToolError` and `ValueError` was written to be read; pydantic's is rebuilt without the input; of an
    `OSError` only `strerror` is safe; of anything else only the type's name.
    """
    if isinstance(error, ValidationError):
        return cut_text(redact("; ".join(_problem(item) for item in error.errors(include_url=False))))
    if isinstance(error, ToolError | ValueError):
        return cut_text(redact(_text(error)) or type(error).__name__)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, asyncio.CancelledError):
        return "something that it waited for was cancelled"
    return type(error).__name__


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 -- whatever an agent's exception does
        return ""


def redact(text: str) -> str:
    """`text` with every secret of this process's environment replaced.

    A secret is the value of a variable whose name has KEY, TOKEN, SECRET, PASSWORD, CREDENTIAL or AUTHORIZATION in it,
    the password in a value that is a URL, and what was given to `keep_secret`.
    """
    for secret in _secrets():
        if secret in text:
            text = text.replace(secret, "[redacted]")
    return text


def keep_secret(*values: str) -> None:
    """From now on `redact` takes `values` for secrets: keys that were given in code or in a file, say.

    Those of less than 8 characters are none.
    """
    _kept.update(value for value in values if len(value) >= _MIN_SECRET)


def is_secret_name(name: str) -> bool:
    """Whether the value of a variable called `name` is a secret."""
    return any(word in name.upper() for word in _SECRET_WORDS)


def url_passwords(text: str) -> list[str]:
    """The passwords in the URLs that `text` holds."""
    return _URL_PASSWORD.findall(text)


_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "AUTHORIZATION")
_MIN_SECRET = 8
_URL_PASSWORD = re.compile(r"://[^/@\s:]*:([^/@\s]+)@")
_kept: set[str] = set()


def _secrets() -> Iterator[str]:
    yield from sorted(_kept, key=len, reverse=True)  # one may be part of another
    for name, value in os.environ.items():
        if len(value) >= _MIN_SECRET and is_secret_name(name):
            yield value
        yield from url_passwords(value)


def _problem(item: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    return f"{where}: {item['msg']}" if where else str(item["msg"])
