"""`Graph` and `StatefulNode`: what a user writes. Nothing is checked here; `checking` does that, all at once."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

END = "__end__"
DEFAULT_MAX_STEPS = 15

Kind = Literal["lm", "react", "function", "module"]
OnLoopLimit = Literal["raise", "return"]
Reducer = Callable[[Any, Any], Any]
"""Merges a field, given its value before and a new one: `notes: Annotated[list[str], operator.add]`. It is not called
for the first value."""


@dataclass(frozen=True, eq=False)
class StatefulNode:
    """A step: `input_model` says which fields of the state it is given, `output_model` which ones it sets.

    By default a language model does the work, with `instructions`. Instead of it: `fn`, called with the validated
    instance of `input_model`, sync (on a thread) or async, returns a dict or an `output_model`; `module` is any
    `dspy.Module`, another compiled program too, called with the input fields by name; `tools` let the model act first
    (ReAct). `use_cot` asks the model to reason first.

    An output that breaks `output_model` is asked for again, up to `max_retries` times (`None`: 3 for a language model,
    0 for `fn` and `module`); the model is then given its own answer, what is wrong with it, and
    `refine_instructions`. `timeout` is in seconds, for all attempts together.
    """

    name: str
    input_model: type[BaseModel]
    output_model: type[BaseModel]
    instructions: str | None = None
    max_retries: int | None = None
    refine_instructions: str | None = None
    use_cot: bool = False
    fn: Callable[[Any], Any] | None = None
    module: Any = None
    tools: Sequence[Any] = ()
    timeout: float | None = None

    @property
    def kind(self) -> Kind:
        if self.fn is not None:
            return "function"
        if self.module is not None:
            return "module"
        return "react" if self.tools else "lm"


@dataclass(frozen=True, slots=True)
class Route:
    """Conditional edges: what `choose` returns is looked up in `path_map`. `choose` is a function of the state, sync or
    async, or `None`: the source's own output decides, by its field `decision` (empty: it has none that could)."""

    source: str
    choose: Callable[[Any], Any] | None
    path_map: Mapping[Any, str]
    decision: str = ""


class Graph:
    """Nodes and edges. Compile it with `AgentTranspiler.compile`.

    `input_model` says what the program takes; by default what the entry node takes, and the input fields of later
    nodes that no node sets. A run that comes to its `max_steps`-th node and is not at its end fails
    (`on_loop_limit="raise"`) or ends with what it has (`"return"`). `description` says, for people, what the program
    does.
    """

    def __init__(
        self,
        *,
        input_model: type[BaseModel] | None = None,
        max_steps: int = DEFAULT_MAX_STEPS,
        on_loop_limit: OnLoopLimit = "raise",
        description: str = "",
    ) -> None:
        self.input_model = input_model
        self.max_steps = max_steps
        self.on_loop_limit = on_loop_limit
        self.description = description
        self.nodes: list[StatefulNode] = []
        self.edges: list[tuple[str, str]] = []
        self.routes: list[Route] = []
        self.entry: str | None = None

    def add_node(self, node: StatefulNode) -> None:
        """:raises TypeError: it is something else."""
        if not isinstance(node, StatefulNode):
            raise TypeError(f"a node must be a StatefulNode, not {type(node).__name__}")
        self.nodes.append(node)

    def add_edge(self, source: str, target: str) -> None:
        """After `source` comes `target`, a node's name or `END`. Several edges out of a node run in parallel; a node
        with several edges in waits for those of them that are on the way."""
        edge = (source, _target(target))
        if edge not in self.edges:
            self.edges.append(edge)

    def add_conditional_edges(
        self, source: str, router: Callable[[Any], Any] | StatefulNode | str, path_map: Mapping[Any, str]
    ) -> None:
        """After `source` comes what `path_map` has for the router's choice.

        `router` is a function of the state, sync or async, that returns a key of `path_map` or a list of keys; or the
        name of an output field of `source`, which is the key; or a node, which then runs after `source`, and whose only
        output field, or that named `next_step` or `route`, is the key. A text, too, may stand for a key: "true" for
        `True`, "3" for `3`, an enum member's name or value for the member, and the other way round.
        """
        ends = {key: _target(target) for key, target in path_map.items()}
        if isinstance(router, StatefulNode):
            if router not in self.nodes:
                self.nodes.append(router)
            self.add_edge(source, router.name)
            route = Route(router.name, None, ends, _decision(router.output_model))
        elif isinstance(router, str):
            route = Route(source, None, ends, router)
        else:
            route = Route(source, router, ends)
        if route.choose is not None or route not in self.routes:
            self.routes.append(route)

    def set_entry_point(self, name: str) -> None:
        self.entry = name

    def copy(self) -> "Graph":
        """A graph that later changes of this one do not reach."""
        new = copy.copy(self)
        new.nodes, new.edges, new.routes = list(self.nodes), list(self.edges), list(self.routes)
        return new


def _decision(model: type[BaseModel]) -> str:
    """The field by which a node that routes decides."""
    fields = list(model.model_fields)
    if len(fields) == 1:
        return fields[0]
    return next((name for name in ("next_step", "route") if name in fields), "")


def _target(name: str) -> str:
    return END if name == "END" else name
