"""Detail `summary`, the list that lives and `truncated` over real sockets (G1, G4, G9)."""

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from agentcast.server.hub import outbox
from tests.support.agents import Anything, agent
from tests.support.client import Client, Memory
from tests.support.hub import RunningHub, open_hub
from tests.support.published import finish, publish, record_of, run_on

pytestmark = pytest.mark.usefixtures("each_server")


@agent("sleeper")
async def sleeper(input: Anything, emit: Any) -> None:
    await anyio.sleep_forever()


@pytest.fixture
async def hub() -> AsyncIterator[RunningHub]:
    async with open_hub(sleeper) as hub:
        yield hub


async def seen(client: Client, wanted: dict[str, int]) -> dict[str, int]:
    """Read summaries until those of the wanted runs are as new as wanted; gives how many of each came."""
    newest: dict[str, int] = {}
    counts: dict[str, int] = {}
    with anyio.fail_after(10):
        while any(newest.get(run, 0) < at for run, at in wanted.items()):
            frame = await client.until(lambda frame: frame["type"] == "summary")
            for record in frame["runs"]:
                newest[record["run"]] = record.get("at", 0)
                counts[record["run"]] = counts.get(record["run"], 0) + 1
    assert newest == wanted
    return counts


async def test_a_dashboard_sees_the_newest_of_every_run_and_comes_back_to_the_same(hub: RunningHub) -> None:
    logs = [await run_on(hub.core.bus) for _ in range(50)]
    for log in logs:
        await publish(log, 1)
    memory = Memory()
    async with hub.client(memory=memory) as client:
        assert await client.ask("subscribe", to={"all": True}, detail="summary") == {"subscription": "s1"}
        await seen(client, {log.run: 1 for log in logs})
        for at in range(2, 200):
            await hub.core.bus.publish_summaries([record_of(log, at) for log in logs])
            await checkpoint()
        counts = await seen(client, {log.run: 199 for log in logs})
        assert max(counts.values()) <= 20, "the latest wins"
        client.cut()
    await finish(logs[0], 500)
    async with hub.client(memory=memory) as client:
        await client.ask("subscribe", to={"all": True}, detail="summary")
        await seen(client, {log.run: 199 for log in logs[1:]})
        await finish(logs[1], 500)
        await seen(client, {logs[1].run: 500})
        await client.ask("unsubscribe", subscription="s1")
        await publish(logs[2], 300)
        assert await client.quiet() == []
    await hub.idle()
    assert hub.core.hub.summaries.board.unwatched


async def test_a_run_is_started_and_watched_by_its_summaries_alone(hub: RunningHub) -> None:
    async with hub.client() as client:
        result = await client.ask("start", agent="sleeper", input={}, detail="summary")
        assert result.keys() == {"run", "epoch", "subscription"}
        frame = await client.frame()
        assert (frame["type"], frame["runs"][0]["run"]) == ("summary", result["run"])
        assert not hub.core.hub.topics
        await client.ask("cancel", run=result["run"])


async def test_a_page_of_the_list_lives(hub: RunningHub) -> None:
    logs = [await run_on(hub.core.bus, thread="t") for _ in range(3)]
    async with hub.client() as client, hub.http() as http:
        page = await client.ask("list", thread="t", limit=2, subscribe=True)
        assert [record["run"] for record in page["runs"]] == [logs[2].run, logs[1].run]
        assert (page["next"], page["subscription"]) == (logs[1].run, "s1")
        rest = await client.ask("list", thread="t", limit=2, after=page["next"])
        assert [record["run"] for record in rest["runs"]] == [logs[0].run]
        assert rest.keys() == {"runs"}

        new = await run_on(hub.core.bus, thread="t")
        await publish(new, 1, thread="t")
        await client.until(lambda frame: frame["type"] == "list" and frame["runs"] == [new.run, logs[2].run])
        await publish(new, 7, thread="t")
        await seen(client, {new.run: 7})
        await finish(logs[0], 500, thread="t")

        body = (await http.get("/v1/runs", params={"thread": "t", "limit": "3", "order": "oldest"})).json()
        assert [row["run"] for row in body["runs"]] == [log.run for log in logs]
        assert body["next"] == logs[2].run
        assert [row["summary"]["status"] for row in body["runs"]] == ["done", "queued", "queued"]
        assert (body["runs"][0]["summary"]["at"], body["runs"][0]["active"]) == (500, False)
        await client.ask("unsubscribe", subscription="s1")
    await hub.idle()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"op": "list", "limit": 0}, "limit"),
        ({"op": "list", "limit": 1001}, "limit"),
        ({"op": "list", "status": "done"}, "status"),
        ({"op": "list", "status": ["over"]}, "status"),
        ({"op": "list", "order": "up"}, "order"),
        ({"op": "subscribe", "to": {"runs": ["a"]}}, '"detail": "summary"'),
        ({"op": "subscribe", "to": {"runs": []}, "detail": "summary"}, "to.runs"),
        ({"op": "subscribe", "to": {"all": True}, "detail": "summary", "since": {"a": {"seq": 1}}}, "`since`"),
        ({"op": "subscribe", "to": {"all": True}, "detail": "least"}, "'summary'"),
    ],
)
async def test_what_is_wrong_with_a_command_is_named(hub: RunningHub, fields: dict[str, Any], named: str) -> None:
    async with hub.client() as client:
        error = await client.refused(**fields)
        assert error["code"] == "bad_request"
        assert named in error["message"]


async def test_runs_beyond_what_a_connection_follows_are_counted_and_it_goes_on(
    hub: RunningHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "MAX_FOLLOWED", 2)
    async with hub.client() as client, hub.client() as starter:
        runs = [await starter.start("sleeper", subscribe=False) for _ in range(5)]
        result = await client.ask("subscribe", to={"all": True})
        assert result["truncated"] == 3
        assert [item["run"] for item in result["runs"]] == runs[3:]
        await starter.start("sleeper", subscribe=False)
        frame = await client.until(lambda frame: frame["type"] == "truncated")
        assert frame == {"type": "truncated", "subscription": "s1", "runs": 1}

        started = await client.ask("start", agent="sleeper", input={})
        assert started.keys() == {"run", "epoch", "truncated"}
        assert started["truncated"] == 1
        assert await client.ask("subscribe", to={"run": runs[0]}) == {"runs": [], "truncated": 1}
        for gone in ("s2", "s3"):
            assert (await client.refused("unsubscribe", subscription=gone))["code"] == "not_found", "it takes no place"
        assert await client.ask("ping") == {}


async def test_two_clients_of_different_speed_have_the_same_in_the_end(hub: RunningHub) -> None:
    logs = [await run_on(hub.core.bus) for _ in range(200)]
    async with hub.client() as fast, hub.client() as slow:
        for client in (fast, slow):
            await client.ask("subscribe", to={"all": True}, detail="summary")
        for at in range(1, 100):
            await hub.core.bus.publish_summaries([record_of(log, at) for log in logs])
            await checkpoint()
        wanted = {log.run: 99 for log in logs}
        await seen(fast, wanted)
        await seen(slow, wanted)
