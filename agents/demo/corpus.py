"""A folder of texts that can be searched by paragraphs.

The index is built at the first search, and again when files have changed.

The folder is `AGENTCAST_DOCS`; by default the guide to agentcast that ships with this module.

Everything here blocks and is meant to run on a thread. Files are known by their path inside the folder, never by where
the folder is. This module must not know agents.
"""

import itertools
import os
import re
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from agentcast.agents.base import ToolError
from agentcast.agents.words import Index, content_words

SUFFIXES = frozenset({".md", ".txt", ".rst", ".py"})
MAX_FILES = 2_000
MAX_FILE_BYTES = 1_000_000
MAX_READ_LINES = 60
PASSAGE_LINES = 25
MAX_HEADING = 80
MAX_HITS = 10
VARIABLE = "AGENTCAST_DOCS"

GUIDE = Path(__file__).parent / "texts"
"""A short guide to agentcast."""


_SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules", "venv", "build", "dist"})
_HEADING = re.compile(r"^#{1,6} +(.+?)\s*#*$")
_FENCE = re.compile(r"^ *(?:```|~~~)")
_UNDERLINE = re.compile(r"^([=\-~^])\1{2,}$")


@dataclass(frozen=True)
class Passage:
    """A paragraph, list, table or piece of code."""

    file: str
    line: int
    """Its first line, from 1."""
    text: str
    heading: str

    @property
    def place(self) -> str:
        return place(self.file, str(self.line), self.heading)


def place(file: str, lines: str, heading: str) -> str:
    """Where a text stands: "guide.md:12 (Start)"."""
    return f"{file}:{lines}" + (f" ({heading[:MAX_HEADING]})" if heading else "")


