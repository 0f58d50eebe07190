"""Where runs live: queue, execution, cancellation, shutdown, and exactly one end for each (G6, G7, G9)."""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import orjson
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from agentcast.agents.base import AgentSpec, Emitter, Task, ToolError, Turn
from agentcast.agents.events import TERMINAL_EVENTS, Status, StepLimit
from agentcast.server.bus.base import Bus, Ends, Filter, Frame, Listing, RunInfo, Snapshot
from agentcast.server.bus.base import Status as RunStatus
from agentcast.server.bus.memory import MemoryBus
from agentcast.server.config import Settings
from agentcast.server.errors import (
    AlreadyFinished,
    Conflict,
    InvalidInput,
    NotFound,
    TooMany,
    Unavailable,
    UnknownAgent,
)
from agentcast.server.protocol import Start
from agentcast.server.runs.runs import Runs
from tests.contract.support import Mail

Run = Callable[[Task, Emitter], Awaitable[Any]]


class Question(BaseModel):
    text: str = "hello"
    number: int = 0


class Scripted:
    """An agent that runs the function it is given."""

    def __init__(self, run: Run, *, name: str = "echo", timeout: float = 60.0, max_concurrent: int = 32) -> None:
        self.spec = AgentSpec(
            name=name, description="", input_model=Question, timeout=timeout, max_concurrent=max_concurrent
        )
        self._run = run

    async def run(self, task: Task, emit: Emitter) -> Any:
        return await self._run(task, emit)


class Held:
    """Runs until it is let go; counts who got that far."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.go = anyio.Event()
        self._changed = anyio.Event()

    async def __call__(self, task: Task, emit: Emitter) -> str:
        self.started.append(task.run)
        self._changed.set()
        await self.go.wait()
        return "done"

    async def until_started(self, count: int = 1) -> None:
        with anyio.fail_after(5):
            while len(self.started) < count:
                self._changed = anyio.Event()
                await self._changed.wait()


class Host:
    """A process's runs and the bus that they are on."""

    def __init__(self, runs: Runs, bus: Bus) -> None:
        self.runs = runs
        self.bus = bus

    async def start(
        self, agent: str = "echo", principal: str = "ann", starter: str | None = None, **fields: Any
    ) -> str:
        command = Start(op="start", agent=agent, **({"input": {}} | fields))
        created = await self.runs.start(principal, command, starter)
        return created.run

    async def info(self, run: str) -> RunInfo:
        return (await self.bus.info([run]))[run]

    async def log(self, run: str) -> list[dict[str, Any]]:
        documents: list[dict[str, Any]] = []
        while page := await self.bus.read(run, (await self.info(run)).epoch, len(documents)):
            if not page.frames:
                break
            documents += [orjson.loads(frame.data) for frame in page.frames]
        return documents

    async def names(self, run: str) -> list[str]:
        return [item["event"] for item in await self.log(run)]

    async def until(self, run: str, ready: Callable[[RunInfo], bool]) -> None:
        mail = Mail()
        subscription = (await self.bus.open({run: mail.deliver}))[run].subscription
        while not ready(await self.info(run)):
            heard = len(mail.items)
            await mail.until(lambda items, heard=heard: len(items) > heard)  # type: ignore[misc]
        subscription.close()

    async def until_head(self, run: str, seq: int) -> None:
        await self.until(run, lambda info: info.head >= seq)

    async def end(self, run: str) -> dict[str, Any]:
        """The last event of the run, once it has ended; there must be no other that is terminal."""
        await self.until(run, lambda info: info.ended is not None)
        log = await self.log(run)
        assert [item["event"] in TERMINAL_EVENTS for item in log] == [False] * (len(log) - 1) + [True]
        return log[-1]


@asynccontextmanager
async def hosting(*agents: Scripted, bus: Bus | None = None, **options: Any) -> AsyncIterator[Host]:
    bus = bus or MemoryBus()
    options = {"cancel_grace": 0.05, "grace": 0.0} | options
    runs = Runs(bus, {agent.spec.name: agent for agent in agents}, Settings(**options), "w")
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            await tasks.start(runs.serve)
            yield Host(runs, bus)
            await runs.stop()
    assert runs.active == 0


async def echo(task: Task, emit: Emitter) -> Any:
    await emit.send(Status(message="working"))
    return {"text": task.input.text}  # type: ignore[attr-defined]


async def forever(task: Task, emit: Emitter) -> None:
    await anyio.sleep_forever()


# -- Running -------------------------------------------------------------------------------------------------------


