"""`python -m benchmarks.freezing ours|dspy SCENARIO [LIMIT]`: one scenario of streaming, with either `streamify`.

Each is bounded: left alone it is over in about a second. Prints one JSON object: whether it `finished`, whether all
came as it should (`right`), how many `items` came, and the `stall` of the event loop at its longest, in milliseconds.
An event loop that stands still cannot say so; a thread does, after `LIMIT` seconds (by default 6).
"""

import asyncio
import functools
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

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
    Usage,
)
from dspy.streaming import StatusMessage, StatusMessageProvider, StreamListener, StreamResponse
from dspy.utils.callback import BaseCallback

LIMIT = "6"
USAGE = Usage(input_tokens=10, output_tokens=5, total_tokens=15)
FIELD = "[[ ## answer ## ]]\n"

Streamify = Callable[..., Any]


class Engine:
    """Answers with the question, in small chunks with brackets at their ends, and a pause before each."""

    def __init__(self, pause: float, repeat: int) -> None:
        self.pause = pause
        self.repeat = repeat

    def text(self, request: Request) -> str:
        question = str(request.messages[-1].text).partition("Q-")[2].partition("-Z")[0]
        return f"{FIELD}{f'Q-{question}-Z [' * self.repeat}]\n\n[[ ## completed ## ]]"

    def complete(self, request: Request) -> Response:
        message = Message.assistant([TextPart(self.text(request))])
        return Response(id=None, model="model", message=message, finish_reason="stop", usage=USAGE)

    def stream(self, request: Request) -> Iterator[Any]:
        text = self.text(request)
        yield StreamStartEvent(model="model")
        for at in range(0, len(text), 4):
            time.sleep(self.pause)
            yield StreamDeltaEvent(delta=TextDelta(text=text[at : at + 4]))
        yield StreamEndEvent(finish_reason="stop", usage=USAGE)

    def close(self) -> None:
        pass


class AsyncEngine:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def complete(self, request: Request) -> Response:
        return self.engine.complete(request)

    async def stream(self, request: Request) -> AsyncIterator[Any]:
        pause, silent = self.engine.pause, Engine(0, self.engine.repeat)
        for event in silent.stream(request):
            await asyncio.sleep(pause)
            yield event

    async def aclose(self) -> None:
        pass


def lm(pause: float = 0.0, repeat: int = 4) -> Any:
    engine = Engine(pause, repeat)
    return dspy.LM("bench/model", cache=False, num_retries=0, engine=engine, async_engine=AsyncEngine(engine))


class Program(dspy.Module):  # type: ignore[misc]
    """Calls its tool a number of times, one after another or all at once, then asks."""

    def __init__(self, calls: int = 0, at_once: bool = False) -> None:
        self.calls = calls
        self.at_once = at_once
        self.tool = dspy.Tool(look, name="look")
        self.ask = dspy.Predict("question -> answer")

    async def aforward(self, question: str = "Q-0-Z") -> Any:
        if self.at_once:
            await asyncio.gather(*(self.tool.acall() for _ in range(self.calls)))  # noqa: TID251 -- as programs do
        else:
            for _ in range(self.calls):
                await self.tool.acall()
        return await self.ask.acall(question=question)


async def look() -> str:
    await asyncio.sleep(0.001)
    return "seen"


class Received:
    """How many items came so far, for a scenario that does not end."""

    items = 0


async def take(stream: Any, pause: float = 0.0) -> list[Any]:
    items = []
    async for item in stream:
        Received.items += 1
        items.append(item)
        await asyncio.sleep(pause)
    return items


def statuses(items: list[Any]) -> int:
    return sum(isinstance(item, StatusMessage) for item in items)


# -- Scenarios: each gives the items that came and whether they are right --------------------------------------------

Result = tuple[int, bool]


async def slow_consumer(streamify: Streamify) -> Result:
    """An async program with tools; its consumer takes 25 ms for each message."""
    items = await take(streamify(Program(20), is_async_program=True)(), 0.025)
    return len(items), statuses(items) == 40 and isinstance(items[-1], dspy.Prediction)


async def very_slow_consumer(streamify: Streamify) -> Result:
    """The same with 0.3 s, until the consumer has had enough."""
    items = []
    async for item in streamify(Program(20, at_once=True), is_async_program=True)():
        Received.items += 1
        items.append(item)
        if len(items) < 4:
            await asyncio.sleep(0.3)
    return len(items), statuses(items) == 40 and isinstance(items[-1], dspy.Prediction)


