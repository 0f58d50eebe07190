"""A graph as data, for clients that draw it, and as Mermaid text."""

from collections.abc import Iterator
from typing import Any

from agentcast.agents.graph.building import END, Graph
from agentcast.agents.graph.flow import Shape


def described(graph: Graph) -> dict[str, Any]:
    """`{"entry", "nodes": [{"name", "kind"}], "edges": [{"from", "to", "label"?, "back"?}]}`; the end is `"__end__"`.

    An edge with a label is conditional, one that closes a loop has `back`. A node that is a graph itself has it as
    `graph`.
    """
    return {
        "entry": graph.entry,
        "nodes": [_node(node.name, node.kind, node.module) for node in graph.nodes],
        "edges": list(_edges(graph)),
    }


def _node(name: str, kind: str, module: Any) -> dict[str, Any]:
    inner = getattr(module, "graph", None)
    return {"name": name, "kind": kind, **({"graph": described(inner)} if isinstance(inner, Graph) else {})}


def _edges(graph: Graph) -> Iterator[dict[str, Any]]:
    back = Shape(graph).back
    labelled = [
        (route.source, target, {"label": str(getattr(key, "value", key))})
        for route in graph.routes
        for key, target in route.path_map.items()
    ]
    going = {source for source, _ in graph.edges} | {route.source for route in graph.routes}
    ends = [(node.name, END) for node in graph.nodes if node.name not in going]
    for source, target, label in [*((*edge, {}) for edge in [*graph.edges, *ends]), *labelled]:
        yield {"from": source, "to": target, **label, **({"back": True} if (source, target) in back else {})}


_BOXES = {"lm": '["{}"]', "react": '[["{}"]]', "function": '("{}")', "module": '[/"{}"/]'}


def mermaid(graph: Graph) -> str:
    """The graph as a Mermaid flowchart: https://mermaid.js.org/syntax/flowchart.html"""
    names = {node.name: f"n{number}" for number, node in enumerate(graph.nodes)} | {END: "finish"}
    lines = ["flowchart TD", '    start(["start"])']
    lines += [f"    {names[node.name]}{_BOXES[node.kind].format(node.name)}" for node in graph.nodes]
    lines += ['    finish(["end"])', f"    start --> {names[str(graph.entry)]}"]
    for edge in _edges(graph):
        arrow = f'-- "{_quoted(edge["label"])}" -->' if "label" in edge else "-->"
        lines.append(f"    {names[edge['from']]} {arrow} {names[edge['to']]}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return text.replace("#", "#35;").replace('"', "#quot;").replace("\n", " ")
