"""docs/mcp.md stays true: every snippet in it is run here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from agentcast.agents.mcp import McpServer, load_servers
from agentcast.agents.mcp.server import named_server

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "mcp.md").read_text()


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_servers_are_described_as_shown():
    named_server.cache_clear()  # which another test may have defined
    names: dict[str, object] = {}
    exec(snippets("python")[0], names)  # noqa: S102 -- our own page
    servers = [value for value in names.values() if isinstance(value, McpServer)]
    assert [server.kind for server in servers] == ["stdio", "http", "in-process", "undefined"]


def test_the_file_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SEARCH_TOKEN", "tok-0123456789")
    file = tmp_path / "mcp.json"
    file.write_text(snippets("json")[0])
    assert [(server.name, server.kind) for server in load_servers(file)] == [("files", "stdio"), ("search", "http")]


def test_the_script_answers():
    assert len(snippets("python")) == 2
    done = subprocess.run(
        [sys.executable, "-c", snippets("python")[1]], cwd=ROOT, capture_output=True, text=True, timeout=50, check=True
    )
    assert "slow client" in done.stdout
