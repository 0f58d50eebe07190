"""The slowest reply to an innocent client, of any kind, while a hub is attacked (G11)."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from benchmarks import goals
from benchmarks.processes import set_up_child
from benchmarks.report import Row
from tests.support.attacks import ATTACKS
from tests.support.innocents import Innocents, innocents

GROUP = "Attacks: the slowest reply to an innocent client"
SECONDS, ROUNDS = 5.0, 2
PEACE = "none"
_AGENTS = "tests.support.served:registry"


def measure() -> Iterator[Row]:
    worst = 0.0
    for name in (PEACE, *ATTACKS):
        seen = [_round(name) for _ in range(ROUNDS)]
        slowest = [max(one.slowest.values()) * 1000 for one in seen]
        kinds = {kind: max(one.slowest[kind] for one in seen) * 1000 for kind in seen[0].waits}
        worst = max(worst, *slowest)
        each = ", ".join(f"{kind} {value:.0f}" for kind, value in kinds.items())
        yield Row(GROUP, name, "ms", slowest, f"the worst of each kind: {each}")
    yield Row(GROUP, "the worst of all", "ms", [worst], goal=goals.ATTACKED)


def _round(name: str) -> Innocents:
    with _serving() as url:
        return anyio.run(_attacked, url, name, backend_options={"use_uvloop": True})


async def _attacked(url: str, name: str) -> Innocents:
    command = [sys.executable, "-m", "tests.support.attacks", name, url.rpartition(":")[2], str(SECONDS)]
    async with innocents(url) as seen:
        if name == PEACE:
            await anyio.sleep(SECONDS)
        else:
            await anyio.run_process(command)
    return seen


@contextmanager
def _serving() -> Iterator[str]:
    """`agentcast serve` on the first core, as users start it; gives its URL."""
    command = [sys.executable, "-m", "agentcast.server.cli.main", "serve", "--port", "0", "--agents", _AGENTS]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=set_up_child
    )
    assert process.stdout is not None
    try:
        line = next(line for line in process.stdout if "running at" in line)
        yield re.findall(r"http://\S+", line)[0]
    finally:
        process.kill()
        process.communicate()
