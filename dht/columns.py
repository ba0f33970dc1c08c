"""The routing table's storage: entries in parallel arrays ordered by bucket, 27 bytes each, and how to read
them by distance. Who gets a place, dht/table.py decides.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final, NamedTuple

from dht.coordinates import UNKNOWN, estimate_ns
from dht.directory import Keys
from dht.keys import KEY_BITS
from protocol.instants import Instant

#: Times are kept in ticks of 2**27 ns (0.13 s): 32 bits last 18 years.
TICK_BITS: Final = 27

VERIFIED: Final = 1
SUSPECT: Final = 2
ASKED: Final = 4
SPOKE: Final = 8
TOLD: Final = VERIFIED | SPOKE

# By flags: whether we tell others of such an entry, and whether we ask it.
_TO_TELL: Final = tuple(bool(flags & TOLD) and not flags & SUSPECT for flags in range(256))
_TO_ASK: Final = tuple(not flags & SUSPECT for flags in range(256))

NEVER_US: Final = 0
MAX_RTT_US: Final = 0xFFFF_FFFF
US: Final = 1000


class Entry(NamedTuple):
    """An entry, for readers. `rtt_ns`: 0 if never measured. `heard`: when it was last heard or asked."""

    peer: int
    rtt_ns: int
    heard: Instant
    verified: bool
    suspect: bool
    coordinate: int


class Columns:
    """Times are ticks (`now >> TICK_BITS`), round trips microseconds. A *place* is an entry's index; it holds
    until the next change.
    """

    __slots__ = (
        "_key",
        "_keys",
        "checked",
        "coordinates",
        "flags",
        "groups",
        "peers",
        "rtts_us",
        "since",
        "starts",
    )

    def __init__(self, own_key: int, keys: Keys) -> None:
        self._keys = keys
        self._key = own_key
        self.starts = array("H", (0, 0))
        self.peers = array("I")
        self.coordinates = array("Q")
        self.rtts_us = array("I")
        self.checked = array("I")
        self.since = array("I")
        self.groups = array("H")
        self.flags = bytearray()

    def __len__(self) -> int:
        return len(self.peers)

    def __iter__(self) -> Iterator[Entry]:
        for i in range(len(self.peers)):
            yield self.entry(i)

    def entry(self, place: int) -> Entry:
        flags = self.flags[place]
        return Entry(
            self.peers[place],
            self.rtts_us[place] * US,
            Instant(self.checked[place] << TICK_BITS),
            bool(flags & VERIFIED),
            bool(flags & SUSPECT),
            self.coordinates[place],
        )

    @property
    def buckets(self) -> int:
        return len(self.starts) - 1

    def bucket_of(self, key: int) -> int:
        return min(KEY_BITS - (self._key ^ key).bit_length(), len(self.starts) - 2)

    def find(self, peer: int) -> int:
        """Place of the peer's entry, -1 if it has none."""
        starts = self.starts
        bucket = KEY_BITS - (self._key ^ self._keys[peer]).bit_length()
        last = len(starts) - 2
        bucket = min(bucket, last)
        start, end = starts[bucket], starts[bucket + 1]
        # Looked for first: who is not there would cost an exception, and half of those asked for are not.
        if peer in self.peers[start:end]:
            return self.peers.index(peer, start, end)
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
        keys, peers = self._keys, self.peers
        fit = _TO_TELL if told else _TO_ASK
        flags = enumerate(self.flags[start:end], start)
        chosen = [(keys[peers[i]] ^ target, i) for i, flag in flags if fit[flag]]
        chosen.sort()
        return [i for _, i in chosen]

    def near_to(self, coordinate: int, start: int, width: int, asker: int) -> list[int]:
        """Places of verified entries, of `width` from `start` on (round the table), nearest to a coordinate
        first.
        """
        count = len(self.peers)
        peers, coordinates, flags = self.peers, self.coordinates, self.flags
        found: list[tuple[int, int]] = []
        for i in range(start, start + min(width, count)):
            place = i % count
            if flags[place] & 3 == VERIFIED:
                there = coordinates[place]
                if there != UNKNOWN and peers[place] != asker:
                    found.append((estimate_ns(there, coordinate), place))
        found.sort()
        return [place for _, place in found]

    def rtt_ns_of(self, place: int) -> int:
        """Measured round trip, 0 if there is none."""
        return self.rtts_us[place] * US

    def stalest(self) -> int:
        """Place of the entry heard of or asked longest ago, -1 if the table is empty."""
        return self.checked.index(min(self.checked)) if self.checked else -1

    def measured(self, place: int, rtt_us: int) -> None:
        """One round trip. Queues only ever add to it, so a lower sample counts more than a higher one."""
        old = self.rtts_us[place]
        if old == NEVER_US:
            new = rtt_us
        elif rtt_us < old:
            new = (old + 3 * rtt_us) >> 2
        else:
            new = (7 * old + rtt_us) >> 3
        self.rtts_us[place] = min(max(new, 1), MAX_RTT_US)

    def insert(  # noqa: PLR0913, PLR0917 - one value per column, and the hot path has no time for names
        self,
        place: int,
        peer: int,
        tick: int,
        rtt_us: int,
        coordinate: int,
        group: int,
        flags: int,
        bucket: int,
    ) -> None:
        """A new entry at a place of its bucket."""
        self.peers.insert(place, peer)
        self.coordinates.insert(place, coordinate)
        self.rtts_us.insert(place, min(MAX_RTT_US, rtt_us))
        self.checked.insert(place, tick)
        self.since.insert(place, tick)
        self.groups.insert(place, group)
        self.flags.insert(place, flags)
        starts = self.starts
        for later in range(bucket + 1, len(starts)):
            starts[later] += 1

    def take_out(self, place: int, bucket: int) -> None:
        del self.peers[place]
        del self.coordinates[place]
        del self.rtts_us[place]
        del self.checked[place]
        del self.since[place]
        del self.groups[place]
        del self.flags[place]
        starts = self.starts
        for later in range(bucket + 1, len(starts)):
            starts[later] -= 1

    def split(self) -> None:
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
