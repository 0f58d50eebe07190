"""The output fields of a prompt, filled from what it gives: quotes, sums, counts, choices. Nothing is invented.

Where a field needs a value and the text has none, text says so, an optional field stays empty, and a number is 0.
"""

import re
from functools import cached_property
from typing import Any

from agentcast.agents.arithmetic import evaluate, find_sums, show
from agentcast.agents.offline.acting import question_of, with_topic
from agentcast.agents.offline.evidence import Passage, Quote, central, found_nothing, passages, quotes
from agentcast.agents.offline.fields import is_part, kind_of, options_of, resolved
from agentcast.agents.offline.letters import is_letter, letter
from agentcast.agents.offline.merging import cited, findings, is_borne_out, merged, misplaced
from agentcast.agents.offline.prompt import Field, Prompt, texts_of
from agentcast.agents.offline.repairing import problems_by_field, repaired
from agentcast.agents.offline.splitting import split_question
from agentcast.agents.offline.typed import addresses, choice, days, is_about, numbers, stated
from agentcast.agents.words import STOP_WORDS, keywords, stem, stems

NOTE = (
    "(This is the offline model: it quotes and calculates by rules, it does not think. "
    "Set AGENTCAST_LM to a model's name for real answers.)"
)
LONG_TEXT = 40
"""Words from which on an input is taken as something to read rather than as a question."""

_QUESTION = re.compile(r"question|query|ask|prompt|task|topic|request|instruction|problem|goal")
_PRIMARY = re.compile(r"^(?:final_)?(?:answer|response|reply|output|result|report|text|message|summary|explanation)$")
_PARTS = re.compile(r"question|quer(?:y|ies)$|sub_?(?:task|topic|problem)|aspect")
_LIMITED = re.compile(r"\bat most \d+ (?:words|characters)\b")
_COUNT = re.compile(r"^(?:n|k|max_.*|.*count|.*number|.*limit|how_many.*)$")
_PARTS_BY_DEFAULT, _MOST_PARTS = 3, 20
_CLAIM = re.compile(r"^(?:claim|finding|statement|hypothesis|answer|response|text)$")
_VERIFIES = re.compile(r"support|faithful|ground|verif|confirm|proven|entail|correct|accurate|consistent|factual")


def answer(prompt: Prompt) -> dict[str, Any]:
    """A value for each output field of `prompt`, as JSON data; an optional field without one is left out."""
    reply = _Reply(prompt)
    values = {output.name: reply.value(output) for output in prompt.outputs}
    if prompt.rejection is not None:
        values = repaired(prompt.rejection, values)
    return {name: value for name, value in values.items() if value is not None}


