"""Words of a text as a search sees them, and an index of texts: SQLite's FTS5, which stems and ranks (BM25)."""

import re
import sqlite3
import threading
from collections.abc import Collection, Iterable

_WORD = re.compile(r"[^\W_]+(?:[._'’/-]+[^\W_]+)*")
_STOP_WORDS = frozenset(
    """a about above after again all also am an and any are as at be because been before being below between both but
    by can could describe did do does doing done down during each else ever every explain few find for from further get
    give given got had happen happens has have he hello her here hey hi him his how i if in into is it it's its itself
    just know let like list long look main make many may me mean means might more most much must my need now of off on
    once only or other our out over own please s same say says shall she should show so some such sure t tell than thank
    thanks that the their them then there these they thing things this those through to too under until up upon us use
    used uses using very want was we were what what's when where which while why will with work works would yes you
    your""".split()
)


def content_words(text: str) -> list[str]:
    """The words of `text` that a search should look for, in order, each once, as they are written there."""
    words = (match.group() for match in _WORD.finditer(text))
    return list({word.lower(): word for word in words if word.lower() not in _STOP_WORDS}.values())


class Index:
    """Texts, each with what stands around it, such as a heading. Safe to use from several threads."""

    def __init__(self, texts: Iterable[tuple[str, str]]) -> None:
        self._lock = threading.Lock()
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        self._database.execute("CREATE VIRTUAL TABLE texts USING fts5(body, around, tokenize='porter unicode61')")
        rows = ((number, *row) for number, row in enumerate(texts))
        self._database.executemany("INSERT INTO texts (rowid, body, around) VALUES (?, ?, ?)", rows)

    def __del__(self) -> None:
        self._database.close()

    def search(self, words: Collection[str], columns: str = "body around", limit: int = -1) -> list[int]:
        """The numbers, from 0, of the texts that have forms of `words` in these columns, the best first."""
        wanted = " OR ".join(f'"{word}"' for word in words)
        ranked = "SELECT rowid FROM texts WHERE texts MATCH ? ORDER BY bm25(texts, 1.0, 2.0), rowid LIMIT ?"
        with self._lock:
            found = self._database.execute(ranked, (f"{{{columns}}}: ({wanted})", limit)) if words else ()
            return [number for (number,) in found]
