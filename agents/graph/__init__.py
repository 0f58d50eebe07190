"""Graphs of typed steps: what they are made of, what is wrong with them, and in which order they run.

    graph = Graph()
    graph.add_node(StatefulNode("draft", Topic, Draft, instructions="Write a paragraph."))
    graph.add_node(StatefulNode("check", Draft, Verdict, fn=check))
    graph.add_edge("draft", "check")
    graph.add_conditional_edges("check", lambda state: state.good, {True: END, False: "draft"})
    graph.set_entry_point("draft")

A graph is data. `agentcast.agents.transpiler` makes a program of it. The rules by which it runs are here, without
anything that runs: `flow` says which node is next, `state` who sees which value. docs/graphs.md has them in words. This
package must not know DSPy, how a node does its work, or events.
"""

from agentcast.agents.graph.building import END, Graph, StatefulNode
from agentcast.agents.graph.errors import GraphError

__all__ = ["END", "Graph", "GraphError", "StatefulNode"]
