"""Hostile clients, one for each attack (G11).

Each runs in a process of its own, so that what it costs is not what is measured: `python -m tests.support.attacks NAME
PORT SECONDS` prints, as JSON, what became of it.
"""

import json
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel
from anyio.abc import SocketStream
from websockets.exceptions import WebSocketException

from tests.support.raw import deaf, frame

TEXT, CONTINUATION, PONG = 1, 0, 10
FLOOD = 48 * 1024 * 1024
CHUNK = 256 * 1024
_HEAD = b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
_POST = b"POST /v1/runs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 99999\r\n\r\n"
_LIST = b"GET /v1/runs?limit=1000 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
_GONE = (anyio.BrokenResourceError, anyio.EndOfStream, anyio.ClosedResourceError, OSError, WebSocketException)

_LONG = {"agent": "counter", "input": {"n": 2, "pause": 3_600}}

Outcome = Counter[str]
Command = dict[str, Any]


# -- Frames ------------------------------------------------------------------------------------------------------------


async def empty_pongs(port: int, outcome: Outcome) -> None:
    """48 MB of them, as fast as they are taken; on a new connection where one is closed."""
    await _flood(port, outcome, b"", frame(PONG))


async def continuation_frames(port: int, outcome: Outcome) -> None:
    """48 MB of empty ones, of one message that never ends."""
    await _flood(port, outcome, frame(TEXT, fin=False), frame(CONTINUATION, fin=False))


