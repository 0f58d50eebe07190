"""Graphs for tests: language models that answer as a test says, and what a stream of events was."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import anyio
import anyio.lowlevel
import dspy
from dspy.lm15 import Message, Request, Response
from pydantic import BaseModel

from agentcast.agents.graph import END, Graph, StatefulNode
from agentcast.agents.transpiler import AgentTranspiler
from tests.support.lms import USAGE, chat


class Topic(BaseModel):
    topic: str


class Text(BaseModel):
    text: str


class Empty(BaseModel):
    pass


def graph_of(*nodes: StatefulNode, edges: Iterable[tuple[str, str]] | None = None, **options: Any) -> Graph:
    """A graph entered at its first node. Without `edges` the nodes form a chain."""
    graph = Graph(**options)
    for node in nodes:
        graph.add_node(node)
    if edges is None:
        names = [node.name for node in nodes]
        edges = zip(names, [*names[1:], END], strict=True)
    for source, target in edges:
        graph.add_edge(source, target)
    graph.set_entry_point(nodes[0].name)
    return graph


def program_of(*nodes: StatefulNode, output: Any = None, **options: Any) -> Any:
    return AgentTranspiler.compile(graph_of(*nodes, **options), output_model=output)


def node(name: str, takes: Any, gives: Any, fn: Callable[[Any], Any] | None = None, **options: Any) -> StatefulNode:
    return StatefulNode(name, takes, gives, fn=fn, **options)


class Script:
    """A language model that gives the replies it was made with, one after another, and keeps what it was asked.

    A reply is a text, an exception, a mapping of fields (as `ChatAdapter` has them), or a function of the prompt that
    gives one of these, perhaps later.
    """

    def __init__(self, *replies: Any, forever: Any = None) -> None:
        self.replies = list(replies)
        self.forever = forever
        self.prompts: list[str] = []
        self.systems: list[str] = []

    def use(self) -> AbstractContextManager[Any]:
        """Inside, DSPy uses this model."""
        lm = dspy.LM("script/lm", engine=_NoSync(), async_engine=self, cache=False, num_retries=0)
        manager: AbstractContextManager[Any] = dspy.context(lm=lm, adapter=dspy.ChatAdapter())
        return manager

    async def complete(self, request: Request) -> Response:
        await anyio.lowlevel.checkpoint()
        prompt = request.messages[-1].text or ""
        self.prompts.append(prompt)
        self.systems.append(str(request.system))
        reply = self.replies.pop(0) if self.replies else self.forever
        if callable(reply):
            reply = reply(prompt)
            if hasattr(reply, "__await__"):
                reply = await reply
        if isinstance(reply, Exception):
            raise reply
        text = chat(**reply) if isinstance(reply, Mapping) else str(reply)
        message = Message.assistant(text)
        return Response(id=None, model=request.model, message=message, finish_reason="stop", usage=USAGE)

    async def aclose(self) -> None:
        pass


class _NoSync:
    def complete(self, request: Request) -> Response:
        raise NotImplementedError


async def events_of(stream: Any) -> list[dict[str, Any]]:
    """All events; an exception that ends them is kept as `{"event": "raised", "exception": …}`."""
    events: list[dict[str, Any]] = []
    with anyio.fail_after(20):
        try:
            async for event in stream:
                events.append(event)  # noqa: PERF401 -- those before an exception are wanted
        except Exception as error:  # noqa: BLE001 -- handed on
            events.append({"event": "raised", "exception": error})
    return events


def of(kind: str, events: Iterable[Mapping[str, Any]]) -> list[Any]:
    return [event for event in events if event["event"] == kind]


def outline(events: Iterable[Mapping[str, Any]], *kinds: str) -> list[tuple[str, str]]:
    """(event, node) of the events of nodes, or of those of `kinds`."""
    wanted = kinds or ("node_start", "node_end", "node_error", "validation_error")
    return [(event["event"], event["node"]) for event in events if event["event"] in wanted]
