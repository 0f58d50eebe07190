"""Output fields out of raw LM text, while it is still arriving.

A splitter reads the chunks, of any length, of ONE LM call, and tells which text belongs to which output field. The
rules are those of DSPy's adapters: for a field of text the joined deltas are what the adapter's `parse` will return.
Where an adapter forgives what cannot be known in advance (JSON that has to be repaired, markup inside an XML field,
a field given twice) the splitter falls silent or is overruled: `Messages` compares with the parsed value at the end.

Sans-I/O, all of it. It must not be known here what a run is, who calls or how events travel. A splitter shared by two
calls would mix their texts (G8), so it is made for one call and thrown away.

Public: `splitter_for(adapter, fields)`, `Splitter`, `Delta`, `is_text`, `Messages`.
"""

from agentcast.agents.fields.base import Delta, Splitter, is_text
from agentcast.agents.fields.messages import Messages, splitter_for

__all__ = ["Delta", "Messages", "Splitter", "is_text", "splitter_for"]
