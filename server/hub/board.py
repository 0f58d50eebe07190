"""The newest summary of each run that somebody watches, and who watches it.

Runs are kept by *key*, as the rules are: everything, an agent, a thread, or a single run, each of one principal. A
*group* holds the runs under one key and the watches of it.

`flush` serves each viewer once. Called 4 times a second at most, it sends of each run 4 records a second at most.
Viewers that are up to date, and that one and the same group concerns, get the same bytes.

Without I/O. This module must not know the bus, or what is in a record.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from agentcast.server.bus.base import ACTIVE, Summary
from agentcast.server.hub.outbox import Outbox
from agentcast.server.hub.rules import keys_of
from agentcast.server.hub.viewers import MAX_RECORDS, Cohort, Group, Key, Slot, Viewer, Watch

SLICE = 200
"""Records that are handled in one turn of the loop."""


def run_key(principal: str, run: str) -> Key:
    """The key of a single run."""
    return principal, "run", run


class Listener(Protocol):
    """Sees every record of a key that is delivered."""

    def notice(self, record: Summary) -> None: ...

    def miss(self) -> None:
        """Some may have been missed."""


class Board:
    """The records and viewers of this process."""

    def __init__(self) -> None:
        self.number = 0
        """Records that were taken."""
        self._slots: dict[str, Slot] = {}
        self._groups: dict[Key, Group] = {}
        self._listeners: dict[Key, dict[Listener, None]] = {}
        self._viewers: dict[Outbox, Viewer] = {}
        self._changed: dict[str, Slot] = {}
        """Since the last flush."""
        self._ended: dict[str, Slot] = {}
        """Yet to be removed."""
        self._behind: dict[Viewer, None] = {}
        self._reading: dict[object, int] = {}

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def unwatched(self) -> bool:
        return not self._groups and not self._listeners

    @property
    def due(self) -> bool:
        """Whether there is something to flush."""
        return bool(self._changed or self._behind or self._ended)

    @property
    def groups(self) -> list[Group]:
        return list(self._groups.values())

    def active(self, until: int) -> Iterator[Summary]:
        """The records of active runs that were taken up to a number."""
        for slot in list(self._slots.values()):
            if slot.number <= until and not slot.ended:
                yield slot.record

    # -- Records ---------------------------------------------------------------------------------------------------

    @contextmanager
    def reading(self) -> Iterator[int]:
        """Around reading stored records, which are given to `take` with this number: they may be older than what is
        delivered meanwhile. So long, runs that end stay on the board, lest an old record bring them back."""
        token = object()
        self._reading[token] = self.number
        try:
            yield self.number
        finally:
            del self._reading[token]

    def take(self, record: Summary, read: int | None = None) -> Slot | None:
        """Take a record that was delivered, or one that was read since `read`. None if it is not for the board."""
        keys = [*keys_of(record), run_key(record.principal, record.run)]
        if read is None:
            self._notify(keys, record)
        slot = self._slots.get(record.run)
        if slot is None and read is not None and record.status not in ACTIVE:
            del keys[:-1]  # it ended before: only those who ask for it by name are shown it
        groups = [group for key in keys if (group := self._groups.get(key)) is not None]
        if slot is None:
            slot = self._make_slot(record, groups)
            if slot is None:
                return None
        for group in groups:
            slot.groups[group] = None
            group.slots[record.run] = slot
            group.left_out.discard(record.run)
        if read is None or slot.number < 0 or (slot.number <= read and slot.record.data != record.data):
            self._put(slot, record)
        return slot

    def _notify(self, keys: Collection[Key], record: Summary) -> None:
        for key in keys if self._listeners else ():
            for listener in self._listeners.get(key, ()):
                listener.notice(record)

    def _make_slot(self, record: Summary, groups: Collection[Group]) -> Slot | None:
        if not groups:
            return None
        if len(self._slots) >= MAX_RECORDS:
            self._leave_out(record, groups)
            return None
        slot = self._slots[record.run] = Slot(record, -1)
        return slot

    def _put(self, slot: Slot, record: Summary) -> None:
        self.number += 1
        slot.record, slot.number = record, self.number
        if any(watch.begun for group in slot.groups for watch in group.watches):
            self._changed[record.run] = slot
        if slot.ended:
            self._ended[record.run] = slot

    def _leave_out(self, record: Summary, groups: Collection[Group]) -> None:
        """There is no room for a run. Each connection that watches it learns so, once."""
        for group in groups:
            if record.status not in ACTIVE:
                group.left_out.discard(record.run)
            elif record.run not in group.left_out and len(group.left_out) < MAX_RECORDS:
                group.left_out.add(record.run)
                for watch in group.watches:
                    if watch.begun:
                        watch.viewer.outbox.truncate(watch.subscription)

    def _remove(self, run: str) -> None:
        slot = self._slots.pop(run)
        self._ended.pop(run, None)
        self._changed.pop(run, None)
        for group in slot.groups:  # it keeps them: a viewer that is behind with it may leave some
            group.slots.pop(run, None)

    # -- Watches ---------------------------------------------------------------------------------------------------

    def watch(self, outbox: Outbox, subscription: str, keys: Collection[Key], *, named: bool = False) -> Watch:
        """Keep the records of these keys from now on, which the client has `named` one by one, or not. `begin` shows
        them, `leave` ends it."""
        viewer = self._viewers.setdefault(outbox, Viewer(outbox))
        watch = viewer.watches[subscription] = Watch(viewer, subscription, {}, named)
        self.widen(watch, keys)
        return watch

    def begin(self, watch: Watch, slots: Mapping[str, Slot] | None = None, awaited: Collection[str] = ()) -> None:
        """The reply was queued: show these runs, or else all active ones, and from now on each that changes. With
        `awaited` runs, the subscription ends after the last record of all of them."""
        viewer = watch.viewer
        if viewer.watches.get(watch.subscription) is not watch:
            return  # the connection has gone
        watch.begun = True
        for group in watch.groups:
            viewer.groups[group] = viewer.groups.get(group, 0) + 1
        watch.awaited = set(awaited)
        for run in awaited:
            viewer.awaiting.setdefault(run, {})[watch] = None
        if slots is None:
            viewer.joined[watch] = None  # at the next flush: many may begin at once
            self._behind[viewer] = None
        else:
            self.show(watch, slots)

    def show(self, watch: Watch, slots: Mapping[str, Slot]) -> None:
        """Have the viewer sent the newest records of these runs."""
        if watch.begun and slots:
            watch.viewer.lag(slots.values())
            self._behind[watch.viewer] = None

    def widen(self, watch: Watch, keys: Collection[Key]) -> None:
        """The watch covers these keys, too."""
        for key in keys:
            group = self._groups.get(key)
            if group is None:
                group = self._groups[key] = Group(key)
            if group not in watch.groups:
                watch.groups[group] = None
                group.watches[watch] = None
                if watch.begun:
                    watch.viewer.groups[group] = watch.viewer.groups.get(group, 0) + 1

    def narrow(self, watch: Watch, keys: Collection[Key]) -> None:
        """The watch covers these keys no more."""
        groups = [group for key in keys if (group := self._groups.get(key)) is not None and group in watch.groups]
        for group in groups:
            self._unwatch(watch, group)
        watch.viewer.forget_uncovered()

    def _unwatch(self, watch: Watch, group: Group) -> None:
        viewer = watch.viewer
        del watch.groups[group], group.watches[watch]
        if watch.begun:
            viewer.groups[group] -= 1
            if not viewer.groups[group]:
                del viewer.groups[group]
        if not group.watches:
            del self._groups[group.key]
            for run, slot in group.slots.items():
                del slot.groups[group]
                if not slot.groups:
                    self._remove(run)

    def leave(self, outbox: Outbox, subscription: str) -> None:
        """End a watch, if there is such a one: nothing that only it asked for is queued any more."""
        viewer = self._viewers.get(outbox)
        watch = viewer.watches.pop(subscription, None) if viewer is not None else None
        if viewer is None or watch is None:
            return
        for group in list(watch.groups):
            self._unwatch(watch, group)
        for run in watch.awaited:
            viewer.awaiting[run].pop(watch)
            if not viewer.awaiting[run]:
                del viewer.awaiting[run]
        viewer.joined.pop(watch, None)
        viewer.forget_uncovered()
        if not viewer.behind and not viewer.joined:
            self._behind.pop(viewer, None)
        if not viewer.watches:
            del self._viewers[outbox]

    def disconnect(self, outbox: Outbox) -> None:
        """The connection is gone."""
        viewer = self._viewers.get(outbox)
        if viewer is not None:
            viewer.behind.clear()
            for subscription in list(viewer.watches):
                self.leave(outbox, subscription)

    def named(self, outbox: Outbox) -> int:
        """Runs that the connection watches by name, each as often as it does, in subscriptions that begin, too."""
        viewer = self._viewers.get(outbox)
        return 0 if viewer is None else sum(len(watch.groups) for watch in viewer.watches.values() if watch.named)

    def listen(self, key: Key, listener: Listener) -> None:
        """Have the listener see every record of a key from now on."""
        self._listeners.setdefault(key, {})[listener] = None

    def unlisten(self, key: Key, listener: Listener) -> None:
        listeners = self._listeners.get(key, {})
        listeners.pop(listener, None)
        if not listeners:
            self._listeners.pop(key, None)

    def miss(self) -> None:
        """Records may have been missed, and were read again."""
        for listeners in self._listeners.values():
            for listener in listeners:
                listener.miss()

    # -- Flushing --------------------------------------------------------------------------------------------------

    def flush(self) -> Iterator[None]:
        """Queue what has changed, for each viewer as far as it has room. Yields where other work may come between."""
        changed, self._changed = self._changed, {}
        cohorts: dict[Group, Cohort] = {}
        for number, slot in enumerate(changed.values(), 1):
            for group in slot.groups:
                cohorts.setdefault(group, Cohort()).slots.append(slot)
            if number % SLICE == 0:
                yield
        concerned: dict[Viewer, dict[Group, None]] = {viewer: {} for viewer in self._behind}
        yield from _find_concerned(cohorts, concerned)
        for viewer, groups in concerned.items():
            yield from self._serve(viewer, groups, cohorts)
        yield from self._clear_away()

    def _serve(self, viewer: Viewer, groups: Iterable[Group], cohorts: Mapping[Group, Cohort]) -> Iterator[None]:
        groups = [group for group in groups if group in viewer.groups]  # it may have left some meanwhile
        try:
            viewer.enter()
            if len(groups) == 1 and not viewer.behind:
                queued = viewer.share(groups[0], cohorts[groups[0]])
            else:
                for group in groups:
                    viewer.lag(cohorts[group].slots)
                queued = viewer.catch_up()
            for slots in queued:
                self._note_ends(viewer, slots)
                yield
        except Exception as error:  # noqa: BLE001 -- the connection logs it
            viewer.outbox.fail(error)
        if viewer.behind or viewer.joined:
            self._behind[viewer] = None
            yield  # that may be a lot, even if nothing was queued
        else:
            self._behind.pop(viewer, None)

    def _note_ends(self, viewer: Viewer, slots: Collection[Slot]) -> None:
        """These were queued: subscriptions to runs by name end with them."""
        if not viewer.awaiting:
            return
        for run in [slot.record.run for slot in slots if slot.ended and slot.record.run in viewer.awaiting]:
            for watch in list(viewer.awaiting.get(run, ())):
                watch.awaited.discard(run)
                del viewer.awaiting[run][watch]
                if not watch.awaited:
                    viewer.outbox.subscriptions.pop(watch.subscription, None)
                    self.leave(viewer.outbox, watch.subscription)
            if not viewer.awaiting.get(run, True):
                del viewer.awaiting[run]

    def _clear_away(self) -> Iterator[None]:
        """Remove the runs that have ended. Viewers that are behind with them keep their last records."""
        for number, (run, slot) in enumerate(list(self._ended.items()), 1):
            read = min(self._reading.values(), default=self.number)
            if not slot.ended:
                self._ended.pop(run, None)
            elif run not in self._changed and slot.number <= read and self._slots.get(run) is slot:
                self._remove(run)
            if number % SLICE == 0:
                yield


def _find_concerned(groups: Collection[Group], concerned: dict[Viewer, dict[Group, None]]) -> Iterator[None]:
    """Add the viewers of these groups, each with its groups. Yields after each slice of watches."""
    watches = 0
    for group in groups:
        for watch in group.watches:
            if watch.begun:
                concerned.setdefault(watch.viewer, {})[group] = None
        watches += len(group.watches)
        if watches >= SLICE:
            watches = 0
            yield
