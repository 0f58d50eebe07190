"""The zoo: every module of DSPy × adapters × types of outputs, as an agent and through `stream_events`.

Each runs, streams, and gives what plain DSPy gives when the model says the same. The table is in docs/programs.md.
"""

import json
from collections.abc import Awaitable
from typing import Any

import dspy
import pytest
from pydantic import TypeAdapter

from agentcast.agents.base import Task
from agentcast.agents.events import AgentEvent
from agentcast.agents.registry import Registry
from agentcast.agents.streaming import stream_events
from agentcast.agents.values import plain
from tests.support.zoo import ADAPTERS, TYPES, ZOO, settings_for, signature

REFUSED_BY_DSPY = {
    # The JSON adapter wants to be given tools where it is asked for calls; `BestOfN` takes the error for a bad answer.
    *((species, "JSONAdapter", "ToolCalls") for species in set(ZOO) - {"BestOfN", "ReActV2"}),
    # The tool that submits the answer wants an object where the model writes a text.
    *(("ReActV2", adapter, kind) for adapter in ADAPTERS for kind in ("Code", "Reasoning")),
}
IN_A_CALL = {"RLM"}
"""Their results come out of code that the model writes, and are no messages of their own."""


class Heard:
    def __init__(self) -> None:
        self.events: list[AgentEvent] = []

    async def send(self, event: AgentEvent) -> None:
        self.events.append(event)

    def nowait(self, event: AgentEvent) -> None:
        self.events.append(event)


class Case:
    def __init__(self, species: str, adapter: str, kind: str) -> None:
        self.species, self.adapter = ZOO[species], adapter
        self.type, self.value = TYPES[kind]

    def settings(self) -> Any:
        return dspy.context(**settings_for(self.adapter, self.species.script(self.type, self.value)), trace=[])

    async def plain(self) -> Any:
        """What plain DSPy gives."""
        with self.settings():
            return self.species.make(self.type)(**self.species.inputs)

    async def hosted(self) -> tuple[Any, list[AgentEvent]]:
        options = {"signature": signature(self.type)} if self.species.signature else {}
        agent: Any = Registry().add("animal", self.species.make(self.type), **options)
        heard = Heard()
        with self.settings():
            given = agent.spec.input_model.model_validate_json(json.dumps(self.species.inputs))
            return await agent.run(Task(run="r", input=given), heard), heard.events

    async def streamed(self) -> tuple[Any, list[AgentEvent]]:
        with self.settings():
            stream = stream_events(self.species.make(self.type), self.species.inputs)
            events = [event async for event in stream]
        assert stream.outcome is not None
        return stream.outcome.prediction, events


def same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and (one == other or plain(one) == plain(other))


async def outcome(made: Awaitable[Any]) -> Any:
    """What it gives, or the type of the error."""
    try:
        return await made
    except Exception as error:  # noqa: BLE001 -- compared
        return type(error)


def check_messages(events: list[AgentEvent]) -> dict[str, list[str]]:
    """The texts of the messages by field; each is the sum of its tokens."""
    fields: dict[str, str] = {}
    tokens: dict[str, str] = {}
    texts: dict[str, list[str]] = {}
    for event in events:
        if event.event == "message_start":
            fields[event.message] = event.field
        elif event.event == "token":
            tokens[event.message] = tokens.get(event.message, "") + event.delta
        elif event.event == "message_end":
            assert tokens.pop(event.message) == event.text
            texts.setdefault(fields.pop(event.message), []).append(event.text)
        elif event.event == "message_retracted":
            del fields[event.message]
    assert fields == {}
    return texts


pytestmark = [  # of DSPy's own modules
    pytest.mark.filterwarnings(f"ignore:{name} .*is deprecated:DeprecationWarning")
    for name in ("CodeAct", "ProgramOfThought", "The 'prefix' argument")
]
CASES = [(name, adapter, kind) for name, species in ZOO.items() for adapter in ADAPTERS for kind in species.types]


@pytest.mark.parametrize(("species", "adapter", "kind"), CASES, ids=map("-".join, CASES))
async def test_it_runs_streams_and_gives_what_dspy_gives(species: str, adapter: str, kind: str):
    case = Case(species, adapter, kind)
    expected = await outcome(case.plain())
    streamed = await outcome(case.streamed())
    hosted = await outcome(case.hosted())
    if isinstance(expected, type):
        assert (species, adapter, kind) in REFUSED_BY_DSPY
        assert (streamed, hosted) == (expected, expected)
        return
    (prediction, events), (result, hosted_events) = streamed, hosted
    texts = check_messages(events)
    assert check_messages(hosted_events) == texts
    if expected is None:
        assert (prediction, result) == (None, None)
        return
    assert set(prediction.keys()) == set(expected.keys())
    assert same(prediction.result, expected.result)
    assert same(TypeAdapter(case.type).validate_json(json.dumps(result["result"])), expected.result)
    assert any(event.event == "token" for event in events) or expected.result is None
    if isinstance(expected.result, str) and species not in IN_A_CALL:
        assert expected.result in texts["result"]
