"""One client's commands: each gets exactly one reply, and bad ones say what and where (G9)."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import orjson
import pytest
from pydantic import BaseModel

from agentcast.agents.base import AgentSpec, Emitter, Task
from agentcast.agents.events import Status
from agentcast.server import protocol
from agentcast.server.bus.base import Filter
from agentcast.server.bus.memory import MemoryBus
from agentcast.server.config import Settings
from agentcast.server.edge import session
from agentcast.server.edge.costs import SAVED, Costs
from agentcast.server.edge.session import Session
from agentcast.server.errors import PROTOCOL_ERROR, CloseReason, Forbidden
from agentcast.server.hub.frames import Batch
from agentcast.server.hub.hub import Hub
from agentcast.server.hub.outbox import Outbox
from agentcast.server.runs.runs import Runs


class Question(BaseModel):
    question: str = "why"


class Echo:
    """Says its question, then waits until it is let go."""

    spec = AgentSpec(name="echo", description="", input_model=Question)

    def __init__(self) -> None:
        self.go = anyio.Event()

    async def run(self, task: Task, emit: Emitter) -> str:
        await emit.send(Status(message="thinking"))
        await self.go.wait()
        return "because"


class Client:
    """A client of a whole hub, without a socket."""

    def __init__(self, bus: MemoryBus, hub: Hub, runs: Runs, agent: Echo, tasks: anyio.abc.TaskGroup) -> None:
        self.bus = bus
        self.runs = runs
        self.agent = agent
        self.frames: list[dict[str, Any]] = []
        self._hub = hub
        self._tasks = tasks
        self._changed = anyio.Event()
        self._pulling = False
        self.outbox = Outbox(self)
        self.costs = Costs()
        self.session = Session("x", "ann", hub, runs, self.outbox, self.costs)
        self._ids = 0

    def write(self, batch: Batch) -> bool:
        return False

    def wake(self) -> None:
        self._changed.set()

    def cut(self, reason: CloseReason) -> None:
        raise AssertionError(reason)

    def fail(self, error: Exception) -> None:
        raise error

    def pull(self) -> None:
        if not self._pulling:
            self._pulling = True
            self._tasks.start_soon(self._catch_up)

    async def _catch_up(self) -> None:
        await self._hub.catch_up(self.outbox)
        self._pulling = False

    async def next(self, type: str, **fields: Any) -> dict[str, Any]:
        """The next frame of that type with those fields; the others are kept in `frames` too."""
        seen = 0
        with anyio.fail_after(5):
            while True:
                self.frames += [orjson.loads(payload) for batch in self.outbox.take() for payload in batch.payloads]
                for frame in self.frames[seen:]:
                    if frame["type"] == type and fields.items() <= frame.items():
                        return frame
                seen = len(self.frames)
                self._changed = anyio.Event()
                await self._changed.wait()

    async def send(self, op: str, **fields: Any) -> CloseReason | None:
        return await self.session.handle(orjson.dumps({"op": op, **fields}).decode())

    async def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send a command; gives its reply."""
        self._ids += 1
        id = self._ids
        assert await self.send(op, id=id, **fields) is None
        return await self.next("reply", id=id)

    async def result(self, op: str, **fields: Any) -> Any:
        reply = await self.ask(op, **fields)
        assert reply["ok"], reply
        return reply["result"]

    async def error(self, op: str, **fields: Any) -> Any:
        reply = await self.ask(op, **fields)
        assert not reply["ok"], reply
        return reply["error"]

    def events(self, run: str) -> list[str]:
        return [frame["event"] for frame in self.frames if frame["type"] == "event" and frame["run"] == run]


@asynccontextmanager
async def connected() -> AsyncIterator[Client]:
    bus, agent = MemoryBus(), Echo()
    hub = Hub(bus)
    runs = Runs(bus, {"echo": agent}, Settings(grace=0.0, cancel_grace=0.05), "w")
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            await tasks.start(hub.run)
            await tasks.start(runs.serve)
            yield Client(bus, hub, runs, agent, tasks)
            await runs.stop()
            tasks.cancel_scope.cancel()


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with connected() as client:
        yield client


# -- start ---------------------------------------------------------------------------------------------------------


