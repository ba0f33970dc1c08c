"""What a machine has to do when: deadlines by key, the earliest first, in a heap with lazy deletion."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

from protocol.instants import Instant

K = TypeVar("K")


class Agenda(Generic[K]):
    """Each key has at most one deadline. Equal deadlines come in the order in which they were set."""

    __slots__ = ("_heap", "_number", "_when")

    def __init__(self) -> None:
        self._when: dict[K, tuple[Instant, int]] = {}
        self._heap: list[tuple[Instant, int, K]] = []
        self._number = 0

    def __len__(self) -> int:
        return len(self._when)

    def __contains__(self, key: K) -> bool:
        return key in self._when

    def set(self, key: K, instant: Instant) -> None:
        """Replaces the key's deadline, if it has one."""
        self._number += 1
        self._when[key] = (instant, self._number)
        heapq.heappush(self._heap, (instant, self._number, key))
        if len(self._heap) > 64 + 4 * len(self._when):
            self._heap = [(when, number, name) for name, (when, number) in self._when.items()]
            heapq.heapify(self._heap)

    def sooner(self, key: K, instant: Instant) -> None:
        """Set it unless it is due by then anyway."""
        known = self._when.get(key)
        if known is None or instant < known[0]:
            self.set(key, instant)

    def cancel(self, key: K) -> None:
        self._when.pop(key, None)

    def next(self) -> Instant | None:
        """The earliest deadline."""
        while self._heap:
            instant, number, key = self._heap[0]
            if self._when.get(key) == (instant, number):
                return instant
            heapq.heappop(self._heap)
        return None

    def pop_due(self, now: Instant) -> K | None:
        """Take one key whose deadline has come, the earliest first."""
        first = self.next()
        if first is None or first > now:
            return None
        key = heapq.heappop(self._heap)[2]
        del self._when[key]
        return key
