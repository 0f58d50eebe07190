"""What a hub holds of a run's log when that is replaced (G1, G2)."""

from server.topics import Topic


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