async def test_start_is_followed_from_the_first_event_to_the_last(client: Client) -> None:
    result = await client.result("start", agent="echo", input={})
    run = result["run"]

    assert result.keys() == {"run", "epoch", "subscription"}
    await client.next("event", event="status")
    client.agent.go.set()
    end = await client.next("event", event="run_end")

    assert end["result"] == "because"
    assert client.events(run) == ["run_queued", "run_start", "status", "run_end"]
    assert client.frames[0]["type"] == "reply"
    assert client.frames[1]["epoch"] == result["epoch"]
    assert client.outbox.subscriptions == {}


async def test_start_without_subscribing_sends_nothing_more(client: Client) -> None:
    result = await client.result("start", agent="echo", input={}, subscribe=False)

    assert result.keys() == {"run", "epoch"}
    assert client.outbox.followers == {}
    assert result["run"] in await client.bus.info([result["run"]])


async def test_start_with_a_key_finds_the_same_run_and_follows_it(client: Client) -> None:
    first = await client.result("start", agent="echo", input={}, key="k")
    second = await client.result("start", agent="echo", input={}, key="k")

    assert (first["run"], first["epoch"]) == (second["run"], second["epoch"])
    assert first["subscription"] != second["subscription"]
    client.agent.go.set()
    await client.next("event", event="run_end")
    assert client.events(first["run"]) == ["run_queued", "run_start", "status", "run_end"]


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({"agent": "nobody", "input": {}}, "unknown_agent", "nobody"),
        ({"agent": "echo", "input": {"question": 5}}, "invalid_input", "question"),
        ({"agent": "echo"}, "bad_request", "input"),
        ({"agent": "echo", "input": {}, "detail": "some"}, "bad_request", "detail"),
    ],
)
async def test_start_that_cannot_be_done_says_why(client: Client, fields: Any, code: str, named: str) -> None:
    error = await client.error("start", **fields)

    assert (error["code"], error["retryable"]) == (code, False)
    assert named in error["message"]
    assert client.runs.active == 0
    assert client.outbox.subscriptions == {}


async def test_start_past_the_subscriptions_starts_nothing(client: Client) -> None:
    for n in range(protocol.MAX_SUBSCRIPTIONS):
        client.outbox.subscribe(f"x{n}", single=False)

    error = await client.error("start", agent="echo", input={})

    assert error["code"] == "too_many"
    assert await client.bus.list(Filter()) == []
    assert (await client.result("start", agent="echo", input={}, subscribe=False))["run"]


# -- subscribe -----------------------------------------------------------------------------------------------------


async def test_subscribe_replies_before_the_snapshot(client: Client) -> None:
    run = (await client.result("start", agent="echo", input={}, subscribe=False))["run"]

    result = await client.result("subscribe", to={"run": run})
    snapshot = await client.next("snapshot", run=run)

    (entry,) = result["runs"]
    assert (entry["run"], entry["recovered"]) == (run, False)
    assert [frame["type"] for frame in client.frames[1:3]] == ["reply", "snapshot"]
    assert snapshot["seq"] >= entry["seq"]
    assert snapshot["state"]["run"] == run


async def test_subscribe_since_a_position_goes_on_exactly_there(client: Client) -> None:
    started = await client.result("start", agent="echo", input={}, subscribe=False)
    run = started["run"]
    client.agent.go.set()
    while (await client.bus.info([run]))[run].ended is None:
        await anyio.lowlevel.checkpoint()

    since = {run: {"epoch": started["epoch"], "seq": 2}}
    result = await client.result("subscribe", to={"run": run}, since=since)
    await client.next("event", event="run_end")

    assert result["runs"] == [{"run": run, "epoch": started["epoch"], "seq": 4, "recovered": True}]
    assert client.events(run) == ["status", "run_end"]


@pytest.mark.parametrize("detail", ["full", "progress"])
async def test_subscription_to_a_run_whose_end_is_known_ends_by_itself(client: Client, detail: str) -> None:
    started = await client.result("start", agent="echo", input={}, subscribe=False)
    run = started["run"]
    client.agent.go.set()
    while (await client.bus.info([run]))[run].ended is None:
        await anyio.lowlevel.checkpoint()

    since = {run: {"epoch": started["epoch"], "seq": 4}}
    for _ in range(protocol.MAX_SUBSCRIPTIONS + 5):
        result = await client.result("subscribe", to={"run": run}, since=since, detail=detail)
        assert result["runs"][0]["recovered"] is True
        await anyio.lowlevel.checkpoint()
        while client.outbox.is_behind:
            await anyio.lowlevel.checkpoint()

    assert client.outbox.subscriptions == {}
    assert client.events(run) == []


