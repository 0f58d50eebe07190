"""Rows of numbers, the machine that they were measured on, and how both are shown."""

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import groupby
from statistics import median
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from benchmarks.goals import Goal

PACKAGES = ("agentcast", "anyio", "orjson", "pydantic", "redis", "starlette", "uvicorn", "uvloop", "websockets")


@dataclass(frozen=True, slots=True)
class Row:
    """One number: the median of `rounds`, in `unit`. `meaning` is a footnote, for people. `goal` is to be reached."""

    group: str
    what: str
    unit: str
    rounds: list[float]
    meaning: str = ""
    goal: Goal | None = None

    @property
    def median(self) -> float:
        return median(self.rounds)


@dataclass(slots=True)
class Report:
    """All that was measured."""

    rows: list[Row] = field(default_factory=list)
    load: float = field(default_factory=lambda: os.getloadavg()[0])
    """How busy the machine was with other things just before."""

    def print(self) -> None:
        console = Console(highlight=False)
        for name, value in {**machine(), "load": f"{self.load:.1f} before"}.items():
            console.print(f"{name:9} {value}", soft_wrap=True)
        for group, rows in groupby(self.rows, key=lambda row: row.group):
            of_group = list(rows)
            console.print(f"\n[bold]{group}[/bold]")
            console.print(_table(of_group))
            notes: dict[str, str] = {}
            for row in of_group:
                notes.setdefault(row.meaning, row.what)
            for meaning in filter(None, notes):
                console.print(f"  {notes[meaning]}: {meaning}", style="dim", soft_wrap=True)
        if self.goals:
            console.print("\n[bold]Goals[/bold]")
            console.print(_goals(self.goals))

    @property
    def goals(self) -> list[tuple[Goal, float]]:
        """The goals of what was measured, each with its measured value."""
        return [(row.goal, row.median) for row in self.rows if row.goal is not None]

    def write(self, path: str) -> None:
        rows = [
            {"group": r.group, "what": r.what, "unit": r.unit, "median": r.median, "rounds": r.rounds}
            for r in self.rows
        ]
        goals = [{**asdict(goal), "measured": value, "met": goal.is_met(value)} for goal, value in self.goals]
        document = {"machine": {**machine(), "load": self.load}, "rows": rows, "goals": goals}
        with open(path, "wb") as file:
            file.write(orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {_processor()}",
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {sys.version.split()[0]}",
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES if _installed(name)),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of `values` are."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("median", justify="right")
    table.add_column("from – to", justify="right", style="dim")
    table.add_column("unit")
    for row in rows:
        spread = f"{_figure(min(row.rounds))} – {_figure(max(row.rounds))}" if len(row.rounds) > 1 else ""
        table.add_row(row.what, _figure(row.median), spread, row.unit)
    return table


def _goals(goals: Sequence[tuple[Goal, float]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in ("before", "goal", "measured"):
        table.add_column(name, justify="right")
    for name in ("unit", "met"):
        table.add_column(name)
    for goal, value in goals:
        bound = f"{'≥' if goal.at_least else '≤'} {goal.bound:g}"
        met = "yes" if goal.is_met(value) else "[red]no[/red]"
        before = "–" if goal.before is None else _figure(goal.before)
        table.add_row(goal.what, before, bound, _figure(value), goal.unit, met)
    return table


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def _installed(name: str) -> bool:
    try:
        version(name)
    except ImportError:
        return False
    return True
