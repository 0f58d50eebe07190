"""Ended runs take bounded memory, and a client that still wants a forgotten run learns that it is missing (G2)."""

from agentcast.agents.base import Emitter
from agentcast.agents.events import Status
from agentcast.server.bus.memory import MemoryBus
from tests.support.agents import Anything, agent
from tests.support.hub import open_hub


@agent("wordy")
async def wordy(input: Anything, emit: Emitter) -> str:
    for _ in range(int(getattr(input, "events", 3))):
        await emit.send(Status(message="x" * 10_000))
    return "done"


async def test_a_run_larger_than_all_that_is_kept_is_there_until_the_next_one_ends() -> None:
    async with open_hub(wordy, bus=MemoryBus(max_ended_bytes=5_000)) as hub, hub.client() as client:
        first = await client.start("wordy")
        live = await client.view(first)
        async with hub.client() as reader:
            await reader.ask("subscribe", to={"run": first}, since={first: {"seq": 0}})
            assert (await reader.view(first)).texts == live.texts
        second = await client.start("wordy")
        await client.end(second)
        assert (await client.refused("subscribe", to={"run": first}))["code"] == "not_found"
        assert (await client.ask("subscribe", to={"all": True}, since={first: {"seq": 0}}))["missing"] == [first]


async def test_a_client_behind_on_a_forgotten_run_comes_back_and_finds_it_missing() -> None:
    async with open_hub(wordy, bus=MemoryBus(max_ended=1)) as hub, hub.client() as other:
        async with hub.client() as slow:
            await slow.follow_all()
            slow.ws.transport.pause_reading()
            forgotten = await other.start("wordy", {"events": 900})
            await other.end(forgotten)
            kept = await other.start("wordy")
            await other.end(kept)
            slow.ws.transport.resume_reading()
            assert (await slow.closed())[0] == 4003
            assert not slow.memory.view(forgotten).ended
        async with hub.client(memory=slow.memory) as slow:
            assert (await slow.follow_all())["missing"] == [forgotten]
            assert (await slow.view(kept)).texts == other.memory.view(kept).texts
