"""The page, the REST interface beside the socket, health, and the guard at the door (G9).

Every error has one shape, `{"error": {code, message, retryable, details?}}`, and the status that fits it.
"""

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
from pydantic import TypeAdapter
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from agentcast.agents.base import Agent, AgentSpec, unavailable
from agentcast.agents.llm import ModelInfo
from agentcast.server import protocol
from agentcast.server.bus.base import Bus
from agentcast.server.edge.costs import (
    ACCOUNT,
    CANCEL,
    COMMAND,
    JOIN,
    LOOKUP,
    REPLIED,
    START,
    SUBSCRIBE,
    Account,
    Costs,
    reading,
)
from agentcast.server.edge.session import ANONYMOUS, authorize, filter_of
from agentcast.server.errors import BadRequest, CommandError, Forbidden, NotFound, Unavailable
from agentcast.server.hub.hub import Hub
from agentcast.server.protocol import Cancel, List, Start
from agentcast.server.runs.runs import Runs

PAGE = Path(__file__).parents[1] / "web" / "index.html"

logger = logging.getLogger(__name__)

_START = TypeAdapter(Start)
_CANCEL = TypeAdapter(Cancel)
_LIST = TypeAdapter(List)


class NotJson(BadRequest):
    """The body is not declared as JSON, so a foreign page could have sent it."""

    status = 415


class TooLarge(BadRequest):
    """The body is over `MESSAGE_BYTES`."""

    status = 413


class WrongMethod(BadRequest):
    """The route does not take this method."""

    status = 405


