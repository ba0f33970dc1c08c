"""Keeping the table true: pings, refreshes, looking around.

One ping per interval, in turn to the entry heard of longest ago, to one that has yet to prove itself, and to a
candidate that would be worth a place (in an RTT-aware table: one that is clearly nearer). So both kinds of
table send equally many. The interval is short while entries prove dead and grows while they answer: a network
that loses a third of its nodes at once is swept within a minute, a quiet one costs 20 pings a minute. What
strangers make fail never shortens it: only entries that had answered before count.
"""

from __future__ import annotations

from typing import Final

from dht.calls import Purpose
from dht.core import Core
from dht.keys import KEY_BITS
from dht.messages import Ping
from dht.operations import Operations
from dht.table import ASKED, TICK_BITS, Failure
from protocol.instants import Instant

#: After an answer the ping interval grows by this fraction (one in ...), after a failure it falls to a quarter:
#: they balance where 3 % of pings fail.
_GROWTH = 16
_FALL = 8

#: Later than any instant (146 years).
FOREVER: Final = 1 << 62

#: Pings open at once because of retries and replacements (those of the interval come on top).
_MAX_EXTRA_PINGS = 32

#: Looks at the own neighbourhood come this many times later, each time that the last changed nothing.
_LOOK_GROWTH = 4

#: The second ping to an entry waits this many times as long.
_SECOND_PATIENCE = 2


