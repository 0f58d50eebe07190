"""The Python client, `agentcast.connect`, against a real hub."""

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from agentcast import connect
from agentcast.agents.base import Emitter
from agentcast.agents.events import Status
from agentcast.server.client import BadUrl, Refused, RunFailed, Unreachable
from tests.support.agents import agent
from tests.support.hub import RunningHub, open_hub
from tests.support.log import Log
from tests.support.redis import free_port


class Order(BaseModel):
    what: str


@agent("shop", input=Order)
async def shop(order: Order, emit: Emitter) -> dict[str, str]:
    await emit.send(Status(message=f"looking for {order.what}"))
    return {"found": order.what}


@agent("broken")
async def broken(_: Any, emit: Emitter) -> None:
    raise ValueError("out of order")


@agent("endless")
async def endless(_: Any, emit: Emitter) -> None:
    await anyio.sleep_forever()


@pytest.fixture
async def hub() -> AsyncIterator[RunningHub]:
    async with open_hub(shop, broken, endless) as hub:
        yield hub


async def test_a_run_is_started_and_followed_to_its_result(hub: RunningHub):
    with anyio.fail_after(10):
        async with connect(hub.url).start("shop", {"what": "a pen"}) as run:
            events = [event async for event in run]
            assert await run.result() == {"found": "a pen"}
    assert [event["event"] for event in events] == ["run_queued", "run_start", "status", "run_end"]
    assert [event["seq"] for event in events] == [1, 2, 3, 4]
    assert {event["run"] for event in events} == {run.id}
    async with hub.http() as http:
        assert (await http.get(f"/v1/runs/{run.id}")).json()["state"] == run.state


async def test_the_result_can_be_had_without_the_events(hub: RunningHub):
    with anyio.fail_after(10):
        async with connect(hub.url).start("shop", {"what": "a pen"}) as run:
            assert await run.result() == {"found": "a pen"}


async def test_a_run_that_fails_has_no_result_but_a_reason(hub: RunningHub, log: Log):
    log.expect("of agent broken failed")
    with anyio.fail_after(10):
        async with connect(hub.url).start("broken", {}) as run:
            with pytest.raises(RunFailed, match="out of order") as caught:
                await run.result()
    assert (caught.value.status, caught.value.run) == ("failed", run.id)
    assert caught.value.code == run.state["error"]["code"]


async def test_a_run_that_is_cancelled_has_no_result(hub: RunningHub):
    with anyio.fail_after(10):
        async with connect(hub.url).start("endless", {}) as run:
            async for event in run:
                if event["event"] == "run_start":
                    await run.cancel("enough")
            with pytest.raises(RunFailed, match="cancelled"):
                await run.result()


async def test_entering_starts_the_run(hub: RunningHub):
    with anyio.fail_after(10):
        async with hub.client() as watcher:
            await watcher.call("subscribe", to={"agent": "endless"})
            async with connect(hub.url).start("endless", {}):
                pass
            event = await watcher.event("run_start")
            assert event["agent"] == "endless"


async def test_the_same_key_gives_the_same_run_and_a_thread_is_passed_on(hub: RunningHub):
    client = connect(hub.url)
    runs = []
    with anyio.fail_after(10):
        for _ in range(2):
            async with client.start("shop", {"what": "a pen"}, key="order-1", thread="t1") as run:
                await run.result()
            runs.append(run)
    assert runs[0].id == runs[1].id
    assert {run.state["thread"] for run in runs} == {"t1"}


async def test_agents_are_described(hub: RunningHub):
    document = await connect(hub.url).describe()
    assert [agent["name"] for agent in document["agents"]] == ["shop", "broken", "endless"]
    assert document["agents"][0]["input"]["required"] == ["what"]


async def test_what_the_hub_refuses_is_raised(hub: RunningHub):
    with anyio.fail_after(10):
        async with connect(hub.url).start("nobody", {}) as run:
            with pytest.raises(Refused, match="nobody"):
                await run.result()


async def test_no_hub_is_noticed_on_entering():
    nobody = connect(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(Unreachable, match="refused"):
        await nobody.describe()
    with pytest.raises(Unreachable, match="refused"):
        async with nobody.start("shop", {}):
            pass
    with pytest.raises(BadUrl):
        connect("ftp://example.org")
