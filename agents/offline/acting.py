"""Which tool to call next, and with what: the offline model's part in a ReAct loop.

By rules: a sum goes to a tool that calculates; otherwise the words of the question pick among the tools, a search
first if there is one; what it found is read; a search that found nothing is tried once more with other words; then it
finishes. A tool is never called twice with the same arguments.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from agentcast.agents.arithmetic import find_sums
from agentcast.agents.offline.arguments import fill, named_places, required, takes
from agentcast.agents.offline.evidence import found_nothing, passages, quotes
from agentcast.agents.offline.prompt import Prompt, Tool
from agentcast.agents.words import keywords, stem, stems

MAX_SEARCHES = 2
MAX_READS = 2
MAX_OTHERS = 3
MAX_QUERY_WORDS = 8

_CALCULATES = re.compile(r"calculat|arithmetic|\bmath|evaluate", re.I)
_SEARCHES = re.compile(r"search|look ?up|retriev|\bfind", re.I)
_OF_SUMS = re.compile(
    r"\d|^(?:sum|total|plus|minus|times|divided|multiplied|percent|square[d]?|cubed|root|power|average|mean|product|result"
    r"|value|number|answer|equals?|calculat\w*|comput\w*|evaluate|solve|largest|smallest|maximum|minimum|round\w*)$"
)
_READS = re.compile(r"\bread|\bopen|fetch|\bload|\bview|\bcat\b", re.I)


@dataclass(frozen=True)
class Move:
    """The next turn."""

    thought: str
    tool: str
    args: dict[str, Any] = field(default_factory=dict)


def question_of(values: dict[str, str]) -> str:
    """The text that asks: all inputs together, earlier turns left out."""
    return "\n".join(value for name, value in values.items() if name != "history")


def with_topic(question: str, values: dict[str, str]) -> str:
    """`question`, and, if it is a follow-up that says little itself, the question of the turn before it."""
    history = values.get("history", "").strip()
    if not history or len(keywords(question)) >= 2:
        return question
    last = history.rpartition("\n\n")[2].partition("\n")[0].partition(": ")[2]
    return f"{question} {last[:200]}"


def next_move(prompt: Prompt) -> Move:
    """The next turn of the ReAct loop that `prompt` shows."""
    turn = _Turn(prompt)
    for rule in (turn.sums, turn.named, turn.chosen, turn.search, turn.read, turn.search_again, turn.any_tool):
        for move in rule():
            if turn.is_new(move):
                return move
    return turn.finish()


class _Turn:
    """One decision. Each rule yields the moves that it would make, the best first."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.steps = prompt.steps
        self.question = question_of(prompt.values)
        self.tools = [tool for tool in prompt.tools if tool.name != "finish"]
        self.calculator = self._role(_CALCULATES, ("expression", "formula", "equation"))
        self.searcher = self._role(_SEARCHES, ("query", "q", "keywords", "terms", "text"))
        self.reader = self._role(_READS, ("file", "path", "filename", "document", "url", "page"))

    def _role(self, pattern: re.Pattern[str], arguments: tuple[str, ...]) -> Tool | None:
        """The first tool whose name, or else description, fits `pattern` and which takes one of `arguments`."""
        for text in ("name", "desc"):
            for tool in self.tools:
                if pattern.search(getattr(tool, text)) and takes(tool, arguments):
                    return tool
        return None

    @cached_property
    def words(self) -> list[str]:
        """What to search for."""
        numbers = set(re.findall(r"[\d.]+", " ".join(find_sums(self.question))))
        return [word for word in keywords(with_topic(self.question, self.prompt.values)) if word not in numbers]

    @cached_property
    def has_text_question(self) -> bool:
        """Whether anything is left to look up once the sums are done."""
        if not find_sums(self.question):
            return True
        return not all(_OF_SUMS.search(word.lower()) for word in self.words)

    def uses(self, tool: Tool | None) -> int:
        return sum(step.tool == tool.name for step in self.steps) if tool else 0

    def is_new(self, move: Move) -> bool:
        return all((step.tool, step.args) != (move.tool, move.args) for step in self.steps)

    # -- Rules -----------------------------------------------------------------------------------------------------

    def sums(self) -> Iterator[Move]:
        if self.calculator is not None:
            for sum_ in find_sums(self.question)[:4]:
                args = fill(self.calculator, self.prompt, self.words, given={"expression": sum_})
                if args is not None:
                    yield Move(f"There is a sum in the question, {sum_}: I calculate it.", self.calculator.name, args)

    def named(self) -> Iterator[Move]:
        """The files and addresses that the question names."""
        if self.reader is None or self.uses(self.reader) >= MAX_READS:
            return
        for place in named_places(self.question):
            args = fill(self.reader, self.prompt, self.words, given={"file": place})
            if args is not None and place in args.values():
                yield Move(f"The question names {place}, so I read it.", self.reader.name, args)

    def chosen(self) -> Iterator[Move]:
        """Tools without a role here, if the question speaks of what they do."""
        others = [tool for tool in self.tools if tool not in (self.calculator, self.searcher, self.reader)]
        if sum(self.uses(tool) for tool in others) >= MAX_OTHERS:
            return
        for score, tool in sorted(((self._fit(tool), tool) for tool in others), key=lambda item: -item[0]):
            if score >= 2 and not self.uses(tool):
                args = fill(tool, self.prompt, self.words)
                if args is not None:
                    yield Move(f"The question fits the tool {tool.name}, so I call it.", tool.name, args)

    def _fit(self, tool: Tool) -> int:
        wanted = {stem(word) for word in self.words}
        own = set(stems(tool.name.replace("_", " ")))
        return 3 * len(wanted & own) + len(wanted & set(stems(tool.desc)) - own)

    def search(self) -> Iterator[Move]:
        if self.searcher is None or self.uses(self.searcher) or not self.words or not self.has_text_question:
            return
        yield from self._search(self.words[:MAX_QUERY_WORDS], "I start with the words of the question.")

    def search_again(self) -> Iterator[Move]:
        """After a search that found nothing: fewer words. After one that left words of the question open: those."""
        if self.searcher is None or not 0 < self.uses(self.searcher) < MAX_SEARCHES:
            return
        last = [step for step in self.steps if step.tool == self.searcher.name][-1]
        if found_nothing(last.observation):
            fewer = sorted(self.words, key=lambda word: (word.isalpha(), -len(word)))[:2]
            for words in (fewer, fewer[:1]):
                yield from self._search(words, "The search found nothing, so I try again with fewer words.")
            return
        read = set(stems(" ".join(step.observation for step in self.steps)))
        missing = [word for word in self.words if stem(word) not in read]
        if missing and 3 * len(missing) >= len(self.words):
            yield from self._search(missing[:3], f"Nothing so far speaks of {' or '.join(missing[:3])}.")

    def _search(self, words: list[str], why: str) -> Iterator[Move]:
        if self.searcher is None or not words:
            return
        args = fill(self.searcher, self.prompt, words, given={"query": " ".join(words)})
        if args is not None:
            yield Move(f"{why} I search for: {', '.join(words)}.", self.searcher.name, args)

    def read(self) -> Iterator[Move]:
        """The places that the last search found, the best first."""
        if self.reader is None or self.uses(self.reader) >= min(MAX_READS, self.uses(self.searcher) or MAX_READS):
            return
        hits = [
            passage
            for step in self.steps
            if self.searcher is not None and step.tool == self.searcher.name
            for passage in passages(step.observation, "")
            if passage.source
        ]
        for hit in hits[:3]:
            best = next(iter(quotes(" ".join(self.words), [hit], limit=1)), hit)
            source, line = hit.source, best.line
            if any(step.tool == self.reader.name and source in step.args.values() for step in self.steps):
                continue
            where = {"file": source, **({"line": line} if line is not None else {})}
            args = fill(self.reader, self.prompt, self.words, given=where)
            if args is not None:
                at = f" at line {line}" if line is not None else ""
                yield Move(f"The best passage is in {source}{at}, so I read what is around it.", self.reader.name, args)

    def any_tool(self) -> Iterator[Move]:
        """Rather than finish with empty hands: whatever can be called with what the question gives."""
        if self.steps or (self.calculator and find_sums(self.question)):
            return
        for tool in sorted(self.tools, key=lambda tool: -self._fit(tool)):
            args = fill(tool, self.prompt, self.words)
            if args is not None and (args or not required(tool)):
                yield Move(f"No tool fits the question well; {tool.name} may still help.", tool.name, args)

    def finish(self) -> Move:
        useful = [step for step in self.steps if not found_nothing(step.observation)]
        if useful:
            names = " and ".join(dict.fromkeys(step.tool for step in useful))
            return Move(f"I answer from what {names} gave.", "finish")
        return Move("No tool gave anything that helps, so I finish and say so.", "finish")
