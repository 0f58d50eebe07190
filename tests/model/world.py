"""The world of the model test: a hub on a bus that dawdles, runs that keep their own books, no sockets."""

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, TypeVar, cast

import anyio
import orjson
from anyio.abc import TaskGroup, TaskStatus
from anyio.lowlevel import checkpoint

from agentcast.agents.events import FULL_ONLY_EVENTS, TERMINAL_EVENTS
from agentcast.server.bus.base import (
    ACTIVE,
    Announce,
    Announcement,
    Created,
    Deliver,
    Filter,
    Frame,
    Gone,
    Head,
    Listing,
    NewRun,
    Opened,
    Page,
    RunInfo,
    Snapshot,
    Status,
    Subscription,
)
from agentcast.server.bus.memory import MemoryBus
from agentcast.server.edge.costs import Costs
from agentcast.server.edge.session import Session
from agentcast.server.errors import CloseReason, Unavailable
from agentcast.server.hub.frames import Batch
from agentcast.server.hub.hub import Hub
from agentcast.server.hub.outbox import Outbox
from agentcast.server.protocol import Start, encode_event
from agentcast.server.runs.runs import Runs
from agentcast.server.state import RunState

T = TypeVar("T")
PRINCIPAL = "ann"
AT_REST_AFTER = 400_000


class DawdlingBus(MemoryBus):
    """A bus that takes a few turns of the loop for each question, sometimes has no answer, and delivers late."""

    def __init__(self, seed: int, *, late: bool, flaky: bool, most: int, feed: int, **options: Any) -> None:
        """A question takes up to `most` turns before and after it is answered; one about the feed, up to `feed`."""
        super().__init__(**options)
        self._random = random.Random(seed)
        self._most = most
        self._feed_most = feed
        self._late = late
        self._flaky = flaky
        self._post: deque[Callable[[], None]] = deque()
        self._posted = anyio.Event()
        self.well = True
        """Whether every question is answered at the moment, flaky or not."""

    async def deliver_late(self) -> None:
        """Deliver what is late, in order, until cancelled."""
        while True:
            while self._post:
                await self._dawdle(12)
                self._post.popleft()()
            self._posted = anyio.Event()
            await self._posted.wait()

    async def _dawdle(self, most: int) -> None:
        for _ in range(self._random.randint(0, most)):
            await checkpoint()

    async def _ask(self, question: Coroutine[Any, Any, T], most: int | None = None) -> T:
        most = self._most if most is None else most
        try:
            await self._dawdle(most)
        except BaseException:  # cancelled before it was asked
            question.close()
            raise
        answer = await question
        await self._dawdle(most)
        if self._flaky and not self.well and self._random.random() < 0.15:
            raise Unavailable("the bus is away")
        return answer

    async def info(self, runs: Collection[str]) -> dict[str, RunInfo]:
        return await self._ask(super().info(runs))

    async def read(self, run: str, epoch: str, after: int) -> Page | None:
        return await self._ask(super().read(run, epoch, after))

    async def load_snapshot(self, run: str) -> Snapshot | None:
        return await self._ask(super().load_snapshot(run))

    async def list(self, filter: Filter) -> Listing:
        return await self._ask(super().list(filter))

    async def read_feed(self, after: str) -> Sequence[Announcement] | None:
        return await self._ask(super().read_feed(after), self._feed_most)

    async def watch_feed(self, announce: Announce) -> tuple[Subscription, str]:
        subscription, position = await super().watch_feed(announce)
        try:
            await self._ask(_nothing_async())
        except BaseException:
            subscription.close()
            raise
        return subscription, position

    async def open(self, deliver: Mapping[str, Deliver]) -> dict[str, Opened]:
        opened: dict[str, Opened] = {}
        try:
            for run, take in deliver.items():
                if run in self._logs:
                    opened[run] = Opened(self._logs[run].info, await self._subscribe(run, take))
            infos = await self._ask(super().info(list(opened)))
        except BaseException:
            for answer in opened.values():
                answer.subscription.close()
            raise
        return {run: Opened(infos[run], answer.subscription) for run, answer in opened.items() if run in infos}

    async def _subscribe(self, run: str, deliver: Deliver) -> Subscription:
        open = [True]

        def post(delivery: Sequence[Frame] | Head | Gone) -> None:
            if self._late:
                self._post.append(lambda: deliver(delivery) if open else None)
                self._posted.set()
            else:
                deliver(delivery)

        inner = (await super().open({run: post}))[run].subscription
        try:
            await self._ask(_nothing_async())
        except BaseException:
            inner.close()
            raise
        return _Closing(inner, open)

    @property
    def subscribed(self) -> int:
        """Subscriptions to runs that are still open."""
        return sum(len(log.subscribers) for log in self._logs.values())


class _Closing:
    def __init__(self, inner: Subscription, open: list[bool]) -> None:
        self._inner = inner
        self._open = open

    def close(self) -> None:
        self._inner.close()
        self._open.clear()


