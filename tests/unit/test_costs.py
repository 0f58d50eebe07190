"""Whose turn it is (G11): budgets of accounts and of the loop's turns, and who is let go first."""

from collections.abc import Callable
from itertools import pairwise

import anyio
import pytest
from anyio import wait_all_tasks_blocked
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from agentcast.server.edge import costs
from agentcast.server.edge.costs import (
    JOIN,
    LONGEST_DEBT,
    PER_SECOND,
    PER_TURN,
    SAVED,
    START,
    Account,
    Costs,
    Line,
    doing,
    reading,
)
from agentcast.server.errors import TooMany
from agentcast.server.protocol import Position, Start, Subscribe, To, Unsubscribe


class Clock:
    """A line whose time stands still until it is moved."""

    def __init__(self) -> None:
        self.line = Line()
        self.now = 100.0
        self.went: list[str] = []

    def ask(self, account: Account, price: int, name: str = "") -> bool:
        def go() -> None:
            self.line.went(account)
            self.went.append(name)

        return self.line.ask(account, price, go, self.now)

    def turn(self) -> list[str]:
        """Who is let go in the next turn."""
        self.went = []
        self.line.begin_turn(self.now)
        return self.went

    def until(self, true: Callable[[], bool]) -> float:
        """Take the turns that are due until something is so; the seconds that it took."""
        start = self.now
        while not true():
            due = self.line.due(self.now)
            assert due is not None, "nobody waits"
            self.now += due
            self.line.begin_turn(self.now)
        return self.now - start


def test_a_command_goes_at_once_while_there_is_budget() -> None:
    assert Clock().ask(Account(), 10)


def test_an_account_may_spend_what_it_has_saved_and_then_waits_for_what_accrues() -> None:
    clock, account = Clock(), Account()
    clock.line.charge(account, SAVED + PER_SECOND // 2, clock.now)
    clock.turn()
    assert not clock.ask(account, 1, "late")
    assert clock.until(lambda: clock.went == ["late"]) == pytest.approx(0.5)


def test_who_is_in_debt_delays_nobody_else() -> None:
    clock, debtor = Clock(), Account()
    clock.line.charge(debtor, SAVED * 2, clock.now)
    clock.turn()
    assert not clock.ask(debtor, 1)
    assert clock.ask(Account(), 1)


def test_no_debt_lasts_longer_than_its_bound() -> None:
    clock, account = Clock(), Account()
    clock.line.charge(account, 10**9, clock.now)
    assert account.delay(clock.now) == pytest.approx(LONGEST_DEBT)


def test_no_more_is_saved_up_than_fits() -> None:
    clock, account = Clock(), Account()
    clock.now += 1e6
    clock.line.charge(account, SAVED + 1, clock.now)
    assert account.delay(clock.now) > 0


def test_a_turn_begins_only_so_much_work() -> None:
    clock, accounts = Clock(), [Account() for _ in range(10)]
    assert clock.ask(accounts[0], PER_TURN)
    assert [clock.ask(account, PER_TURN // 2, str(n)) for n, account in enumerate(accounts[1:5])] == [False] * 4
    assert clock.turn() == ["0", "1"]
    assert clock.turn() == ["2", "3"]
    assert clock.turn() == []
    assert clock.line.due(clock.now) is None


def test_who_was_served_least_is_first() -> None:
    clock, greedy, modest = Clock(), Account(), Account()
    assert clock.ask(greedy, PER_TURN)
    for number in range(3):
        assert not clock.ask(greedy, PER_TURN, f"greedy {number}")
    assert not clock.ask(modest, 5, "modest")
    assert clock.turn() == ["modest", "greedy 0"]
    assert not clock.ask(modest, 5, "modest again")
    assert clock.turn() == ["modest again", "greedy 1"]


def test_who_was_idle_has_no_credit_for_it() -> None:
    clock, old, new = Clock(), Account(), Account()
    for _ in range(20):
        clock.turn()
        assert clock.ask(old, PER_TURN)
    for account, name in ((old, "old"), (new, "new")):
        for _ in range(4):
            assert not clock.ask(account, PER_TURN, name)
    assert [clock.turn() for _ in range(4)] == [["old"], ["new"], ["old"], ["new"]]


def test_commands_of_one_account_go_in_order() -> None:
    clock, account = Clock(), Account()
    assert clock.ask(account, PER_TURN)
    for name in "abc":
        assert not clock.ask(account, PER_TURN if name == "a" else 1, name)
    assert clock.turn() == ["a"]
    assert not clock.ask(account, 1, "d")
    assert clock.turn() == ["b", "c", "d"]


def test_a_command_that_was_begun_goes_before_the_others_of_its_account() -> None:
    clock, account = Clock(), Account()
    assert clock.ask(account, PER_TURN)
    assert not clock.ask(account, 1, "next")
    assert not clock.line.ask(account, 1, lambda: clock.went.append("begun"), clock.now, ahead=True)
    assert clock.turn() == ["begun", "next"]


def test_a_command_does_not_overtake_one_that_was_let_go() -> None:
    line, account = Line(), Account()
    line.charge(account, PER_TURN, 0.0)
    assert not line.ask(account, 1, lambda: None, 0.0)
    line.begin_turn(0.0)
    line.begin_turn(0.0)
    assert not line.ask(account, 1, lambda: None, 0.0)
    line.went(account)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3_000)), max_size=60))
