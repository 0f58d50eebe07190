"""What a request of DSPy asks for, read back into data: it knows the Chat, JSON and XML adapters, and native tools."""

import ast
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from dspy.lm15 import FunctionTool, Request, TextPart, ToolResultPart

Schema = dict[str, Any]

_FIELD = re.compile(r"^\d+\. `(\w+)` \(", re.M)
_TOOL = re.compile(
    r"^\s*(?:\(\d+\) )?(\S+?)(?:, whose description is <desc>(.*)</desc>)?\. It takes arguments (\{.*?\})\."
    r"(?: This JSON Schema applies to them as well: .*)?$",
    re.M,
)
_JSON = "Outputs will be a JSON object with the following fields."
_CHOICE = re.compile(r"must (?:exactly match \(no extra characters\)|be) one of: (.*)")
_PLAIN = {"True or False": "boolean", "a single int value": "integer", "a single float value": "number"}


class Tool(NamedTuple):
    name: str
    desc: str
    args: dict[str, Schema]  # one with a `default` may be left out


class Step(NamedTuple):
    tool: str
    observation: str


class Prompt(NamedTuple):
    """`form` is "chat", "json" or "xml"; `is_native`: tools are called beside the text. `outputs` is empty if the
    request is none of DSPy's."""

    form: str
    is_native: bool
    values: dict[str, str]
    outputs: dict[str, Schema]
    tools: list[Tool]
    steps: list[Step]


def parse(request: Request) -> Prompt:
    system = request.system if isinstance(request.system, str) else _text(request.system or ())
    head, _, objective = system.partition("In adhering to this structure, your objective is:")
    declared, _, structure = head.partition("All interactions will be structured in the following way")
    inputs, outputs = (_FIELD.findall(part) for part in declared.partition("Your output fields are:\n")[::2])
    form = "json" if _JSON in structure else "chat" if "[[ ## completed ## ]]" in structure else "xml"
    template = loaded(structure.partition(_JSON)[2])
    head = "\n".join(map(str, template.values())) if isinstance(template, dict) else head
    values, steps = _turn(request, inputs, form)
    listed = "\n".join([objective, *texts_of(values.pop("tools", ""))])
    allowed = request.config.tool_choice.allowed if request.config.tool_choice else ()
    native = [_native(tool) for tool in request.tools if isinstance(tool, FunctionTool)]
    native = [tool for tool in native if not allowed or tool.name in allowed]
    schemas = {name: _schema(name, head) for name in outputs}
    return Prompt(form, bool(native), values, schemas, native or tools_in(listed), steps)


def tools_in(text: str) -> list[Tool]:
    """The tools that a prompt lists."""
    found = ((name, desc, _read(ast.literal_eval, args)) for name, desc, args in _TOOL.findall(text))
    return [Tool(name, desc, args) for name, desc, args in found if isinstance(args, dict)]


def texts_of(value: str) -> list[str]:
    """The texts that an input gives: the items of a list of texts, else the input itself."""
    items = loaded(value)
    return items if isinstance(items, list) and items and all(isinstance(item, str) for item in items) else [value]


def loaded(text: str) -> Any:
    """`text` read as JSON; None if it is none."""
    return _read(json.loads, text)


def _read(read: Callable[[str], Any], text: str) -> Any:
    try:
        return read(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _native(tool: FunctionTool) -> Tool:
    args, needed = tool.parameters.get("properties", {}), tool.parameters.get("required", ())
    args = {name: arg if name in needed else {"default": None} | arg for name, arg in args.items()}
    return Tool(tool.name, tool.description or "", args)


def _text(parts: Iterable[Any]) -> str:
    return "".join(part.text for part in parts if isinstance(part, TextPart))


def _turn(request: Request, inputs: list[str], form: str) -> tuple[dict[str, str], list[Step]]:
    """The inputs of the last turn of the conversation, and the tools that were called since."""
    values: dict[str, str] = {}
    steps: list[Step] = []
    for message in request.messages:
        text = _text(message.parts) if message.role == "user" else ""
        found = _sections(text.rpartition("\n\nRespond with ")[0] or text, inputs, form)
        if found.keys() - {"tools"}:
            values, steps = {}, []
        values |= found
        match loaded(text.partition("\n")[2].removesuffix("</tool_call_results>")):
            case {"tool_call_results": [*results]}:  # of ReActV2, called in text
                steps += [Step(str(result.get("name")), str(result.get("value"))) for result in results]
        steps += [Step(part.name or "", _text(part.content)) for part in message.parts_of(ToolResultPart)]
    trajectory = values.pop("trajectory", "")  # of ReAct; its first steps may have been left out
    numbers = list(dict.fromkeys(re.findall(r"^(?:<|\[\[ ## )thought_(\d+)", trajectory, re.M)))
    parts = [f"{part}_{n}" for n in numbers for part in ("thought", "tool_name", "tool_args", "observation")]
    taken = list(_sections(trajectory, parts, form).values())
    return values, [Step(*step) for step in zip(taken[1::4], taken[3::4], strict=False)] + steps


def _sections(text: str, names: Iterable[str], form: str) -> dict[str, str]:
    """The values of the fields `names`. A header counts only where its field is due: values may hold others."""
    found: dict[str, str] = {}
    current, rest = "", f"\n{text}\n"
    for name in names:
        before, header, after = rest.partition(f"\n<{name}>\n" if form == "xml" else f"\n[[ ## {name} ## ]]\n")
        if header:
            found[current], current, rest = before, name, f"\n{after}"
    found[current] = rest
    return {name: value.strip().removesuffix(f"</{name}>").strip() for name, value in found.items() if name}


def _schema(name: str, head: str) -> Schema:
    if nested := re.search(f"^<{name}>.+</{name}>$", head, re.M):  # in XML, which names parts but not their types
        annotation = re.search(rf"^\d+\. `{name}` \((.*?)\):", head, re.M)
        found = _nested(_read(ET.fromstring, nested[0]), annotation[1] if annotation else "")
        return {"anyOf": [found, {"type": "null"}]} if annotation and "NoneType" in annotation[1] else found
    note = re.search(rf"\{{{name}\}} +# note: the value you produce (.*)", head)
    said = note[1] if note else ""
    if choice := _CHOICE.match(said):
        return {"enum": choice[1].split("; ")}
    if not said.startswith("must adhere"):
        return {"type": _PLAIN.get(said.removeprefix("must be "), "string")}
    schema = loaded(said.partition("schema: ")[2])
    return schema if isinstance(schema, dict) else {}


def _nested(element: ET.Element | None, annotation: str = "") -> Schema:
    children = {child.tag: _nested(child) for child in (() if element is None else element)}
    if "item" in children:
        return {"type": "array", "items": children["item"] or {"type": "string" if "str" in annotation else "other"}}
    return {"type": "object", "properties": children, "required": list(children)} if children else {}