async def test_run_is_logged_from_start_to_end() -> None:
    async with hosting(Scripted(echo)) as host:
        run = await host.start(input={"text": "hi"}, thread="t")
        end = await host.end(run)

        log = await host.log(run)
        assert [item["event"] for item in log] == ["run_queued", "run_start", "status", "run_end"]
        assert (log[0]["input"], log[0]["thread"], "position" in log[0]) == ({"text": "hi"}, "t", False)
        assert (log[1]["worker"], log[1]["attempt"]) == ("w", 1)
        assert end["result"] == {"text": "hi"}
        assert end["duration"] >= 0
        assert (await host.info(run)).status == "done"


async def test_runs_that_have_ended_are_counted() -> None:
    async with hosting(Scripted(echo)) as host:
        await host.end(await host.start())
        await host.end(await host.start())
    assert (host.runs.active, host.runs.ended) == (0, 2)


async def test_agent_is_given_validated_input_and_the_run() -> None:
    seen: list[Task] = []

    async def look(task: Task, emit: Emitter) -> None:
        seen.append(task)

    async with hosting(Scripted(look)) as host:
        run = await host.start(input={"number": "5", "unknown": 1})
        await host.end(run)

    assert seen[0].input == Question(number=5)
    assert seen[0].run == run
    assert seen[0].deadline is not None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no such city"), "no such city"),
        (ToolError("the page is gone"), "the page is gone"),
        (KeyError("hunter2"), "KeyError"),
        (RuntimeError("/etc/passwd"), "RuntimeError"),
        (FileNotFoundError(2, "No such file or directory", "/etc/secret"), "No such file or directory"),
        (SystemExit(1), "SystemExit"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (BaseException("x"), "BaseException"),
        (ExceptionGroup("g", [ValueError("x")]), "x"),
        (ExceptionGroup("g", [ValueError("x"), ValueError("y")]), "ExceptionGroup"),
    ],
)
async def test_whatever_an_agent_raises_ends_its_run_only(error: BaseException, message: str) -> None:
    async def fail(task: Task, emit: Emitter) -> None:
        raise error

    async with hosting(Scripted(fail), Scripted(echo, name="other")) as host:
        run, other = await host.start(), await host.start("other")

        assert (await host.end(run))["error"] == {"code": "agent_error", "message": message, "retryable": False}
        assert (await host.info(run)).status == "failed"
        assert (await host.end(other))["event"] == "run_end"


async def test_agent_that_cancels_itself_has_failed() -> None:
    async def cancel(task: Task, emit: Emitter) -> None:
        raise anyio.get_cancelled_exc_class()

    async with hosting(Scripted(cancel)) as host:
        assert (await host.end(await host.start()))["error"]["code"] == "agent_error"


class Cyclic(BaseModel):
    me: Any = None


def cyclic() -> Any:
    value = Cyclic()
    value.me = value
    return value


@pytest.mark.parametrize(
    "value", [object(), cyclic(), "x" * 10_000_000, float("nan"), 2**70], ids=lambda v: str(type(v))
)
async def test_any_result_ends_the_run(value: Any) -> None:
    async def give(task: Task, emit: Emitter) -> Any:
        return value

    async with hosting(Scripted(give)) as host:
        end = await host.end(await host.start())

    assert end["event"] in ("run_end", "run_error")
    assert len(orjson.dumps(end)) < 256 * 1024


async def test_event_that_cannot_be_encoded_ends_the_run() -> None:
    async def emit_it(task: Task, emit: Emitter) -> None:
        await emit.send(Status(message="before"))
        await emit.send(StepLimit(max_steps=2**70, message="x"))
        await anyio.sleep_forever()

    async with hosting(Scripted(emit_it, max_concurrent=1), Scripted(echo, name="other")) as host:
        run = await host.start()
        end = await host.end(run)

        assert (end["event"], end["error"]["code"]) == ("run_error", "internal")
        assert "status" in await host.names(run)
        run = await host.start()  # the slot is free again
        assert (await host.end(run))["event"] == "run_error"


async def test_burst_that_nobody_can_hold_back_overflows() -> None:
    async def storm(task: Task, emit: Emitter) -> None:
        for n in range(100_000):
            emit.nowait(Status(message=str(n)))

    async with hosting(Scripted(storm), bus=MemoryBus(log_events=20_000, log_bytes=10**9)) as host:
        end = await host.end(await host.start())

    assert end["error"]["code"] == "event_overflow"


# -- Refusing ------------------------------------------------------------------------------------------------------


async def test_unknown_agent_is_refused_and_the_known_are_named() -> None:
    async with hosting(Scripted(echo), Scripted(echo, name="other")) as host:
        with pytest.raises(UnknownAgent, match="'nobody'; known are: echo, other"):
            await host.start("nobody")
        assert host.runs.active == 0


