"""A client of a hub: starts a run and follows it to its end, whatever happens to the connection meanwhile.

It is also the protocol's worked example; the rules are in docs/protocol.md. What a client has to keep is little: one
position per run, (epoch, seq), and an idempotency key per start. With these it can drop its connection at any moment
and come back without missing or repeating an event (G1, G2).

    async with Run("http://127.0.0.1:8000", "researcher", {"question": "What is G4?"}) as run:
        async for frame in run:
            print(frame)
        print(run.state.document["result"])

This module must not know how runs are shown or how a hub works inside.
"""

import json
import random
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import anyio
import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.typing import Subprotocol

from agentcast.agents.values import clean_text
from agentcast.server.protocol import SUBPROTOCOL, VERSION, Detail
from agentcast.server.state import STATUS_AFTER, RunState

TIMEOUT = 10.0
"""Seconds that a hub has for an HTTP answer, or for `hello`."""
PATIENCE = 60.0
"""Seconds for which a lost hub is looked for before giving up."""
BACKOFF_FIRST, BACKOFF_MOST = 0.25, 10.0
FINAL_CODES = frozenset({1003, 1009, *range(4500, 5000)})
"""Close codes after which coming back makes no sense. 1009 is a message of ours that was too big."""
ENDED = frozenset(STATUS_AFTER.values())
"""Statuses of a run that has its terminal event."""

Frame = dict[str, Any]


class ClientError(Exception):
    """Base of everything that keeps a run from being followed."""


class BadUrl(ClientError):
    """`url` is not the address of a hub."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.url = url

    def __str__(self) -> str:
        return f"{self.url!r} is no URL of a hub; write it as http://127.0.0.1:8000"


class Unreachable(ClientError):
    """No hub answers at `url`."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url = url
        self.reason = reason

    def __str__(self) -> str:
        return f"no hub answers at {self.url}: {self.reason}"


class Refused(ClientError):
    """The hub answered a command with an error."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        super().__init__(error["message"])
        self.code: str = error["code"]
        self.message: str = error["message"]
        self.retryable: bool = error.get("retryable", False)
        self.details: Any = error.get("details")


class TooBig(ClientError):
    """The command is over the hub's `limits.message_bytes`."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(size, limit)
        self.size = size
        self.limit = limit

    def __str__(self) -> str:
        return f"the input is too big: the message would have {self.size:,} bytes, the hub takes {self.limit:,}"


class Closed(ClientError):
    """The hub closed the connection and does not want us back."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        return f"the hub closed the connection for good: {self.code} {self.reason}".rstrip()


class Dropped(Exception):
    """The connection is gone; another one may work."""


class HubUrl:
    """The addresses of one hub.

    :raises BadUrl: `text` is none; `http://` may be left out.
    """

    def __init__(self, text: str) -> None:
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            usable = parts.hostname is not None and (parts.port is None or parts.port > 0)
        except ValueError:  # a port that is no number
            usable = False
        scheme = {"http": "http", "ws": "http", "https": "https", "wss": "https"}.get(parts.scheme) if usable else None
        if scheme is None:
            raise BadUrl(text)
        self.http = f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self.socket = f"{scheme.replace('http', 'ws')}://{parts.netloc}{parts.path.rstrip('/')}/ws"
        self.proxy: Literal[True] | None = None if parts.hostname in ("localhost", "127.0.0.1", "::1") else True
        """As `websockets.connect` takes it: the environment's proxies, except to this machine itself."""

    def __str__(self) -> str:
        return self.http


def describe_agents(url: str) -> dict[str, Any]:
    """What `GET /v1/agents` says: `agents`, each with `name`, `description`, `input` and `output`, and `model`. Blocks.

    :raises BadUrl: `url` is none.
    :raises Unreachable: no hub answers there.
    """
    hub = HubUrl(url)
    handlers = [urllib.request.ProxyHandler({})] if hub.proxy is None else []
    opener = urllib.request.build_opener(*handlers)
    try:
        with opener.open(f"{hub}/v1/agents", timeout=TIMEOUT) as response:
            document: dict[str, Any] = json.load(response)
            if not isinstance(document["agents"], list):
                raise TypeError
            return document
    except urllib.error.HTTPError as error:
        raise Unreachable(str(hub), _refusal(error.code, error.read())) from None
    except (ValueError, LookupError, TypeError):
        raise Unreachable(str(hub), "what answers there is no agentcast hub") from None
    except OSError as error:
        raise Unreachable(str(hub), _reason(error)) from None


