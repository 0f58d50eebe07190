"""Garbage collection without long pauses, however many runs are active.

A full collection goes through all that is alive, about 0.5 µs for each object, and nothing else happens meanwhile. An
active run is some 200 objects, so with 10,000 of them it takes a second. CPython runs one whenever what is alive has
grown by a quarter, and by `THRESHOLDS`.

`Collector` freezes what has survived a collection that took long: later ones go only through what is newer. From then
on it also collects what is young, and freezes it, every half a second: CPython counts new objects less those that were
freed, so while frozen ones are freed and replaced it would wait until very many are young. What is frozen is still
freed when its last reference goes, as nearly everything is. Cycles are not, so once many runs have ended all is thawed,
and one collection is a long one again.
"""

import gc
from collections.abc import Callable
from time import perf_counter

import anyio

THRESHOLDS = (700, 10, 4)
"""See `gc.set_threshold`: 28,000 new objects between two full collections, which take 15 ms, rather than 70,000."""
LONG = 0.01
"""Seconds from which on a collection is long."""
TICK = 0.5
"""Seconds between two collections of what is young, once something is frozen."""
THAW_AFTER = 20_000
"""Ended runs, since something was frozen, after which cycles are looked for in everything. A run leaves 2 to 25 KiB."""


class Collector:
    """Python's garbage collector, of which there is one in a process, as a hub needs it."""

    def __init__(self, active: Callable[[], int], ended: Callable[[], int]) -> None:
        """`active` gives the number of active runs, `ended` of those that have ended since the process began."""
        self._active = active
        self._ended = ended
        self._began = 0.0
        self._frozen = False
        self._most_active = self._ended_before = 0

    async def run(self) -> None:
        """Keep collections short until cancelled."""
        gc.set_threshold(*THRESHOLDS)
        gc.callbacks.append(self.after_collection)
        try:
            while True:
                await anyio.sleep(TICK)
                self.collect()
        finally:
            gc.callbacks.remove(self.after_collection)

    def collect(self) -> None:
        """Called at every tick."""
        if not self._frozen:
            return
        if self._is_stale():
            gc.unfreeze()
            self._frozen = False
            gc.collect()
        else:
            gc.collect(1)
            self._freeze()

    def after_collection(self, phase: str, info: dict[str, int]) -> None:
        """CPython calls this at both ends of every collection; see `gc.callbacks`."""
        if info["generation"] < 2:
            return
        if phase == "start":
            self._began = perf_counter()
        elif perf_counter() - self._began >= LONG:
            self._freeze()

    def _freeze(self) -> None:
        gc.freeze()
        if not self._frozen:
            self._frozen, self._most_active, self._ended_before = True, 0, self._ended()
        self._most_active = max(self._most_active, self._active())

    def _is_stale(self) -> bool:
        """Whether most runs that were frozen must have ended."""
        return self._active() < self._most_active // 4 or self._ended() - self._ended_before >= THAW_AFTER


def freeze_heap() -> None:
    """Take all that was loaded so far out of the garbage collector's sight, and switch it on.

    Looking through it, DSPy above all, stopped the loop for 40 ms at every full collection.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
