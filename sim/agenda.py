"""What is to happen, by time.

One heap of all that is to come would be a million entries in a large network, and each look at it would touch
twenty places far apart in memory. So time is cut into short days: an event of a later day is only put on that
day's list, and a heap is made of one day's events when it begins.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Any, Final, Generic, TypeVar

#: An event: (instant, number, ...). The number settles ties, nothing behind it is compared.
E = TypeVar("E", bound=tuple[Any, ...])

#: A day is 2**18 ns (0.26 ms): shorter than nearly every message's way, so that few events fall on the day on
#: which they are made, and 250 events of a network of 100,000.
DAY_BITS: Final = 18


class Agenda(Generic[E]):
    """`today`: the heap of the day at hand. Take from it what is first; when it is empty, ask `next_day`."""

    __slots__ = ("_day", "_days", "_later", "today")

    def __init__(self) -> None:
        self.today: list[E] = []
        self._day = -1
        self._days: list[int] = []
        self._later: dict[int, list[E]] = {}

    def push(self, event: E) -> None:
        day = event[0] >> DAY_BITS
        if day <= self._day:
            heappush(self.today, event)
            return
        events = self._later.get(day)
        if events is None:
            self._later[day] = [event]
            heappush(self._days, day)
        else:
            events.append(event)

    def next_day(self) -> list[E]:
        """The heap of the next day on which something happens; it is `today` from now on. Raises IndexError if
        nothing ever will.
        """
        self._day = heappop(self._days)
        self.today = self._later.pop(self._day)
        heapify(self.today)
        return self.today
