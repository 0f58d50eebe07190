"""What all runs of one compiled graph share: read-only, and without the modules that do the work, which belong to the
program and may be tuned or replaced."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from agentcast.agents.graph import Graph, GraphError, Reducer, StatefulNode
from agentcast.agents.graph.checking import problems, program_inputs, reducers
from agentcast.agents.graph.shape import Shape
from agentcast.agents.transpiler.attempts import ErrorFormatter


@dataclass(frozen=True)
class Plan:
    graph: Graph
    shape: Shape
    nodes: Mapping[str, StatefulNode]
    reducers: Mapping[str, Reducer]
    input_model: type[BaseModel]
    output_model: type[BaseModel] | None
    formatter: ErrorFormatter


def plan_of(
    graph: Graph, output_model: type[BaseModel] | None, formatter: ErrorFormatter, known: Sequence[str] = ()
) -> Plan:
    """:raises GraphError: the graph cannot run; it names every reason, those that are `known` already, too."""
    graph = graph.copy()
    found = [*problems(graph, output_model), *known]
    taken = program_inputs(graph)
    if found or taken is None:
        raise GraphError(found)
    nodes = {node.name: node for node in graph.nodes}
    return Plan(graph, Shape(graph), nodes, reducers(graph), taken, output_model, formatter)
