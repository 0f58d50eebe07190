"""Every command over a real socket: what it answers, and what follows."""

import json

import anyio
import pytest
from pydantic import BaseModel

from agentcast import __version__
from agentcast.agents.base import Emitter
from agentcast.agents.events import MessageEnd, MessageStart, Status, Token
from tests.support.agents import Anything, FunctionAgent, agent
from tests.support.client import Client
from tests.support.hub import open_hub

pytestmark = pytest.mark.usefixtures("each_server")


class Words(BaseModel):
    n: int


@agent("talker", input=Words)
async def talker(input: Words, emit: Emitter) -> dict[str, int]:
    """Says n words in one message."""
    await emit.send(MessageStart(message="m", span="s", field="answer"))
    for i in range(input.n):
        await emit.send(Token(message="m", delta=f"w{i} "))
    await emit.send(MessageEnd(message="m", text="".join(f"w{i} " for i in range(input.n))))
    return {"n": input.n}


class Held:
    """An agent whose runs wait until they are let go."""

    def __init__(self, name: str = "held", **options: float) -> None:
        self.gate = anyio.Event()
        self.agent = agent(name, **options)(self._run)  # type: ignore[arg-type]

    async def _run(self, input: Anything, emit: Emitter) -> str:
        await emit.send(Status(message="waiting"))
        await self.gate.wait()
        await emit.send(Status(message="going on"))
        return "done"


async def test_hello_comes_first_and_states_the_limits() -> None:
    async with open_hub(heartbeat=7.5) as hub, hub.client() as client, hub.client() as other:
        assert client.hello["protocol"] == 1
        assert client.hello["server"] == f"agentcast/{__version__}"
        assert client.hello["heartbeat"] == 7.5
        assert client.hello["limits"] == {"message_bytes": 262144, "subscriptions": 128, "commands": 64}
        assert client.hello["session"] != other.hello["session"]


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [((), None), (("agentcast.v1",), "agentcast.v1"), (("x", "agentcast.v1"), "agentcast.v1"), (("x",), None)],
)
async def test_the_subprotocol_is_given_back_if_it_was_offered(offered: tuple[str, ...], chosen: str | None) -> None:
    async with open_hub() as hub, hub.client(subprotocols=offered) as client:
        assert client.ws.subprotocol == chosen
        assert await client.ask("ping") == {}


async def test_ping_is_answered_under_the_id_it_came_with() -> None:
    async with open_hub() as hub, hub.client() as client:
        for id in (1, "one", 0, "", -5, 2**53):
            assert await client.call("ping", id=id) == {"type": "reply", "id": id, "ok": True, "result": {}}
        await client.ws.send('{"op":"ping"}')
        assert await client.frame() == {"type": "reply", "ok": True, "result": {}}


async def test_unknown_fields_are_ignored() -> None:
    async with open_hub() as hub, hub.client() as client:
        assert await client.ask("ping", extra={"a": None}) == {}


# -- start ---------------------------------------------------------------------------------------------------------


async def test_start_replies_and_then_streams_the_run_from_its_first_event() -> None:
    async with open_hub(talker) as hub, hub.client() as client:
        result = await client.ask("start", agent="talker", input={"n": 3})
        assert result.keys() == {"run", "epoch", "subscription"}
        view = await client.view(result["run"])
        assert view.names[:3] == ["run_queued", "run_start", "message_start"]
        assert view.names[-2:] == ["message_end", "run_end"]
        assert view.events[0]["epoch"] == result["epoch"]
        assert view.document["messages"][0]["text"] == "w0 w1 w2 "
        assert view.document["result"] == {"n": 3}
        assert not view.snapshots


async def test_the_reply_to_start_comes_before_the_run() -> None:
    async with open_hub(talker) as hub, hub.client() as client:
        id = await client.send(op="start", agent="talker", input={"n": 1})
        first, second = await client.frame(), await client.frame()
        assert (first["type"], first["id"]) == ("reply", id)
        assert second["event"] == "run_queued"