class Run:
    """One run as its owner sees it: the reference for everything that clients are shown."""

    def __init__(self, index: int, agent: str, thread: str | None) -> None:
        self.id = f"run{index:05d}"
        self.index = index
        self.agent = agent
        self.thread = thread
        self.state = RunState.new(self.id, agent)
        self.epoch = f"{self.id}-first"
        self.epochs = [self.epoch]
        self.fence = 0
        self.logged: dict[int, bytes] = {}
        """seq → the frame that clients may see. What the bus lost is not among them."""
        self.progress: list[int] = []
        """Every seq that detail `progress` shows, lost or not."""
        self.states = [self.state.encode()]
        """The encoded state after each seq."""
        self.open: dict[str, str] = {}
        """What has begun and not ended yet: id → `message` or `tool`."""

    @property
    def head(self) -> int:
        return len(self.states) - 1

    @property
    def status(self) -> Status:
        return cast(Status, self.state.document["status"])

    @property
    def ended(self) -> bool:
        return self.status not in ACTIVE

    def matches(self, to: dict[str, Any]) -> bool:
        return (
            "all" in to
            or to.get("run") == self.id
            or to.get("agent") == self.agent
            or ("thread" in to and to["thread"] == self.thread)
        )

    async def create(self, bus: MemoryBus) -> Created:
        thread = {} if self.thread is None else {"thread": self.thread}
        first = self._stamp({"event": "run_queued", "epoch": self.epoch, "input": {"n": self.index}, **thread})
        created = await bus.create(
            NewRun(
                run=self.id,
                epoch=self.epoch,
                agent=self.agent,
                principal=PRINCIPAL,
                thread=self.thread,
                created=float(self.index),
                first=first,
            )
        )
        assert created.fence is not None
        self.fence = created.fence
        self._log([first])
        return created

    async def append(self, bus: MemoryBus, kinds: Sequence[str]) -> None:
        batch = [self._stamp(self._fact(kind)) for kind in kinds]
        await bus.append(self.id, self.fence, batch, self.status)
        self._log(batch)

    async def rebase(self, bus: MemoryBus, lost: Sequence[str]) -> None:
        """The bus has lost the batch that held `lost`, as the owner finds out."""
        for kind in lost:
            self._stamp(self._fact(kind))
        self.epoch = await bus.rebase(self.id, self.fence, self.head, self.state.encode(), self.status)
        self.epochs.append(self.epoch)

    async def save(self, bus: MemoryBus) -> None:
        await bus.save_snapshot(self.fence, Snapshot(self.id, self.epoch, self.head, self.state.encode()))

    def _log(self, batch: Sequence[Frame]) -> None:
        self.logged.update({frame.seq: frame.data for frame in batch})

    def _stamp(self, fact: dict[str, Any]) -> Frame:
        seq = self.head + 1
        prev = self.progress[-1] if self.progress else 0
        data = encode_event(self.id, self.agent, seq, prev, float(seq), fact)
        self.state.apply(orjson.loads(data))
        self.states.append(self.state.encode())
        progress = fact["event"] not in FULL_ONLY_EVENTS
        if progress:
            self.progress.append(seq)
        return Frame(self.id, self.epoch, seq, data, progress, fact["event"] in TERMINAL_EVENTS)

    def _fact(self, kind: str) -> dict[str, Any]:
        match kind:
            case "text":
                return self._go_on("message")
            case "tool":
                return self._go_on("tool")
            case "close":
                return self._close()
            case "end":
                return {"event": "run_end", "result": {"n": self.head}, "duration": 1.0}
            case "fail":
                failure = {"code": "agent_error", "message": "no", "retryable": False}
                return {"event": "run_error", "error": failure, "duration": 1.0}
            case _:
                return {"event": "status", "message": f"at {self.head}"}

    def _go_on(self, what: str) -> dict[str, Any]:
        id = next((id for id, kind in self.open.items() if kind == what), None)
        if id is None:
            id = f"{what}{self.head}"
            self.open[id] = what
            if what == "tool":
                return {"event": "tool_start", "span": id, "tool": "search", "args": {"n": self.head}}
            return {"event": "message_start", "message": id, "span": "s", "field": "answer"}
        if what == "tool":
            return {"event": "tool_progress", "span": id, "progress": float(self.head)}
        return {"event": "token", "message": id, "delta": f"{self.head} "}

    def _close(self) -> dict[str, Any]:
        if not self.open:
            return {"event": "run_start", "worker": "w", "attempt": 1}
        id, what = self.open.popitem()
        if what == "tool":
            return {"event": "tool_end", "span": id, "tool": "search", "duration": 1.0, "result": None}
        text = next(item["text"] for item in self.state.document["messages"] if item["message"] == id)
        return {"event": "message_end", "message": id, "text": text}


