"""`librarian`: the researcher's questions, answered with the tools of an MCP server.

The server, `librarian_server`, ships with it, is started with the hub and works on the same folder as the researcher.
It shows what MCP servers look like in use: several runs share one process, and a long tool reports its progress.
"""

import os
import sys
from pathlib import Path

import dspy

from agentcast.agents.demo.corpus import VARIABLE
from agentcast.agents.demo.researcher import calculate, registry
from agentcast.agents.mcp import mcp_server

__all__ = ["Librarian", "library", "registry"]

library = mcp_server(
    "library",
    command=sys.executable,
    args=["-m", "agentcast.agents.demo.librarian_server"],
    env={"PYTHONPATH": str(Path(__file__).parents[3]), VARIABLE: os.environ.get(VARIABLE, "")},
)


@registry.react(tools=[library, calculate], max_iters=8)
class Librarian(dspy.Signature):  # type: ignore[misc]
    """Answer a question about a library of texts, or about the library itself, with the tools of an MCP server.

    Search for the words that matter, read what looks best, and calculate instead of guessing. Quote the sentences that
    support the answer word for word, each with its file and line. An index lists the texts. If they do not say, say so.
    """

    history: str = dspy.InputField(desc="earlier questions and answers of this conversation")
    question: str = dspy.InputField(desc="what you want to know, such as: How many files are in the library?")
    answer: str = dspy.OutputField(desc="the answer, with verbatim quotes and the names of their files")
