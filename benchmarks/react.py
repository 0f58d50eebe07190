"""200 ReAct runs at once on one loop: DSPy's own calls, and the same programs run by agentcast, streamed.

`python -m benchmarks.react stock` and `python -m benchmarks.react hosted` are the processes that are measured: stock
DSPy has one in which agentcast is never imported. The parent lets them take turns, so that the machine's moods hit all
alike.
"""

import functools
import gc
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import anyio
import dspy
import orjson
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

from benchmarks.report import Row

RUNS, STEPS, LM_SECONDS, BURSTS, ROUNDS = 200, 3, 0.05, 5, 3
TICK = 0.005
FLUSH = 0.025
"""Seconds in which the events of a run are gathered, as a hub's recorder does it."""
ADAPTERS = ("Chat", "JSON", "XML")
CASES = {
    "dspy.ReAct": ("stock", "`acall`, without streaming and without agentcast, in a process of its own"),
    "dspy.ReAct, streamed": ("hosted", "stock DSPy's program, run by agentcast, all events drained"),
    "agentcast ReAct, streamed": ("hosted", "the same with agentcast's ReAct"),
    "agentcast ReAct, not streamed": ("hosted", "the same, set to show no text, so that no LM call streams"),
}


def measure() -> Iterator[Row]:
    with ExitStack() as stack:
        processes = {kind: stack.enter_context(_running(kind)) for kind in ("stock", "hosted")}
        for adapter in ADAPTERS:
            group = f"{RUNS} ReAct runs at once, {STEPS} tool calls each, an LM that takes 50 ms: {adapter}Adapter"
            rounds = [_round(processes, adapter) for _ in range(ROUNDS + 1)][1:]  # the first one imports
            stock = [taken["dspy.ReAct"] for taken in rounds]
            for case, (_, meaning) in CASES.items():
                taken = [taken[case] for taken in rounds]
                yield Row(group, case, "runs/s", [RUNS / one["wall"] for one in taken], meaning)
                yield Row(group, f"{case}: CPU", "ms/run", [one["cpu"] * 1_000 / RUNS for one in taken])
                if case != "dspy.ReAct":
                    ratios = [before["cpu"] / now["cpu"] for before, now in zip(stock, taken, strict=True)]
                    yield Row(group, f"{case}: runs for the CPU of a stock run", "×", ratios)
                stalls = [one["stall"] * 1_000 for one in taken]
                yield Row(group, f"{case}: longest stall", "ms", stalls, "how late a 5 ms ticker came at most")
                computed = [one["computed"] * 1_000 for one in taken]
                meaning = "the longest that the loop's thread has computed between two ticks: of a stall, our share"
                yield Row(group, f"{case}: longest computation", "ms", computed, meaning)


def _round(processes: dict[str, "subprocess.Popen[bytes]"], adapter: str) -> dict[str, dict[str, float]]:
    return {case: _ask(processes[kind], case, adapter) for case, (kind, _) in CASES.items()}


def _ask(process: "subprocess.Popen[bytes]", *words: str) -> dict[str, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(orjson.dumps(words) + b"\n")
    process.stdin.flush()
    answer: dict[str, float] = orjson.loads(process.stdout.readline())
    return answer


@contextmanager
def _running(kind: str) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "benchmarks.react", kind]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# -- In the processes --------------------------------------------------------------------------------------------------


def main(kind: str) -> None:
    """Measure what each line of stdin asks for."""
    for line in sys.stdin:
        case, adapter = orjson.loads(line)
        taken = anyio.run(_taken, case, adapter, backend_options={"use_uvloop": True})
        print(orjson.dumps(taken).decode(), flush=True)
    assert (kind == "hosted") == ("agentcast" in sys.modules)


async def _taken(case: str, adapter: str) -> dict[str, float]:
    lm = dspy.LM("slow/lm", engine=_Engine(), async_engine=_AsyncEngine(), cache=False, num_retries=0)
    run = _runner(case)
    turns: list[tuple[float, float]] = []
    with dspy.context(lm=lm, adapter=getattr(dspy, f"{adapter}Adapter")()):
        await run()
        gc.collect()
        gc.freeze()  # what was there before the runs is not searched for garbage while they go on
        async with anyio.create_task_group() as ticking:
            ticking.start_soon(_tick, turns)
            wall, cpu = time.perf_counter(), time.process_time()
            async with anyio.create_task_group() as group:
                for _ in range(RUNS):
                    group.start_soon(run)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            ticking.cancel_scope.cancel()
    stall, computed = map(max, zip(*turns, strict=True))
    return {"wall": wall, "cpu": cpu, "stall": stall, "computed": computed}


