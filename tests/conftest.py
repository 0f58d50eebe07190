"""What every test shares: the backend on which coroutine tests run."""

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"
