"""What all parts of one DHT node share: its table, its coordinate, its open calls, and the effects of this
moment.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol, TypeAlias

from dht.calls import Call, Calls, Purpose
from dht.coordinates import UNKNOWN, Vivaldi, estimate_ns
from dht.directory import Directory, Keys
from dht.events import DhtEvent
from dht.keys import KEY_BITS
from dht.limits import MAX_OPEN_CALLS
from dht.messages import DhtMessage, Said
from dht.policy import DhtPolicy
from dht.table import ASKED, TICK_BITS, US, RoutingTable
from protocol.dice import Dice
from protocol.instants import Instant, UnixNs
from protocol.machine import Effect, Emit, Send

DhtEffect: TypeAlias = Effect[int, DhtMessage, DhtEvent]

#: Estimates of the network's size that are remembered; their median is used, so that a few misled lookups do no
#: harm.
_SIZES_KEPT = 9


class Members(Protocol):
    """The full table (dht/fulltable.py), as others see it; None in nodes without."""

    active: bool

    def heard_of(self, peer: int, coordinate: int) -> None: ...

    def answered(self, peer: int, coordinate: int) -> None: ...

    def gone(self, peer: int) -> None: ...

    def closest(self, target: int, count: int, *, told: bool) -> tuple[list[int], list[int]]: ...

    def page(self, start: int, end: int) -> tuple[tuple[int, ...], tuple[int, ...], bool]: ...

    def differing(self, digests: tuple[int, ...]) -> tuple[int, ...]: ...


class Core:
    __slots__ = (
        "_sizes",
        "calls",
        "client",
        "dice",
        "directory",
        "full",
        "keys",
        "me",
        "now",
        "out",
        "policy",
        "table",
        "unix_offset_ns",
        "vivaldi",
    )

    def __init__(
        self, me: int, directory: Directory, dice: Dice, policy: DhtPolicy, unix_offset_ns: int, *, client: bool
    ) -> None:
        self.me = me
        self.directory = directory
        self.keys: Keys = directory.keys
        self.dice = dice
        self.policy = policy
        self.unix_offset_ns = unix_offset_ns
        self.client = client
        self.table = RoutingTable(me, directory, policy)
        self.vivaldi = Vivaldi()
        self.calls = Calls()
        self.now = Instant(0)
        self.out: list[DhtEffect] = []
        self._sizes: array[float] | None = None
        self.full: Members | None = None

    @property
    def tick(self) -> int:
        return self.now >> TICK_BITS

    @property
    def unix_now(self) -> UnixNs:
        return UnixNs(self.now + self.unix_offset_ns)

    # --- effects --------------------------------------------------------------------------------------

    def send(self, peer: int, message: DhtMessage) -> None:
        self.out.append(Send(peer, message))

    def emit(self, event: DhtEvent) -> None:
        self.out.append(Emit(event))

    # --- calls ----------------------------------------------------------------------------------------

    def start_call(self, peer: int, purpose: Purpose, operation: int, *, patience: int = 1) -> int | None:
        """Number of a new call to the peer, `patience` times as long as usual; None if too many are open."""
        if len(self.calls) >= MAX_OPEN_CALLS:
            return None
        table, policy = self.table, self.policy
        place = table.find(peer)
        rtt_ns = self.rtt_at(place)
        connect = 0
        if (policy.connect_ns or policy.connect_rtts) and not self._has_link(place):
            connect = policy.connect_ns + policy.connect_rtts * rtt_ns
        if place >= 0:
            table.flags[place] |= ASKED
            table.checked[place] = self.now >> TICK_BITS
        slow = policy.slow_factor * rtt_ns + policy.slow_ns + connect
        fail = policy.timeout_factor * rtt_ns + policy.timeout_ns + connect
        fail = min(max(fail, policy.min_timeout_ns), policy.max_timeout_ns) * patience
        return self.calls.start(self.now, peer, purpose, operation, slow, fail)

    def _has_link(self, place: int) -> bool:
        """Whether there probably is a connection to this entry: it was measured, and used lately."""
        table = self.table
        if place < 0 or not table.rtts_us[place]:
            return False
        return self.tick - table.checked[place] <= self.policy.link_kept_ns >> TICK_BITS

    def rtt_at(self, place: int) -> int:
        """Expected round trip of an entry (-1: of a stranger), nanoseconds."""
        if place >= 0:
            table = self.table
            if measured_us := table.rtts_us[place]:
                return measured_us * US
            coordinate = table.coordinates[place]
            if coordinate != UNKNOWN and self.vivaldi.error < 1.0:
                return estimate_ns(coordinate, self.vivaldi.packed)
        return self.policy.unknown_rtt_ns

    def learn(self, peer: int, call: Call, said: Said) -> None:
        """A peer answered: measure, move, and keep it if it may stand in a table."""
        rtt_ns = self.now - call.sent
        table = self.table
        if not self.policy.rtt_from_first_answer:
            rtt_ns = 0
        elif rtt_ns > 0:
            self.vivaldi.sample(said.coordinate, said.error, rtt_ns, self.dice)
        if said.client:
            self.forget(peer)
            return
        if self.full is not None:
            self.full.answered(peer, said.coordinate)
        rtt_us = max(rtt_ns // 1000, 1) if rtt_ns > 0 else 0
        table.answered(peer, self.now >> TICK_BITS, rtt_us, said.coordinate, self.vivaldi.packed)

    def forget(self, peer: int) -> None:
        """The peer is a client: it stands in no table."""
        self.table.remove(peer)
        if self.full is not None:
            self.full.gone(peer)

    def hear_contacts(self, contacts: Sequence[int], coordinates: Sequence[int], places: Sequence[int]) -> None:
        """What an answer said of others, at these places: hearsay."""
        self.table.hear(contacts, coordinates, places, self.now >> TICK_BITS, self.vivaldi.packed)
        if self.full is not None:
            told = len(coordinates)
            for place in places:
                self.full.heard_of(contacts[place], coordinates[place] if place < told else UNKNOWN)

    def closest_peers(self, target: int) -> list[int]:
        """Where a lookup starts."""
        peers = self.table.peers
        near = [peers[place] for place in self.table.closest(target, self.policy.k)]
        if self.full is not None and self.full.active:
            members, _ = self.full.closest(target, self.policy.k, told=False)
            return [*members, *near]
        return near

    # --- size of the network --------------------------------------------------------------------------

    def note_size(self, target: int, closest: list[int]) -> None:
        """A finished lookup tells how dense the network is around its target."""
        if len(closest) < self.policy.k:
            return
        sizes = self._sizes
        if sizes is None:
            sizes = self._sizes = array("d")
        sizes.append(float(self._size_from(target, closest)))
        if len(sizes) > _SIZES_KEPT:
            del sizes[0]

    def _size_from(self, target: int, closest: list[int]) -> int:
        """Least squares: the i-th closest of n random keys lies at i / (n + 1) of the key space."""
        squares = weighted = 0
        for i, peer in enumerate(closest, 1):
            squares += i * i
            weighted += i * (self.keys[peer] ^ target)
        return max((squares << KEY_BITS) // max(weighted, 1) - 1, len(closest))

    def size_estimate(self) -> int:
        """Nodes in the network, with us: the median of what lookups and our own neighbourhood tell."""
        table = self.table
        own = self.keys[self.me]
        places = table.closest(own, self.policy.k)
        known = len(table) + (0 if self.client else 1)
        if len(places) < self.policy.k:
            return known
        estimates = sorted(self._sizes or ())
        estimates.append(float(self._size_from(own, [table.peers[place] for place in places]) + 1))
        estimates.sort()
        return max(int(estimates[len(estimates) // 2]), known)
