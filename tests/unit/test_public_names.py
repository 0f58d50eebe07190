"""The names of `agentcast` are its whole public interface: this is the list."""

import ast
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import assert_type, get_args

import pytest

import agentcast
import agentcast.agents.events
from agentcast import (
    END,
    Agent,
    AgentSpec,
    AgentTranspiler,
    Emitter,
    Graph,
    ReAct,
    Registry,
    StatefulNode,
    Task,
    ToolError,
    __version__,
    configure,
    connect,
    events,
    mcp_server,
    self_correcting,
    status,
    stream_events,
    streamify,
)
from agentcast.events import Status
from agentcast.server.client import Run

ROOT = Path(__file__).parents[2]
NAMES = {
    "END": END,
    "Agent": Agent,
    "AgentSpec": AgentSpec,
    "AgentTranspiler": AgentTranspiler,
    "Emitter": Emitter,
    "Graph": Graph,
    "ReAct": ReAct,
    "Registry": Registry,
    "StatefulNode": StatefulNode,
    "Task": Task,
    "ToolError": ToolError,
    "__version__": __version__,
    "configure": configure,
    "connect": connect,
    "events": events,
    "mcp_server": mcp_server,
    "self_correcting": self_correcting,
    "status": status,
    "stream_events": stream_events,
    "streamify": streamify,
}
HEAVY = {"anyio", "dspy", "litellm", "mcp", "pydantic", "redis", "rich", "starlette", "typer", "uvicorn", "websockets"}


def modules_after(code: str) -> set[str]:
    """The top-level modules that are loaded in a new process after `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_these_are_all():
    assert set(agentcast.__all__) == set(NAMES)
    assert set(dir(agentcast)) >= set(NAMES)
    assert agentcast.__version__ == version("agentcast")


def test_each_is_described_on_the_page_of_names():
    page = (ROOT / "docs" / "api.md").read_text()
    assert set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == set(NAMES)


def test_all_event_classes_are_under_events():
    facts = {kind.__name__ for union in (events.AgentEvent, events.Event) for kind in get_args(union)}
    assert set(events.__all__) == facts | {"AgentEvent", "Event", "Usage", "Failure", "RunFailure"}
    assert events.Status is agentcast.agents.events.Status


def test_type_checkers_know_them():
    """`make types` checks these; an untyped name would be `Any`."""
    assert_type(Status(message="hello").message, str)
    assert_type(connect("http://127.0.0.1:8000").start("agent", {}), Run)
    assert_type(Graph().description, str)


def test_a_wrong_name_comes_with_a_hint():
    with pytest.raises(AttributeError, match="did you mean 'Registry'"):
        agentcast.Registri  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match=r"agentcast\.events"):
        agentcast.Token  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match=r"it has: .*Registry"):
        agentcast.zzz  # type: ignore[attr-defined]  # noqa: B018


def test_importing_the_package_loads_nothing_heavy():
    assert not modules_after("import agentcast") & HEAVY


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("from agentcast.events import Status", {"dspy", "starlette"}),
        ("from agentcast import connect", {"dspy", "starlette", "rich", "redis", "mcp"}),
        ("from agentcast import Registry, streamify, Graph", {"starlette", "redis", "mcp", "litellm"}),
        ("import agentcast.server.cli.main", HEAVY - {"typer"}),
        ("import agentcast.server.cli.watching", {"dspy", "starlette", "redis", "mcp"}),  # `agentcast run`
        ("import agentcast.server.cli.serving", {"redis", "mcp", "litellm", "httpx"}),  # `agentcast serve`
    ],
)
def test_a_name_loads_only_what_it_needs(code: str, heavy: set[str]):
    assert not modules_after(code) & heavy


def snippets() -> dict[str, str]:
    """What users read and copy: the examples, and the Python in README and docs, by place."""
    found = {str(path): path.read_text() for path in (ROOT / "examples").glob("*.py")}
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for number, snippet in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)):
            found[f"{path}, snippet {number}"] = snippet
    return found


@pytest.mark.parametrize("text", [pytest.param(text, id=Path(place).name) for place, text in snippets().items()])
def test_examples_and_docs_use_public_names_only(text: str):
    used = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            used |= {f"{node.module}.{alias.name}" for alias in node.names}
    public = {"agentcast", *(f"agentcast.{name}" for name in NAMES), *(f"agentcast.events.{n}" for n in events.__all__)}
    assert {name for name in used if name.partition(".")[0] == "agentcast"} <= public


def test_docs_name_nothing_internal_but_where_they_explain_it():
    internal = re.compile(r"agentcast\.(?:agents|server)\b[\w.]*")
    allowed = {
        "api.md": {"agentcast.agents", "agentcast.server"},  # that they are internal
        "mcp.md": {"agentcast.agents.demo.librarian_server"},  # a program, run with `python -m`
        "README.md": {"agentcast.agents.demo.librarian_server"},
    }
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        if path.name != "architecture.md":  # it is about the inside
            assert set(internal.findall(path.read_text())) <= allowed.get(path.name, set()), path.name
