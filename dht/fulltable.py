"""Full-table mode: in a small network every node knows every other, and a lookup takes one hop.

A list of members in key order stands beside the routing table and never replaces it: lookups start from the
closest members, answers name them, and whatever the list lacks or has too much costs a hop or a time-out, not a
result.

It is filled by walking the key space in pages, each asked of another peer, and kept true by anti-entropy: every
round we send one peer the digests of 256 segments and fetch some pages from where they differ. Members that
others name are used at once but told only after they have answered us, so that a liar's inventions do not
spread; one more ping per `full_table_ping_interval_ns` proves them. Who fails is forgotten, and not taken up
again from hearsay for a while. Above `full_table_nodes` the list is dropped.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from typing import Final

from dht.calls import Call, Purpose
from dht.core import Core
from dht.keys import KEY_BITS
from dht.limits import MAX_DIGESTS, MAX_PAGE_CONTACTS
from dht.messages import CompareTables, Differences, GetPage, Page, Ping
from dht.table import TICK_BITS
from protocol.instants import SECOND_NS, Instant

KEY_SPACE: Final = 1 << KEY_BITS

#: Segments of the key space whose digests are compared.
SEGMENTS: Final = MAX_DIGESTS
_SEGMENT_SHIFT: Final = KEY_BITS - 8

#: Pages fetched in one round, about.
MAX_PAGES_PER_ROUND: Final = 8

#: The list is dropped when the network's estimated size, or the list, exceeds the policy's bound by a quarter:
#: an estimate is off by some 20 %.
_OVER_PERCENT: Final = 125

#: How long a member that failed is not believed to live on somebody's word, and how many such are remembered.
_GRAVE_NS: Final = 600 * SECOND_NS
_MAX_GRAVES: Final = 4096

#: A member that answered more recently needs no proof.
_PROOF_NS: Final = 600 * SECOND_NS

#: Pages of a walk come at least this far apart.
_WALK_NS: Final = 100_000_000

_DIGEST_MASK: Final = (1 << 62) - 1
_NEVER: Final = 0


class FullTable:
    """`active`: the list is kept and used."""

    __slots__ = (
        "_coordinates",
        "_core",
        "_graves",
        "_heard",
        "_next_page",
        "_next_ping",
        "_next_round",
        "_ping_at",
        "_queue",
        "_turn",
        "active",
        "members",
    )

    def __init__(self, core: Core) -> None:
        self._core = core
        self.active = False
        self.members = array("I")
        self._coordinates = array("Q")
        self._heard = array("I")
        self._graves: dict[int, int] = {}
        self._queue: list[tuple[int, int]] = []
        self._turn = 0
        self._ping_at = 0
        self._next_round = 0
        self._next_page = 0
        self._next_ping = 0

    def __len__(self) -> int:
        return len(self.members)

    # --- time -----------------------------------------------------------------------------------------

    def start(self, now: Instant) -> None:
        """After a join: walk the key space, then compare every so often."""
        self._next_round = now
        self._next_page = self._next_ping = now

    def next_due(self) -> int:
        if not self.active:
            return self._next_round
        due = min(self._next_round, self._next_ping)
        return min(due, self._next_page) if self._queue else due

    def work(self, now: Instant) -> None:
        policy = self._core.policy
        if self._next_round <= now:
            self._next_round = now + policy.full_table_interval_ns
            self._round(now)
        if not self.active:
            return
        if self._queue and self._next_page <= now:
            self._next_page = now + _WALK_NS
            start, end = self._queue.pop()
            self._ask_page(start, end)
        if self._next_ping <= now:
            self._next_ping = now + policy.full_table_ping_interval_ns
            self._prove_one()

    def _round(self, now: Instant) -> None:
        core = self._core
        bound = core.policy.full_table_nodes
        limit = bound * _OVER_PERCENT // 100
        size = core.size_estimate()
        if self.active and (size > limit or len(self.members) > limit):
            self._drop()
            return
        if not self.active:
            if size > bound or core.client or len(core.table) == 0:
                return
            self.active = True
            self._queue = [(0, KEY_SPACE)]
            self._next_page = self._next_ping = now
            for entry in core.table:
                self.heard_of(entry.peer, entry.coordinate)
                if entry.verified:
                    self.answered(entry.peer, entry.coordinate)
            return
        self._graves = {peer: until for peer, until in self._graves.items() if until > now}
        peer = self._next_partner()
        if peer is not None and (call := core.start_call(peer, Purpose.COMPARE, 0)) is not None:
            vivaldi = core.vivaldi
            head = (call, vivaldi.packed, vivaldi.error_parts, core.client)
            core.send(peer, CompareTables(*head, self.digests()))

    def _drop(self) -> None:
        self.active = False
        self.members = array("I")
        self._coordinates = array("Q")
        self._heard = array("I")
        self._graves = {}
        self._queue = []

    def _next_partner(self) -> int | None:
        """Partners in turn over the routing table, so that no liar is asked twice in a row."""
        table = self._core.table
        for _ in range(len(table)):
            self._turn = (self._turn + 1) % len(table)
            if table.flags[self._turn] & 3 == 1:
                return table.peers[self._turn]
        return None

    def _ask_page(self, start: int, end: int) -> None:
        core = self._core
        peer = self._next_partner()
        if peer is None or (call := core.start_call(peer, Purpose.PAGE, 0)) is None:
            return
        core.calls.note(call, end)
        vivaldi = core.vivaldi
        core.send(peer, GetPage(call, vivaldi.packed, vivaldi.error_parts, core.client, start, end))

    def _prove_one(self) -> None:
        """Ping one member that has not answered us yet, or not for the longest time around the ring."""
        core = self._core
        count = len(self.members)
        if not count:
            return
        try:
            place = self._heard.index(_NEVER)
        except ValueError:
            self._ping_at = (self._ping_at + 1) % count
            place = self._ping_at
            if self._heard[place] << TICK_BITS > core.now - _PROOF_NS:
                return
        peer = self.members[place]
        call = core.start_call(peer, Purpose.PING, 0)
        if call is not None:
            vivaldi = core.vivaldi
            core.send(peer, Ping(call, vivaldi.packed, vivaldi.error_parts, core.client))

    # --- members --------------------------------------------------------------------------------------

    def _place(self, peer: int) -> int:
        keys = self._core.keys
        return bisect_left(self.members, keys[peer], key=keys.__getitem__)

    def _has(self, place: int, peer: int) -> bool:
        return place < len(self.members) and self.members[place] == peer

    def heard_of(self, peer: int, coordinate: int) -> None:
        """Somebody named it."""
        core = self._core
        if not self.active or peer == core.me or self._graves.get(peer, 0) > core.now:
            return
        place = self._place(peer)
        if not self._has(place, peer):
            self._insert(place, peer, coordinate, _NEVER)

    def answered(self, peer: int, coordinate: int) -> None:
        """It answered us."""
        core = self._core
        if not self.active or peer == core.me:
            return
        place = self._place(peer)
        heard = max(core.tick, 1)
        if self._has(place, peer):
            self._heard[place] = heard
            if coordinate:
                self._coordinates[place] = coordinate
        else:
            self._graves.pop(peer, None)
            self._insert(place, peer, coordinate, heard)

    def _insert(self, place: int, peer: int, coordinate: int, heard: int) -> None:
        if len(self.members) > self._core.policy.full_table_nodes * _OVER_PERCENT // 100:
            return
        self.members.insert(place, peer)
        self._coordinates.insert(place, coordinate)
        self._heard.insert(place, heard)

    def gone(self, peer: int) -> None:
        """It did not answer, or says that it is a client."""
        if not self.active:
            return
        place = self._place(peer)
        if self._has(place, peer):
            del self.members[place]
            del self._coordinates[place]
            del self._heard[place]
        if len(self._graves) < _MAX_GRAVES:
            self._graves[peer] = self._core.now + _GRAVE_NS

    def closest(self, target: int, count: int, *, told: bool) -> tuple[list[int], list[int]]:
        """The `count` members closest to `target`, and their coordinates. `told`: those who answered us."""
        keys = self._core.keys
        members, heard = self.members, self._heard
        width = max(len(members) // (2 * count), 1).bit_length()
        while True:
            low = target >> (KEY_BITS - width) << (KEY_BITS - width) if width else 0
            high = low + (1 << (KEY_BITS - width))
            first = bisect_left(members, low, key=keys.__getitem__)
            last = bisect_left(members, high, key=keys.__getitem__)
            places = [i for i in range(first, last) if not told or heard[i]]
            if len(places) >= count or width == 0:
                break
            width -= 1
        places.sort(key=lambda i: keys[members[i]] ^ target)
        del places[count:]
        return [members[i] for i in places], [self._coordinates[i] for i in places]

    def digests(self) -> tuple[int, ...]:
        """Of each segment: the low bits of our key and those of members that answered us, xored."""
        core = self._core
        keys = core.keys
        digests = [0] * SEGMENTS
        own = keys[core.me]
        if not core.client:
            digests[own >> _SEGMENT_SHIFT] = own & _DIGEST_MASK
        for peer, heard in zip(self.members, self._heard, strict=True):
            if heard:
                key = keys[peer]
                digests[key >> _SEGMENT_SHIFT] ^= key & _DIGEST_MASK
        return tuple(digests)

    # --- answers to us --------------------------------------------------------------------------------

    def compared(self, answer: Differences) -> None:
        """Fetch some of the key space, if that peer knows others than we do."""
        if not self.active or self._queue:
            return
        segments = sorted({s for s in answer.segments if 0 <= s < SEGMENTS})
        if not segments:
            return
        # A stretch from one of them on that holds about MAX_PAGES_PER_ROUND pages of members.
        span = SEGMENTS * MAX_PAGES_PER_ROUND * MAX_PAGE_CONTACTS // (2 * (len(self.members) + 1))
        if span >= SEGMENTS:
            self._queue.append((0, KEY_SPACE))
            return
        first = self._core.dice.choice(segments)
        end = min(first + max(span, 1), SEGMENTS)
        self._queue.append((first << _SEGMENT_SHIFT, end << _SEGMENT_SHIFT))

    def paged(self, call: Call, answer: Page) -> None:
        """Take up a page, and go on where it ended."""
        if not self.active:
            return
        keys = self._core.keys
        end = call.note
        last = -1
        for peer, coordinate in zip(answer.contacts, answer.coordinates, strict=False):
            key = keys[peer]
            if last < key < end:
                self.heard_of(peer, coordinate)
                last = key
        if answer.more and last >= 0 and len(self._queue) <= MAX_PAGES_PER_ROUND:
            self._queue.append((last + 1, end))

    # --- answers to others ----------------------------------------------------------------------------

    def page(self, start: int, end: int) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
        """Members that answered us, in key order; ourselves among them."""
        core = self._core
        keys = core.keys
        found: list[tuple[int, int, int]] = []
        place = bisect_left(self.members, start, key=keys.__getitem__)
        more = False
        while place < len(self.members) and keys[self.members[place]] < end:
            if self._heard[place]:
                if len(found) == MAX_PAGE_CONTACTS - 1:
                    more = True
                    break
                peer = self.members[place]
                found.append((keys[peer], peer, self._coordinates[place]))
            place += 1
        own = keys[core.me]
        limit = found[-1][0] if more else end
        if not core.client and start <= own < limit:
            found.append((own, core.me, core.vivaldi.packed))
            found.sort()
        return tuple(f[1] for f in found), tuple(f[2] for f in found), more

    def differing(self, digests: tuple[int, ...]) -> tuple[int, ...]:
        if not self.active or len(digests) != SEGMENTS:
            return ()
        return tuple(i for i, own in enumerate(self.digests()) if own != digests[i])
