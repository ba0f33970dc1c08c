"""Orders under way: lookups, and what is stored at their end. Upkeep's own lookups run here too.

An operation asks with the query of its kind, feeds its `Lookup` with answers and failures, collects what it is
after, and ends with one event. Putting and providing have a second phase: the closest peers are asked to keep
the record; who refuses or fails is replaced by the next closest. With optimistic provide (Trautwein et al.
2024) the second phase begins during the lookup: a peer that stands, by the estimated size of the network,
surely among the k closest is asked to keep the record at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from dht.calls import Call, Purpose
from dht.core import Core
from dht.events import Cost, DhtEvent, Found, Joined, Stored
from dht.keys import KEY_BITS
from dht.limits import MAX_OPERATIONS
from dht.lookup import Lookup
from dht.messages import (
    AddProvider,
    DhtQuery,
    FindNode,
    FindProvidersOf,
    FindRecords,
    Kept,
    Nodes,
    Outcome,
    Providers,
    Records,
    Store,
)
from dht.policy import DhtPolicy
from dht.records import Check, RecordBody, newest_of_each
from dht.serving import Serving
from protocol.envelope import Envelope, Opened
from protocol.errors import ProtocolError
from protocol.instants import Instant

#: Peers asked to keep one record, as a multiple of k: refusals and deaths are replaced so far.
MAX_STORE_FACTOR = 2

#: A peer surely belongs to the k closest if no more than this share of k (percent) is expected closer: the
#: number of closer peers is about Poisson, and P(fewer than 20 | 14 expected) = 0.92.
SURE_PERCENT = 70

#: With optimistic provide the order is done when this share of k (percent) has kept the record; the rest
#: follows.
RETURN_PERCENT = 75

#: Records and providers collected by one operation, so that liars do not fill memory: what a full key holds,
#: twice.
MAX_COLLECTED = 256

#: Queries of a refresh: it fills one bucket, and one answer from there names k peers of it; a second in case
#: the first asked is not in it.
REFRESH_QUERIES = 2


class Kind(IntEnum):
    CLOSEST = 0
    RECORDS = 1
    PROVIDERS = 2
    PUT = 3
    PROVIDE = 4
    JOIN = 5
    NEIGHBOURS = 6
    REFRESH = 7


class Operation:
    __slots__ = (
        "answers_with",
        "copies",
        "found",
        "hops",
        "key",
        "kind",
        "lookup",
        "number",
        "open_stores",
        "over",
        "providers",
        "reach",
        "record",
        "reported",
        "started",
        "stored_at",
        "ticket",
        "wanted",
    )

    def __init__(
        self, number: int, ticket: int | None, kind: Kind, *, key: int, lookup: Lookup, now: Instant
    ) -> None:
        self.number = number
        self.ticket = ticket
        self.kind = kind
        self.key = key
        self.lookup = lookup
        self.started = now
        self.wanted = 0
        self.answers_with = 0
        self.hops = 0
        self.found: list[tuple[Envelope, Opened[RecordBody]]] | None = None
        self.providers: dict[int, int] | None = None
        self.record: Envelope | None = None
        self.reach = -1
        self.stored_at: dict[int, bool] | None = None
        self.open_stores = 0
        self.copies = 0
        self.over = False
        self.reported = False


class Operations:
    __slots__ = ("_check", "_core", "_next", "_open", "_serving", "joined")

    def __init__(self, core: Core, serving: Serving, check: Check) -> None:
        self._core = core
        self._serving = serving
        self._check = check
        self._open: dict[int, Operation] = {}
        self._next = 1
        #: Set when a join has ended; the machine starts upkeep then.
        self.joined = False

    def __len__(self) -> int:
        return len(self._open)

    def references(self) -> set[int]:
        """Peers that lookups know or have found."""
        found: set[int] = set()
        for op in self._open.values():
            found |= op.lookup.references()
            found.update(op.providers or ())
        return found

    # --- orders ---------------------------------------------------------------------------------------

    def find_closest(self, ticket: int, target: int) -> None:
        if op := self._begin(ticket, Kind.CLOSEST, target):
            self._advance(op)

    def get_records(self, ticket: int, key: int, quorum: int, own: Sequence[Envelope]) -> None:
        """`own`: what we publish ourselves at this key."""
        op = self._begin(ticket, Kind.RECORDS, key)
        if op is None:
            return
        op.wanted = max(quorum, 1)
        self._collect_records(op, self._core.me, (*own, *self._serving.records_at(key)))
        self._advance(op)

    def find_providers(self, ticket: int, key: int, wanted: int) -> None:
        op = self._begin(ticket, Kind.PROVIDERS, key)
        if op is None:
            return
        op.wanted = max(wanted, 1)
        op.providers = {}
        found, coordinates = self._serving.providers_of(key, self._core.vivaldi.packed)
        self._collect_providers(op, self._core.me, found, coordinates)
        self._advance(op)

    def put(self, ticket: int | None, key: int, record: Envelope) -> None:
        op = self._begin(ticket, Kind.PUT, key)
        if op is not None:
            op.record = record
            self._serving.keep_record(self._core.me, record)
            self._store_at_once(op)

    def provide(self, ticket: int | None, key: int) -> None:
        op = self._begin(ticket, Kind.PROVIDE, key)
        if op is not None:
            self._serving.keep_provider(self._core.me, key, self._core.vivaldi.packed)
            self._store_at_once(op)

    def join(self, seeds: Sequence[int]) -> None:
        core = self._core
        if op := self._begin(None, Kind.JOIN, core.keys[core.me], seeds):
            self._advance(op)

    def look_around(self) -> None:
        """Look up our own key."""
        core = self._core
        if op := self._begin(None, Kind.NEIGHBOURS, core.keys[core.me]):
            self._advance(op)

    def refresh(self, target: int) -> None:
        if op := self._begin(None, Kind.REFRESH, target):
            self._advance(op)

    def cancel(self, ticket: int) -> None:
        for number in [n for n, op in self._open.items() if op.ticket == ticket]:
            del self._open[number]

    def _begin(self, ticket: int | None, kind: Kind, key: int, seeds: Sequence[int] = ()) -> Operation | None:
        core = self._core
        policy = core.policy
        if len(self._open) >= MAX_OPERATIONS:
            self._refuse(ticket, kind)
            return None
        # Who is told to enter by somebody asks them, even if it knows peers that are closer: after a cut, those
        # it knows are all on its own side.
        start = seeds or core.closest_peers(key)
        own_key = kind in {Kind.JOIN, Kind.NEIGHBOURS}
        lookup = Lookup(
            core.me,
            key,
            start,
            core.keys,
            k=policy.k,
            alpha=policy.alpha,
            beta=_beta(policy, kind),
            paths=1 if own_key or kind is Kind.REFRESH else policy.disjoint_paths,
            max_queries=REFRESH_QUERIES if kind is Kind.REFRESH else policy.max_queries,
        )
        op = Operation(self._next, ticket, kind, key=key, lookup=lookup, now=core.now)
        self._next += 1
        self._open[op.number] = op
        return op

    def _refuse(self, ticket: int | None, kind: Kind) -> None:
        if kind is Kind.JOIN:
            self.joined = True
            self._core.emit(Joined(len(self._core.table)))
        elif ticket is not None:
            self._core.emit(_nothing(ticket, kind))

    # --- what happens to calls ------------------------------------------------------------------------

    def query_answered(self, call: Call, answer: Nodes | Records | Providers) -> None:
        op = self._open.get(call.operation)
        if op is None or op.over:
            return
        fresh = op.lookup.answered(call.peer, answer.contacts)
        self._core.hear_contacts(answer.contacts, answer.coordinates, fresh)
        if op.kind is Kind.RECORDS:
            if isinstance(answer, Records):
                self._collect_records(op, call.peer, answer.records)
        elif op.kind is Kind.PROVIDERS:
            if isinstance(answer, Providers):
                self._collect_providers(op, call.peer, answer.providers, answer.provider_coordinates)
        elif op.reach >= 0:
            self._store_with_those_near(op, (call.peer, *answer.contacts))
        self._advance(op)

    def query_failed(self, call: Call) -> None:
        op = self._open.get(call.operation)
        if op is not None and not op.over:
            op.lookup.failed(call.peer)
            self._advance(op)

    def query_slow(self, call: Call) -> None:
        op = self._open.get(call.operation)
        if op is not None and not op.over:
            op.lookup.slow(call.peer)
            self._advance(op)

    def store_answered(self, call: Call, answer: Kept) -> None:
        op = self._open.get(call.operation)
        if op is None:
            return
        if answer.outcome == Outcome.TAKEN:
            op.copies += 1
        self._store_ended(op, call.peer, taken=answer.outcome == Outcome.TAKEN)

    def store_failed(self, call: Call) -> None:
        op = self._open.get(call.operation)
        if op is not None:
            self._store_ended(op, call.peer, taken=False)

    # --- the lookup -----------------------------------------------------------------------------------

    def _advance(self, op: Operation) -> None:
        core = self._core
        lookup = op.lookup
        if not op.over:
            while (peer := lookup.next_peer()) is not None:
                call = core.start_call(peer, Purpose.QUERY, op.number)
                if call is None:
                    lookup.failed(peer)
                    continue
                core.send(peer, self._query(op, call))
                if lookup.busy:
                    break
            if lookup.done or self._has_enough(op):
                self._lookup_over(op)

    def _query(self, op: Operation, call: int) -> DhtQuery:
        core = self._core
        vivaldi = core.vivaldi
        kind = FindNode
        if op.kind is Kind.RECORDS:
            kind = FindRecords
        elif op.kind is Kind.PROVIDERS:
            kind = FindProvidersOf
        return kind(call, vivaldi.packed, vivaldi.error_parts, core.client, op.key)

    def _has_enough(self, op: Operation) -> bool:
        if op.kind is Kind.RECORDS:
            return op.answers_with >= op.wanted
        if op.kind is Kind.PROVIDERS:
            return len(op.providers or ()) >= op.wanted
        return op.reach >= 0 and self._engaged(op) >= self._core.policy.k

    def _lookup_over(self, op: Operation) -> None:
        core = self._core
        op.over = True
        lookup = op.lookup
        answered = lookup.closest(count=core.policy.beta, answered_only=True)
        op.hops = max(op.hops, lookup.hops(answered))
        if op.kind < Kind.JOIN and lookup.done:
            core.note_size(op.key, lookup.closest())
        if op.kind in {Kind.PUT, Kind.PROVIDE}:
            self._store_with_the_rest(op)
            return
        del self._open[op.number]
        if op.kind is Kind.JOIN:
            self.joined = True
            core.emit(Joined(len(core.table)))
        elif op.ticket is not None:
            records = newest_of_each(op.found or ())
            core.emit(
                Found(
                    op.ticket,
                    tuple(lookup.closest()),
                    tuple(records.values()),
                    tuple(op.providers or ()),
                    self._cost(op),
                )
            )

    def _cost(self, op: Operation) -> Cost:
        return Cost(self._core.now - op.started, op.hops, op.lookup.queries, op.lookup.failures)

    # --- what is collected ----------------------------------------------------------------------------

    def _collect_records(self, op: Operation, source: int, records: Sequence[Envelope]) -> None:
        if op.found is None:
            op.found = []
        good = 0
        for envelope in records:
            if len(op.found) >= MAX_COLLECTED:
                break
            try:
                opened = self._check(envelope, self._core.unix_now)
            except ProtocolError:
                continue
            if opened.body.key == op.key:
                op.found.append((envelope, opened))
                good += 1
        if good:
            op.answers_with += 1
            op.hops = max(op.hops, op.lookup.hop(source))

    def _collect_providers(
        self, op: Operation, source: int, providers: Sequence[int], coordinates: Sequence[int]
    ) -> None:
        known = op.providers
        if known is None:
            return
        for peer, coordinate in zip(providers, coordinates, strict=False):
            if len(known) >= MAX_COLLECTED:
                break
            if peer not in known:
                known[peer] = coordinate
                op.hops = max(op.hops, op.lookup.hop(source))

    # --- storing --------------------------------------------------------------------------------------

    def _store_at_once(self, op: Operation) -> None:
        """Begin a put or provide; with optimistic provide, work out how near is near enough."""
        core = self._core
        policy = core.policy
        op.stored_at = {}
        if policy.optimistic_provide:
            size = core.size_estimate()
            if size > 4 * policy.k:
                op.reach = (policy.k * SURE_PERCENT << KEY_BITS) // (100 * size)
        self._advance(op)

    def _engaged(self, op: Operation) -> int:
        """Peers that keep the record or were just asked to."""
        return op.copies + op.open_stores

    def _store_with_those_near(self, op: Operation, peers: Sequence[int]) -> None:
        core = self._core
        for peer in peers:
            if self._engaged(op) >= core.policy.k:
                return
            if peer != core.me and core.keys[peer] ^ op.key <= op.reach:
                self._ask_to_keep(op, peer)

    def _store_with_the_rest(self, op: Operation) -> None:
        """Ask the closest until k keep it, or nobody is left to ask."""
        policy = self._core.policy
        for peer in op.lookup.closest(count=MAX_STORE_FACTOR * policy.k):
            if self._engaged(op) >= policy.k:
                break
            self._ask_to_keep(op, peer)
        if not op.open_stores:
            self._storing_over(op)

    def _ask_to_keep(self, op: Operation, peer: int) -> None:
        core = self._core
        asked = op.stored_at
        if asked is None or peer in asked or len(asked) >= MAX_STORE_FACTOR * core.policy.k:
            return
        call = core.start_call(peer, Purpose.STORE, op.number)
        if call is None:
            return
        asked[peer] = False
        op.open_stores += 1
        vivaldi = core.vivaldi
        if op.record is not None:
            core.send(peer, Store(call, vivaldi.packed, vivaldi.error_parts, core.client, op.record))
        else:
            core.send(peer, AddProvider(call, vivaldi.packed, vivaldi.error_parts, core.client, op.key))

    def _store_ended(self, op: Operation, peer: int, *, taken: bool) -> None:
        op.open_stores -= 1
        if op.stored_at is not None:
            op.stored_at[peer] = taken
        if op.reach >= 0 and op.copies * 100 >= self._core.policy.k * RETURN_PERCENT:
            self._report_stored(op)
        if op.over:
            if not taken:
                self._store_with_the_rest(op)
            elif not op.open_stores:
                self._storing_over(op)

    def _storing_over(self, op: Operation) -> None:
        if self._open.pop(op.number, None) is not None:
            self._report_stored(op)

    def _report_stored(self, op: Operation) -> None:
        if not op.reported and op.ticket is not None:
            op.reported = True
            self._core.emit(Stored(op.ticket, op.copies, self._cost(op)))


def _beta(policy: DhtPolicy, kind: Kind) -> int:
    """How many of the closest must have answered before a lookup is done."""
    if kind in {Kind.JOIN, Kind.NEIGHBOURS}:
        return policy.join_beta
    if kind in {Kind.RECORDS, Kind.PROVIDERS}:
        return policy.value_beta
    return policy.beta


def _nothing(ticket: int, kind: Kind) -> DhtEvent:
    cost = Cost(0, 0, 0, 0)
    if kind in {Kind.PUT, Kind.PROVIDE}:
        return Stored(ticket, 0, cost)
    return Found(ticket, (), (), (), cost)
