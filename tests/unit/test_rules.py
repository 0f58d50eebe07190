"""Open-ended subscriptions: which runs they cover, where in the feed they begin, and what a new run costs (G1, G2)."""

from typing import Any

import pytest

from agentcast.server.bus.base import Announcement
from agentcast.server.bus.memory import MemoryBus
from agentcast.server.errors import Unavailable
from agentcast.server.hub import rules as module
from agentcast.server.hub.feed_place import FeedPlace, FeedPosition
from agentcast.server.hub.rules import Arrival, FeedReader, Rule, Rules, keys_of
from agentcast.server.protocol import To
from tests.contract.support import new_run
from tests.support.following import Client


def a_rule(client: Client | None = None, *, name: str = "s", principal: str = "ann", **to: Any) -> Rule:
    return Rule(name, (client or Client()).outbox, principal, To(**to or {"all": True}), "full")


def announcement(n: int = 1, *, agent: str = "echo", thread: str | None = None, principal: str = "ann") -> Announcement:
    return Announcement(f"f:{n}", f"run{n}", "e", agent, thread, principal)


def arrival(n: int, **fields: Any) -> Arrival:
    return Arrival(announcement(n, **fields), f"f:{n - 1}", 1)


def begun(rules: Rules, rule: Rule) -> Rule:
    rules.add(rule, FeedPosition("f:0"))
    rules.begin(rule)
    return rule


# -- What a rule covers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "covered"),
    [
        ({"all": True}, {"plain", "of another agent", "in a thread"}),
        ({"agent": "echo"}, {"plain", "in a thread"}),
        ({"agent": "t"}, set()),
        ({"thread": "t"}, {"in a thread"}),
        ({"thread": "echo"}, set()),
    ],
)
def test_a_rule_covers_the_runs_that_it_asks_for_and_no_other_principals(to: Any, covered: set[str]) -> None:
    rules = Rules()
    rule = begun(rules, a_rule(**to))
    runs = {
        "plain": announcement(),
        "of another agent": announcement(agent="other"),
        "in a thread": announcement(thread="t"),
        "of another principal": announcement(thread="t", principal="bob"),
    }

    assert {name for name, run in runs.items() if rule.matches(run)} == covered
    assert {name for name, run in runs.items() if list(rules.covering(run)) == [rule]} == covered


def test_an_agent_or_thread_of_no_name_is_not_taken_for_everything() -> None:
    assert a_rule(agent="all").key != a_rule().key
    assert a_rule(agent="x").key != a_rule(thread="x").key
    assert len({*keys_of(announcement(agent="x", thread="x"))}) == 3


def test_rules_are_found_by_what_they_ask_for_until_they_are_removed() -> None:
    rules, clients = Rules(), [Client(), Client()]
    every, mine, other = (
        begun(rules, a_rule(clients[0], name="all")),
        begun(rules, a_rule(clients[0], name="mine", agent="echo")),
        begun(rules, a_rule(clients[1], name="all")),
    )
    assert list(rules.covering(announcement())) == [every, other, mine]

    rules.remove(clients[0].outbox, "all")
    rules.remove(clients[0].outbox, "all")
    rules.remove(clients[1].outbox, "mine")

    assert list(rules.covering(announcement())) == [other, mine]
    assert (every.left, other.left, len(rules)) == (True, False, 2)
    rules.remove(clients[0].outbox, "mine")
    rules.remove(clients[1].outbox, "all")
    assert (len(rules), rules._begun, rules._beginning) == (0, {}, {}), "nothing is left of them"


# -- Where it begins -----------------------------------------------------------------------------------------------


def test_a_rule_that_has_not_begun_covers_nothing_and_holds_the_position_back() -> None:
    rules, client = Rules(), Client()
    rule = a_rule(client)
    rules.add(rule, FeedPosition("f:0"))

    assert list(rules.covering(announcement())) == []
    assert rules.beginning == [rule]
    assert client.outbox.feed.next_position() is None

    rules.begin(rule)

    assert list(rules.covering(announcement())) == [rule]
    assert rules.beginning == []
    assert client.outbox.feed.next_position() == "f:0"


def test_what_was_announced_up_to_where_a_rule_begins_is_dropped_and_what_follows_is_its() -> None:
    rules, client = Rules(), Client()
    rule = a_rule(client, agent="echo")
    source = FeedPosition("f:0")
    rules.add(rule, source)
    rule.joined = "f:2"
    rule.backlog = [arrival(1), arrival(2), arrival(3, agent="other"), arrival(4), arrival(5)]
    source.position = "f:5"

    late = rules.begin(rule)

    assert [one.entry.run for one in late] == ["run4", "run5"]
    assert rule.backlog == []
    assert client.outbox.feed.next_position() == "f:3", "they are expected to be shown"


def test_where_the_feed_lacks_the_position_everything_is_applied() -> None:
    rules, rule = Rules(), a_rule()
    rules.add(rule, FeedPosition("f:0"))
    rule.joined, rule.backlog = "lost:7", [arrival(1), arrival(2)]

    assert [one.entry.run for one in rules.begin(rule)] == ["run1", "run2"]


