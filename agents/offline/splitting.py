"""A question in parts: the offline model's part in planning.

By rules: its sentences, and what "and" and commas join; or, if it is but one thing that is asked, its words one by
one. Every part is made of the question's own words.
"""

import itertools
import re
from collections.abc import Iterator

from agentcast.agents.arithmetic import find_sums
from agentcast.agents.words import keywords

MAX_TOPIC = 3
"""Words that tell a part what "it" or "them" means."""

_SENTENCE_END = re.compile(r"(?<=[?!;])\s+|(?<=[a-z)]\.)\s+(?=[A-Z])|\n+")
_JOINT = re.compile(r",?\s+(?:and|or|as well as)\s+(?:also\s+)?|,\s+", re.I)
_OPENING = re.compile(
    r"(?:how|what|when|where|which|who|whom|whose|why|is|are|was|were|do|does|did|has|have|can|could|may|must|should"
    r"|will|would)\b",
    re.I,
)
_VERB = re.compile(r"\b(?:is|are|was|were|does|do|did|has|have|can|could|may|must|should|will|would)\b", re.I)
_PRONOUN = re.compile(r"\b(?:it|its|they|them|their)\b", re.I)
_ARTICLES = {"a", "an", "the", "some", "any"}


def split_question(question: str, count: int) -> list[str]:
    """Up to `count` questions, at least one, that together ask for what `question` asks."""
    found = _sentences(question)
    at = 0
    while at < len(found) < count:
        halves = None if find_sums(found[at]) else _halves(found[at])
        if halves is None:
            at += 1
        else:
            found[at : at + 1] = halves
    if len(found) > count:
        found[count - 1 :] = [" ".join(found[count - 1 :])]
    return found if len(found) > 1 else [*found, *_aspects(found[0])][:count]


def _sentences(question: str) -> list[str]:
    found: list[str] = []
    for sentence in _SENTENCE_END.split(question.strip()):
        if keywords(sentence) or not found:
            found.append(_asked(sentence))
        else:  # "Why?" says nothing by itself
            found[-1] += f" {sentence}"
    return found


def _halves(text: str) -> tuple[str, str] | None:
    """`text` parted where a joint has something to ask for on both sides."""
    for joint in _JOINT.finditer(text):
        left, right = text[: joint.start()], text[joint.end() :]
        if _says_something(left) and _says_something(right):
            return _asked(left), _asked(_completed(left, right))
    return None


def _says_something(text: str) -> bool:
    return any(not word[0].isdigit() for word in keywords(text))


def _completed(left: str, right: str) -> str:
    """`right` as it would be said without `left` before it."""
    if _OPENING.match(right):
        topic = " ".join(keywords(left)[-MAX_TOPIC:])
        return f"{right.rstrip(' .?!')} ({topic})" if _PRONOUN.search(right) else right
    words = left.split()
    if _VERB.search(right):  # a clause of its own: only how the question opens is missing
        words = list(itertools.takewhile(lambda word: not keywords(word), words))
    missing = len(keywords(_JOINT.split(right, maxsplit=1)[0]))
    while words and missing > 0 and keywords(" ".join(words)):
        missing -= len(keywords(words.pop()))
    while words and words[-1].lower() in _ARTICLES:
        words.pop()
    return " ".join([*words, right])


def _aspects(question: str) -> Iterator[str]:
    """Questions of the single words of one that has several; the longest, which tend to say most, first."""
    words = [word for word in keywords(question) if not word[0].isdigit()]
    if len(words) > 1:
        for word in sorted(words, key=len, reverse=True):
            yield f"What about {word}?"


def _asked(text: str) -> str:
    text = text.strip().rstrip(" ,;.?!")
    return f"{text[:1].upper()}{text[1:]}?" if text else text
