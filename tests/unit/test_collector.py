"""A long collection is followed by short ones, and what was frozen is looked through again once its runs have ended."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from agentcast.server.cli import collector as module
from agentcast.server.cli.collector import THAW_AFTER, Collector


class Hub:
    """How many runs a hub has, and has had."""

    def __init__(self) -> None:
        self.active = self.ended = 0
        self.collector = Collector(lambda: self.active, lambda: self.ended)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(module, "LONG", 0.0)
    hub = Hub()
    gc.callbacks.append(hub.collector.after_collection)
    try:
        yield hub
    finally:
        gc.callbacks.remove(hub.collector.after_collection)
        gc.collect()
        gc.freeze()  # as for the whole suite


class Node:
    """Part of a cycle: only the collector finds it."""

    def __init__(self) -> None:
        self.itself = self


def is_tracked(thing: object) -> bool:
    """Whether a full collection goes through it."""
    return any(one is thing for one in gc.get_objects())


def test_what_survives_a_long_collection_is_not_gone_through_again(hub: Hub) -> None:
    alive = Node()
    assert is_tracked(alive)

    gc.collect()

    assert not is_tracked(alive)


def test_a_short_collection_freezes_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG", 60.0)
    alive = Node()

    gc.collect()

    assert is_tracked(alive)


def test_collections_of_the_young_freeze_nothing(hub: Hub) -> None:
    alive = Node()

    gc.collect(0)
    gc.collect(1)

    assert is_tracked(alive)


def test_nothing_is_collected_at_a_tick_while_all_collections_are_short(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONG", 60.0)
    alive = Node()

    hub.collector.collect()

    assert is_tracked(alive)


def test_after_a_long_collection_what_is_young_is_collected_and_frozen_at_each_tick(hub: Hub) -> None:
    gc.collect()
    alive, dead = Node(), Node()
    seen = weakref.ref(dead)
    del dead

    hub.collector.collect()

    assert not is_tracked(alive)
    assert seen() is None


@pytest.mark.parametrize("change", ["many have ended", "few are active"])
def test_frozen_cycles_are_found_once_the_runs_of_then_have_ended(hub: Hub, change: str) -> None:
    hub.active = 100
    node = Node()
    seen = weakref.ref(node)
    gc.collect()
    del node
    hub.collector.collect()
    assert seen() is not None, "frozen, it is not found"

    if change == "many have ended":
        hub.ended = THAW_AFTER
    else:
        hub.active = 24
    hub.collector.collect()

    assert seen() is None


def test_after_a_thaw_counting_starts_over(hub: Hub) -> None:
    gc.collect()
    hub.ended = THAW_AFTER
    hub.collector.collect()  # thaws, and freezes again
    node = Node()
    seen = weakref.ref(node)
    gc.collect()
    del node

    hub.collector.collect()

    assert seen() is not None
