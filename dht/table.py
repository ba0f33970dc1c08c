"""The routing table: who stands where, as far as we know, in a few kilobytes.

Kademlia (Maymounkov and Mazieres 2002): bucket i holds peers that share i leading bits with us, the last bucket
all that share more; it splits when full. The entries lie in dht/columns.py.

An entry is *verified* once it has answered us. One that asked us something *spoke*: it lives, but may not be
reachable. The rest is hearsay from answers. Unverified entries fill free places, are pinged soon and give way
to any verified peer; hearsay is never told to others. What an attacker can do to a table is bounded by this, by
groups (few peers of one network per bucket and table) and by seniors (the entries longest in a bucket do not
yield to nearer ones).

`rtt_aware` decides who stays in a full bucket: a newcomer that is clearly nearer replaces the farthest entry.
Not in the own neighbourhood: there (the buckets that hold our k closest) the closer key wins, else records
would not be found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from math import sqrt
from typing import Final

from dht.candidates import Candidates
from dht.columns import (
    ASKED,
    NEVER_US,
    SPOKE,
    SUSPECT,
    TICK_BITS,
    US,
    VERIFIED,
    Columns,
    Entry,
)
from dht.coordinates import UNIT_NS, UNKNOWN, estimate_ns
from dht.directory import Directory
from dht.keys import KEY_BITS
from dht.policy import DhtPolicy

__all__ = [
    "ASKED",
    "MAX_BUCKETS",
    "SPOKE",
    "SUSPECT",
    "TICK_BITS",
    "US",
    "VERIFIED",
    "Entry",
    "Failure",
    "RoutingTable",
]

#: Buckets: 2**40 nodes are more than there will be. An attacker who makes keys next to ours splits no further.
MAX_BUCKETS: Final = 48

_HEARSAY: Final = b"\x00"
_ONLY_SPOKE: Final = b"\x08"

#: Hearsay entries among which the nearest is pinged first.
_LOOKED_AT: Final = 8


class Failure(IntEnum):
    """What an unanswered query did to the table."""

    NO_ENTRY = 0
    #: A verified entry failed once: ask again, a lost packet is not a death.
    SUSPECTED = 1
    #: A verified entry failed twice and is gone.
    LOST = 2
    #: An entry that had never answered is gone.
    NEVER_LIVED = 3


class RoutingTable(Columns):
    """See the module. `own` is always our coordinate."""

    __slots__ = ("_candidates", "_directory", "_policy", "_turn")

    def __init__(self, me: int, directory: Directory, policy: DhtPolicy) -> None:
        super().__init__(directory.keys[me], directory.keys)
        self._directory = directory
        self._policy = policy
        self._candidates = Candidates(policy.candidates)
        self._turn = 0

    # --- reading --------------------------------------------------------------------------------------

    def references(self) -> set[int]:
        """Peers that entries and candidates name."""
        return {*self.peers, *self._candidates}

    def unverified(self, own: int) -> int:
        """Place of an entry that has yet to prove itself and is not being asked, -1 if there is none. Who spoke
        to us comes first, then our neighbourhood, then the nearest of some.
        """
        place = self.flags.find(_ONLY_SPOKE)
        if place >= 0:
            return place
        place = self.flags.rfind(_HEARSAY)
        if place < 0 or not self._policy.rtt_aware:
            return place
        if not self.is_far(self.bucket_of(self._keys[self.peers[place]])):
            return place
        best = place
        for _ in range(_LOOKED_AT):
            place = self.flags.rfind(_HEARSAY, 0, place)
            if place < 0:
                break
            if self._rtt_us(place, own) < self._rtt_us(best, own):
                best = place
        return best

    def is_far(self, bucket: int) -> bool:
        """Whether the bucket holds none of our k closest, so that RTT may decide in it."""
        return len(self.peers) - self.starts[bucket + 1] >= self._policy.k

    # --- a peer proved that it lives ------------------------------------------------------------------

    def answered(self, peer: int, tick: int, rtt_us: int, coordinate: int, own: int) -> bool:
        """The peer answered a query of ours after `rtt_us` (0: not measured). `own`: our coordinate. True if it
        stands in the table now.
        """
        place = self.find(peer)
        if place >= 0:
            self._refresh(place, tick, rtt_us, coordinate)
            return True
        place = self._place_for(peer, rtt_us, coordinate, own)
        if place < 0:
            return False
        group = self._group(peer)
        bucket = self.bucket_of(self._keys[peer])
        self.insert(place, peer, tick, rtt_us, coordinate, group, VERIFIED, bucket)
        return True

    def _refresh(self, place: int, tick: int, rtt_us: int, coordinate: int) -> None:
        self.checked[place] = tick
        self.flags[place] = VERIFIED
        if coordinate != UNKNOWN:
            self.coordinates[place] = coordinate
        if rtt_us:
            self.measured(place, rtt_us)

    def _place_for(self, peer: int, rtt_us: int, coordinate: int, own: int) -> int:
        """Where to insert a verified newcomer, after making room; -1 if it is not taken."""
        key = self._keys[peer]
        if key == self._key:
            return -1
        group = self._group(peer)
        policy = self._policy
        while True:
            bucket = self.bucket_of(key)
            start, end = self.starts[bucket], self.starts[bucket + 1]
            if group and not self._group_allowed(group, start, end):
                return -1
            if end - start < policy.k:
                return end
            if (victim := self._weakest_unverified(start, end)) >= 0:
                self.take_out(victim, bucket)
                return self.starts[bucket + 1]
            if bucket == len(self.starts) - 2 and bucket + 1 < MAX_BUCKETS:
                self.split()
                continue
            victim = self._victim(bucket, key, rtt_us, coordinate, own)
            if victim < 0:
                if not policy.rtt_aware or not self.is_far(bucket):
                    self._candidates.hold(bucket, peer, coordinate, own, nearest=False)
                return -1
            if not policy.rtt_aware:
                loser, place = self.peers[victim], self.coordinates[victim]
                self._candidates.hold(bucket, loser, place, own, nearest=False)
            self.take_out(victim, bucket)
            return self.starts[bucket + 1]

    def _weakest_unverified(self, start: int, end: int) -> int:
        weakest = -1
        for place, flags in enumerate(self.flags[start:end], start):
            if flags & SUSPECT:
                return place
            if not flags & VERIFIED:
                weakest = place
        return weakest

    def _victim(self, bucket: int, key: int, rtt_us: int, coordinate: int, own: int) -> int:
        """The entry of a full bucket that yields to this newcomer, -1 if none does."""
        start, end = self.starts[bucket], self.starts[bucket + 1]
        if not self.is_far(bucket):
            keys, mine, peers = self._keys, self._key, self.peers
            farthest = max(range(start, end), key=lambda place: keys[peers[place]] ^ mine)
            return farthest if keys[peers[farthest]] ^ mine > key ^ mine else -1
        if not self._policy.rtt_aware:
            return -1
        rtt = rtt_us or self._estimate_us(coordinate, own)
        victim = self._farthest_junior(start, end, own)
        if victim < 0:
            return -1
        return victim if rtt * 100 < self._rtt_us(victim, own) * self._policy.swap_percent else -1

    def _farthest_junior(self, start: int, end: int, own: int) -> int:
        """The entry with the longest round trip that is not one of the seniors."""
        by_age = sorted(range(start, end), key=self.since.__getitem__)
        rtts_us, coordinates = self.rtts_us, self.coordinates
        farthest = longest = -1
        for place in by_age[self._policy.senior_entries :]:
            rtt_us = rtts_us[place] or self._estimate_us(coordinates[place], own)
            if rtt_us > longest:
                farthest, longest = place, rtt_us
        return farthest

    def _rtt_us(self, place: int, own: int) -> int:
        return self.rtts_us[place] or self._estimate_us(self.coordinates[place], own)

    def _estimate_us(self, coordinate: int, own: int) -> int:
        if coordinate == UNKNOWN:
            return self._policy.unknown_rtt_ns // US
        return estimate_ns(coordinate, own) // US

    # --- heard of, not proved -------------------------------------------------------------------------

    def hear(
        self, peers: Sequence[int], coordinates: Sequence[int], places: Iterable[int], tick: int, own: int
    ) -> None:
        """An answer named these peers (those at `places`): `heard_of`, for each, `self_said` being false. Of
        all that a node does this is the most: a lookup hears of a hundred.
        """
        keys, mine, starts, members = self._keys, self._key, self.starts, self.peers
        policy = self._policy
        k, prefers_near = policy.k, policy.rtt_aware
        last = len(starts) - 2
        told = len(coordinates)
        known = -1  # the bucket whose weakest hearsay entry is `victim`, `worst` microseconds away
        victim = worst = -1
        for place in places:
            peer = peers[place]
            bucket = KEY_BITS - (mine ^ keys[peer]).bit_length()
            if bucket > last:
                if bucket >= KEY_BITS:
                    continue
                bucket = last
            start, end = starts[bucket], starts[bucket + 1]
            if peer in members[start:end]:
                continue
            coordinate = coordinates[place] if place < told else UNKNOWN
            if end - start < k:
                group = self._group(peer)
                if not group or self._group_allowed(group, start, end):
                    self.insert(end, peer, tick, NEVER_US, coordinate, group, 0, bucket)
                    known = -1
                continue
            if len(members) - end < k:
                self._offer_near(bucket, peer, coordinate, own, self_said=False)
                known = -1
                continue
            if not prefers_near or coordinate == UNKNOWN:
                continue
            if bucket != known:
                known = bucket
                victim, worst = self._farthest_hearsay(start, end, own)
            if victim < 0:
                self._candidates.hold(bucket, peer, coordinate, own, nearest=True)
            elif estimate_ns(coordinate, own) // US * 100 < worst * policy.swap_percent:
                self._replace_hearsay(victim, bucket, peer, coordinate, flags=0)
                known = -1

    def heard_of(self, peer: int, tick: int, coordinate: int, own: int, *, self_said: bool) -> None:
        """The peer was named in an answer, or (`self_said`) asked us something. It takes a free place,
        unverified, or becomes a candidate.
        """
        key = self._keys[peer]
        starts = self.starts
        bucket = KEY_BITS - (self._key ^ key).bit_length()
        last = len(starts) - 2
        if bucket > last:
            if bucket >= KEY_BITS:
                return
            bucket = last
        start, end = starts[bucket], starts[bucket + 1]
        if peer in self.peers[start:end]:
            if self_said:
                place = self.peers.index(peer, start, end)
                if coordinate != UNKNOWN:
                    self.coordinates[place] = coordinate
                flags = self.flags[place]
                if not flags & SUSPECT:
                    self.checked[place] = tick
                    if not flags & VERIFIED:
                        self.flags[place] = flags | SPOKE
            return
        if end - start < self._policy.k:
            group = self._group(peer)
            if not self._group_allowed(group, start, end):
                return
            flags = SPOKE if self_said else 0
            self.insert(end, peer, tick, NEVER_US, coordinate, group, flags, bucket)
            return
        if self.is_far(bucket):
            self._offer_far(bucket, peer, coordinate, own, self_said=self_said)
        else:
            self._offer_near(bucket, peer, coordinate, own, self_said=self_said)

    def _offer_far(self, bucket: int, peer: int, coordinate: int, own: int, *, self_said: bool) -> None:
        """A full bucket hears of one more. Hearsay yields to better hearsay; other entries only to one that
        answers.
        """
        policy = self._policy
        if not policy.rtt_aware or coordinate == UNKNOWN:
            if self_said:
                self._candidates.hold(bucket, peer, coordinate, own, nearest=False)
            return
        victim, worst = self._farthest_hearsay(self.starts[bucket], self.starts[bucket + 1], own)
        if victim < 0:
            self._candidates.hold(bucket, peer, coordinate, own, nearest=True)
        elif estimate_ns(coordinate, own) // US * 100 < worst * policy.swap_percent:
            self._replace_hearsay(victim, bucket, peer, coordinate, flags=SPOKE if self_said else 0)

    def _offer_near(self, bucket: int, peer: int, coordinate: int, own: int, *, self_said: bool) -> None:
        """The same in our own neighbourhood, where the closer key is better."""
        start, end = self.starts[bucket], self.starts[bucket + 1]
        unproven = self.flags.find(_HEARSAY, start, end)
        if unproven < 0:
            if bucket == len(self.starts) - 2 or self._is_closer(peer, start, end):
                self._candidates.hold(bucket, peer, coordinate, own, nearest=False)
            return
        places = [place for place in range(unproven, end) if not self.flags[place]]
        mine, keys, peers = self._key, self._keys, self.peers
        victim = max(places, key=lambda place: keys[peers[place]] ^ mine)
        if keys[peer] ^ mine < keys[peers[victim]] ^ mine:
            self._replace_hearsay(victim, bucket, peer, coordinate, flags=SPOKE if self_said else 0)

    def _farthest_hearsay(self, start: int, end: int, own: int) -> tuple[int, int]:
        """Place and round trip (us) of the farthest hearsay entry there, -1 and -1 if there is none."""
        flags = self.flags
        place = flags.find(_HEARSAY, start, end)
        if place < 0:
            return -1, -1
        rtts_us, coordinates = self.rtts_us, self.coordinates
        unknown_us = self._policy.unknown_rtt_ns // US
        # `estimate_ns` written out, without parting our own coordinate anew for each: nothing is done as often.
        x, y, z, height = own >> 47, own >> 31 & 0xFFFF, own >> 15 & 0xFFFF, own & 0x7FFF
        victim = worst = -1
        while place >= 0:
            rtt_us = rtts_us[place]
            if not rtt_us:
                there = coordinates[place]
                if there == UNKNOWN:
                    rtt_us = unknown_us
                else:
                    dx, dy, dz = (there >> 47) - x, (there >> 31 & 0xFFFF) - y, (there >> 15 & 0xFFFF) - z
                    units = sqrt(dx * dx + dy * dy + dz * dz) + (there & 0x7FFF) + height
                    rtt_us = int(units * UNIT_NS) // US
            if rtt_us > worst:
                victim, worst = place, rtt_us
            place = flags.find(_HEARSAY, place + 1, end)
        return victim, worst

    def _replace_hearsay(self, victim: int, bucket: int, peer: int, coordinate: int, *, flags: int) -> None:
        """Another peer that is hearsay takes an entry's place, and is as old as that was."""
        start, end = self.starts[bucket], self.starts[bucket + 1]
        group = self._group(peer)
        if not group or self._group_allowed(group, start, end):
            tick = self.checked[victim]
            self.take_out(victim, bucket)
            self.insert(end - 1, peer, tick, NEVER_US, coordinate, group, flags, bucket)

    def _is_closer(self, peer: int, start: int, end: int) -> bool:
        """Whether the peer's key is closer to ours than that of some entry there."""
        mine, keys = self._key, self._keys
        distance = keys[peer] ^ mine
        return any(keys[member] ^ mine > distance for member in self.peers[start:end])

    # --- candidates -----------------------------------------------------------------------------------

    def take_candidate(self, bucket: int) -> tuple[int, int] | None:
        """Remove and give one candidate of a bucket (peer, coordinate) that has no entry."""
        for slot, peer, coordinate in self._candidates.of(bucket):
            self._candidates.drop(slot)
            if self.find(peer) < 0:
                return peer, coordinate
        return None

    def promising(self, own: int, *, far: bool = True) -> int | None:
        """Remove and give a candidate worth a ping: one that would take a place if it proves itself. Buckets
        come in turn.
        """
        candidates = self._candidates
        buckets = min(candidates.buckets, len(self.starts) - 1)
        for _ in range(buckets):
            self._turn = (self._turn + 1) % buckets
            is_far = self.is_far(self._turn)
            if is_far and not (far and self._policy.rtt_aware):
                continue
            limit = self._swap_limit(self._turn, own) if is_far else 0
            held = sorted(
                (self._estimate_us(place, own), slot, peer) for slot, peer, place in candidates.of(self._turn)
            )
            for estimate, slot, peer in held:
                candidates.drop(slot)
                if self.find(peer) < 0 and (limit == 0 or estimate * 100 < limit):
                    return peer
        return None

    def _swap_limit(self, bucket: int, own: int) -> int:
        """Hundredfold RTT (us) below which a newcomer takes a place of a far bucket; 0: it has room."""
        start, end = self.starts[bucket], self.starts[bucket + 1]
        if end - start < self._policy.k:
            return 0
        victim = self._farthest_junior(start, end, own)
        return self._rtt_us(victim, own) * self._policy.swap_percent if victim >= 0 else 1

    # --- failures -------------------------------------------------------------------------------------

    def failed(self, peer: int) -> tuple[Failure, int]:
        """A query to the peer was not answered. What that means, and the bucket that lost the entry, -1 if
        none.
        """
        place = self.find(peer)
        if place < 0:
            return Failure.NO_ENTRY, -1
        flags = self.flags[place]
        if flags & VERIFIED and not flags & SUSPECT:
            self.flags[place] = VERIFIED | SUSPECT
            return Failure.SUSPECTED, -1
        bucket = self.bucket_of(self._keys[peer])
        self.take_out(place, bucket)
        return (Failure.LOST if flags & VERIFIED else Failure.NEVER_LIVED), bucket

    def remove(self, peer: int) -> None:
        """The peer says that it is a client, or is to be forgotten."""
        place = self.find(peer)
        if place >= 0:
            self.take_out(place, self.bucket_of(self._keys[peer]))

    # --- groups ---------------------------------------------------------------------------------------

    def _group(self, peer: int) -> int:
        group = self._directory.group_of(peer)
        if not group:
            return 0
        return ((group ^ group >> 16 ^ group >> 32 ^ group >> 48) & 0xFFFF) or 1

    def _group_allowed(self, group: int, start: int, end: int) -> bool:
        if not group:
            return True
        policy = self._policy
        if self.groups[start:end].count(group) >= policy.max_group_per_bucket:
            return False
        return self.groups.count(group) < policy.max_group_per_table
