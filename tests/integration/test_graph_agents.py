"""Programs as agents on a hub: everybody sees their nodes, attempts and patches live, and can cancel them."""

from typing import Any, Literal

import anyio
import pytest
from pydantic import BaseModel, Field

from agentcast.agents.base import Agent
from agentcast.agents.graph import END
from agentcast.agents.registry import Registry, RegistryError
from agentcast.agents.transpiler import AgentTranspiler
from tests.support.graphs import Empty, Text, Topic, graph_of, node, program_of
from tests.support.hub import open_hub
from tests.support.lms import chat, lm_of, pieces
from tests.support.log import Log


class Triage(BaseModel):
    category: Literal["bug", "question"]
    priority: int = Field(ge=1, le=5)


class Sorted(Triage):
    text: str


def added(program: Any, **options: Any) -> Any:
    agent: Agent = Registry().add("triage", program, **options)
    return agent


def triage(*replies: str) -> Any:
    graph = graph_of(
        node("sort", Topic, Triage), node("answer", Triage, Text, lambda t: {"text": t.category}), description="Sorts."
    )
    program = AgentTranspiler.compile(graph, output_model=Sorted)
    rest = list(replies)
    program.set_lm(lm_of(lambda _: pieces(rest.pop(0), 9)))
    return program


BAD, GOOD = chat(category="bug", priority="9"), chat(category="bug", priority="1")


async def test_run_shows_nodes_attempts_and_patches():
    async with open_hub(added(triage(BAD, GOOD))) as hub, hub.client() as client:
        run = await client.start("triage", {"topic": "It crashes"})
        events = (await client.view(run)).events
    ends = {event["node"]: event for event in events if event["event"] == "node_end"}
    starts = {event["node"]: event for event in events if event["event"] == "node_start"}
    assert starts["sort"]["parent"] == starts["triage"]["span"]
    assert (starts["triage"]["kind"], starts["sort"]["kind"]) == ("agent", "graph")
    assert starts["sort"]["inputs"] == {"topic": "It crashes"}
    assert ends["sort"]["patch"] == {"category": "bug", "priority": 1}
    assert ends["answer"]["patch"] == {"text": "bug"}
    (failed,) = [event for event in events if event["event"] == "validation_error"]
    assert (failed["node"], failed["attempt"], failed["failed_fields"]) == ("sort", 1, ["priority"])
    assert failed["span"] == starts["sort"]["span"]
    assert events[-1]["result"] == {"category": "bug", "priority": 1, "text": "bug"}
    state = client.memory.view(run)
    assert state.document["state"] == {"category": "bug", "priority": 1, "text": "bug"}
    assert [message["status"] for message in state.document["messages"]] == ["retracted"] * 2 + ["done"] * 2


async def test_run_that_fails_names_the_node(log: Log):
    log.expect("of agent triage failed")
    async with open_hub(added(triage(*[BAD] * 4))) as hub, hub.client() as client:
        events = (await client.view(await client.start("triage", {"topic": "x"}))).events
    problem = "node 'sort': its output is wrong, after 4 attempts: priority: Input should be less than or equal to 5"
    assert events[-1]["error"] == {"code": "agent_error", "message": problem, "retryable": False, "node": "sort"}
    assert len([event for event in events if event["event"] == "validation_error"]) == 4


async def test_loop_limit_is_reported(log: Log):
    log.expect("of agent triage failed")
    graph = graph_of(node("again", Topic, Empty, lambda _: {}), edges=[("again", "again")], max_steps=3)
    async with open_hub(added(AgentTranspiler.compile(graph))) as hub, hub.client() as client:
        events = (await client.view(await client.start("triage", {"topic": "x"}))).events
    assert events[-1]["error"]["message"] == "no end after 3 steps"
    assert [event["max_steps"] for event in events if event["event"] == "step_limit"] == [3]


async def test_cancel_reaches_into_a_node():
    cancelled = anyio.Event()

    async def hang(given: Topic) -> Any:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            cancelled.set()
            raise

    async with open_hub(added(program_of(node("hang", Topic, Text, hang)))) as hub, hub.client() as client:
        run = await client.start("triage", {"topic": "x"})
        await client.until(lambda event: event.get("node") == "hang")
        await client.ask("cancel", run=run)
        assert (await client.view(run)).events[-1]["event"] == "run_cancelled"
        with anyio.fail_after(5):
            await cancelled.wait()


async def test_agents_describe_their_graph_and_their_types():
    graph = graph_of(node("sort", Topic, Triage), edges=[], description="Sorts.")
    graph.add_conditional_edges("sort", lambda state: state.category, {"bug": "sort", "question": END})
    program = AgentTranspiler.compile(graph, output_model=Triage)
    async with open_hub(added(program)) as hub, hub.http() as http:
        (described,) = (await http.get("/v1/agents")).json()["agents"]
        refused = await http.post("/v1/runs", json={"agent": "triage", "input": {"topic": "x", "more": 1}})
    assert described["graph"] == {
        "entry": "sort",
        "nodes": [{"name": "sort", "kind": "lm"}],
        "edges": [
            {"from": "sort", "to": "sort", "label": "bug", "back": True},
            {"from": "sort", "to": "__end__", "label": "question"},
        ],
    }
    assert described["description"] == "Sorts."
    assert list(described["input"]["properties"]) == ["topic"]
    assert described["output"]["properties"]["priority"]["maximum"] == 5
    assert refused.status_code == 422
    assert "more" in refused.text


async def test_programs_without_a_result_model_and_with_other_descriptions():
    agent = added(program_of(node("up", Topic, Text, lambda t: {"text": t.topic})), description="Mine.")
    async with open_hub(agent) as hub, hub.client() as client:
        events = (await client.view(await client.start("triage", {"topic": "x"}))).events
    assert events[-1]["result"] == {"text": "x"}
    assert agent.spec.description == "Mine."


async def test_aliases_name_what_is_taken_and_fields_what_is_given():
    class Asked(BaseModel):
        topic: str = Field(alias="Topic")

    class Answer(BaseModel):
        text: str = Field(alias="Text")

    agent = added(program_of(node("say", Asked, Answer, lambda asked: {"text": asked.topic}), output=Answer))
    async with open_hub(agent) as hub, hub.client() as client:
        events = (await client.view(await client.start("triage", {"Topic": "x"}))).events
    assert list(agent.spec.input_model.model_json_schema()["properties"]) == ["Topic"]
    assert events[-1]["result"] == {"text": "x"}
    assert list(agent.spec.output_schema["properties"]) == ["text"]


def test_types_without_a_schema_are_refused():
    class Odd(BaseModel):
        model_config = {"arbitrary_types_allowed": True}

        thing: anyio.Path

    with pytest.raises(RegistryError, match="make no JSON Schema"):
        added(program_of(node("a", Odd, Empty, lambda _: {})))


async def test_many_runs_at_once_stay_apart():
    """G8"""
    graph = graph_of(node("up", Topic, Text, lambda t: {"text": t.topic.upper()}))
    agent = added(AgentTranspiler.compile(graph, output_model=Text))
    async with open_hub(agent) as hub, hub.client() as client:
        runs = {await client.start("triage", {"topic": f"t{number}"}): number for number in range(20)}
        for run, number in runs.items():
            assert (await client.view(run)).events[-1]["result"] == {"text": f"T{number}"}