class Upkeep:
    """`running` from the first join (or contact) on; `due`: when there is work, FOREVER before."""

    __slots__ = (
        "_bucket",
        "_core",
        "_interval",
        "_look_interval",
        "_neighbours",
        "_next_look",
        "_next_ping",
        "_next_refresh",
        "_operations",
        "_thirds",
        "_urgent",
        "due",
        "running",
    )

    def __init__(self, core: Core, operations: Operations) -> None:
        self._core = core
        self._operations = operations
        self.running = False
        self.due: int = FOREVER
        self._interval = core.policy.ping_interval_ns
        self._next_ping = 0
        self._next_refresh = 0
        self._next_look = 0
        self._look_interval = 0
        self._neighbours = 0
        self._bucket = 0
        self._urgent = 0
        self._thirds = 0

    @property
    def ping_interval_ns(self) -> int:
        """The present interval, for figures."""
        return self._interval

    def start(self, now: Instant, *, joined: bool) -> None:
        """Begin, or begin anew after a join: then pings and refreshes come fast at first."""
        policy = self._core.policy
        dice = self._core.dice
        if joined:
            self._interval = max(policy.ping_interval_ns // _FALL, policy.min_ping_interval_ns)
            self._urgent = max(self._core.table.buckets, 1)
            self._bucket = 0
        elif self.running:
            return
        self.running = True
        self._next_ping = now + dice.below(self._interval)
        refresh = policy.join_refresh_interval_ns if joined else policy.refresh_interval_ns
        self._next_refresh = now + dice.below(refresh)
        look = policy.first_self_lookup_ns if joined else policy.self_lookup_interval_ns
        self._look_interval = look
        self._next_look = now + look // 2 + dice.below(look)
        self._plan()

    def _plan(self) -> None:
        """To be called when a next time has changed: far more often somebody asks for `due`."""
        if self.running:
            self.due = min(self._next_ping, self._next_refresh, self._next_look)

    def work(self, now: Instant) -> None:
        if self.due > now:
            return
        if self._next_ping <= now:
            self._next_ping = now + self._interval
            self._ping_one(now)
        if self._next_refresh <= now:
            self._refresh_one(now)
        if self._next_look <= now:
            self._look_around(now)
        self._plan()

    def _look_around(self, now: Instant) -> None:
        """Look up our own key; soon again while that still changes who our neighbours are."""
        core = self._core
        table = core.table
        fingerprint = 0
        for place in table.closest(core.keys[core.me], core.policy.k):
            fingerprint ^= core.keys[table.peers[place]] & 0xFFFF_FFFF
        if fingerprint == self._neighbours:
            longest = core.policy.self_lookup_interval_ns
            self._look_interval = min(self._look_interval * _LOOK_GROWTH, longest)
        self._neighbours = fingerprint
        look = self._look_interval
        self._next_look = now + look - look // 10 + core.dice.below(look // 5 + 1)
        self._operations.look_around()

    # --- pings ----------------------------------------------------------------------------------------

    def _ping_one(self, now: Instant) -> None:
        core = self._core
        table = core.table
        self._thirds = (self._thirds + 1) % 3
        own = core.vivaldi.packed
        stalest = table.stalest()
        stale = stalest >= 0 and table.checked[stalest] << TICK_BITS <= now - core.policy.fresh_ns
        if self._thirds:
            # A nearer peer for a far bucket is worth a ping that would go out anyway, not one more.
            candidate = table.promising(own, far=stale) if self._thirds == 2 else None
            if candidate is None and (place := table.unverified(own)) >= 0:
                candidate = table.peers[place]
            if candidate is None and self._thirds == 1:
                candidate = table.promising(own, far=stale)
            if candidate is not None:
                self.ping(candidate)
                return
        if stale:
            self.ping(table.peers[stalest])

    def ping(self, peer: int, *, patience: int = 1) -> None:
        core = self._core
        call = core.start_call(peer, Purpose.PING, 0, patience=patience)
        if call is not None:
            vivaldi = core.vivaldi
            core.send(peer, Ping(call, vivaldi.packed, vivaldi.error_parts, core.client))

    def ping_answered(self) -> None:
        full = self._core.policy.ping_interval_ns
        if self._interval < full:
            self._interval = min(self._interval + self._interval // _GROWTH, full)

    def failed(self, now: Instant, peer: int) -> None:
        """A query or ping to the peer was not answered, or its connection broke."""
        table = self._core.table
        failure, bucket = table.failed(peer)
        if self._core.full is not None and failure is not Failure.SUSPECTED:
            self._core.full.gone(peer)
        if failure in {Failure.SUSPECTED, Failure.LOST}:
            self._hurry(now)
        if failure is Failure.SUSPECTED:
            self._extra_ping(peer, _SECOND_PATIENCE)
        if bucket < 0:
            return
        self._refill(bucket)
        members = table.starts[bucket + 1] - table.starts[bucket] if bucket < table.buckets else 0
        if members < self._core.policy.k // 2 and self._urgent == 0 and failure is Failure.LOST:
            # Refresh the whole table once: deaths come in droves.
            self._urgent = table.buckets
            refresh = now + self._core.policy.join_refresh_interval_ns
            self._next_refresh = min(self._next_refresh, refresh)
            self._plan()

    def _hurry(self, now: Instant) -> None:
        self._interval = max(self._interval // _FALL, self._core.policy.min_ping_interval_ns)
        self._next_ping = min(self._next_ping, now + self._interval)
        self._plan()

    def _extra_ping(self, peer: int, patience: int) -> None:
        if len(self._core.calls) < _MAX_EXTRA_PINGS:
            self.ping(peer, patience=patience)

    def _refill(self, bucket: int) -> None:
        """A place became free: let a candidate prove itself."""
        core = self._core
        taken = core.table.take_candidate(bucket)
        if taken is not None:
            peer, coordinate = taken
            core.table.heard_of(peer, core.tick, coordinate, core.vivaldi.packed, self_said=False)
            place = core.table.find(peer)
            if place >= 0 and not core.table.flags[place] & ASKED:
                self._extra_ping(peer, 1)

    # --- refreshes ------------------------------------------------------------------------------------

    def _refresh_one(self, now: Instant) -> None:
        policy = self._core.policy
        table = self._core.table
        if self._urgent:
            self._urgent -= 1
            interval = policy.join_refresh_interval_ns
        else:
            interval = policy.refresh_interval_ns
        self._next_refresh = now + interval - self._core.dice.below(interval // 4 + 1)
        if len(table):
            if self._urgent:
                self._skip_full_buckets()
            self._bucket %= table.buckets
            self._operations.refresh(self._random_key(self._bucket))
            self._bucket += 1

    def _skip_full_buckets(self) -> None:
        """After a join or heavy loss only buckets with room need company; the last one has its own lookups."""
        table = self._core.table
        while self._urgent and self._bucket < table.buckets - 1:
            if table.starts[self._bucket + 1] - table.starts[self._bucket] < self._core.policy.k:
                return
            self._bucket += 1
            self._urgent -= 1

    def _random_key(self, bucket: int) -> int:
        """A key that shares exactly `bucket` leading bits with ours."""
        core = self._core
        own = core.keys[core.me]
        low_bits = KEY_BITS - 1 - bucket
        random = 0
        for _ in range(4):
            random = random << 64 | core.dice.u64()
        flipped = own ^ 1 << low_bits
        return flipped >> low_bits << low_bits | random & ((1 << low_bits) - 1)
