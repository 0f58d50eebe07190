"""The problems of a graph are reported before it runs: all of them, by node and field."""

import operator
from typing import Annotated, Any

import dspy
import pytest
from pydantic import BaseModel, RootModel, create_model

from agentcast.agents.graph import END, Graph, GraphError, StatefulNode
from agentcast.agents.transpiler import AgentTranspiler
from tests.support.graphs import Empty, Text, Topic, graph_of, node


def problems(graph: Graph, output: Any = None) -> tuple[str, ...]:
    with pytest.raises(GraphError) as error:
        AgentTranspiler.compile(graph, output_model=output)
    for problem in error.value.problems:
        assert problem in str(error.value)
    return error.value.problems


def one(graph: Graph, output: Any = None) -> str:
    (problem,) = problems(graph, output)
    return problem


def given(_: Any) -> dict[str, Any]:
    return {}


def fields(**types: Any) -> type[BaseModel]:
    definitions: dict[str, Any] = {name: (type, ...) for name, type in types.items()}
    return create_model("Fields", **definitions)


ok = node("ok", Topic, Text, given)


def test_a_sound_graph_compiles():
    program = AgentTranspiler.compile(graph_of(ok), output_model=Text)
    assert isinstance(program, dspy.Module)
    assert program.input_model is Topic
    assert program.output_model is Text


def test_unknown_edge_target():
    assert one(graph_of(ok, edges=[("ok", "nowhere")])) == "edge 'ok' → 'nowhere': there is no node 'nowhere'"


def test_unknown_edge_source():
    assert one(graph_of(ok, edges=[("nobody", "ok")])) == "edge 'nobody' → 'ok': there is no node 'nobody'"


def test_unknown_target_of_a_conditional_edge():
    graph = graph_of(ok, edges=[])
    graph.add_conditional_edges("ok", lambda _: "x", {"x": "nowhere", "y": END, "z": "END"})
    assert one(graph) == "conditional edges of 'ok': 'x' leads to 'nowhere', and there is no such node"


def test_unknown_source_empty_map_and_useless_router():
    graph = graph_of(ok)
    graph.add_conditional_edges("nobody", lambda _: "x", {"x": END})
    graph.add_conditional_edges("ok", 3, {})  # type: ignore[arg-type]
    assert problems(graph) == (
        "conditional edges of 'nobody': there is no such node",
        "conditional edges of 'ok': path_map is empty",
        "conditional edges of 'ok': the router must be a function, a StatefulNode or the name of an output field",
    )


def test_no_nodes_and_no_entry_point():
    assert problems(Graph()) == (
        "it has no nodes: add one with graph.add_node(StatefulNode(…))",
        "it has no entry point: call graph.set_entry_point(name)",
    )


def test_entry_point_that_does_not_exist():
    graph = graph_of(ok)
    graph.set_entry_point("other")
    assert one(graph) == "the entry point 'other' is no node of it"


def test_unreachable_node():
    graph = graph_of(ok, node("island", Topic, Empty, given), edges=[("island", "ok")])
    assert one(graph) == "node 'island' cannot be reached from the entry point 'ok'"


def test_input_field_that_nothing_provides():
    graph = graph_of(ok, node("next", fields(text=str, mood=str), Empty, given), input_model=Topic)
    assert one(graph) == (
        "node 'next': nothing provides its input field 'mood': no node before it sets it, and the program takes topic"
    )


def test_input_field_that_only_a_later_or_parallel_node_sets():
    mood = fields(mood=str)
    graph = graph_of(
        ok, node("side", Topic, mood, given), node("next", mood, Empty, given), edges=[("ok", "side"), ("ok", "next")]
    )
    assert "node 'next': nothing provides its input field 'mood'" in one(graph)


def test_input_field_that_a_loop_or_a_default_or_the_program_provides():
    class Feedback(Topic):
        mood: str = "fine"

    graph = graph_of(
        node("a", Feedback, Text, given), node("b", fields(text=str, topic=str), fields(mood=str), given), edges=[]
    )
    graph.add_edge("a", "b")
    graph.add_conditional_edges("b", lambda _: True, {True: "a", False: END})
    AgentTranspiler.compile(graph, output_model=fields(text=str, mood=str, topic=str))
    graph = graph_of(ok, node("c", fields(extra=int), Empty, given), input_model=fields(topic=str, extra=int))
    assert set(AgentTranspiler.compile(graph).input_model.model_fields) == {"topic", "extra"}


