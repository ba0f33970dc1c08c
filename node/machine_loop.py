"""What every driver of a machine shares: inputs one after the other, and the alarm that the machine asks for.

Everything happens in the task that has the news (a message, a lost link, the alarm), nothing waits, and what
one step causes is queued behind it. The simulator's counterpart is sim/world.py.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import trio

from node.overlay.clock import monotonic_now
from protocol.instants import SECOND_NS
from protocol.machine import Effect, Input, Machine, Woken

P = TypeVar("P")
M = TypeVar("M")
C = TypeVar("C")
E = TypeVar("E")


class MachineLoop(Generic[P, M, C, E]):
    """`apply` carries out one effect; it may `feed` what comes of it, which is taken after the step at hand. It
    need not mind `WakeAt`: the loop asks `next_wake`.
    """

    def __init__(self, machine: Machine[P, M, C, E], apply: Callable[[Effect[P, M, E]], None]) -> None:
        self._machine = machine
        self._apply = apply
        self._inbox: deque[Input[P, M, C]] = deque()
        self._feeding = False
        self._alarm = trio.CancelScope()

    def feed(self, what: Input[P, M, C]) -> None:
        """Take one input now, or after those that are there."""
        self._inbox.append(what)
        if self._feeding:
            return
        self._feeding = True
        try:
            while self._inbox:
                for effect in self._machine.receive(monotonic_now(), self._inbox.popleft()):
                    self._apply(effect)
        finally:
            self._feeding = False
            self._set_alarm()

    async def run(self) -> None:
        """Wake the machine when it asks for it, until cancelled."""
        while True:
            with trio.CancelScope() as self._alarm:
                self._set_alarm()
                await trio.sleep_forever()
            self.feed(Woken())

    def _set_alarm(self) -> None:
        wake = self._machine.next_wake()
        # A microsecond more than asked for: a float must not round to a moment before.
        deadline = math.inf if wake is None else (wake + 1000) / SECOND_NS
        if deadline != self._alarm.deadline:  # mostly it is the same
            self._alarm.deadline = deadline
