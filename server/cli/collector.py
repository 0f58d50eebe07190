"""Garbage collection without long pauses, however many runs are active.

A full collection goes through all that is alive, about 0.5 µs for each object, and nothing else happens meanwhile. An
active run is some 200 objects, so with 10,000 of them it takes a second. CPython runs one whenever what is alive has
grown by a quarter.

`Collector` freezes what has survived a collection that took long: the next one goes only through what is newer. What is
frozen is still freed when its last reference goes, as nearly everything is. Cycles are not, so once many runs have
ended everything is thawed, and the next collection is a long one again.
"""

import gc
from collections.abc import Callable
from time import perf_counter

LONG = 0.02
"""Seconds from which on a collection is long. Between two of them, what is alive grows by 70,000 objects or a quarter:
the next one takes 35 ms."""
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

    def start(self) -> None:
        """Freeze all that was loaded so far, for good or until the first thaw, and collect from now on."""
        freeze_heap()
        if self.after_collection not in gc.callbacks:
            gc.callbacks.append(self.after_collection)

    def stop(self) -> None:
        """Leave the collector to Python again."""
        gc.callbacks.remove(self.after_collection)

    def after_collection(self, phase: str, info: dict[str, int]) -> None:
        """CPython calls this at both ends of every collection; see `gc.callbacks`."""
        if info["generation"] < 2:
            return
        if phase == "start":
            self._began = perf_counter()
        elif self._frozen and self._is_stale():
            gc.unfreeze()
            self._frozen = False
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