@pytest.mark.parametrize(
    ("input", "loc"), [({"text": 5}, ["text"]), ({"number": "x"}, ["number"]), ({"number": None}, ["number"])]
)
async def test_invalid_input_names_the_field_and_creates_nothing(input: dict[str, Any], loc: list[str]) -> None:
    async with hosting(Scripted(echo)) as host:
        with pytest.raises(InvalidInput, match=loc[0]) as refusal:
            await host.start(input=input)

        assert [item["loc"] for item in refusal.value.details] == [loc]
        assert host.runs.active == 0
        assert await host.bus.list(Filter()) == []


async def test_input_nested_too_deeply_is_refused() -> None:
    deep = orjson.loads("[" * 1_000 + "]" * 1_000)
    async with hosting(Scripted(echo)) as host:
        with pytest.raises(InvalidInput):
            await host.start(input={"deep": deep})

        assert host.runs.active == 0
        assert (await host.end(await host.start()))["event"] == "run_end"


async def test_no_more_runs_than_may_be_active() -> None:
    held = Held()
    async with hosting(Scripted(held, max_concurrent=1), max_active=3) as host:
        runs = [await host.start() for _ in range(3)]
        with pytest.raises(TooMany, match="3 runs"):
            await host.start()

        held.go.set()
        for run in runs:
            await host.end(run)
        await anyio.wait_all_tasks_blocked()
        assert (await host.end(await host.start()))["event"] == "run_end"


async def test_one_client_leaves_places_for_others() -> None:
    held = Held()
    async with hosting(Scripted(held, max_concurrent=1), max_active=10) as host:
        greedy = [await host.start(starter="greedy") for _ in range(8)]
        with pytest.raises(TooMany, match="8 of the 8 runs"):
            await host.start(starter="greedy")
        for _ in range(2):
            await host.start(starter="modest")

        held.go.set()
        for run in greedy:
            await host.end(run)
        await anyio.wait_all_tasks_blocked()
        assert (await host.end(await host.start(starter="greedy")))["event"] == "run_end"
        await anyio.wait_all_tasks_blocked()
        assert not host.runs._started


# -- Idempotency ---------------------------------------------------------------------------------------------------


async def test_starts_with_one_key_make_one_run_however_many_come_at_once() -> None:
    held = Held()
    found: list[str] = []
    async with hosting(Scripted(held, max_concurrent=1)) as host:

        async def start() -> None:
            found.append(await host.start(key="k"))

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(start)
        await held.until_started()
        held.go.set()
        await host.end(found[0])
        found.append(await host.start(key="k"))

    assert len(set(found)) == 1
    assert held.started == found[:1]


async def test_key_used_for_something_else_conflicts_and_takes_no_slot() -> None:
    held = Held()
    async with hosting(Scripted(held, max_concurrent=2), Scripted(echo, name="other")) as host:
        await host.start(key="k", input={"number": 1})
        for agent, input in (("echo", {"number": 2}), ("other", {"number": 1})):
            with pytest.raises(Conflict):
                await host.start(agent, key="k", input=input)
        assert host.runs.active == 1
        other = await host.start(principal="bob", key="k", input={"number": 2})
        await held.until_started(2)
        held.go.set()
        await host.end(other)


async def test_order_of_the_input_makes_no_difference_to_a_key() -> None:
    async with hosting(Scripted(echo)) as host:
        first = await host.start(key="k", input={"text": "a", "number": 1})

        assert await host.start(key="k", input={"number": 1, "text": "a"}) == first
        await host.end(first)


# -- The queue -----------------------------------------------------------------------------------------------------


async def positions(host: Host, run: str) -> list[int | None]:
    return [item.get("position") for item in await host.log(run) if item["event"] in ("run_queued", "run_position")]


async def test_waiting_runs_start_in_order_and_hear_of_their_place_when_it_has_halved() -> None:
    gates: dict[str, anyio.Event] = {}
    order: list[str] = []
    changed = [anyio.Event()]

    async def gated(task: Task, emit: Emitter) -> None:
        gates[task.run] = anyio.Event()
        order.append(task.run)
        changed[0].set()
        await gates[task.run].wait()

    async with hosting(Scripted(gated, max_concurrent=1)) as host:
        runs = [await host.start() for _ in range(11)]
        for index, run in enumerate(runs):
            while len(order) <= index:
                changed[0] = anyio.Event()
                await changed[0].wait()
            await anyio.wait_all_tasks_blocked()
            gates[run].set()
            await host.end(run)

        assert order == runs
        assert [await positions(host, run) for run in runs] == [
            [None],
            [0],
            [1, 0],
            [2, 1, 0],
            [3, 1, 0],
            [4, 2, 1, 0],
            [5, 2, 1, 0],
            [6, 3, 1, 0],
            [7, 3, 1, 0],
            [8, 4, 2, 1, 0],
            [9, 4, 2, 1, 0],
        ]


