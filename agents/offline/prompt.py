"""What a prompt in DSPy's Chat (or JSON) format asks for, read back into fields, values, tools and steps.

The offline model sees what any model sees: text. This module turns that text into data and decides nothing.
"""

import ast
import json
import re
import textwrap
from dataclasses import dataclass, field
from typing import Any

TRAJECTORY = "trajectory"
"""The input field in which a ReAct loop gives its turns so far."""
PREVIOUS_ANSWER, PROBLEMS = "previous_answer", "problems"
"""The input fields in which an answer that was rejected comes back, with what is wrong with it."""
MAX_VALUE = 60_000
"""Characters of an input that are read."""

_FIELD = re.compile(r"^\d+\. `(\w+)` \((.+?)\):[ ]?(.*)$")
_NOTE = re.compile(r"^\{(\w+)\}\s+# note: the value you produce (.*)$", re.M)
_TOOL = re.compile(
    r"^\(\d+\) (\S+?)(?:, whose description is <desc>(.*)</desc>)?\. It takes arguments (\{.*?\})\."
    r"(?: This JSON Schema applies to them as well: .*)?$",
    re.M,
)
_STEP = re.compile(r"^\[\[ ## (thought|tool_name|tool_args|observation)_(\d+) ## \]\]$", re.M)
_OBJECTIVE = "In adhering to this structure, your objective is:"
_INPUTS, _OUTPUTS = "Your input fields are:\n", "Your output fields are:\n"
_STRUCTURE = "All interactions will be structured in the following way"
_JSON_OUTPUTS = "Outputs will be a JSON object with the following fields."
_CHAT_TAIL, _JSON_TAIL = "\n\nRespond with the corresponding output fields,", "\n\nRespond with a JSON object"
_CHOICE_NOTES = ("must exactly match (no extra characters) one of: ", "must be one of: ")
_SCHEMA_NOTE = "must adhere to the JSON schema: "
_CONSTRAINTS = re.compile(r"^Constraints: (.*)$", re.M)
_LIMITS = (
    (re.compile(r"greater than or equal to: (-?[\d.]+)"), "minimum"),
    (re.compile(r"less than or equal to: (-?[\d.]+)"), "maximum"),
    (re.compile(r"minimum length: (\d+)"), "minItems"),
    (re.compile(r"maximum length: (\d+)"), "maxItems"),
)
_PLAIN_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}


@dataclass(frozen=True)
class Field:
    """A field of the signature. `schema` is its JSON Schema, as far as the prompt tells."""

    name: str
    desc: str = ""
    schema: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tool:
    name: str
    desc: str
    args: dict[str, Any]
    """JSON Schema of each argument; one with a `default` may be left out."""


@dataclass(frozen=True)
class Step:
    """One turn of a ReAct trajectory."""

    thought: str
    tool: str
    args: dict[str, Any]
    observation: str


@dataclass(frozen=True)
class Rejection:
    """An answer that was given before, and what is wrong with it."""

    answer: str
    problems: str


@dataclass(frozen=True)
class Prompt:
    inputs: tuple[Field, ...]
    outputs: tuple[Field, ...]
    values: dict[str, str]
    """What the user's message gives for each input field (the trajectory and a rejected answer left out)."""
    objective: str = ""
    tools: tuple[Tool, ...] = ()
    steps: tuple[Step, ...] = ()
    rejection: Rejection | None = None
    as_json: bool = False
    """The answer is to be one JSON object instead of marked sections."""

    @property
    def is_act(self) -> bool:
        """Whether this asks a ReAct agent for its next tool call."""
        names = {output.name for output in self.outputs}
        return {"next_thought", "next_tool_name", "next_tool_args"} <= names


def parse(system: str, user: str) -> Prompt:
    """Read a prompt. What is not in the expected format comes out as no fields and no values."""
    head, _, objective = system.partition(_OBJECTIVE)
    declared, _, structure = head.partition(_STRUCTURE)
    inputs_text, _, outputs_text = declared.partition(_OUTPUTS)
    as_json = _JSON_OUTPUTS in structure
    notes = _json_notes(structure) if as_json else dict(_NOTE.findall(structure))
    inputs = _fields(inputs_text.partition(_INPUTS)[2], {})
    values = _values(inputs, user, as_json=as_json)
    trajectory, rejection = values.pop(TRAJECTORY, ""), _rejection(values)
    objective = textwrap.dedent(objective.strip("\n")).strip()
    return Prompt(
        inputs=inputs,
        outputs=_fields(outputs_text, notes),
        values=values,
        objective=objective,
        tools=tuple(_tool(*match) for match in _TOOL.findall(objective)),
        steps=tuple(_steps(trajectory)),
        rejection=rejection,
        as_json=as_json,
    )


