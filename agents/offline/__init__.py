"""The offline model: it searches, quotes and calculates by rules, so that everything runs without a key or a network.

It is an engine of `dspy.LM`: it reads the prompt that any model would get (`prompt`), decides (`answering`), and writes
what DSPy's adapters expect, word by word at a human pace. It holds no state, and must not know agents, runs or events.
"""

import functools
import json
import os
import re
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from html import escape
from typing import Any

import anyio
import dspy
from dspy import lm15

from agentcast.agents.offline.answering import NOTE, respond
from agentcast.agents.offline.prompt import parse

__all__ = ["NOTE", "AsyncOfflineEngine", "OfflineEngine", "offline_lm", "reply"]

DELAY_VARIABLE = "AGENTCAST_OFFLINE_DELAY"
"""Environment variable: seconds between words, by default 0.03; 0 streams without a pause."""

_CONTROL = re.compile(r"[^\t\n\r -\U0010ffff]")
_PIECE = re.compile(r"(\s*(?:\[\[ ## \w+ ## \]\]|</?\w+>)\s*)|\S+\s*|\s+")


class _OfflineLM(dspy.LM):  # type: ignore[misc]
    supports_function_calling = True


def offline_lm() -> dspy.LM:
    """The offline model, ready for `dspy.context(lm=…)`."""
    return _OfflineLM("offline/rules", engine=OfflineEngine(), async_engine=AsyncOfflineEngine(), cache=False)


def reply(request: lm15.Request) -> lm15.Message:
    """What the offline model answers to `request`, whole. It takes a few milliseconds."""
    prompt = parse(request)
    values, call = respond(prompt) if prompt.outputs else ({}, None)
    values = {name: value for name, value in values.items() if value is not None}
    said = {n: _CONTROL.sub("", value if isinstance(value, str) else _json(value)) for n, value in values.items()}
    if not prompt.outputs:
        text = NOTE
    elif prompt.form == "json":
        text = _json(values)
    elif prompt.form == "xml":
        text = "\n\n".join(f"<{name}>\n{escape(value, quote=False)}\n</{name}>" for name, value in said.items())
    else:  # what an input says must not tear the reply apart
        sections = [f"[[ ## {name} ## ]]\n{value.replace('[[ ##', '[[')}" for name, value in said.items()]
        text = "\n\n".join([*sections, "[[ ## completed ## ]]"])
    calls = [lm15.ToolCallPart(f"call_{len(prompt.steps)}", *call)] if call else []
    return lm15.Message("assistant", (lm15.TextPart(text), *calls))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _response(request: lm15.Request, message: lm15.Message) -> lm15.Response:
    asked = [str(request.system), *(said.text or "" for said in request.messages)]
    usage = lm15.Usage(sum(len(text.split()) for text in asked), len((message.text or "").split()))  # in words
    reason = "tool_call" if message.parts_of(lm15.ToolCallPart) else "stop"
    return lm15.Response(id=None, model=request.model, message=message, finish_reason=reason, usage=usage)


def _events(request: lm15.Request) -> Iterator[tuple[float, Any]]:
    """The events of a stream, each after the seconds to wait: 85 to 130 % of the delay for a word, none for markers."""
    response = _response(request, reply(request))
    delay = float(os.environ.get(DELAY_VARIABLE, "0.03"))
    yield 0, lm15.StreamStartEvent(model=request.model)
    for number, part in enumerate(response.message.parts):
        is_text = isinstance(part, lm15.TextPart)
        for piece in _PIECE.finditer(part.text if is_text else _json(part.input)):
            wait = 0 if piece[1] else delay * (0.85 + zlib.crc32(piece[0].encode()) % 46 / 100)
            delta = lm15.TextDelta if is_text else functools.partial(lm15.ToolCallDelta, id=part.id, name=part.name)
            yield wait, lm15.StreamDeltaEvent(delta=delta(piece[0], number))
    yield 0, lm15.StreamEndEvent(finish_reason=response.finish_reason, usage=response.usage)


class OfflineEngine:
    def complete(self, request: lm15.Request) -> lm15.Response:
        return _response(request, reply(request))

    def stream(self, request: lm15.Request) -> Iterator[Any]:
        for seconds, event in _events(request):
            if seconds:
                time.sleep(seconds)
            yield event

    def close(self) -> None:
        """Nothing is held open."""


class AsyncOfflineEngine:
    async def complete(self, request: lm15.Request) -> lm15.Response:
        return _response(request, reply(request))

    async def stream(self, request: lm15.Request) -> AsyncIterator[Any]:
        for seconds, event in _events(request):
            if seconds:
                await anyio.sleep(seconds)
            yield event

    async def aclose(self) -> None:
        """Nothing is held open."""
