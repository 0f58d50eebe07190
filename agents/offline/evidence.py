"""What was read, as passages with a source, and the verbatim pieces of it that bear on a question.

Nothing here is made up: a quote is a piece of the given text with its line breaks turned into spaces.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from agentcast.agents.words import keywords, stem, stems

MAX_CHARS = 60_000
"""Of one text, so much is read: ranking runs on the event loop."""
MAX_QUOTE = 320

_MARKER = "[[ ##"
"""What parts the fields of a reply: a quote that holds it would tear the reply apart."""

_HEADER = re.compile(
    r"^(?P<file>\w[\w./ -]*\.\w{1,8}):(?P<line>\d+)(?:[-–]\d+)?(?: \((?P<title>.*)\))?(?:: ?(?P<text>.*))?$"
)
_NEW_UNIT = re.compile(r"^\s*(?:[-*+•] |\d+[.)] |\||#|>|```|$)")
_TABLE_HEAD = re.compile(r"^\s*\|.*\n\s*\|[-:|\s]+$")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(*_]*(?:`|[A-Z0-9]))")
_SKIPPED = re.compile(r"^(?:```|~~~|#{1,6} |[-=|:\s]+$|\[\[ ##)")
_MARKUP = re.compile(r"^[\s>*+•#|\-]+|^\d+[.)] ")
_BULLET = re.compile(r"^(?:[-*+•>] +|\d+[.)] +)+")
_NOTHING = re.compile(
    r"^\W*(?:none|null|n/a)?\W*$|^\W*(?:sorry\W+)?(?:no|nothing|not|could not|cannot|couldn't|0)\b.{0,60}"
    r"\b(?:found|find|match(?:es|ed)?|results?|passages?|hits?|entries)\b|^tool \S+ failed",
    re.I | re.S,
)


@dataclass(frozen=True)
class Passage:
    source: str
    """A file's name, or what else the text came from."""
    text: str
    line: int | None = None
    """Line of the file at which the text starts, from 1."""
    title: str = ""


@dataclass(frozen=True)
class Quote:
    text: str
    source: str
    line: int | None
    score: float
    matched: frozenset[str]
    """Stems of the question that it holds."""

    @property
    def place(self) -> str:
        return self.source if self.line is None else f"{self.source}, line {self.line}"


def found_nothing(observation: str) -> bool:
    """Whether a tool's answer says that there is nothing, or that the tool failed."""
    return bool(_NOTHING.match(observation.strip()[:200]))


def passages(text: str, source: str) -> list[Passage]:
    """`text` parted at lines such as "guide.md:12 (Start)" or "guide.md:12: text"; what is before the first such line
    comes from `source`."""
    found: list[Passage] = []
    current = Passage(source, "")
    lines: list[str] = []
    for line in text[:MAX_CHARS].splitlines():
        if match := _HEADER.match(line):
            found.append(Passage(current.source, "\n".join(lines), current.line, current.title))
            starts = int(match["line"])
            current = Passage(match["file"], "", starts, match["title"] or "")
            lines = [match["text"]] if match["text"] else []
        else:
            lines.append(line)
    found.append(Passage(current.source, "\n".join(lines), current.line, current.title))
    return [passage for passage in found if passage.text.strip()]


def quotes(question: str, read: Iterable[Passage], limit: int = 3) -> list[Quote]:
    """Up to `limit` pieces of what was read that bear on `question` most, the best first; empty if none does."""
    wanted = {stem(word) for word in keywords(question)}
    pieces = _pieces(read)
    seen = Counter(term for piece in pieces for term in piece.terms & wanted)
    weight = {term: math.log(1 + len(pieces) / count) for term, count in seen.items()}
    ranked = sorted((_quote(piece, weight, question) for piece in pieces), key=lambda quote: -quote.score)
    chosen: list[Quote] = []
    for quote in ranked:
        if quote.score <= 0 or (chosen and quote.score < 0.5 * chosen[0].score) or len(chosen) == limit:
            break
        if not any(_same(quote.text, other.text) for other in chosen):
            chosen.append(quote)
    return chosen