def texts_of(value: str) -> list[str]:
    """The texts that an input gives: the items of a list of texts, else the input itself."""
    if value.startswith("["):
        try:
            items = json.loads(value)
        except (ValueError, RecursionError):
            return [value]
        if items and all(isinstance(item, str) for item in items):
            return items  # type: ignore[no-any-return]
    return [value]


def _rejection(values: dict[str, str]) -> Rejection | None:
    """Taken out of `values`, where it would be read as something to answer from."""
    if not {PREVIOUS_ANSWER, PROBLEMS} <= values.keys():
        return None
    return Rejection(values.pop(PREVIOUS_ANSWER), values.pop(PROBLEMS))


def _fields(text: str, notes: dict[str, str]) -> tuple[Field, ...]:
    found: list[tuple[str, str, str]] = []
    for line in text.splitlines():
        if match := _FIELD.match(line):
            found.append((match[1], match[2], match[3]))
        elif found:  # a description of several lines
            name, kind, desc = found[-1]
            found[-1] = name, kind, f"{desc}\n{line}"
    return tuple(
        Field(name, _CONSTRAINTS.sub("", desc).strip(), {**_limits(desc), **_schema(kind, notes.get(name, ""))})
        for name, kind, desc in found
    )


def _limits(desc: str) -> dict[str, Any]:
    """The constraints that stand below a description, as JSON Schema has them."""
    stated = _CONSTRAINTS.search(desc)
    found = ((key, pattern.search(stated[1])) for pattern, key in _LIMITS) if stated else ()
    return {key: float(match[1]) if "Items" not in key else int(match[1]) for key, match in found if match}


def _schema(kind: str, note: str) -> dict[str, Any]:
    for start in _CHOICE_NOTES:
        if note.startswith(start):
            return {"enum": note.removeprefix(start).split("; ")}
    if note.startswith(_SCHEMA_NOTE):
        try:
            schema = json.loads(note.removeprefix(_SCHEMA_NOTE))
        except ValueError:
            return {}
        return schema if isinstance(schema, dict) else {}
    return {"type": _PLAIN_TYPES[kind]} if kind in _PLAIN_TYPES else {}


def _json_notes(structure: str) -> dict[str, str]:
    start = structure.partition(_JSON_OUTPUTS)[2].strip()
    try:
        template, _ = json.JSONDecoder().raw_decode(start)
    except ValueError:
        return {}
    return dict(_NOTE.findall("\n".join(text for text in template.values() if isinstance(text, str))))


def _values(inputs: tuple[Field, ...], user: str, *, as_json: bool) -> dict[str, str]:
    """The sections of the user's message. A header counts only where the next field is due: values may hold others."""
    body = user.rpartition(_JSON_TAIL if as_json else _CHAT_TAIL)[0] or user
    starts: list[tuple[str, int, int]] = []
    position = 0
    for item in inputs:
        if match := re.compile(rf"^\[\[ ## {item.name} ## \]\]$", re.M).search(body, position):
            starts.append((item.name, match.start(), match.end()))
            position = match.end()
    ends = [*(start for _, start, _ in starts), len(body)][1:]
    values = {name: body[begin:end].strip() for (name, _, begin), end in zip(starts, ends, strict=False)}
    return {name: value if name == TRAJECTORY else value[:MAX_VALUE] for name, value in values.items()}


def _tool(name: str, desc: str, args: str) -> Tool:
    try:
        parsed = ast.literal_eval(args)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        parsed = {}
    return Tool(name, re.sub(r"\s+", " ", desc).strip(), parsed if isinstance(parsed, dict) else {})


def _steps(trajectory: str) -> list[Step]:
    """The turns so far. Headers inside an observation are text: only the one that is due next counts."""
    parts = ("thought", "tool_name", "tool_args", "observation")
    sections: list[tuple[int, int]] = []
    index: int | None = None
    for match in _STEP.finditer(trajectory):
        number = int(match[2])
        due = parts[len(sections) % 4]
        if match[1] == due and (index is None or number == index + (due == "thought")):
            index = number
            sections.append((match.start(), match.end()))
    ends = [*(start for start, _ in sections), len(trajectory)][1:]
    texts = [trajectory[begin:end].strip() for (_, begin), end in zip(sections, ends, strict=False)]
    return [
        Step(texts[at], texts[at + 1], _arguments(texts[at + 2]), texts[at + 3]) for at in range(0, len(texts) - 3, 4)
    ]


def _arguments(text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}
