"""What is wrong with a graph: all of it at once, before it ever runs."""

import copy
import inspect
import re
import warnings
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, RootModel, create_model
from pydantic.fields import FieldInfo

from agentcast.agents.graph.building import END, Graph, Reducer, Route, StatefulNode
from agentcast.agents.graph.flow import Shape

RESERVED = frozenset(
    # What DSPy takes for itself when a predictor is called, or has on signatures and predictions.
    {"signature", "demos", "config", "lm", "prediction", "new_signature", "instructions", "fields", "input_fields"}
    | {"output_fields", "completions", "self", "keys", "values", "items", "get", "copy"}
    # What a correction is made of, and what the adapters end an answer with.
    | {"previous_answer", "problems", "completed"}
)
REACT_RESERVED = frozenset({"trajectory", "max_iters", "next_thought", "next_tool_name", "next_tool_args"})

CALL_OPTIONS = frozenset({"max_retries", "max_steps", "on_loop_limit"})
"""What every call of a program takes besides its inputs."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


def problems(graph: Graph, output_model: type[BaseModel] | None) -> list[str]:
    """All reasons why `graph` cannot be compiled, each naming its node and field."""
    structure = [*_node_problems(graph), *_edge_problems(graph), *_decision_problems(graph), *_entry_problems(graph)]
    fields = [*_name_problems(graph), *_reducer_problems(graph), *_input_problems(graph)]
    return [*structure, *fields, *_flow_problems(graph, output_model)]


def option_problems(max_retries: Any = 0, max_steps: Any = 1, on_loop_limit: Any = "raise") -> Iterator[str]:
    """What is wrong with the options of a graph or of a call."""
    if not isinstance(max_retries, int) or max_retries < 0:
        yield f"max_retries is {max_retries!r}; it must be 0 or more"
    if not isinstance(max_steps, int) or max_steps < 1:
        yield f"max_steps is {max_steps!r}; it must be 1 or more"
    if on_loop_limit not in ("raise", "return"):
        yield f"on_loop_limit is {on_loop_limit!r}; it must be 'raise' or 'return'"


def is_sound(node: StatefulNode) -> bool:
    """Whether there is nothing wrong with `node` itself."""
    return next(_own_problems(node), None) is None and next(_names_taken(node), None) is None


def reducers(graph: Graph) -> dict[str, Reducer]:
    """The fields that merge."""
    return {
        name: reducer
        for node in graph.nodes
        for name, info in _fields(node.output_model).items()
        if (reducer := reducer_of(info)) is not None
    }


def reducer_of(info: FieldInfo) -> Reducer | None:
    return next((item for item in info.metadata if inspect.isroutine(item)), None)


def program_inputs(graph: Graph) -> type[BaseModel] | None:
    """The model of what the program takes."""
    base = declared_inputs(graph)
    if base is None or base is graph.input_model or not _is_model(base):
        return base
    later = _later_inputs(graph, base)
    if not later:
        return base
    definitions: dict[str, Any] = {name: (info.annotation, copy.copy(info)) for name, info in later.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a field may well be called "schema" or "copy"
        return create_model(
            base.__name__, __base__=base, __doc__=base.__doc__, __module__=base.__module__, **definitions
        )


def declared_inputs(graph: Graph) -> type[BaseModel] | None:
    """The program's inputs without those that only later nodes read: the graph's own, or those of the entry node."""
    if graph.input_model is not None:
        return graph.input_model
    return next((node.input_model for node in graph.nodes if node.name == graph.entry), None)


def _later_inputs(graph: Graph, base: type[BaseModel]) -> dict[str, FieldInfo]:
    """The input fields that no node sets and `base` does not have, as the first node declares them that requires them,
    or else the first that reads them."""
    reachable = Shape(graph).reachable
    nodes = [node for node in graph.nodes if node.name in reachable]
    known = set(_fields(base)).union(*(_fields(node.output_model) for node in nodes))
    found: dict[str, FieldInfo] = {}
    for node in nodes:
        for name, info in _fields(node.input_model).items():
            is_new = name not in found or (info.is_required() and not found[name].is_required())
            if name not in known and is_new:
                found[name] = info
    return found


# -- Nodes ---------------------------------------------------------------------------------------------------------


def _node_problems(graph: Graph) -> Iterator[str]:
    if not graph.nodes:
        yield "it has no nodes: add one with graph.add_node(StatefulNode(…))"
    yield from option_problems(max_steps=graph.max_steps)
    if graph.input_model is not None and not _is_model(graph.input_model):
        yield "input_model must be a pydantic model class"
    yield from option_problems(on_loop_limit=graph.on_loop_limit)
    seen: set[str] = set()
    for node in graph.nodes:
        if node.name in seen:
            yield f"node {node.name!r}: there are two of that name"
        seen.add(node.name)
        for problem in _own_problems(node):
            yield f"node {node.name!r}: {problem}"


def _own_problems(node: StatefulNode) -> Iterator[str]:
    named = bool(_NAME.fullmatch(str(node.name))) and node.name not in (END, "END")
    retries, timeout = node.max_retries, node.timeout
    for is_wrong, problem in (
        (not named, "the name must start with a letter or _, go on with up to 63 of A-z, 0-9, _ and -, and not be END"),
        (not _is_model(node.input_model), "input_model must be a pydantic model class"),
        (not _is_model(node.output_model), "output_model must be a pydantic model class"),
        (
            _is_root(node.input_model) or _is_root(node.output_model),
            "a RootModel has no field to be named by: make a model with one",
        ),
        (sum((node.fn is not None, node.module is not None, bool(node.tools))) > 1, "it has two of fn, module, tools"),
        (not _may_call(node.fn), "fn must be callable"),
        (not _may_call(node.module), "module must be a dspy.Module"),
        (retries is not None and retries < 0, f"max_retries is {retries}; it must be 0 or more"),
        (timeout is not None and not timeout > 0, f"timeout is {timeout}; it must be above 0"),
        (
            node.kind != "lm" and node.use_cot,
            f"use_cot is for nodes that only ask the model, not for {node.kind} nodes",
        ),
    ):
        if is_wrong:
            yield problem


def _is_root(value: Any) -> bool:
    return _is_model(value) and issubclass(value, RootModel)


def _may_call(value: Any) -> bool:
    return value is None or callable(value)


# -- Edges ---------------------------------------------------------------------------------------------------------


def _edge_problems(graph: Graph) -> Iterator[str]:
    names = {node.name for node in graph.nodes}
    for source, target in graph.edges:
        if source not in names:
            yield f"edge {source!r} → {target!r}: there is no node {source!r}"
        if target not in {*names, END}:
            yield f"edge {source!r} → {target!r}: there is no node {target!r}"
    for route in graph.routes:
        for problem in _route_problems(route, names):
            yield f"conditional edges of {route.source!r}: {problem}"


def _route_problems(route: Route, names: set[str]) -> Iterator[str]:
    if route.source not in names:
        yield "there is no such node"
    if not route.path_map:
        yield "path_map is empty"
    if not _may_call(route.choose):
        yield "the router must be a function, a StatefulNode or the name of an output field"
    for key, target in route.path_map.items():
        if target not in {*names, END}:
            yield f"{key!r} leads to {target!r}, and there is no such node"


def _decision_problems(graph: Graph) -> Iterator[str]:
    deciding = [route for route in graph.routes if route.choose is None]
    for route in deciding:
        node = next((node for node in graph.nodes if node.name == route.source), None)
        if node is None or not _is_model(node.output_model) or route.decision in node.output_model.model_fields:
            continue
        if route.decision:
            known = ", ".join(node.output_model.model_fields) or "none"
            yield (
                f"node {route.source!r} routes by {route.decision!r}, which is no field of its output_model; it has "
                f"{known}"
            )
        else:
            yield (
                f"node {route.source!r} routes, so its output_model must have one field, or one named 'next_step' or "
                "'route'"
            )
    sources = [(route.source, route.decision) for route in deciding]
    for source, decision in dict.fromkeys(sources):
        if sources.count((source, decision)) > 1:
            yield f"node {source!r} routes by two different path_maps"


def _entry_problems(graph: Graph) -> Iterator[str]:
    names = [node.name for node in graph.nodes]
    if graph.entry is None:
        yield "it has no entry point: call graph.set_entry_point(name)"
    elif graph.entry not in names:
        yield f"the entry point {graph.entry!r} is no node of it"
    else:
        reachable = Shape(graph).reachable
        for name in dict.fromkeys(names):
            if name not in reachable:
                yield f"node {name!r} cannot be reached from the entry point {graph.entry!r}"


# -- Fields --------------------------------------------------------------------------------------------------------


def _name_problems(graph: Graph) -> Iterator[str]:
    for node in graph.nodes:
        for problem in _names_taken(node):
            yield f"node {node.name!r}: {problem}"


def _names_taken(node: StatefulNode) -> Iterator[str]:
    for model in filter(_is_model, (node.input_model, node.output_model)):
        for name in model.model_fields:
            if name in _reserved(node):
                yield f"the field name {name!r} of {model.__name__} is reserved"


def _reducer_problems(graph: Graph) -> Iterator[str]:
    merging = reducers(graph)
    for node in graph.nodes:
        for name, info in _fields(node.output_model).items():
            if name in merging and reducer_of(info) != merging[name]:
                yield f"node {node.name!r}: field {name!r} has another reducer, or none, than in other nodes"


def _reserved(node: StatefulNode) -> frozenset[str]:
    names = RESERVED
    if isinstance(getattr(node.module, "graph", None), Graph):
        names |= CALL_OPTIONS
    if node.kind == "react":
        names |= REACT_RESERVED | {"reasoning"}
    return names | {"reasoning"} if node.use_cot else names


def _input_problems(graph: Graph) -> Iterator[str]:
    for name in sorted(CALL_OPTIONS.intersection(_fields(program_inputs(graph)))):
        yield f"the program's input field {name!r} has the name of an option that every call takes: rename it"


def _flow_problems(graph: Graph, output_model: type[BaseModel] | None) -> Iterator[str]:
    shape = Shape(graph)
    given = set(_fields(program_inputs(graph)))
    nodes = [node for node in graph.nodes if node.name in shape.reachable]
    sets = {node.name: set(_fields(node.output_model)) for node in nodes}
    for node in nodes:
        there = given.union(*(sets[name] for name in shape.ancestors(node.name)))
        for name in sorted(_required(node.input_model) - there):
            takes = ", ".join(sorted(given)) or "nothing"
            yield (
                f"node {node.name!r}: nothing provides its input field {name!r}: no node before it sets it, and the "
                f"program takes {takes}"
            )
    if output_model is None:
        return
    if not _is_model(output_model):
        yield "the program's output_model must be a pydantic model class"
    for name in sorted(_required(output_model) - given.union(*sets.values())):
        yield f"nothing provides the field {name!r} of the program's output_model {output_model.__name__}"


def _required(model: Any) -> set[str]:
    return {name for name, info in _fields(model).items() if info.is_required()}


def _fields(model: Any) -> dict[str, FieldInfo]:
    return model.model_fields if _is_model(model) else {}


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)