async def test_a_run_started_without_subscribing_is_not_shown() -> None:
    async with open_hub(talker) as hub, hub.client() as client, hub.client() as other:
        result = await client.ask("start", agent="talker", input={"n": 1}, subscribe=False)
        assert result.keys() == {"run", "epoch"}
        await other.ask("subscribe", to={"run": result["run"]}, since={result["run"]: {"seq": 0}})
        await other.end(result["run"])
        assert await client.quiet() == []


async def test_a_key_makes_start_idempotent() -> None:
    async with open_hub(talker) as hub, hub.client() as client, hub.client() as other:
        first = await client.ask("start", agent="talker", input={"n": 1}, key="k")
        again = await other.ask("start", agent="talker", input={"n": 1}, key="k")
        assert (again["run"], again["epoch"]) == (first["run"], first["epoch"])
        await other.end(first["run"])
        await client.end(first["run"])
        later = await client.ask("start", agent="talker", input={"n": 1}, key="k", subscribe=False)
        assert later["run"] == first["run"]
        assert await client.start("talker", {"n": 1}, key="l") != first["run"]


async def test_a_key_used_for_another_input_is_a_conflict() -> None:
    async with open_hub(talker, Held().agent) as hub, hub.client() as client:
        run = await client.start("talker", {"n": 1}, key="k")
        assert (await client.refused("start", agent="talker", input={"n": 2}, key="k"))["code"] == "conflict"
        assert (await client.refused("start", agent="held", input={"n": 1}, key="k"))["code"] == "conflict"
        await client.end(run)
        assert hub.core.runs.active == 0


async def test_start_names_the_field_that_is_wrong() -> None:
    async with open_hub(talker) as hub, hub.client() as client:
        error = await client.refused("start", agent="talker", input={"n": "many"})
        assert error["code"] == "invalid_input"
        assert "n: " in error["message"]
        assert [(item["loc"], item["type"]) for item in error["details"]] == [(["n"], "int_parsing")]
        assert "many" not in json.dumps(error)
        missing = await client.refused("start", agent="talker", input={})
        assert missing["details"][0]["loc"] == ["n"]
        assert await client.ask("ping") == {}


async def test_an_unknown_agent_is_named_with_those_there_are() -> None:
    async with open_hub(talker) as hub, hub.client() as client:
        error = await client.refused("start", agent="nobody", input={})
        assert error["code"] == "unknown_agent"
        assert "nobody" in error["message"]
        assert "talker" in error["message"]


async def test_runs_beyond_the_limit_are_refused() -> None:
    held = Held()
    async with open_hub(held.agent, max_active=2) as hub, hub.client() as client:
        runs = [await client.start("held"), await client.start("held")]
        assert (await client.refused("start", agent="held", input={}))["code"] == "too_many"
        held.gate.set()
        await client.end(*runs)
        assert await client.start("held")


async def test_a_start_refused_for_too_many_subscriptions_starts_nothing() -> None:
    held = Held()
    async with open_hub(held.agent) as hub, hub.client() as client:
        for _ in range(128):
            await client.start("held")
        assert (await client.refused("start", agent="held", input={}))["code"] == "too_many"
        assert hub.core.runs.active == 128


# -- subscribe -----------------------------------------------------------------------------------------------------


async def test_a_late_joiner_gets_a_snapshot_and_then_what_follows() -> None:
    held = Held()
    async with open_hub(held.agent) as hub, hub.client() as client, hub.client() as late:
        run = await client.start("held")
        await client.event("status")
        result = await late.ask("subscribe", to={"run": run})
        assert result["runs"] == [
            {"run": run, "epoch": client.memory.view(run).epoch, "seq": 3, "recovered": False},
        ]
        snapshot = await late.frame()
        assert (snapshot["type"], snapshot["seq"]) == ("snapshot", 3)
        assert snapshot["state"]["status_message"] == "waiting"
        held.gate.set()
        view = await late.view(run)
        assert view.names == ["status", "run_end"]
        assert view.document == (await client.view(run)).document


