"""The names of everything in Redis. All keys start with the deployment's prefix.

Channels carry the database's number as well: Redis keeps the keys of its databases apart, but not their channels.
"""

from agentcast.server.bus.base import ACTIVE, Filter


class Keys:
    def __init__(self, prefix: str, database: int | str) -> None:
        self._prefix = prefix
        self._channels = f"{prefix}@{database}"
        self.feed = f"{prefix}:feed"
        self.feed_counter = f"{prefix}:announced"
        self.active = f"{prefix}:active"
        self.workers = f"{prefix}:workers"
        self.feed_channel = f"{self._channels}:feed"
        self.summaries_channel = f"{self._channels}:summaries"

    def run(self, run: str) -> str:
        return f"{self._prefix}:run:{run}"

    def run_log(self, run: str) -> str:
        return f"{self._prefix}:log:{run}"

    def snapshot(self, run: str) -> str:
        return f"{self._prefix}:snap:{run}"

    def staged(self, run: str, epoch: str, seq: int) -> str:
        """Where the pieces of a large snapshot are collected."""
        return f"{self._prefix}:snap:{run}:{epoch}:{seq}"

    def log(self, run: str) -> tuple[str, str, str]:
        return self.run(run), self.run_log(run), self.snapshot(run)

    def log_and_feed(self, run: str) -> tuple[str, str, str, str]:
        return self.run(run), self.run_log(run), self.feed, self.feed_counter

    def indices(self, agent: str, thread: str | None) -> tuple[str, str, str]:
        """The sets that list a run: all runs, the agent's, the thread's."""
        return f"{self._prefix}:runs", f"{self._prefix}:agent:{agent}", f"{self._prefix}:thread:{thread or ''}"

    def index(self, filter: Filter) -> str:
        """The smallest set that lists every run that fits."""
        everything, agent, thread = self.indices(filter.agent or "", filter.thread)
        if filter.thread:
            return thread
        if filter.statuses is not None and set(filter.statuses) <= ACTIVE:
            return self.active
        return agent if filter.agent else everything

    def idempotency(self, principal: str, key: str) -> str:
        return f"{self._prefix}:key:{len(principal)}:{principal}:{key}"

    def heartbeat(self, worker: str) -> str:
        return f"{self._prefix}:worker:{worker}"

    def owned(self, worker: str) -> str:
        """The active runs of a worker."""
        return f"{self._prefix}:owned:{worker}"

    def updates(self, run: str) -> str:
        return f"{self._channels}:run:{run}"

    def commands(self, worker: str) -> str:
        return f"{self._channels}:commands:{worker}"

    def probe(self, worker: str) -> str:
        return f"{self._channels}:probe:{worker}"
