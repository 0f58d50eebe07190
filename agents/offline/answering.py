"""What the offline model makes of a prompt: it calls the tool that fits, quotes, and says what it cannot tell.

A field that is no text gets only what an input states under the field's name ("Severity: high", "since 2026-11-03").
"""

import re
from collections.abc import Iterator
from typing import Any

from agentcast.agents.offline.prompt import Prompt, Schema, Tool, loaded, texts_of
from agentcast.agents.offline.quoting import Sentence, quotes, sentences
from agentcast.agents.words import Index, content_words

NOTE = "(This is the offline model: it does not think. Set AGENTCAST_LM to a model's name for real answers.)"
CANNOT_TELL, MAX_VALUE = "I cannot tell", 60_000
NO_TEXTS = _, PREVIOUS_ANSWER, PROBLEMS = "history", "previous_answer", "problems"  # the answer before was rejected

_QUESTION = re.compile(r"question|query|topic|task|request|prompt|problem")
_ANSWER = re.compile(r"answer|response|reply|output|result|report|message")
_GIST = re.compile(r"summary|abstract|gist|title|headline")
_NUMBERED = re.compile(r".*question_?(\d+)")
_UNKNOWN = re.compile(r"unknown|unclear|undecided|none|neutral|other|n/a", re.I)
_ARGUMENTS = {"sum": "expression|formula", "query": r"query|q|search\w*", "file": r"file\w*|path|url", "line": "line"}
_DESCRIBED = {"sum": "calculat|arithmetic", "query": "search|find|look", "file": "read|open|show"}  # others may do harm
_FAILED = re.compile(r"tool \S+ failed|execution error in", re.I)
_NOTHING = re.compile(rf"\W*(?:(?:no|nothing|not|0)\b.{{0,40}}\b(?:found|match|result|hit)|{_FAILED.pattern}|$)", re.I)
_YES_OR_NO = re.compile(r"(?:can|could|do|does|did|is|are|was|were|will|would|should|may|must|has|have)\b", re.I)
_AT_MOST, _ADDRESS = re.compile(r"at most (\d+) words"), re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_FORMS = {"integer": r"-?\d+", "number": r"-?\d+(?:\.\d+)?", "boolean": "true|false", "date": r"\d{4}-\d\d-\d\d"}
_SUM = re.compile(r"(what(?:'s| is) |calculate )?([-\d .+*/×÷()]*\d ?[-+*/×÷][-\d .+*/×÷()]*\d\)*)( ?=)?[ ?.!]*", re.I)
_NO_SUM = re.compile(r"\d+([-/])\d+\1\d+|\(\d+\) ?[\d-]+")  # a date, or a telephone number


def respond(prompt: Prompt) -> tuple[dict[str, Any], tuple[str, dict[str, Any]] | None]:
    """A value for each output field, None if it stays open, and the tool that is called beside them, if one is."""
    answerer = _Answerer(prompt)
    if not prompt.is_native and not {"next_tool_name", "tool_calls"} & prompt.outputs.keys():
        return answerer.fields(prompt.outputs), None
    thought, tool, args = answerer.call()
    move = {"next_tool_name": tool, "next_tool_args": args, "tool_calls": [{"name": tool, "args": args}]}
    return {name: move.get(name, thought) for name in prompt.outputs}, (tool, args) if prompt.is_native else None


