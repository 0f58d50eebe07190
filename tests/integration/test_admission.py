"""Connections are counted from their first byte to their last, and refused with 503 when they are too many (G11)."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import anyio
import pytest
from anyio.abc import SocketStream
from websockets.exceptions import InvalidStatus

from agentcast.server.edge import http_protocol
from agentcast.server.edge.admission import RESERVE, RETRY_AFTER
from tests.support.hub import RunningHub, open_hub
from tests.support.raw import exchange
from tests.support.waiting import until

GET = (b"GET /v1/agents HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")


@asynccontextmanager
async def idle(hub: RunningHub, number: int) -> AsyncIterator[list[SocketStream]]:
    """Sockets that send nothing."""
    async with AsyncExitStack() as stack:
        before = len(hub.core.admission)
        streams = [
            await stack.enter_async_context(await anyio.connect_tcp("127.0.0.1", hub.port)) for _ in range(number)
        ]
        await until(lambda: len(hub.core.admission) == before + number)  # the kernel connects before the hub accepts
        yield streams


async def nobody_left(hub: RunningHub) -> None:
    await until(lambda: len(hub.core.admission) == 0)


async def read_to_end(stream: SocketStream) -> bytes:
    data = b""
    with anyio.fail_after(5), suppress(anyio.EndOfStream, anyio.BrokenResourceError):
        while True:
            data += await stream.receive()
    return data


async def test_too_many_connections_get_503_and_health_is_served() -> None:
    async with open_hub(max_connections=3) as hub, idle(hub, 3):
        for path in ("/v1/agents", "/", "/v1/runs"):
            response = await exchange(hub.port, f"GET {path} HTTP/1.1", "Host: 127.0.0.1")
            assert response.status == 503
            assert f"retry-after: {RETRY_AFTER}" in response.head.lower()
            assert b'"unavailable"' in response.body
        for path in ("/healthz", "/readyz", "/healthz?x"):
            assert (await exchange(hub.port, f"GET {path} HTTP/1.1", "Host: 127.0.0.1")).status == 200
    await nobody_left(hub)


async def test_a_refused_handshake_gets_503(each_server: None) -> None:
    async with open_hub(max_connections_per_address=2) as hub, hub.client() as one, hub.client() as other:
        with pytest.raises(InvalidStatus) as refused:
            async with hub.client():
                pass
        assert refused.value.response.status_code == 503
        assert refused.value.response.headers["retry-after"] == str(RETRY_AFTER)
        assert await one.ask("ping") == await other.ask("ping") == {}


async def test_a_socket_stays_counted_until_it_is_lost_and_no_longer(each_server: None) -> None:
    async with open_hub(max_connections=2) as hub:
        for _ in range(4):
            async with hub.client() as client, hub.client():
                assert len(hub.core.admission) == 2
                client.cut()
            await nobody_left(hub)


@pytest.mark.parametrize("end", ["before the head", "in the handshake", "refused by the guard", "after a request"])
async def test_nothing_stays_counted(end: str) -> None:
    head = "GET /ws HTTP/1.1\r\nHost: {}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    head += "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    sent = {
        "before the head": b"GET",
        "in the handshake": head.format("127.0.0.1").encode(),
        "refused by the guard": head.format("evil.example").encode(),
        "after a request": GET[0],
    }[end]
    async with open_hub() as hub:
        async with await anyio.connect_tcp("127.0.0.1", hub.port) as stream:
            await stream.send(sent)
            if end != "in the handshake" and end != "before the head":
                await stream.receive()
        await nobody_left(hub)
        assert not hub.core.admission._by_address
        assert not hub.core.admission._reserve


async def test_health_is_served_though_idle_sockets_keep_coming() -> None:
    async with open_hub(max_connections=1) as hub, idle(hub, 1), AsyncExitStack() as stack:
        connecting = [anyio.connect_tcp("127.0.0.1", hub.port) for _ in range(3 * RESERVE)]
        streams = [await stack.enter_async_context(await one) for one in connecting]
        assert (await exchange(hub.port, "GET /healthz HTTP/1.1", "Host: 127.0.0.1")).status == 200
        assert (await read_to_end(streams[0])).startswith(b"HTTP/1.1 503 ")  # it gave way


async def test_a_connection_in_the_reserve_has_one_request_and_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "RESERVE_TIMEOUT", 0.2)
    async with open_hub(max_connections=1) as hub, idle(hub, 1):
        async with await anyio.connect_tcp("127.0.0.1", hub.port) as silent:
            assert b"503 " in await read_to_end(silent)
        async with await anyio.connect_tcp("127.0.0.1", hub.port) as asking:
            await asking.send(GET[1])
            answer = await read_to_end(asking)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"connection: close" in answer


async def test_descriptors_are_a_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_hub() as hub:
        monkeypatch.setattr(hub.core.admission, "_descriptors", 3)  # as if nearly all were in use
        response = await exchange(hub.port, "GET /v1/agents HTTP/1.1", "Host: 127.0.0.1")
        assert response.status == 503
        assert (await exchange(hub.port, "GET /healthz HTTP/1.1", "Host: 127.0.0.1")).status == 200


async def test_clients_of_a_trusted_proxy_are_counted_one_by_one() -> None:
    async with open_hub(max_connections_per_address=1, trusted_proxies="127.0.0.1") as hub:
        options = [{"additional_headers": {"X-Forwarded-For": f"198.51.100.{n}"}} for n in range(3)]
        async with hub.client(**options[0]) as one, hub.client(**options[1]) as other:
            with pytest.raises(InvalidStatus, match="503"):
                async with hub.client(**options[0]):
                    pass
            async with hub.client(**options[2]):
                assert await one.ask("ping") == await other.ask("ping") == {}


async def test_who_is_no_trusted_proxy_is_not_believed() -> None:
    async with open_hub(max_connections_per_address=1) as hub, hub.client():
        with pytest.raises(InvalidStatus, match="503"):
            async with hub.client(additional_headers={"X-Forwarded-For": "198.51.100.1"}):
                pass


async def test_requests_of_one_proxied_connection_are_admitted_one_by_one() -> None:
    request = "GET /v1/agents HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Forwarded-For: 198.51.100.{}\r\n\r\n"
    async with open_hub(max_connections_per_address=1, trusted_proxies="127.0.0.0/8") as hub:
        async with hub.client(additional_headers={"X-Forwarded-For": "198.51.100.1"}):
            async with await anyio.connect_tcp("127.0.0.1", hub.port) as proxy:
                for number, status in ((2, b"200"), (3, b"200"), (1, b"503")):
                    await proxy.send(request.format(number).encode())
                    assert (await proxy.receive()).split()[1] == status
