"""LMs for tests of streaming: real `dspy.LM`s whose engines answer as a test says, in the chunks that it says."""

import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import dspy
from dspy.lm15 import (
    Message,
    Request,
    Response,
    StreamDeltaEvent,
    StreamEndEvent,
    StreamStartEvent,
    TextDelta,
    TextPart,
    ThinkingDelta,
    ThinkingPart,
    ToolCallDelta,
    ToolCallPart,
)
from dspy.lm15 import Usage as LmUsage

USAGE = LmUsage(input_tokens=10, output_tokens=5, total_tokens=15, cache_read_tokens=4)

Reply = Callable[[str], str | Iterable[Any]]
"""The last user message → the answer, whole or in chunks: texts, or deltas of `dspy.lm15`."""


def chat(**fields: str) -> str:
    return "".join(f"[[ ## {name} ## ]]\n{text}\n\n" for name, text in fields.items()) + "[[ ## completed ## ]]\n"


def pieces(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def question_of(prompt: str) -> str:
    """The question that `prompt` asks, in the form of any adapter; it is of letters, digits and dashes."""
    _, _, rest = prompt.partition("Q-")
    return "Q-" + "".join(char for char in rest.partition("-Z")[0]) + "-Z"


def assembled(chunks: Iterable[Any]) -> Message:
    """What an LM says at once that says `chunks` when it streams."""
    text, thought, calls = "", "", dict[int, list[ToolCallDelta]]()
    for chunk in chunks:
        if isinstance(chunk, ToolCallDelta):
            calls.setdefault(chunk.part_index, []).append(chunk)
        elif isinstance(chunk, ThinkingDelta):
            thought += chunk.text
        else:
            text += chunk
    parts: list[Any] = [ThinkingPart(thought)] if thought else []
    parts += [TextPart(text)] if text or not calls else []
    for first, *rest in calls.values():
        arguments = "".join(delta.input for delta in (first, *rest))
        parts.append(ToolCallPart(str(first.id), str(first.name), json.loads(arguments)))
    return Message.assistant(parts)


class Engine:
    """A synchronous engine, which counts its calls. If `native` it says that it can call tools, and reason."""

    def __init__(self, reply: Reply, *, native: bool = False) -> None:
        self.reply = reply
        self.calls = 0
        self.supports_function_calling = self.supports_reasoning = native

    def answer(self, request: Request) -> Iterable[Any]:
        self.calls += 1
        reply = self.reply(request.messages[-1].text or "")
        return [reply] if isinstance(reply, str) else reply

    def complete(self, request: Request) -> Response:
        message = assembled(self.answer(request))
        finish_reason = "tool_call" if message.parts_of(ToolCallPart) else "stop"
        return Response(id=None, model="test", message=message, finish_reason=finish_reason, usage=USAGE)

    def stream(self, request: Request) -> Iterator[Any]:
        yield StreamStartEvent(model="test")
        for chunk in self.answer(request):
            yield StreamDeltaEvent(delta=TextDelta(text=chunk) if isinstance(chunk, str) else chunk)
        yield StreamEndEvent(finish_reason="stop", usage=USAGE)

    def close(self) -> None:
        pass


class AsyncEngine:
    """Its asynchronous counterpart; `before_chunk` is awaited with the number of each chunk."""

    def __init__(self, sync: Engine, before_chunk: Callable[[int], Any] | None = None) -> None:
        self.sync = sync
        self.before_chunk = before_chunk

    async def complete(self, request: Request) -> Response:
        await anyio.lowlevel.checkpoint()
        return self.sync.complete(request)

    async def stream(self, request: Request) -> AsyncIterator[Any]:
        for number, event in enumerate(self.sync.stream(request)):
            if self.before_chunk is not None:
                await self.before_chunk(number)
            else:
                await anyio.lowlevel.checkpoint()
            yield event

    async def aclose(self) -> None:
        pass


def lm_of(
    reply: Reply, *, cache: bool = False, before_chunk: Callable[[int], Any] | None = None, native: bool = False
) -> Any:
    engine = Engine(reply, native=native)
    options = {"cache": cache, "num_retries": 0, "engine": engine}
    return dspy.LM("test/model", async_engine=AsyncEngine(engine, before_chunk), **options)