async def test_agents_do_not_wait_for_each_other() -> None:
    async with hosting(Scripted(forever, max_concurrent=1), Scripted(echo, name="other", max_concurrent=1)) as host:
        await host.start()
        await host.start()

        assert (await host.end(await host.start("other")))["event"] == "run_end"


@pytest.mark.parametrize("failing", [True, False])
async def test_slot_is_free_again_however_the_run_ended(failing: bool) -> None:
    async def end(task: Task, emit: Emitter) -> None:
        if failing:
            raise ValueError("no")

    async with hosting(Scripted(end, max_concurrent=1)) as host:
        for run in [await host.start() for _ in range(5)]:
            await host.end(run)


# -- Cancelling ----------------------------------------------------------------------------------------------------


async def test_running_agent_is_cancelled_in_two_steps() -> None:
    held = Held()
    async with hosting(Scripted(held)) as host:
        run = await host.start()
        await held.until_started()

        await host.runs.cancel("ann", run, "changed my mind")

        assert "cancel_requested" in await host.names(run)
        end = await host.end(run)
        log = await host.log(run)
        assert [item["event"] for item in log[-2:]] == ["cancel_requested", "run_cancelled"]
        assert (log[-2]["reason"], log[-2]["by"]) == ("changed my mind", "ann")
        assert (end["reason"], (await host.info(run)).status) == ("changed my mind", "cancelled")


async def test_queued_run_is_cancelled_without_ever_starting() -> None:
    held = Held()
    async with hosting(Scripted(held, max_concurrent=1)) as host:
        first, second, third = [await host.start() for _ in range(3)]
        await held.until_started()

        await host.runs.cancel("ann", second, None)
        await host.end(second)
        await anyio.wait_all_tasks_blocked()

        assert await host.names(second) == ["run_queued", "cancel_requested", "run_cancelled"]
        assert await positions(host, third) == [1, 0]
        held.go.set()
        await host.end(third)
        assert held.started == [first, third]


async def test_cancelling_twice_is_harmless_and_logged_once() -> None:
    async with hosting(Scripted(forever)) as host:
        run = await host.start()
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(host.runs.cancel, "ann", run, None)
        await host.end(run)

        assert (await host.names(run)).count("cancel_requested") == 1


async def test_run_that_has_ended_cannot_be_cancelled() -> None:
    async with hosting(Scripted(echo)) as host:
        run = await host.start()
        await host.end(run)

        with pytest.raises(AlreadyFinished, match="done"):
            await host.runs.cancel("ann", run, None)


@pytest.mark.parametrize("principal", ["ann", "bob"], ids=["that does not exist", "of somebody else"])
async def test_run_is_not_found(principal: str) -> None:
    async with hosting(Scripted(forever)) as host:
        run = await host.start() if principal == "bob" else "nowhere"

        with pytest.raises(NotFound):
            await host.runs.cancel(principal, run, None)
        assert host.runs.active == (1 if principal == "bob" else 0)


async def test_agent_may_clean_up_before_it_ends() -> None:
    async def tidy(task: Task, emit: Emitter) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await checkpoint()
            await emit.send(Status(message="tidied up"))

    async with hosting(Scripted(tidy), cancel_grace=5.0) as host:
        run = await host.start()
        await host.until_head(run, 2)
        await host.runs.cancel("ann", run, None)
        await host.end(run)

        assert (await host.names(run))[-3:] == ["cancel_requested", "status", "run_cancelled"]


@pytest.mark.parametrize("how", ["raises", "returns"])
async def test_cancelled_run_is_cancelled_whatever_its_agent_does_then(how: str) -> None:
    async def stubborn(task: Task, emit: Emitter) -> str:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            if how == "raises":
                raise ValueError("in the middle of it") from None
        return "done"

    async with hosting(Scripted(stubborn)) as host:
        run = await host.start()
        await host.until_head(run, 2)
        await host.runs.cancel("ann", run, None)

        assert (await host.end(run))["event"] == "run_cancelled"


async def test_agent_that_ignores_its_cancellation_is_left_behind() -> None:
    alive = anyio.Event()

    async def deaf(task: Task, emit: Emitter) -> None:
        while True:
            try:
                alive.set()
                await anyio.sleep(0.001)
                await emit.send(Status(message="still here"))
            except BaseException:  # noqa: BLE001, S110 -- that is the point
                pass

    async with hosting(Scripted(deaf, max_concurrent=1), Scripted(echo, name="other")) as host:
        run, waiting = await host.start(), await host.start()
        await alive.wait()
        await host.runs.cancel("ann", run, None)
        assert (await host.end(run))["event"] == "run_cancelled"
        head = (await host.info(run)).head

        await host.until_head(waiting, 3)
        assert host.runs.abandoned == 1
        assert (await host.info(run)).head == head
        await host.runs.cancel("ann", waiting, None)
        await host.end(waiting)