class Api:
    """The HTTP routes."""

    def __init__(
        self, bus: Bus, hub: Hub, runs: Runs, costs: Costs, model: ModelInfo, ready: Callable[[], bool]
    ) -> None:
        self._bus = bus
        self._hub = hub
        self._runs = runs
        self._costs = costs
        self._model = model
        self._ready = ready
        self._described: dict[str, dict[str, Any]] = {}

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/", self._page),
            Route("/v1/agents", self._charged(COMMAND, self._agents)),
            Route("/v1/runs", self._charged(SUBSCRIBE, self._list), methods=["GET"]),
            Route("/v1/runs", self._charged(START, self._start), methods=["POST"]),
            Route("/v1/runs/{run}", self._charged(JOIN, self._show)),
            Route("/v1/runs/{run}/cancel", self._charged(CANCEL, self._cancel), methods=["POST"]),
            Route("/healthz", _json(self._healthz)),
            Route("/readyz", _json(self._readyz)),
        ]

    def _charged(self, price: int, handler: "Handler") -> Callable[[Request], Awaitable[Response]]:
        """A route whose requests wait for their turn. What they send and are answered is charged afterwards."""

        async def respond(request: Request) -> Any:
            account = request.scope.get("extensions", {}).get(ACCOUNT) or Account()  # one for all of a connection
            await self._costs.turn(account, COMMAND + price)
            request.state.account = account
            content = await handler(request)
            data = content if isinstance(content, bytes) else orjson.dumps(content)
            runs = len(content.get("runs", ())) if isinstance(content, dict) else 0
            size = int(request.headers.get("content-length", 0))
            self._costs.charge(account, reading(size) + len(data) // REPLIED + LOOKUP * runs)
            return data

        return _json(respond)

    async def _page(self, request: Request) -> Response:
        return FileResponse(PAGE, headers={"Cache-Control": "no-cache"})

    async def _agents(self, request: Request) -> Any:
        return {
            "agents": [self._describe(agent) for agent in self._runs.agents.values()],
            "model": {"name": self._model.name, "offline": self._model.offline},
        }

    def _describe(self, agent: Agent) -> dict[str, Any]:
        """What is known of an agent: its spec, which stays as it is, and whether it can run just now."""
        name, reason = agent.spec.name, unavailable(agent)
        if name not in self._described:
            self._described[name] = _described(agent.spec)
        described = self._described[name] | {"available": reason is None}
        return described if reason is None else described | {"reason": reason}

    async def _start(self, request: Request) -> Any:
        document = await _body(request)
        command: Start = protocol.parse(_START, document | {"op": "start"})
        authorize(ANONYMOUS, "start")
        created = await self._runs.start(ANONYMOUS, command, request.state.account)
        return {"run": created.run, "epoch": created.epoch}

    async def _list(self, request: Request) -> Any:
        command: List = protocol.parse(_LIST, _query(request))
        authorize(ANONYMOUS, "list")
        return await self._hub.lists.rows(filter_of(ANONYMOUS, command))

    async def _show(self, request: Request) -> Any:
        authorize(ANONYMOUS, "subscribe")
        run = request.path_params["run"]
        info = (await self._bus.info([run])).get(run)
        if info is None or info.principal != ANONYMOUS:
            raise NotFound(f"there is no run {run[:64]!r}")
        snapshot = await self._hub.snapshot(run)
        return protocol.snapshot(snapshot.run, snapshot.epoch, snapshot.seq, snapshot.state)

    async def _cancel(self, request: Request) -> Any:
        document = await _body(request, optional=True)
        command: Cancel = protocol.parse(_CANCEL, document | {"op": "cancel", "run": request.path_params["run"]})
        authorize(ANONYMOUS, "cancel")
        await self._runs.cancel(ANONYMOUS, command.run, command.reason)
        return {}

    async def _healthz(self, request: Request) -> Any:
        return {"status": "ok"}

    async def _readyz(self, request: Request) -> Any:
        if not self._ready():
            raise Unavailable("not ready: starting, shutting down, or broken")
        await self._bus.check()
        return {"status": "ok", "runs": self._runs.active, "bus": self._bus.counters}


Handler = Callable[[Request], Awaitable[Any]]


def _json(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        try:
            return _response(await handler(request))
        except CommandError as error:
            return _response({"error": error.wire()}, error.status)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is there to read it
        except Exception:
            logger.exception("%s %s failed", request.method, request.url.path)
            return _response({"error": CommandError("something went wrong in the hub").wire()}, 500)

    return respond


def _response(content: Any, status: int = 200) -> Response:
    data = content if isinstance(content, bytes) else orjson.dumps(content)
    return Response(data, status, media_type="application/json")


async def no_route(request: Request, error: Exception) -> Response:
    """What Starlette's router raises, in the shape that errors have."""
    if not isinstance(error, HTTPException):
        raise error
    where = f"{request.method} {request.url.path[:200]}"
    answer = WrongMethod(f"no {where}") if error.status_code == 405 else NotFound(f"there is no {where}")
    response = _response({"error": answer.wire()}, answer.status)
    response.headers.update(error.headers or {})
    return response


async def _body(request: Request, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in the body. Only a declared one: a form on a foreign page cannot declare it."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > protocol.MESSAGE_BYTES:
            raise TooLarge(f"the body is over {protocol.MESSAGE_BYTES} bytes")
    if not data and optional:
        return {}
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise NotJson("send the body as `Content-Type: application/json`")
    document = protocol.read_json(data)
    if not isinstance(document, dict):
        raise BadRequest("the body must be one JSON object")
    return document


def _query(request: Request) -> dict[str, Any]:
    """The query of a list as the fields of the command `list`."""
    query = request.query_params
    known = List.model_fields.keys() - {"op", "id", "subscribe"}
    unknown = set(query) - known
    if unknown:
        raise BadRequest(f"unknown parameter {sorted(unknown)[0]!r}; known are {', '.join(sorted(known))}")
    fields: dict[str, Any] = {"op": "list", **query}
    if "status" in query:
        fields["status"] = [part for value in query.getlist("status") for part in value.split(",")]
    if "limit" in query:
        limit = query["limit"]
        fields["limit"] = int(limit) if len(limit) < 10 and limit.isdecimal() else limit
    return fields


def _described(spec: AgentSpec) -> dict[str, Any]:
    """The listing of a spec; what is large in it is encoded already."""
    described: dict[str, Any] = {
        "name": spec.name,
        "description": spec.description,
        "input": orjson.Fragment(orjson.dumps(spec.input_model.model_json_schema())),
        "output": orjson.Fragment(orjson.dumps(spec.output_schema)),
        "timeout": spec.timeout,
        "max_concurrent": spec.max_concurrent,
    }
    return described if spec.graph is None else described | {"graph": orjson.Fragment(orjson.dumps(spec.graph))}


class Guard:
    """Refuses requests that come under a foreign name (DNS rebinding) or from a foreign page.

    `Host` must be an allowed name, and so must the host of `Origin` where a browser sends one. Covers HTTP and
    WebSocket alike.
    """

    def __init__(self, app: ASGIApp, allowed: frozenset[str]) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (problem := self._problem(Headers(scope=scope))) is None:
            await self._app(scope, receive, send)
            return
        response = _response({"error": Forbidden(problem).wire()}, Forbidden.status)
        if scope["type"] == "websocket":
            await receive()
            await response(scope, receive, send)
        else:
            await response(scope, receive, send)

    def _problem(self, headers: Headers) -> str | None:
        if "*" in self._allowed:
            return None
        host = _hostname(f"//{headers.get('host', '')}")
        if host not in self._allowed:
            return f"this hub does not answer to the host name {host[:64]!r}; allow it with AGENTCAST_HOSTS"
        origin = headers.get("origin")
        if origin is not None and (name := _hostname(origin)) not in self._allowed:
            return f"pages of {name[:64]!r} may not use this hub; allow them with AGENTCAST_HOSTS"
        return None


def _hostname(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""