async def test_a_client_that_comes_back_gets_exactly_what_it_lacks() -> None:
    held = Held()
    async with open_hub(held.agent, talker) as hub:
        async with hub.client() as client:
            run = await client.start("held")
            await client.event("status")
            memory = client.memory
            client.cut()
        held.gate.set()
        async with hub.client(memory=memory) as client:
            result = await client.ask("subscribe", to={"run": run}, since=memory.since())
            assert result["runs"][0]["recovered"] is True
            view = await client.view(run)
        assert [event["seq"] for event in view.events] == [1, 2, 3, 4, 5]
        assert not view.snapshots
        assert not view.gaps


@pytest.mark.parametrize(
    "since", [{"epoch": "another", "seq": 2}, {"seq": 2}, {"epoch": "", "seq": 999}, {"epoch": "another", "seq": 0}]
)
async def test_a_position_that_is_not_in_the_log_gets_a_gap_and_a_snapshot(since: dict[str, object]) -> None:
    async with open_hub(talker) as hub, hub.client() as client, hub.client() as other:
        run = await client.start("talker", {"n": 2})
        state = (await client.view(run)).document
        if since.get("epoch") == "":
            since = since | {"epoch": client.memory.view(run).epoch}
        result = await other.ask("subscribe", to={"run": run}, since={run: since})
        assert result["runs"][0]["recovered"] is False
        gap, snapshot = await other.frame(), await other.frame()
        assert (gap["type"], gap["reason"]) == ("gap", "log_lost")
        assert snapshot["type"] == "snapshot"
        assert snapshot["state"] == state
        assert await other.quiet() == []


async def test_the_whole_log_of_an_ended_run_can_be_read() -> None:
    async with open_hub(talker) as hub, hub.client() as client, hub.client() as other:
        run = await client.start("talker", {"n": 2})
        live = (await client.view(run)).events
        result = await other.ask("subscribe", to={"run": run}, since={run: {"seq": 0}})
        assert result["runs"][0]["recovered"] is True
        assert (await other.view(run)).events == live


async def test_an_unknown_run_is_not_found() -> None:
    async with open_hub(talker) as hub, hub.client() as client:
        assert (await client.refused("subscribe", to={"run": "nope"}))["code"] == "not_found"
        assert (await client.refused("cancel", run="nope"))["code"] == "not_found"
        assert (await client.refused("unsubscribe", subscription="nope"))["code"] == "not_found"


async def test_a_subscription_to_one_run_ends_with_it() -> None:
    async with open_hub(talker) as hub, hub.client() as client:
        for _ in range(150):  # more than a connection may have at once
            await client.end(await client.start("talker", {"n": 0}))
        result = await client.ask("start", agent="talker", input={"n": 0})
        await client.end(result["run"])
        error = await client.refused("unsubscribe", subscription=result["subscription"])
        assert error["code"] == "not_found"
        assert not hub.core.hub.topics


async def test_everything_shows_active_runs_and_those_that_start_later() -> None:
    held = Held()
    async with open_hub(held.agent, talker) as hub, hub.client() as client, hub.client() as watcher:
        running = await client.start("held")
        await client.event("status")
        ended = await client.start("talker", {"n": 0})
        await client.end(ended)
        result = await watcher.ask("subscribe", to={"all": True})
        assert [entry["run"] for entry in result["runs"]] == [running]
        assert result["missing"] == []
        assert isinstance(result["feed"], str)
        assert "feed_recovered" not in result
        later = await client.start("talker", {"n": 1})
        held.gate.set()
        await watcher.end(running, later)
        assert watcher.memory.view(later).events[0]["seq"] == 1
        assert len(watcher.memory.view(running).snapshots) == 1
        assert ended not in watcher.memory.views


async def test_an_agents_subscription_shows_its_runs_only() -> None:
    held = Held()
    async with open_hub(held.agent, talker) as hub, hub.client() as client, hub.client() as watcher:
        running = await client.start("held")
        result = await watcher.ask("subscribe", to={"agent": "talker"})
        assert result["runs"] == []
        shown = await client.start("talker", {"n": 1})
        await watcher.end(shown)
        assert watcher.memory.views.keys() == {shown}
        held.gate.set()
        await client.end(running)