async def _flood(port: int, outcome: Outcome, first: bytes, again: bytes) -> None:
    chunk = again * (CHUNK // len(again))
    while outcome["sent"] < FLOOD:
        await _flood_once(port, outcome, first, chunk)


async def _flood_once(port: int, outcome: Outcome, first: bytes, chunk: bytes) -> None:
    async with deaf(port, receive_buffer=2**20) as client, anyio.create_task_group() as tasks:

        async def listen() -> None:
            outcome[str(await client.close_code())] += 1
            tasks.cancel_scope.cancel()

        tasks.start_soon(listen)
        with suppress(*_GONE):
            await client.send_raw(first)
            while outcome["sent"] < FLOOD:
                await client.send_raw(chunk)
                outcome["sent"] += len(chunk)


# -- Connections -------------------------------------------------------------------------------------------------------


async def half_open_handshakes(port: int, outcome: Outcome) -> None:
    """300 sockets that begin a handshake and stop in the middle; how many the hub has dropped."""
    await _many(300, _wait_for_the_end, port, outcome, _HEAD)


async def idle_sockets(port: int, outcome: Outcome) -> None:
    """400 sockets that say nothing; how many the hub dropped, and how many of them it asked to come back later."""
    await _many(400, _wait_for_the_end, port, outcome, b"")


async def _wait_for_the_end(which: int, port: int, outcome: Outcome, first: bytes) -> None:
    data = b""
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        outcome["connected"] += 1
        with suppress(*_GONE):
            await stream.send(first)
            while True:
                data += await stream.receive()
    outcome["dropped"] += 1
    outcome["503"] += data.startswith(b"HTTP/1.1 503 ") and b"retry-after: " in data


async def connecting(port: int, outcome: Outcome) -> None:
    """Connections that are opened and dropped, before, in and after their handshake."""
    await _many(16, _connect_again_and_again, port, outcome)


async def _connect_again_and_again(which: int, port: int, outcome: Outcome) -> None:
    while True:
        with suppress(*_GONE):
            if which % 2:
                async with await anyio.connect_tcp("127.0.0.1", port) as stream:
                    await stream.send(_HEAD if which % 4 == 1 else b"G")
            else:
                async with deaf(port) as client:
                    client.abort()
        outcome["connections"] += 1
        await anyio.lowlevel.checkpoint()


# -- Commands ----------------------------------------------------------------------------------------------------------


async def unknown_runs(port: int, outcome: Outcome) -> None:
    """64 subscribes at once, of 5,000 runs each that nobody knows, on eight connections, without end."""
    await _many(8, _command, port, outcome, _subscribe_to_unknown)


def _subscribe_to_unknown(number: int) -> Command:
    since = {f"0unknown{number}x{run}": {"seq": 1, "epoch": "abcdef"} for run in range(5_000)}
    return {"op": "subscribe", "to": {"all": True}, "since": since}


async def starts(port: int, outcome: Outcome) -> None:
    """Starts without end, on four connections."""
    await _many(4, _command, port, outcome, lambda number: {"op": "start", "agent": "counter", "input": {"n": 1}})


async def joins(port: int, outcome: Outcome) -> None:
    """Subscriptions to everything, which is 300 runs at least, and out of them, on eight connections."""
    async with deaf(port, receive_buffer=2**20) as client:
        for number in range(300):
            await client.send(json.dumps({"op": "start", "id": number, "subscribe": False} | _LONG))
        await _many(8, _command, port, outcome, _subscribe_and_unsubscribe)


def _subscribe_and_unsubscribe(number: int) -> Command:
    if number % 2:
        return {"op": "unsubscribe", "subscription": f"s{number // 2 + 1}"}
    return {"op": "subscribe", "to": {"all": True}}


async def _command(which: int, port: int, outcome: Outcome, command: Callable[[int], Command]) -> None:
    """As many commands as the hub takes, without waiting for replies."""
    messages = [_message(json.dumps({"id": number} | command(number)).encode()) for number in range(64)]
    async with deaf(port, receive_buffer=2**20) as client, anyio.create_task_group() as tasks:

        async def send() -> None:
            with suppress(*_GONE):
                while True:
                    for message in messages:
                        await client.send_raw(message)

        tasks.start_soon(send)
        with suppress(*_GONE):
            while True:
                data = await client.receive_raw()
                outcome["replies"] += data.count(b'"type":"reply"')
                outcome["too_many"] += data.count(b'"too_many"')
        tasks.cancel_scope.cancel()


def _message(payload: bytes) -> bytes:
    """A text frame of any length, masked with zeros."""
    size = len(payload)
    if size < 126:
        return frame(TEXT, payload)
    head = b"\xfe" + size.to_bytes(2, "big") if size < 65_536 else b"\xff" + size.to_bytes(8, "big")
    return b"\x81" + head + bytes(4) + payload


async def never_reading(port: int, outcome: Outcome) -> None:
    """Eight clients that start busy runs, follow all that there is, and read nothing."""
    await _many(8, _never_read, port)


async def _never_read(which: int, port: int) -> None:
    async with deaf(port) as client:
        await client.send(json.dumps({"op": "subscribe", "id": 1, "to": {"all": True}}))
        await client.send(json.dumps({"op": "start", "id": 2, "agent": "flooder", "input": {}}))
        await anyio.sleep_forever()


# -- HTTP --------------------------------------------------------------------------------------------------------------


async def slow_requests(port: int, outcome: Outcome) -> None:
    """Bodies that come a byte at a time, heads that do, and heads of any size, on a hundred connections."""
    await _many(100, _again_and_again, port, outcome, (_slow_body, _slow_head, _huge_head))


async def requests(port: int, outcome: Outcome) -> None:
    """Requests for long lists, several at once on each of 16 connections."""
    await _many(16, _again_and_again, port, outcome, (_ask,))


Use = Callable[[SocketStream], Awaitable[None]]


async def _again_and_again(which: int, port: int, outcome: Outcome, uses: tuple[Use, ...]) -> None:
    while True:
        with suppress(*_GONE):
            async with await anyio.connect_tcp("127.0.0.1", port) as stream:
                outcome["connections"] += 1
                await uses[which % len(uses)](stream)
        await anyio.sleep(0.01)


async def _slow_body(stream: SocketStream) -> None:
    await stream.send(_POST)
    await _trickle(stream, b"[")


async def _slow_head(stream: SocketStream) -> None:
    await _trickle(stream, b"G")


async def _trickle(stream: SocketStream, byte: bytes) -> None:
    while True:
        await stream.send(byte)
        await anyio.sleep(0.05)


async def _huge_head(stream: SocketStream) -> None:
    await stream.send(_HEAD)
    while True:
        await stream.send(b"X-Filler: " + b"x" * 60_000 + b"\r\n")


async def _ask(stream: SocketStream) -> None:
    await stream.send(_LIST * 8)
    while True:
        await stream.receive()


# -- Processes ---------------------------------------------------------------------------------------------------------


async def _many(number: int, attacker: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
    """So many attackers at once; each is given its number."""
    async with anyio.create_task_group() as tasks:
        for which in range(number):
            tasks.start_soon(attacker, which, *args)


ATTACKS: dict[str, Callable[[int, Outcome], Awaitable[None]]] = {
    "empty pongs": empty_pongs,
    "continuation frames": continuation_frames,
    "half-open handshakes": half_open_handshakes,
    "idle sockets": idle_sockets,
    "connecting": connecting,
    "unknown runs": unknown_runs,
    "starts": starts,
    "joins": joins,
    "never reading": never_reading,
    "slow requests": slow_requests,
    "requests": requests,
}


def run(name: str, port: str, seconds: str) -> None:
    """Attack for some time, or until the attack is over."""
    outcome: Outcome = Counter()
    anyio.run(_attack, ATTACKS[name], int(port), float(seconds), outcome, backend_options={"use_uvloop": True})
    sys.stdout.write(json.dumps(outcome))
    sys.stdout.flush()


async def _attack(
    attack: Callable[[int, Outcome], Awaitable[None]], port: int, seconds: float, outcome: Outcome
) -> None:
    with anyio.move_on_after(seconds):
        await attack(port, outcome)


if __name__ == "__main__":
    run(*sys.argv[1:])