async def test_cancellation_is_logged_though_the_client_who_asked_for_it_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agentcast.server.runs.recorder._RETRY_FIRST", 0.001)
    monkeypatch.setattr("agentcast.server.runs.recorder._RETRY_MOST", 0.001)
    bus = AwayBus()
    talk = anyio.Event()

    async def talker(task: Task, emit: Emitter) -> None:
        await talk.wait()
        await emit.send(Status(message="x"))
        await anyio.sleep_forever()

    async with hosting(Scripted(talker), bus=bus) as host:
        run = await host.start()
        await host.until_head(run, 2)
        bus.away = True
        talk.set()
        await bus.refused.wait()
        async with anyio.create_task_group() as client:
            client.start_soon(host.runs.cancel, "ann", run, None)
            await anyio.wait_all_tasks_blocked()
            client.cancel_scope.cancel()
        bus.away = False
        await host.end(run)

        assert (await host.names(run))[-3:] == ["status", "cancel_requested", "run_cancelled"]


async def test_agent_that_is_done_cannot_be_cancelled_though_its_end_is_not_logged_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agentcast.server.runs.recorder._RETRY_FIRST", 0.001)
    monkeypatch.setattr("agentcast.server.runs.recorder._RETRY_MOST", 0.001)
    bus, held = AwayBus(), Held()
    async with hosting(Scripted(held), bus=bus) as host:
        run = await host.start()
        await held.until_started()
        bus.away = True
        held.go.set()
        await bus.refused.wait()

        with pytest.raises(AlreadyFinished):
            await host.runs.cancel("ann", run, None)
        bus.away = False

        assert (await host.end(run))["event"] == "run_end"


