"""In which order nodes run: joins, branches, loops, against a model that knows nothing but docs/graphs.md."""

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from agentcast.agents.graph import END, Graph, StatefulNode
from agentcast.agents.graph.building import Route
from agentcast.agents.graph.flow import START, Flow, Shape, Step, targets


class Nothing(BaseModel):
    pass


def shape_of(edges: dict[str, str]) -> Shape:
    """A graph of nodes named by letters, entered at its first. `edges` are node → targets, `.` is END; targets in
    capitals are conditional."""
    graph = Graph()
    for name in edges:
        graph.add_node(StatefulNode(name, Nothing, Nothing))
    graph.set_entry_point(next(iter(edges)))
    for name, following in edges.items():
        for target in following:
            if target.isupper():
                graph.add_conditional_edges(name, lambda _: "", {target: target.lower()})
            else:
                graph.add_edge(name, END if target == "." else target)
    return Shape(graph)


class Run:
    """Steps by name; the test ends a node that is running."""

    def __init__(self, shape: Shape, max_steps: int = 100) -> None:
        self.flow = Flow(shape, max_steps)
        self.order: list[str] = []
        self.steps: dict[int, Step] = {}
        self.running: dict[str, Step] = {}
        self._take(self.flow.begin())

    def end(self, name: str, *targets: str) -> set[str]:
        """End `name`; gives who starts."""
        return self._take(self.flow.finish(self.running.pop(name), targets))

    def _take(self, steps: list[Step]) -> set[str]:
        for step in steps:
            assert step.node not in self.running
            self.running[step.node] = self.steps[step.id] = step
            self.order.append(step.node)
        return {step.node for step in steps}

    def past(self, name: str) -> set[str]:
        seen = self.running[name].past
        assert seen & 1 << START
        return {step.node for step in self.steps.values() if seen >> step.id & 1}


def test_join_waits_for_all_that_are_on_the_way():
    run = Run(shape_of({"a": "bc", "b": "d", "c": "d", "d": "."}))
    assert run.end("a", "b", "c") == {"b", "c"}
    assert run.end("b", "d") == set()
    assert run.end("c", "d") == {"d"}
    assert run.past("d") == {"a", "b", "c"}
    assert run.end("d", END) == set()
    assert run.running == {}


def test_join_waits_for_a_branch_that_is_longer():
    run = Run(shape_of({"a": "bc", "b": "d", "c": "e", "e": "d", "d": "."}))
    run.end("a", "b", "c")
    assert run.end("b", "d") == set()
    assert run.end("c", "e") == {"e"}
    assert run.end("e", "d") == {"d"}


def test_branch_that_was_not_chosen_holds_nobody_up():
    run = Run(shape_of({"a": "bC", "b": "d", "c": "d", "d": "."}))
    assert run.end("a", "b") == {"b"}
    assert run.end("b", "d") == {"d"}


def test_branch_that_ends_elsewhere_lets_the_join_go():
    run = Run(shape_of({"a": "bc", "b": "d", "c": "D.", "d": "."}))
    run.end("a", "b", "c")
    assert run.end("b", "d") == set()
    assert run.end("c", END) == {"d"}
    assert run.past("d") == {"a", "b"}


def test_loop_does_not_wait_for_itself_and_its_joins_wait_again():
    run = Run(shape_of({"a": "bc", "b": "d", "c": "d", "d": "A."}))
    for _ in range(3):
        run.end("a", "b", "c")
        assert run.end("c", "d") == set()
        assert run.end("b", "d") == {"d"}
        assert run.end("d", "a") == {"a"}
    assert run.past("a") == {"a", "b", "c", "d"}


def test_loop_inside_a_branch_holds_the_join_until_it_ends():
    run = Run(shape_of({"a": "bc", "b": "d", "c": "Cd", "d": "."}))
    run.end("a", "b", "c")
    assert run.end("b", "d") == set()
    assert run.end("c", "c") == {"c"}
    assert run.end("c", "c") == {"c"}
    assert run.end("c", "d") == {"d"}


def test_loop_that_is_entered_at_two_places_is_closed_by_its_conditional_edge():
    run = Run(shape_of({"a": "bc", "b": "d", "d": "C.", "c": "d"}))
    run.end("a", "b", "c")
    assert run.end("b", "d") == set()
    assert run.end("c", "d") == {"d"}
    assert run.end("d", "c") == {"c"}
    assert run.end("c", "d") == {"d"}


def test_node_with_one_edge_in_starts_at_once():
    run = Run(shape_of({"a": "bc", "b": ".", "c": "dA", "d": "."}))
    assert run.end("a", "b", "c") == {"b", "c"}
    assert run.end("c", "d", "a") == {"d", "a"}


def test_node_that_is_reached_while_it_runs_runs_again_afterwards():
    run = Run(shape_of({"a": "bc", "b": "A.", "c": "A."}))
    run.end("a", "b", "c")
    assert run.end("b", "a") == {"a"}
    assert run.past("a") == {"a", "b"}
    assert run.end("c", "a") == set()
    assert run.end("a", END) == {"a"}
    assert run.past("a") == {"a", "c"}


def test_limit_stops_what_would_start_and_lets_end_what_runs():
    run = Run(shape_of({"a": "bc", "b": "b", "c": "."}), max_steps=3)
    run.end("a", "b", "c")
    assert run.end("b", "b") == set()
    assert run.flow.limited
    assert run.end("c", END) == set()
    assert run.order == ["a", "b", "c"]


