"""Watches the log: an error in it that the test does not name fails the test."""

import logging
from collections.abc import Iterator

import pytest


class Log:
    """What was logged during a test, and what of it was to be expected."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        self._expected: list[str] = []

    def expect(self, *texts: str) -> None:
        """Errors that hold one of `texts` are what the test is about; each must appear."""
        self._expected += texts

    @property
    def lines(self) -> list[str]:
        return [record.getMessage() for record in self._caplog.get_records("call")]

    def check(self) -> None:
        bad = [
            f"{record.levelname} {record.name}: {record.getMessage()}"
            for record in self._caplog.get_records("call")
            if record.levelno >= logging.ERROR or record.exc_info
            if record.name
            != "agentcast.server.runs.watchdog"  # a busy machine makes it speak, and tests of it look for its words
            if not any(expected in record.getMessage() for expected in self._expected)
        ]
        assert not bad, "the log has errors:\n" + "\n".join(bad)
        lines = self.lines
        missing = [expected for expected in self._expected if not any(expected in line for line in lines)]
        assert not missing, f"the log lacks {missing}"


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> Iterator[Log]:
    """The test's log, free of errors at the end."""
    caplog.set_level(logging.INFO)
    log = Log(caplog)
    yield log
    log.check()
