"""`stream_events`: a program's typed events, for who has no hub."""

import functools
import weakref
from collections.abc import Collection, Mapping
from typing import Any

from agentcast.agents.contract import Contract, SchemaError, module_contract, read_inputs, signature_of
from agentcast.agents.events import AgentEvent
from agentcast.agents.streaming.dspy_calls import is_async
from agentcast.agents.streaming.program import Outcome, run_program
from agentcast.agents.streaming.stream import Stream


class EventStream(Stream[AgentEvent]):
    """The events of one run. After the last one, `outcome` holds what the program returned and used."""

    outcome: Outcome | None = None

    def _settle(self, value: Outcome) -> None:
        self.outcome = value


def stream_events(
    program: Any, inputs: Mapping[str, Any], *, messages: Collection[str] | None = None, name: str | None = None
) -> EventStream:
    """Call the `dspy.Module` `program` with `inputs`, streaming what happens in it: the events that a hub shows.

    Inputs are checked and converted as a hub does it, unless the program's types cannot be inferred. `messages` names
    the output fields to show, by default all. `name` is the program's own, by default its class's.

    :raises ValueError: an input is missing or wrong, or there is none of that name; it names each.
    """
    shown_name = name or type(program).__name__
    play = functools.partial(_play, program, _read(program, shown_name, inputs), messages, name)
    return EventStream(play, shown_name, threaded=not is_async(program))


def _read(program: Any, name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    contract = _contract(program)
    return dict(inputs) if contract is None else read_inputs(name, contract, inputs)


_contracts: dict[int, tuple[Any, Contract | None]] = {}
"""Id of a program → its signature, and the contract made of it: making one takes milliseconds. Not every program can be
hashed: a dataclass cannot."""


def _contract(program: Any) -> Contract | None:
    """What `program` takes, or None if that cannot be inferred."""
    signature = signature_of(program)
    known = _contracts.get(id(program))
    if known is not None and known[0] is signature:
        return known[1]
    try:
        contract: Contract | None = module_contract(type(program).__name__, program)
    except SchemaError:
        contract = None
    if known is None:
        weakref.finalize(program, _contracts.pop, id(program), None)
    _contracts[id(program)] = signature, contract
    return contract


async def _play(
    program: Any, inputs: Mapping[str, Any], messages: Collection[str] | None, name: str | None, channel: Any
) -> Outcome:
    return await run_program(program, inputs, channel, messages=messages, name=name)
