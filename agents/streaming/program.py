"""One run of a program, awaited: its typed events go to an emitter, or come out of a stream.

The caller drives `run_program` with `agents.execution.drive`, which holds it back while the emitter is
congested (G5). LM chunks are awaited into the emitter, which is how back-pressure reaches the LM stream; and a call of
DSPy that a task of the program makes waits for room before it begins (`view`). A synchronous program has a thread
of its own and is stopped by its next callback (G6). How events travel is not known here.
"""

import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import anyio
import dspy

from agentcast.agents._dspy.names import UsageTracker
from agentcast.agents.base import Emitter
from agentcast.agents.context import current
from agentcast.agents.events import AgentEvent, Usage
from agentcast.agents.inputs.contract import Contract, SchemaError, module_contract, read_inputs, signature_of
from agentcast.agents.streaming.calls import call_in_thread, is_async
from agentcast.agents.streaming.run import Run
from agentcast.agents.streaming.stream import Stream
from agentcast.agents.turns import take_turn


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a program returned, and what its LM calls used (None: none of them said)."""

    prediction: Any
    usage: Usage | None


async def run_program(
    program: Any,
    inputs: Mapping[str, Any],
    emit: Emitter,
    *,
    messages: Collection[str] | None = None,
    name: str | None = None,
    limiter: anyio.CapacityLimiter | None = None,
    root: bool = True,
) -> Outcome:
    """Call the `dspy.Module` `program` with `inputs`, emitting what happens in it.

    `messages` names the output fields to show, by default all. `name` is the program's own, by default its class's.
    A synchronous program runs in a thread, by default one of its own, else one of `limiter`'s. When this coroutine is
    cancelled that thread is left behind; it ends at the program's next callback or LM chunk. Without `root` the program
    itself is no span, only what is in it.

    DSPy's trace is the run's own; that of a run around it gets what is in it at the end.

    :raises Stopped: `emit` takes no more events.
    :raises Exception: whatever the program raises, as it is.
    """
    await take_turn()
    run = Run(program, emit, messages, name, root=root)
    meter = Meter(run.here)
    outer = dspy.settings.usage_tracker
    trace: list[Any] = []
    around = None if current().observer is None else dspy.settings.trace
    settings = {
        "stream_listeners": [],
        "usage_tracker": meter,
        "track_usage": True,  # else streaming LMs do not ask for it
        "disable_history": True,
        "trace": trace,
    }
    if is_async(program):
        call = functools.partial(program.acall, **inputs)
    else:
        thread = f"program {name or type(program).__name__}"
        call = functools.partial(call_in_thread, functools.partial(program, **inputs), thread, limiter)
    try:
        prediction = await run.conduct(call, {"emitter": emit, "numbers": run.numbers, "span": run.parent}, **settings)
    finally:
        meter.report(outer)
        if around is not None:
            around.extend(trace)
    return Outcome(prediction, meter.total())


# -- As a stream -------------------------------------------------------------------------------------------------------


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
    play = functools.partial(_stream, program, _read(program, shown_name, inputs), messages, name)
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


async def _stream(
    program: Any, inputs: Mapping[str, Any], messages: Collection[str] | None, name: str | None, channel: Any
) -> Outcome:
    return await run_program(program, inputs, channel, messages=messages, name=name)


# -- Usage -------------------------------------------------------------------------------------------------------------


def add_cost(model: str, dollars: float) -> None:
    """What the LM call costs that the calling code is in, unless the provider's usage says so."""
    meter = dspy.settings.usage_tracker
    if isinstance(meter, Meter):
        meter.add_cost(model, dollars)


class Meter(UsageTracker):  # type: ignore[misc]  # dspy is untyped
    """What the LM calls of one run use, each and together. `here` gives the call that the calling code is in."""

    def __init__(self, here: Callable[[], Any]) -> None:
        super().__init__()
        self._here = here

    def __deepcopy__(self, memo: Any) -> "Meter":
        return self  # `dspy.Parallel` copies trackers for its threads, and drops the copies

    def add_usage(self, lm: str, usage_entry: dict[str, Any]) -> None:
        super().add_usage(lm, usage_entry)
        call = self._here()
        if call is not None and usage_entry:
            call.usage = _sum([usage_entry], call.usage)

    def add_cost(self, lm: str, dollars: float) -> None:
        call = self._here()
        if call is None or call.usage is None or call.usage.cost is None:
            self.add_usage(lm, {"cost": dollars})

    def total(self) -> Usage | None:
        return _sum(entry for entries in list(self.usage_data.values()) for entry in list(entries))

    def report(self, outer: Any) -> None:
        """Add it all to the tracker that was there before the run."""
        if outer is not None:
            for lm, entries in self.usage_data.items():
                outer.usage_data[lm].extend(entries)


def _sum(entries: Iterable[Mapping[str, Any]], start: Usage | None = None) -> Usage | None:
    total = start
    for entry in entries:
        usage = _usage(entry)
        total = usage if total is None else total + usage
    return total


def _usage(entry: Mapping[str, Any]) -> Usage:
    """A provider's usage report. Names differ; what is no number is left out."""
    details = entry.get("prompt_tokens_details") or entry.get("input_tokens_details") or {}
    if hasattr(details, "model_dump"):
        details = details.model_dump()
    cached = _number(details, "cached_tokens")
    cost = _number(entry, "cost")
    return Usage(
        input_tokens=int(_number(entry, "prompt_tokens", "input_tokens") or 0),
        output_tokens=int(_number(entry, "completion_tokens", "output_tokens") or 0),
        cached_tokens=None if cached is None else int(cached),
        cost=cost,
    )


def _number(entry: Any, *names: str) -> float | None:
    values = [entry.get(name) for name in names] if isinstance(entry, Mapping) else []
    return next((value for value in values if isinstance(value, int | float) and not isinstance(value, bool)), None)