class AwayBus(MemoryBus):
    """Takes no batches, and knows no runs to list, while it is away."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.no_list = False
        self.refused = anyio.Event()

    async def append(self, run: str, fence: int, frames: Sequence[Frame], status: RunStatus) -> None:
        if self.away:
            self.refused.set()
            raise Unavailable("away")
        await super().append(run, fence, frames, status)

    async def list(self, filter: Filter) -> Listing:
        if self.no_list:
            self.refused.set()
            raise Unavailable("away")
        return await super().list(filter)


# -- Timeouts ------------------------------------------------------------------------------------------------------


async def test_agent_that_takes_too_long_is_stopped() -> None:
    async with hosting(Scripted(forever, timeout=0.01)) as host:
        end = await host.end(await host.start())

    assert end["error"] == {"code": "timeout", "message": "the agent took longer than 0.01 s", "retryable": True}


async def test_time_in_the_queue_does_not_count() -> None:
    held = Held()
    async with hosting(Scripted(held, timeout=0.2, max_concurrent=1)) as host:
        first, second = await host.start(), await host.start()
        assert (await host.end(first))["error"]["code"] == "timeout"
        held.go.set()

        assert (await host.end(second))["event"] == "run_end"


async def test_run_that_times_out_cannot_be_cancelled_any_more() -> None:
    cleaning, go = anyio.Event(), anyio.Event()

    async def slow(task: Task, emit: Emitter) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cleaning.set()
            await go.wait()

    async with hosting(Scripted(slow, timeout=0.01), cancel_grace=5.0) as host:
        run = await host.start()
        await cleaning.wait()
        with pytest.raises(AlreadyFinished):
            await host.runs.cancel("ann", run, None)
        go.set()

        assert (await host.end(run))["error"]["code"] == "timeout"


# -- Exactly one end -----------------------------------------------------------------------------------------------

delays = st.integers(0, 25)


async def turns(count: int) -> None:
    for _ in range(count):
        await checkpoint()


@dataclass
class Race:
    """When, in turns of the loop, what happens; None is never."""

    finish: int | None
    cancels: list[int]
    timeout: float
    stop: int | None
    wait: bool
    """Whether another run is ahead in the queue."""
    fails: bool
    accepted: int = 0

    @property
    def ends(self) -> bool:
        return self.finish is not None or self.timeout < 60.0 or (bool(self.cancels) and not self.wait)

    async def agent(self, task: Task, emit: Emitter) -> str:
        await emit.send(Status(message="x"))
        if self.finish is None:
            await anyio.sleep_forever()
        else:
            await turns(self.finish)
        if self.fails:
            raise ValueError("no")
        return "done"

    async def cancel(self, host: Host, run: str, after: int) -> None:
        await turns(after)
        try:
            await host.runs.cancel("ann", run, None)
            self.accepted += 1
        except AlreadyFinished:
            pass

    async def shut_down(self, host: Host, after: int) -> None:
        await turns(after)
        await host.runs.stop()

    async def run(self) -> list[dict[str, Any]]:
        """The log of the run that everything raced for."""
        async with hosting(Scripted(self.agent, timeout=self.timeout, max_concurrent=1)) as host:
            blocker = await host.start() if self.wait else None
            run = await host.start()
            async with anyio.create_task_group() as tasks:
                for after in self.cancels:
                    tasks.start_soon(self.cancel, host, run, after)
                if self.stop is not None or not self.ends:
                    tasks.start_soon(self.shut_down, host, 30 if self.stop is None else self.stop)
            await host.end(run)
            if blocker is not None:
                await host.end(blocker)
            return await host.log(run)


# A race that hangs takes seconds to fail, so it is not made smaller.
@settings(deadline=None, max_examples=150, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    st.builds(
        Race,
        finish=st.none() | delays,
        cancels=st.lists(delays, max_size=3),
        timeout=st.sampled_from([0.0, 0.0005, 60.0]),
        stop=st.none() | delays,
        wait=st.booleans(),
        fails=st.booleans(),
        accepted=st.just(0),
    )
)
async def test_racing_ends_leave_exactly_one(race: Race) -> None:
    """G7: an agent that finishes, clients that cancel, a timeout and a shutdown, in any order, queued or running."""
    log = await race.run()

    names = [item["event"] for item in log]
    assert [name in TERMINAL_EVENTS for name in names] == [False] * (len(names) - 1) + [True]
    cancelled = names[-1] == "run_cancelled"
    assert cancelled == bool(race.accepted)
    assert names.count("cancel_requested") == cancelled
    if names[-1] == "run_end":
        assert log[-1]["result"] == "done"


# -- Fenced off ----------------------------------------------------------------------------------------------------


class Fenceable:
    """An agent that a test finds in whatever state, with what it did after it was cancelled."""

    def __init__(self, *, deaf: bool = False) -> None:
        self.here = anyio.Event()
        self.cleaned = False
        self._deaf = deaf

    async def __call__(self, task: Task, emit: Emitter) -> None:
        self.here.set()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=self._deaf):
                for _ in range(200):  # more than a channel takes: nobody may be held back by what is not recorded
                    await emit.send(Status(message="cleaning up"))
                self.cleaned = True
                if self._deaf:
                    await anyio.sleep_forever()


class StuckBus(AwayBus):
    """Takes, for as long as the test wants, neither events of one kind nor snapshots."""

    def __init__(self) -> None:
        super().__init__()
        self.refuses: bytes = b"nothing"
        self.holds_snapshots = False

    async def append(self, run: str, fence: int, frames: Sequence[Frame], status: RunStatus) -> None:
        if any(self.refuses in frame.data for frame in frames):
            self.refused.set()
            raise Unavailable("away")
        await super().append(run, fence, frames, status)

    async def save_snapshot(self, fence: int, snapshot: Snapshot) -> None:
        if self.holds_snapshots:
            self.refused.set()
            await anyio.sleep_forever()
        await super().save_snapshot(fence, snapshot)


@asynccontextmanager
async def fenceable(
    monkeypatch: pytest.MonkeyPatch, run: Run, **options: Any
) -> AsyncIterator[tuple[Host, StuckBus, Callable[[str], Awaitable[list[str]]]]]:
    """A host that checks its fences often. What is given last claims a run, and gives the names in its log once the
    host has let go of it."""
    monkeypatch.setattr("agentcast.server.runs.ownership.CHECK_EVERY", 0.01)
    monkeypatch.setattr("agentcast.server.runs.recorder._RETRY_FIRST", 0.001)
    monkeypatch.setattr("agentcast.server.runs.recorder._RETRY_MOST", 0.001)
    bus = StuckBus()
    async with hosting(Scripted(run, max_concurrent=1, **options), bus=bus, cancel_grace=0.1) as host:

        async def claimed(run: str) -> list[str]:
            active = host.runs.active
            await bus.claim(run)
            with anyio.fail_after(5):
                while host.runs.active >= active:
                    await checkpoint()
            bus.refuses, bus.holds_snapshots = b"nothing", False
            return await host.names(run)

        yield host, bus, claimed


async def test_an_agent_that_says_nothing_is_cancelled_and_frees_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = Fenceable()
    async with fenceable(monkeypatch, agent) as (host, _, claimed):
        run, queued = await host.start(), await host.start()
        await agent.here.wait()
        agent.here = anyio.Event()
        assert await claimed(run) == ["run_queued", "run_start"]
        assert agent.cleaned
        assert host.runs.abandoned == 0
        with anyio.fail_after(5):
            await agent.here.wait()
        assert await claimed(queued) == ["run_queued", "run_start"]


async def test_an_agent_that_does_not_listen_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = Fenceable(deaf=True)
    async with fenceable(monkeypatch, agent) as (host, _, claimed):
        run = await host.start()
        await agent.here.wait()
        assert await claimed(run) == ["run_queued", "run_start"]
        assert agent.cleaned
        assert host.runs.abandoned == 1


async def test_a_queued_run_never_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held()
    async with fenceable(monkeypatch, held) as (host, _, claimed):
        first, second, third = [await host.start() for _ in range(3)]
        await held.until_started()
        assert await claimed(second) == ["run_queued"]
        held.go.set()
        assert (await host.end(third))["event"] == "run_end"
        assert held.started == [first, third]


@pytest.mark.parametrize("refuses", [b'"run_start"', b'"status"', b'"cancel_requested"', b'"run_end"'])
async def test_a_run_whose_write_waits_for_the_bus_is_let_go(
    monkeypatch: pytest.MonkeyPatch, refuses: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk(task: Task, emit: Emitter) -> None:
        await emit.send(Status(message="x"))
        if refuses == b'"cancel_requested"':
            await anyio.sleep_forever()

    async with fenceable(monkeypatch, talk) as (host, bus, claimed):
        bus.refuses = refuses
        run = await host.start()
        async with anyio.create_task_group() as tasks:
            if refuses == b'"cancel_requested"':

                async def cancel() -> None:
                    with pytest.raises(AlreadyFinished):
                        await host.runs.cancel("ann", run, None)

                await host.until_head(run, 3)
                tasks.start_soon(cancel)
            await bus.refused.wait()
            assert refuses.decode().strip('"') not in await claimed(run)
    assert [line for line in caplog.messages if "taken over" in line] == [
        f"run {run}: Fenced: another process has ended or taken over this run; dropped here"
    ]


async def test_a_run_whose_snapshot_is_being_written_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentcast.server.runs.recorder.SNAPSHOT_GROWTH", 1)
    agent = Fenceable()
    async with fenceable(monkeypatch, agent) as (host, bus, claimed):
        bus.holds_snapshots = True
        run = await host.start()
        await bus.refused.wait()
        assert await claimed(run) in (["run_queued", "run_start"], ["run_queued"])


async def test_a_run_that_waits_for_the_history_of_its_thread_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = Fenceable()
    async with fenceable(monkeypatch, agent) as (host, bus, claimed):
        bus.no_list = True
        run = await host.start(thread="t")
        await bus.refused.wait()
        assert await claimed(run) == ["run_queued", "run_start"]
        assert not agent.here.is_set()


async def test_an_agent_in_its_grace_after_a_cancellation_writes_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = Fenceable(deaf=True)
    async with fenceable(monkeypatch, agent) as (host, _, claimed):
        run = await host.start()
        await agent.here.wait()
        await host.runs.cancel("ann", run, None)
        names = await claimed(run)
        assert names[:3] == ["run_queued", "run_start", "cancel_requested"]
        assert not {"run_cancelled", "run_error"} & set(names)


async def test_a_run_that_the_bus_wants_verified_is_let_go_if_it_is_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentcast.server.runs.ownership.CHECK_EVERY", 1_000.0)
    agent = Fenceable()
    async with hosting(Scripted(agent), cancel_grace=0.1) as host:
        run = await host.start()
        await agent.here.wait()
        await host.bus.claim(run)
        await host.bus.send_command(run, {"op": "verify"})
        with anyio.fail_after(5):
            while host.runs.active:
                await checkpoint()
        assert await host.names(run) == ["run_queued", "run_start"]
        assert agent.cleaned


async def test_a_run_taken_over_by_another_process_finds_out_by_its_next_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentcast.server.runs.ownership.CHECK_EVERY", 1_000.0)
    talk, cleaned = anyio.Event(), anyio.Event()

    async def talker(task: Task, emit: Emitter) -> None:
        await talk.wait()
        await emit.send(Status(message="x"))
        try:
            await anyio.sleep_forever()
        finally:
            await checkpoint()
            cleaned.set()

    async with hosting(Scripted(talker)) as host:
        run = await host.start()
        await host.until_head(run, 2)
        await host.bus.claim(run)
        talk.set()
        while host.runs.active:
            await checkpoint()

        assert await host.names(run) == ["run_queued", "run_start"]
        assert cleaned.is_set()


# -- Threads -------------------------------------------------------------------------------------------------------


async def test_agent_is_given_the_finished_turns_of_its_thread_oldest_first() -> None:
    seen: dict[int, list[tuple[Any, Any]]] = {}

    async def remember(task: Task, emit: Emitter) -> Any:
        number = task.input.number  # type: ignore[attr-defined]
        seen[number] = [(turn.input["number"], turn.result) for turn in task.history]
        if number == 3:
            raise ValueError("no")
        return f"answer {number}"

    async with hosting(Scripted(remember), Scripted(remember, name="other")) as host:
        for number, fields in enumerate(
            [
                {"thread": "t"},
                {"thread": "t", "principal": "bob"},
                {"thread": "t", "agent": "other"},
                {"thread": "t"},  # fails
                {"thread": "elsewhere"},
                {},
                {"thread": "t"},
            ]
        ):
            await host.end(await host.start(input={"number": number}, **fields))

    assert seen[6] == [(0, "answer 0"), (2, "answer 2")]
    assert seen[1] == seen[4] == seen[5] == []


async def test_history_waits_for_a_bus_that_is_away() -> None:
    bus = AwayBus()
    async with hosting(Scripted(echo), bus=bus) as host:
        bus.no_list = True
        run = await host.start(thread="t")
        with anyio.fail_after(5.0):
            await bus.refused.wait()
        bus.no_list = False

        assert (await host.end(run))["event"] == "run_end"


class EndsBus(MemoryBus):
    """Gives the ends of runs as `ends` changes them; counts the states that are read."""

    def __init__(self, ends: Callable[[Ends], Ends | None]) -> None:
        super().__init__()
        self.loads = 0
        self._change = ends

    async def read_ends(self, runs: Collection[str]) -> dict[str, Ends]:
        known = await super().read_ends(runs)
        return {run: changed for run, ends in known.items() if (changed := self._change(ends)) is not None}

    async def load_snapshot(self, run: str) -> Snapshot | None:
        self.loads += 1
        return await super().load_snapshot(run)


@pytest.mark.parametrize(
    ("change", "turns", "loads"),
    [
        pytest.param(lambda ends: ends, 2, 0, id="known"),
        pytest.param(lambda ends: Ends(None, ends.last), 2, 2, id="first event lost"),
        pytest.param(lambda ends: Ends(ends.first, None), 2, 2, id="last event lost"),
        pytest.param(lambda ends: None, 0, 0, id="forgotten"),
    ],
)
async def test_earlier_turns_are_read_without_their_states_unless_an_event_is_lost(
    change: Callable[[Ends], Ends | None], turns: int, loads: int
) -> None:
    seen: list[Sequence[Turn]] = []

    async def remember(task: Task, emit: Emitter) -> Any:
        seen.append(task.history)
        return {"answer": len(seen)}

    bus = EndsBus(change)
    async with hosting(Scripted(remember), bus=bus) as host:
        for number in range(3):
            bus.loads = 0
            await host.end(await host.start(input={"number": number}, thread="t"))
        loaded = bus.loads

    expected = [Turn(input={"number": number}, result={"answer": number + 1}) for number in range(turns)]
    assert len(seen) == 3
    assert list(seen[-1]) == expected
    assert loaded == loads


# -- Stopping ------------------------------------------------------------------------------------------------------


async def test_stopping_lets_running_agents_finish() -> None:
    held = Held()
    async with hosting(Scripted(held, max_concurrent=1), grace=5.0) as host:
        running, queued = await host.start(), await host.start()
        await held.until_started()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(host.runs.stop)
            assert (await host.end(queued))["error"]["code"] == "shutting_down"
            with pytest.raises(Unavailable, match="shutting down"):
                await host.start()
            assert host.runs.active == 1
            held.go.set()

        assert (await host.end(running))["event"] == "run_end"
        assert held.started == [running]


async def test_stopping_ends_agents_that_take_too_long() -> None:
    async with hosting(Scripted(forever), grace=0.01) as host:
        runs = [await host.start() for _ in range(3)]
        await host.runs.stop()

        for run in runs:
            end = await host.end(run)
            assert end["error"]["code"] == "shutting_down"
            assert end["error"]["retryable"] is True


async def test_stopping_publishes_the_last_summary_of_each_run() -> None:
    held, bus = Held(), MemoryBus()
    async with hosting(Scripted(held), bus=bus) as host:
        run = await host.start()
        await held.until_started()
        while not (first := await bus.summaries([run])):
            await checkpoint()
        assert first[run].status in ("queued", "running")

    assert (await bus.summaries([run]))[run].status == (await bus.info([run]))[run].status == "failed"


async def test_stopping_an_idle_host_returns_at_once() -> None:
    async with hosting(Scripted(echo)) as host:
        await host.runs.stop()
        await host.runs.stop()


@pytest.mark.parametrize("stuck", [False, True])
async def test_stopping_waits_for_the_last_snapshots_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, stuck: bool
) -> None:
    monkeypatch.setattr("agentcast.server.runs.runs.SAVING", 0.2)
    bus = StuckBus()
    async with hosting(Scripted(forever), bus=bus) as host:
        run = await host.start()
        await host.until_head(run, 2)
        bus.holds_snapshots = stuck
        await host.runs.stop()
        assert await host.names(run) == ["run_queued", "run_start", "run_error"]
        assert (await bus.load_snapshot(run) is None) is stuck
