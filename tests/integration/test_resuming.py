"""The acceptance test: whatever happens to its connections, a client ends up with exactly the log (G1, G2, G10)."""

import random
from collections.abc import Sequence
from contextlib import suppress

import anyio
import pytest
from pydantic import BaseModel
from websockets.exceptions import ConnectionClosed

from agents.base import Emitter, ToolError
from agents.events import (
    Custom,
    Failure,
    LmEnd,
    LmStart,
    MessageEnd,
    MessageRetracted,
    MessageStart,
    NodeEnd,
    NodeError,
    NodeStart,
    StatePatch,
    Status,
    Token,
    ToolEnd,
    ToolProgress,
    ToolStart,
    Usage,
    ValidationFailed,
)
from tests.support.agents import agent
from tests.support.client import Memory
from tests.support.log import Log
from tests.support.hub import RunningHub, open_hub

RUNS = 50
FAILURE = "the work could not be finished"


class Seed(BaseModel):
    seed: int


class Work:
    """One run's work: a random mixture of everything an agent can emit, some of it at the same time."""

    def __init__(self, seed: int, emit: Emitter) -> None:
        self.rng = random.Random(seed)
        self.emit = emit

    async def pause(self) -> None:
        await anyio.sleep(self.rng.choice([0, 0, 0, 0.001, 0.004, 0.012]))

    async def message(self, name: str, span: str) -> None:
        await self.emit.send(MessageStart(message=name, span=span, field="answer"))
        words = [f"{name}-{i}☃ " for i in range(self.rng.randint(0, 25))]
        for word in words:
            await self.emit.send(Token(message=name, delta=word))
            await self.pause()
        if self.rng.random() < 0.2:
            await self.emit.send(MessageRetracted(message=name, reason="it did not validate"))
        else:
            await self.emit.send(MessageEnd(message=name, text="".join(words)))

    async def tool(self, name: str, parent: str) -> None:
        await self.emit.send(ToolStart(span=name, parent=parent, tool="look", args={"at": name, "none": None}))
        for step in range(self.rng.randint(0, 3)):
            await self.emit.send(ToolProgress(span=name, progress=step, total=3, message=f"step {step}"))
            await self.pause()
        if self.rng.random() < 0.3:
            error = Failure(code="not_found", message="nothing there")
            await self.emit.send(ToolEnd(span=name, tool="look", duration=0.1, error=error))
        else:
            await self.emit.send(ToolEnd(span=name, tool="look", duration=0.1, result=self.rng.choice([None, [1], "x"])))

    async def node(self, number: int) -> None:
        span = f"n{number}"
        await self.emit.send(NodeStart(span=span, node="think", kind="module", inputs={"number": number}))
        await self.emit.send(LmStart(span=f"{span}l", parent=span, model="m"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.message, f"{span}a", span)
            tasks.start_soon(self.message, f"{span}b", span)
            tasks.start_soon(self.tool, f"{span}t", span)
            await self.emit.send(Status(message=f"at {number}", span=span))
        usage = Usage(input_tokens=number, output_tokens=2)
        await self.emit.send(LmEnd(span=f"{span}l", duration=0.1, usage=usage))
        if self.rng.random() < 0.3:
            failed = ValidationFailed(
                span=span, node="think", attempt=1, max_retries=2, error="too short", failed_fields=("answer",)
            )
            await self.emit.send(failed)
            error = Failure(code="invalid", message="gave up")
            await self.emit.send(NodeError(span=span, node="think", error=error, duration=0.1))
        else:
            await self.emit.send(NodeEnd(span=span, node="think", patch={f"k{number}": number}, duration=0.1))


@agent("worker", input=Seed, max_concurrent=RUNS)
async def worker(input: Seed, emit: Emitter) -> dict[str, int]:
    work = Work(input.seed, emit)
    for number in range(work.rng.randint(2, 8)):
        await work.node(number)
        await emit.send(StatePatch(patch={"node": number}))
        await emit.send(Custom(name="mark", value=None))
    if input.seed % 10 == 3:
        raise ToolError(FAILURE)
    return {"seed": input.seed}


async def watch(hub: RunningHub, memory: Memory, runs: Sequence[str], rng: random.Random, detail: str) -> int:
    """Follow everything until all of `runs` have ended, losing the connection at random; gives how often."""
    cuts = 0
    while len(runs) < RUNS or not all(memory.view(run).ended for run in runs):
        async with hub.client(memory=memory, detail=detail) as client:
            with suppress(ConnectionClosed):
                result = await client.follow_all(detail=detail)
                assert result.get("feed_recovered", True)
                assert result["missing"] == []
                if rng.random() < 0.3:
                    client.cut()  # what has arrived is still read, the rest is lost
                for _ in range(rng.choice([0, 1, 5, 50, 500])):
                    if len(runs) == RUNS and all(memory.view(run).ended for run in runs):
                        break
                    await client.frame()
            client.cut()
            cuts += 1
    return cuts


@pytest.mark.parametrize("seed", [1, 2])
async def test_cut_and_resumed_at_random_during_fifty_runs_each_client_has_exactly_the_log(seed: int, log: Log) -> None:
    log.expect("of agent worker failed")
    rng = random.Random(seed)
    details = ["full", "full", "full", "progress"]
    memories = [Memory() for _ in details]
    runs: list[str] = []
    cuts: list[int] = []

    async def watcher(hub: RunningHub, memory: Memory, detail: str, seed: int) -> None:
        cuts.append(await watch(hub, memory, runs, random.Random(seed), detail))

    async with open_hub(worker) as hub, hub.client() as starter:
        for memory, detail in zip(memories, details, strict=True):
            async with hub.client(memory=memory) as client:
                await client.follow_all(detail=detail)  # before the first run: all that follows is theirs to see
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                for number, (memory, detail) in enumerate(zip(memories, details, strict=True)):
                    tasks.start_soon(watcher, hub, memory, detail, seed * 100 + number)
                for number in range(RUNS):
                    runs.append(await starter.start("worker", {"seed": number}, subscribe=False))
                    await anyio.sleep(rng.choice([0, 0, 0.02]))
                    if number % 10 == 7:
                        await starter.call("cancel", run=runs[rng.randrange(number)])

        assert sum(cuts) > 20, cuts
        async with hub.client() as reader, hub.http() as http:
            for run in runs:
                await reader.ask("subscribe", to={"run": run}, since={run: {"seq": 0}})
                logged = await reader.view(run)
                assert not logged.snapshots
                state = (await http.get(f"/v1/runs/{run}")).json()["state"]
                assert logged.document == state, "the fold of the log is the hub's state"
                for memory, detail in zip(memories, details, strict=True):
                    view = memory.view(run)
                    assert not view.snapshots, "nothing here is worth a snapshot"
                    assert not view.gaps
                    if detail == "full":
                        assert view.texts == logged.texts, f"{run} differs from the log"
                        assert view.document == state
                    else:
                        hidden = ("token", "message_start", "tool_progress")
                        assert view.events == [event for event in logged.events if event["event"] not in hidden]
        assert {memory.view(run).document["status"] for run in runs for memory in memories} == {
            "done",
            "failed",
            "cancelled",
        }
        await hub.core.stop()
        await starter.closed()
        await hub.idle()


async def test_nothing_is_left_of_runs_that_had_ended_where_the_client_already_was() -> None:
    async with open_hub(worker) as hub:
        async with hub.client() as client:
            runs = [await client.start("worker", {"seed": seed}) for seed in (1, 2)]
            await client.end(*runs)
        async with hub.client(memory=client.memory) as again:
            one = await again.ask("subscribe", to={"run": runs[0]}, since=client.memory.since())
            assert one["runs"][0]["recovered"] is True
            result = await again.ask("subscribe", to={"all": True}, since=client.memory.since())
            assert [told["recovered"] for told in result["runs"]] == [True, True]
            assert await again.quiet() == []
            assert (await again.refused("unsubscribe", subscription=one["subscription"]))["code"] == "not_found"
            assert not hub.core.hub._topics


async def test_a_client_cut_between_the_reply_and_the_runs_it_names_still_gets_them() -> None:
    async with open_hub(worker) as hub, hub.client() as starter:
        memory = Memory()
        async with hub.client(memory=memory) as client:
            await client.follow_all()
            client.cut()
        run = await starter.start("worker", {"seed": 1})
        await starter.end(run)
        async with hub.client(memory=memory) as client:
            await client.follow_all()
            client.cut()
        assert memory.view(run).events == []
        async with hub.client(memory=memory) as client:
            await client.follow_all()
            assert (await client.view(run)).texts == starter.memory.view(run).texts
