"""What one connection may send, and how it ends when it sends more (G11). Whole attacks are in `test_attacks`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from statistics import quantiles

import anyio
import pytest

from agentcast.agents.base import Emitter
from agentcast.agents.events import MessageEnd, MessageStart, Token
from agentcast.server.edge import frame_socket, http_protocol, intake
from tests.support.agents import Anything, agent
from tests.support.hub import RunningHub, open_hub
from tests.support.log import Log
from tests.support.raw import deaf, exchange, frame

TEXT, BINARY, CONTINUATION, PING, PONG = 1, 2, 0, 9, 10
TOKENS = 100
CHUNK = 256 * 1024


@agent("ticking", timeout=30)
async def ticking(input: Anything, emit: Emitter) -> str:
    """Streams tokens steadily, as a model does."""
    await emit.send(MessageStart(message="m", span="s", field="answer"))
    for number in range(TOKENS):
        await emit.send(Token(message="m", delta=f"{number} "))
        await anyio.sleep(0.01)
    await emit.send(MessageEnd(message="m", text="".join(f"{number} " for number in range(TOKENS))))
    return "done"


FLOODS = {
    "empty pongs": (b"", frame(PONG)),
    "empty pings": (b"", frame(PING)),
    "full pings": (b"", frame(PING, b"x" * 125)),
    "empty continuation frames": (frame(TEXT, fin=False), frame(CONTINUATION, fin=False)),
    "continuation frames of a byte": (frame(TEXT, fin=False), frame(CONTINUATION, b"x", fin=False)),
    "messages of a byte": (b"", frame(TEXT, b"x")),
    "commands": (b"", frame(TEXT, b'{"op":"ping","id":1}')),
}


@asynccontextmanager
async def unharmed(hub: RunningHub) -> AsyncIterator[None]:
    """While an attack goes on, another client watches a stream and asks; what comes must be complete, and in time."""
    waits: list[float] = []
    async with hub.client() as innocent, anyio.create_task_group() as tasks:

        async def ask() -> None:
            async with hub.client() as client:
                while True:
                    start = anyio.current_time()
                    await client.ask("ping")
                    waits.append(anyio.current_time() - start)
                    await anyio.sleep(0.005)

        tasks.start_soon(ask)
        run = await innocent.start("ticking")
        yield
        view = await innocent.view(run)
        assert [event["seq"] for event in view.events] == [*range(1, view.seq + 1)]
        assert view.document["messages"][0]["status"] == "done"
        tasks.cancel_scope.cancel()
    assert len(waits) > 30
    assert quantiles(waits, n=100)[97] < 0.25


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "FRAMES_AT_ONCE", 1_000)
    monkeypatch.setattr(intake, "OVERSPENDING", 1.5)


@pytest.mark.parametrize("flood", FLOODS)
async def test_a_flood_delays_nobody_and_its_client_is_closed(flood: str, log: Log, impatient: None) -> None:
    first, again = FLOODS[flood]
    chunk = again * (CHUNK // len(again))
    async with open_hub(ticking) as hub, deaf(hub.port, receive_buffer=2**20) as attacker:

        async def attack() -> None:
            await attacker.send_raw(first)
            with suppress(anyio.BrokenResourceError):
                while True:
                    await attacker.send_raw(chunk)

        async with unharmed(hub), anyio.create_task_group() as tasks:
            tasks.start_soon(attack)
            with anyio.fail_after(10):
                code = await attacker.close_code()
            tasks.cancel_scope.cancel()
        assert code in (1008, 4503)
        await hub.idle()


async def test_a_client_that_keeps_exceeding_its_budget_is_closed_with_1008(log: Log, impatient: None) -> None:
    async with open_hub() as hub, deaf(hub.port, receive_buffer=2**20) as client:
        codes: list[int] = []

        async def listen() -> None:
            codes.append(await client.close_code())
            tasks.cancel_scope.cancel()

        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listen)
                while True:
                    await client.send_raw(frame(PONG) * 500)
                    await anyio.sleep(0.1)
        assert codes == [1008]


async def test_more_at_once_than_the_budget_is_read_in_time_and_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "FRAMES_AT_ONCE", 100)
    monkeypatch.setattr(intake, "OVERSPENDING", 0.3)
    async with open_hub() as hub, hub.client() as client:
        for number in range(300):
            await client.send(op="ping", id=number)
        replies = [await client.frame() for _ in range(300)]
        assert {reply["id"] for reply in replies} == {*range(300)}
        await anyio.sleep(0.4)
        assert await client.ask("ping") == {}


async def test_a_message_of_too_many_fragments_is_refused(log: Log) -> None:
    async with open_hub() as hub, deaf(hub.port, receive_buffer=2**20) as client:
        await client.send_raw(frame(TEXT, fin=False) + frame(CONTINUATION, fin=False) * intake.MAX_FRAGMENTS)
        assert await client.close_code() == 1008


async def test_a_message_of_many_fragments_with_pings_between_is_read() -> None:
    command = b'{"op":"ping","id":7}'
    parts = [frame(CONTINUATION, command[i : i + 1], fin=False) + frame(PING, b"p") for i in range(1, len(command))]
    message = frame(TEXT, command[:1], fin=False) + b"".join(parts) + frame(CONTINUATION)
    async with open_hub() as hub, deaf(hub.port) as client:
        await client.send_raw(message)
        received = b""
        with anyio.fail_after(5):
            while b'"id":7' not in received:
                received += await client.receive_raw()
        assert received.count(b"\x8a\x01p") == len(parts)


async def test_bytes_that_are_no_frames_end_the_connection_with_1002(log: Log) -> None:
    async with open_hub() as hub, deaf(hub.port) as client:
        await client.send_raw(b"GET / HTTP/1.1\r\n\r\n")
        assert await client.close_code() == 1002


async def test_a_peer_that_does_not_answer_a_close_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_socket, "CLOSE_TIMEOUT", 0.2)
    async with open_hub() as hub, hub.client() as other, deaf(hub.port) as client:
        await client.send(b"x", binary=True)
        with anyio.fail_after(2):
            assert await client.close_code() == 1003
        assert await other.ask("ping") == {}


# -- Before the handshake --------------------------------------------------------------------------------------------

HALF = {
    "nothing": b"",
    "half a line": b"GET /ws HT",
    "half a handshake": b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n",
    "half a body": b"POST /v1/runs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: 100\r\n\r\n{",
    "half a request after one": b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /hea",
}


@pytest.mark.parametrize("what", HALF)
async def test_a_request_that_is_not_completed_is_cut(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT", 0.3)
    monkeypatch.setattr(http_protocol, "BODY_TIMEOUT", 0.3)
    async with open_hub() as hub:
        async with await anyio.connect_tcp("127.0.0.1", hub.port) as stream:
            if HALF[what]:
                await stream.send(HALF[what])
            with anyio.fail_after(3), suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                while True:
                    await stream.receive()
        async with hub.http() as http:
            assert (await http.get("/healthz")).status_code == 200


async def test_a_connection_outlives_the_deadline_of_its_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT", 0.1)
    monkeypatch.setattr(http_protocol, "BODY_TIMEOUT", 0.1)
    async with open_hub() as hub, hub.client() as client:
        await anyio.sleep(0.3)
        assert await client.ask("ping") == {}


@pytest.mark.parametrize("path", ["/healthz", "/ws"])
async def test_headers_over_the_limit_are_refused(path: str) -> None:
    async with open_hub() as hub:
        lines = [f"X-{number}: {'x' * 1_000}" for number in range(40)]
        response = await exchange(hub.port, f"GET {path} HTTP/1.1", "Host: 127.0.0.1", *lines)
        assert response.status == 431


async def test_a_large_body_is_no_large_head() -> None:
    async with open_hub() as hub, hub.http() as http:
        document = {"agent": "nobody", "input": {"text": "x" * 200_000}}
        assert (await http.post("/v1/runs", json=document)).json()["error"]["code"] == "unknown_agent"


async def test_thousands_of_requests_at_once_delay_nobody(log: Log) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    async with open_hub(ticking) as hub, unharmed(hub):
        for _ in range(10):
            async with await anyio.connect_tcp("127.0.0.1", hub.port) as stream:
                with suppress(anyio.BrokenResourceError, anyio.EndOfStream):
                    await stream.send(request * (CHUNK // len(request)))
                    while True:
                        await stream.receive()
