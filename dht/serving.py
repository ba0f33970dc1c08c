"""Answers to others: what we know, and what they may leave with us.

Nothing here grows without a bound of dht/limits.py: answering keeps no state but a count per peer and window,
and what is stored is bounded per key, per peer and in all. A record or provider record is taken only if we are
plausibly among the closest to its key: we know fewer than k peers that are closer, or by the estimated size of
the network fewer than 2k are.
"""

from __future__ import annotations

from dht.coordinates import UNKNOWN
from dht.core import Core
from dht.keys import KEY_BITS
from dht.limits import (
    FLOOD_WINDOW_NS,
    MAX_COUNTED_PEERS,
    MAX_PAGE_CONTACTS,
    MAX_PONG_CONTACTS,
    MAX_QUERIES_PER_WINDOW,
    PONG_WINDOW,
)
from dht.messages import (
    AddProvider,
    CompareTables,
    Differences,
    FindNode,
    FindProvidersOf,
    FindRecords,
    GetPage,
    Kept,
    Nodes,
    Outcome,
    Page,
    Ping,
    Pong,
    Providers,
    Records,
    Store,
)
from dht.providers import ProviderStore
from dht.records import Check, RecordBody, RecordStore
from protocol.envelope import Envelope, Opened
from protocol.errors import ProtocolError

#: We store for a key while fewer than this many times k peers that we know are closer to it. 2: lookups of
#: others may end one or two peers off the true k closest, and tables differ while nodes come and go.
STORAGE_SLACK = 2

#: Count shared by all peers beyond MAX_COUNTED_PEERS.
_THE_REST = -1


