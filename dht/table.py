"""The routing table: who stands where, as far as we know, in a few kilobytes.

Kademlia (Maymounkov and Mazieres 2002): bucket i holds peers that share i leading bits with us, the last bucket
all that share more; it splits when full. Entries lie in parallel arrays ordered by bucket (27 bytes an entry),
because the simulator makes a hundred thousand of these.

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

from array import array
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NamedTuple

from dht.candidates import Candidates
from dht.coordinates import UNKNOWN, estimate_ns
from dht.directory import Directory, Keys
from dht.keys import KEY_BITS
from dht.policy import DhtPolicy
from protocol.instants import Instant

#: Times are kept in ticks of 2**27 ns (0.13 s): 32 bits last 18 years.
TICK_BITS: Final = 27

#: Buckets: 2**40 nodes are more than there will be. An attacker who makes keys next to ours splits no further.
MAX_BUCKETS: Final = 48

VERIFIED: Final = 1
SUSPECT: Final = 2
ASKED: Final = 4
SPOKE: Final = 8

_HEARSAY: Final = b"\x00"
_ONLY_SPOKE: Final = b"\x08"
_TOLD: Final = VERIFIED | SPOKE
_NEVER_US: Final = 0
_MAX_RTT_US: Final = 0xFFFF_FFFF
_US: Final = 1000


class Failure(IntEnum):
    """What an unanswered query did to the table."""

    NO_ENTRY = 0
    #: A verified entry failed once: ask again, a lost packet is not a death.
    SUSPECTED = 1
    #: A verified entry failed twice and is gone.
    LOST = 2
    #: An entry that had never answered is gone.
    NEVER_LIVED = 3


class Entry(NamedTuple):
    """An entry, for readers. `rtt_ns`: 0 if never measured. `heard`: when it was last heard or asked."""

    peer: int
    rtt_ns: int
    heard: Instant
    verified: bool
    suspect: bool
    coordinate: int


class RoutingTable:
    """See the module. Times are ticks (`now >> TICK_BITS`); RTTs inside are microseconds."""

    __slots__ = (
        "_candidates",
        "_directory",
        "_key",
        "_keys",
        "_policy",
        "checked",
        "coordinates",
        "flags",
        "groups",
        "peers",
        "rtts_us",
        "since",
        "starts",
    )

    def __init__(self, me: int, directory: Directory, policy: DhtPolicy) -> None:
        self._keys: Keys = directory.keys
        self._key = directory.keys[me]
        self._directory = directory
        self._policy = policy
        self.starts = array("H", (0, 0))
        self.peers = array("I")
        self.coordinates = array("Q")
        self.rtts_us = array("I")
        self.checked = array("I")
        self.since = array("I")
        self.groups = array("H")
        self.flags = bytearray()
        self._candidates = Candidates(policy.candidates)

    # --- reading --------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.peers)

    def __iter__(self) -> Iterator[Entry]:
        for i in range(len(self.peers)):
            yield self.entry(i)

    def entry(self, place: int) -> Entry:
        flags = self.flags[place]
        return Entry(
            self.peers[place],
            self.rtts_us[place] * _US,
            Instant(self.checked[place] << TICK_BITS),
            bool(flags & VERIFIED),
            bool(flags & SUSPECT),
            self.coordinates[place],
        )

    def references(self) -> set[int]:
        """Peers that entries and candidates name."""
        return {*self.peers, *self._candidates}

    @property
    def buckets(self) -> int:
        return len(self.starts) - 1

    def bucket_of(self, key: int) -> int:
        return min(KEY_BITS - (self._key ^ key).bit_length(), len(self.starts) - 2)

    def find(self, peer: int) -> int:
        """Place of the peer's entry, -1 if it has none."""
        starts = self.starts
        bucket = KEY_BITS - (self._key ^ self._keys[peer]).bit_length()
        bucket = min(bucket, len(starts) - 2)
        try:
            return self.peers.index(peer, starts[bucket], starts[bucket + 1])
        except ValueError:
            return -1

    def closest(self, target: int, count: int, *, told: bool = False) -> list[int]:
        """Places of the `count` entries closest to `target`, closest first, without suspects. `told`: verified
        ones only, as others may hear them.
        """
        starts = self.starts
        last = len(starts) - 2
        distance = self._key ^ target
        home = KEY_BITS - distance.bit_length()
        home = min(home, last)
        places = self._sorted_bucket(home, target, told)
        if len(places) < count and home < last:
            # Deeper buckets differ from the target at `home`; which of them is closer, its later bits say.
            later: list[int] = []
            for bucket in range(home + 1, last):
                if distance >> (KEY_BITS - 1 - bucket) & 1:
                    places += self._sorted_bucket(bucket, target, told)
                    if len(places) >= count:
                        break
                else:
                    later.append(bucket)
            else:
                places += self._sorted_bucket(last, target, told)
            for bucket in reversed(later):
                if len(places) >= count:
                    break
                places += self._sorted_bucket(bucket, target, told)
        while len(places) < count and home > 0:
            home -= 1
            places += self._sorted_bucket(home, target, told)
        return places[:count]

    def _sorted_bucket(self, bucket: int, target: int, told: bool) -> list[int]:  # noqa: FBT001 - hot path
        start, end = self.starts[bucket], self.starts[bucket + 1]
        keys = self._keys
        distances = [keys[peer] ^ target for peer in self.peers[start:end]]
        flags = self.flags
        if told:
            chosen = [
                i for i in range(end - start) if flags[start + i] & _TOLD and not flags[start + i] & SUSPECT
            ]
        else:
            chosen = [i for i in range(end - start) if not flags[start + i] & SUSPECT]
        chosen.sort(key=distances.__getitem__)
        return [start + i for i in chosen]

    def near_to(self, coordinate: int, start: int, width: int, asker: int) -> list[int]:
        """Places of verified entries, of `width` from `start` on (round the table), nearest to a coordinate
        first.
        """
        count = len(self.peers)
        peers, coordinates, flags = self.peers, self.coordinates, self.flags
        found: list[tuple[int, int]] = []
        for i in range(start, start + min(width, count)):
            place = i % count
            if flags[place] & 3 == VERIFIED and peers[place] != asker and coordinates[place] != UNKNOWN:
                found.append((estimate_ns(coordinates[place], coordinate), place))
        found.sort()
        return [place for _, place in found]

    def rtt_ns_of(self, place: int) -> int:
        """Measured round trip, 0 if there is none."""
        return self.rtts_us[place] * _US

    def unverified(self) -> int:
        """Place of an entry that has yet to prove itself and is not being asked, -1 if there is none."""
        place = self.flags.find(_ONLY_SPOKE)
        return place if place >= 0 else self.flags.find(_HEARSAY)

    def stalest(self) -> int:
        """Place of the entry heard of or asked longest ago, -1 if the table is empty."""
        return self.checked.index(min(self.checked)) if self.checked else -1

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
        self._insert(place, peer, tick, rtt_us=rtt_us, coordinate=coordinate, flags=VERIFIED)
        return True

    def _refresh(self, place: int, tick: int, rtt_us: int, coordinate: int) -> None:
        self.checked[place] = tick
        self.flags[place] = VERIFIED
        if coordinate != UNKNOWN:
            self.coordinates[place] = coordinate
        if rtt_us:
            self.measured(place, rtt_us)

    def measured(self, place: int, rtt_us: int) -> None:
        """One round trip. Queues only ever add to it, so a lower sample counts more than a higher one."""
        old = self.rtts_us[place]
        if old == _NEVER_US:
            new = rtt_us
        elif rtt_us < old:
            new = (old + 3 * rtt_us) >> 2
        else:
            new = (7 * old + rtt_us) >> 3
        self.rtts_us[place] = min(max(new, 1), _MAX_RTT_US)

    def _place_for(self, peer: int, rtt_us: int, coordinate: int, own: int) -> int:
        """Where to insert a verified newcomer, after making room; -1 if it is not taken."""
        key = self._keys[peer]
        if key == self._key:
            return -1
        group = self._group(peer)
        while True:
            bucket = self.bucket_of(key)
            start, end = self.starts[bucket], self.starts[bucket + 1]
            if not self._group_allowed(group, start, end):
                return -1
            if end - start < self._policy.k:
                return end
            if (victim := self._weakest_unverified(start, end)) >= 0:
                self._remove(victim, bucket)
                return self.starts[bucket + 1]
            if bucket == len(self.starts) - 2 and bucket + 1 < MAX_BUCKETS:
                self._split()
                continue
            victim = self._victim(bucket, key, rtt_us, coordinate, own)
            if victim < 0:
                if not self._policy.rtt_aware or not self.is_far(bucket):
                    self._candidates.hold(bucket, peer, coordinate, own, nearest=False)
                return -1
            if not self._policy.rtt_aware:
                loser, place = self.peers[victim], self.coordinates[victim]
                self._candidates.hold(bucket, loser, place, own, nearest=False)
            self._remove(victim, bucket)
            return self.starts[bucket + 1]

    def _weakest_unverified(self, start: int, end: int) -> int:
        weakest = -1
        for place in range(start, end):
            flags = self.flags[place]
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
        seniority = self._policy.senior_entries
        since = self.since
        by_age = sorted(range(start, end), key=since.__getitem__)
        juniors = by_age[seniority:]
        if not juniors:
            return -1
        return max(juniors, key=lambda place: self._rtt_us(place, own))

    def _rtt_us(self, place: int, own: int) -> int:
        return self.rtts_us[place] or self._estimate_us(self.coordinates[place], own)

    def _estimate_us(self, coordinate: int, own: int) -> int:
        if coordinate == UNKNOWN:
            return self._policy.unknown_rtt_ns // _US
        return estimate_ns(coordinate, own) // _US

    # --- heard of, not proved -------------------------------------------------------------------------

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
                place = self.find(peer)
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
            self._insert(
                end, peer, tick, rtt_us=_NEVER_US, coordinate=coordinate, flags=SPOKE if self_said else 0
            )
            return
        self._offer(bucket, peer, coordinate, own, self_said)

    def _offer(self, bucket: int, peer: int, coordinate: int, own: int, self_said: bool) -> None:  # noqa: FBT001
        """A full bucket hears of one more. Hearsay yields to better hearsay; other entries only to one that
        answers.
        """
        policy = self._policy
        far = self.is_far(bucket)
        if far and not (policy.rtt_aware and coordinate != UNKNOWN):
            if self_said:
                self._candidates.hold(bucket, peer, coordinate, own, nearest=False)
            return
        start, end = self.starts[bucket], self.starts[bucket + 1]
        unproven = self.flags.find(_HEARSAY, start, end)
        if unproven < 0:
            if far or bucket == len(self.starts) - 2 or self._is_closer(peer, start, end):
                self._candidates.hold(bucket, peer, coordinate, own, nearest=far)
            return
        places = [place for place in range(unproven, end) if not self.flags[place]]
        if far:
            victim = max(places, key=lambda place: self._rtt_us(place, own))
            estimate = self._estimate_us(coordinate, own) * 100
            better = estimate < self._rtt_us(victim, own) * policy.swap_percent
        else:
            mine, keys, peers = self._key, self._keys, self.peers
            victim = max(places, key=lambda place: keys[peers[place]] ^ mine)
            better = keys[peer] ^ mine < keys[peers[victim]] ^ mine
        if better and self._group_allowed(self._group(peer), start, end):
            tick = self.checked[victim]
            self._remove(victim, bucket)
            flags = SPOKE if self_said else 0
            self._insert(end - 1, peer, tick, rtt_us=_NEVER_US, coordinate=coordinate, flags=flags)

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

    def promising(self, own: int) -> int | None:
        """Remove and give a candidate worth a ping: one that would take a place if it proves itself."""
        candidates = self._candidates
        for bucket in range(min(candidates.buckets, len(self.starts) - 1)):
            far = self.is_far(bucket)
            if far and not self._policy.rtt_aware:
                continue
            limit = self._swap_limit(bucket, own) if far else 0
            for slot, peer, coordinate in candidates.of(bucket):
                candidates.drop(slot)
                if self.find(peer) >= 0:
                    continue
                if limit == 0 or self._estimate_us(coordinate, own) * 100 < limit:
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
        self._remove(place, bucket)
        return (Failure.LOST if flags & VERIFIED else Failure.NEVER_LIVED), bucket

    def remove(self, peer: int) -> None:
        """The peer says that it is a client, or is to be forgotten."""
        place = self.find(peer)
        if place >= 0:
            self._remove(place, self.bucket_of(self._keys[peer]))

    # --- arrays ---------------------------------------------------------------------------------------

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

    def _insert(self, place: int, peer: int, tick: int, *, rtt_us: int, coordinate: int, flags: int) -> None:
        starts = self.starts
        self.peers.insert(place, peer)
        self.coordinates.insert(place, coordinate)
        self.rtts_us.insert(place, min(rtt_us, _MAX_RTT_US))
        self.checked.insert(place, tick)
        self.since.insert(place, tick)
        self.groups.insert(place, self._group(peer))
        self.flags.insert(place, flags)
        for bucket in range(self.bucket_of(self._keys[peer]) + 1, len(starts)):
            starts[bucket] += 1

    def _remove(self, place: int, bucket: int) -> None:
        starts = self.starts
        for column in (self.peers, self.coordinates, self.rtts_us, self.checked, self.since, self.groups):
            del column[place]
        del self.flags[place]
        for later in range(bucket + 1, len(starts)):
            starts[later] -= 1

    def _split(self) -> None:
        """Part the last bucket: who differs from us at its bit stays, the others move to a new one."""
        starts = self.starts
        last = len(starts) - 2
        start = starts[last]
        columns = (self.peers, self.coordinates, self.rtts_us, self.checked, self.since, self.groups)
        bit = KEY_BITS - 1 - last
        mine, keys = self._key, self._keys
        places = range(start, len(self.peers))
        stay = [p for p in places if (keys[self.peers[p]] ^ mine) >> bit & 1]
        move = [p for p in places if not (keys[self.peers[p]] ^ mine) >> bit & 1]
        order = stay + move
        for column in columns:
            column[start:] = array(column.typecode, [column[p] for p in order])
        self.flags[start:] = bytes(self.flags[p] for p in order)
        starts.insert(last + 1, start + len(stay))
