"""`researcher`: answers questions about a folder of texts, with quotes and file names.

The folder is `AGENTCAST_DOCS`; by default this project's own `docs/` and README, or, where those are not at hand (an
installed package), the text that ships with this module. It works offline, and better with a real model.
"""

import os
from functools import cache
from pathlib import Path

import dspy

from agents.arithmetic import evaluate, show
from agents.base import ToolError
from agents.current import status
from agents.demo.corpus import MAX_READ_LINES, Corpus, heading_above, place, section
from agents.registry import Registry

VARIABLE = "AGENTCAST_DOCS"
MAX_HITS = 10

_PROJECT = Path(__file__).parents[2]

registry = Registry()


def corpus() -> Corpus:
    """The texts that the tools work on.

    :raises ToolError: `AGENTCAST_DOCS` names no folder.
    """
    chosen = os.environ.get(VARIABLE, "").strip()
    if chosen and not Path(chosen).expanduser().exists():
        raise ToolError(f"{VARIABLE} is set to something that does not exist")
    return _corpus(tuple([Path(chosen).expanduser()] if chosen else _own_texts()))


@cache
def _corpus(roots: tuple[Path, ...]) -> Corpus:
    return Corpus(*roots)


def _own_texts() -> list[Path]:
    own = [path for path in (_PROJECT / "docs", _PROJECT / "README.md") if path.exists()]
    is_checkout = (_PROJECT / "pyproject.toml").exists()
    return own if own and is_checkout else [Path(__file__).parent / "texts"]


def search(query: str, limit: int = 5) -> str:
    """Search the files for words. Gives the passages that fit best, each under the file and line where it starts."""
    status(f"Searching for {query}")
    hits = corpus().search(query, max(1, min(limit, MAX_HITS)))
    if not hits:
        return f"Nothing found for {query!r}. Other or fewer words may help."
    return "\n\n".join(f"{hit.place}\n{hit.text}" for hit in hits)


def read(file: str, line: int = 1, count: int | None = None) -> str:
    """Read a file: the section around a line, or count lines from that line on."""
    name, lines = corpus().open(file)
    status(f"Reading {name}")
    if not lines:
        return f"{name} is empty."
    if not 1 <= line <= len(lines):
        raise ToolError(f"{name} has {len(lines)} lines; there is no line {line}")
    start, end = section(lines, line) if count is None else (line, line + min(max(count, 1), MAX_READ_LINES) - 1)
    end = min(end, len(lines))
    return "\n".join([place(name, f"{start}-{end}", heading_above(lines, start)), *lines[start - 1 : end]])


def calculate(expression: str) -> str:
    """Calculate an arithmetic expression: numbers, + - * / // % ** ( ), sqrt, round, min, max, abs."""
    status(f"Calculating {expression[:100]}")
    try:
        return f"{expression.strip()} = {show(evaluate(expression))}"
    except ValueError as error:
        raise ToolError(str(error)) from error


@registry.react(tools=[search, read, calculate], max_iters=8)
class Researcher(dspy.Signature):  # type: ignore[misc]
    """Answer a question about a folder of texts, from what they say and with their words.

    Search for the words that matter, read what looks best, and calculate instead of guessing. Quote the sentences that
    support the answer word for word, each with its file and line. If the texts do not say, say so.
    """

    history: str = dspy.InputField(desc="earlier questions and answers of this conversation")
    question: str = dspy.InputField(desc="what you want to know")
    answer: str = dspy.OutputField(desc="the answer, with verbatim quotes and the names of their files")
