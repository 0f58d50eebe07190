"""Notices when the event loop is blocked, and names who does it (G3).

Our own code never blocks the loop; an `async` agent that computes or sleeps synchronously does. It cannot be stopped,
but the log can say which task it is and where it stands.
"""

import asyncio
import logging
import sys
import threading
import time
import traceback

import anyio

BLOCKED_AFTER = 1.0
_BEAT = 0.25

logger = logging.getLogger(__name__)


class Watchdog:
    """Watches the loop on which `run` runs."""

    def __init__(self, blocked_after: float = BLOCKED_AFTER) -> None:
        self.longest = 0.0
        """The longest the loop was seen blocked, in seconds."""
        self._blocked_after = blocked_after
        self._beat = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0
        self._stop = threading.Event()

    async def run(self) -> None:
        """Watch until cancelled."""
        self._loop, self._loop_thread = asyncio.get_running_loop(), threading.get_ident()
        thread = threading.Thread(target=self._watch, name="agentcast watchdog", daemon=True)
        self._beat = time.monotonic()
        thread.start()
        try:
            while True:
                await anyio.sleep(_BEAT)
                now = time.monotonic()
                self.longest = max(self.longest, now - self._beat - _BEAT)
                self._beat = now
        finally:
            self._stop.set()

    def _watch(self) -> None:
        reported = 0.0
        while not self._stop.wait(_BEAT):
            beat = self._beat
            blocked = time.monotonic() - beat - _BEAT
            if blocked >= self._blocked_after and reported != beat:
                reported = beat
                logger.error(
                    "the event loop has been blocked for %.1f s by %s; every other run waits. It stands at:\n%s",
                    blocked,
                    self._culprit(),
                    self._where(),
                )

    def _culprit(self) -> str:
        """The task that the loop is executing. An agent's own bears the name of its run; one that it has started bears
        the name that it was given, and only the stack says whose it is."""
        task = asyncio.current_task(self._loop)
        return "a callback, which is no task" if task is None else f"the task {task.get_name()!r}"

    def _where(self) -> str:
        frame = sys._current_frames().get(self._loop_thread)
        return "".join(traceback.format_stack(frame, limit=4)) if frame is not None else "(unknown)"