async def test_a_threads_subscription_shows_its_runs_only() -> None:
    async with open_hub(talker) as hub, hub.client() as client, hub.client() as watcher:
        await watcher.ask("subscribe", to={"thread": "t1"})
        other = await client.start("talker", {"n": 0}, thread="t2")
        without = await client.start("talker", {"n": 0})
        shown = await client.start("talker", {"n": 0}, thread="t1")
        await watcher.end(shown)
        await client.end(other, without, shown)
        assert watcher.memory.views.keys() == {shown}
        assert watcher.memory.view(shown).document["thread"] == "t1"


async def test_since_names_runs_that_ended_and_missing_those_that_are_gone() -> None:
    async with open_hub(talker) as hub, hub.client() as client, hub.client() as watcher:
        ended = await client.start("talker", {"n": 1})
        await client.end(ended)
        elsewhere = await client.start("talker", {"n": 1}, thread="t")
        await client.end(elsewhere)
        result = await watcher.ask(
            "subscribe", to={"thread": "t"}, since={run: {"seq": 0} for run in (ended, elsewhere, "gone")}
        )
        assert [entry["run"] for entry in result["runs"]] == [elsewhere]
        assert result["missing"] == ["gone"]
        view = await watcher.view(elsewhere)
        assert view.events == client.memory.view(elsewhere).events
        assert watcher.memory.views.keys() == {elsewhere}


async def test_the_feed_brings_runs_that_came_and_went_meanwhile() -> None:
    async with open_hub(talker) as hub, hub.client() as client:
        async with hub.client() as watcher:
            await watcher.follow_all()
            memory = watcher.memory
            watcher.cut()
        missed = [await client.start("talker", {"n": 1}) for _ in range(3)]
        await client.end(*missed)
        async with hub.client(memory=memory) as watcher:
            result = await watcher.follow_all()
            assert result["feed_recovered"] is True
            assert [entry["run"] for entry in result["runs"]] == missed
            await watcher.end(*missed)
        for run in missed:
            assert memory.view(run).events == client.memory.view(run).events


async def test_a_feed_position_of_another_hub_is_not_recovered() -> None:
    async with open_hub(talker) as hub, hub.client() as client:
        for position in ("elsewhere:0", "nonsense", "elsewhere:x"):
            result = await client.ask("subscribe", to={"all": True}, feed=position)
            assert result["feed_recovered"] is False


async def test_the_feed_position_moves_on_while_connected() -> None:
    async with open_hub(talker) as hub, hub.client() as client, hub.client() as watcher:
        before = (await watcher.follow_all())["feed"]
        run = await client.start("talker", {"n": 0})
        feed = await watcher.until(lambda frame: frame["type"] == "feed")
        assert feed["position"] != before
        assert watcher.memory.view(run).events, "a run is shown before the feed passes it"
        async with hub.client() as again:
            result = await again.ask("subscribe", to={"all": True}, feed=feed["position"])
            assert result["feed_recovered"] is True
            assert result["runs"] == []


async def test_the_reply_precedes_every_frame_that_the_subscription_adds() -> None:
    held = Held()
    async with open_hub(held.agent) as hub, hub.client() as client:
        runs = [await client.start("held", subscribe=False) for _ in range(5)]
        id = await client.send(op="subscribe", to={"all": True}, since={run: {"seq": 0} for run in runs})
        assert (await client.frame())["id"] == id
        held.gate.set()
        await client.end(*runs)


async def test_subscribing_twice_sends_each_event_once() -> None:
    held = Held()
    async with open_hub(held.agent) as hub, hub.client() as client:
        await client.follow_all()
        run = await client.start("held")
        await client.event("status", run)
        again = await client.ask("subscribe", to={"run": run}, since={run: {"seq": 0}})
        assert again["runs"][0]["recovered"] is True
        await client.ask("subscribe", to={"agent": "held"})
        held.gate.set()
        view = await client.view(run)
        assert [event["seq"] for event in view.events] == [1, 2, 3, 4, 5]
        assert not view.snapshots
        assert await client.quiet() == []


# -- detail --------------------------------------------------------------------------------------------------------


