"""What stream listeners hear: `StreamResponse` chunks out of LM chunks, as `dspy.streaming.StreamListener` makes them.

Each (listener, LM call) has a state of its own, made as the call starts and thrown away at its end, and advanced where
the chunk is produced; so neither runs nor calls can mix (G8). It must not be known here how chunks travel.

The text of a plain `StreamListener` comes out of the splitters (`agentcast.agents.fields`), not out of DSPy's own
parsing, which loses what follows `[[` in a text, and whole answers that arrive in one chunk. Where DSPy's listener cuts
is kept:

- Each LM chunk makes one chunk, and a field's last one says so (`is_last_chunk`).
- Text that arrives while it is open whether the field ends waits for that to be known, and may then be the last chunk.
  If nothing is left for it, the last chunk is empty: the only empty one.
- Text that arrives in one LM chunk with the field's name waits for the next LM chunk.
- With the JSON adapter the text is the JSON of the value, with its quotes and escapes.

DSPy's listeners know only the predictors' own fields. These hear the outputs of a `dspy.ReActV2` program, too: as the
arguments of its tool `submit`, unescaped, whatever the adapter.

Calls of one predictor that go on at once differ in the attribute `call` of their chunks, which DSPy's lack.

A listener of a class of the user's own is copied for each LM call, its state renewed, and asked as DSPy would ask it.
"""

import copy
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from dspy.adapters.types import Type
from dspy.streaming.messages import StreamResponse
from dspy.streaming.streaming_listener import StreamListener

from agentcast.agents.fields import Piece, Reader, piece_of


class Listening:
    """The listeners of one run."""

    def __init__(self, listeners: Sequence[Any]) -> None:
        self.heard = False
        """Whether any of them has heard anything."""
        self._listeners = listeners
        self._owners: dict[int, str] = {}

    def begin(self, call: str, predictor: Any, reader: Reader | None) -> "HeardCall":
        """An LM call of `predictor` starts. `call` is its id, `reader` reads it."""
        listeners = [listener for listener in self._listeners if listener.predict is predictor]
        return HeardCall(self, call, listeners, reader)

    def admits(self, listener: Any, call: str) -> bool:
        """Whether `listener` has an ear for `call`: it hears but one call in a run unless it allows reuse."""
        self.heard = True
        return listener.allow_reuse or self._owners.setdefault(id(listener), call) == call


class HeardCall:
    """The state of all listeners in one LM call."""

    def __init__(self, run: Listening, call: str, listeners: Iterable[Any], reader: Reader | None) -> None:
        self._run = run
        self._call = call
        self._plain: dict[str, list[Any]] = {}
        self._own: list[tuple[Any, Any]] = []
        self._reader = reader
        self._held: dict[str, str] = {}
        self._said: set[str] = set()
        self._open: str | None = None
        self._over = False
        for listener in listeners:
            if type(listener) is StreamListener:
                self._plain.setdefault(listener.signature_field_name, []).append(listener)
            else:
                self._own.append((listener, _renewed(listener)))

    def hear(self, chunk: Any) -> list[Any]:
        """What the listeners make of `chunk`. Of several candidates only the first one is heard."""
        piece = piece_of(chunk)
        if self._over or piece is None:
            return []
        heard = [*self._native(chunk), *self._split(piece)]
        for listener, state in self._own:
            response = state.receive(chunk)
            if response and self._run.admits(listener, self._call):
                heard.append(response)
        if piece.is_last:
            heard += self.finish()
        return heard

    def finish(self) -> list[Any]:
        """The LM call's text is whole; more text would be of another candidate, and is not heard."""
        if self._over:
            return []
        self._over = True
        heard = []
        if self._reader is not None:
            for field, text in chain(*self._reader.finish()):
                self._held[field] = self._held.get(field, "") + text
            if self._open is not None:
                heard += self._end(self._open, self._held.pop(self._open, ""))
        for listener, state in self._own:
            response = state.finalize()
            if response and self._run.admits(listener, self._call):
                heard.append(response)
        return heard

    def _native(self, chunk: Any) -> Iterable[Any]:
        """What the LM's own features stream: reasoning, citations and other types that parse chunks themselves."""
        for field, listeners in self._plain.items():
            for listener in listeners:
                kind = _output_type(listener)
                if kind is not None and (value := kind.parse_stream_chunk(chunk)):
                    yield from self._say(field, value, last=False, listeners=[listener])

    def _split(self, piece: Piece) -> list[Any]:
        reader = self._reader
        if reader is None:
            return []
        before = self._open
        new: dict[str, str] = {} if before is None else {before: ""}
        for field, delta in chain(*reader.feed(piece)):
            new[field] = new.get(field, "") + delta
        self._open = reader.field if reader.field in self._plain else None
        heard: list[Any] = []
        for field, delta in new.items():
            if field in self._plain:
                heard += self._cut(field, delta, ended=field != self._open, began=field != before)
        return heard

    def _cut(self, field: str, text: str, *, ended: bool, began: bool) -> list[Any]:
        text = self._held.pop(field, "") + text
        if ended:
            return self._end(field, text)
        if began or (self._reader is not None and self._reader.undecided):
            self._held[field] = text
            return []
        return self._say(field, text, last=False) if text else []

    def _end(self, field: str, text: str) -> list[Any]:
        return self._say(field, text, last=True) if text or field in self._said else []

    def _say(self, field: str, text: Any, *, last: bool, listeners: Sequence[Any] | None = None) -> list[Any]:
        self._said.add(field)
        heard = []
        for listener in self._plain[field] if listeners is None else listeners:
            if self._run.admits(listener, self._call):
                response = StreamResponse(listener.predict_name, field, text, is_last_chunk=last)
                response.call = self._call
                heard.append(response)
        return heard


def _renewed(listener: Any) -> Any:
    """A copy with DSPy's state made anew; what a subclass adds is shared."""
    state = copy.copy(listener)
    if isinstance(state, StreamListener):
        name, predict, path = listener.signature_field_name, listener.predict, listener.predict_name
        StreamListener.__init__(state, name, predict, path)
    return state


def _output_type(listener: Any) -> Any:
    """The type of the field, if it parses chunks itself."""
    info = listener.predict.signature.output_fields.get(listener.signature_field_name)
    kind: Any = None if info is None else info.annotation
    if not isinstance(kind, type) or not issubclass(kind, Type):
        return None
    streamable: Any = kind
    return streamable if streamable.is_streamable() else None
