"""`stream_events`: a program's typed events, for who has no hub."""

import functools
from collections.abc import Collection, Mapping
from typing import Any

from agents.contract import SchemaError, module_contract, read_inputs
from agents.events import AgentEvent
from agents.streaming.dspy_calls import is_async
from agents.streaming.program import Outcome, run_program
from agents.streaming.stream import Stream


class EventStream(Stream[AgentEvent]):
    """The events of one run. After the last one, `outcome` holds what the program returned and used."""

    outcome: Outcome | None = None

    def _settle(self, value: Outcome) -> None:
        self.outcome = value


def stream_events(
    program: Any, inputs: Mapping[str, Any], *, messages: Collection[str] | None = None, name: str | None = None
) -> EventStream:
    """Call the `dspy.Module` `program` with `inputs`, streaming what happens in it: the events that a hub shows.

    Inputs are checked and converted as a hub does it, unless the program's types cannot be told. `messages` names the
    output fields to show, by default all. `name` is the program's own, by default its class's.

    :raises ValueError: an input is missing or wrong, or there is none of that name; it names each.
    """
    shown_name = name or type(program).__name__
    play = functools.partial(_play, program, _read(program, shown_name, inputs), messages, name)
    return EventStream(play, shown_name, threaded=not is_async(program))


def _read(program: Any, name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        contract = module_contract(name, program)
    except SchemaError:
        return dict(inputs)
    return read_inputs(name, contract, inputs)


async def _play(
    program: Any, inputs: Mapping[str, Any], messages: Collection[str] | None, name: str | None, channel: Any
) -> Outcome:
    return await run_program(program, inputs, channel, messages=messages, name=name)
