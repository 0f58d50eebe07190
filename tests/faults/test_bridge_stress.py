"""Two hundred runs at once that emit from everywhere: nothing is lost, doubled or out of order (G1, G2, G8)."""

import pytest

from benchmarks.streaming import load

pytestmark = pytest.mark.anyio


async def test_two_hundred_runs_of_three_hundred_events_from_everywhere_arrive_exactly():
    """`load` itself compares number and order of what each producer of each run emitted."""
    assert await load(200, 300)
