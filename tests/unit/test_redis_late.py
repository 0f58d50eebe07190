"""Answers of Redis that come late, and entries that cannot be read: without a server (G1, G2)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import anyio
import orjson
import pytest
from anyio.lowlevel import checkpoint

from agentcast.server.bus.base import Frame, Gone, Head
from agentcast.server.bus.redis import codec
from agentcast.server.bus.redis.commands import Commands
from agentcast.server.bus.redis.feed import Feed
from agentcast.server.bus.redis.heads import HeadTracker
from agentcast.server.bus.redis.keys import Keys
from agentcast.server.bus.redis.listener import Listener
from agentcast.server.bus.redis.pipelined import PipelinedConnection
from agentcast.server.errors import Unavailable

KEYS = Keys("agentcast", 0)


def info(epoch: str, head: int) -> list[bytes | None]:
    return [b"a", b"ann", None, epoch.encode(), b"%d" % head, b"running", b"1.0", None, None]


class Answers:
    """Stands in for a connection: answers are held back until they are released."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)
        self.asked, self.released = anyio.Event(), anyio.Event()

    async def calls(self, commands: Sequence[Any]) -> Any:
        answer = self._answers.pop(0)
        self.asked.set()
        await self.released.wait()
        return answer

    async def call(self, *command: Any, **options: Any) -> Any:
        raise Unavailable("away")


class Channels:
    """Stands in for a listener."""

    def __init__(self) -> None:
        self.receivers: dict[str, Callable[[bytes], None]] = {}

    async def subscribe(self, receivers: Mapping[str, Callable[[bytes], None]]) -> None:
        self.receivers.update(receivers)

    def unsubscribe(self, channel: str) -> None:
        del self.receivers[channel]


@pytest.mark.parametrize(
    ("message", "delivered"),
    [(b"H2 8", Head("r", "2", 8)), (b"H1 8", Head("r", "1", 8))],
    ids=["of a new log", "of the same log"],
)
async def test_heads_that_were_asked_for_before_an_update_came_are_not_delivered_after_them(
    message: bytes, delivered: Head
) -> None:
    """A hub that follows the run only since then would take the old log for the newer one."""
    connection, channels, got = Answers([info("1", 7)]), Channels(), list[Any]()
    tracker = HeadTracker(cast(Listener, channels), cast(PipelinedConnection, connection), KEYS)
    await tracker.subscribe({"r": got.append})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tracker.compare_all)
        await connection.asked.wait()
        channels.receivers[KEYS.updates("r")](message)
        connection.released.set()
    assert got == [delivered]


async def test_a_head_that_nothing_has_overtaken_is_delivered() -> None:
    connection, got = Answers([info("1", 7)]), list[Sequence[Frame] | Head | Gone]()
    tracker = HeadTracker(cast(Listener, Channels()), cast(PipelinedConnection, connection), KEYS)
    await tracker.subscribe({"r": got.append})
    connection.released.set()
    await tracker.compare_all()
    assert got == [Head("r", "1", 7)]


async def test_watching_a_feed_that_cannot_be_read_leaves_no_watcher() -> None:
    feed = Feed(cast(PipelinedConnection, Answers()), KEYS, 10)
    delivered: list[object] = []
    with pytest.raises(Unavailable):
        await feed.watch(delivered.append)
    feed.hint()
    assert delivered == []


def test_an_announcement_or_a_run_that_cannot_be_read_hides_no_other(caplog: pytest.LogCaptureFixture) -> None:
    good = orjson.dumps(["r", "1", "a", None, "ann"])
    entries = [(b"1-0", [b"run", b"x", b"announcement", b"garbage"]), (b"2-0", [b"run", b"r", b"announcement", good])]
    assert [entry.position for entry in codec.announcements(entries)] == ["2:r"]
    broken = info("1", 7)
    broken[4] = b"seven"
    assert list(codec.infos(["x", "r"], [broken, info("1", 7)])) == ["r"]
    assert "cannot be read" in caplog.text


MALFORMED = [{}, [], 7, {"from": "w", "number": 1}, {"number": 1, "run": "r", "command": {}}, {"answer": None}]


async def test_a_command_that_cannot_be_read_or_breaks_takes_no_hub_down(caplog: pytest.LogCaptureFixture) -> None:
    published: list[tuple[str, bytes]] = []

    async def publish(channel: str, message: bytes) -> int:
        published.append((channel, message))
        return 1

    async def broken(run: str, command: Mapping[str, Any]) -> None:
        raise RuntimeError("broken on purpose")

    commands = Commands(publish, KEYS, "w")
    await commands.register(broken)
    async with anyio.create_task_group() as tasks:
        await tasks.start(commands.run)
        for malformed in MALFORMED:
            try:
                commands.take(orjson.dumps(malformed))
            except (KeyError, TypeError):
                pass  # the listener logs it
        commands.verify("r")
        for _ in range(5):
            await checkpoint()
        assert published == []
        commands.take(orjson.dumps({"from": "v", "number": 7, "run": "r", "command": {"op": "cancel"}}))
        for _ in range(5):
            await checkpoint()
        tasks.cancel_scope.cancel()
    ((channel, message),) = published
    assert channel == KEYS.commands("v")
    assert orjson.loads(message)["number"] == 7
    assert orjson.loads(message)["answer"]["code"] == "internal"
    assert "run r was not verified" in caplog.text
