"""A real server on a real socket, on the event loop that the hub is served with."""

from typing import Any

import pytest

from tests.support.hub import each_server
from tests.support.log import log

__all__ = ["anyio_backend", "each_server", "log"]


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}
