"""`agentcast doctor`: what it finds, what it says to do, and what it never prints (G9)."""

import json
import sys
from pathlib import Path

import anyio
import pytest

from tests.support.forking import run_agentcast
from tests.support.lms import chat
from tests.support.mcp import RAW
from tests.support.openai import Hang, Provider, Refuse, Say, provider
from tests.support.process import ROOT, environment, serve
from tests.support.redis import running_redis

MODEL = "openai/gpt-5-mini"
KEY = "sk-not-to-be-seen-anywhere"
SAID = Say(chat(answer="2"))


async def doctor(*arguments: str, folder: Path = ROOT, **settings: str) -> tuple[int, list[str]]:
    """Its exit code and what it prints."""
    with anyio.fail_after(50):
        env = environment(offline_delay="0", **settings)
        done = await run_agentcast("doctor", "--port", "0", *arguments, env=env, cwd=folder)
    text = done.stdout
    assert KEY not in text + done.stderr
    assert "Traceback" not in text + done.stderr
    assert "\x1b" not in text
    return done.returncode, text.splitlines()


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)


def reach(served: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{served.url}/v1")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", served.url)
    monkeypatch.setenv("OLLAMA_API_BASE", served.url)


async def test_the_demo_is_well_without_any_settings() -> None:
    code, lines = await doctor()
    assert code == 0
    assert [line[:13].split() for line in lines] == [
        ["✓", "registry"],
        ["✓", "model"],
        ["–", "redis"],
        ["✓", "mcp"],
        ["✓", "port"],
    ]
    assert "agentcast.agents.demo:registry: researcher, librarian, report, swarm, triage" in lines[0]
    assert "offline (the default) answered" in lines[1]


async def test_mcp_servers_are_tried(tmp_path: Path) -> None:
    config = tmp_path / "mcp.json"
    config.write_text('{"mcpServers": {"files": {"command": "no-such-program-here"}}}')
    code, lines = await doctor("--mcp-config", str(config))
    assert code == 1
    assert "✓ mcp         library (stdio) has 3 tools" in lines
    assert "✗ mcp         files (stdio): cannot run 'no-such-program-here': No such file or directory" in lines
    config.write_text('{"mcpServers": {"files": {"cmd": "x"}}}')
    code, lines = await doctor("--mcp-config", str(config))
    assert code == 1
    assert f"✗ mcp         {config}: mcpServers.files.cmd: this key is not known" in lines


async def test_tools_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    script, config = tmp_path / "script", tmp_path / "mcp.json"
    script.write_text(json.dumps({"replies": {}, "tools": [{}, {"name": "a"}, {"name": "b", "inputSchema": {}}]}))
    config.write_text(
        json.dumps({"mcpServers": {"raw": {"command": sys.executable, "args": ["-P", RAW, str(script)]}}})
    )
    code, lines = await doctor("--mcp-config", str(config))
    assert code == 0
    at = lines.index("✓ mcp         raw (stdio) has 2 tools")
    assert lines[at + 1 : at + 3] == [
        "– mcp         raw: entry 1 of its list of tools is left out: it has no name",
        "– mcp         raw: the arguments of tool 'a' are not checked: it has no inputSchema",
    ]


async def test_every_model_is_called_once(monkeypatch: pytest.MonkeyPatch, key: None) -> None:
    async with provider(SAID) as served:
        reach(served, monkeypatch)
        code, lines = await doctor("--agents", "tests.support.modelled:registry", lm=MODEL)
    assert code == 0
    default, other, several = (line for line in lines if "model " in line)
    assert f"{MODEL} (the default) answered in " in default
    assert "(11 + 7 tokens, $0.0000" in default
    assert "anthropic/claude-sonnet-4-5 (of agent other) answered" in other
    assert "ollama/llama3.2 (of agent several) answered" in several
    assert len(served.requests) == 3


@pytest.mark.parametrize(
    ("answer", "problem", "remedy"),
    [
        (Refuse(401, f"no such key {KEY}"), "does not accept the key", "check OPENAI_API_KEY"),
        (Refuse(404), "does not know this model", "check the model's name and the base URL"),
        (Refuse(503), "the provider failed (503)", "try again"),
        (Hang(), "was silent for too long", "raise AGENTCAST_LM_IDLE"),
    ],
    ids=["key", "model", "outage", "silence"],
)
async def test_a_model_that_fails_fails_it_and_the_other_checks_are_made(
    answer: Refuse | Hang, problem: str, remedy: str, monkeypatch: pytest.MonkeyPatch, key: None
) -> None:
    async with provider(answer) as served:
        reach(served, monkeypatch)
        code, lines = await doctor(lm=MODEL, lm_idle="0.5")
    assert code == 1
    assert len(served.requests) == 1
    (at,) = (number for number, line in enumerate(lines) if line.startswith("✗"))
    assert problem in lines[at]
    assert MODEL in lines[at]
    assert lines[at + 1].startswith("    ")
    assert remedy in lines[at + 1]
    assert lines[-1].startswith("✓ port")


async def test_an_answer_in_another_form_is_reported(monkeypatch: pytest.MonkeyPatch, key: None) -> None:
    async with provider(Say("Two, of course!")) as served:
        reach(served, monkeypatch)
        code, lines = await doctor(lm=MODEL)
    assert code == 0
    assert any("not in the form asked for" in line for line in lines)


async def test_a_model_that_nobody_serves_and_a_missing_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    code, lines = await doctor(lm=MODEL)
    assert code == 1
    assert "    set OPENAI_API_KEY where the hub runs" in lines
    code, lines = await doctor(lm="nowhere/model-1")
    assert code == 1
    assert any("✗ model" in line and "no provider is known by that name" in line for line in lines)


async def test_registries_are_checked_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    code, lines = await doctor("--agents", "broken:registry,agents.demo:registry", folder=tmp_path)
    assert code == 1
    assert lines[0].startswith("✗ registry    broken:registry: ")
    assert "nothing_of_that_name" in lines[0]
    assert lines[1] == "    install that package"
    assert lines[2].startswith("✓ registry    agents.demo:registry")


async def test_a_port_that_is_taken_by_a_hub_is_fine_and_by_another_is_not() -> None:
    async with serve() as hub:
        port = hub.url.rpartition(":")[2]
        code, lines = await doctor("--port", port)
        assert code == 0
        assert lines[-1] == f"✓ port        a hub is running at 127.0.0.1:{port}, with 7 agents"
    async with provider(SAID) as served:
        code, lines = await doctor("--port", str(served.port))
    assert code == 1
    assert lines[-2].startswith(f"✗ port        cannot listen on 127.0.0.1:{served.port}: ")
    assert "choose another --port" in lines[-1]


async def test_redis_is_tried() -> None:
    with running_redis() as redis:
        code, lines = await doctor("--redis", redis.url)
        assert code == 0
        assert lines[2].startswith("✓ redis       Redis ")
    code, lines = await doctor(redis=redis.url.replace("://", f"://user:{KEY}@"))
    assert code == 1
    assert lines[2].startswith("✗ redis       cannot reach Redis at ")
    assert lines[3] == "    start it, or fix --redis or AGENTCAST_REDIS"


async def test_wrong_settings_are_wrong_usage() -> None:
    code, _ = await doctor(lm_attempts="0")
    assert code == 2
