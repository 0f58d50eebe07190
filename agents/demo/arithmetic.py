"""Arithmetic on text, worked out by SQLite instead of `eval`. This module must not know agents, tools or DSPy."""

import re
import sqlite3
from contextlib import closing
from typing import Final

MAX_CHARS: Final = 200

_NUMBER = re.compile(r"\d+(?:\.\d*)?|\.\d+")
_SUM = re.compile(r"[-\d .+*/()]*\d[-\d .+*/()]*")
_SIGNS = str.maketrans(
    {"+": " + ", "-": " - ", "\N{MINUS SIGN}": " - ", "*": " * ", "×": " * ", "·": " * ", "/": " / ", "÷": " / "}
)


def evaluate(expression: str) -> str:
    """The value of `expression`, of numbers, + - * / and brackets, with up to 12 significant digits.

    :raises ValueError: it is something else, too long, or it has no value; the text says which.
    """
    if len(expression) > MAX_CHARS:
        raise ValueError(f"the expression is longer than {MAX_CHARS} characters")
    spaced = expression.translate(_SIGNS).strip()  # "--" would begin a comment
    reals = _NUMBER.sub(lambda number: str(float(number[0])), spaced if _SUM.fullmatch(spaced) else "")
    try:
        with closing(sqlite3.connect(":memory:")) as database:
            (value,) = database.execute(f"SELECT {reals}").fetchone()  # numbers and signs only
    except sqlite3.Error:
        raise ValueError(f"{expression.strip()!r} is not an expression of numbers, + - * / and brackets") from None
    if value is None:
        raise ValueError("division by zero")
    return f"{value + 0.0:.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.12g}"
