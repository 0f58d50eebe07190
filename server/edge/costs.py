"""What clients' commands cost the hub, and whose turn it is (G11).

Each connection has an account. A command waits for its turn with `Costs.turn` before it is even parsed, and is charged
with `Costs.charge` for what it turns out to do. Two budgets make it wait:

- the *account's*: units accrue with time, some can be saved up, and an account in debt waits until it is out of it;
- the *process's*: a turn of the loop begins only so much work. What waits goes in the order of what its account will
  have been served, so that a small command of one client does not wait for the large ones of many others.

Nothing is refused, until it has waited for `LONGEST_WAIT` seconds. Without a socket; `Line` is without I/O as well.
This module must not know how commands are done.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from time import monotonic

import anyio

from agentcast.server.errors import TooMany
from agentcast.server.protocol import Cancel, Command, List, Start, Subscribe, Unsubscribe

ACCOUNT = "agentcast.account"
"""Where a request has the account of its connection, among its scope's extensions."""

# A unit is about 10 µs of the loop: measured, in memory and over Redis, and rounded up.
COMMAND = 5
"""Any command or request, whatever it asks."""
BYTES = 256
"""Bytes that a unit reads, when they are parsed."""
REPLIED = 1_024
"""Bytes that a unit answers."""
LOOKUP = 3
"""A run that is looked up, or listed."""
JOIN = 10
"""A run that a subscription joins, with its snapshot."""
SUBSCRIBE = 50
"""An open-ended subscription, which asks for what is active."""
START = 100
CANCEL = 20
UNSUBSCRIBE = 100
"""It goes through all that the connection follows or is behind with."""

PER_SECOND = 10_000
"""Units that accrue to an account: a tenth of the loop, or 100 starts, or 900 joins."""
SAVED = 50_000
"""Units that an account can save up, and begins with: 4,500 joins at once, or 500 starts."""
PER_TURN = 1_000
"""Units that one turn of the loop begins."""
LONGEST_DEBT = 5.0
"""Seconds after which an account is out of debt, whatever it was charged."""
LONGEST_WAIT = 10.0
"""Seconds that a command may have to wait."""


def reading(size: int) -> int:
    """What it costs to read a command or request of `size` bytes."""
    return COMMAND + size // BYTES


def doing(command: Command) -> int:
    """What it costs to do a command, besides reading it and what a subscription joins."""
    match command:
        case Start():
            return START
        case Subscribe():
            return LOOKUP * len(command.since) + (SUBSCRIBE if command.to.named is None else 0)
        case List():
            return SUBSCRIBE + LOOKUP * command.limit
        case Cancel():
            return CANCEL
        case Unsubscribe():
            return UNSUBSCRIBE
        case _:
            return 0


Go = Callable[[], None]


class Account:
    """What one connection was charged."""

    __slots__ = ("going", "in_line", "paid_until", "served", "waiting")

    def __init__(self) -> None:
        self.paid_until = 0.0
        """When all that was charged will have accrued, if nothing had been saved up."""
        self.served = 0.0
        """Units that it was charged, and no less than its share of when it was idle."""
        self.waiting: deque[tuple[int, Go]] | None = None
        """Its commands that wait, in order: the price, and what to call when it is their turn."""
        self.in_line = False
        self.going = 0
        """Commands that were let go and have not gone on yet: none may overtake them."""

    def delay(self, now: float) -> float:
        """Seconds until it is out of debt."""
        delay = self.paid_until - SAVED / PER_SECOND - now
        return delay if delay > 1e-6 else 0.0  # less might be lost in the rounding of `now + delay`


