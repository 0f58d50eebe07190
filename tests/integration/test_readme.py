"""README stays true: every snippet in it is run here, as it stands there."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal

from tests.support.forking import agentcast, fork
from tests.support.lms import chat
from tests.support.openai import Provider, Say, provider
from tests.support.redis import free_port

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
AGENTCAST = str(Path(sysconfig.get_path("scripts")) / "agentcast")
DEFAULT_URL = "http://127.0.0.1:8000"


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def python(holding: str) -> str:
    """The one snippet that holds this."""
    (found,) = (snippet for snippet in snippets("python") if holding in snippet)
    return found


def commands() -> list[str]:
    """Every shell command of README, without comments, continued lines joined."""
    lines = "\n".join(snippets("sh")).replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readme")
    (path / "my_agents.py").write_text(python("countdown(start"))
    (path / "notes.py").write_text(python("AgentTranspiler"))
    (path / "my_mcp_agents.py").write_text(python("mcp_server"))
    (path / "client.py").write_text(python("connect("))
    return path


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "AGENTCAST_OFFLINE_DELAY": "0", "NO_COLOR": "1", **variables}


def serve(folder: Path, command: str, **variables: str) -> Iterator[tuple[str, str]]:
    """Run README's command on a free port. Gives the URL and the banner, and stops the hub afterwards."""
    words = shlex.split(command)
    assert words[0] == "agentcast"
    hub = fork(agentcast, *words[1:], "--port", "0", env=environment(**variables), cwd=folder, stderr=2)
    with open(hub.stdout) as stdout:
        try:
            banner = "".join(iter(stdout.readline, "  stop    Ctrl-C\n"))
            url = re.search(r"http://\S+", banner)
            assert url is not None, banner
            yield url[0], banner
        finally:
            hub.process.terminate()
            hub.process.join(20)
            assert hub.process.exitcode == 0


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[str]:
    command = next(line for line in commands() if line == "agentcast serve --agents my_agents:registry")
    for url, banner in serve(folder, command):
        assert "summarizer, editor, countdown" in banner
        yield url


@pytest.fixture
def deployed(folder: Path) -> Iterator[list[str]]:
    """The URLs of README's two hubs over one Redis, all on free ports instead of its own."""
    lines = [line for line in commands() if line.startswith("redis-server") or "--redis" in line]
    ports = {port: str(free_port()) for port in re.findall(r"(?<=--port )\d+", " ".join(lines))}
    assert len(lines) == len(ports) == 3
    text = re.sub("|".join(ports), lambda found: ports[found[0]], "\n".join(lines))
    processes = []
    try:
        for line in text.splitlines():
            program, *words = shlex.split(line)
            arguments = [AGENTCAST if program == "agentcast" else program, *words]
            process = subprocess.Popen(arguments, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True)
            processes.append(process)
            assert process.stdout is not None
            assert any("Ready to accept" in printed or "stop    Ctrl-C" in printed for printed in process.stdout), line
        yield [f"http://127.0.0.1:{port}" for port in list(ports.values())[1:]]
    finally:
        for process in reversed(processes):
            process.terminate()
            process.communicate(timeout=20)


def test_two_hubs_over_one_redis_show_the_same_runs(deployed: list[str]):
    words = [AGENTCAST, "run", "countdown", "start=2", "--json", "--url", deployed[0]]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=30, check=True)
    run = json.loads(done.stdout.splitlines()[-1])["run"]
    for url in deployed:
        with urllib.request.urlopen(f"{url}/v1/runs/{run}", timeout=10) as response:  # noqa: S310
            assert json.load(response)["state"]["result"] == "lift-off"


def test_every_snippet_is_covered_here():
    known = ("make ", "AGENTCAST_LM=", "agentcast ", "curl ", "redis-server ")
    assert all(line.startswith(known) for line in commands())
    assert len(snippets("python")) == 5


def test_the_examples_are_those_of_the_readme():
    for name, holding in (
        ("my_agents.py", "countdown(start"),
        ("notes.py", "AgentTranspiler"),
        ("my_mcp_agents.py", "mcp_server"),
        ("client.py", "connect("),
    ):
        assert (ROOT / "examples" / name).read_text() == python(holding)


