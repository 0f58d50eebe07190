"""What was read, as sentences with their place, and those of them that answer a question, word for word."""

import itertools
import re
from collections.abc import Iterable
from typing import NamedTuple

from agentcast.agents.words import Index

MAX_TEXT, MAX_QUOTE, MAX_QUOTES, MAX_SENTENCES = 20_000, 400, 3, 300
ENOUGH = 0.75  # of a question's words must stand in a sentence, its heading and the sentences next to it

_PLACE = re.compile(r"^(\w[\w./ -]*\.\w{1,8}):(\d+)(?:-\d+)?(?: \((.*)\))?\n", re.M)
_SKIPPED = re.compile(
    r"^ *(```|~~~)(?s:.*?)(?:^ *\1|\Z)|^#{1,6} .*|^ *\|.*|^\w+: \S+$|^.+\n[=~-]{3,}$|^.*\[\[ ##.*", re.M
)
"""Code, headings, tables, values such as "Severity: high", and what would tear a reply apart."""
_END = r"\n\s*\n|\n\s*(?:[-*+•>]|\d+[.)] )|(?<=[.!?])[\"')*_]*\s+[\"'(*_“`]*[A-Z0-9]"
_SENTENCE = re.compile(rf"\S(?:(?!{_END}).)*[\"')*_]*", re.S)
_NO_SENTENCE = re.compile(r"\W*$|.*\?$", re.S)
_BULLET = re.compile(r"^(?:[-*+•>] +|\d+[.)] +)+")
_NEEDED = re.compile(r"not|no|never|none|nothing|nobody|neither|nor|cannot|without|except|unless|.+n['’]t|.*\d.*", re.I)
_MUST_HAVE = {
    re.compile(r"\bhow many (\w{1,4})", re.I): r"[0-9][0-9,.]* (?:[^ ]+ ){0,2}\1",
    re.compile(r"\bwhy\b", re.I): "(?:because|since|so|therefore|otherwise) ",
    re.compile(r"\bhow (?:much|long|often|far|old|big|large|high|fast|tall|heavy)\b", re.I): "[0-9]",
}


class Sentence(NamedTuple):
    """A sentence, list item or table row; `line` of `file`, if it stands in one; `around` it: its neighbours."""

    text: str
    file: str
    line: int
    around: str


def sentences(text: str) -> list[Sentence]:
    """The sentences of `text`; lines in it such as "guide.md:12 (Start)" say where the next ones stand."""
    text = _SKIPPED.sub(lambda part: "\n" * part[0].count("\n"), text[:MAX_TEXT])
    found = []
    for place, after in itertools.pairwise([None, *_PLACE.finditer(text), None]):
        file, line, heading = place.groups("") if place else ("", "0", "")
        begin, end = place.end() if place else 0, after.start() if after else len(text)
        matches = [part for part in _SENTENCE.finditer(text, begin, end) if not _NO_SENTENCE.match(part[0])]
        parts = [_BULLET.sub("", " ".join(part[0].split()))[:MAX_QUOTE] for part in matches]
        for at, part in enumerate(matches):
            around = " ".join([heading, *parts[max(0, at - 1) : at + 2]])
            found.append(Sentence(parts[at], file, int(line) + text.count("\n", begin, part.start()), around))
    return found


def quotes(words: list[str], question: str, read: Iterable[Sentence]) -> list[Sentence]:
    """The sentences that answer `question`, the best first. Better none than one about something else: it must have
    most of its `words`, half of them and all negations and numbers itself, and a number if one is asked for."""
    needed = [match.expand(form) for asked, form in _MUST_HAVE.items() if (match := asked.search(question))]
    kept = list({item.text: item for item in read}.values())[:MAX_SENTENCES]
    texts = [item.text if len(words) > 1 else " ".join(item.text.split()[:2]) for item in kept]
    index = Index(zip(texts, (item.around for item in kept), strict=True))
    own = {word: set(index.search([word], "body")) for word in words}
    near = {word: set(index.search([word])) for word in words}
    counts = {at: sum(at in own[word] for word in words) for at in index.search(words, "body")}
    return [
        kept[at]
        for at, count in counts.items()
        if count == max(counts.values()) >= len(words) / 2
        and sum(at in near[word] for word in words) >= ENOUGH * len(words)
        and all(at in own[word] for word in words if _NEEDED.fullmatch(word))
        and all(re.search(form, kept[at].text, re.I) for form in needed)
    ][:MAX_QUOTES]