class Connection:
    """What `agentcast.server.edge.endpoint` makes of a socket, without one."""

    def __init__(self, hub: Hub, starter: object, queue_frames: int, *, writable_every: int = 0) -> None:
        """Each so-many-th frame finds a socket that takes it at once."""
        self._hub = hub
        self.outbox = Outbox(self, queue_frames=queue_frames)
        self._session = Session("x", PRINCIPAL, hub, cast(Runs, starter), self.outbox, Costs())
        self._tasks: TaskGroup | None = None
        self._pulling = False
        self._taken: deque[bytes] = deque()
        self._writable_every = writable_every
        self._writes = 0
        self.closed = anyio.Event()

    async def serve(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        try:
            async with anyio.create_task_group() as self._tasks:
                task_status.started()
                await anyio.sleep_forever()
        finally:
            self._hub.disconnect(self.outbox)
            self.closed.set()

    async def send(self, command: dict[str, Any]) -> None:
        assert self._tasks is not None
        self._tasks.start_soon(self._session.handle, orjson.dumps(command).decode())

    async def read(self) -> dict[str, Any] | None:
        """The next frame, if one waits."""
        taken = [] if self._taken else self.outbox.take()
        assert len(taken) <= 1
        self._taken += [payload for batch in taken for payload in batch.payloads]
        return cast(dict[str, Any], orjson.loads(self._taken.popleft())) if self._taken else None

    async def hang_up(self) -> None:
        assert self._tasks is not None
        self._tasks.cancel_scope.cancel()
        await self.closed.wait()

    def write(self, batch: Batch) -> bool:
        self._writes += 1
        writable = bool(self._writable_every and not self._taken and self._writes % self._writable_every == 0)
        if writable:
            self._taken += batch.payloads
        return writable

    def wake(self) -> None:
        """It is read whenever the test likes."""

    def cut(self, reason: CloseReason) -> None:
        raise AssertionError(reason)

    def fail(self, error: Exception) -> None:
        raise error

    def pull(self) -> None:
        if not self._pulling and self._tasks is not None:
            self._pulling = True
            self._tasks.start_soon(self._catch_up)

    async def _catch_up(self) -> None:
        try:
            await self._hub.catch_up(self.outbox)
        finally:
            self._pulling = False
        if self.outbox.is_behind and not self.outbox.full:
            self.pull()


class World:
    """A running hub and all runs. Coroutines are run in it one by one; its tasks stand still in between."""

    def __init__(self, seed: int, *, queue_frames: int, most: int = 3, feed: int = 3, **options: Any) -> None:
        self._queue_frames = queue_frames
        self._runner = asyncio.Runner()
        self._loop = self._runner.get_loop()
        self.runs: list[Run] = []
        self.bus = self._runner.run(self._made_bus(seed, most=most, feed=feed, **options))
        self._main = self._loop.create_task(self._serve())
        self.do(self.settle())
        self.bus.well = False

    async def _made_bus(self, seed: int, **options: Any) -> DawdlingBus:
        return DawdlingBus(seed, **options)

    async def _serve(self) -> None:
        self.hub = Hub(self.bus)
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self.bus.deliver_late)
            await self._tasks.start(self.hub.run)
            await anyio.sleep_forever()

    def do(self, work: Awaitable[T]) -> T:
        """Run a coroutine in the world, and nothing longer than that."""

        async def guarded() -> T:
            return await work

        result = self._runner.run(guarded())
        if self._main.done():
            self._main.result()
        return result

    def close(self) -> None:
        self._main.cancel()
        self.do_quietly()
        self._runner.close()

    def do_quietly(self) -> None:
        async def ended() -> None:
            await asyncio.wait([self._main])

        self._runner.run(ended())

    async def connect(self) -> Connection:
        connection = Connection(self.hub, self, self._queue_frames, writable_every=3)
        await self._tasks.start(connection.serve)
        return connection

    async def turns(self, count: int) -> None:
        for _ in range(count):
            await checkpoint()

    async def settle(self) -> None:
        """Let the hub run until all of it waits."""
        me = asyncio.current_task()
        for _ in range(AT_REST_AFTER):
            if all(task is me or _waits(task) for task in asyncio.all_tasks()):
                return
            await checkpoint()
        raise AssertionError("the hub does not come to rest")

    async def create(self, agent: str, thread: str | None) -> Created:
        run = Run(len(self.runs), agent, thread)
        self.runs.append(run)
        return await run.create(self.bus)

    active = 0
    """Stands in for `Runs.active`."""

    async def start(self, principal: str, command: Start, starter: object) -> Created:
        """Stands in for `Runs.start`."""
        return await self.create(command.agent, command.thread)


def _waits(task: "asyncio.Task[Any]") -> bool:
    waiter = getattr(task, "_fut_waiter")  # noqa: B009 -- there is no public way
    return waiter is not None and not waiter.done()


def _nothing() -> None:
    pass


async def _nothing_async() -> None:
    pass
