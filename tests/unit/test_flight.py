"""Sharing work between those who ask at the same time."""

import anyio
import pytest

from agentcast.server.hub.single_flight import SingleFlight


class Work:
    """Counts its calls; each waits until it is let go, then gives what `outcomes` says."""

    def __init__(self, *outcomes: int | Exception) -> None:
        self.calls = 0
        self.go = anyio.Event()
        self._outcomes = outcomes

    async def __call__(self) -> int:
        self.calls += 1
        outcome = self._outcomes[min(self.calls, len(self._outcomes)) - 1]
        await self.go.wait()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


async def test_overlapping_calls_share_one_execution() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    work = Work(1, 2)
    results: list[int] = []

    async def ask() -> None:
        results.append(await flight("key", work))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            work.go.set()

    assert results == [1] * 5
    assert work.calls == 1


async def test_nothing_is_kept_for_later_calls() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    work = Work(1, 2)
    work.go.set()

    assert [await flight("key", work), await flight("key", work)] == [1, 2]


async def test_different_keys_do_not_share() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    one, other = Work(1), Work(2)
    other.go.set()

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(flight, "one", one)
            await anyio.wait_all_tasks_blocked()
            assert await flight("other", other) == 2
            one.go.set()


async def test_after_a_failure_each_of_the_others_tries_for_itself() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    work = Work(ValueError("first"), 2)
    results: list[int] = []
    failures: list[str] = []

    async def ask() -> None:
        try:
            results.append(await flight("key", work))
        except ValueError as error:
            failures.append(str(error))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            work.go.set()

    assert failures == ["first"]
    assert results == [2, 2]
    assert work.calls == 3


async def test_cancelling_the_first_caller_does_not_fail_the_others() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    work = Work(1, 2)
    results: list[int] = []

    async def ask() -> None:
        results.append(await flight("key", work))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            async with anyio.create_task_group() as first:
                first.start_soon(ask)
                await anyio.wait_all_tasks_blocked()
                tasks.start_soon(ask)
                await anyio.wait_all_tasks_blocked()
                assert work.calls == 1
                first.cancel_scope.cancel()
            work.go.set()

    assert results == [2]


async def test_failure_reaches_a_lone_caller_and_is_not_kept() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    work = Work(ValueError("once"), 2)
    work.go.set()

    with pytest.raises(ValueError, match="once"):
        await flight("key", work)

    assert await flight("key", work) == 2