class _Answerer:
    """`question` is what is asked; `texts` are the inputs that are there to be read."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.given = given = {n: v[:MAX_VALUE] for n, v in prompt.values.items() if v and n not in NO_TEXTS}
        asking = [name for name in given if _QUESTION.search(name) or prompt.tools or prompt.steps]
        asking = asking or [name for name, value in given.items() if value.endswith("?")]
        self.question = "\n".join(given[name] for name in asking)
        self.texts = [text for name, value in given.items() if name not in asking for text in texts_of(value)]
        self.words = content_words(self.question)
        steps = [step for step in prompt.steps if step.tool not in ("finish", "submit")]
        self.useful = [step for step in steps if not _NOTHING.match(step.observation)]
        self.failed = next((step.observation[:200] for step in steps if _FAILED.match(step.observation)), "")
        self.problems = prompt.values.get(PROBLEMS, "")
        self.guessed: list[str] = []

    def call(self) -> tuple[str, str, dict[str, Any]]:
        """The next turn: a thought, a tool that was not called yet, and its arguments; or the end of the loop."""
        tools = {tool.name: tool for tool in self.prompt.tools if tool.name != "finish"}
        submit = tools.pop("submit", None)
        for thought, tool, given in self._calls(list(tools.values())):
            args = {name: given.get(_role(name), self.prompt.values.get(name)) for name in tool.args}
            is_new = all(step.tool != tool.name for step in self.prompt.steps)
            if is_new and all(args[name] is not None or "default" in tool.args[name] for name in args):
                return thought, tool.name, {name: value for name, value in args.items() if value is not None}
        return "I answer from what I have found.", *(("submit", self.fields(submit.args)) if submit else ("finish", {}))

    def _calls(self, tools: list[Tool]) -> Iterator[tuple[str, Tool, dict[str, Any]]]:
        """The calls that make sense, in their order: what the question is about, or a search and then a look."""
        roles: dict[str, Tool] = {}
        for tool in reversed(tools):
            fits = [role for role, said in _DESCRIBED.items() if re.search(said, f"{tool.name} {tool.desc}", re.I)]
            roles |= {role: tool for name in tool.args if (role := _role(name)) in fits}
        if "sum" in roles and (sum_ := _sum_in(self.question)):
            yield f"I calculate {sum_}.", roles["sum"], {"sum": sum_}
            return
        names = [tool.name.replace("_", " ") for tool in tools]
        index = Index((f"{name} {tool.desc}", name) for name, tool in zip(names, tools, strict=True))
        hits = [index.search([word], column) for word in self.words for column in ("body", "around")]
        for at, tool in enumerate(tools):
            if 2 * sum(at in hit for hit in hits) > len(self.words) and tool not in roles.values():
                yield f"The question is about what {tool.name} gives, so I call it.", tool, {}
                return
        if "query" in roles and self.words:
            yield f"I search for: {', '.join(self.words)}.", roles["query"], {"query": " ".join(self.words)}
        places = [item for step in self.useful for item in sentences(step.observation) if item.file]
        if places and "file" in roles:
            yield f"I read {places[0].file} around line {places[0].line}.", roles["file"], places[0]._asdict()

    def fields(self, outputs: dict[str, Schema]) -> dict[str, Any]:
        """A value for each of `outputs`; None: it stays open."""
        texts = [name for name, schema in outputs.items() if schema.get("type") == "string" and "format" not in schema]
        said = [name for name in texts if not _GIST.search(name) and not _NUMBERED.fullmatch(name)]
        main = next((name for name in said if _ANSWER.search(name)), next(iter(said[::-1]), ""))
        values: dict[str, Any] = {n: None if n in texts else self._value(n, schema) for n, schema in outputs.items()}
        values |= {name: self._corrected(name, self._text(name, is_main=name == main)) for name in texts}
        if not main:  # a reply that cannot be read is better than a wrong value
            return values | dict.fromkeys(self.guessed, f"{CANNOT_TELL}.")
        guesses = [f"{CANNOT_TELL} {name}: what stands there is a guess." for name in self.guessed]
        return values | {main: "\n\n".join([values[main], *guesses, NOTE])}

    def _value(self, name: str, schema: Schema) -> Any:
        """What is stated for a field that is no text; else None or "unknown", if it can be that; else a guess."""
        definitions = {"$defs": schema.get("$defs", {})}
        options = [_resolved(option, definitions) for option in schema.get("anyOf", [schema])]
        stated = None if f"{name}: " in self.problems else self._stated(name, options[0])
        if stated is not None or {"type": "null"} in options:
            return stated
        match options[0]:
            case {"type": "array", **rest}:
                return self._list(name, _resolved(rest.get("items", {}), definitions))
            case {"properties": parts, **rest}:
                return {part: self._value(part, parts[part] | definitions) for part in rest.get("required", ())}
            case {"enum": choices}:
                unknown = sorted((c for c in choices if _UNKNOWN.fullmatch(str(c))), key=lambda c: c != "unknown")
                self.guessed += [] if unknown else [name]
                return [*unknown, choices[-1]][0]
            case {"type": "boolean" | "integer" | "number" as kind, **rest}:
                self.guessed.append(name)
                return kind != "boolean" and rest.get("minimum", 0)
        return f"{CANNOT_TELL}."

    def _stated(self, name: str, schema: Schema) -> Any:
        """The one value that the inputs state under its name; None: none, or several."""
        kind = str(schema.get("format", schema.get("type")))
        choices: dict[str, Any] = {str(choice).lower(): choice for choice in schema.get("enum", ())}
        forms = "|".join(map(re.escape, choices)) or _FORMS.get(kind, "(?!)")
        label = rf"(?<!not )\b{re.escape(name).replace('_', '[ _-]')} *[:=]{'?' if kind == 'date' else ''} *"
        found = re.findall(rf"{label}({forms})(?![\w-]|[.,:/]\w| or )", "\n".join(self.given.values()), re.I)
        text = found[0].lower() if len(set(found)) == 1 else ""
        return choices.get(text, (text or None) if kind == "date" else loaded(text))

    def _list(self, name: str, items: Schema) -> list[Any]:
        if parts := items.get("properties"):
            found = [item._asdict() | {"question": self.question} for item in self._quotes() if item.file]
            return [{part: item.get(part, item["text"]) for part in parts} for item in found]
        texts = self._questions() if "question" in name else [item.text for item in self._quotes()]
        return texts if items.get("type", "string") == "string" and "enum" not in items else []

    def _text(self, name: str, *, is_main: bool) -> str:
        if number := _NUMBERED.fullmatch(name):
            return self._questions()[: int(number[1])][-1]
        if _GIST.search(name) or is_main:
            return self._answer() if is_main else self._begin()
        return "I look for sentences with the words of the question." if name == "reasoning" else f"{CANNOT_TELL}."

    def _answer(self) -> str:
        lists = [items for text in self.texts if isinstance(items := loaded(text), list)]
        findings = [item for items in lists for item in items if isinstance(item, dict)]
        asked = [value for name, value in self.prompt.values.items() if _NUMBERED.fullmatch(name)]
        if findings or (asked and [] in lists):
            return _written_up(findings, asked)
        if self.texts and not self.question and not any(map(_QUESTION.search, self.prompt.values)):
            return f"Thank you. I have read this: “{self._begin()}” I can add nothing to it."
        if found := self._quotes():
            doubt = ["I cannot say yes or no. The texts say:"] if _YES_OR_NO.match(self.question) else []
            return "\n\n".join(
                doubt + [f"{i.file}, line {i.line}: “{i.text}”".removeprefix(", line 0: ") for i in found]
            )
        said = [step for step in self.useful if not any(item.file for item in sentences(step.observation))]
        if said:
            return "\n\n".join(f"{step.tool}: “{step.observation[:1_000]}”" for step in said)
        if not self.words:
            return "I answer questions about texts. Please ask one with words that I can look for in them."
        nothing = f"no sentence that I have read answers this (I looked for: {', '.join(self.words)})"
        return f"{CANNOT_TELL}: {self.failed or (_sum_in(self.question) and 'no tool here calculates') or nothing}."

    def _questions(self) -> list[str]:
        parts = filter(None, re.split(r"\?+\s*|(?:,| and|, and) (?=(?:wh\w+|how)\b)", self.question.strip()))
        found = [f"{part[0].upper()}{part[1:]}?" for part in parts]
        return found if len(found) > 1 else [self.question]

    def _quotes(self) -> list[Sentence]:
        read = self.texts + [step.observation for step in self.useful]
        return quotes(self.words, self.question, [item for text in read for item in sentences(text)])

    def _begin(self) -> str:
        """The first sentence of the longest text that says something."""
        text = max(reversed(self.texts), key=lambda text: len(text.split()), default=self.question)
        return next((item.text for item in sentences(text) if len(content_words(item.text)) > 1), text[:200].strip())

    def _corrected(self, name: str, text: str) -> str:
        """A text as it was before, without e-mail addresses or shorter if that is what was wrong with it."""
        before = loaded(self.prompt.values.get(PREVIOUS_ANSWER, ""))
        problem = self.problems.partition(f"{name}: ")[2].partition("; ")[0]
        text = str(before.get(name) or text).replace(NOTE, "").strip() if isinstance(before, dict) else text
        if limit := _AT_MOST.search(problem):
            text = " ".join(text.split()[: int(limit[1])])
            text = text.rpartition(",")[0] if 2 * text.rfind(",") > len(text) else text
        return _ADDRESS.sub("[…]", text) if "mail" in problem else text


def _sum_in(question: str) -> str:
    """The expression that is all that `question` asks for ("What is 2 + 3?"); else nothing, also of "24/7"."""
    match = _SUM.fullmatch(re.sub(r"(?<=\d),(?=\d{3}\b)", "", " ".join(question.split())[:200]))
    is_clear = match and (match[1] or match[3] or re.search(r"[+*×÷]|[\d)] [-/] ", match[2]))
    return match[2] if match and is_clear and not _NO_SUM.fullmatch(match[2]) else ""


def _role(argument: str) -> str:
    return next((role for role, names in _ARGUMENTS.items() if re.fullmatch(names, argument, re.I)), "")


def _resolved(schema: Schema, root: Schema) -> Schema:
    return root["$defs"].get(schema.get("$ref", "").rpartition("/")[2], schema)  # type: ignore[no-any-return]


def _written_up(findings: list[dict[str, Any]], asked: list[str]) -> str:
    """Findings, each under the question that it answers: a quote with its place, or else an answer or a problem."""
    paragraphs: dict[str, list[str]] = {question: [] for question in asked}
    for item in findings:
        place = f"“{item['text']}” [{item.get('file')}:{item.get('line')}]" if "text" in item else ""
        said = f"Not answered: {item['problem']}" if item.get("problem") else place or str(item.get("answer"))
        said = said.replace(NOTE, "").strip() + "\n(supported: no)" * (item.get("supported") is False)
        paragraphs.setdefault(str(item.get("question")), []).append(said)
    shown = {question: list(dict.fromkeys(said)) or ["Nothing was found."] for question, said in paragraphs.items()}
    return "\n\n".join("\n".join([question, *said]) for question, said in shown.items())
