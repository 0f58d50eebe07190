"""Which node runs next. Sans-I/O: given what has ended, it says what starts.

An edge that is taken brings an *arrival* to its target. A node with an arrival starts as soon as no edge in, except
one that closes a loop, can bring it another: that is, when no node that is running or waiting leads, by edges forward,
to a source whose arrival is missing. Edges forward make no cycle, so some node can always start.

`Shape` is a graph's edges, frozen and shared by all runs; `Flow` is one run; `targets` reads what a router chose.
"""

import decimal
import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from agentcast.agents.graph.building import END, Graph, Route
from agentcast.agents.graph.errors import RouteError
from agentcast.agents.values import cut_text, plain

START = 0
"""The id of what the program was given, as if a step had set it."""


class Shape:
    """`edges` are always taken, `routes` choose; both by source. Nodes are known by name, in the order of `names`."""

    def __init__(self, graph: Graph) -> None:
        self.entry = graph.entry or ""
        self.names = list(dict.fromkeys(node.name for node in graph.nodes))
        self.edges: dict[str, tuple[str, ...]] = {
            name: tuple(target for source, target in graph.edges if source == name) for name in self.names
        }
        self.routes: dict[str, tuple[Route, ...]] = {
            name: tuple(route for route in graph.routes if route.source == name) for name in self.names
        }
        self._before: dict[str, frozenset[str]] = {}
        chosen = [(route.source, target) for route in graph.routes for target in route.path_map.values()]
        self._edges = [
            edge for edge in dict.fromkeys([*graph.edges, *chosen]) if edge[0] in self.edges and edge[1] in self.edges
        ]

    @cached_property
    def index(self) -> Mapping[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    @cached_property
    def successors(self) -> Mapping[str, Sequence[str]]:
        """The nodes that may come next; neither END nor nodes that do not exist."""
        found: dict[str, list[str]] = {name: [] for name in self.names}
        for source, target in self._edges:
            found[source].append(target)
        return found

    @cached_property
    def reachable(self) -> frozenset[str]:
        return frozenset(self._after(self.successors))

    @cached_property
    def back(self) -> frozenset[tuple[str, str]]:
        """The edges that close a loop; without them the graph has no cycle.

        These are the edges whose target one must have passed to come to their source. A cycle that remains can be
        entered at several places; it is closed by its edge that was added last, conditional ones counting after all
        others.
        """
        edges = [edge for edge in self._edges if edge[0] in self.reachable]
        back = {(source, target) for source, target in edges if self._is_passed(target, source)}
        forward: dict[str, list[str]] = {name: [] for name in self.names}
        for source, target in edges:
            if (source, target) in back or source in self._after(forward, target):
                back.add((source, target))
            else:
                forward[source].append(target)
        return frozenset(back)

    def _is_passed(self, name: str, on_the_way_to: str) -> bool:
        return on_the_way_to not in self._after(self.successors, without=name)

    def _after(
        self, successors: Mapping[str, Sequence[str]], start: str | None = None, without: str | None = None
    ) -> set[str]:
        """The nodes from `start`, by default the entry, on; itself among them."""
        first = self.entry if start is None else start
        if first not in self.index or first == without:
            return set()
        seen, stack = {first}, [first]
        while stack:
            new = [target for target in successors[stack.pop()] if target not in seen and target != without]
            seen.update(new)
            stack += new
        return seen

    def ancestors(self, name: str) -> frozenset[str]:
        """The nodes that may have run before `name` runs for the first time."""
        sources: dict[str, list[str]] = {node: [] for node in self.names}
        for source, target in self._edges:
            sources[target].append(source)
        return frozenset(self._after(self.successors, without=name) & self._after(sources, name))

    @cached_property
    def sources(self) -> Mapping[str, Sequence[str]]:
        """For each node, those from which an edge forward leads to it."""
        found: dict[str, list[str]] = {name: [] for name in self.names}
        for source, target in self._edges:
            if (source, target) not in self.back:
                found[target].append(source)
        return found

    def before(self, name: str) -> frozenset[str]:
        """The nodes from which edges forward lead to `name`, itself among them."""
        if name not in self._before:
            self._before[name] = frozenset(self._after(self.sources, name))
        return self._before[name]


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
    """One run of a graph. `started` counts its steps; `limited`: it would go on, but has made `max_steps` of them."""

    def __init__(self, shape: Shape, max_steps: int) -> None:
        self.started = 0
        self.limited = False
        self._shape = shape
        self._max_steps = max_steps
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
        if ready and (self.limited or self.started + len(ready) > self._max_steps):
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
        self.started += 1
        past, depth = 0, 0
        for seen, at in arrivals.values():
            past, depth = past | seen, max(depth, at)
        return Step(self.started, name, past, (depth + 1, self._shape.index[name], self.started))


# -- Routers -------------------------------------------------------------------------------------------------------


def targets(route: Route, choice: Any) -> Iterator[str]:
    """Where the router's `choice`, a key of `path_map` or several, leads.

    A choice that is no key stands for the keys that are written like it: see `_spellings`.

    :raises RouteError: it stands for no key, or for keys that lead to different nodes.
    """
    is_several = isinstance(choice, list | tuple | set) and not _is_key(route, choice)
    for key in choice if is_several else [choice]:
        yield route.path_map[key] if _is_key(route, key) else _target(route, key)


def _is_key(route: Route, choice: Any) -> bool:
    try:
        return choice in route.path_map
    except TypeError:  # it cannot be hashed
        return False


def _target(route: Route, choice: Any) -> str:
    spellings = _spellings(choice)
    alike = [key for key in route.path_map if not spellings.isdisjoint(_spellings(key))]
    found = {route.path_map[key] for key in alike}
    if len(found) == 1:
        return found.pop()
    problem = f"is none of {', '.join(map(_named, route.path_map))}"
    if found:
        problem = f"may be {' or '.join(map(_named, alike))}"
    raise RouteError(route.source, f"its router chose {_named(choice)}, which {problem}")


def _spellings(value: Any) -> frozenset[str]:
    """The texts that stand for `value`: those of Python and JSON for booleans and None; a number's digits; an enum
    member's name, and the texts of its value."""
    if isinstance(value, enum.Enum):
        return _spellings(value.value) | {value.name}
    if isinstance(value, str):
        return frozenset({value})
    if value is None:
        return frozenset({"None", "null"})
    if isinstance(value, bool):
        return frozenset({str(value), str(value).lower()})
    if isinstance(value, int | float | decimal.Decimal):
        return frozenset({str(value)})
    return frozenset()


def _named(key: Any) -> str:
    """As errors, which clients see, show it: not by the `repr` of an arbitrary object (G9)."""
    return cut_text(repr(plain(key)), 200)
