"""The shape of a compiled graph: its edges, and which of them lead back.

Frozen. It is shared by all runs and known to nobody in particular, and says nothing about what nodes do.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property

from agents.graph.building import END, Graph, Route


class Shape:
    """`edges` are always taken, `routes` choose; both by source. Nodes are known by name, in the order of `names`."""

    def __init__(self, graph: Graph) -> None:
        self.entry = graph.entry or ""
        self.max_steps = graph.max_steps
        self.names = list(dict.fromkeys(node.name for node in graph.nodes))
        self.edges: dict[str, tuple[str, ...]] = {
            name: tuple(target for source, target in graph.edges if source == name) for name in self.names
        }
        self.routes: dict[str, tuple[Route, ...]] = {
            name: tuple(route for route in graph.routes if route.source == name) for name in self.names
        }

    @cached_property
    def index(self) -> Mapping[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    @cached_property
    def successors(self) -> Mapping[str, tuple[str, ...]]:
        """The nodes that may come next; neither END nor nodes that do not exist."""
        found = {}
        for name in self.names:
            targets = [
                *self.edges[name],
                *(target for route in self.routes[name] for target in route.path_map.values()),
            ]
            found[name] = tuple(dict.fromkeys(target for target in targets if target != END and target in self.index))
        return found

    @cached_property
    def back(self) -> frozenset[tuple[str, str]]:
        """Edges that close a loop: those to a node on the way from the entry to their source, depth first."""
        return frozenset(self._walk[1])

    @cached_property
    def reachable(self) -> frozenset[str]:
        return frozenset(self._walk[0])

    @cached_property
    def _walk(self) -> tuple[set[str], set[tuple[str, str]]]:
        seen: set[str] = set()
        back: set[tuple[str, str]] = set()
        if self.entry not in self.index:
            return seen, back
        way: dict[str, Iterator[str]] = {self.entry: iter(self.successors[self.entry])}
        seen.add(self.entry)
        while way:  # not recursive: a graph may be deeper than Python's stack
            name, rest = next(reversed(way.items()))
            target = next(rest, None)
            if target is None:
                del way[name]
            elif target in way:
                back.add((name, target))
            elif target not in seen:
                seen.add(target)
                way[target] = iter(self.successors[target])
        return seen, back

    @cached_property
    def before(self) -> Mapping[str, frozenset[str]]:
        """For each node, those from which edges forward lead to it, itself among them."""
        found: dict[str, frozenset[str]] = {}
        for name in self.names:
            seen, stack = {name}, [name]
            while stack:
                new = [source for source in self.sources[stack.pop()] if source not in seen]
                seen.update(new)
                stack += new
            found[name] = frozenset(seen)
        return found

    @cached_property
    def sources(self) -> Mapping[str, tuple[str, ...]]:
        """For each node, those from which an edge forward leads to it."""
        return {
            name: tuple(
                source for source in self.names if name in self.successors[source] and (source, name) not in self.back
            )
            for name in self.names
        }

    def ancestors(self, name: str) -> frozenset[str]:
        """The nodes that may have run before `name` runs for the first time."""
        return frozenset(
            other for other in self.reachable if other != name and name in self._after_without(other, name)
        )

    def _after_without(self, start: str, goal: str) -> set[str]:
        seen, stack = set(), [start]
        while stack:
            for target in self.successors[stack.pop()]:
                if target not in seen:
                    seen.add(target)
                    if target != goal:
                        stack.append(target)
        return seen
