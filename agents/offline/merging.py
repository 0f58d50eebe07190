"""Several findings put together, and a claim held against what was read. Nothing is added to either.

A finding is an object of a JSON list in the prompt: something that was asked, and what came of it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agentcast.agents.words import stems

_ASKED = re.compile(r"question|query|topic|title|task|name")
_TEXT = re.compile(r"answer|finding|result|text|summary|content|response|report")
_QUOTES = re.compile(r"quote|evidence|excerpt|citation")
_PROBLEM = re.compile(r"problem|error|failure")
_FILE = re.compile(r"file|source|document|path|url")
_MARKER = "[[ ##"
_PLACE = re.compile(r"\[([^\[\]:]+):(\d+)\]")
_QUOTED = re.compile(r"“([^”]+)”")

Finding = Mapping[str, Any]


def findings(value: str) -> list[Finding]:
    """The findings that `value` lists; empty if it is something else."""
    if not value.lstrip().startswith("["):
        return []
    try:
        items = json.loads(value)
    except (ValueError, RecursionError):
        return []
    return items if all(isinstance(item, dict) and _is_finding(item) for item in items) else []


def _is_finding(item: Finding) -> bool:
    return bool(_named(item, _ASKED)) and any(
        _TEXT.search(key) or _QUOTES.search(key) or _PROBLEM.search(key) for key in item
    )


def merged(found: Sequence[Finding], leave_out: str) -> list[str]:
    """A paragraph of text for each finding, under what was asked; what repeats an earlier one is told once.
    `leave_out` is cut from every text."""
    told: dict[str, int] = {}
    paragraphs = []
    for number, item in enumerate(found, start=1):
        pieces = _pieces(item, leave_out)
        new = [piece for piece in pieces if piece not in told]
        again = sorted({told[piece] for piece in pieces if piece in told})
        told |= dict.fromkeys(new, number)
        if again:
            new.append(f"(And what stands under {', '.join(map(str, again))}.)")
        title = _named(item, _ASKED).replace(_MARKER, "[[")
        paragraphs.append("\n".join([f"{number}. {title}", *new]))
    return paragraphs


def cited(found: Sequence[Finding], corrections: Mapping[str, str], asked: Iterable[str]) -> list[str]:
    """A paragraph for each question, those of `asked` first, of quotes that each name their place as "[file:line]";
    empty if a finding has no place. A place that stands in `corrections` gives way to what it says there; if that is
    nothing, the quote is left out."""
    paragraphs: dict[str, list[str]] = {question: [] for question in asked}
    told: set[str] = set()
    for item in found:
        place = _place(item)
        if place is None:
            return []
        lines = paragraphs.setdefault(_named(item, _ASKED), [])
        place = corrections.get(place, place)
        line = f"“{_flat(_named(item, _TEXT))}” [{place}]"
        if place and _MARKER not in line:
            lines.append("(What was found stands above.)" if line in told else line)
            told.add(line)
    return [
        "\n".join([title.replace(_MARKER, "[["), *(dict.fromkeys(lines) or ["Nothing was found."])])
        for title, lines in paragraphs.items()
    ]


def _place(item: Finding) -> str | None:
    file, line = _named(item, _FILE), item.get("line")
    return f"{file}:{line}" if file and line is not None else None


def misplaced(texts: Iterable[str]) -> dict[str, str]:
    """Of texts that start with a place, as "[a.md:3]: …": that place, and the other one that the text names; empty, if
    it names none."""
    found = {}
    for text in texts:
        places = [f"{file}:{line}" for file, line in _PLACE.findall(text)]
        if places and text.startswith(f"[{places[0]}]: "):
            found[places[0]] = next(iter(places[1:]), "")
    return found


def _pieces(item: Finding, leave_out: str) -> list[str]:
    """What a finding says, line by line: its text, then the quotes that are not in there already."""
    if problem := _named(item, _PROBLEM):
        return [f"Not answered: {problem}"]
    text = _named(item, _TEXT).replace(leave_out, "")
    lines = [line.strip() for line in text.splitlines() if line.strip() and _MARKER not in line]
    lines += [quote for quote in _quotes(item) if _MARKER not in quote and quote.partition("“")[2] not in text]
    lines += [f"({key}: no)" for key, value in item.items() if value is False]
    return lines or ["Nothing was found."]


def _quotes(item: Finding) -> Iterable[str]:
    for key, value in item.items():
        if _QUOTES.search(key) and isinstance(value, list):
            yield from map(_quote, value)


def _quote(value: Any) -> str:
    if not isinstance(value, dict):
        return f"“{value}”"
    file, text = _named(value, _FILE), max(map(str, value.values()), key=len, default="")
    line = f", line {value['line']}" if value.get("line") is not None else ""
    return f"{file}{line}: “{text}”" if file else f"“{text}”"


def _named(item: Finding, pattern: re.Pattern[str]) -> str:
    """The first text of `item` whose name fits."""
    return next((value for key, value in item.items() if pattern.search(key) and isinstance(value, str)), "")


def is_borne_out(claim: str, texts: Sequence[str]) -> bool:
    """Whether the quotes of `claim` stand in `texts`; without quotes, whether two thirds of its words do."""
    quoted = _QUOTED.findall(claim)
    if quoted:
        everything = "\n".join(_flat(text) for text in texts)
        return all(_flat(quote) in everything for quote in quoted)
    said, known = set(stems(claim)), {term for text in texts for term in stems(text)}
    return bool(said) and 3 * len(said & known) >= 2 * len(said)


def _flat(text: str) -> str:
    return " ".join(text.split())
