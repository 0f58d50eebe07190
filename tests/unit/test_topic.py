"""What a hub holds of a run's log when that is replaced (G1, G2)."""

from typing import Any

from agentcast.server.hub.outbox import Follower, Outbox
from agentcast.server.hub.topic import Topic


def test_a_log_that_replaces_an_ended_one_is_not_taken_for_ended() -> None:
    topic = Topic("r")
    topic.advance("one", 57, ended=True)
    assert topic.advance("two", 40, ended=False)
    assert (topic.epoch, topic.head, topic.ended) == ("two", 40, False)


def test_late_news_of_an_epoch_that_is_over_change_nothing() -> None:
    topic = Topic("r")
    topic.advance("one", 5, ended=False)
    topic.advance("two", 3, ended=False)
    assert not topic.advance("one", 6, ended=True)
    assert (topic.epoch, topic.head, topic.ended) == ("two", 3, False)


def test_a_follower_that_breaks_is_its_own_connections_end_and_the_others_learn_of_the_new_log() -> None:
    failed: list[Exception] = []
    topic = Topic("r")
    topic.advance("one", 5, ended=False)
    outboxes = [Outbox(_nothing, _nothing, _nothing, fail=failed.append) for _ in range(3)]
    for outbox in outboxes:
        outbox.subscribe("s", single=True)
        topic.followers[outbox.follow(Follower("r", "one", 5, wants={"s": "full"}))] = outbox
    setattr(outboxes[1], "lose", _broken)  # noqa: B010 -- a method of another type

    topic.advance("two", 3, ended=False)

    assert [str(error) for error in failed] == ["broken on purpose"]
    assert [outbox.followers["r"].resync for outbox in outboxes] == ["log_lost", None, "log_lost"]


def _nothing() -> None:
    pass


def _broken(*args: Any) -> None:
    raise RuntimeError("broken on purpose")
