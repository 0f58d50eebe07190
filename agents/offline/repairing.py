"""A rejected answer, repaired: what was right in it stays, and what was wrong is changed as the stated reasons say.

Only what a reason says counts: a reason that these rules do not understand leaves them with what they would answer
anyway.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from agentcast.agents.offline.prompt import Rejection
from agentcast.agents.offline.typed import without_addresses

_SECTION = re.compile(r"^\[\[ ## (\w+) ## \]\]$", re.M)
_CLAUSE_END = re.compile(r"[,;:.!?)–—]$")
_JOINTS = frozenset(
    {"and", "or", "but", "so", "because", "which", "that", "when", "if", "while", "since", "with", "a", "the"}
)
_AT_MOST = re.compile(r"(?:at most|no more than|less than or equal to) (-?\d+(?:\.\d+)?)(?: (word|character|item))?")
_AT_LEAST = re.compile(
    r"(?:at least|no less than|greater than or equal to) (-?\d+(?:\.\d+)?)(?! (?:word|character|item))"
)
_FORBIDDEN = re.compile(r"\b(?:must|may|should|can)(?: not|not)\b[^.;]*?\b(e-?mail|url|link|web address)")


def repaired(rejection: Rejection, fresh: Mapping[str, Any]) -> dict[str, Any]:
    """`fresh`, which is what would be answered by itself, with what was right in the rejected answer kept, and the
    rest mended."""
    before = _read_answer(rejection.answer)
    reasons = problems_by_field(rejection.problems, fresh)
    values = {}
    for name, value in fresh.items():
        if name not in reasons:
            values[name] = before.get(name, value)
        else:
            old = before.get(name, value)
            mended = _mended(old, reasons[name])
            values[name] = value if mended == old else mended
    return values


def problems_by_field(problems: str, names: Collection[str]) -> dict[str, list[tuple[str, str]]]:
    """For each field of `names` that has problems, (where in it, reason); a reason that comes without a field belongs
    to the fields that it names."""
    found: dict[str, list[tuple[str, str]]] = {}
    known = "|".join(map(re.escape, names))
    starts = list(re.finditer(rf"(?:^[-* ]*|(?<=; ))(?:({known})((?:\.[\w-]+)*): |(?=Value error, ))", problems, re.M))
    ends = [*(start.start() for start in starts), len(problems)][1:]
    for start, end in zip(starts, ends, strict=True):
        reason = problems[start.end() : end].removeprefix("Value error, ").strip("; \n")
        fields = [start[1]] if start[1] else [name for name in names if re.search(rf"\b{name}\b", reason)]
        for name in fields:
            found.setdefault(name, []).append(((start[2] or "").removeprefix("."), reason))
    return found


def _read_answer(text: str) -> dict[str, Any]:
    """The fields of an answer, which is a JSON object or marked sections."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        parts = _SECTION.split(text)
        return {name: value.strip() for name, value in zip(parts[1::2], parts[2::2], strict=True)}
    return values if isinstance(values, dict) else {}


def _mended(value: Any, reasons: list[tuple[str, str]]) -> Any:
    if isinstance(value, list):
        wrong = {where.partition(".")[0] for where, _ in reasons}
        value = [item for at, item in enumerate(value) if str(at) not in wrong]
    for _, reason in reasons:
        for mend in (_without_forbidden, _shortened, _raised):
            value = mend(value, reason)
    return value


def _without_forbidden(value: Any, reason: str) -> Any:
    match = _FORBIDDEN.search(reason)
    if match is None or not isinstance(value, str):
        return value
    return without_addresses("email" if "mail" in match[1] else "url", value)


def _shortened(value: Any, reason: str) -> Any:
    match = _AT_MOST.search(reason)
    if match is None:
        return value
    limit, unit = float(match[1]), match[2]
    if isinstance(value, list):
        return value[: int(limit)]
    if isinstance(value, str) and unit == "word":
        return _first_words(value, int(limit))
    if isinstance(value, str) and unit == "character":
        return value if len(value) <= limit else value[: int(limit)].rpartition(" ")[0]
    return _number(value, lambda number: min(number, limit))


def _raised(value: Any, reason: str) -> Any:
    match = _AT_LEAST.search(reason)
    return value if match is None else _number(value, lambda number: max(number, float(match[1])))


def _number(value: Any, change: Callable[[float], float]) -> Any:
    try:
        changed = change(float(value))
    except (TypeError, ValueError):
        return value
    return int(changed) if changed.is_integer() else changed


def _first_words(text: str, limit: int) -> str:
    """The start of `text` in at most `limit` words, up to the end of a clause if one ends in its second half."""
    words = text.split()
    if len(words) <= limit:
        return text
    ends = [at for at in range(limit, limit // 2, -1) if _CLAUSE_END.search(words[at - 1]) or words[at] in _JOINTS]
    return " ".join(words[: ends[0] if ends else limit]).rstrip(" ,;:–—(")
