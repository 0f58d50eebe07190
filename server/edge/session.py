"""One client's commands: each gets exactly one reply (G9). Without a socket: text comes in, frames go to the outbox.

All rights are asked of one function, `authorize`.
"""

import logging
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from time import monotonic
from typing import Any, Protocol, assert_never

from agentcast.server import protocol
from agentcast.server.bus.base import Filter
from agentcast.server.edge.costs import JOIN, LOOKUP, REPLIED, Account, Costs, doing, reading
from agentcast.server.errors import PROTOCOL_ERROR, CloseReason, CommandError, NotFound, TooMany
from agentcast.server.hub.hub import Hub
from agentcast.server.hub.outbox import MAX_FOLLOWED, Outbox
from agentcast.server.protocol import (
    AnyDetail,
    Cancel,
    Command,
    List,
    Malformed,
    Ping,
    Position,
    Start,
    Subscribe,
    To,
    Unsubscribe,
)
from agentcast.server.runs.runs import Runs

ANONYMOUS = "anonymous"

logger = logging.getLogger(__name__)


def authorize(principal: str, op: str) -> None:
    """Whether `principal` may do `op`. Everybody is anonymous so far, and sees and may do everything.

    :raises Forbidden: it may not.
    """


class Join(Protocol):
    """A subscription that adds no frame yet: reply with `result`, then `commit`, without an await in between."""

    result: dict[str, Any]

    def commit(self) -> None: ...


def filter_of(principal: str, command: List) -> Filter:
    """What the bus is asked for a page of the list that `principal` may see."""
    return Filter(
        principal=principal,
        agent=command.agent,
        thread=command.thread,
        statuses=None if command.status is None else frozenset(command.status),
        order=command.order,
        before=command.after,
        limit=command.limit,
    )


class InternalError(CommandError):
    """Something of ours broke. The log has the details; clients get none."""


class Session:
    """The commands of one connection. `handle` may run many at once; replies may come in another order."""

    def __init__(self, id: str, principal: str, hub: Hub, runs: Runs, outbox: Outbox, costs: Costs) -> None:
        self.id = id
        self.principal = principal
        self._hub = hub
        self._runs = runs
        self._outbox = outbox
        self._costs = costs
        self._account = Account()
        self._subscriptions = 0
        self._malformed: deque[float] = deque(maxlen=protocol.PROTOCOL_ERRORS_PER_MINUTE)

    async def handle(self, text: str) -> CloseReason | None:
        """Do what one message asks and queue the reply. Gives a reason to close the connection, if there is one."""
        try:
            await self._costs.turn(self._account, reading(len(text)))
        except TooMany as error:
            self._outbox.put(protocol.error_reply(protocol.find_id(text), error))
            return None
        try:
            command = protocol.parse_command(text)
        except Malformed as malformed:
            self._outbox.put(protocol.error_reply(malformed.id, malformed.error))
            return self._count_malformed()
        try:
            authorize(self.principal, command.op)
            self._costs.charge(self._account, doing(command))
            await self._do(command)
        except CommandError as error:
            self._outbox.put(protocol.error_reply(command.id, error))
        except Exception:
            logger.exception("session %s: %s failed", self.id, command.op)
            self._outbox.put(protocol.error_reply(command.id, InternalError("something went wrong in the hub")))
        return None

    async def _do(self, command: Command) -> None:
        match command:
            case Start():
                await self._start(command)
            case Subscribe():
                await self._subscribe(command)
            case Unsubscribe():
                if command.subscription not in self._outbox.subscriptions:
                    raise NotFound(f"this connection has no subscription {command.subscription[:64]!r}")
                self._hub.leave(self._outbox, command.subscription)
                self._reply(command, {})
            case List():
                await self._list(command)
            case Cancel():
                await self._runs.cancel(self.principal, command.run, command.reason)
                self._reply(command, {})
            case Ping():
                self._reply(command, {})
            case _:
                assert_never(command)

    async def _start(self, command: Start) -> None:
        if not command.subscribe:
            created = await self._runs.start(self.principal, command, self._account)
            self._reply(command, {"run": created.run, "epoch": created.epoch})
            return
        subscription = self._new_subscription()
        self._outbox.subscribe(subscription, single=True)  # before the run: a start that is refused starts nothing
        try:
            created = await self._runs.start(self.principal, command, self._account)
        except BaseException:
            self._hub.leave(self._outbox, subscription)
            raise
        result = {"run": created.run, "epoch": created.epoch, "subscription": subscription}
        if subscription not in self._outbox.subscriptions:  # ended meanwhile, by its name or with the connection
            self._reply(command, result)
            return
        to, since = To(run=created.run), {created.run: Position(seq=0)}
        async with self._join(subscription, to, command.detail, since) as join:
            # It may follow as many runs as it may: then there is no subscription, and `truncated` says so.
            result = {name: join.result[name] for name in ("subscription", "truncated") if name in join.result}
            self._reply(command, {"run": created.run, "epoch": created.epoch, **result})
            join.commit()

    async def _subscribe(self, command: Subscribe) -> None:
        # What it will join is known afterwards only; about so many may be active.
        many = command.to.all is not None or command.to.agent is not None
        expected = max(self._runs.active, len(self._hub.topics)) if many else len(command.to.named or (None,))
        if command.detail == "summary":
            price = LOOKUP * expected
        else:  # no more than it may owe at once: what it does not join is given back, and must have been paid
            expected = min(expected, MAX_FOLLOWED)
            price = JOIN * expected
        await self._costs.turn(self._account, price, begun=True)
        subscription = self._new_subscription()
        async with self._join(subscription, command.to, command.detail, command.since, command.feed) as join:
            self._reply(command, join.result)
            join.commit()
        if command.detail != "summary":
            self._costs.charge(self._account, JOIN * (len(join.result["runs"]) - expected))

    def _join(
        self,
        subscription: str,
        to: To,
        detail: AnyDetail,
        since: Mapping[str, Position],
        feed: str | None = None,
    ) -> AbstractAsyncContextManager[Join]:
        if detail == "summary":
            return self._hub.summaries.join(self._outbox, subscription, self.principal, to)
        return self._hub.join(self._outbox, subscription, self.principal, to, detail, since, feed)

    async def _list(self, command: List) -> None:
        filter = filter_of(self.principal, command)
        if not command.subscribe:
            self._reply(command, await self._hub.lists.read(filter))
            return
        async with self._hub.lists.join(self._outbox, self._new_subscription(), filter) as join:
            self._reply(command, join.result)
            join.commit()

    def _new_subscription(self) -> str:
        self._subscriptions += 1
        return f"s{self._subscriptions}"

    def _reply(self, command: Command, result: dict[str, Any]) -> None:
        frame = protocol.reply(command.id, result)
        self._costs.charge(self._account, len(frame) // REPLIED)
        self._outbox.put(frame)

    def _count_malformed(self) -> CloseReason | None:
        now = monotonic()
        full = len(self._malformed) == self._malformed.maxlen
        oldest = self._malformed[0] if full else None
        self._malformed.append(now)
        return PROTOCOL_ERROR if oldest is not None and now - oldest < 60 else None
