"""The elements at the top, as `XMLAdapter.parse` reads them. Sans-I/O."""

from collections.abc import Mapping
from typing import Any
from xml.parsers import expat

from agentcast.agents.fields.base import Delta, Output, Strip, is_text


class XmlSplitter:
    """As `XMLAdapter.parse`, with the same parser: fields of text, stripped, up to markup inside them. Other fields
    may be trees of elements, so nothing is told of them."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = {name for name, annotation in fields.items() if is_text(annotation)}
        self.field: str | None = None
        self.undecided = False
        self._out = Output()
        self._strip = Strip()
        self._depth = 0
        self._broken = False
        self._parser = expat.ParserCreate("utf-8", "}")  # names as ElementTree has them
        if hasattr(self._parser, "SetReparseDeferralEnabled"):  # else text waits for later chunks
            self._parser.SetReparseDeferralEnabled(False)
        self._parser.StartElementHandler = self._open
        self._parser.EndElementHandler = self._close
        self._parser.CharacterDataHandler = self._characters
        self._parse("<root>")

    def feed(self, text: str) -> list[Delta]:
        self._parse(text)
        return self._out.take()

    def finish(self) -> list[Delta]:
        return []  # an element that is not closed is an error

    def _parse(self, text: str) -> None:
        if not self._broken:
            try:
                self._parser.Parse(text, False)
            except (expat.ExpatError, UnicodeEncodeError):
                self._broken = True

    def _open(self, tag: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth == 2:
            name = attributes.get("key", tag) if tag == "entry" else tag
            self.field = name if name in self._fields else None
            self._fields.discard(name)
            self._strip = Strip()
        else:
            self.field = None

    def _close(self, _tag: str) -> None:
        self._depth -= 1
        self.field = None

    def _characters(self, text: str) -> None:
        if self.field is not None:
            self._out.add(self.field, self._strip.push(text))
