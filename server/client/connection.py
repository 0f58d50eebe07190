"""One connection to a hub, and what can go wrong with it. It must not be known here what a run is."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import anyio
import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.typing import Subprotocol

from agentcast.agents.values import clean_text
from agentcast.server.protocol import SUBPROTOCOL, VERSION

TIMEOUT = 10.0
"""Seconds that a hub has for an HTTP answer, or for `hello`."""
FINAL_CODES = frozenset({1003, 1008, 1009, *range(4500, 5000)})
"""Close codes after which coming back makes no sense. 1008 is for sending too much, 1009 for a message too big."""

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


def describe_agents(hub: HubUrl) -> dict[str, Any]:
    """What `GET /v1/agents` answers. Blocks.

    :raises Unreachable: no hub answers.
    """
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
                ping_interval=None,  # the hub's own `ping` frames show that the whole path works
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
