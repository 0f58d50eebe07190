"""Questions about many runs at once, in few round trips: their infos, the ends of their logs, pages of a list."""

from collections.abc import Callable, Sequence

from agentcast.server.bus.base import LIST_EXAMINED, PAGE_BYTES, PAGE_EVENTS, Ends, Filter, Listing, Page, RunInfo
from agentcast.server.bus.redis import codec, scripts
from agentcast.server.bus.redis.keys import Keys
from agentcast.server.bus.redis.pipelined import PipelinedConnection, Script

ENDS_CHUNK = 500
"""Runs whose ends one script reads; Redis does nothing else meanwhile."""
LIST_CHUNK = 200
"""Runs of a list that are looked at in two round trips."""

SHORT_BYTES = 16 * 1024
"""What of a log is asked for first: most of what is read is shorter, and then shares a round trip with other reads."""

READ = Script(scripts.READ)
READ_ENDS = Script(scripts.READ_ENDS)


class Queries:
    """Asks Redis. Unknown runs are left out of all answers. `restoring` says whether lost runs may come back."""

    def __init__(self, reads: PipelinedConnection, keys: Keys, restoring: Callable[[], bool]) -> None:
        self._reads = reads
        self._keys = keys
        self._restoring = restoring

    async def infos(self, runs: Sequence[str]) -> dict[str, RunInfo]:
        """See `Bus.info`."""
        answers = await self._reads.calls([("HMGET", self._keys.run(run), *codec.INFO) for run in runs])
        return codec.infos(runs, answers)

    async def log(self, run: str, epoch: str, after: int) -> Page | list[bytes]:
        """See `Bus.read`. Where there is no page, the script's answer says why."""
        page = await self._part(run, epoch, after, PAGE_EVENTS, SHORT_BYTES)
        if not isinstance(page, Page) or not page.frames:
            return page
        events, size = PAGE_EVENTS - len(page.frames), PAGE_BYTES - sum(len(frame.data) for frame in page.frames)
        last = page.frames[-1].seq
        if last == page.head or events <= 0 or size <= 0:
            return page
        rest = await self._part(run, epoch, last, events, size)
        return Page([*page.frames, *rest.frames], rest.head) if isinstance(rest, Page) else page

    async def _part(self, run: str, epoch: str, after: int, events: int, size: int) -> Page | list[bytes]:
        keys = [self._keys.run(run), self._keys.run_log(run)]
        answer: list[bytes] = await self._reads.script(READ, keys, epoch, after, events, size, expects=size)
        if answer[0] != b"page":
            return answer
        return Page(codec.unpack(run, epoch, answer[2]), int(answer[1]))

    async def ends(self, runs: Sequence[str]) -> dict[str, Ends]:
        """See `Bus.read_ends`."""
        found: dict[str, Ends] = {}
        prefixes = self._keys.run(""), self._keys.run_log("")
        asked = 0
        while asked < len(runs):
            chunk = runs[asked : asked + ENDS_CHUNK]
            answers = await self._reads.script(READ_ENDS, [], *prefixes, PAGE_BYTES, *chunk, expects=PAGE_BYTES)
            found |= {run: Ends(*ends) for run, ends in zip(chunk, answers, strict=False) if ends}
            asked += len(answers)
        return found

    async def page(self, filter: Filter) -> Listing:
        """See `Bus.list`. Removes runs that have expired from the index, unless they may be restored."""
        index, last = self._keys.index(filter), filter.before
        found: list[RunInfo] = []
        for _ in range(0, LIST_EXAMINED, LIST_CHUNK):
            runs = await self._ids(index, filter.order, last)
            infos = await self.infos(runs)
            expired = [run for run in runs if run not in infos]
            if expired and not self._restoring():
                await self._reads.call("ZREM", index, *expired)
            for run in runs:
                last = run
                if run in infos and filter.fits(infos[run]):
                    found.append(infos[run])
                    if len(found) == filter.limit:
                        return Listing(found, last)
            if len(runs) < LIST_CHUNK:
                return Listing(found)
        return Listing(found, last)

    async def _ids(self, index: str, order: str, last: str | None) -> list[str]:
        newest = order == "newest"
        command, first, end = ("ZREVRANGEBYLEX", "+", "-") if newest else ("ZRANGEBYLEX", "-", "+")
        start = first if last is None else f"({last}"
        ids = await self._reads.call(command, index, start, end, "LIMIT", 0, LIST_CHUNK)
        return [id.decode() for id in ids]