async def slow_ticks(streamify: Streamify) -> Result:
    """A token every 10 ms, 12 ms for each at the consumer; when the difference has added up, a tool is called."""

    class TokensFirst(Program):
        async def aforward(self, question: str = "Q-0-Z") -> Any:
            answer = await self.ask.acall(question=question)
            await self.tool.acall()
            return answer

    with dspy.context(lm=lm(0.01, 160)):
        items = await take(streamify(TokensFirst(), is_async_program=True)(), 0.012)
    return len(items), statuses(items) == 2 and isinstance(items[-1], dspy.Prediction)


async def many_tools(streamify: Streamify) -> Result:
    """50 tool calls at once; nobody is slow."""
    items = await take(streamify(Program(50, at_once=True), is_async_program=True)())
    return len(items), statuses(items) == 100


async def one_slow_client(streamify: Streamify) -> Result:
    """20 clients of one program; one of them is slow. Right is that the 19 were through before it."""
    program = streamify(Program(20), is_async_program=True)
    finished: list[int] = []

    async def client(number: int) -> int:
        items = await take(program(), 0.02 if number == 7 else 0)
        finished.append(number)
        return len(items)

    counts = await asyncio.gather(*(client(number) for number in range(20)))  # noqa: TID251 -- as programs do
    return sum(counts), finished[-1] == 7 and len(set(counts)) == 1


async def debug_mode(streamify: Streamify) -> Result:
    """40 tool calls at once in asyncio's debug mode."""
    asyncio.get_running_loop().set_debug(True)
    items = await take(streamify(Program(40, at_once=True), is_async_program=True)())
    return len(items), statuses(items) == 80


async def break_and_keep(streamify: Streamify) -> Result:
    """`break` out of the stream, which is still referenced; then something else is done."""
    stream = streamify(Program(40), is_async_program=True)()
    async for _ in stream:
        Received.items += 1
        break
    for _ in range(20):
        await asyncio.sleep(0.01)
    return 1, stream is not None


async def no_prediction(streamify: Streamify) -> Result:
    """A program that returns a number."""

    class Seven(dspy.Module):  # type: ignore[misc]
        async def aforward(self) -> int:
            return 7

    items = await take(streamify(Seven(), is_async_program=True)())
    return len(items), items == [7]


async def parallel(streamify: Streamify) -> Result:
    """Tools in `dspy.Parallel`, in a synchronous program."""

    class Both(dspy.Module):  # type: ignore[misc]
        def forward(self) -> Any:
            tool = dspy.Tool(lambda: "seen", name="look")
            pairs: list[Any] = [(lambda **_: tool(), {}) for _ in range(4)]
            dspy.Parallel(num_threads=2, disable_progress_bar=True)(pairs)
            return dspy.Prediction()

    items = await take(streamify(Both())())
    return len(items), statuses(items) == 8


