"""The messages of a run that stream: their tokens are gathered, cleaned, cut, and joined before they are sent (G1).

The first token of a message goes at once; later ones wait until they are flushed, and are then joined, per message.
The joined deltas of a message always equal its text.

This module must not know what happens to what is sent.
"""

from collections.abc import Callable

from agentcast.agents.events import AgentEvent, MessageEnd, MessageStart, Token
from agentcast.agents.values import VALUE_BYTES, Pieces, clean_text, cut_text, text_bytes
from agentcast.server.state import MAX_MESSAGES

Send = Callable[[str, float, str], None]
"""Takes the id of a message, when the oldest of it was emitted, and a delta."""


class _Message:
    """A message that streams: what was sent of it, and what waits to be sent."""

    __slots__ = ("cut", "pieces", "room", "sent", "ts", "waiting")

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.waiting: list[str] = []
        self.pieces = Pieces()
        self.ts = 0.0
        """When the oldest waiting delta was emitted."""
        self.room = VALUE_BYTES
        self.cut = False

    def add(self, ts: float, delta: str) -> None:
        if not self.waiting:
            self.ts = ts
        self.waiting.append(delta)

    def flush(self) -> str:
        """All that waits and is certain, joined; sent from now on."""
        joined = self.pieces.push("".join(self.waiting))
        self.waiting.clear()
        return self.say(joined)

    def say(self, text: str) -> str:
        """What of the clean `text` is to be sent: a message is cut where it grows over what one value may take."""
        if self.cut or not text:
            return ""
        size = text_bytes(text)
        if size > self.room:
            self.cut = True
            text = cut_text(text, max(self.room, 200)) if size > max(self.room, 200) else text + "… [cut]"
        self.room -= size
        self.sent.append(text)
        return text


class Messages:
    """The open messages of one run. What is to be sent goes to `send`, in order."""

    def __init__(self, send: Send) -> None:
        self._deliver = send
        self._open: dict[str, _Message] = {}
        self._silent: set[str] = set()
        """Open messages of which nothing was sent yet."""
        self._waiting: dict[str, _Message] = {}
        """Open messages with deltas that wait to be sent; only while events are being taken."""

    def __contains__(self, id: str) -> bool:
        return id in self._open

    def can_wait(self, event: AgentEvent) -> bool:
        """Whether `event` may wait for others: whether it is a token, and not its message's first."""
        return type(event) is Token and event.message not in self._silent

    def begin(self, event: MessageStart) -> None:
        if len(self._open) >= MAX_MESSAGES:  # no more can be open than a RunState shows
            self.flush()
            self.close(next(iter(self._open)))
        self._open[event.message] = _Message()
        self._silent.add(event.message)

    def take(self, ts: float, event: Token) -> None:
        message = self._open.get(event.message)
        if message is None or message.cut or not event.delta:
            return  # without a message: it has not begun, or has ended
        message.add(ts, event.delta)
        self._waiting[event.message] = message
        if event.message in self._silent:
            self.flush()

    def flush(self) -> None:
        """Send what waits of all messages."""
        if self._waiting:
            for id, message in self._waiting.items():
                self._send(id, message.ts, message.flush())
            self._waiting.clear()

    def complete(self, ts: float, event: MessageEnd) -> MessageEnd:
        """The joined deltas always equal the text: what they lack is sent; where they contradict it, they win."""
        self.flush()
        message = self._open[event.message]
        said, text, half = "".join(message.sent), clean_text(event.text), message.pieces.end()
        self._send(event.message, ts, message.say(text[len(said) :] if text.startswith(said) else half))
        self.close(event.message)
        return MessageEnd(message=event.message, text="".join(message.sent))

    def close(self, id: str) -> None:
        """Take no more of a message."""
        self._open.pop(id, None)
        self._silent.discard(id)

    def end_pieces(self) -> None:
        """Nothing more comes: whatever messages are open lack no more than the half pairs that wait of them."""
        for id, message in self._open.items():
            self._send(id, 0.0, message.say(message.pieces.end()))

    def _send(self, id: str, ts: float, delta: str) -> None:
        if delta:
            self._silent.discard(id)
            self._deliver(id, ts, delta)