def test_nothing_starts_after_the_limit_though_it_alone_would_have_had_room():
    run = Run(shape_of({"a": "bc", "b": "de", "c": "f", "d": ".", "e": ".", "f": "."}), max_steps=4)
    run.end("a", "b", "c")
    assert run.end("b", "d", "e") == set()  # two more would be too many
    assert run.flow.limited
    assert run.end("c", "f") == set()
    assert run.order == ["a", "b", "c"]


def test_deep_graphs_are_no_problem():
    graph = Graph()
    names = [f"n{number}" for number in range(1_200)]
    for name in names:
        graph.add_node(StatefulNode(name, Nothing, Nothing))
    for one, other in pairwise(names):
        graph.add_edge(one, other)
    graph.set_entry_point("n0")
    shape = Shape(graph)
    assert len(shape.reachable) == 1_200
    assert shape.back == frozenset()


# -- Against the model -----------------------------------------------------------------------------------------------

LETTERS = "abcdef"


@st.composite
def graphs(draw: Any, *, loops: bool = True) -> dict[str, str]:
    """Every node reachable: each but the first has an edge from an earlier one."""
    count = draw(st.integers(1, 6))
    edges: dict[str, set[str]] = {letter: set() for letter in LETTERS[:count]}
    for number in range(1, count):
        edges[LETTERS[draw(st.integers(0, number - 1))]].add(LETTERS[number])
    for _ in range(draw(st.integers(0, 6))):
        source, target = draw(st.integers(0, count - 1)), draw(st.integers(0, count - 1))
        if loops or source < target:
            edges[LETTERS[source]].add(LETTERS[target])
    conditional = draw(st.sets(st.sampled_from(LETTERS)))
    return {
        name: "".join(target.upper() if name in conditional else target for target in sorted(targets))
        for name, targets in edges.items()
    }


def chosen(edges: dict[str, str], name: str, time: int, seed: int) -> list[str]:
    """What `name` leads to the `time`-th time that it runs: all its edges, or some, if they are conditional."""
    dice = random.Random(f"{name} {time} {seed}")
    return [t.lower() for t in edges[name] if t.islower() or dice.random() < 0.5]


def forward_edges(edges: dict[str, str]) -> set[tuple[str, str]]:
    """All edges but those whose target is on every way to their source; and of these, all that close no circle with
    those before them, the conditional ones last."""

    def ways(name: str, way: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield (*way, name)
        for target in edges[name].lower():
            if target not in (*way, name):
                yield from ways(target, (*way, name))

    to: dict[str, list[tuple[str, ...]]] = {}
    for way in ways("a", ()):
        to.setdefault(way[-1], []).append(way)
    plain = [(name, target) for name, targets in edges.items() for target in targets if target.islower()]
    chosen = [(name, target.lower()) for name, targets in edges.items() for target in targets if target.isupper()]
    forward: set[tuple[str, str]] = set()
    for source, target in [*plain, *chosen]:
        if not all(target in way for way in to[source]) and not leads(forward, target, source):
            forward.add((source, target))
    return forward


def leads(forward: set[tuple[str, str]], source: str, goal: str) -> bool:
    return source == goal or any(leads(forward, target, goal) for start, target in forward if start == source)


@settings(max_examples=400, deadline=None)
@given(edges=graphs(), seed=st.integers(0, 10_000))
def test_nodes_start_exactly_when_the_model_says(edges: dict[str, str], seed: int):
    forward = forward_edges(edges)
    run = Run(shape_of(edges), max_steps=40)
    arrived: dict[str, set[str]] = {}
    times: dict[str, int] = {}
    dice = random.Random(seed)
    while run.running:
        name = dice.choice(sorted(run.running))
        times[name] = times.get(name, 0) + 1
        targets = chosen(edges, name, times[name], seed)
        started = run.end(name, *targets)
        for target in targets:
            arrived.setdefault(target, set()).add(name)
        before = set(run.running) - started
        may_start = set()
        for node, sources in arrived.items():
            others = (before | set(arrived)) - {node}
            awaited = {source for source, target in forward if target == node} - sources
            if node not in before and not any(leads(forward, other, s) for other in others for s in awaited):
                may_start.add(node)
        if run.flow.limited:
            assert len(run.order) + len(may_start) > 40
            return
        assert started == may_start
        for node in started:
            del arrived[node]
    assert arrived == {}, "somebody waits for ever"


@settings(max_examples=200, deadline=None)
@given(edges=graphs(loops=False), seed=st.integers(0, 10_000), orders=st.tuples(st.integers(), st.integers()))
def test_without_loops_the_order_in_which_nodes_end_changes_nothing(
    edges: dict[str, str], seed: int, orders: tuple[int, int]
):
    outcomes = []
    for order in orders:
        dice, run, outcome = random.Random(order), Run(shape_of(edges)), {}
        while run.running:
            name = dice.choice(sorted(run.running))
            assert name not in outcome, "without loops a node runs once"
            outcome[name] = run.past(name), run.running[name].rank[:2]
            run.end(name, *chosen(edges, name, 1, seed))
        outcomes.append(outcome)
    assert outcomes[0] == outcomes[1]


def test_a_key_that_is_a_tuple_is_one_choice_and_any_other_tuple_several():
    route = Route("a", None, {("x", 1): "pair", "x": "one", 1: "two"})
    assert list(targets(route, ("x", 1))) == ["pair"]
    assert list(targets(route, ("x", "1"))) == ["one", "two"]
    assert list(targets(route, [("x", 1), "x"])) == ["pair", "one"]