def test_later_part_of_a_loop_does_not_provide_the_first_input():
    mood = fields(mood=str)
    graph = graph_of(ok, node("use", mood, Empty, given), node("set", Topic, mood, given), edges=[("ok", "use")])
    graph.add_edge("use", "set")
    graph.add_conditional_edges("set", lambda _: 1, {1: "ok", 2: END})
    assert "node 'use': nothing provides its input field 'mood'" in one(graph)


def test_own_output_does_not_provide_the_first_input():
    both = fields(mood=str)
    graph = graph_of(ok, node("self", both, both, given), edges=[("ok", "self"), ("self", "self")])
    assert "nothing provides its input field 'mood'" in one(graph)


def test_output_model_that_the_graph_cannot_fill():
    assert one(graph_of(ok), fields(text=str, score=int)) == (
        "nothing provides the field 'score' of the program's output_model Fields"
    )


@pytest.mark.parametrize("name", ["signature", "demos", "config", "lm", "instructions", "previous_answer", "completed"])
def test_reserved_field_name(name: str):
    reserved = fields(**{name: str})
    assert one(graph_of(node("a", reserved, Empty, given))) == (
        f"node 'a': the field name {name!r} of Fields is reserved"
    )
    assert one(graph_of(node("a", Empty, reserved, given))) == (
        f"node 'a': the field name {name!r} of Fields is reserved"
    )


def test_field_names_that_are_reserved_for_some_nodes():
    reasoning, trajectory = fields(reasoning=str), fields(trajectory=str)
    AgentTranspiler.compile(graph_of(node("a", Topic, reasoning)))
    assert "'reasoning'" in one(graph_of(node("a", Topic, reasoning, use_cot=True)))
    assert "'trajectory'" in one(graph_of(node("a", Topic, trajectory, tools=[len])))


def test_reducers_that_disagree():
    add, other = operator.add, operator.or_
    graph = graph_of(
        node("a", Topic, fields(notes=Annotated[list[str], add]), given),
        node("b", Topic, fields(notes=Annotated[list[str], add]), given),
        node("c", Topic, fields(notes=list[str]), given),
        node("d", Topic, fields(notes=Annotated[list[str], other]), given),
    )
    assert problems(graph) == tuple(
        f"node '{name}': field 'notes' has another reducer, or none, than in other nodes" for name in "abc"
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"fn": given, "tools": [len]}, "it has two of fn, module, tools"),
        ({"fn": "x"}, "fn must be callable"),
        ({"module": "x"}, "module must be a dspy.Module"),
        ({"fn": given, "use_cot": True}, "use_cot is for nodes that only ask the model, not for function nodes"),
        ({"max_retries": -1}, "max_retries is -1; it must be 0 or more"),
        ({"timeout": 0}, "timeout is 0; it must be above 0"),
        ({"input_model": dict}, "input_model must be a pydantic model class"),
        ({"output_model": Text(text="")}, "output_model must be a pydantic model class"),
    ],
)
def test_options_of_a_node(options: dict[str, Any], problem: str):
    graph = graph_of(StatefulNode(**{"name": "a", "input_model": Topic, "output_model": Text, **options}))
    assert one(graph) == f"node 'a': {problem}"


@pytest.mark.parametrize("module", [given, dspy.Predict], ids=["function", "class"])
def test_module_that_is_callable_but_none(module: Any):
    assert one(graph_of(node("a", Topic, Text, module=module))) == (
        "node 'a': module must be a dspy.Module; for functions there is fn"
    )


def test_root_model():
    graph = graph_of(node("a", Topic, RootModel[list[int]], given))
    assert one(graph) == "node 'a': a RootModel has no field to be named by: make a model with one"


def test_tools_and_modules_are_reported_with_the_rest():
    graph = graph_of(
        node("a", Topic, Empty, tools=["x"]),
        node("b", Topic, Empty, module=given),
        node("c", Topic, Empty, module="x"),
        node("d", Topic, fields(demos=str), tools=["x"]),
        edges=[("a", "b"), ("b", "c"), ("c", "d"), ("d", "e")],
    )
    assert problems(graph) == (
        "node 'c': module must be a dspy.Module",
        "edge 'd' → 'e': there is no node 'e'",
        "node 'd': the field name 'demos' of Fields is reserved",
        "node 'a': a tool must be a function or a dspy.Tool, not str",
        "node 'b': module must be a dspy.Module; for functions there is fn",
    )


