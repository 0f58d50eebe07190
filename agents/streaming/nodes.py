"""Nodes of graphs as spans of the run that they are in.

A node tells of itself: what it is given, each failed attempt, what it sets. What goes on inside, LM and tool calls and
messages, becomes part of its span by the run. Outside of a run nobody is told, and nothing is made for it. It must not
be known here what a graph is.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from dspy.utils.callback import ACTIVE_CALL_ID

from agentcast.agents.events import MessageRetracted, NodeEnd, NodeStart, StepLimit, ValidationFailed
from agentcast.agents.streaming.bridge import innermost
from agentcast.agents.streaming.run import Run


class NodeSpan:
    """A node that is running. In no run, all its methods do nothing."""

    def __init__(self, run: Run | None = None, call: Any = None) -> None:
        self._run = run
        self._call = call

    def attempt(self) -> None:
        """An attempt begins: what its calls say from here on is void if it is rejected."""
        if self._run is not None:
            self._call.spoken.clear()

    def reject(self, attempt: int, max_retries: int, error: str, failed_fields: Iterable[str]) -> None:
        """The attempt has failed. `attempt` counts from 1."""
        if self._run is None:
            return
        reason = "the output was rejected"
        retracted = [MessageRetracted(message=message, reason=reason) for message in self._call.spoken]
        self._call.spoken.clear()
        failed = ValidationFailed(
            span=self._call.span,
            node=self._call.name,
            attempt=attempt,
            max_retries=max_retries,
            error=error,
            failed_fields=tuple(failed_fields),
        )
        self._run.tell([*retracted, failed])

    def end(self, patch: Callable[[], Mapping[str, Any]]) -> None:
        """The node has set the fields of `patch()`."""
        if self._run is not None:
            call = self._call
            duration = time.monotonic() - call.started
            self._run.tell([NodeEnd(span=call.span, node=call.name, patch=dict(patch()), duration=duration)])

    def fail(self, error: BaseException) -> None:
        """The node has failed, or is cancelled."""
        if self._run is not None:
            self._run.tell([self._run.node_error(self._call, error)], error)


@contextmanager
def node_span(name: str, inputs: Callable[[], Mapping[str, Any]], parts: Iterable[Any] = ()) -> Iterator[NodeSpan]:
    """Inside, the node `name` is running, and what is called is called by it. `parts` are the modules that do its own
    work: their calls are no spans beside it.

    To be left after `NodeSpan.end`, or by an exception, which is told.
    """
    run = innermost()
    if not isinstance(run, Run):
        yield NodeSpan()
        return
    call_id = uuid4().hex
    call, parent = run.open_node(call_id, name, parts)
    span = NodeSpan(run, call)
    run.tell([NodeStart(span=call.span, parent=parent, node=name, kind="graph", inputs=dict(inputs()))])
    token = ACTIVE_CALL_ID.set(call_id)
    try:
        yield span
    except BaseException as error:
        span.fail(error)
        raise
    finally:
        ACTIVE_CALL_ID.reset(token)
        run.close_node(call_id)


def tell_step_limit(max_steps: int, message: str) -> None:
    """A graph has made `max_steps` steps and ends here."""
    run = innermost()
    if isinstance(run, Run):
        run.tell([StepLimit(max_steps=max_steps, message=message)])
