"""`researcher`: answers questions about a folder of texts, with quotes and file names.

The folder is `AGENTCAST_DOCS`; by default the guide to agentcast that ships with the demo. It works offline, and better
with a real model.
"""

import re
import sqlite3
from contextlib import closing

import dspy

from agentcast.agents.base import ToolError
from agentcast.agents.context import status
from agentcast.agents.demo.corpus import corpus, excerpt, found
from agentcast.agents.registry import Registry

registry = Registry()

_NUMBER = re.compile(r"\d+(?:\.\d*)?|\.\d+")
_SIGN = re.compile(r"[-+*/]")
_SIGNS = str.maketrans("\N{MINUS SIGN}×·÷", "-**/")
_SUM = re.compile(r"(?=.*\d)[-\d .+*/()]{1,400}")


def search(query: str, limit: int = 5) -> str:
    """Search the files for words. Gives the passages that fit best, each under the file and line where it starts."""
    status(f"Searching for {query}")
    return found(query, limit)


def read(file: str, line: int = 1, count: int | None = None) -> str:
    """Read a file: the section around a line, or count lines from that line on."""
    name, lines = corpus().open(file)
    status(f"Reading {name}")
    return excerpt(name, lines, line, count)


def calculate(expression: str) -> str:
    """Calculate an arithmetic expression: numbers, + - * / and brackets."""
    status(f"Calculating {expression[:100]}")
    spaced = _SIGN.sub(r" \g<0> ", expression.translate(_SIGNS)).strip()  # "--" would begin a comment
    reals = _NUMBER.sub(lambda number: str(float(number[0])), spaced) if _SUM.fullmatch(spaced) else ""
    try:
        with closing(sqlite3.connect(":memory:")) as database:
            (value,) = database.execute(f"SELECT {reals}").fetchone()  # numbers and signs only
    except sqlite3.Error:
        raise ToolError(f"{expression.strip()[:200]!r} is not an expression of numbers, + - * / and brackets") from None
    if value is None:
        raise ToolError("division by zero")
    shown = f"{value + 0.0:.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.12g}"
    return f"{expression.strip()} = {shown}"


@registry.react(tools=[search, read, calculate], max_iters=8)
class Researcher(dspy.Signature):  # type: ignore[misc]
    """Answer a question about a folder of texts, from what they say and with their words.

    Search for the words that matter, read what looks best, and calculate instead of guessing. Quote the sentences that
    support the answer word for word, each with its file and line. If the texts do not say, say so.
    """

    history: str = dspy.InputField(desc="earlier questions and answers of this conversation")
    question: str = dspy.InputField(desc="what you want to know, such as: What happens to a slow client?")
    answer: str = dspy.OutputField(desc="the answer, with verbatim quotes and the names of their files")
