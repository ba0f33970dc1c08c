"""What we keep told: our own records and provider records, repeated until they expire or are withdrawn."""

from __future__ import annotations

from heapq import heappop, heappush

from dht.core import Core
from dht.limits import MAX_OWN_ENTRIES
from dht.operations import Operations
from protocol.envelope import Envelope
from protocol.instants import Instant

#: Repetitions are spread by up to a tenth of their interval, so that nodes started together do not stay
#: together.
JITTER_SHARE = 10


class Own:
    """`record`: None for a provider record. `due`: when it is told next."""

    __slots__ = ("due", "record")

    def __init__(self, record: Envelope | None, due: int) -> None:
        self.record = record
        self.due = due


class Publishing:
    __slots__ = ("_core", "_entries", "_operations", "timers")

    def __init__(self, core: Core, operations: Operations) -> None:
        self._core = core
        self._operations = operations
        self._entries: dict[tuple[int, bool], Own] = {}
        #: While this is empty, as it is in most nodes, there is no need to ask for `next_due`.
        self.timers: list[tuple[int, int, bool]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, key: int, record: Envelope | None) -> bool:
        """Repeat this from now on. False: too many already."""
        name = (key, record is not None)
        if name not in self._entries and len(self._entries) >= MAX_OWN_ENTRIES:
            return False
        due = self._next_due(record is not None)
        self._entries[name] = Own(record, due)
        heappush(self.timers, (due, key, record is not None))
        return True

    def withdraw(self, key: int) -> None:
        for is_record in (False, True):
            self._entries.pop((key, is_record), None)

    def own_records(self, key: int) -> tuple[Envelope, ...]:
        own = self._entries.get((key, True))
        return (own.record,) if own is not None and own.record is not None else ()

    def provides(self, key: int) -> bool:
        return (key, False) in self._entries

    def next_due(self) -> int | None:
        timers = self.timers
        while timers:
            due, key, is_record = timers[0]
            own = self._entries.get((key, is_record))
            if own is not None and own.due == due:
                return due
            heappop(timers)
        return None

    def work(self, now: Instant) -> None:
        """Tell again what is due."""
        while (due := self.next_due()) is not None and due <= now:
            _, key, is_record = heappop(self.timers)
            own = self._entries[key, is_record]
            if own.record is not None and own.record.expires_unix_ns <= self._core.unix_now:
                del self._entries[key, is_record]
                continue
            own.due = self._next_due(is_record)
            heappush(self.timers, (own.due, key, is_record))
            if own.record is not None:
                self._operations.put(None, key, own.record)
            else:
                self._operations.provide(None, key)

    def _next_due(self, is_record: bool) -> int:  # noqa: FBT001 - a name's second half
        policy = self._core.policy
        interval = policy.republish_interval_ns if is_record else policy.provide_interval_ns
        return self._core.now + interval - self._core.dice.below(interval // JITTER_SHARE + 1)
