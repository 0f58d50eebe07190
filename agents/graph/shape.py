"""The shape of a compiled graph: its edges, and which of them lead back.

Frozen. It is shared by all runs and known to nobody in particular, and says nothing about what nodes do.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

from agentcast.agents.graph.building import Graph, Route


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
        """The edges that close a loop; without them there is no circle.

        These are the edges whose target one must have passed to come to their source. What circles there are without
        them can be entered at several places; of such a circle it is the edge that was added last, the conditional ones
        after all others.
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