class _Reply:
    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.steps = [step for step in prompt.steps if step.tool != "finish"]

    # -- What there is to answer from ------------------------------------------------------------------------------

    @cached_property
    def _split(self) -> tuple[str, list[Passage]]:
        """The question, and the inputs that are there to be read."""
        values = {name: value for name, value in self.prompt.values.items() if name != "history" and value.strip()}
        asking = [name for name in values if _QUESTION.search(name) and len(values[name].split()) < 5 * LONG_TEXT]
        if not asking and len(values) > 1:
            asking = [name for name in values if values[name].rstrip().endswith("?")][:1]
        if not asking and not self.steps:
            asking = [name for name, value in values.items() if len(value.split()) < LONG_TEXT][:1] or asking
            asking = asking if len(values) > len(asking) or not self._is_statement(values) else []
        question = "\n".join(values[name] for name in asking)
        read = {name: value for name, value in values.items() if name not in asking and name != self._claim}
        return question, [part for name, value in read.items() for part in _read(value, name)]

    @cached_property
    def _claim(self) -> str | None:
        """The input that is to be checked against the others; None: nothing is."""
        values = self.prompt.values
        claims = [name for name in values if _CLAIM.match(name)]
        others = [name for name in values if name not in claims and not _QUESTION.search(name)]
        asked = any(_VERIFIES.search(output.name) for output in self.prompt.outputs)
        return claims[-1] if claims and others and asked else None

    def _is_statement(self, values: dict[str, str]) -> bool:
        text = next(iter(values.values()), "").strip()
        return not text.endswith("?") and len(keywords(text)) > 3 and not find_sums(text)

    @cached_property
    def _is_borne_out(self) -> bool | None:
        """Whether the claim, if there is one, is borne out by what was read."""
        if self._claim is None:
            return None
        return is_borne_out(self.prompt.values[self._claim].replace(NOTE, ""), [passage.text for passage in self.read])

    @cached_property
    def question(self) -> str:
        return with_topic(self._split[0] or question_of(self.prompt.values), self.prompt.values)

    @cached_property
    def read(self) -> list[Passage]:
        """All that was read: the inputs, and what the tools gave."""
        useful = [step for step in self.steps if not found_nothing(step.observation)]
        found = [passage for step in useful for passage in passages(step.observation, step.tool)]
        return [*self._split[1], *(passage for passage in found if not self._is_sum(passage))]

    def _is_sum(self, passage: Passage) -> bool:
        return passage.line is None and any(passage.text.strip().endswith(f"= {text}") for _, text in self.sums)

    @cached_property
    def text(self) -> str:
        """Everything in the prompt that may hold a value."""
        return "\n".join([self.question, *(passage.text for passage in self.read)])

    @cached_property
    def sums(self) -> list[tuple[str, str]]:
        """The sums of the question and their values, or why they have none."""
        found = []
        for sum_ in find_sums(self.question)[:4]:
            try:
                found.append((sum_, show(evaluate(sum_))))
            except ValueError as error:
                found.append((sum_, f"no value ({error})"))
        return found

    @cached_property
    def quotes(self) -> list[Quote]:
        if self._split[0] or self.steps:
            return quotes(self.question, self.read, limit=3) or self._what_tools_said()
        return central(self.read)

    def _what_tools_said(self) -> list[Quote]:
        """The start of what tools gave that share no word with the question: still an answer to the call."""
        called = {step.tool for step in self.steps}
        return central([passage for passage in self.read if passage.source in called])

    # -- Values ----------------------------------------------------------------------------------------------------

    @cached_property
    def primary(self) -> str | None:
        """The field that holds the answer proper; one that is to be short has no room for it."""
        strings = [output for output in self.prompt.outputs if output.schema.get("type", "") == "string"]
        texts = [output.name for output in strings if not _LIMITED.search(output.desc)]
        texts = [name for name in texts if kind_of(name) != "reasoning"]
        named = [name for name in texts if _PRIMARY.match(name)]
        return next(iter(named or [name for name in texts if kind_of(name) is None] or texts), None)

    @cached_property
    def choices(self) -> dict[str, Any]:
        """The fields that are a choice, and what is chosen."""
        return {output.name: self._choice(output) for output in self.prompt.outputs if options_of(output)}

    def value(self, output: Field, *, top: bool = True) -> Any:
        schema = resolved(output.schema)
        if options_of(output):
            return self._choice(output)
        if "anyOf" in schema:
            return self._any_of(output, schema["anyOf"])
        match schema.get("type"):
            case "boolean":
                return self._truth(output)
            case "integer" | "number" as kind:
                return self._number(output, schema, whole=kind == "integer")
            case "array":
                found = self._list(output, resolved(schema.get("items", {}), output.schema))
                return found[: schema.get("maxItems")]
            case "object":
                return self._object(output, schema)
            case "null":
                return None
            case _:
                return self._long_text(output) if top else self._text(output)

    def _any_of(self, output: Field, options: list[dict[str, Any]]) -> Any:
        definitions = {"$defs": output.schema.get("$defs", {})}
        for option in options:
            if option.get("type") != "null":
                value = self.value(Field(output.name, output.desc, option | definitions), top=False)
                return None if value in ("", [], {}) or (value == 0 and not self._numbers(output)) else value
        return None

    def _object(self, output: Field, schema: dict[str, Any]) -> dict[str, Any]:
        definitions = {"$defs": output.schema.get("$defs", {})}
        values = {
            name: self.value(Field(name, inner.get("description", ""), inner | definitions), top=False)
            for name, inner in schema.get("properties", {}).items()
        }
        needed = schema.get("required", [])
        return {name: value for name, value in values.items() if value is not None or name in needed}

    def _choice(self, output: Field) -> Any:
        return choice(options_of(output), output.desc, self.text)

    def _truth(self, output: Field) -> bool:
        if self._is_borne_out is not None and _VERIFIES.search(output.name):
            return self._is_borne_out
        generic = {"answer", "result", "output", "ok"}
        about = [part for part in output.name.lower().split("_") if part not in STOP_WORDS | generic]
        present = set(stems(self.text if self.read else self.question))
        if about:
            return is_about("_".join(about), present)
        wanted = {stem(word) for word in keywords(self.question)}
        found = {term for passage in self.read for term in stems(passage.text)}
        return bool(wanted) and 2 * len(wanted & found) > len(wanted)

    def _numbers(self, output: Field) -> list[float]:
        if self.sums:
            return [float(text) for _, text in self.sums if not text.startswith("no value")]
        near = quotes(f"{output.name.replace('_', ' ')} {output.desc} {self.question}", self.read, limit=1)
        return numbers("\n".join([*(quote.text for quote in near), self.text]), output.name)

    def _number(self, output: Field, schema: dict[str, Any], *, whole: bool) -> float | int:
        low, high = schema.get("minimum", float("-inf")), schema.get("maximum", float("inf"))
        given = stated(output.desc, self.choices.values())
        found = [*self._numbers(output), *([] if given is None else [given])]
        fitting = [number for number in found if low <= number <= high and (number.is_integer() or not whole)]
        number = fitting[0] if fitting else min(max(0.0, low), high)
        return int(number) if whole else number

    def _list(self, output: Field, items: dict[str, Any]) -> list[Any]:
        match items.get("type"):
            case "integer":
                return [int(number) for number in self._numbers(output) if number.is_integer()]
            case "number":
                return self._numbers(output)
            case "string" if "enum" not in items:
                return self._texts(output)
            case "object" if kind_of(output.name) == "quotes":
                found = [_as_object(quote, items, self.question) for quote in self.quotes]
                return [item for item in found if all(name in item for name in items.get("required", ()))]
            case _:
                return [option for option in items.get("enum", []) if stem(str(option)) in stems(self.text)]

    def _texts(self, output: Field) -> list[str]:
        if self._split[0] and _PARTS.search(output.name):
            return split_question(self._split[0], self._wanted(output))
        match kind_of(output.name):
            case "sources":
                return list(dict.fromkeys(quote.source for quote in self.quotes))
            case "keywords":
                return keywords(self.text)[:8]
            case "date":
                return days(self.text)
            case "email" | "url" as kind:
                return addresses(kind, self.text)
            case _:
                return [quote.text for quote in self.quotes]

    def _wanted(self, output: Field) -> int:
        """How many parts are asked for."""
        counts = [value for name, value in self.prompt.values.items() if _COUNT.match(name) and value.isdecimal()]
        wanted = int(counts[0][:3]) if counts else output.schema.get("maxItems", _PARTS_BY_DEFAULT)
        return max(1, min(wanted, _MOST_PARTS))

    def _part(self, output: Field) -> str | None:
        """The part of the question that a numbered field is for; None: it is not for one."""
        numbered = [other.name for other in self.prompt.outputs if is_part(other.name)]
        if output.name not in numbered or not self._split[0]:
            return None
        parts = split_question(self._split[0], len(numbered))
        return parts[min(numbered.index(output.name), len(parts) - 1)]

    def _long_text(self, output: Field) -> str:
        if is_letter(output.desc):
            return f"{letter(self.prompt.values)}\n\n{NOTE}"
        if part := self._part(output):
            return part
        return self._whole_answer() if output.name == self.primary else self._text(output)

    def _text(self, output: Field) -> str:
        if output.schema.get("format") == "date":
            return next(iter(days(self.text)), "")
        match kind_of(output.name):
            case "reasoning":
                return self._reasoning()
            case "sources" | "keywords":
                return ", ".join(self._texts(output))
            case "title":
                best = self.quotes[:1] or central(self.read, limit=1)
                return _short(best[0].text if best else self.question)
            case "summary":
                return " ".join(quote.text for quote in central(self.read)) or self.question
            case "email" | "url" | "date":
                return next(iter(self._texts(output)), "")
            case _:
                about = f"{output.name.replace('_', ' ')} {output.desc}"
                best = quotes(about, self.read, limit=1) or self.quotes[:1]
                return best[0].text if best else "Not stated."

    # -- Texts -----------------------------------------------------------------------------------------------------

    def _whole_answer(self) -> str:
        given = self.prompt.values.values()
        asked = [text for name, text in self.prompt.values.items() if is_part(name)]
        if found := [item for value in given for item in findings(value)]:
            corrections = misplaced(text for value in given for text in texts_of(value))
            return "\n\n".join([*(cited(found, corrections, asked) or merged(found, leave_out=NOTE)), NOTE])
        parts = [f"{sum_} = {text}" for sum_, text in self.sums]
        parts += [
            f"“{quote.text}”" if quote.source in self.prompt.values else f"{quote.place}: “{quote.text}”"
            for quote in self.quotes
        ]
        if not self.quotes and not self.sums:
            parts.append(self._nothing())
        elif self.quotes and self._is_weak():
            parts.insert(0, "Nothing that I read answers this directly. The closest is:")
        return "\n\n".join([*parts, NOTE])

    def _is_weak(self) -> bool:
        if all(quote.line is None for quote in self.quotes):  # from a tool that answers, not from a file that was found
            return False
        wanted = {stem(word) for word in keywords(self.question)}
        matched = frozenset[str]().union(*(quote.matched for quote in self.quotes))
        return bool(self._split[0] and wanted) and 3 * len(matched) <= len(wanted)

    def _nothing(self) -> str:
        about = ", ".join(keywords(self.question)[:8]) or "this"
        if self.steps:
            return f"The tools gave nothing that answers this (I looked for: {about})."
        if self.read:
            return f"The text says nothing about it (I looked for: {about})."
        return "There is no text to answer this from, and nothing to calculate."

    def _reasoning(self) -> str:
        parts = []
        if self.prompt.rejection is not None:
            wrong = problems_by_field(self.prompt.rejection.problems, [output.name for output in self.prompt.outputs])
            parts.append(f"My answer was rejected: I keep what was right, and repair {', '.join(wrong) or 'the rest'}.")
        if calls := [step.tool for step in self.steps]:
            counts = [f"{tool} {calls.count(tool)}×" for tool in dict.fromkeys(calls)]
            parts.append(f"I called {', '.join(counts)}.")
        if self.sums:
            parts.append(f"I calculated {', '.join(sum_ for sum_, _ in self.sums)}.")
        if self.quotes:
            sources = list(dict.fromkeys(quote.source for quote in self.quotes))
            parts.append(
                f"I compared what I read with the words of the question ({', '.join(keywords(self.question)[:8])}) "
                f"and took what is closest to them, from {', '.join(sources)}."
                if self._split[0] or self.steps
                else "I took the sentences whose words the text uses most."
            )
        if self.choices:
            chosen = (f"{name} {option}" for name, option in self.choices.items())
            parts.append(f"By the words that the text has, I chose {', '.join(chosen)}.")
        if self._is_borne_out is not None:
            parts.append(f"The {self._claim} is {'' if self._is_borne_out else 'not '}borne out by what I read.")
        if not parts or (calls and not self.quotes and not self.sums):
            parts.append("Nothing that I could read or calculate answers the question, so I say so.")
        return " ".join(parts if self.primary else [*parts, NOTE])


def _read(value: str, name: str) -> list[Passage]:
    """An input as passages; of a list, each item has its own, and those that say "nothing found" none."""
    texts = texts_of(value)
    return [passage for text in texts if len(texts) == 1 or not found_nothing(text) for passage in passages(text, name)]


def _as_object(quote: Quote, schema: dict[str, Any], question: str) -> dict[str, Any]:
    """`quote` as an object with the properties that `schema` names."""
    values = {name: _part_of(quote, name, question) for name in schema.get("properties", {})}
    return {name: value for name, value in values.items() if value is not None}


def _part_of(quote: Quote, name: str, question: str) -> Any:
    if name.startswith("line"):
        return quote.line
    if kind_of(name) == "sources":
        return quote.source
    return question if _QUESTION.search(name) else quote.text


def _short(text: str) -> str:
    text = re.sub(r"[*_`#>|]+", "", text).strip()
    return text if len(text) <= 80 else text[:80].rsplit(" ", 1)[0]