class Serving:
    __slots__ = ("_check", "_core", "_counted_in", "_counts", "_window", "providers", "records")

    def __init__(self, core: Core, check: Check) -> None:
        self._core = core
        self._check = check
        self._counts: dict[int, int] | None = None
        self._counted_in = 0
        self._window = 0
        self.records: RecordStore | None = None
        self.providers: ProviderStore | None = None

    def admits(self, peer: int) -> bool:
        """Whether this peer's query is answered: it has not asked too often in this window."""
        window = self._core.now // FLOOD_WINDOW_NS
        counts = self._counts
        if counts is None or window != self._counted_in:
            self._counted_in = window
            self._counts = {peer: 1}
            return True
        if peer not in counts and len(counts) > MAX_COUNTED_PEERS:
            peer = _THE_REST
        count = counts[peer] = counts.get(peer, 0) + 1
        return count <= MAX_QUERIES_PER_WINDOW

    # --- answers --------------------------------------------------------------------------------------

    def ping(self, peer: int, query: Ping) -> None:
        core = self._core
        vivaldi = core.vivaldi
        contacts: tuple[int, ...] = ()
        coordinates: tuple[int, ...] = ()
        if core.policy.rtt_aware and query.coordinate != UNKNOWN:
            table = core.table
            self._window += PONG_WINDOW
            places = table.near_to(query.coordinate, self._window, PONG_WINDOW, peer)[:MAX_PONG_CONTACTS]
            contacts = tuple([table.peers[place] for place in places])
            coordinates = tuple([table.coordinates[place] for place in places])
        core.send(
            peer,
            Pong(query.call, vivaldi.packed, vivaldi.error_parts, core.client, contacts, coordinates),
        )

    def find_node(self, peer: int, query: FindNode) -> None:
        core = self._core
        vivaldi = core.vivaldi
        contacts, coordinates = self._closest(query.target, peer)
        core.send(
            peer,
            Nodes(query.call, vivaldi.packed, vivaldi.error_parts, core.client, contacts, coordinates),
        )

    def find_records(self, peer: int, query: FindRecords) -> None:
        core = self._core
        vivaldi = core.vivaldi
        contacts, coordinates = self._closest(query.key, peer)
        records = self.records_at(query.key)
        core.send(
            peer,
            Records(
                query.call, vivaldi.packed, vivaldi.error_parts, core.client, contacts, coordinates, records
            ),
        )

    def find_providers(self, peer: int, query: FindProvidersOf) -> None:
        core = self._core
        vivaldi = core.vivaldi
        contacts, coordinates = self._closest(query.key, peer)
        providers, places = self.providers_of(query.key, query.coordinate)
        core.send(
            peer,
            Providers(
                query.call,
                vivaldi.packed,
                vivaldi.error_parts,
                core.client,
                contacts,
                coordinates,
                providers,
                places,
            ),
        )

    def store(self, peer: int, query: Store) -> None:
        self._kept(peer, query.call, self.keep_record(peer, query.record))

    def add_provider(self, peer: int, query: AddProvider) -> None:
        self._kept(peer, query.call, self.keep_provider(peer, query.key, query.coordinate))

    def get_page(self, peer: int, query: GetPage) -> None:
        core = self._core
        vivaldi = core.vivaldi
        head = (query.call, vivaldi.packed, vivaldi.error_parts, core.client)
        if core.full is not None and core.full.active:
            core.send(peer, Page(*head, *core.full.page(query.start, query.end)))
            return
        entries = sorted((core.keys[e.peer], e.peer, e.coordinate) for e in core.table if e.verified)
        entries = [e for e in entries if query.start <= e[0] < query.end]
        cut = entries[:MAX_PAGE_CONTACTS]
        more = len(cut) < len(entries)
        core.send(peer, Page(*head, tuple(e[1] for e in cut), tuple(e[2] for e in cut), more))

    def compare(self, peer: int, query: CompareTables) -> None:
        core = self._core
        vivaldi = core.vivaldi
        segments = core.full.differing(query.digests) if core.full is not None else ()
        core.send(
            peer,
            Differences(query.call, vivaldi.packed, vivaldi.error_parts, core.client, segments),
        )

    def _kept(self, peer: int, call: int, outcome: Outcome) -> None:
        core = self._core
        vivaldi = core.vivaldi
        core.send(peer, Kept(call, vivaldi.packed, vivaldi.error_parts, core.client, int(outcome)))

    def _closest(self, target: int, asker: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        core = self._core
        if core.full is not None and core.full.active:
            members, known = core.full.closest(target, core.policy.k, told=True)
            if len(members) == core.policy.k:
                return tuple(members), tuple(known)
        table = core.table
        places = table.closest(target, core.policy.k, told=True)
        peers, coordinates = table.peers, table.coordinates
        places = [place for place in places if peers[place] != asker]
        return tuple([peers[place] for place in places]), tuple([coordinates[place] for place in places])

    # --- storage --------------------------------------------------------------------------------------

    def records_at(self, key: int) -> tuple[Envelope, ...]:
        return self.records.get(key, self._core.unix_now) if self.records is not None else ()

    def providers_of(self, key: int, near: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.providers is None:
            return (), ()
        return self.providers.get(key, near, self._core.now, self._core.dice)

    def is_ours(self, key: int) -> bool:
        """Whether we are plausibly among the closest to a key."""
        core = self._core
        if core.client:
            return False
        k = core.policy.k
        distance = core.keys[core.me] ^ key
        places = core.table.closest(key, k)
        if len(places) < k or core.keys[core.table.peers[places[-1]]] ^ key > distance:
            return True
        return core.size_estimate() * distance >> KEY_BITS < STORAGE_SLACK * k

    def open(self, envelope: Envelope) -> Opened[RecordBody]:
        """Raises ProtocolError if it is no valid record."""
        return self._check(envelope, self._core.unix_now)

    def keep_record(self, sender: int, envelope: Envelope) -> Outcome:
        core = self._core
        try:
            opened = self.open(envelope)
        except ProtocolError:
            return Outcome.INVALID
        if not self.is_ours(opened.body.key):
            return Outcome.NOT_CLOSE
        if self.records is None:
            self.records = RecordStore()
        return self.records.put_opened(envelope, opened, sender, core.unix_now)

    def keep_provider(self, sender: int, key: int, coordinate: int) -> Outcome:
        core = self._core
        if not self.is_ours(key):
            return Outcome.NOT_CLOSE
        if self.providers is None:
            self.providers = ProviderStore()
        group = core.directory.group_of(sender)
        ttl_ns = core.policy.provider_ttl_ns
        return self.providers.add(key, sender, core.now, coordinate=coordinate, ttl_ns=ttl_ns, group=group)

    def forget_provider(self, key: int, peer: int) -> None:
        if self.providers is not None:
            self.providers.forget(key, peer)
