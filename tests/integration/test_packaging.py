"""What is built and installed: everything that is needed, under one import name, beside packages of any other name."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FOLDERS = ("agents", "server")
OPENAI_AGENTS = {
    "agents/__init__.py": "from agents.mcp.server import MCPServer\n",
    "agents/mcp/__init__.py": "",
    "agents/mcp/server.py": "class MCPServer: ...\n",
    "openai_agents-0.0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: openai-agents\nVersion: 0.0.1\n",
    "openai_agents-0.0.1.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "openai_agents-0.0.1.dist-info/RECORD": "",
}
"""The files of openai-agents that matter here: it owns the import name `agents`."""


def python(*words: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, check=True, timeout=50)
    return done.stdout


def build(target: str, source: Path, folder: Path) -> Path:
    """Build a `wheel` or an `sdist` of the tree at `source`."""
    python("-m", "hatchling", "build", "-t", target, "-d", str(folder), cwd=source)
    (built,) = folder.iterdir()
    return built


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def needed() -> dict[str, bytes]:
    """What has to be in a package, by its path below `agentcast`."""
    sources = {path: ROOT / "src/agentcast" for path in (ROOT / "src/agentcast").iterdir() if path.is_file()}
    sources |= {path: ROOT for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {
        path.relative_to(base).as_posix(): path.read_bytes()
        for path, base in sources.items()
        if "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


class Venv:
    """A virtual environment that has our dependencies, but neither agentcast nor anything of this tree."""

    def __init__(self, path: Path) -> None:
        python("-m", "venv", "--without-pip", str(path))
        self.bin = path / "bin"
        self.packages = Path(sysconfig.get_path("purelib", vars={"base": str(path), "platbase": str(path)}))
        # Folders that a .pth file adds have their own .pth files ignored: the editable install is not seen.
        (self.packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    def install(self, wheel: Path) -> None:
        options = ["--quiet", "--no-deps", "--no-index", "--no-cache-dir", "--disable-pip-version-check"]
        python("-m", "pip", "--python", str(self.bin / "python"), "install", *options, "--force-reinstall", str(wheel))

    def run(self, code: str, cwd: Path) -> str:
        words = [str(self.bin / "python"), "-c", code]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def venv(tmp_path: Path) -> Venv:
    return Venv(tmp_path / "venv")


def test_the_wheel_holds_every_file_under_one_name(wheel: Path):
    found = contents(wheel)
    packaged = {name: data for name, data in found.items() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in packaged} == {"agentcast"}
    assert packaged == {f"agentcast/{name}": data for name, data in needed().items()}
    assert "agentcast/server/web/index.html" in packaged


def test_the_sdist_holds_folders_for_links_and_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path):
    with tarfile.open(sdist) as archive:
        assert all(member.isreg() or member.isdir() for member in archive)
        archive.extractall(tmp_path, filter="data")
    (top,) = tmp_path.iterdir()
    packaged = top / "src/agentcast"
    files = {path for path in packaged.rglob("*") if path.is_file()}
    assert {path.relative_to(packaged).as_posix(): path.read_bytes() for path in files} == needed()
    again = build("wheel", top, tmp_path / "again")
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


def test_an_editable_install_adds_one_name(venv: Venv, tmp_path: Path):
    build_editable = "import sys; from hatchling.build import build_editable; print(build_editable(sys.argv[1]))"
    built = tmp_path / python("-c", build_editable, str(tmp_path)).split()[-1]
    assert {Path(name).suffix for name in contents(built) if ".dist-info/" not in name} == {".pth"}
    venv.install(built)
    names = ["agentcast", "agents", "server", "src", "tests", "benchmarks", "examples"]
    code = f"from importlib.util import find_spec; print(*[n for n in {names} if find_spec(n)])"
    assert venv.run(code, tmp_path) == "agentcast"
    assert venv.run("import agentcast.server.app as app; print(app.__file__)", tmp_path).startswith(str(ROOT))


@pytest.mark.parametrize("first", ["agentcast", "openai-agents"])
def test_openai_agents_can_be_installed_beside_it(venv: Venv, wheel: Path, tmp_path: Path, first: str):
    theirs = tmp_path / "openai_agents-0.0.1-py3-none-any.whl"
    with zipfile.ZipFile(theirs, "w") as archive:
        for name, text in OPENAI_AGENTS.items():
            archive.writestr(name, text)
    for one in (wheel, theirs) if first == "agentcast" else (theirs, wheel):
        venv.install(one)
    code = """
import agents, agents.mcp.server
from agentcast import Registry, mcp_server
import agentcast.agents.mcp.server
assert agents.MCPServer is agents.mcp.server.MCPServer
assert mcp_server is agentcast.agents.mcp.server.mcp_server
print(agents.__file__, agentcast.__file__, sep="\\n")
"""
    where = [venv.packages / "agents/__init__.py", venv.packages / "agentcast/__init__.py"]
    assert venv.run(code, tmp_path).splitlines() == list(map(str, where))


def test_type_checkers_see_the_types_of_an_installed_package(venv: Venv, wheel: Path, tmp_path: Path):
    venv.install(wheel)
    (tmp_path / "user.py").write_text(
        """
import agentcast
from agentcast.events import Status

status: Status = agentcast.events.Status(message="hello")
number: int = agentcast.connect("http://127.0.0.1:8000").url
agentcast.nothing
"""
    )
    words = ["--strict", "--no-incremental", "--no-error-summary", "--python-executable", str(venv.bin / "python")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *words, "user.py"], cwd=tmp_path, capture_output=True, text=True, timeout=50
    )
    problems = [line.partition(": ")[2] for line in done.stdout.splitlines()]
    assert problems == [
        'error: Incompatible types in assignment (expression has type "HubUrl", variable has type "int")  [assignment]',
        'error: Module has no attribute "nothing"  [attr-defined]',
    ], done.stderr


def test_our_dependencies_leave_room_for_those_of_openai_agents():
    ours = next(need for need in map(Requirement, requires("agentcast") or ()) if need.name == "websockets")
    assert list(ours.specifier.filter(["15.0.1", "16.1.1"])) == ["15.0.1", "16.1.1"]  # theirs are 15 and 16


@contextmanager
def served(venv: Venv, cwd: Path) -> Iterator[str]:
    """The URL of a hub that `agentcast serve` runs."""
    words = [str(venv.bin / "agentcast"), "serve", "--port", "0"]
    with subprocess.Popen(words, cwd=cwd, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            banner = process.stdout.readline()
            found = re.search(r"http://\S+", banner)
            assert found, banner
            yield found[0]
        finally:
            process.terminate()


def test_a_hub_runs_from_the_wheel(venv: Venv, wheel: Path, tmp_path: Path):
    venv.install(wheel)
    with served(venv, tmp_path) as url:
        with urllib.request.urlopen(url, timeout=20) as response:  # noqa: S310 -- our own hub
            assert response.read() == (ROOT / "server/web/index.html").read_bytes()
        words = [str(venv.bin / "agentcast"), "run", "researcher", "question=What happens to a slow client?", "--json"]
        done = subprocess.run([*words, "--url", url], cwd=tmp_path, capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stderr
        last = json.loads(done.stdout.splitlines()[-1])
        assert last["event"] == "run_end"
        assert "client" in last["result"]["answer"]
    assert venv.run("import agentcast.server; print(agentcast.server.__file__)", tmp_path).startswith(
        str(venv.packages)
    )
