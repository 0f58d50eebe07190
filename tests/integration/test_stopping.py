"""Stopping, seen from inside: the last events reach even a client that is far behind (G2, G6, G7)."""

import anyio
import pytest

from agentcast.agents.base import Emitter
from agentcast.agents.events import Status
from tests.support.agents import Anything, agent
from tests.support.hub import open_hub
from tests.support.raw import deaf


@agent("holding")
async def holding(input: Anything, emit: Emitter) -> None:
    for _ in range(int(getattr(input, "events", 1))):
        await emit.send(Status(message="x" * int(getattr(input, "bytes", 10))))
    await anyio.sleep_forever()


@pytest.mark.usefixtures("each_server")
async def test_a_client_that_is_behind_gets_the_end_of_each_run_before_the_close() -> None:
    async with open_hub(holding) as hub, hub.client() as client, hub.client() as other:
        await client.follow_all()
        client.ws.transport.pause_reading()
        run = await other.start("holding", {"events": 700, "bytes": 10_000})
        while other.memory.view(run).seq < 702:
            await other.frame()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hub.stop)
            assert await other.closed() == (4001, "shutting_down")
            client.ws.transport.resume_reading()
            assert await client.closed() == (4001, "shutting_down")
        view = client.memory.view(run)
        assert view.texts == other.memory.view(run).texts
        assert view.document["error"]["code"] == "shutting_down"


async def test_a_client_that_never_reads_does_not_hold_up_the_stop() -> None:
    async with open_hub(holding) as hub, deaf(hub.port) as slow, hub.client() as other:
        await slow.send('{"op":"subscribe","to":{"all":true}}')
        run = await other.start("holding", {"events": 400, "bytes": 60_000})
        while other.memory.view(run).seq < 402:
            await other.frame()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hub.stop)
            assert (await other.closed())[0] == 4001
            with anyio.fail_after(4):
                await hub.server.down.wait()
        assert len(hub.core.connections) == 0


@pytest.mark.usefixtures("each_server")
async def test_queued_runs_end_at_once_and_running_ones_get_the_grace() -> None:
    gate = anyio.Event()

    @agent("gated", max_concurrent=1)
    async def gated(input: Anything, emit: Emitter) -> str:
        await gate.wait()
        return "finished"

    async with open_hub(gated, grace=5.0) as hub, hub.client() as client:
        running, queued = await client.start("gated"), await client.start("gated")
        await client.event("run_start", running)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hub.stop)
            await client.end(queued)
            assert client.memory.view(queued).names == ["run_queued", "run_error"]
            assert client.memory.view(queued).document["error"]["code"] == "shutting_down"
            assert not client.memory.view(running).ended
            gate.set()
            assert (await client.closed())[0] == 4001
        assert client.memory.view(running).document["result"] == "finished"


async def test_who_connects_during_the_stop_is_greeted_and_let_go() -> None:
    gate = anyio.Event()

    @agent("gated")
    async def gated(input: Anything, emit: Emitter) -> None:
        await gate.wait()

    async with open_hub(gated, grace=5.0) as hub, hub.client() as client:
        run = await client.start("gated")
        await client.event("run_start", run)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hub.core.stop)
            async with hub.client() as late:  # while the runs end, it still can watch
                await late.ask("subscribe", to={"all": True})
                gate.set()
                assert (await late.closed())[0] == 4001
                assert late.memory.view(run).ended
        async with hub.client() as latest:
            assert await latest.closed() == (4001, "shutting_down")


async def test_stopping_leaves_no_task_behind() -> None:
    async with open_hub(holding) as hub, hub.client() as client:
        before = hub.tasks()
        runs = [await client.start("holding") for _ in range(20)]
        for run in runs:
            await client.event("status", run)
        await hub.core.stop()
        assert (await client.closed())[0] == 4001
        await hub.idle()
        assert hub.core.runs.active == 0
        assert hub.tasks() <= before
