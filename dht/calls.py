"""Open calls: who was asked what, and until when we wait.

Each call has two limits, both from the peer's expected round trip: after the first it is slow, after the second
it has failed. Timers lie in a heap with lazy deletion, so that a call costs one push, one pop and a dictionary
entry.
"""

from __future__ import annotations

from enum import IntEnum
from heapq import heapify, heappop, heappush

import msgspec

from protocol.instants import Instant


class Purpose(IntEnum):
    QUERY = 0
    STORE = 1
    PING = 2
    PAGE = 3
    COMPARE = 4


class Call(msgspec.Struct, gc=False):
    """`operation`: number of the operation that asked, 0 for upkeep. `note`: the asker's own, for what it
    asked.
    """

    peer: int
    purpose: Purpose
    operation: int
    sent: Instant
    failed_at: Instant
    note: int = 0


class Calls:
    __slots__ = ("_next", "_open", "_timers")

    def __init__(self) -> None:
        self._next = 1
        self._open: dict[int, Call] = {}
        self._timers: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._open)

    def start(  # noqa: PLR0917 - names cost time, and every query comes through here
        self, now: Instant, peer: int, purpose: Purpose, operation: int, slow_ns: int, fail_ns: int
    ) -> int:
        """Number of a new call; it becomes due `slow_ns` and `fail_ns` from now."""
        number = self._next
        self._next += 1
        self._open[number] = Call(peer, purpose, operation, now, Instant(now + fail_ns))
        heappush(self._timers, (now + min(slow_ns, fail_ns), number))
        return number

    def note(self, number: int, note: int) -> None:
        self._open[number].note = note

    def is_open(self, number: int, peer: int) -> bool:
        """Whether this peer was asked with this number, and has not answered yet."""
        call = self._open.get(number)
        return call is not None and call.peer == peer

    def finish(self, number: int, peer: int) -> Call | None:
        """The call that this peer answers with this number, now closed; None if there is none."""
        call = self._open.get(number)
        if call is None or call.peer != peer:
            return None
        del self._open[number]
        if not self._open:
            self._timers.clear()
        return call

    def to(self, peer: int) -> list[int]:
        """Numbers of open calls to a peer."""
        return [number for number, call in self._open.items() if call.peer == peer]

    def close(self, number: int) -> Call:
        return self._open.pop(number)

    def references(self) -> set[int]:
        """Peers that were asked."""
        return {call.peer for call in self._open.values()}

    def next_due(self) -> int | None:
        timers, open_calls = self._timers, self._open
        while timers:
            due, number = timers[0]
            if number in open_calls:
                return due
            heappop(timers)
        return None

    def due(self, now: Instant) -> tuple[Call, bool] | None:
        """One call whose limit has passed, and whether it has failed (then it is closed); None if there is
        none.
        """
        while self._timers and self._timers[0][0] <= now:
            _, number = heappop(self._timers)
            call = self._open.get(number)
            if call is None:
                continue
            if call.failed_at <= now:
                del self._open[number]
                return call, True
            heappush(self._timers, (call.failed_at, number))
            return call, False
        if len(self._timers) > 64 and len(self._timers) > 2 * len(self._open):
            self._timers = [timer for timer in self._timers if timer[1] in self._open]
            heapify(self._timers)
        return None
