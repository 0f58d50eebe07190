"""The offline model as an engine of `dspy.LM`: `complete` and `stream`, sync and async.

It reads the prompt that any model would get and writes the reply that DSPy's adapters expect, word by word at a
human pace. It needs no network and no key, and gives the same reply to the same prompt.
"""

import functools
import json
import os
import re
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
from dspy.lm15 import (
    Message,
    Request,
    Response,
    StreamDeltaEvent,
    StreamEndEvent,
    StreamStartEvent,
    TextDelta,
    Usage,
)

from agentcast.agents.offline.acting import next_move
from agentcast.agents.offline.answering import NOTE, answer
from agentcast.agents.offline.prompt import Prompt, parse
from agentcast.agents.threads import in_thread

MODEL = "offline/rules"
DEFAULT_DELAY = 0.03
DELAY_VARIABLE = "AGENTCAST_OFFLINE_DELAY"
"""Environment variable: seconds between words; 0 streams without a pause."""

MAX_ON_LOOP = 4_000
"""Characters of a prompt up to which it is answered without a thread, in a few milliseconds."""

_PIECE = re.compile(r"\s*\[\[ ## \w+ ## \]\]\s*|\S+\s*|\s+")


def reply(request: Request) -> str:
    """What the offline model answers to `request`, whole."""
    prompt = parse(_system(request), _last_user_text(request))
    if not prompt.outputs:
        return f"The offline model only answers prompts in DSPy's format. {NOTE}"
    values = _act(prompt) if prompt.is_act else answer(prompt)
    if prompt.as_json:
        return json.dumps(values, ensure_ascii=False)
    sections = [f"[[ ## {name} ## ]]\n{_show(value)}" for name, value in values.items()]
    return "\n\n".join([*sections, "[[ ## completed ## ]]"])


def _act(prompt: Prompt) -> dict[str, Any]:
    move = next_move(prompt)
    return {"next_thought": move.thought, "next_tool_name": move.tool, "next_tool_args": move.args}


def _show(value: Any) -> str:
    if isinstance(value, str):
        return value.replace("[[ ##", "[[")  # what an input said; here it would tear the reply apart
    return str(value) if isinstance(value, bool) else json.dumps(value, ensure_ascii=False)


def _system(request: Any) -> str:
    system = request.system
    return system if isinstance(system, str) else "".join(part.text for part in system or ())


def _last_user_text(request: Any) -> str:
    return next((message.text or "" for message in reversed(request.messages) if message.role == "user"), "")


def _usage(request: Request, text: str) -> Usage:
    """Words, since this model has no tokens."""
    asked = sum(len((message.text or "").split()) for message in request.messages)
    return Usage(input_tokens=asked + len(_system(request).split()), output_tokens=len(text.split()))


def _delay() -> float:
    try:
        return max(0.0, float(os.environ.get(DELAY_VARIABLE, DEFAULT_DELAY)))
    except ValueError:
        return DEFAULT_DELAY


def _paced(text: str) -> Iterator[tuple[str, float]]:
    """The pieces of `text`, each with the seconds to wait before it: 85 to 130 % of the delay, none for markers."""
    delay = _delay()
    for piece in _PIECE.findall(text):
        share = 0.0 if "[[ ##" in piece else 0.85 + 0.45 * (zlib.crc32(piece.encode()) % 100) / 100
        yield piece, delay * share


def _response(request: Request, text: str) -> Response:
    return Response(
        id=None,
        model=request.model,
        message=Message.assistant(text),
        finish_reason="stop",
        usage=_usage(request, text),
    )


def _delta(piece: str) -> StreamDeltaEvent:
    return StreamDeltaEvent(delta=TextDelta(text=piece, part_index=0))


class OfflineEngine:
    """The synchronous half. Holds no state: any number of threads may use it."""

    def complete(self, request: Request) -> Response:
        return _response(request, reply(request))

    def stream(self, request: Request) -> Iterator[Any]:
        text = reply(request)
        yield StreamStartEvent(model=request.model)
        for piece, seconds in _paced(text):
            if seconds:
                time.sleep(seconds)
            yield _delta(piece)
        yield StreamEndEvent(finish_reason="stop", usage=_usage(request, text))

    def close(self) -> None:
        """Nothing is held open."""


async def _reply(request: Request) -> str:
    if sum(len(message.text or "") for message in request.messages) <= MAX_ON_LOOP:
        return reply(request)
    return await in_thread(functools.partial(reply, request), "offline model")


class AsyncOfflineEngine:
    """The asynchronous half: thinks on the loop for a few milliseconds, about a long prompt on a thread."""

    async def complete(self, request: Request) -> Response:
        return _response(request, await _reply(request))

    async def stream(self, request: Request) -> AsyncIterator[Any]:
        text = await _reply(request)
        yield StreamStartEvent(model=request.model)
        for piece, seconds in _paced(text):
            if seconds:
                await anyio.sleep(seconds)
            yield _delta(piece)
        yield StreamEndEvent(finish_reason="stop", usage=_usage(request, text))

    async def aclose(self) -> None:
        """Nothing is held open."""