async def test_client_far_behind_is_brought_up_by_a_snapshot(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentcast.server.hub.topic.MAX_DISTANCE", 1)
    started = await client.result("start", agent="echo", input={})
    run, epoch = started["run"], started["epoch"]
    await client.next("event", event="status")
    await client.result("unsubscribe", subscription=started["subscription"])

    result = await client.result("subscribe", to={"run": run}, since={run: {"epoch": epoch, "seq": 1}})
    snapshot = await client.next("snapshot")

    assert result["runs"][0]["recovered"] is False
    assert client.frames[-2] == {"type": "gap", "run": run, "from": 2, "to": 3, "reason": "overflow"}
    assert (snapshot["seq"], snapshot["state"]["status_message"]) == (3, "thinking")


async def test_whole_log_is_sent_to_who_asks_for_it_however_long_it_is(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentcast.server.hub.topic.MAX_DISTANCE", 1)
    run = (await client.result("start", agent="echo", input={}, subscribe=False))["run"]
    while (await client.bus.info([run]))[run].head < 3:
        await anyio.lowlevel.checkpoint()

    result = await client.result("subscribe", to={"run": run}, since={run: {"seq": 0}})
    await client.next("event", event="status")

    assert result["runs"][0]["recovered"] is True
    assert client.events(run) == ["run_queued", "run_start", "status"]


async def test_subscribe_to_everything_follows_what_comes(client: Client) -> None:
    running = (await client.result("start", agent="echo", input={}, subscribe=False))["run"]
    result = await client.result("subscribe", to={"all": True}, since={"nowhere": {"seq": 3}})

    assert [entry["run"] for entry in result["runs"]] == [running]
    assert result["missing"] == ["nowhere"]
    assert isinstance(result["feed"], str)
    assert "feed_recovered" not in result
    later = (await client.result("start", agent="echo", input={}, subscribe=False))["run"]
    await client.next("event", event="run_queued", run=later)


async def test_feed_position_brings_what_started_and_ended_meanwhile(client: Client) -> None:
    feed = (await client.result("subscribe", to={"all": True}))["feed"]
    await client.result("unsubscribe", subscription="s1")
    run = (await client.result("start", agent="echo", input={}, subscribe=False))["run"]
    client.agent.go.set()
    while (await client.bus.info([run]))[run].ended is None:
        await anyio.lowlevel.checkpoint()

    result = await client.result("subscribe", to={"agent": "echo"}, feed=feed)
    await client.next("event", event="run_end")

    assert result["feed_recovered"] is True
    assert client.events(run) == ["run_queued", "run_start", "status", "run_end"]


async def test_lost_feed_position_is_said_to_be_lost(client: Client) -> None:
    assert (await client.result("subscribe", to={"all": True}, feed="elsewhere:5"))["feed_recovered"] is False


async def test_subscribe_to_a_run_that_does_not_exist_leaves_nothing_behind(client: Client) -> None:
    error = await client.error("subscribe", to={"run": "nowhere"})

    assert error["code"] == "not_found"
    assert "nowhere" in error["message"]
    assert client.outbox.subscriptions == {}


async def test_runs_of_others_are_not_found(client: Client) -> None:
    run = (await client.result("start", agent="echo", input={}, subscribe=False))["run"]
    client.session.principal = "bob"

    assert (await client.error("subscribe", to={"run": run}))["code"] == "not_found"
    assert (await client.error("cancel", run=run))["code"] == "not_found"
    assert (await client.result("subscribe", to={"all": True}))["runs"] == []


async def test_a_subscription_that_joins_less_than_expected_gives_back_no_more_than_it_paid(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runs, "active", 20_000)
    account = client.session._account
    client.costs.charge(account, SAVED * 9 // 10)
    spent = account.paid_until

    await client.result("subscribe", to={"agent": "nobody"})

    assert account.paid_until >= spent


async def test_too_many_subscriptions_are_refused(client: Client) -> None:
    for _ in range(protocol.MAX_SUBSCRIPTIONS):
        await client.result("subscribe", to={"all": True})

    assert (await client.error("subscribe", to={"all": True}))["code"] == "too_many"
    await client.result("unsubscribe", subscription="s1")
    await client.result("subscribe", to={"all": True})


# -- unsubscribe, cancel, ping -------------------------------------------------------------------------------------


async def test_nothing_follows_an_unsubscribe(client: Client) -> None:
    started = await client.result("start", agent="echo", input={})
    await client.next("event", event="status")

    assert await client.result("unsubscribe", subscription=started["subscription"]) == {}
    client.agent.go.set()
    while (await client.bus.info([started["run"]]))[started["run"]].ended is None:
        await anyio.lowlevel.checkpoint()

    assert client.outbox.take() == []
    error = await client.error("unsubscribe", subscription=started["subscription"])
    assert error["code"] == "not_found"


async def test_cancel_replies_once_the_request_is_logged(client: Client) -> None:
    run = (await client.result("start", agent="echo", input={}))["run"]

    assert await client.result("cancel", run=run, reason="enough") == {}
    end = await client.next("event", event="run_cancelled")
    assert end["reason"] == "enough"
    assert client.events(run)[-2:] == ["cancel_requested", "run_cancelled"]
    assert (await client.error("cancel", run=run))["code"] == "already_finished"
    assert (await client.error("cancel", run="nowhere"))["code"] == "not_found"


async def test_ping_is_answered(client: Client) -> None:
    assert await client.result("ping") == {}
    await client.send("ping")
    assert orjson.loads(client.outbox.take()[0].payloads[0]) == {"type": "reply", "ok": True, "result": {}}


async def test_op_of_later_is_unknown(client: Client) -> None:
    assert (await client.error("respond", run="r", request="q", value=1))["code"] == "unknown_op"


# -- Errors --------------------------------------------------------------------------------------------------------


async def test_malformed_messages_are_answered_then_the_connection_is_closed(client: Client) -> None:
    """Twenty within a minute are forgiven."""
    reasons = [await client.session.handle("{") for _ in range(21)]

    assert reasons == [None] * 20 + [PROTOCOL_ERROR]
    replies = [orjson.loads(payload) for batch in client.outbox.take() for payload in batch.payloads]
    assert [reply["error"]["code"] for reply in replies] == ["bad_request"] * 21


async def test_malformed_messages_of_more_than_a_minute_ago_do_not_count(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000.0
    monkeypatch.setattr(session, "monotonic", lambda: now)
    for _ in range(100):
        assert await client.session.handle("{") is None
        now += 3.2


async def test_refused_commands_do_not_count_as_malformed(client: Client) -> None:
    for _ in range(50):
        assert (await client.error("cancel", run="nowhere"))["code"] == "not_found"


async def test_right_that_is_missing_is_forbidden(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def authorize(principal: str, op: str) -> None:
        if (principal, op) == ("ann", "start"):
            raise Forbidden("ann may only watch")

    monkeypatch.setattr(session, "authorize", authorize)

    assert (await client.error("start", agent="echo", input={}))["code"] == "forbidden"
    assert client.runs.active == 0
    assert await client.result("ping") == {}


async def test_bug_of_ours_is_an_internal_error_without_details(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: Any) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(client.runs, "cancel", fail)

    error = await client.error("cancel", run="r")

    assert error["code"] == "internal"
    assert "secret" not in str(error)
    assert "/secret/path" in caplog.text
    assert await client.result("ping") == {}


async def test_commands_at_the_same_time_each_get_their_reply(client: Client) -> None:
    async with anyio.create_task_group() as tasks:
        for id in range(60):
            op = {"op": ["ping", "subscribe", "start", "cancel", "oops"][id % 5], "id": id}
            command = op | {"to": {"all": True}, "agent": "echo", "input": {}, "run": "nowhere", "subscribe": False}
            tasks.start_soon(client.session.handle, orjson.dumps(command).decode())

    ids = [
        frame["id"]
        for batch in client.outbox.take()
        for data in batch.payloads
        if (frame := orjson.loads(data))["type"] == "reply"
    ]
    assert sorted(ids) == list(range(60))
