"""Values of a type, found in a text by rules: a choice, numbers, days, addresses.

What a field's description says about its values counts too, as for any model: "bug: crash, error; question: anything
else" says which words stand for a choice, "4 if critical, 72 if normal" which number goes with one that was made.
"""

import datetime
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from agentcast.agents.words import stem, stems

_FINDERS = {
    "email": re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    "url": re.compile(r"https?://[^\s)>\]\"']+"),
}
_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"(?<![\w.:/-])-?\d+(?:\.\d+)?(?![\w/:-])(?!\.\d)")
_NUMBER_OF = re.compile(r"(?<![\w.:/-])(\d+(?:\.\d+)?)[ -]([A-Za-z]+)")
_UNIT = re.compile(r"_(minutes|hours|days|weeks|months)$")
_IF = re.compile(r"(\d+(?:\.\d+)?) if ([\w-]+)")
_ELSE = re.compile(r"\b(?:anything|everything|all) else\b")

_MONTHS = "january february march april may june july august september october november december".split()
_MONTH = "|".join(f"{name[:3]}(?:{name[3:]})?" for name in _MONTHS)
_DAYS = (
    re.compile(r"\b(?P<year>\d{4})-(?P<month>\d{2})-(?P<day>\d{2})\b"),
    re.compile(rf"\b(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\.? (?:of )?(?P<month>{_MONTH})\.?,? (?P<year>\d{{4}})\b", re.I),
    re.compile(rf"\b(?P<month>{_MONTH})\.? (?P<day>\d{{1,2}})(?:st|nd|rd|th)?,? (?P<year>\d{{4}})\b", re.I),
)


def choice(options: Sequence[Any], desc: str, text: str) -> Any:
    """The option whose words `text` has most often: those of its name, and the phrases that `desc` says it stands for.
    If it has none of them, the one that stands for anything else, or the first."""
    names, words = stems(text), _words(text)
    meanings = {option: _meaning(str(option), desc) for option in options}
    counts = {
        option: sum(names.count(term) for term in set(stems(str(option))))
        + sum(_count(_words(phrase), words) for phrase in meaning.split(","))
        for option, meaning in meanings.items()
    }
    if any(counts.values()):
        return max(options, key=lambda option: counts[option])
    return next((option for option in options if _ELSE.search(meanings[option])), options[0])


def _meaning(option: str, desc: str) -> str:
    match = re.search(rf"(?:^|[;:.(]\s*)`?{re.escape(option)}`?: ([^;]*)", desc)
    return match[1] if match else ""


def _words(text: str) -> list[str]:
    return [stem(word) for word in _WORD.findall(text)]


def _count(phrase: list[str], words: list[str]) -> int:
    size = len(phrase)
    return sum(words[at : at + size] == phrase for at in range(len(words) - size + 1)) if phrase else 0


def stated(desc: str, made: Collection[Any]) -> float | None:
    """The number that `desc` says goes with one of the choices that were `made`."""
    return next((float(number) for number, option in _IF.findall(desc) if option in made), None)


def numbers(text: str, name: str) -> list[float]:
    """The numbers in `text`, those of what the field `name` names first ("7 people"); only they, if it ends in a unit
    of time."""
    parts = set(stems(name.replace("_", " ")))
    named = [float(number) for number, what in _NUMBER_OF.findall(text) if stem(what) in parts]
    return named if _UNIT.search(name) else [*named, *(float(number) for number in _NUMBER.findall(text))]


def addresses(kind: str, text: str) -> list[str]:
    """The e-mail addresses ("email") or web addresses ("url") in `text`, each once."""
    return list(dict.fromkeys(_FINDERS[kind].findall(text)))


def without_addresses(kind: str, text: str) -> str:
    """`text` with a mark of omission where such an address was."""
    return _FINDERS[kind].sub("[…]", text)


def days(text: str) -> list[str]:
    """The days that `text` names with their year, in its order, as "2026-11-03"."""
    found = sorted((match for pattern in _DAYS for match in pattern.finditer(text)), key=lambda match: match.start())
    return list(dict.fromkeys(day for match in found for day in _day(match)))


def _day(match: re.Match[str]) -> Iterator[str]:
    month = match["month"]
    number = int(month) if month.isdecimal() else 1 + [name[:3] for name in _MONTHS].index(month[:3].lower())
    try:
        yield datetime.date(int(match["year"]), number, int(match["day"])).isoformat()
    except ValueError:  # the 31st of June
        return


def is_about(name: str, words: Collection[str]) -> bool:
    """Whether a part of the field name `name` is among the stems `words`."""
    return any(stem(part) in words for part in name.split("_"))