class Connection:
    """One WebSocket to a hub, opened and greeted. One task may receive, any may send."""

    def __init__(self, socket: ClientConnection, hello: Frame) -> None:
        self.hello = hello
        self._socket = socket
        self._commands = 0

    @classmethod
    async def open(cls, hub: HubUrl) -> Self:
        """Connect and wait for `hello`.

        :raises Unreachable: that did not work; trying again may.
        :raises Closed: the hub closed it for good.
        """
        try:
            socket = await connect(
                hub.socket,
                subprotocols=[Subprotocol(SUBPROTOCOL)],
                compression=None,
                max_size=None,  # a snapshot is as large as the hub lets a run's state grow
                open_timeout=TIMEOUT,
                close_timeout=1,
                ping_interval=None,  # the hub's own `ping` frames tell that the whole path works
                proxy=hub.proxy,
            )
        except InvalidStatus as error:
            raise Unreachable(str(hub), _refusal(error.response.status_code, error.response.body or b"")) from None
        except (OSError, InvalidHandshake) as error:
            raise Unreachable(str(hub), _reason(error)) from None
        connection = cls(socket, {})
        try:
            await connection._greet(hub)
        except BaseException:
            socket.transport.abort()
            raise
        return connection

    async def _greet(self, hub: HubUrl) -> None:
        try:
            with anyio.fail_after(TIMEOUT):
                self.hello = await self.receive()
        except (Dropped, TimeoutError) as error:
            raise Unreachable(str(hub), str(error) or "it does not say hello") from None
        if self.hello.get("protocol") != VERSION:
            raise Unreachable(str(hub), f"it speaks protocol {self.hello.get('protocol')!r}, this client {VERSION}")

    async def send(self, op: str, **fields: Any) -> int:
        """Send a command; gives its id, under which the reply will come. Fields that are None are left out.

        :raises Dropped: the connection is gone.
        :raises TooBig: nothing was sent: the hub would close the connection.
        """
        self._commands += 1
        given = {name: value for name, value in fields.items() if value is not None}
        message = clean_text(json.dumps({"op": op, "id": self._commands, **given}, ensure_ascii=False))
        size, limit = len(message.encode()), self.hello["limits"]["message_bytes"]
        if size > limit:
            raise TooBig(size, limit)
        try:
            await self._socket.send(message)
        except ConnectionClosed as error:
            raise Dropped(str(error)) from None
        return self._commands

    async def receive(self) -> Frame:
        """The next frame.

        :raises Dropped: the connection is gone, or nothing came for two heartbeats, which means the same.
        :raises Closed: it was closed for good.
        """
        silence = 2 * self.hello["heartbeat"] if self.hello else None
        try:
            with anyio.fail_after(silence):
                frame: Frame = orjson.loads(await self._socket.recv())
                return frame
        except TimeoutError:
            raise Dropped(f"the hub was silent for {silence:.0f} s") from None
        except ConnectionClosed as error:
            code, reason = self._socket.close_code or 1006, self._socket.close_reason or ""
            if code in FINAL_CODES:
                raise Closed(code, reason) from None
            raise Dropped(reason or str(error)) from None

    async def aclose(self) -> None:
        await self._socket.close()


