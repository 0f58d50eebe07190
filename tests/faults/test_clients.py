"""Clients that misbehave hurt only themselves, and leave nothing behind (G4, G9)."""

import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from time import monotonic
from typing import Any

import anyio
import pytest
from pydantic import BaseModel
from websockets.asyncio.client import connect

from agentcast.agents.base import Emitter
from agentcast.agents.events import MessageEnd, MessageStart, Status, Token
from agentcast.server.edge import intake
from agentcast.server.edge.endpoint import Connection
from agentcast.server.hub.outbox import QUEUE_BYTES, QUEUE_FRAMES
from tests.support.agents import Anything, agent
from tests.support.client import Client
from tests.support.hub import RunningHub, open_hub
from tests.support.log import Log
from tests.support.raw import deaf

BIG = "x" * 60_000


class Flood(BaseModel):
    events: int
    bytes: int = 60_000
    pause: float = 0.0


@agent("flooding", input=Flood, timeout=30)
async def flooding(input: Flood, emit: Emitter) -> str:
    for _ in range(input.events):
        await emit.send(Status(message="x" * input.bytes))
        if input.pause:
            await anyio.sleep(input.pause)
    return "done"


@agent("ticking", timeout=30)
async def ticking(input: Anything, emit: Emitter) -> str:
    """Streams tokens steadily, as a model does."""
    await emit.send(MessageStart(message="m", span="s", field="answer"))
    for i in range(50):
        await emit.send(Token(message="m", delta=f"{i} "))
        await anyio.sleep(0.005)
    await emit.send(MessageEnd(message="m", text="".join(f"{i} " for i in range(50))))
    return "done"


