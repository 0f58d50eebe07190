"""A memory bus whose answers come late, when the test says so."""

from collections.abc import Collection, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import anyio

from agentcast.server.bus.base import (
    Announce,
    Announcement,
    Created,
    Deliver,
    Filter,
    Listing,
    NewRun,
    Opened,
    Page,
    RunInfo,
    Snapshot,
    Subscription,
)
from agentcast.server.bus.memory import MemoryBus

T = TypeVar("T")


class Caught:
    """One answer that is held back."""

    def __init__(self) -> None:
        self.asked = anyio.Event()
        self._released = anyio.Event()
        self._error: Exception | None = None

    def release(self, error: Exception | None = None) -> None:
        """Let the answer through; with `error`, that is the answer."""
        self._error = error
        self._released.set()

    async def wait(self) -> None:
        self.asked.set()
        await self._released.wait()
        if self._error is not None:
            raise self._error


class HeldBus(MemoryBus):
    """Answers at once, except to the questions that are held: their answers wait, and grow old."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._held: dict[str, Caught] = {}
        self._next: dict[str, list[Caught]] = {}

    def hold(self, question: str) -> None:
        """Hold back every answer to `question` from now on."""
        self._held[question] = Caught()

    async def asked(self, question: str) -> None:
        """Until an answer is being held back."""
        await self._held[question].asked.wait()

    def release(self, question: str) -> None:
        self._held.pop(question).release()

    def catch(self, question: str) -> Caught:
        """Hold back the next answer to `question`, and no other."""
        caught = Caught()
        self._next.setdefault(question, []).append(caught)
        return caught

    async def _answer(self, question: str, answer: Coroutine[Any, Any, T]) -> T:
        result = await answer
        if self._next.get(question):
            await self._next[question].pop(0).wait()
        elif question in self._held:
            await self._held[question].wait()
        return result

    async def create(self, new: NewRun) -> Created:
        return await self._answer("create", super().create(new))

    async def info(self, runs: Collection[str]) -> dict[str, RunInfo]:
        return await self._answer("info", super().info(runs))

    async def read(self, run: str, epoch: str, after: int) -> Page | None:
        return await self._answer("read", super().read(run, epoch, after))

    async def load_snapshot(self, run: str) -> Snapshot | None:
        return await self._answer("load_snapshot", super().load_snapshot(run))

    async def list(self, filter: Filter) -> Listing:
        return await self._answer("list", super().list(filter))

    async def read_feed(self, after: str) -> Sequence[Announcement] | None:
        return await self._answer("read_feed", super().read_feed(after))

    async def watch_feed(self, announce: Announce) -> tuple[Subscription, str]:
        made: list[Subscription] = []

        async def watch() -> tuple[Subscription, str]:
            subscription, position = await MemoryBus.watch_feed(self, announce)
            made.append(subscription)
            return subscription, position

        return await self._undone_if_it_fails("watch_feed", watch(), made)

    async def open(self, deliver: Mapping[str, Deliver]) -> dict[str, Opened]:
        made: list[Subscription] = []

        async def opened() -> dict[str, Opened]:
            answers = await MemoryBus.open(self, deliver)
            made.extend(answer.subscription for answer in answers.values())
            return answers

        return await self._undone_if_it_fails("open", opened(), made)

    async def _undone_if_it_fails(
        self, question: str, answer: Coroutine[Any, Any, T], made: Sequence[Subscription]
    ) -> T:
        try:
            return await self._answer(question, answer)
        except BaseException:
            for subscription in made:
                subscription.close()
            raise

    @property
    def subscribed(self) -> int:
        """Subscriptions to runs that are still open."""
        return sum(len(log.subscribers) for log in self._logs.values())