class Corpus:
    """The texts of a folder, or of one file. Safe to use from several threads at once."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._lock = threading.Lock()
        self._stamp: tuple[tuple[str, int, int], ...] | None = None
        self._passages: list[Passage] = []
        self._index = Index([])

    def files(self) -> dict[str, Path]:
        """The text files by name, hidden ones and those behind links to elsewhere left out."""
        folder = self._root if self._root.is_dir() else self._root.parent
        found = itertools.islice(_walk(self._root), MAX_FILES)
        return {path.relative_to(folder).as_posix(): path for path in found}

    def search(self, query: str, limit: int) -> list[Passage]:
        """The passages that fit `query` best, the best first; empty if none shares a word with it."""
        found, index = self._fresh()
        return [found[number] for number in index.search(content_words(query), limit=limit)]

    def open(self, name: str) -> tuple[str, list[str]]:
        """The file that `name` means: its name here and its lines.

        :raises ToolError: it is outside, or there is none; the text says which files there are.
        """
        files = self.files()
        known = _find(name, files)
        return known, _read(files[known]).splitlines()

    def _fresh(self) -> tuple[list[Passage], Index]:
        files = self.files()
        stamp = tuple(_stamp(name, path) for name, path in files.items())
        with self._lock:  # built once, however many ask at the same time
            if stamp != self._stamp:
                self._passages = [part for name, path in files.items() for part in passages(name, _read(path))]
                self._index = Index((part.text, part.heading) for part in self._passages)
                self._stamp = stamp
            return self._passages, self._index


def corpus() -> Corpus:
    """The texts that the tools work on.

    :raises ToolError: `AGENTCAST_DOCS` names no folder.
    """
    chosen = os.environ.get(VARIABLE, "").strip()
    if chosen and not Path(chosen).expanduser().exists():
        raise ToolError(f"{VARIABLE} is set to something that does not exist")
    return _corpus(Path(chosen).expanduser() if chosen else GUIDE)


@cache
def _corpus(root: Path) -> Corpus:
    return Corpus(root)


def found(query: str, limit: int) -> str:
    """What a search gives, as text: each passage under its place."""
    hits = corpus().search(query, max(1, min(limit, MAX_HITS)))
    if not hits:
        return f"Nothing found for {query!r}. Other or fewer words may help."
    return "\n\n".join(f"{hit.place}\n{hit.text}" for hit in hits)


def excerpt(name: str, lines: list[str], line: int, count: int | None) -> str:
    """The section around a line of a file, or `count` lines from that line on.

    :raises ToolError: there is no such line.
    """
    if not lines:
        return f"{name} is empty."
    if not 1 <= line <= len(lines):
        raise ToolError(f"{name} has {len(lines)} lines; there is no line {line}")
    start, end = section(lines, line) if count is None else (line, line + min(max(count, 1), MAX_READ_LINES) - 1)
    end = min(end, len(lines))
    return "\n".join([place(name, f"{start}-{end}", heading_above(lines, start)), *lines[start - 1 : end]])


def _find(name: str, files: Collection[str]) -> str:
    wanted = name.strip().strip("`'\"").replace("\\", "/").removeprefix("./")
    if wanted in files:
        return wanted
    if wanted.startswith(("/", "~")) or ".." in wanted.split("/") or re.match(r"[A-Za-z]:", wanted):
        raise ToolError(f"{wanted!r} is outside the folder; only files inside it can be read")
    same_name = [known for known in files if known.rpartition("/")[2] == wanted.rpartition("/")[2]]
    if len(same_name) == 1:
        return same_name[0]
    some = ", ".join(sorted(same_name or files)[:20]) or "none"
    raise ToolError(f"there is no file {wanted!r}; there are: {some}")


def passages(file: str, text: str) -> Iterator[Passage]:
    """The parts of `text` between empty lines, each with the heading that it stands under; long ones are parted, and
    code blocks left out."""
    lines = text.splitlines()
    heading = ""
    in_code = False
    block: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        title = None if in_code else _title(lines, number - 1)
        is_fence = _FENCE.match(line) is not None
        if line.strip() and title is None and len(block) < PASSAGE_LINES and not in_code and not is_fence:
            block.append(line)
            continue
        if any(character.isalnum() for held in block for character in held):
            yield Passage(file, number - len(block), "\n".join(block), heading)
        heading = heading if title is None else title
        block = [line] if line.strip() and title is None and not in_code and not is_fence else []
        in_code ^= is_fence


def section(lines: list[str], around: int) -> tuple[int, int]:
    """The lines, from and to (from 1, both included), of the section that line `around` is in, at most
    `MAX_READ_LINES` of them."""
    start = end = min(max(around, 1), max(len(lines), 1))
    while start > 1 and _title(lines, start - 1) is None:
        start -= 1
    while end < len(lines) and _title(lines, end) is None:
        end += 1
    if end - start >= MAX_READ_LINES:
        start = max(start, around - MAX_READ_LINES // 3)
        end = min(end, start + MAX_READ_LINES - 1)
    return start, end


def heading_above(lines: list[str], line: int) -> str:
    """The title of the section that `line` (from 1) is in."""
    titles = (_title(lines, at) for at in range(min(line, len(lines)) - 1, -1, -1))
    return next((title for title in titles if title is not None), "")


def headings(lines: list[str]) -> list[str]:
    """The titles in `lines`, in order."""
    return [title for at in range(len(lines)) if (title := _title(lines, at)) is not None]


def _title(lines: list[str], at: int) -> str | None:
    """The heading in line `at` (from 0), if it is one."""
    if at >= len(lines):
        return None
    if match := _HEADING.match(lines[at]):
        return match[1]
    underlined = at + 1 < len(lines) and lines[at].strip() and _UNDERLINE.match(lines[at + 1])
    return lines[at].strip() if underlined and len(lines[at]) <= len(lines[at + 1]) + 2 else None


def _walk(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith(".") and name not in _SKIPPED_FOLDERS)
        for name in sorted(files):
            path = Path(folder, name)
            inside = path.suffix in SUFFIXES and not name.startswith(".") and path.resolve().is_relative_to(root)
            if inside and path.is_file() and path.stat().st_size <= MAX_FILE_BYTES:
                yield path


def _stamp(name: str, path: Path) -> tuple[str, int, int]:
    try:
        status = path.stat()
    except OSError:  # it went away a moment ago
        return name, 0, 0
    return name, status.st_mtime_ns, status.st_size


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
