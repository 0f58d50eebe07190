"""The elements at the top, as `XMLAdapter.parse` reads them. Sans-I/O."""

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat
from xml.sax.saxutils import escape

from agentcast.agents.fields.splitter import Delta, Output, Strip, is_text


class XmlSplitter:
    """As `XMLAdapter.parse`, with the same parser.

    The adapter strips a text, but where there is markup in it, takes it as it stands, the markup written as ElementTree
    writes it. So at the first element inside a text the field restarts if it began with white space; with `restarts`
    off, for readers that cannot take back what they got, that white space is left out. Where a field of another type
    has elements inside it, or where a field comes twice, what was streamed of it is void: it is a tree or a list.
    """

    def __init__(self, fields: Mapping[str, Any], *, restarts: bool = True) -> None:
        self.field: str | None = None
        self.undecided = False
        self._fields = fields
        self._restarts = restarts
        self._seen: set[str] = set()
        self._out = Output()
        self._text = _Text()
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
            self._open_field(attributes.get("key", tag) if tag == "entry" else tag)
        elif self.field is not None:
            self._open_inside(self.field, tag, attributes)

    def _open_field(self, name: str) -> None:
        if name in self._seen:
            self._void(name)
        elif name in self._fields:
            self.field = name
            self._seen.add(name)
            self._text = _Text()

    def _open_inside(self, field: str, tag: str, attributes: dict[str, str]) -> None:
        namespaces = any("}" in name for name in (tag, *attributes))
        if namespaces or not is_text(self._fields[field]):
            self._void(field)
            return
        if not self._text.has_markup:
            shown, whole = self._text.shown, self._text.begin_markup()
            if shown and not whole.startswith(shown) and self._restarts:
                self._out.restart(field, whole)
            else:
                self._out.add(field, (whole if self._restarts else whole.lstrip())[len(shown) :])
        self._out.add(field, self._text.open(tag, attributes))

    def _void(self, field: str) -> None:
        if self._restarts:
            self._out.restart(field, "")
        self.field = None

    def _close(self, tag: str) -> None:
        self._depth -= 1
        if self._depth == 1:
            self.field = None
        elif self.field is not None:
            self._out.add(self.field, self._text.close(tag))

    def _characters(self, text: str) -> None:
        if self.field is not None:
            self._out.add(self.field, self._text.characters(text))


class _Text:
    """The text of one element, and from the first element inside it on, that as ElementTree writes it."""

    def __init__(self) -> None:
        self.has_markup = False
        self._strip = Strip()
        self._shown: list[str] = []
        self._whole: list[str] = []
        self._empty_tag = False
        """Whether the element inside that was opened last has nothing in it so far."""

    @property
    def shown(self) -> str:
        return "".join(self._shown)

    def begin_markup(self) -> str:
        """The whole text so far, not stripped."""
        self.has_markup = True
        whole, self._whole, self._shown = "".join(self._whole), [], []
        return whole

    def characters(self, text: str) -> str:
        if self.has_markup:
            return self._end_of_tag() + escape(text)
        self._whole.append(text)
        shown = self._strip.push(text)
        self._shown.append(shown)
        return shown

    def open(self, tag: str, attributes: dict[str, str]) -> str:
        before, self._empty_tag = self._end_of_tag(), True
        return before + ElementTree.tostring(ElementTree.Element(tag, attributes), "unicode").removesuffix(" />")

    def close(self, tag: str) -> str:
        if self._empty_tag:
            self._empty_tag = False
            return " />"
        return f"</{tag}>"

    def _end_of_tag(self) -> str:
        before = ">" if self._empty_tag else ""
        self._empty_tag = False
        return before