def test_node_that_is_none():
    with pytest.raises(TypeError, match=r"^a node must be a StatefulNode, not str$"):
        Graph().add_node("write")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "END", "__end__", "two words", "it's", "x" * 65])
def test_names_of_nodes(name: str):
    assert "the name must start with a letter" in one(graph_of(node(name, Topic, Text, given)))


def test_two_nodes_of_one_name():
    assert one(graph_of(ok, node("ok", Topic, Text, given), edges=[])) == "node 'ok': there are two of that name"


def test_options_of_the_graph():
    graph = graph_of(ok, max_steps=0, on_loop_limit="stop", input_model=dict)
    assert problems(graph)[:3] == (
        "max_steps is 0; it must be 1 or more",
        "input_model must be a pydantic model class",
        "on_loop_limit is 'stop'; it must be 'raise' or 'return'",
    )


def test_tool_that_is_of_no_use():
    assert one(graph_of(node("a", Topic, Text, tools=["x"]))) == (
        "node 'a': a tool must be a function or a dspy.Tool, not str"
    )


def test_node_that_routes_needs_one_field_to_do_so():
    graph = graph_of(ok)
    router = node("judge", Text, fields(good=bool, why=str), given)
    graph.add_conditional_edges("ok", router, {True: END, False: "ok"})
    assert one(graph) == (
        "node 'judge' routes, so its output_model must have one field, or one named 'next_step' or 'route'"
    )
    graph = graph_of(ok)
    router = node("judge", Text, fields(good=bool), given)
    graph.add_conditional_edges("ok", router, {True: END, False: "ok"})
    graph.add_conditional_edges("ok", router, {True: END, False: "ok"})
    AgentTranspiler.compile(graph)
    graph.add_conditional_edges("ok", router, {True: "ok"})
    assert one(graph) == "node 'judge' routes by two different path_maps"


def test_all_problems_are_reported_at_once():
    graph = graph_of(ok, node("island", fields(mood=str, signature=str), Text, given), edges=[("ok", "gone")])
    found = problems(graph, fields(score=int))
    assert len(found) == 4
    assert [problem for problem in found if "'gone'" in problem]
    assert [problem for problem in found if "'island' cannot be reached" in problem]
    assert [problem for problem in found if "'signature'" in problem]
    assert [problem for problem in found if "'score'" in problem]


def test_graph_as_mermaid_and_as_data():
    inner = AgentTranspiler.compile(graph_of(ok))
    graph = graph_of(node("ask", Topic, Text), node("deep", Topic, Text, module=inner), edges=[("ask", "deep")])
    graph.add_conditional_edges("deep", lambda _: 1, {'say "x"': "ask", False: "END"})
    program = AgentTranspiler.compile(graph)
    assert program.mermaid() == (
        "flowchart TD\n"
        '    start(["start"])\n'
        '    n0["ask"]\n'
        '    n1[/"deep"/]\n'
        '    finish(["end"])\n'
        "    start --> n0\n"
        "    n0 --> n1\n"
        '    n1 -- "say #quot;x#quot;" --> n0\n'
        '    n1 -- "False" --> finish\n'
    )
    assert program.describe() == {
        "entry": "ask",
        "nodes": [
            {"name": "ask", "kind": "lm"},
            {
                "name": "deep",
                "kind": "module",
                "graph": {
                    "entry": "ok",
                    "nodes": [{"name": "ok", "kind": "function"}],
                    "edges": [{"from": "ok", "to": "__end__"}],
                },
            },
        ],
        "edges": [
            {"from": "ask", "to": "deep"},
            {"from": "deep", "to": "ask", "label": 'say "x"', "back": True},
            {"from": "deep", "to": "__end__", "label": "False"},
        ],
    }


def test_compiled_program_does_not_follow_later_changes_of_the_graph():
    graph = graph_of(ok)
    program = AgentTranspiler.compile(graph)
    graph.add_edge("ok", "nowhere")
    graph.max_steps = 0
    assert [edge["to"] for edge in program.describe()["edges"]] == ["__end__"]
    assert program.graph.max_steps == 15
