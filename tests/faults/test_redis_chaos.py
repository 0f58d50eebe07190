"""Random sequences of faults, small: `python -m tests.faults.chaos` plays them at full size (G1, G2, G5, G7, G10).

`AGENTCAST_CHAOS_SEED=4,7` plays these seeds instead.
"""

import os

import pytest

from tests.faults.chaos.story import Story

SEEDS = [int(seed) for seed in os.environ.get("AGENTCAST_CHAOS_SEED", "2").split(",")]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", SEEDS)
async def test_no_sequence_of_faults_breaks_a_guarantee(seed: int) -> None:
    story = Story(seed, runs=8, clients=8, faults=3)
    try:
        await story.play()
    except BaseException as error:
        error.add_note(f"seed {seed}, after {', '.join(story.happened)}")
        raise
