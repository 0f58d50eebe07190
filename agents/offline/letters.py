"""A letter to whoever wrote: made of what they wrote and of what was found out about it, word for word."""

import re
from collections.abc import Mapping

from agentcast.agents.offline.evidence import central, passages

_LETTER = re.compile(r"\b(?:letter|reply|answer|message|mail) to the (?:customer|sender|user|client|writer)\b", re.I)
_SUMMARY = re.compile(r"summary|abstract|gist")
_SHORT = 3
"""Words up to which an input is a fact to name."""


def is_letter(desc: str) -> bool:
    """Whether a field with this description asks for a letter."""
    return bool(_LETTER.search(desc))


def letter(values: Mapping[str, str]) -> str:
    """A letter out of the inputs `values`: the longest is what it answers, or else the summary of it; short ones are
    named."""
    written = max(values.values(), key=len, default="")
    gist = next((value for name, value in values.items() if _SUMMARY.search(name) and value), "")
    gist = gist or " ".join(quote.text for quote in central(passages(written, "it"), limit=1)) or written[:200]
    facts = [
        f"{name.replace('_', ' ')}: {value}"
        for name, value in values.items()
        if value != written and value not in ("", "None") and len(value.split()) <= _SHORT
    ]
    parts = ["Hello,", f"thank you for writing to us. This is how we understand you: “{gist}”"]
    if facts:
        parts.append(f"We have noted: {', '.join(facts)}.")
    return "\n\n".join([*parts, "If something is missing, reply to this message."])
