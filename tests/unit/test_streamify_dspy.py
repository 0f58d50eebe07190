"""The scenarios in which `dspy.streamify` freezes, loses or mixes: ours comes through each, DSPy's fails where it says.

DSPy's runs are processes of their own, all at once, since what freezes there cannot be ended from inside; ours go on
meanwhile. When one of
them comes through after all, DSPy has mended it: then say so below.
"""

import json
import subprocess
import sys
from collections.abc import Iterator

import anyio
import dspy
import pytest

from agents.streaming import streamify
from benchmarks.freezing import SCENARIOS, lm

FREEZES = {
    "slow_consumer", "very_slow_consumer", "slow_ticks", "many_tools", "one_slow_client", "debug_mode",
    "break_and_keep", "no_prediction", "parallel_tokens",
}  # fmt: skip
"""DSPy's does not finish; a frozen loop, or, for the last two, a stream that never ends."""
WRONG = {"parallel", "mixing", "sequential", "failing", "closing", "silenced", "callbacks"}
"""DSPy's finishes, but items are missing, somebody else's, or the caller is cancelled."""
PASSES = {"brackets", "sync_programs"}
"""DSPy's does it, too."""


LIMIT = "15"
"""Seconds after which a scenario, bounded to about two, counts as unfinished: all of them start at once."""


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"], scope="module")
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


@pytest.mark.anyio
@pytest.mark.parametrize("name", SCENARIOS)
async def test_ours_comes_through(name: str):
    with dspy.context(lm=lm()), anyio.fail_after(20):
        _, right = await SCENARIOS[name](streamify)
    assert right


def start(name: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "benchmarks.freezing", "dspy", name, LIMIT]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module", autouse=True)
def dspys() -> Iterator[dict[str, "subprocess.Popen[bytes]"]]:
    processes = {name: start(name) for name in SCENARIOS}
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", SCENARIOS)
def test_dspys_fails_where_it_is_said_to(name: str, dspys: dict[str, "subprocess.Popen[bytes]"]):
    assert name in FREEZES | WRONG | PASSES
    expected = {"finished": name not in FREEZES, "right": name in PASSES}
    found = outcome(dspys[name])
    if found != expected:  # all ran at once, and who freezes is a matter of pace: once more, alone
        dspys[name] = start(name)
        found = outcome(dspys[name])
    assert found == expected


def outcome(process: "subprocess.Popen[bytes]") -> dict[str, bool]:
    output, _ = process.communicate(timeout=50)
    result = json.loads(output.splitlines()[-1])
    return {"finished": result["finished"], "right": result["right"]}