def central(read: Sequence[Passage], limit: int = 2) -> list[Quote]:
    """The pieces whose words the whole text uses most, in the order of the text: a summary by extraction."""
    pieces = _pieces(read)
    counts = Counter(term for piece in pieces for term in piece.terms)
    scored = [
        (sum(counts[term] for term in piece.terms) / math.sqrt(8 + len(piece.terms)), at)
        for at, piece in enumerate(pieces)
        if len(piece.terms) >= 3 or len(pieces) <= limit
    ]
    best = sorted(at for _, at in sorted(scored, key=lambda item: (-item[0], item[1]))[:limit])
    chosen = (pieces[at] for at in best)
    return [Quote(_cut(piece.text), piece.passage.source, piece.line, 1.0, frozenset()) for piece in chosen]


def units(text: str) -> list[tuple[int, str]]:
    """The sentences, list items and table rows of `text`, each with the offset of its line, headings left out."""
    found: list[tuple[int, str]] = []
    block: list[str] = []
    start = 0
    lines = [*text.splitlines(), "", ""]
    for at, line in enumerate(lines[:-1]):
        if _TABLE_HEAD.match(f"{line}\n{lines[at + 1]}"):
            continue  # it names columns and says nothing itself
        if _NEW_UNIT.match(line) or (block and _SKIPPED.match(block[0])):
            found += _sentences(block, start)
            block, start = [], at
        if not block:
            start = at
        if line.strip():
            block.append(line)
    return found + _sentences(block, start)


def _units_of(passage: Passage) -> list[tuple[int, str]]:
    text = passage.text[:MAX_CHARS]
    if not passage.source.endswith(".py"):
        return units(text)
    return [(at, " ".join(line.split())) for at, line in enumerate(text.splitlines()) if line.strip()]


def _sentences(block: list[str], start: int) -> list[tuple[int, str]]:
    found = []
    position = 0
    text = "\n".join(block)
    ends = [match.end() for match in _SENTENCE_END.finditer(text)] + [len(text)]
    for end in ends:
        piece = text[position:end]
        line = start + text.count("\n", 0, position)
        position = end
        flat = " ".join(piece.split())
        if flat and not _SKIPPED.match(flat):
            found.append((line, flat))
    return found


@dataclass(frozen=True)
class _Piece:
    passage: Passage
    line: int | None
    text: str
    terms: frozenset[str]
    around: frozenset[str]
    """Terms of the sentences next to it and of its heading."""


def _pieces(read: Iterable[Passage]) -> list[_Piece]:
    pieces: list[_Piece] = []
    known: set[tuple[str, str]] = set()
    for passage in read:
        title = frozenset(stems(passage.title))
        found = [(at, text, frozenset(stems(text))) for at, text in _units_of(passage)]
        for index, (at, text, terms) in enumerate(found):
            near = found[max(0, index - 4) : index + 5]
            around = title.union(*(others for where, _, others in near if abs(where - at) <= 3))
            if (passage.source, text) not in known and _MARKER not in text:
                known.add((passage.source, text))
                line = None if passage.line is None else passage.line + at
                pieces.append(_Piece(passage, line, text, terms, around))
    return pieces


def _quote(piece: _Piece, weight: dict[str, float], question: str) -> Quote:
    """`piece` scored: by the terms of the question that it holds, the rare ones most, and by those next to it."""
    matched = frozenset(term for term in piece.terms if term in weight)
    score = _worth(matched, weight) + 0.6 * _worth(piece.around & weight.keys(), weight) if matched else 0.0
    if len(re.findall(r"\w+", piece.text)) < 4:
        score *= 0.4
    if piece.text.endswith("?"):
        score *= 0.5
    if _defines(piece.text, question):
        score *= 1.4
    return Quote(_cut(piece.text), piece.passage.source, piece.line, score, matched)


def _worth(terms: Collection[str], weight: dict[str, float]) -> float:
    return sum(weight[term] for term in terms) * (1 + 0.25 * (len(terms) - 1))


def _defines(text: str, question: str) -> bool:
    """Whether `text` opens with what "what is X" or "what does X do" asks about."""
    if not re.match(r"\s*(?:what|who|define)\b", question, re.I):
        return False
    opening = stems(_MARKUP.sub("", text)[:60])
    return bool(opening) and opening[0] in {stem(word) for word in keywords(question)}


def _same(one: str, other: str) -> bool:
    ours, theirs = set(one.lower().split()), set(other.lower().split())
    return len(ours & theirs) > 0.8 * min(len(ours), len(theirs))


def _cut(text: str) -> str:
    """`text`, or its start up to a word's end: still verbatim."""
    text = _BULLET.sub("", text.strip())
    return text if len(text) <= MAX_QUOTE else text[:MAX_QUOTE].rsplit(" ", 1)[0]