async def test_progress_leaves_tokens_out_and_prev_proves_that_nothing_is_lost() -> None:
    async with open_hub(talker) as hub, hub.client() as client, hub.client(detail="progress") as watcher:
        await watcher.ask("subscribe", to={"all": True}, detail="progress")
        run = await client.start("talker", {"n": 20})
        seen = await watcher.view(run)  # the strict client checks `prev` on the way
        whole = await client.view(run)
        assert seen.names == ["run_queued", "run_start", "message_end", "run_end"]
        assert "token" in whole.names
        assert [event for event in whole.events if event["seq"] in {e["seq"] for e in seen.events}] == seen.events


async def test_progress_resumes_from_the_last_event_it_was_shown() -> None:
    held = Held()
    async with open_hub(held.agent) as hub:
        async with hub.client(detail="progress") as watcher:
            run = await watcher.start("held", detail="progress")
            await watcher.event("status")
            memory = watcher.memory
            watcher.cut()
        held.gate.set()
        async with hub.client(memory=memory, detail="progress") as watcher:
            result = await watcher.ask("subscribe", to={"run": run}, detail="progress", since=memory.since())
            assert result["runs"][0]["recovered"] is True
            view = await watcher.view(run)
        assert view.names == ["run_queued", "run_start", "status", "status", "run_end"]


async def test_raising_the_detail_sends_a_snapshot_and_then_everything() -> None:
    gate = anyio.Event()

    @agent("speaker")
    async def speaker(input: Anything, emit: Emitter) -> None:
        await emit.send(MessageStart(message="m", span="s", field="answer"))
        await emit.send(Token(message="m", delta="before "))
        await emit.send(Status(message="half"))
        await gate.wait()
        await emit.send(Token(message="m", delta="after"))
        await emit.send(MessageEnd(message="m", text="before after"))

    async with open_hub(speaker) as hub, hub.client(detail="progress") as client:
        run = await client.start("speaker", detail="progress")
        await client.event("status")
        result = await client.ask("subscribe", to={"run": run}, detail="full")
        assert result["runs"][0]["recovered"] is False
        client._detail = "full"
        snapshot = await client.frame()
        assert snapshot["state"]["messages"][0]["text"] == "before "
        gate.set()
        view = await client.view(run)
        assert view.names == ["token", "message_end", "run_end"]
        assert not view.gaps


async def test_dropping_the_higher_detail_goes_on_with_the_lower() -> None:
    held = Held()

    async with open_hub(held.agent) as hub, hub.client(detail="progress") as client:
        run = await client.start("held", detail="progress")
        await client.event("status")
        full = await client.ask("subscribe", to={"run": run}, detail="full")
        await client.until(lambda frame: frame["type"] == "snapshot")
        await client.ask("unsubscribe", subscription=full["subscription"])
        held.gate.set()
        assert (await client.view(run)).names == ["status", "run_end"]


# -- unsubscribe, cancel, heartbeat --------------------------------------------------------------------------------


async def test_nothing_follows_an_unsubscribe() -> None:
    held = Held()
    async with open_hub(held.agent) as hub, hub.client() as client, hub.client() as other:
        result = await client.ask("start", agent="held", input={})
        run = result["run"]
        await client.event("status")
        assert await client.ask("unsubscribe", subscription=result["subscription"]) == {}
        await other.ask("subscribe", to={"run": run})
        held.gate.set()
        await other.end(run)
        assert await client.quiet() == []


async def test_another_subscription_goes_on_after_an_unsubscribe() -> None:
    held = Held()
    async with open_hub(held.agent) as hub, hub.client() as client:
        await client.follow_all()
        result = await client.ask("start", agent="held", input={})
        await client.ask("unsubscribe", subscription=result["subscription"])
        held.gate.set()
        view = await client.view(result["run"])
        assert [event["seq"] for event in view.events] == [1, 2, 3, 4, 5]


async def test_unsubscribing_from_everything_stops_runs_that_start_later() -> None:
    async with open_hub(talker) as hub, hub.client() as client, hub.client() as starter:
        result = await client.follow_all()
        await client.ask("unsubscribe", subscription=result["subscription"])
        await starter.end(await starter.start("talker", {"n": 0}))
        assert await client.quiet() == []
        assert not len(hub.core.hub.rules)