def test_everybody_is_let_go_once(asked: list[tuple[int, int]]) -> None:
    clock, accounts = Clock(), [Account() for _ in range(5)]
    at_once = [clock.ask(accounts[who], price, str(n)) for n, (who, price) in enumerate(asked)]
    clock.until(lambda: len(clock.went) + sum(at_once) == len(asked))
    waited = [str(n) for n, one in enumerate(at_once) if not one]
    assert sorted(clock.went) == sorted(waited)
    assert not any(account.waiting or account.in_line or account.going for account in accounts)


def test_a_small_command_waits_no_longer_however_many_large_ones_wait() -> None:
    clock, attackers, innocent = Clock(), [Account() for _ in range(500)], Account()
    for account in attackers:
        for _ in range(64):
            clock.ask(account, PER_TURN)
    for _ in range(50):
        clock.turn()
        assert not clock.ask(innocent, 5, "innocent")
        assert clock.turn()[0] == "innocent"


def test_what_commands_cost() -> None:
    unknown = {str(number): Position(seq=1) for number in range(5_000)}
    everything = Subscribe(op="subscribe", to=To(all=True), since=unknown)
    assert doing(everything) >= 5_000
    assert doing(Start(op="start", agent="a", input={})) == START
    assert reading(256 * 1024) > 200 * reading(10)
    assert PER_TURN / doing(Unsubscribe(op="unsubscribe", subscription="s1")) <= 10, "one may take 2 ms"


def test_what_is_legitimate_does_not_wait() -> None:
    assert 1_000 * (JOIN + 1) + 200 < SAVED / 2  # a dashboard that joins 1,000 runs, and goes on
    assert 500 * START <= SAVED


# -- On a loop -------------------------------------------------------------------------------------------------------


async def test_who_waits_for_too_long_is_refused_and_not_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "LONGEST_WAIT", 0.05)
    line, account = Costs(), Account()
    line.charge(account, SAVED + PER_SECOND)
    before = account.paid_until
    with anyio.fail_after(5), pytest.raises(TooMany, match="share of the hub"):
        await line.turn(account, 10)
    assert account.paid_until == before
    assert not account.waiting


async def test_turns_follow_each_other_while_somebody_waits() -> None:
    line, went = Costs(), []

    async def ask(number: int) -> None:
        await line.turn(Account(), PER_TURN)
        went.append(number)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(ask, number)
    assert went == [*range(20)]


async def test_others_have_the_loop_between_two_turns() -> None:
    line, seen = Costs(), []

    async def ask() -> None:
        await line.turn(Account(), PER_TURN)
        seen.append("command")

    async def other() -> None:
        while len(seen) < 30:
            seen.append("other")
            await checkpoint()

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(ask)
            tasks.start_soon(other)
    commands = [number for number, one in enumerate(seen) if one == "command"]
    assert all(later - earlier > 1 for earlier, later in pairwise(commands[1:]))


async def test_an_account_out_of_debt_goes_on_by_itself() -> None:
    line, account = Costs(), Account()
    line.charge(account, SAVED + PER_SECOND // 20)
    with anyio.fail_after(5):
        await line.turn(account, 1)


async def test_who_is_cancelled_while_it_waits_leaves_the_line() -> None:
    line, account = Costs(), Account()
    line.charge(account, SAVED + PER_SECOND)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(line.turn, account, 1)
        await wait_all_tasks_blocked()
        assert account.waiting
        tasks.cancel_scope.cancel()
    assert not account.waiting