class Run:
    """One run of an agent: started once, then followed to its end. Iterating gives every frame that the hub sends.

    Lost connections are replaced, with jittered delays, and the run goes on where it was; the frames of the new
    connection (`hello`, `reply`) show in between. The start carries an idempotency key, so that one sent again, because
    nobody knows what became of the first, is the same run.

    Iterate in one task. `cancel` may be called from another.

    Iterating raises `Unreachable` if there is no hub at first, or none for `patience` seconds later on; `Refused` after
    the error reply; `Closed` when the hub wants no more; `TooBig` if the input is.
    """

    def __init__(
        self,
        url: str,
        agent: str,
        input: Mapping[str, Any],
        *,
        thread: str | None = None,
        key: str | None = None,
        detail: Detail = "full",
        patience: float = PATIENCE,
        on_drop: Callable[[str, int], None] = lambda reason, attempt: None,
    ) -> None:
        """:raises BadUrl: `url` is none. `on_drop` is told why each attempt to have a connection failed."""
        self.hub = HubUrl(url)
        self.agent = agent
        self.detail = detail
        self.id: str | None = None
        """The run's id, once the hub has told it."""
        self.state = RunState.new("", agent)
        """What is known of the run: all frames so far, folded. Exact at detail `full`."""
        self._start = {"agent": agent, "input": dict(input), "thread": thread, "detail": detail}
        self._start["key"] = secrets.token_hex(16) if key is None else key
        self._patience = patience
        self._on_drop = on_drop
        self._connection: Connection | None = None
        self._epoch = ""
        self._seq = 0
        self._sent: dict[int, str] = {}
        self._cancel: dict[str, str | None] | None = None
        self._asked = False
        self._attempt = 0
        self._well_at: float | None = None
        self._failure: ClientError | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, type: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._disconnect()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Frame:
        while not self.ended:
            if self._failure is not None:
                raise self._failure
            try:
                if self._connection is None:
                    return await self._connect()
                frame = await self._connection.receive()
                wanted = await self._take(frame)
                self._well_at = time.monotonic()
                if wanted:
                    return frame
            except (Dropped, Unreachable) as error:
                await self._back_off(error)
        raise StopAsyncIteration

    @property
    def ended(self) -> bool:
        """Whether the terminal event, or a snapshot after it, was seen."""
        return self.state.document["status"] in ENDED

    @property
    def cancelling(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancel is not None

    async def cancel(self, reason: str | None = None) -> bool:
        """Ask for the run's end, now or as soon as there is a connection; `run_cancelled` tells that it has come.

        False if there is nothing to cancel: no start was sent.
        """
        self._cancel = {"reason": reason}
        if self._connection is not None and self.id is not None:
            try:
                await self._send(self._connection, "cancel", run=self.id, **self._cancel)
            except Dropped:
                pass  # noticed, and mended, by whoever iterates
        return self._asked

    # -- The connection --------------------------------------------------------------------------------------------

    async def _connect(self) -> Frame:
        """Open a connection and say on it where we are: nowhere yet, or at a position."""
        connection = await Connection.open(self.hub)
        self._connection, self._sent = connection, {}
        if self._well_at is None:
            self._well_at = time.monotonic()
        if self.id is None:
            self._asked = True
            await self._send(connection, "start", **self._start)
            return connection.hello
        since = {self.id: {"epoch": self._epoch, "seq": self._seq}}
        await self._send(connection, "subscribe", to={"run": self.id}, since=since, detail=self.detail)
        if self._cancel is not None:
            await self._send(connection, "cancel", run=self.id, **self._cancel)
        return connection.hello

    async def _send(self, connection: Connection, op: str, **fields: Any) -> None:
        self._sent[await connection.send(op, **fields)] = op

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.aclose()

    async def _back_off(self, error: Exception) -> None:
        """Wait before the next connection; longer each time, and never as long as others do."""
        await self._disconnect()
        if self._well_at is None:
            raise error
        self._attempt += 1
        reason = error.reason if isinstance(error, Unreachable) else str(error)
        self._on_drop(reason, self._attempt)
        longest = min(BACKOFF_FIRST * 2 ** (self._attempt - 1), BACKOFF_MOST)
        delay = longest * random.uniform(0.5, 1.0)  # noqa: S311 -- jitter, not a secret
        if time.monotonic() + delay - self._well_at > self._patience:
            raise Unreachable(str(self.hub), f"{reason}; gave up after {self._patience:g} s") from None
        await anyio.sleep(delay)

    # -- Frames ----------------------------------------------------------------------------------------------------

    async def _take(self, frame: Frame) -> bool:
        """Take note of one frame. False if it is to be passed over.

        :raises Dropped: there is a hole before it, which only a new connection can mend.
        """
        match frame["type"]:
            case "reply":
                await self._take_reply(frame)
            case "snapshot" if frame["run"] == self.id:
                self._epoch, self._seq = frame["epoch"], frame["seq"]
                self.state = RunState(frame["state"])
            case "event" if frame["run"] == self.id:
                return self._take_event(frame)
        return True

    def _take_event(self, event: Frame) -> bool:
        if event["seq"] <= self._seq:
            return False
        before = event["seq"] - 1 if self.detail == "full" else event["prev"]
        if before > self._seq:
            raise Dropped(f"events after {self._seq} are missing")
        self.state.apply(event)
        self._seq = event["seq"]
        return True

    async def _take_reply(self, reply: Frame) -> None:
        if "id" not in reply:  # the hub could not read a message: it is the start's input, all else is ours
            self._failure = Refused(reply["error"])
            return
        op = self._sent.pop(reply["id"], None)
        if op is None or self._connection is None:
            return
        if op == "cancel":  # refused only if the run has just ended, which its events tell
            return
        if not reply["ok"]:
            refused = Refused(reply["error"])
            if refused.retryable:
                raise Dropped(refused.message)
            self._failure = refused
            return
        self._attempt = 0
        if op == "start":
            self.id, self._epoch = reply["result"]["run"], reply["result"]["epoch"]
            self.state = RunState.new(self.id, self.agent)
            if self._cancel is not None:
                await self._send(self._connection, "cancel", run=self.id, **self._cancel)


def _refusal(status: int, body: bytes | bytearray) -> str:
    """Why a server answered with an error: the hub's own words, if it is one."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return f"what is there answers with HTTP status {status}"
    return f"it refused: {message}"


def _reason(error: BaseException) -> str:
    inner = getattr(error, "reason", None)  # of urllib.error.URLError
    if isinstance(inner, OSError):
        error = inner
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
