"""Words of a text as a search sees them: stop words left out, endings taken off.

For English, and crude on purpose: a few rules instead of a dictionary. This module must not know agents or DSPy.
"""

import re

_WORD = re.compile(r"[A-Za-z0-9_]+(?:[.'’/-][A-Za-z0-9_]+)*|[^\W\d_]+", re.UNICODE)
_PART = re.compile(r"[^\W_]+", re.UNICODE)
STOP_WORDS = frozenset(
    """
    a about above after again all also am an and any are as at be because been before being below between both but by
    can could did do does doing don down during each else ever every few for from further get give given gets got had
    has have having he her here hers him his how i if in into is isn it its itself just kind know let like ll main make
    many may me might more most much must my need no nor not now of off on once one only or other our ours out over own
    please re s same say says shall she should show so some sort such sure t tell than that the their theirs them then
    there these they thing things this those through to too under until up upon us use used uses using ve very want was
    we were what what's when where which while who whom whose why will with without would yes you your yours explain
    describe list find look large long big often mean means happen happens work works
    """.split()
)
_ENDINGS = ("ations", "ation", "ings", "ing", "edly", "ed", "ies", "es", "s", "ly", "er", "ers")
_MIN_STEM = 3


def stem(word: str) -> str:
    """`word` in lower case without its ending: "cancelled", "cancels" and "cancelling" all give "cancel"."""
    word = word.lower().removesuffix("'s").removesuffix("’s")
    if not word.isalpha() or word.endswith(("ss", "us", "is")):
        return word
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= _MIN_STEM:
            word = word[: -len(ending)]
            break
    if len(word) > _MIN_STEM and word[-1] == word[-2] and word[-1] not in "aeiouls":
        word = word[:-1]
    elif word.endswith("ll") and len(word) > _MIN_STEM + 1:
        word = word[:-1]
    return word.removesuffix("e") if len(word) > _MIN_STEM else word


def stems(text: str) -> list[str]:
    """The stems of all words of `text` in order, stop words left out. "a_b" and "a.b" count as a whole and as parts."""
    found: list[str] = []
    for match in _WORD.finditer(text):
        word = match.group()
        if word.lower() in STOP_WORDS:
            continue
        found.append(stem(word))
        if not word.isalnum():
            found.extend(stem(part) for part in _PART.findall(word) if part.lower() not in STOP_WORDS)
    return found


def keywords(text: str) -> list[str]:
    """The words of `text` that a search should look for, in order, each stem once, as they are written there."""
    found: dict[str, str] = {}
    for match in _WORD.finditer(text):
        word = match.group()
        if word.lower() not in STOP_WORDS and (len(word) > 1 or word.isdigit()):
            found.setdefault(stem(word), word)
    return list(found.values())
