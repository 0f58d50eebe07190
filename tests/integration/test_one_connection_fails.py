"""What breaks on behalf of one connection ends that connection, with 1011 and its traceback in the log; the process,
the runs and the other connections go on (G9). What breaks for all of them ends the process."""

from collections.abc import Callable
from typing import Any

import anyio
import pytest

import agentcast.server.edge.connections
from agentcast.agents.base import Emitter
from agentcast.agents.events import Status
from agentcast.server.edge.endpoint import Connection
from agentcast.server.hub.feed_place import FeedPlace
from agentcast.server.hub.follower import Follower
from agentcast.server.hub.outbox import Outbox
from tests.support.agents import Anything, agent
from tests.support.client import Client
from tests.support.hub import RunningHub, open_hub
from tests.support.log import Log
from tests.support.process import serve
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("each_server")

BROKE = "something of it broke"


@agent("talker")
async def talker(input: Anything, emit: Emitter) -> str:
    await emit.send(Status(message="hello"))
    return "done"


@agent("holder", timeout=60)
async def holder(input: Anything, emit: Emitter) -> str:
    await emit.send(Status(message="holding"))
    await anyio.sleep_forever()
    return "never"


def broken(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("broken on purpose")


async def broken_task(*args: Any) -> Any:
    raise RuntimeError("broken on purpose")


class Unusable(dict[str, Any]):
    """What a follower is wanted for, which cannot be read."""

    def __iter__(self) -> Any:
        raise RuntimeError("broken on purpose")


def replace(connection: Connection, **methods: Any) -> None:
    """Give this connection other methods. It has slots, so they cannot be set."""
    connection.__class__ = type("Broken", (Connection,), {"__slots__": (), **methods})


class Unwritable:
    """A socket that cannot be written to."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def __getattr__(self, name: str) -> Any:
        return broken if name == "write" else getattr(self._writer, name)


def break_queue(connection: Connection) -> None:
    """Everything waits, as if the socket took nothing at the moment, and cannot be taken."""
    replace(connection, write=lambda self, batch: False)
    breaking(connection, take=broken)


def break_follower(connection: Connection) -> None:
    add = connection._outbox.add

    def adding(new: Follower) -> None:
        new.wants = Unusable(new.wants)
        add(new)

    breaking(connection, add=adding)


def breaking(connection: Connection, **methods: Any) -> None:
    """Replace methods of a connection's outbox."""
    outbox = connection._outbox
    outbox.__class__ = type(
        "Breaking", (Outbox,), {"__slots__": (), **{name: staticmethod(it) for name, it in methods.items()}}
    )


def breaking_feed(connection: Connection, name: str) -> None:
    place = connection._outbox.feed
    place.__class__ = type("Breaking", (FeedPlace,), {"__slots__": (), name: staticmethod(broken)})


FAULTS: dict[str, Callable[[Connection], None]] = {
    "its tick": lambda connection: replace(connection, tick=broken),
    "what is said once a second": lambda connection: breaking(connection, put_notices=broken),
    "frames of a run": lambda connection: breaking(connection, send=broken),
    "what waits for it": break_queue,
    "a write": lambda connection: setattr(connection, "_writer", Unwritable(connection._writer)),
    "whose turn it is": lambda connection: breaking(connection, claim=broken),
    "a page": lambda connection: breaking(connection, offer=broken),
    "the end of a run": lambda connection: breaking(connection, remove=broken),
    "what is announced": lambda connection: breaking_feed(connection, "expect"),
    "that a rule was applied": lambda connection: breaking_feed(connection, "applied"),
    "what has ended": lambda connection: breaking_feed(connection, "remember"),
    "a new follower": lambda connection: breaking(connection, add=broken),
    "its follower": break_follower,
    "the queue": lambda connection: breaking(connection, put=broken),
}


def connection_of(hub: RunningHub, client: Client) -> Connection:
    session = client.hello["session"]
    return next(one for one in hub.core.connections._open if one._session.id == session)


@pytest.fixture(autouse=True)
def frequent_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agentcast.server.edge.connections, "TICK", 0.05)


@pytest.mark.parametrize("fault", FAULTS)
async def test_what_breaks_for_one_connection_ends_that_one_only(fault: str, log: Log) -> None:
    log.expect(BROKE)
    async with open_hub(talker, holder) as hub, hub.client() as other, hub.http() as http:
        await other.follow_all()
        async with hub.client() as victim:
            await victim.follow_all()
            held = await other.start("holder")
            await victim.event("status", held)
            FAULTS[fault](connection_of(hub, victim))

            runs = [await other.start("talker") for _ in range(3)]
            await other.end(*runs)

            assert await victim.closed() == (1011, "internal error")
        await hub.left(lambda: len(hub.core.connections) == 1)
        assert list(hub.core.hub.topics) == [held]
        assert len(hub.core.hub.topics[held].followers) == 1
        assert len(hub.core.hub.rules) == 1
        await other.ask("cancel", run=held)
        assert (await other.view(held)).document["status"] == "cancelled"
        await other.start("talker")
        await other.until(lambda frame: frame["type"] == "feed")
        assert hub.core.crashed is None
        assert (await http.get("/readyz")).status_code == 200
        async with hub.client(memory=victim.memory) as again:
            await again.follow_all()
            await again.end(held, *runs)
        assert sum(BROKE in line for line in log.lines) == 1


@pytest.mark.parametrize("op", ["ping", "subscribe"])
async def test_a_command_that_breaks_its_session_ends_its_connection_only(
    op: str, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.expect(BROKE)
    async with open_hub(talker) as hub, hub.client() as other, hub.client() as victim:
        monkeypatch.setattr(connection_of(hub, victim)._session, "handle", broken_task)
        await victim.send(op=op, to={"all": True})
        assert await victim.closed() == (1011, "internal error")
        await other.end(await other.start("talker"))


async def test_runs_that_have_ended_are_forgotten_though_nothing_is_announced(log: Log) -> None:
    async with open_hub(talker) as hub, hub.client() as client:
        await client.follow_all()
        await client.end(*[await client.start("talker") for _ in range(5)])
        outbox = connection_of(hub, client)._outbox
        await until(lambda: not outbox.feed.past)


async def test_a_connection_that_breaks_while_it_is_closed_holds_up_no_shutdown(log: Log) -> None:
    log.expect(BROKE)
    async with open_hub(talker) as hub, hub.client() as other, hub.client() as victim:
        break_queue(connection_of(hub, victim))
        connection_of(hub, victim)._outbox.put(b'{"type":"ping"}')
        await hub.core.stop()
        assert (await victim.closed())[0] == 1011
        assert (await other.closed())[0] == 4001


async def test_after_one_part_has_crashed_the_hub_is_not_ready(log: Log) -> None:
    log.expect("hub crashed; this hub is going down")
    async with open_hub(talker) as hub, hub.http() as http:
        assert (await http.get("/readyz")).status_code == 200
        hub.core.hub.feed.read = broken_task  # type: ignore[method-assign]
        hub.core.hub.wake()
        await until(lambda: hub.core.crashed is not None)
        assert (await http.get("/readyz")).status_code == 503
        assert (await http.get("/healthz")).status_code == 200
        assert hub.core.crashed == "hub"
        hub.core.crashed = None


async def test_a_process_in_which_a_part_crashes_exits() -> None:
    async with serve(agents="tests.support.saboteur:registry") as hub, hub.client() as client:
        await client.start("saboteur")
        await client.send(op="start", agent="saboteur", input={})
        assert await hub.exit_code(within=20) == 1
        assert "hub crashed; this hub is going down" in "".join(hub.log)