@agent("quick")
async def quick(input: Anything, emit: Emitter) -> str:
    return "done"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients may send as much as they like: what does not read has filled its buffers soon."""
    monkeypatch.setattr(intake, "FRAMES_PER_SECOND", 1_000_000)
    monkeypatch.setattr(intake, "FRAMES_AT_ONCE", 1_000_000)


def connection_of(hub: RunningHub) -> Connection:
    """The connection that was opened last."""
    return max(hub.core.connections._open, key=lambda connection: connection._taken_at)


# -- Slow ----------------------------------------------------------------------------------------------------------


async def test_a_client_that_never_reads_is_cut_and_the_others_get_everything(log: Log) -> None:
    async with open_hub(flooding, slow_client=1.0) as hub, hub.client() as other:
        async with deaf(hub.port) as slow:
            (held,) = set(hub.core.connections._open) - {
                only for only in hub.core.connections._open if _has(other, only)
            }
            await slow.send(json.dumps({"op": "subscribe", "id": 1, "to": {"all": True}}))
            run = await other.start("flooding", {"events": 400, "pause": 0.001})
            view = await other.view(run)
            assert [event["seq"] for event in view.events] == [*range(1, 404)]
            for id in range(3):
                await slow.send(json.dumps({"op": "ping", "id": id}))
            assert held._outbox.full
            assert held._outbox._bytes < QUEUE_BYTES + 3 * 65_000
            assert len(held._outbox) <= QUEUE_FRAMES + 3
            await _gone(hub, held)
            with anyio.fail_after(2):
                await slow.cut_off()
        assert sum("took nothing" in line for line in log.lines) == 1
    await hub.idle()


async def test_a_client_that_pings_without_reading_the_pongs_is_cut(log: Log, hasty: None) -> None:
    async with open_hub(flooding, slow_client=1.0) as hub, deaf(hub.port) as slow:
        held = connection_of(hub)
        with anyio.fail_after(20):
            while held._writer.writable:
                await slow.ping(times=1_000)
        full = held._writer.pending
        await slow.ping(times=1_000)
        assert held._writer.pending <= full + 150
        await _gone(hub, held)
    assert any("took nothing" in line for line in log.lines)


def _has(client: Client, connection: Connection) -> bool:
    session: str = client.hello["session"]
    return connection._session.id == session


async def _gone(hub: RunningHub, connection: Connection) -> None:
    """Wait until nothing is left of a connection, without a message from anybody."""
    await hub.left(lambda: connection not in hub.core.connections._open)
    assert not any(rule.outbox is connection._outbox for rule in hub.core.hub.rules._named.values())
    for topic in hub.core.hub.topics.values():
        assert not any(follower.outbox is connection._outbox for follower in topic.followers)


async def test_a_client_that_leaves_with_a_full_queue_is_forgotten_at_once() -> None:
    async with open_hub(flooding) as hub, hub.client() as other:
        async with deaf(hub.port) as slow:
            held = connection_of(hub)
            await slow.send(json.dumps({"op": "subscribe", "id": 1, "to": {"all": True}}))
            await other.end(await other.start("flooding", {"events": 400}))
            assert held._outbox.full
            for id in range(3):  # from the first of them on, it is not read any more
                await slow.send(json.dumps({"op": "ping", "id": id}))
            await other.ask("ping")
            slow.abort()
        await _gone(hub, held)


async def test_a_client_that_reads_late_is_resynced_and_goes_on() -> None:
    async with open_hub(flooding) as hub, hub.client() as client, hub.client() as other:
        client.ws.transport.pause_reading()
        held = connection_of(hub)
        await client.send(op="subscribe", to={"all": True})
        run = await other.start("flooding", {"events": 1_500, "bytes": 10_000})
        last = (await other.view(run)).seq
        assert held is not None
        client.ws.transport.resume_reading()
        view = await client.view(run)
        assert view.seq == last
        assert [gap["reason"] for gap in view.gaps] in (["overflow"], ["trimmed"])
        assert view.document == other.memory.view(run).document


async def test_the_feed_is_never_ahead_of_the_runs_that_were_shown() -> None:
    async with open_hub(flooding, quick) as hub, hub.client() as other, hub.client() as client:
        held = next(found for found in hub.core.connections._open if _has(client, found))
        await client.follow_all()
        client.ws.transport.pause_reading()
        runs = [await other.start("flooding", {"events": 400})]
        await other.end(*runs)
        assert held._outbox.full
        runs += [await other.start("quick") for _ in range(20)]
        await other.end(*runs)
        held.tick(monotonic())
        client.ws.transport.resume_reading()
        while not all(client.memory.view(run).ended for run in runs):
            if (frame := await client.frame())["type"] == "feed":
                announced = int(frame["position"].partition(":")[2])
                assert all(client.memory.view(run).seq for run in runs[:announced])


async def test_a_pause_in_reading_loses_nothing_while_the_log_reaches_back() -> None:
    async with open_hub(flooding) as hub, hub.client() as client, hub.client() as other:
        await client.follow_all()
        client.ws.transport.pause_reading()
        run = await other.start("flooding", {"events": 900, "bytes": 4_000})
        await other.end(run)
        client.ws.transport.resume_reading()
        view = await client.view(run)
        assert view.texts == other.memory.view(run).texts


async def test_a_client_that_says_nothing_stays_connected_and_is_pinged(log: Log) -> None:
    async with open_hub(heartbeat=0.1, slow_client=0.5) as hub, hub.client() as client:
        for _ in range(3):
            assert (await client.frame())["type"] == "ping"
        assert not any("took nothing" in line for line in log.lines)
        assert await client.ask("ping") == {}


# -- Floods --------------------------------------------------------------------------------------------------------


async def _streams_unharmed(hub: RunningHub, attack: Callable[[], Any]) -> float:
    """Run an attack while another client watches a stream; gives the longest silence in that stream."""
    longest = 0.0
    async with hub.client() as watcher, anyio.create_task_group() as tasks:
        run = await watcher.start("ticking")
        await watcher.event("run_start", run)
        tasks.start_soon(attack)
        last = anyio.current_time()
        while not watcher.memory.view(run).ended:
            await watcher.frame()
            longest = max(longest, (now := anyio.current_time()) - last)
            last = now
        view = watcher.memory.view(run)
        assert [event["seq"] for event in view.events] == [*range(1, view.seq + 1)]
        assert view.document["messages"][0]["status"] == "done"
    return longest


async def test_a_thousand_pings_are_all_answered_and_a_stream_beside_them_is_unharmed() -> None:
    async with open_hub(ticking) as hub, hub.client() as client:

        async def attack() -> None:
            ids = [await client.send(op="ping") for _ in range(1_000)]
            replies = [await client.frame() for _ in ids]
            assert [reply["id"] for reply in replies] == ids
            assert all(reply["ok"] for reply in replies)

        assert await _streams_unharmed(hub, attack) < 1.0


async def test_a_thousand_starts_are_all_answered_and_a_stream_beside_them_is_unharmed() -> None:
    async with open_hub(ticking, quick, max_active=200) as hub, hub.client() as client:

        async def attack() -> None:
            async with anyio.create_task_group() as tasks:

                async def send() -> None:
                    for id in range(1_000):
                        await client.ws.send(json.dumps({"op": "start", "id": id, "agent": "quick", "input": {}}))

                tasks.start_soon(send)
                replies: dict[int, dict[str, Any]] = {}
                while len(replies) < 1_000:
                    if (frame := await client.frame())["type"] == "reply":
                        replies[frame["id"]] = frame
            refused = {reply["error"]["code"] for reply in replies.values() if not reply["ok"]}
            assert refused <= {"too_many"}
            started = [reply["result"]["run"] for reply in replies.values() if reply["ok"]]
            assert len(started) > 100
            await client.end(*started)

        assert await _streams_unharmed(hub, attack) < 2.0
        assert hub.core.runs.active == 0


async def test_a_client_that_floods_without_reading_is_not_read_any_more(log: Log, hasty: None) -> None:
    async with open_hub(ticking, slow_client=1.0) as hub, deaf(hub.port) as slow:
        held = connection_of(hub)

        async def attack() -> None:
            ping = json.dumps({"op": "ping", "id": "x" * 128})
            with anyio.fail_after(10), suppress(anyio.BrokenResourceError):  # which is when it was cut
                while True:
                    await slow.send(ping, times=200)

        assert await _streams_unharmed(hub, attack) < 1.0
        assert held._outbox.full
        assert len(held._outbox) <= QUEUE_FRAMES + 64
        await _gone(hub, held)


# -- Nonsense ------------------------------------------------------------------------------------------------------

START = {"op": "start", "agent": "quick", "input": {}}


@pytest.mark.parametrize(
    ("message", "code", "named"),
    [
        ("", "bad_request", "JSON"),
        ("{", "bad_request", "JSON"),
        ("nonsense", "bad_request", "JSON"),
        ('{"op":"ping","id":1}x', "bad_request", "JSON"),
        ("[" * 100_000, "bad_request", "JSON"),
        ('{"op":"ping","id":NaN}', "bad_request", "JSON"),
        ("[]", "bad_request", "object"),
        ("1", "bad_request", "object"),
        ("null", "bad_request", "object"),
        ("{}", "bad_request", "op"),
        ('{"op":null}', "bad_request", "op"),
        ('{"op":["ping"]}', "bad_request", "op"),
        ('{"op":"fly"}', "unknown_op", "fly"),
        ('{"op":"respond","run":"x","request":"y","value":1}', "unknown_op", "respond"),
        ('{"op":"ping","id":1.5}', "bad_request", "id"),
        ('{"op":"ping","id":true}', "bad_request", "id"),
        ('{"op":"ping","id":{}}', "bad_request", "id"),
        ({"op": "ping", "id": "x" * 129}, "bad_request", "id"),
        (START | {"agent": 1}, "bad_request", "agent"),
        (START | {"agent": ""}, "bad_request", "agent"),
        (START | {"agent": "x" * 300}, "bad_request", "agent"),
        (START | {"input": None}, "bad_request", "input"),
        (START | {"input": "x"}, "bad_request", "input"),
        (START | {"thread": ["t"]}, "bad_request", "thread"),
        (START | {"key": ""}, "bad_request", "key"),
        (START | {"subscribe": "yes"}, "bad_request", "subscribe"),
        (START | {"detail": "some"}, "bad_request", "detail"),
        ({"op": "start", "agent": "quick"}, "bad_request", "input"),
        ({"op": "subscribe"}, "bad_request", "to"),
        ({"op": "subscribe", "to": {}}, "bad_request", "to"),
        ({"op": "subscribe", "to": {"all": False}}, "bad_request", "to"),
        ({"op": "subscribe", "to": {"run": "a", "all": True}}, "bad_request", "to"),
        ({"op": "subscribe", "to": {"run": None}}, "bad_request", "to"),
        ({"op": "subscribe", "to": "all"}, "bad_request", "to"),
        ({"op": "subscribe", "to": {"all": True}, "since": {"r": {"seq": -1}}}, "bad_request", "since"),
        ({"op": "subscribe", "to": {"all": True}, "since": {"r": {"seq": "1"}}}, "bad_request", "since"),
        ({"op": "subscribe", "to": {"all": True}, "since": {"r": 1}}, "bad_request", "since"),
        ({"op": "subscribe", "to": {"all": True}, "since": []}, "bad_request", "since"),
        ({"op": "subscribe", "to": {"all": True}, "feed": 7}, "bad_request", "feed"),
        ({"op": "unsubscribe"}, "bad_request", "subscription"),
        ({"op": "cancel"}, "bad_request", "run"),
        ({"op": "cancel", "run": "r", "reason": "x" * 1_001}, "bad_request", "reason"),
    ],
)
async def test_a_message_that_is_no_command_is_answered_and_the_connection_stays(
    hub: RunningHub, message: Any, code: str, named: str
) -> None:
    async with hub.client() as client:
        await client.ws.send(message if isinstance(message, str) else json.dumps({"id": 7} | message))
        reply = await client.frame()
        assert (reply["type"], reply["ok"]) == ("reply", False)
        assert reply["error"]["code"] == code
        assert named in reply["error"]["message"]
        if isinstance(message, dict) and "id" not in message:
            assert reply["id"] == 7
        assert await client.ask("ping") == {}


@pytest.fixture(scope="module")
async def hub() -> AsyncIterator[RunningHub]:
    """A hub that tests share which only say nonsense."""
    async with open_hub(quick, flooding) as hub:
        yield hub


@pytest.mark.parametrize(
    ("command", "code", "named"),
    [
        ({"op": "start", "agent": "nobody", "input": {}}, "unknown_agent", "nobody"),
        ({"op": "start", "agent": "flooding", "input": {"events": []}}, "invalid_input", "events"),
        ({"op": "start", "agent": "flooding", "input": {}}, "invalid_input", "events"),
        ({"op": "subscribe", "to": {"run": "r" * 200}}, "not_found", "rrr"),
        ({"op": "cancel", "run": "\x00\n"}, "not_found", "run"),
        ({"op": "unsubscribe", "subscription": "s99"}, "not_found", "s99"),
    ],
)
async def test_a_command_that_cannot_be_done_is_no_protocol_error(
    hub: RunningHub, command: Any, code: str, named: str
) -> None:
    async with hub.client() as client:
        for _ in range(30):
            error = await client.refused(**command)
        assert error["code"] == code
        assert named in error["message"]
        assert await client.ask("ping") == {}


async def test_more_than_twenty_malformed_messages_within_a_minute_end_the_connection() -> None:
    async with open_hub() as hub, hub.client() as client, hub.client() as other:
        for _ in range(21):
            await client.ws.send("nonsense")
        assert await client.closed() == (4503, "protocol_error")
        assert await other.ask("ping") == {}
        await _only(hub, other)


async def test_twenty_malformed_messages_are_forgiven() -> None:
    async with open_hub() as hub, hub.client() as client:
        for _ in range(20):
            await client.ws.send("nonsense")
        assert await client.ask("ping") == {}


async def test_each_malformed_message_is_answered_before_the_connection_ends() -> None:
    async with open_hub() as hub, hub.client() as client:
        for _ in range(25):
            await client.ws.send('{"op":"fly"}')
        for _ in range(21):
            assert (await client.frame())["error"]["code"] == "unknown_op"
        assert (await client.closed())[0] == 4503


async def test_a_message_over_the_limit_ends_the_connection_with_1009() -> None:
    async with open_hub() as hub, hub.client() as client, hub.client() as other:
        await client.ws.send("x" * 1_000_000)
        assert (await client.closed())[0] == 1009
        await _only(hub, other)


async def test_a_message_at_the_limit_is_read() -> None:
    async with open_hub() as hub, hub.client() as client:
        frame = json.dumps({"op": "ping", "id": 1, "pad": ""})
        await client.ws.send(frame[:-2] + "x" * (262_144 - len(frame)) + frame[-2:])
        assert (await client.frame())["ok"] is True


async def test_a_fragmented_message_over_the_limit_ends_the_connection_with_1009() -> None:
    async with open_hub() as hub, hub.client() as client:
        with anyio.move_on_after(2):
            await client.ws.send("x" * 20_000 for _ in range(30))
        assert (await client.closed())[0] == 1009


async def test_a_binary_message_ends_the_connection_with_1003() -> None:
    async with open_hub() as hub, hub.client() as client, hub.client() as other:
        await client.ws.send(b'{"op":"ping"}')
        assert (await client.closed())[0] == 1003
        await _only(hub, other)


async def test_text_that_is_not_utf8_ends_the_connection_with_1007() -> None:
    async with open_hub() as hub, hub.client() as client, hub.client() as other:
        await client.ws.send(b'{"op":"ping","id":"\xff\xfe"}', text=True)
        assert (await client.closed())[0] == 1007
        await _only(hub, other)


@pytest.mark.parametrize("nonsense", ["x", "binary", "big"])
async def test_a_client_that_is_gone_before_its_close_arrives_leaves_nothing(nonsense: str) -> None:
    async with open_hub() as hub, hub.client() as other:
        for _ in range(20):
            async with deaf(hub.port) as client:
                match nonsense:
                    case "binary":
                        await client.send(b"x", binary=True)
                    case "big":
                        await client.send("x" * 300_000)
                    case _:
                        for _ in range(25):
                            await client.send("x")
                client.abort()
        await _only(hub, other)


async def _only(hub: RunningHub, client: Client) -> None:
    """Wait until `client` is the only one that is connected."""
    await hub.left(lambda: len(hub.core.connections) == 1)
    assert await client.ask("ping") == {}


# -- Many ----------------------------------------------------------------------------------------------------------


async def test_two_thousand_connections_leave_nothing_behind() -> None:
    many = int(os.environ.get("AGENTCAST_TEST_CONNECTIONS", "2000"))
    held = anyio.Event()

    @agent("held")
    async def holding(input: Anything, emit: Emitter) -> None:
        await held.wait()

    async with open_hub(holding) as hub, hub.client() as client:
        run = await client.start("held")
        await client.event("run_start", run)
        tasks_before = hub.tasks()
        sockets: list[Any] = []
        subscribe = json.dumps({"op": "subscribe", "id": 1, "to": {"all": True}})

        async def open_some(count: int) -> None:
            for _ in range(count):
                ws = await connect(hub.ws_url, ping_interval=None, compression=None, proxy=None, close_timeout=1)
                sockets.append(ws)
                await ws.send(subscribe)
                for _ in range(3):  # hello, reply, snapshot
                    await ws.recv()

        with anyio.fail_after(50):
            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(open_some, many // 20)
        assert len(hub.core.connections) == many + 1
        assert len(hub.core.hub.topics[run].followers) == many + 1
        for number, ws in enumerate(sockets):
            if number % 2:
                ws.transport.abort()
            else:
                await ws.close()
        await _only(hub, client)
        assert len(hub.core.hub.topics[run].followers) == 1
        assert len(hub.core.hub.rules) == 0
        assert len(hub.log(run).subscribers) == 1
        held.set()
        await client.end(run)
        assert hub.core.hub.topics == {}
        assert hub.log(run).subscribers == {}
        assert hub.tasks() <= tasks_before
