"""`researcher`: answers questions about a folder of texts, with quotes and file names.

The folder is `AGENTCAST_DOCS`; by default the guide to agentcast that ships with the demo. It works offline, and better
with a real model.
"""

import dspy

from agentcast.agents.base import ToolError
from agentcast.agents.context import status
from agentcast.agents.demo.arithmetic import evaluate
from agentcast.agents.demo.corpus import corpus, excerpt, found
from agentcast.agents.registry import Registry

registry = Registry()


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
    try:
        return f"{expression.strip()} = {evaluate(expression)}"
    except ValueError as error:
        raise ToolError(str(error)) from error


@registry.react(tools=[search, read, calculate], max_iters=8)
class Researcher(dspy.Signature):  # type: ignore[misc]
    """Answer a question about a folder of texts, from what they say and with their words.

    Search for the words that matter, read what looks best, and calculate instead of guessing. Quote the sentences that
    support the answer word for word, each with its file and line. If the texts do not say, say so.
    """

    history: str = dspy.InputField(desc="earlier questions and answers of this conversation")
    question: str = dspy.InputField(desc="what you want to know, such as: What happens to a slow client?")
    answer: str = dspy.OutputField(desc="the answer, with verbatim quotes and the names of their files")
