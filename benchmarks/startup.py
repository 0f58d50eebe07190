"""How long processes take to be of use: the import, commands, and a hub until it takes runs."""

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

from benchmarks.processes import Server, free_port, use_all_cores
from benchmarks.report import Row

GROUP = "Start-up"
ROUNDS = 7
AGENTCAST = str(Path(sys.executable).with_name("agentcast"))
COMMANDS = {
    "Python alone": [sys.executable, "-c", "pass"],
    "import dspy": [sys.executable, "-c", "import dspy"],
    "import agentcast": [sys.executable, "-c", "import agentcast"],
    "agentcast --version": [AGENTCAST, "--version"],
    "agentcast --help": [AGENTCAST, "--help"],
    "agentcast run --help": [AGENTCAST, "run", "--help"],
}
"""Each from its start to its end."""


def measure() -> Iterator[Row]:
    yield from _commands()
    ready = [_serve() for _ in range(ROUNDS + 1)][1:]
    yield Row(GROUP, "agentcast serve", "ms", [1000 * one[0] for one in ready], "with the demo, until /readyz says 200")
    yield Row(GROUP, "agentcast serve, CPU", "ms", [1000 * one[1] for one in ready])


def _commands() -> Iterator[Row]:
    rounds = [{name: _command(words) for name, words in COMMANDS.items()} for _ in range(ROUNDS + 1)][1:]
    for name in COMMANDS:
        yield Row(GROUP, name, "ms", [1000 * one[name][0] for one in rounds], "from start to end")
        yield Row(GROUP, f"{name}, CPU", "ms", [1000 * one[name][1] for one in rounds], "user and system time")


def _command(words: list[str]) -> tuple[float, float]:
    """Seconds, and seconds of CPU time."""
    before, started = _children(), time.perf_counter()
    subprocess.run(words, stdout=subprocess.DEVNULL, check=True, preexec_fn=use_all_cores)
    return time.perf_counter() - started, _children() - before


def _serve() -> tuple[float, float]:
    """Seconds until a hub is ready, and those of CPU time that it took."""
    port = free_port()
    started = time.perf_counter()
    words = [AGENTCAST, "serve", "--port", str(port), "--log-level", "error"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, preexec_fn=use_all_cores) as process:
        try:
            while not _ready(port):
                time.sleep(0.005)
            return time.perf_counter() - started, Server(process, port).cpu
        finally:
            process.terminate()


def _ready(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
