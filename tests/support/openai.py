"""LM providers on loopback: the HTTP APIs of OpenAI (which Ollama speaks, too) and Anthropic, scripted by the test.

A real server, so that nothing of the client is replaced: `POST …/chat/completions` and `POST …/messages`, whole or as
server-sent events, with usage; and what goes wrong between a client and a provider.
"""

import json
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.support.lms import pieces

USAGE = {"input": 11, "output": 7, "cached": 4}


@dataclass(frozen=True)
class Say:
    """Answers `text` in pieces of `size` characters.

    After `after` of them the rest does not come: it is a `cut` (the connection breaks), an `end` (the answer is over,
    without saying so), `hang` (nothing more happens), `garbage` (something that is no JSON) or `error` (the provider
    says that it has failed: `error_code`).
    """

    text: str
    size: int = 6
    after: int | None = None
    fault: str = "cut"
    error_code: str | int = "server_error"
    usage: bool = True


@dataclass(frozen=True)
class Refuse:
    """Answers with an error."""

    status: int
    message: str = "no"
    code: str | None = None
    kind: str = "error"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Hang:
    """Takes the request, and never answers."""


Answer = Say | Refuse | Hang


class Provider:
    """`answers` are given in order, one for each request; the last one again and again."""

    def __init__(self, answers: Iterable[Answer]) -> None:
        self.answers = list(answers)
        self.port = 0
        self.requests: list[dict[str, Any]] = []
        """The bodies of all requests so far."""
        self.headers: list[dict[str, str]] = []
        self.left = anyio.Event()
        """A client went away while it waited for more."""
        self._arrivals = anyio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def asked(self, times: int) -> None:
        """Wait until so many requests have come."""
        while len(self.requests) < times:
            await self._arrivals.wait()

    # -- HTTP ------------------------------------------------------------------------------------------------------

    @property
    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._openai, methods=["POST"]),
                Route("/v1/messages", self._anthropic, methods=["POST"]),
            ]
        )

    async def _openai(self, request: Request) -> Response:
        answer, body = await self._next(request)
        if not isinstance(answer, Say):
            return await self._fail(answer, request)
        if not body.get("stream"):
            return JSONResponse(_openai_whole(answer, body["model"]))
        return self._events(answer, request, _openai_chunks(answer, body))

    async def _anthropic(self, request: Request) -> Response:
        answer, body = await self._next(request)
        if not isinstance(answer, Say):
            return await self._fail(answer, request)
        if not body.get("stream"):
            return JSONResponse(_anthropic_whole(answer, body["model"]))
        return self._events(answer, request, _anthropic_chunks(answer, body))

    async def _next(self, request: Request) -> tuple[Answer, dict[str, Any]]:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        arrivals, self._arrivals = self._arrivals, anyio.Event()
        arrivals.set()
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0], body

    async def _fail(self, answer: Refuse | Hang, request: Request) -> Response:
        if isinstance(answer, Hang):
            await self._until_left(request)
            return Response(status_code=499)
        error = {"message": answer.message, "type": answer.kind, "code": answer.code}
        return JSONResponse({"error": error}, answer.status, answer.headers)

    async def _until_left(self, request: Request) -> None:
        try:
            while (await request.receive())["type"] != "http.disconnect":
                pass
        finally:
            self.left.set()

    def _events(self, answer: Say, request: Request, chunks: Iterator[str]) -> Response:
        async def body() -> AsyncIterator[str]:
            for number, chunk in enumerate(chunks):
                if number == answer.after:
                    async for rest in self._break(answer, request):
                        yield rest
                    return
                yield chunk

        return StreamingResponse(body(), media_type="text/event-stream")

    async def _break(self, answer: Say, request: Request) -> AsyncIterator[str]:
        match answer.fault:
            case "cut":
                raise ConnectionAbortedError
            case "hang":
                await self._until_left(request)
            case "garbage":
                yield 'data: {"choices": [{"delta": {"con\n\n'
            case "error":
                error = {"message": "too busy", "type": answer.error_code, "code": answer.error_code}
                yield f"event: error\ndata: {json.dumps({'type': 'error', 'error': error})}\n\n"


def _usage() -> dict[str, Any]:
    given, made, cached = USAGE["input"], USAGE["output"], USAGE["cached"]
    return {
        "prompt_tokens": given,
        "completion_tokens": made,
        "total_tokens": given + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _openai_whole(answer: Say, model: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    usage = {"usage": _usage()} if answer.usage else {}
    return {"id": "c1", "object": "chat.completion", "created": 1, "model": model, "choices": choices} | usage


def _openai_chunks(answer: Say, body: dict[str, Any]) -> Iterator[str]:
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}

    def chunk(choices: list[Any], **more: Any) -> str:
        return f"data: {json.dumps(head | {'choices': choices} | more)}\n\n"

    yield chunk([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    for text in pieces(answer.text, answer.size):
        yield chunk([{"index": 0, "delta": {"content": text}, "finish_reason": None}])
    yield chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    if answer.usage and body.get("stream_options", {}).get("include_usage"):
        yield chunk([], usage=_usage())
    yield "data: [DONE]\n\n"


def _anthropic_whole(answer: Say, model: str) -> dict[str, Any]:
    usage = {"input_tokens": USAGE["input"] - USAGE["cached"], "cache_read_input_tokens": USAGE["cached"]}
    return {
        "id": "m1",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [{"type": "text", "text": answer.text}],
        "stop_reason": "end_turn",
        "usage": usage | {"output_tokens": USAGE["output"]},
    }


def _anthropic_chunks(answer: Say, body: dict[str, Any]) -> Iterator[str]:
    def event(kind: str, **data: Any) -> str:
        return f"event: {kind}\ndata: {json.dumps({'type': kind} | data)}\n\n"

    message = _anthropic_whole(answer, body["model"]) | {"content": [], "stop_reason": None}
    yield event("message_start", message=message)
    yield event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    for text in pieces(answer.text, answer.size):
        yield event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
    yield event("content_block_stop", index=0)
    yield event("message_delta", delta={"stop_reason": "end_turn"}, usage=message["usage"])
    yield event("message_stop")


class _Server(uvicorn.Server):
    def __init__(self, app: Starlette) -> None:
        super().__init__(
            uvicorn.Config(
                app, port=0, log_config=None, log_level="critical", lifespan="off", timeout_graceful_shutdown=1
            )
        )
        self.up = anyio.Event()
        self.over = anyio.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.up.set()

    async def main_loop(self) -> None:
        await self.over.wait()


@asynccontextmanager
async def provider(*answers: Answer) -> AsyncIterator[Provider]:
    """A provider on a free port."""
    served = Provider(answers)
    server = _Server(served.app)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.serve)
        with anyio.fail_after(10):
            await server.up.wait()
        served.port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield served
        finally:
            server.force_exit = True
            server.over.set()
