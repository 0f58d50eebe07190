"""What an agent says that it emitted, and whether the state of its run holds just that (G2, G5)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from agentcast.server.state import RunState

ENDS = {"done": "run_end", "failed": "run_error", "cancelled": "run_cancelled"}


@dataclass
class Journal:
    """The journal of one run; empty if its agent never began."""

    events: list[dict[str, Any]] = field(default_factory=list)
    sent: int = 0
    """Events for which `send` has returned."""
    returned: bool = False

    @classmethod
    def read(cls, folder: Path, run: str) -> "Journal":
        journal = cls()
        path = folder / run
        for line in path.read_bytes().splitlines() if path.exists() else ():
            document = orjson.loads(line)
            if "event" in document:
                journal.events.append(document)
            journal.sent = document.get("sent", journal.sent)
            journal.returned = journal.returned or "returned" in document
        return journal

    def check(self, state: dict[str, Any], *, whole: bool) -> None:
        """`state` holds all that was emitted, in order; or, unless `whole`, the first so many of it."""
        wanted = _essence(state)
        for count in [len(self.events)] if whole else self._candidates(state):
            if self._after(count, state) == wanted:
                return
        raise AssertionError(
            f"run {state['run']} ({state['status']}) is not the {'whole' if whole else 'beginning'} of what its agent "
            f"emitted, {len(self.events)} events:\n{wanted}\nbut emitted was\n{self._after(len(self.events), state)}"
        )

    def _candidates(self, state: dict[str, Any]) -> Iterator[int]:
        """After how many events the run may have ended, at a glance."""
        replayed, wanted = RunState.new(state["run"], state["agent"]), _glance(state)
        for count in range(len(self.events) + 1):
            if count:
                replayed.apply(self.events[count - 1] | {"seq": count, "ts": 0.0})
            if _glance(replayed.document) == wanted:
                yield count

    def _after(self, count: int, state: dict[str, Any]) -> dict[str, Any]:
        """What the state shows if the run ended after `count` events."""
        replayed = RunState.new(state["run"], state["agent"])
        for seq, event in enumerate(self.events[:count]):
            replayed.apply(event | {"seq": seq, "ts": 0.0})
        if state["status"] in ENDS:
            replayed.apply({"event": ENDS[state["status"]], "seq": count, "ts": 0.0})
        return _essence(replayed.document)


def _glance(state: dict[str, Any]) -> list[Any]:
    texts = state["messages"][-1]["text"] if state["messages"] else None
    return [state.get("status_message"), len(state["spans"]), len(state["messages"]), texts, state["state"]]


def _essence(state: dict[str, Any]) -> dict[str, Any]:
    """What an agent's events make of a state, without times."""
    return {
        "status_message": state.get("status_message"),
        "spans": [[span["span"], span["name"], span["status"], span.get("result")] for span in state["spans"]],
        "messages": [[item["message"], item["status"], item["text"]] for item in state["messages"]],
        "state": state["state"],
    }