async def test_cancel_has_two_phases() -> None:
    async with open_hub(Held().agent) as hub, hub.client() as client, hub.client() as other:
        run = await client.start("held")
        await client.event("status")
        assert await other.ask("cancel", run=run, reason="changed my mind") == {}
        asked = await client.event("cancel_requested")
        assert (asked["reason"], asked["by"]) == ("changed my mind", "anonymous")
        view = await client.view(run)
        assert view.names[-2:] == ["cancel_requested", "run_cancelled"]
        assert view.events[-1]["reason"] == "changed my mind"
        assert view.document["status"] == "cancelled"


async def test_the_reply_to_cancel_comes_once_it_is_logged() -> None:
    async with open_hub(Held().agent) as hub, hub.client() as client:
        run = await client.start("held", subscribe=False)
        await client.ask("cancel", run=run)
        info = (await hub.core.bus.info([run]))[run]
        assert info.status in ("cancelling", "cancelled")


async def test_repeating_a_cancel_is_harmless() -> None:
    release = anyio.Event()

    @agent("tidy", timeout=20)
    async def tidy(input: Anything, emit: Emitter) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await release.wait()

    async with open_hub(tidy, cancel_grace=5) as hub, hub.client() as client:
        run = await client.start("tidy")
        await client.event("run_start")
        assert await client.ask("cancel", run=run) == {}
        assert await client.ask("cancel", run=run, reason="again") == {}
        release.set()
        view = await client.view(run)
        assert view.names.count("cancel_requested") == 1
        assert (await client.refused("cancel", run=run))["code"] == "already_finished"


async def test_a_queued_run_is_cancelled_without_ever_starting() -> None:
    held = Held(max_concurrent=1)
    async with open_hub(held.agent) as hub, hub.client() as client:
        first, second = await client.start("held"), await client.start("held")
        await client.ask("cancel", run=second)
        view = await client.view(second)
        assert view.names == ["run_queued", "cancel_requested", "run_cancelled"]
        held.gate.set()
        assert (await client.view(first)).document["status"] == "done"


async def test_queued_runs_get_their_position_as_it_halves() -> None:
    held = Held(max_concurrent=1)
    async with open_hub(held.agent) as hub, hub.client() as client:
        runs = [await client.start("held") for _ in range(6)]
        positions = [
            client.memory.view(run).events[0].get("position") for run in runs if client.memory.view(run).events
        ]
        await client.end(await _let_go(client, held, runs))
        sent = {run: [e["position"] for e in client.memory.view(run).events if "position" in e] for run in runs}
        assert positions[0] is None
        assert sent[runs[0]] == []
        assert sent[runs[1]] == [0]
        assert sent[runs[3]] == [2, 1, 0]
        assert sent[runs[5]] == [4, 2, 1, 0]


async def _let_go(client: Client, held: Held, runs: list[str]) -> str:
    held.gate.set()
    await client.end(*runs)
    return runs[-1]


async def test_a_silent_connection_is_sent_a_ping() -> None:
    async with open_hub(heartbeat=0.1) as hub, hub.client() as client:
        with anyio.fail_after(3):
            assert await client.frame() == {"type": "ping"}
            assert await client.frame() == {"type": "ping"}


async def test_the_last_turns_of_a_thread_are_the_next_ones_history() -> None:
    seen: list[list[tuple[object, object]]] = []

    class Remembering:
        spec = talker.spec

        async def run(self, task: object, emit: Emitter) -> dict[str, int]:
            seen.append([(dict(turn.input), turn.result) for turn in task.history])  # type: ignore[attr-defined]
            return {"turn": len(seen)}

    remembering: FunctionAgent = Remembering()  # type: ignore[assignment]
    async with open_hub(remembering) as hub, hub.client() as client:
        for n in range(3):
            await client.end(await client.start("talker", {"n": n}, thread="t"))
        await client.end(await client.start("talker", {"n": 9}, thread="u"))
    assert seen == [[], [({"n": 0}, {"turn": 1})], [({"n": 0}, {"turn": 1}), ({"n": 1}, {"turn": 2})], []]
