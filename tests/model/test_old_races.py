"""The model test finds old faults when they are put back: otherwise, that it passes says nothing (G1, G2).

The bus is as slow as helps to find the fault, and always answers. The search is the same each time.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from anyio.lowlevel import checkpoint
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

import tests.model.test_model
from agentcast.server.bus.base import Deliver, Opened
from agentcast.server.hub.catch_up import CatchUp
from agentcast.server.hub.feed_place import FeedPlace
from agentcast.server.hub.follower import Follower, State
from agentcast.server.hub.hub import Hub, Join
from agentcast.server.hub.rules import Rule, Rules
from agentcast.server.hub.topic import RunTopic
from tests.model.world import DawdlingBus, World

EXAMPLES = 1_500
"""Each fault is found within a few hundred."""
WITHOUT_FAULT = 60

Patch = pytest.MonkeyPatch
QUICK, SLOW_ANSWERS, LATE_FEED = {"most": 3, "feed": 3}, {"most": 60, "feed": 3}, {"most": 3, "feed": 300}


def frames_come_before_the_reply(patch: Patch) -> None:
    join, commit = Hub.join, Join.commit

    @asynccontextmanager
    async def joining(*arguments: Any, **options: Any) -> AsyncIterator[Join]:
        async with join(*arguments, **options) as made:
            commit(made)
            for _ in range(5):
                await checkpoint()
            yield made

    patch.setattr(Hub, "join", joining)
    patch.setattr(Join, "commit", lambda made: None)


def the_head_is_read_before_the_subscription_is_confirmed(patch: Patch) -> None:
    async def opening(bus: DawdlingBus, deliver: Mapping[str, Deliver]) -> dict[str, Opened]:
        opened: dict[str, Opened] = {}
        try:
            for run, info in (await bus.info(list(deliver))).items():
                opened[run] = Opened(info, await bus._subscribe(run, deliver[run]))
        except BaseException:
            for answer in opened.values():
                answer.subscription.close()
            raise
        return opened

    patch.setattr(DawdlingBus, "open", opening)


def a_late_page_is_sent_though_its_follower_has_moved_on(patch: Patch) -> None:
    async def pull_page(self: CatchUp, topic: RunTopic, follower: Follower) -> None:
        page = await self._read(topic.run, follower.epoch, follower.cursor)
        if page is None and follower.state is State.BEHIND:
            topic.lose(follower, "trimmed")
        for segment in page or ():
            follower.cursor, _ = follower.outbox.offer(segment, full=follower.full)
        topic.rest(follower)

    patch.setattr(CatchUp, "_pull_page", pull_page)


def what_was_announced_before_the_subscription_is_applied_to_it(patch: Patch) -> None:
    begin = Rules.begin

    def begin_with_everything(rules: Rules, rule: Rule) -> Any:
        rule.joined = None
        return begin(rules, rule)

    patch.setattr(Rules, "begin", begin_with_everything)


def what_was_shown_is_brought_again_by_its_late_announcement(patch: Patch) -> None:
    patch.setattr(FeedPlace, "place_of", lambda place, run, read: None)


FAULTS: dict[Callable[[Patch], None], dict[str, int]] = {
    frames_come_before_the_reply: QUICK,
    the_head_is_read_before_the_subscription_is_confirmed: SLOW_ANSWERS,
    a_late_page_is_sent_though_its_follower_has_moved_on: QUICK,
    what_was_announced_before_the_subscription_is_applied_to_it: LATE_FEED,
    what_was_shown_is_brought_again_by_its_late_announcement: LATE_FEED,
}


def search(patch: Patch, bus: dict[str, int], examples: int) -> None:
    """Run the model test on a bus like that."""
    model = tests.model.test_model
    patch.setattr(model, "World", lambda seed, **options: World(seed, **options | bus | {"flaky": False}))
    searching = settings(
        model.TestHub.settings,
        max_examples=examples,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        print_blob=False,
    )
    run_state_machine_as_test(model.Hub, settings=searching)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_that_is_put_back_is_found(fault: Callable[[Patch], None], monkeypatch: Patch) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        search(monkeypatch, FAULTS[fault], EXAMPLES)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bus", [QUICK, SLOW_ANSWERS, LATE_FEED], ids=["quick", "slow answers", "late feed"])
def test_without_a_fault_none_is_found(bus: dict[str, int], monkeypatch: Patch) -> None:
    search(monkeypatch, bus, WITHOUT_FAULT)
