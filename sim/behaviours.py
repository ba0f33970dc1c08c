"""What attackers in the DHT do differently: machines around a machine. They compose; each knows its `inner`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from typing import Any, Final

import msgspec

from dht.messages import Differences, Kept, Nodes, Page, Pong, Providers, Records
from protocol.instants import Instant
from protocol.machine import Send, WakeAt
from sim.ports import AnyMachine
from sim.world import AnyEffect, AnyMessage

ANSWERS: Final = (Pong, Nodes, Records, Providers, Kept, Page, Differences)

#: Contacts that a forged answer names: as many as an honest one.
FORGED: Final = 20


class Behaviour:
    """Passes everything through. Subclasses change effects."""

    __slots__ = ("inner",)

    def __init__(self, inner: AnyMachine) -> None:
        self.inner = inner

    def receive(self, now: Instant, what: AnyMessage) -> Iterable[AnyEffect]:
        return [changed for effect in self.inner.receive(now, what) for changed in self.change(now, effect)]

    def next_wake(self) -> Instant | None:
        return self.inner.next_wake()

    def change(self, now: Instant, effect: AnyEffect) -> Iterable[AnyEffect]:  # noqa: ARG002 - for subclasses
        """What becomes of one effect."""
        return (effect,)


class FreeRider(Behaviour):
    """Asks, and never answers."""

    __slots__ = ()

    def change(self, now: Instant, effect: AnyEffect) -> Iterable[AnyEffect]:  # noqa: ARG002 - as above
        return () if type(effect) is Send and isinstance(effect.message, ANSWERS) else (effect,)


class SlowLoris(Behaviour):
    """Answers, but late: its askers wait for it as long as they may."""

    __slots__ = ("_delay_ns", "_held", "_number")

    def __init__(self, inner: AnyMachine, delay_ns: int) -> None:
        super().__init__(inner)
        self._delay_ns = delay_ns
        self._held: list[tuple[int, int, AnyEffect]] = []
        self._number = 0

    def receive(self, now: Instant, what: AnyMessage) -> Iterable[AnyEffect]:
        out = list(super().receive(now, what))
        while self._held and self._held[0][0] <= now:
            out.append(heappop(self._held)[2])
        wake = self.next_wake()
        return out if wake is None else [*out, WakeAt(wake)]

    def next_wake(self) -> Instant | None:
        inner = self.inner.next_wake()
        if not self._held:
            return inner
        own = Instant(self._held[0][0])
        return own if inner is None else min(own, inner)

    def change(self, now: Instant, effect: AnyEffect) -> Iterable[AnyEffect]:
        if type(effect) is not Send or not isinstance(effect.message, ANSWERS):
            return (effect,)
        self._number += 1
        heappush(self._held, (now + self._delay_ns, self._number, effect))
        return ()


class Ring:
    """Accomplices that know each other: sorted keys with their nodes."""

    def __init__(self) -> None:
        self._members: list[tuple[int, int]] = []

    def add(self, key: int, node: int) -> None:
        self._members.insert(bisect_left(self._members, (key, node)), (key, node))

    def near(self, target: int) -> list[int]:
        """Members around a key: not exactly the closest by XOR, but as good to lure with."""
        at = bisect_left(self._members, (target, -1))
        around = self._members[max(0, at - FORGED) : at + FORGED]
        return [node for _, node in sorted(around, key=lambda member: member[0] ^ target)[:FORGED]]


class Conspirator(Behaviour):
    """Names only members of its ring, whatever is asked for. (Sybils and eclipse attackers do this.)"""

    __slots__ = ("_asked", "_ring")

    def __init__(self, inner: AnyMachine, ring: Ring) -> None:
        super().__init__(inner)
        self._ring = ring
        self._asked = 0

    def receive(self, now: Instant, what: AnyMessage) -> Iterable[AnyEffect]:
        message = getattr(what, "message", None)
        self._asked = getattr(message, "target", getattr(message, "key", 0))
        return super().receive(now, what)

    def change(self, now: Instant, effect: AnyEffect) -> Iterable[AnyEffect]:  # noqa: ARG002 - as above
        return (_forged(effect, self._ring.near(self._asked)),)


class Liar(Behaviour):
    """Names peers that are not there, always the same long list."""

    __slots__ = ("_phantoms",)

    def __init__(self, inner: AnyMachine, phantoms: Sequence[int]) -> None:
        super().__init__(inner)
        self._phantoms = phantoms

    def change(self, now: Instant, effect: AnyEffect) -> Iterable[AnyEffect]:  # noqa: ARG002 - as above
        return (_forged(effect, self._phantoms),)


def _forged(effect: AnyEffect, contacts: Sequence[int]) -> AnyEffect:
    if type(effect) is not Send or not isinstance(effect.message, Nodes | Records | Providers):
        return effect
    message: Any = effect.message
    unknown = (0,) * len(contacts)
    return Send(effect.peer, msgspec.structs.replace(message, contacts=tuple(contacts), coordinates=unknown))