async def parallel_tokens(streamify: Streamify) -> Result:
    """LM calls in `dspy.Parallel` with a listener."""

    class Both(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ask = dspy.Predict("question -> answer")

        def forward(self) -> Any:
            pairs = [(self.ask, {"question": "Q-1-Z"})] * 2
            return dspy.Parallel(num_threads=2, disable_progress_bar=True, max_errors=9)(pairs)[0]

    items = await take(streamify(Both(), stream_listeners=[StreamListener("answer")])())
    heard = "".join(item.chunk for item in items if isinstance(item, StreamResponse))
    return len(items), heard == getattr(items[-1], "answer", None)


async def mixing(streamify: Streamify, clients: int = 104) -> Result:
    """Many runs of one program with a listener at once: each gets its own text, and all of it."""
    await take(streamify(Program(), is_async_program=True)())  # what the first run imports would make all start late
    program = streamify(Program(), stream_listeners=[StreamListener("answer")], is_async_program=True)
    wrong = 0

    async def client(number: int) -> int:
        nonlocal wrong
        await asyncio.sleep(number * 0.015)
        with dspy.context(lm=lm(0.002, 12)):
            items = await take(program(question=f"Q-{number}-Z"))
        heard = "".join(item.chunk for item in items if isinstance(item, StreamResponse))
        wrong += heard != items[-1].answer
        return len(items)

    counts = await asyncio.gather(*(client(number) for number in range(clients)))  # noqa: TID251 -- as programs do
    return sum(counts), wrong == 0


async def brackets(streamify: Streamify) -> Result:
    """One run whose text has brackets in it."""
    return await mixing(streamify, 1)


async def sequential(streamify: Streamify) -> Result:
    """One program with a listener, twice, one after another."""
    program = streamify(Program(), stream_listeners=[StreamListener("answer")], is_async_program=True)
    counts = [sum(isinstance(item, StreamResponse) for item in await take(program())) for _ in range(2)]
    return sum(counts), min(counts) > 0


async def failing(streamify: Streamify) -> Result:
    """The program fails while its consumer is busy: the consumer gets that error, and is not cancelled."""

    class Fails(dspy.Module):  # type: ignore[misc]
        async def aforward(self) -> Any:
            await dspy.Tool(look, name="look").acall()
            await asyncio.sleep(0.01)
            raise KeyError("mine")

    items: list[Any] = []
    try:
        async for item in streamify(Fails(), is_async_program=True)():
            items.append(item)
            await asyncio.sleep(0.05)
    except BaseException as error:  # noqa: BLE001 -- CancelledError is what is wrong
        return len(items), isinstance(error, KeyError) and len(items) == 2
    return len(items), False


async def closing(streamify: Streamify) -> Result:
    """`aclose()` in the middle raises nothing."""
    stream = streamify(Program(40), is_async_program=True)()
    await anext(stream)
    try:
        await stream.aclose()
        await asyncio.sleep(0.01)
    except BaseException:  # noqa: BLE001 -- CancelledError is what is wrong
        return 1, False
    return 1, True


class Modules(StatusMessageProvider):  # type: ignore[misc]
    def lm_start_status_message(self, instance: Any, inputs: Any) -> str:
        return "lm"


async def silenced(streamify: Streamify) -> Result:
    """A listener on one predictor, statuses of LM calls of both."""

    class Two(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.first = dspy.Predict("question -> answer")
            self.second = dspy.Predict("question -> answer")

        async def aforward(self) -> Any:
            await self.first.acall(question="Q-1-Z")
            return await self.second.acall(question="Q-2-Z")

    program = Two()
    listeners = [StreamListener("answer", predict=program.first, predict_name="first")]
    items = await take(streamify(program, Modules(), listeners, is_async_program=True)())
    return len(items), statuses(items) == 2


async def callbacks(streamify: Streamify) -> Result:
    """Callbacks that are given with `dspy.context` where the program is called."""
    seen = []

    class Mine(BaseCallback):  # type: ignore[misc]
        def on_tool_start(self, call_id: str, instance: Any, inputs: Any) -> None:
            seen.append(instance.name)

    program = streamify(Program(1), is_async_program=True)
    with dspy.context(callbacks=[Mine()]):
        items = await take(program())
    return len(items), seen == ["look"]


async def sync_programs(streamify: Streamify) -> Result:
    """24 synchronous programs at once, with slow consumers. DSPy runs eight of them at a time."""

    class Looks(dspy.Module):  # type: ignore[misc]
        def forward(self) -> Any:
            for _ in range(10):
                dspy.Tool(lambda: "seen", name="look")()
            return dspy.Prediction()

    program = streamify(Looks())
    takers = [take(program(), 0.005) for _ in range(24)]
    all_items = await asyncio.gather(*takers)  # noqa: TID251 -- as programs do
    return sum(map(len, all_items)), all(statuses(items) == 20 for items in all_items)


SCENARIOS: dict[str, Callable[[Streamify], Awaitable[Result]]] = {
    scenario.__name__: scenario
    for scenario in (
        slow_consumer, very_slow_consumer, slow_ticks, many_tools, one_slow_client, debug_mode, break_and_keep,
        no_prediction, parallel, parallel_tokens, mixing, brackets, sequential, failing, closing, silenced, callbacks,
        sync_programs,
    )
}  # fmt: skip


# -- Running one -----------------------------------------------------------------------------------------------------


class Stalls:
    """How long the event loop does nothing else, at most."""

    def __init__(self) -> None:
        self.longest = 0.0
        self.last = time.monotonic()

    async def watch(self) -> None:
        while True:
            self.last = time.monotonic()
            await asyncio.sleep(0.005)
            self.longest = max(self.longest, time.monotonic() - self.last - 0.005)


def report(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def give_up(stalls: Stalls, limit: float) -> None:
    time.sleep(limit)
    stall = max(stalls.longest, time.monotonic() - stalls.last)
    report(finished=False, right=False, items=Received.items, stall=round(stall * 1000, 1))
    os._exit(0)


async def run(streamify: Streamify, name: str, limit: float) -> None:
    stalls = Stalls()
    threading.Thread(target=give_up, args=(stalls, limit), daemon=True).start()
    watcher = asyncio.get_running_loop().create_task(stalls.watch())
    with dspy.context(lm=lm()):
        items, right = await SCENARIOS[name](streamify)
    watcher.cancel()
    report(finished=True, right=right, items=items, stall=round(stalls.longest * 1000, 1))


def main(which: str, name: str, limit: str = LIMIT) -> None:
    if which == "ours":
        from agentcast.agents.streaming import streamify
    else:
        streamify = functools.partial(dspy.streamify)
    asyncio.run(run(streamify, name, float(limit)))
    os._exit(0)  # what DSPy may have left frozen in threads must not keep the process


if __name__ == "__main__":
    main(*sys.argv[1:])