def test_the_graph_runs(folder: Path):
    done = subprocess.run(
        [sys.executable, "notes.py"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("clean has set {'article': 'One hub serves many clients.")
    assert "count has set {'words': 10}" in lines
    assert "check has set {'short': True}" in lines
    assert any("One hub serves many clients" in line for line in lines[4:])


def test_the_graph_is_served(folder: Path):
    command = " ".join(next(word for word in re.findall(r"`(agentcast\s+serve --agents notes[^`]+)`", README)).split())
    for url, banner in serve(folder, command):
        assert "notes" in banner
        with urllib.request.urlopen(f"{url}/v1/agents", timeout=10) as response:  # noqa: S310
            (agent,) = json.load(response)["agents"]
        assert [node["name"] for node in agent["graph"]["nodes"]] == ["clean", "summarize", "count", "check"]
        done = subprocess.run(
            [AGENTCAST, "run", "notes", "article=One hub serves many clients.", "--url", url, "--json"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        assert json.loads(done.stdout.splitlines()[-1])["result"]["words"] == 5


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", README)) - {"it"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize(
    ("agent", "input", "expected"),
    [
        ("summarizer", {"text": "One hub serves many clients. They all see every event."}, "summary"),
        ("editor", {"question": "How many words has 'to be or not to be'?"}, "answer"),
        ("countdown", {"start": 2}, None),
    ],
)
def test_the_agents_run(hub: str, agent: str, input: dict[str, object], expected: str | None):
    words = [f"{name}={value}" for name, value in input.items()]
    done = subprocess.run(
        [AGENTCAST, "run", agent, *words, "--url", hub, "--json"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["event"] == "run_end"
    assert last["result"] == "lift-off" if expected is None else last["result"][expected]


@pytest.mark.parametrize(
    "command", [line for line in commands() if line.startswith(("agentcast agents", "agentcast run"))]
)
def test_the_terminal_commands_work(hub: str, command: str):
    words = shlex.split(command)[1:]
    done = subprocess.run(
        [AGENTCAST, *words, "--url", hub], env=environment(), capture_output=True, text=True, timeout=30, check=True
    )
    assert ("countdown" if words[0] == "agents" else "lift-off") in done.stdout


def test_the_client_sees_the_run_to_its_end(hub: str, folder: Path):
    client = (folder / "client.py").read_text()
    assert DEFAULT_URL in client
    done = subprocess.run(
        [sys.executable, "-c", client.replace(DEFAULT_URL, hub)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "status 3…" in done.stdout
    assert done.stdout.splitlines()[-1] == "lift-off"


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("curl")])
def test_the_http_requests_are_answered(hub: str, command: str):
    words = shlex.split(command)
    options = dict(itertools.pairwise(words))
    url = next(word for word in words if word.startswith(DEFAULT_URL)).replace(DEFAULT_URL, hub)
    name, _, value = options.get("-H", "Accept: */*").partition(": ")
    body = options.get("-d")
    request = urllib.request.Request(url, None if body is None else body.encode(), {name: value})  # noqa: S310
    with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310
        assert response.status == 200
        assert set(json.load(response)) & {"agents", "run"}


SUMMARY = "Every client sees every event."
KEY = "sk-of-the-reader-12345"


@contextmanager
def real_model(*answers: str) -> Iterator[tuple[Provider, dict[str, str]]]:
    """A stand-in for all providers, and the variables that lead to it."""
    with start_blocking_portal() as portal:
        said = [Say(answer) for answer in answers]
        with portal.wrap_async_context_manager(provider(*said)) as served:
            bases = {"OPENAI_BASE_URL": f"{served.url}/v1", "ANTHROPIC_BASE_URL": served.url}
            yield served, bases | {"OLLAMA_API_BASE": served.url}


def ran(agent: str, *words: str, url: str) -> dict[str, Any]:
    """The last event of a run."""
    done = subprocess.run(
        [AGENTCAST, "run", agent, *words, "--url", url, "--json"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    event: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return event


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("AGENTCAST_LM=")])
def test_a_real_model_is_asked(folder: Path, line: str):
    words = shlex.split(line)
    variables = {
        name: value.replace("…", KEY) for name, _, value in (word.partition("=") for word in words if "=" in word)
    }
    command = " ".join(word for word in words if "=" not in word)
    with real_model(chat(reasoning="It is said.", summary=SUMMARY)) as (served, bases):
        for url, banner in serve(folder, f"{command} --agents my_agents:registry", **bases, **variables):
            assert f"model   {variables['AGENTCAST_LM']}\n" in banner
            end = ran("summarizer", "text=One hub serves many clients.", url=url)
            assert end["result"] == {"reasoning": "It is said.", "summary": SUMMARY}
            assert end["usage"]["output_tokens"] == 7
    (asked,) = served.requests
    assert asked["model"] == variables["AGENTCAST_LM"].partition("/")[2]
    assert (KEY in str(served.headers[0])) == (KEY in variables.values())


def test_an_agent_has_a_model_of_its_own(folder: Path):
    (folder / "translating.py").write_text(python("translator"))
    with real_model(chat(translation="Bonjour")) as (served, bases):
        command = "agentcast serve --agents translating:registry"
        for url, _ in serve(folder, command, ANTHROPIC_API_KEY=KEY, **bases):
            assert ran("translator", "text=Hello", "language=French", url=url)["result"] == {"translation": "Bonjour"}
    assert served.requests[0]["model"] == "claude-sonnet-4-5"


def test_the_doctor_is_called_as_it_says(folder: Path):
    assert "`agentcast doctor`" in README
    done = subprocess.run([AGENTCAST, "doctor", "--port", "0"], env=environment(), cwd=folder, check=True, timeout=30)
    assert done.returncode == 0


def run_to_its_end(url: str, *words: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [AGENTCAST, "run", *words, "--url", url, "--json"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=40,
        check=True,
    )
    return [frame for line in done.stdout.splitlines() if (frame := json.loads(line))["type"] == "event"]


def test_mcp_servers_are_used(folder: Path):
    command = next(line for line in commands() if "my_mcp_agents" in line)
    for url, banner in serve(folder, command):
        assert "agents  reader\n" in banner
        events = run_to_its_end(url, "reader", "question=What happens to a slow client?")
        assert {event.get("server") for event in events if event["event"] == "tool_start"} == {"texts"}
        assert "slow" in events[-1]["result"]["answer"]


def test_librarian_and_the_servers_of_a_file(folder: Path):
    run = next(word for word in re.findall(r"`agentcast (run librarian [^`]+)`", README))
    command = next(word for word in re.findall(r"`(agentcast serve --mcp-config [^`]+)`", README))
    module = ["-m", "agentcast.agents.demo.librarian_server"]
    servers = {"texts": {"command": sys.executable, "args": module}}
    (folder / shlex.split(command)[-1]).write_text(json.dumps({"mcpServers": servers}))
    for url, banner in serve(folder, command):
        assert ", assistant\n" in banner
        events = run_to_its_end(url, *shlex.split(run)[1:])
        assert [event for event in events if event["event"] == "tool_progress"]
        events = run_to_its_end(url, "assistant", "request=What happens to a slow client?")
        assert {event.get("server") for event in events if event["event"] == "tool_start"} == {"texts"}


def test_the_public_host_name_is_allowed(folder: Path):
    command = next(word for word in re.findall(r"`(agentcast serve --hosts [^`]+)`", README))
    for url, _ in serve(folder, command):
        request = urllib.request.Request(f"{url}/readyz", headers={"Host": "agents.example.org"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310
            assert response.status == 200


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_client_of_the_page_of_names_works(hub: str):
    (snippet,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/api.md").read_text(), re.MULTILINE | re.DOTALL)
    words = [sys.executable, "-c", snippet.replace(DEFAULT_URL, hub)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    assert "'countdown'" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("done lift-off")
