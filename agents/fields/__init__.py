"""Output fields out of what an LM call streams, while it is still arriving.

A splitter reads the text of ONE LM call, in chunks of any length, and divides it into output fields, by the rules of
DSPy's adapters: for a field of text the joined deltas are what the adapter's `parse` will return. Where an adapter
forgives what cannot be known in advance (JSON that has to be repaired, an XML field given twice) the splitter falls
silent or is overruled: `Messages` compares with the parsed value at the end. A `Reader` reads all of an LM call: its
text, native tool calls, and the model's own reasoning.

Sans-I/O, all of it. It must not be known here what a run is, who calls or how events travel. A reader shared by two
calls would mix their texts (G8), so it is made for one call and thrown away.

Public: `Reader`, `piece_of`, `Piece`, `splitter_for`, `Splitter`, `Delta`, `is_text`, `Messages`, `FieldMessages`.
"""

from agentcast.agents.fields.messages import FieldMessages, Messages
from agentcast.agents.fields.reader import Piece, Reader, piece_of, splitter_for
from agentcast.agents.fields.splitter import Delta, Splitter, is_text

__all__ = [
    "Delta",
    "FieldMessages",
    "Messages",
    "Piece",
    "Reader",
    "Splitter",
    "is_text",
    "piece_of",
    "splitter_for",
]
