"""Compiled graphs: what they add to the language model's own time, and what a step costs when the state is large."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import anyio
import dspy
from dspy.lm15 import Message, Request, Response, Usage
from pydantic import BaseModel

from agentcast.agents.graph import END, Graph, StatefulNode
from agentcast.agents.transpiler import AgentTranspiler, Program
from benchmarks.report import Row

Call = Callable[[], Coroutine[Any, Any, Any]]

GROUP = "Graphs"
RUNS, LM_SECONDS, STEPS, DOCUMENTS, ROUNDS = 48, 0.05, 200, 500, 5


class Question(BaseModel):
    question: str


class Answer(BaseModel):
    answer: str


class Document(BaseModel):
    id: int
    title: str
    text: str
    tags: list[str]


class Count(BaseModel):
    n: int


class Library(Count):
    documents: list[Document]


LIBRARY = [Document(id=n, title=f"Document {n}", text="word " * 100, tags=["a", "b"]) for n in range(DOCUMENTS)]


def measure() -> Iterator[Row]:
    program = _one_node()
    predict = dspy.Predict("question -> answer")
    runs: list[tuple[str, Call, str]] = [
        ("aforward", lambda: program.aforward(question="?"), "at once, one LM node each, an LM that takes 50 ms"),
        ("astream", lambda: _drain(program.astream(question="?")), "the same, with all its events"),
        ("dspy.Predict alone", lambda: predict.acall(question="?"), "without a graph"),
        ("dspy.Predict on asyncio's threads", lambda: asyncio.to_thread(predict, question="?"), "as peers do it"),
    ]
    for what, call, meaning in runs:
        rounds = [_timed(_together, call) for _ in range(ROUNDS + 1)][1:]  # the first one imports
        yield Row(GROUP, f"{RUNS} runs, {what}", "ms", rounds, meaning)
    steps: list[tuple[str, type[BaseModel], bool, str]] = [
        ("beside 500 documents, aforward", Count, False, "the state has 500 documents of 500 characters"),
        ("beside 500 documents, astream", Count, True, "the same, with all its events"),
        ("given 500 documents, aforward", Library, False, "it is given copies of them all"),
        ("given 500 documents, astream", Library, True, "and everybody is shown a cut of them"),
    ]
    for what, model, streamed, meaning in steps:
        loop = _loop(model)
        rounds = [_timed(_step_time, loop, streamed) for _ in range(ROUNDS)]
        yield Row(GROUP, f"a no-op step {what}", "ms", rounds, meaning)


def _timed(case: Callable[..., Any], *args: Any) -> float:
    """Milliseconds."""
    seconds: float = anyio.run(case, *args, backend_options={"use_uvloop": True})
    return seconds * 1_000


def _one_node() -> Program[Answer]:
    graph = Graph()
    graph.add_node(StatefulNode("answer", Question, Answer))
    graph.set_entry_point("answer")
    return AgentTranspiler.compile(graph, output_model=Answer)


def _loop(model: type[BaseModel]) -> Program[Count]:
    async def step(given: Any) -> dict[str, int]:
        return {"n": given.n + 1}

    async def again(state: Any) -> bool:
        return bool(state.n < STEPS)

    graph = Graph(input_model=Library, max_steps=STEPS)
    graph.add_node(StatefulNode("step", model, Count, fn=step))
    graph.add_conditional_edges("step", again, {True: "step", False: END})
    graph.set_entry_point("step")
    return AgentTranspiler.compile(graph, output_model=Count)


async def _together(call: Call) -> float:
    lm = dspy.LM("slow/lm", engine=_Slow(), async_engine=_AsyncSlow(), cache=False, num_retries=0)
    with dspy.context(lm=lm, disable_history=True, trace=None):
        start = time.perf_counter()
        async with anyio.create_task_group() as group:
            for _ in range(RUNS):
                group.start_soon(call)
        return time.perf_counter() - start


async def _step_time(program: Program[Count], streamed: bool) -> float:
    start = time.perf_counter()
    if streamed:
        await _drain(program.astream(n=0, documents=LIBRARY))
    else:
        await program.aforward(n=0, documents=LIBRARY)
    return (time.perf_counter() - start) / STEPS


async def _drain(stream: Any) -> None:
    async for _ in stream:
        pass


def _answer(request: Request) -> Response:
    message = Message.assistant("[[ ## answer ## ]]\n42\n\n[[ ## completed ## ]]")
    return Response(id=None, model=request.model, message=message, finish_reason="stop", usage=Usage())


class _Slow:
    def complete(self, request: Request) -> Response:
        time.sleep(LM_SECONDS)
        return _answer(request)


class _AsyncSlow:
    async def complete(self, request: Request) -> Response:
        await anyio.sleep(LM_SECONDS)
        return _answer(request)

    async def aclose(self) -> None:
        pass
