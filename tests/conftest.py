"""What every test shares: the backend on which coroutine tests run, DSPy without its cache on disk, and how many
processes run the tests."""

import gc
from pathlib import Path

import dspy
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("agentcast", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # busy machines
settings.load_profile("agentcast")

WORKERS = 4
"""More than CI has cores: many tests wait for processes and timers most of their time."""


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def no_cache_on_disk() -> None:
    """DSPy's is shared by all processes of a user, opens a database in each thread, and closes none."""
    dspy.configure_cache(enable_disk_cache=False)


def pytest_collection_finish() -> None:
    """Have the garbage collector look at nothing that stays: a full collection took most of a second."""
    gc.collect()
    gc.freeze()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Whole folders run on several processes; single files, and what `-k` picks, in this one."""
    folders = all(Path(argument).is_dir() for argument in config.args)
    return WORKERS if folders and not config.option.keyword else 0
