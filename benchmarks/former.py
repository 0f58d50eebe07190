"""What the channel and the recorder did before, for comparison in one run: a queue under a thread lock, and a recorder
that is woken for each event, in a cancel scope, with a lock and a checkpoint. Order, bounds and results are the same.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
from anyio.lowlevel import checkpoint

from agentcast.agents.channel import HIGH_WATER, Emitted
from agentcast.agents.events import AgentEvent, Token
from agentcast.server.bus.base import Bus, Frame, Status
from agentcast.server.protocol import encode_event
from agentcast.server.recorder import BATCH_EVENTS, FLUSH_AFTER
from agentcast.server.state import RunState


class FormerChannel:
    """For producers on its own loop and in threads while the loop is not blocked."""

    abandoned = False

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._items: deque[Emitted] = deque()
        self._closed = False
        self._room = threading.Condition(threading.Lock())
        self._arrived = asyncio.Event()
        self._wake_scheduled = False
        self._waiters: deque[asyncio.Future[None]] = deque()

    @property
    def congested(self) -> bool:
        return len(self._items) >= HIGH_WATER and not self._closed

    def nowait(self, event: AgentEvent) -> None:
        if threading.get_ident() == self._thread:
            with self._room:
                self._items.append(Emitted(time.time(), event))
            self._arrived.set()
            return
        with self._room:
            self._items.append(Emitted(time.time(), event))
            if not self._wake_scheduled:
                self._wake_scheduled = True
                self._loop.call_soon_threadsafe(self._wake)
            while self.congested:
                self._room.wait(0.05)

    def _wake(self) -> None:
        with self._room:
            self._wake_scheduled = False
        self._arrived.set()

    async def send(self, event: AgentEvent) -> None:
        self.nowait(event)
        await self.room()

    async def room(self) -> None:
        while self.congested:
            future = self._loop.create_future()
            with self._room:
                self._waiters.append(future)
            await future

    async def receive(self) -> list[Emitted]:
        while not self._items and not self._closed:
            self._arrived.clear()
            await self._arrived.wait()
        with self._room:
            items = list(self._items)
            self._items.clear()
            self._release()
        return items

    def close(self) -> None:
        with self._room:
            self._closed = True
            self._release()
        self._arrived.set()

    def _release(self) -> None:
        self._room.notify_all()
        while self._waiters:
            waiter = self._waiters.popleft()
            waiter.get_loop().call_soon_threadsafe(_resolve, waiter)


class FormerRecorder:
    """For the tokens of one message that has begun. Its path from the channel to the bus, without what other events
    need."""

    def __init__(self, bus: Bus, run: str, state: RunState) -> None:
        self._bus = bus
        self._run = run
        self._state = state
        self._seq = 1
        self._buffer: list[str] = []
        self._batch: list[Frame] = []
        self._lock = anyio.Lock()

    async def record_from(self, channel: FormerChannel) -> None:
        flush_at: float | None = None
        while True:
            items: list[Emitted] | None = None
            with anyio.move_on_after(None if flush_at is None else max(0.0, flush_at - anyio.current_time())):
                items = await channel.receive()
            for start in range(0, len(items or ()), BATCH_EVENTS):
                await self._record_batch((items or [])[start : start + BATCH_EVENTS])
            if not items or (flush_at is not None and anyio.current_time() >= flush_at):
                async with self._lock:
                    self._flush()
                    await self._append()
            if items is not None and not items:
                return
            if not self._buffer:
                flush_at = None
            elif flush_at is None:
                flush_at = anyio.current_time() + FLUSH_AFTER

    async def _record_batch(self, items: Sequence[Emitted]) -> None:
        async with self._lock:
            for _, event in items:
                if isinstance(event, Token):
                    self._buffer.append(event.delta)
            await self._append()
        await checkpoint()

    def _flush(self) -> None:
        if not self._buffer:
            return
        fact = Token.model_construct(message="m", delta="".join(self._buffer)).wire()
        self._buffer.clear()
        ts, self._seq = time.time(), self._seq + 1
        data = encode_event(self._run, "a", self._seq, 1, ts, fact)
        self._state.apply(fact | {"seq": self._seq, "ts": ts})
        self._batch.append(Frame(self._run, "e", self._seq, data, False))

    async def _append(self) -> None:
        if self._batch:
            await self._retry(self._append_frames, self._batch)
            self._batch = []

    async def _append_frames(self, frames: Sequence[Frame]) -> None:
        status: Status = self._state.document["status"]
        await self._bus.append(self._run, 1, frames, status)

    async def _retry(self, write: Callable[..., Awaitable[None]], *args: Any) -> None:
        await write(*args)


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