class Line:
    """Which command is next. Without I/O: its owner calls `begin_turn` once in each turn of the loop in which something
    was asked or is `due`."""

    def __init__(self) -> None:
        self._left = PER_TURN
        self._share = 0.0
        """Units that an account would have been served that had always waited. One that was idle has no less."""
        self._indebted: list[tuple[float, int, Account]] = []
        """Heap of accounts that wait for their own budget."""
        self._ready: list[tuple[float, int, Account]] = []
        """Heap of accounts that wait for the process's, by what they will have been served after their next command
        (weighted fair queueing)."""
        self._entered = 0

    def ask(self, account: Account, price: int, go: Go, now: float, *, ahead: bool = False) -> bool:
        """Whether a command may go at once, and is charged; otherwise it waits, and `go` is called later: after the
        account's other commands, or, if it has begun already, `ahead` of them."""
        overtakes = not ahead and (account.going or account.waiting)
        if not (self._left <= 0 or self._ready or overtakes or account.delay(now)):
            self.charge(account, price, now)
            return True
        if account.waiting is None:
            account.waiting = deque()
        if ahead:
            account.waiting.appendleft((price, go))
        else:
            account.waiting.append((price, go))
        if not account.in_line:
            self._enter(account, now)
        return False

    def went(self, account: Account) -> None:
        """A command that was let go goes on."""
        account.going -= 1

    def withdraw(self, account: Account, price: int, go: Go) -> None:
        """A command that waits waits no longer."""
        if account.waiting is not None:
            account.waiting.remove((price, go))

    def charge(self, account: Account, units: int, now: float) -> None:
        """Charge for what is being done. Never waits: what comes next does."""
        paid_until = max(account.paid_until, now) + units / PER_SECOND
        account.paid_until = min(paid_until, now + SAVED / PER_SECOND + LONGEST_DEBT)
        account.served = max(account.served, self._share) + units
        self._share += units / (len(self._ready) + 1)
        self._left -= units

    @property
    def spent(self) -> bool:
        """Whether anything was begun in this turn."""
        return self._left < PER_TURN

    def due(self, now: float) -> float | None:
        """Seconds until a turn must begin for those who wait; None if nobody does."""
        if self._ready:
            return 0.0
        return max(self._indebted[0][0] - now, 0.0) if self._indebted else None

    def begin_turn(self, now: float) -> None:
        """Let go what this turn has room for."""
        self._left = PER_TURN
        while self._indebted and self._indebted[0][0] <= now:
            self._enter(heappop(self._indebted)[2], now)
        while self._ready and self._left > 0:
            _, _, account = heappop(self._ready)
            account.in_line = False
            if account.waiting and not account.delay(now):
                price, go = account.waiting.popleft()
                self.charge(account, price, now)
                account.going += 1
                go()
            if account.waiting:
                self._enter(account, now)

    def _enter(self, account: Account, now: float) -> None:
        account.in_line = True
        self._entered += 1
        if delay := account.delay(now):
            heappush(self._indebted, (now + delay, self._entered, account))
        else:
            price = account.waiting[0][0] if account.waiting else 0
            heappush(self._ready, (max(account.served, self._share) + price, self._entered, account))


class Costs:
    """The line of this process, on its event loop."""

    def __init__(self) -> None:
        self._line = Line()
        self._turn: asyncio.Handle | None = None
        """The beginning of the next turn, which is as soon as can be."""
        self._later: asyncio.TimerHandle | None = None
        """The same, for when an account is out of debt."""

    async def turn(self, account: Account, price: int, *, begun: bool = False) -> None:
        """Wait for the turn of a command or request, and charge its price. One that was `begun`, and turns out to cost
        more, goes before the others of its account.

        :raises TooMany: it has waited for `LONGEST_WAIT` seconds, and was not charged.
        """
        gone = anyio.Event()
        if self._line.ask(account, price, gone.set, monotonic(), ahead=begun):
            self._plan()
            return
        self._plan()
        try:
            with anyio.move_on_after(LONGEST_WAIT):
                await gone.wait()
        finally:
            if gone.is_set():
                self._line.went(account)
            else:
                self._line.withdraw(account, price, gone.set)
        if not gone.is_set():
            raise TooMany(
                f"this connection asks for more than its share of the hub: the command waited {LONGEST_WAIT:g} s for "
                "its turn and was not begun; send fewer or smaller ones, and wait for replies before the next"
            )

    def charge(self, account: Account, units: int) -> None:
        """Charge for what is being done: the next command waits for it. Less than nothing gives back what was paid."""
        self._line.charge(account, units, monotonic())
        self._plan()

    def _plan(self) -> None:
        """Have a turn begin when one must."""
        if self._turn is not None:
            return
        loop = asyncio.get_running_loop()
        due = 0.0 if self._line.spent else self._line.due(monotonic())
        if due == 0.0:
            self._turn = loop.call_soon(self._begin)
        elif due is not None:
            if self._later is not None:
                self._later.cancel()
            self._later = loop.call_later(due, self._begin)

    def _begin(self) -> None:
        self._turn = None
        self._line.begin_turn(monotonic())
        self._plan()