def test_a_rule_that_is_removed_before_it_begins_holds_nothing_back() -> None:
    rules, client = Rules(), Client()
    rules.add(a_rule(client), FeedPosition("f:0"))

    rules.remove(client.outbox, "s")

    assert client.outbox.feed.next_position() == "f:0"
    assert (rules.beginning, len(rules)) == ([], 0)


# -- Reading the feed ----------------------------------------------------------------------------------------------


async def reader(rules: Rules, bus: MemoryBus | None = None) -> tuple[FeedReader, MemoryBus]:
    bus = bus or MemoryBus()
    feed = FeedReader(bus, rules)
    (await feed.watch(lambda _: None)).close()
    return feed, bus


def brought(read: list[tuple[Arrival, list[Rule]]]) -> list[tuple[str, list[Rule]]]:
    return [(one.entry.run, rules) for one, rules in read]


async def test_each_run_is_brought_once_with_the_rules_that_cover_it() -> None:
    rules = Rules()
    feed, bus = await reader(rules)
    every, one = begun(rules, a_rule()), begun(rules, a_rule(agent="one"))
    await bus.create(new_run("a", agent="one"))
    await bus.create(new_run("b", agent="two"))
    await bus.create(new_run("c", agent="one", principal="bob"))

    assert brought(await feed.read()) == [("a", [every, one]), ("b", [every])]
    assert await feed.read() == []


async def test_what_is_announced_while_a_rule_is_being_made_waits_for_it() -> None:
    rules = Rules()
    feed, bus = await reader(rules)
    rule = a_rule()
    rules.add(rule, feed.place)
    await bus.create(new_run("a"))
    rule.joined = await feed.end()
    await bus.create(new_run("b"))

    assert await feed.read() == []
    rule.ready = True

    assert brought(await feed.read()) == [("b", [rule])]


async def test_a_run_is_expected_to_be_shown_as_soon_as_it_was_read() -> None:
    rules, client = Rules(), Client()
    feed, bus = await reader(rules)
    begun(rules, a_rule(client))
    client.outbox.feed.source = feed.place
    start = client.outbox.feed.next_position()
    await bus.create(new_run("a"))

    await feed.read()

    assert client.outbox.feed.next_position() is None
    client.outbox.feed.applied("a")
    assert client.outbox.feed.next_position() not in (None, start)


async def test_a_read_that_fails_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    feed, bus = await reader(Rules())

    async def away(after: str) -> Any:
        raise Unavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(bus, "read_feed", away)
        with pytest.raises(Unavailable):
            await feed.read()
    assert (feed.place.begun, feed.place.handed_out) == (0, 0)

    await feed.read()
    assert (feed.place.begun, feed.place.handed_out) == (1, 1)


async def test_what_breaks_for_one_rule_is_its_own_connections_end_and_the_others_hear_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rules, victim = Rules(), Client()
    feed, bus = await reader(rules)
    begun(rules, a_rule(victim))
    other = begun(rules, a_rule())
    expect = FeedPlace.expect

    def expecting(place: FeedPlace, run: str, before: str) -> None:
        if place is victim.outbox.feed:
            raise RuntimeError("broken on purpose")
        expect(place, run, before)

    monkeypatch.setattr(FeedPlace, "expect", expecting)
    await bus.create(new_run("a"))

    assert brought(await feed.read()) == [("a", [other])]
    assert [str(error) for error in victim.link.failures] == ["broken on purpose"]


async def test_a_feed_that_was_trimmed_brings_the_active_runs() -> None:
    rules = Rules()
    feed, bus = await reader(rules, MemoryBus(feed_length=2))
    rule = begun(rules, a_rule())
    for run in "abcd":
        await bus.create(new_run(run))

    assert sorted(brought(await feed.read())) == [(run, [rule]) for run in "abcd"]
    assert await feed.read() == []


async def test_a_new_run_costs_the_rules_that_cover_it_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = Rules()
    feed, bus = await reader(rules)
    for n in range(5_000):
        begun(rules, a_rule(name=f"s{n}", agent=f"agent{n}"))
        begun(rules, a_rule(name=f"t{n}", thread=f"thread{n}"))
        begun(rules, a_rule(name=f"u{n}", principal=f"user{n}"))
    touched: list[Rule] = []

    class Watched:
        """Counts each look at a field of a rule."""

        def __init__(self, descriptor: Any) -> None:
            self.descriptor = descriptor

        def __get__(self, rule: Rule, owner: type) -> Any:
            touched.append(rule)
            return self.descriptor.__get__(rule, owner)

    for name in ("outbox", "key"):
        monkeypatch.setattr(Rule, name, Watched(Rule.__dict__[name]))
    await bus.create(new_run("a", agent="agent7", thread="thread9"))

    ((_, concerned),) = await feed.read()

    assert {rule.subscription for rule in concerned} == {"s7", "t9"}
    assert len(touched) <= 2 * len(concerned)
    assert set(touched) <= set(concerned)


async def test_a_run_that_concerns_many_rules_does_not_hold_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE", 3)
    turns: list[int] = []

    async def turn() -> None:
        turns.append(1)

    monkeypatch.setattr(module, "checkpoint", turn)
    rules = Rules()
    feed, bus = await reader(rules)
    for n in range(10):
        begun(rules, a_rule(name=f"s{n}"))
    for run in "abc":
        await bus.create(new_run(run))

    await feed.read()

    assert len(turns) == 3
