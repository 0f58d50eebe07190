"""Which node runs next. Sans-I/O: told what has ended, it says what starts.

An edge that is taken brings an *arrival* to its target. A node with an arrival starts as soon as no edge in, except
one that closes a loop, can bring it another: that is, when no node that is running or waiting leads, by edges forward,
to a source whose arrival is missing. Edges forward make no circle, so somebody can always start.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from agentcast.agents.graph.building import END
from agentcast.agents.graph.shape import Shape

START = 0
"""The id of what the program was given, as if a step had set it."""


@dataclass(frozen=True, slots=True)
class Step:
    """One run of a node. `past` has the bit of each step that this one follows on, directly or not."""

    id: int
    node: str
    past: int
    rank: tuple[int, int, int]
    """Puts steps in an order that does not depend on timing and in which each comes after its past."""

    @property
    def sight(self) -> int:
        """The steps whose values are seen once this one has ended."""
        return self.past | 1 << self.id


class Flow:
    """One run of a graph. `limited`: it would go on, but has made `max_steps` steps."""

    def __init__(self, shape: Shape) -> None:
        self.limited = False
        self._shape = shape
        self._started = 0
        self._running: set[str] = set()
        self._arrivals: dict[str, dict[str, tuple[int, int]]] = {}
        """Target → source → what the source had seen, and its depth."""

    def begin(self) -> list[Step]:
        """The first steps."""
        self._arrivals[self._shape.entry] = {"": (1 << START, 0)}
        return self._ready()

    def finish(self, step: Step, targets: Iterable[str]) -> list[Step]:
        """`step` has ended, and its edges to `targets` are taken. The steps that start now."""
        self._running.discard(step.node)
        for target in targets:
            if target != END:
                arrived = self._arrivals.setdefault(target, {})
                seen, depth = arrived.get(step.node, (0, 0))
                arrived[step.node] = (seen | step.sight, max(depth, step.rank[0]))
        return self._ready()

    def _ready(self) -> list[Step]:
        ready = [name for name in self._shape.names if name in self._arrivals and not self._is_held(name)]
        if ready and (self.limited or self._started + len(ready) > self._shape.max_steps):
            self.limited = True
            self._arrivals.clear()
            return []
        return [self._start(name) for name in ready]

    def _is_held(self, name: str) -> bool:
        if name in self._running:
            return True
        active = self._running | (self._arrivals.keys() - {name})
        arrived = self._arrivals[name]
        missing = (source for source in self._shape.sources[name] if source not in arrived)
        return any(not active.isdisjoint(self._shape.before(source)) for source in missing)

    def _start(self, name: str) -> Step:
        arrivals = self._arrivals.pop(name)
        self._running.add(name)
        self._started += 1
        past, depth = 0, 0
        for seen, at in arrivals.values():
            past, depth = past | seen, max(depth, at)
        return Step(self._started, name, past, (depth + 1, self._shape.index[name], self._started))