async def _tick(turns: list[tuple[float, float]]) -> None:
    """Note how late each tick comes, and how long the loop's thread has computed since the one before."""
    while True:
        due, computed = time.perf_counter() + TICK, time.thread_time()
        await anyio.sleep(TICK)
        turns.append((time.perf_counter() - due, time.thread_time() - computed))


async def lookup(topic: str, language: str = "English") -> str:
    """Look a topic up."""
    await anyio.sleep(0.001)
    return f"Documents in {language} are about {topic}: " + "it is described at length. " * 4


SIGNATURE = "question: str -> answer: str"


def _runner(case: str) -> Callable[[], Coroutine[Any, Any, None]]:
    question = "How do many agents share one event loop?"
    if case == "dspy.ReAct":
        program = dspy.ReAct(SIGNATURE, [lookup], max_iters=STEPS + 1)

        async def stock() -> None:
            prediction = await program.acall(question=question)
            _check(prediction)

        return stock
    from agentcast.agents.channel import Channel
    from agentcast.agents.execution import Execution
    from agentcast.agents.react import ReAct
    from agentcast.agents.streaming import run_program

    program = (dspy.ReAct if case.startswith("dspy") else ReAct)(SIGNATURE, [lookup], max_iters=STEPS + 1)
    messages = () if case.endswith("not streamed") else ("next_thought", "reasoning", "answer")

    async def played(channel: Any) -> Any:
        try:
            return await run_program(program, {"question": question}, channel, messages=messages)
        finally:
            channel.close()

    async def hosted() -> None:
        channel = Channel()
        execution = Execution(played(channel), channel)
        while await channel.receive():  # noqa: ASYNC110 -- a pace, no polling
            await anyio.sleep(FLUSH)
        await execution.done.wait()
        _check(execution.value.prediction)

    return hosted


def _check(prediction: Any) -> None:
    assert len(prediction.trajectory) == 4 * (STEPS + 1), "the model was not understood"
    assert "described at length" in prediction.trajectory[f"observation_{STEPS - 1}"], "the tool has failed"


def _values(request: Request) -> dict[str, Any]:
    system = request.system if isinstance(request.system, str) else "".join(part.text for part in request.system or ())
    if "next_tool_name" not in system:
        return {
            "reasoning": "The documents say that each of them waits most of the time, and computes little.",
            "answer": "They take turns: whoever waits for a language model or for a tool lets the others go on.",
        }
    done = len(set(re.findall(r"observation_\d+", request.messages[-1].text or "")))
    tool, args = ("lookup", {"topic": f"topic {done}", "language": "German"}) if done < STEPS else ("finish", {})
    thought = f"I have seen {done} results so far, and should find out more about how the loop is shared."
    return {"next_thought": thought, "next_tool_name": tool, "next_tool_args": args}


def _reply(request: Request) -> str:
    asked = request.messages[-1].text or ""
    values = _values(request)
    if "wrapped in XML tags" in asked:
        return "\n".join(f"<{name}>\n{_xml(value)}\n</{name}>" for name, value in values.items())
    if "Respond with a JSON object" in asked:
        return orjson.dumps(values).decode()
    shown = {name: value if isinstance(value, str) else orjson.dumps(value).decode() for name, value in values.items()}
    sections = "".join(f"[[ ## {name} ## ]]\n{text}\n\n" for name, text in shown.items())
    return f"{sections}[[ ## completed ## ]]\n"


def _xml(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(f"<{key}>{_xml(item)}</{key}>" for key, item in value.items())
    return str(value)


@functools.cache
def _response(text: str) -> Response:
    return Response(id=None, model="lm", message=Message.assistant(text), finish_reason="stop", usage=Usage())


@functools.cache
def _bursts(text: str) -> list[list[Any]]:
    """The events of a stream, word by word, in as many parts as a connection delivers: what they cost to make is the
    engine's own affair."""
    words = [StreamDeltaEvent(delta=TextDelta(text=word)) for word in re.findall(r"\S+\s*", text)]
    parts = [words[len(words) * at // BURSTS : len(words) * (at + 1) // BURSTS] for at in range(BURSTS)]
    return [*parts, [StreamEndEvent(finish_reason="stop", usage=Usage())]]


class _Engine:
    def complete(self, request: Request) -> Response:
        raise NotImplementedError


class _AsyncEngine:
    async def complete(self, request: Request) -> Response:
        await anyio.sleep(LM_SECONDS)
        return _response(_reply(request))

    async def stream(self, request: Request) -> AsyncIterator[Any]:
        yield StreamStartEvent(model="lm")
        *parts, end = _bursts(_reply(request))
        for part in parts:
            await anyio.sleep(LM_SECONDS / BURSTS)
            for event in part:
                yield event
        yield end[0]

    async def aclose(self) -> None:
        pass


if __name__ == "__main__":
    main(sys.argv[1])
