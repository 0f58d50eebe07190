"""Arithmetic on text, safely: what people and LMs write as a sum, evaluated without `eval`.

This module must not know agents, tools or DSPy.
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Final

Number = int | float

MAX_CHARS: Final = 200
MAX_NODES: Final = 100
MAX_BITS: Final = 1024
"""Size of the largest integer that may come up, in bits: about 308 decimal digits, as far as floats reach too."""

_OPERATORS: Mapping[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: Mapping[str, Callable[..., Number]] = {
    "abs": abs,
    "max": max,
    "min": min,
    "round": round,
    "sqrt": math.sqrt,
}
_SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "\N{MINUS SIGN}": "-", "\n": " "})


def evaluate(expression: str) -> Number:
    """The value of `expression`: numbers, + - * / // % ** (also written ^), brackets, sqrt, round, min, max, abs.

    :raises ValueError: it is something else, too long, or its value is undefined or too large; the text says which.
    """
    if len(expression) > MAX_CHARS:
        raise ValueError(f"the expression is longer than {MAX_CHARS} characters")
    source = expression.translate(_SPELLINGS).replace("^", "**").strip()
    try:
        tree = ast.parse(source, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{expression.strip()!r} is not an arithmetic expression") from None
    if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
        raise ValueError(f"the expression has more than {MAX_NODES} parts")
    try:
        return _bounded(_value(tree.body))
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except OverflowError:
        raise ValueError("the result is too large") from None


def show(value: Number) -> str:
    """`value` as people write it: whole numbers without a point, others with up to 12 significant digits."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.12g}"
    return str(value)


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _bounded(_OPERATORS[type(op)](_value(left), _value(right)))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _call(name, [_value(argument) for argument in args])
    known = ", ".join(sorted(_FUNCTIONS))
    raise ValueError(f"only numbers, + - * / // % ** ( ) and {known} can be calculated")


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > MAX_BITS:
        raise ValueError("the result is too large")  # before working it out: that may take for ever
    result = base**exponent
    if isinstance(result, complex):
        raise ValueError("a negative number has no such root")
    return _bounded(result)


def _call(name: str, arguments: list[Number]) -> Number:
    if name == "round" and len(arguments) == 2:
        arguments = [arguments[0], int(arguments[1])]
    try:
        return _bounded(_FUNCTIONS[name](*arguments))
    except (TypeError, ValueError):
        given = ", ".join(show(argument) for argument in arguments)
        raise ValueError(f"{name}({given}) has no value") from None


def _bounded(value: Number) -> Number:
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise ValueError("the result is too large")
    elif not math.isfinite(value):
        raise ValueError("the result is too large")
    return value


# -- Sums in prose -------------------------------------------------------------------------------------------------

MAX_PROSE: Final = 1_000
"""Characters of a text in which sums are looked for."""

_NUMBER = r"\d+(?:,\d+)*(?:\.\d+)?"
_WORDS: tuple[tuple[str, str], ...] = (
    (rf"\b(?:the )?square root of ({_NUMBER})", r"sqrt(\1)"),
    (rf"({_NUMBER}) ?(?:%|percent) of ", r"\1 / 100 * "),
    (r"(?<=\d) +(?:times|multiplied by|x) +(?=[\d(])", " * "),
    (r"(?<=\d) +plus +(?=[\d(])", " + "),
    (r"(?<=\d) +minus +(?=[\d(])", " - "),
    (r"(?<=\d) +(?:divided by|over) +(?=[\d(])", " / "),
    (r"(?<=\d) +(?:to the power of|raised to) +(?=[\d(])", " ** "),
    (r"(?<=\d) +squared\b", " ** 2"),
    (r"(?<=\d) +cubed\b", " ** 3"),
)
_LIST = rf"{_NUMBER}(?:(?:, ?and |, ?| and ){_NUMBER})+"
_LIST_OF = re.compile(rf"\b(?:the )?(sum|total|product|average|mean|largest|maximum|smallest|minimum) of ({_LIST})")
_RUN = re.compile(rf"(?<![\w.:/-])(?=\(|-?{_NUMBER}|[smra])(?:(?:sqrt|round|min|max|abs)\(|[\d\s.,+*/%^×÷()-])+")
_CUE = re.compile(r"\b(?:what(?:'s| is)|calculate|compute|evaluate|how much|work out|result of|solve)\b|=", re.I)
_OPERATOR = re.compile(r"[\d)]\s*(?:\*\*|//|[-+*/%^×÷])\s*[\d(s-]|\b(?:sqrt|round|min|max|abs)\(")
_TIGHT = re.compile(r"^[\d,.]+(?:[-/][\d,.]+)+$")


def find_sums(text: str) -> list[str]:
    """The arithmetic expressions in `text`, in order, each one that `evaluate` takes; few words of prose are read too
    ("12 times 7", "15% of 80", "the sum of 3, 4 and 5"). Dates, versions and ranges are not sums."""
    text = text[:MAX_PROSE]
    found = [_list_sum(*match.groups()) for match in _LIST_OF.finditer(text.lower())]
    rest = _LIST_OF.sub(" ", text.lower().replace("\N{MINUS SIGN}", "-"))
    for pattern, replacement in _WORDS:
        rest = re.sub(pattern, replacement, rest)
    asked = bool(_CUE.search(text))
    runs = (part for match in _RUN.finditer(rest) for part in _top_level_parts(match.group()))
    found += [sum_ for run in runs if (sum_ := _trim(run, asked=asked))]
    return list(dict.fromkeys(found))


def _list_sum(kind: str, numbers: str) -> str:
    items = [item.replace(",", "") for item in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", numbers)]
    if kind in ("sum", "total"):
        return " + ".join(items)
    if kind == "product":
        return " * ".join(items)
    if kind in ("average", "mean"):
        return f"({' + '.join(items)}) / {len(items)}"
    return f"{'max' if kind in ('largest', 'maximum') else 'min'}({', '.join(items)})"


def _top_level_parts(run: str) -> list[str]:
    """`run` parted at the commas between sums; those inside brackets, or inside a number, stay."""
    parts, depth = [""], 0
    for at, character in enumerate(run):
        depth += (character == "(") - (character == ")")
        if character == "," and depth <= 0 and not run[at + 1 : at + 2].isdigit():
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _trim(run: str, *, asked: bool) -> str:
    """The longest start of `run` that is a sum; empty if there is none."""
    run = run[:MAX_CHARS].strip()
    if "(" not in run:
        run = re.sub(r"(?<=\d),(?=\d{3}\b)", "", run)
    while run:
        if _OPERATOR.search(run) and (asked or not _TIGHT.match(run)):
            try:
                evaluate(run)
            except ValueError as error:
                if "is not an arithmetic" not in str(error):
                    return run  # a sum, though one without a value: whoever evaluates it says so
            else:
                return run
        run = run[:-1].rstrip()
    return ""
