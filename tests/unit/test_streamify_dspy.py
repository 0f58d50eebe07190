"""The scenarios in which `dspy.streamify` freezes, loses or mixes: ours comes through each, DSPy's fails where it says.

DSPy's runs are processes of their own, all at once, since what freezes there cannot be ended from inside. When one of
them comes through after all, DSPy has fixed it: then say so below.
"""

import json
from subprocess import DEVNULL

import anyio
import dspy
import pytest

from agentcast.agents.streaming import streamify
from benchmarks import freezing
from benchmarks.freezing import SCENARIOS, lm
from tests.support.forking import Forked, fork

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


def start(name: str) -> Forked:
    return fork(freezing.main, "dspy", name, LIMIT, stderr=DEVNULL)


def test_dspys_fails_where_it_is_said_to():
    assert FREEZES | WRONG | PASSES == set(SCENARIOS)
    started = {name: start(name) for name in SCENARIOS}
    for name, process in started.items():
        expected = {"finished": name not in FREEZES, "right": name in PASSES}
        found = outcome(process)
        if found != expected:  # all ran at once, and who freezes is a matter of pace: once more, alone
            found = outcome(start(name))
        assert found == expected, name


def outcome(forked: Forked) -> dict[str, bool]:
    with open(forked.stdout) as stdout:
        result = json.loads(stdout.readlines()[-1])
    forked.process.join(20)
    return {"finished": result["finished"], "right": result["right"]}
