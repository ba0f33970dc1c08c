"""One DHT node, as a machine without I/O (protocol/machine.py).

    machine = DhtMachine(me, directory, dice, policy, unix_offset_ns=...)
    effects = machine.receive(now, Ordered(Join(seeds)))

The node's driver and the simulator's world deliver inputs and interpret effects; that is all they do. Peers are
small integers (dht/directory.py); dht/wire.py turns messages into bytes. Parts: core.py (what all share),
serving.py (answers), operations.py (orders), publishing.py (what we keep told), upkeep.py (pings),
fulltable.py.
"""

from __future__ import annotations

from typing import TypeAlias

from dht.calls import Call, Purpose
from dht.coordinates import UNKNOWN, estimate_ns
from dht.core import Core, DhtEffect
from dht.directory import Directory
from dht.events import (
    Cancel,
    Cost,
    DhtCommand,
    FindClosest,
    FindProviders,
    GetRecords,
    Join,
    Provide,
    PutRecord,
    RoundTripSeen,
    SetReachable,
    Stored,
    Withdraw,
)
from dht.fulltable import FullTable
from dht.limits import MAX_PONG_CONTACTS
from dht.messages import (
    AddProvider,
    CompareTables,
    DhtMessage,
    Differences,
    FindNode,
    FindProvidersOf,
    FindRecords,
    GetPage,
    Kept,
    Nodes,
    Page,
    Ping,
    Pong,
    Providers,
    Records,
    Said,
    Store,
)
from dht.operations import Operations
from dht.policy import DhtPolicy
from dht.publishing import Publishing
from dht.records import Check, open_record_untrusted
from dht.serving import Serving
from dht.table import TICK_BITS, RoutingTable
from dht.upkeep import FOREVER, Upkeep
from protocol.dice import Dice
from protocol.envelope import Envelope
from protocol.errors import ProtocolError
from protocol.instants import SECOND_NS, Instant
from protocol.machine import Input, Ordered, PeerLost, Received, WakeAt

DhtInput: TypeAlias = Input[int, DhtMessage, DhtCommand]

#: Round trips reported from outside are believed up to this long.
_MAX_SEEN_RTT_NS = 10 * SECOND_NS

#: What we assume of the error of a peer whose round trip was measured outside our messages.
_ASSUMED_ERROR_PARTS = 300

# A tuple, since a union written where it is asked for would be made anew each time.
_FOUND = (Nodes, Records, Providers)
_QUERIES = frozenset({Ping, FindNode, FindRecords, FindProvidersOf, Store, AddProvider, GetPage, CompareTables})


class DhtMachine:
    """`client`: start as one that can not be dialled (`SetReachable` changes it)."""

    __slots__ = ("_announced", "_core", "_full", "_operations", "_publishing", "_serving", "_upkeep")

    def __init__(
        self,
        me: int,
        directory: Directory,
        dice: Dice,
        policy: DhtPolicy,
        *,
        unix_offset_ns: int,
        client: bool = False,
        check: Check = open_record_untrusted,
    ) -> None:
        self._core = Core(me, directory, dice, policy, unix_offset_ns, client=client)
        self._serving = Serving(self._core, check)
        self._operations = Operations(self._core, self._serving, check)
        self._publishing = Publishing(self._core, self._operations)
        self._upkeep = Upkeep(self._core, self._operations)
        self._full: FullTable | None = None
        if policy.full_table:
            self._full = self._core.full = FullTable(self._core)
        self._announced = 0

    # --- reading --------------------------------------------------------------------------------------

    @property
    def me(self) -> int:
        return self._core.me

    @property
    def table(self) -> RoutingTable:
        """For reading."""
        return self._core.table

    @property
    def coordinate(self) -> int:
        """Our own network coordinate, packed (dht/coordinates.py)."""
        return self._core.vivaldi.packed

    @property
    def coordinate_error(self) -> float:
        """Expected relative error of estimates from our coordinate, 0 to 1."""
        return self._core.vivaldi.error

    @property
    def client(self) -> bool:
        return self._core.client

    @property
    def open_operations(self) -> int:
        return len(self._operations)

    @property
    def open_calls(self) -> int:
        return len(self._core.calls)

    def set_clock(self, unix_offset_ns: int) -> None:
        """Civil time is so far from the clock of instants now: it was set, or this machine slept."""
        self._core.unix_offset_ns = unix_offset_ns

    def awaits(self, peer: int, call: int) -> bool:
        """Whether this peer owes us the answer to this call; what else calls itself an answer is not read."""
        return self._core.calls.is_open(call, peer)

    @property
    def ping_interval_ns(self) -> int:
        """The present interval of pings; shorter than the policy's while entries prove dead."""
        return self._upkeep.ping_interval_ns

    @property
    def stored_records(self) -> int:
        return len(self._serving.records or ())

    @property
    def stored_providers(self) -> int:
        return len(self._serving.providers or ())

    def references(self) -> set[int]:
        """Peers that this node's state names. The directory must know them; it may forget all others."""
        core, providers = self._core, self._serving.providers
        return {
            core.me,
            *core.table.references(),
            *core.calls.references(),
            *self._operations.references(),
            *(providers.references() if providers is not None else ()),
            *(self._full.members if self._full is not None else ()),
        }

    def size_estimate(self) -> int:
        """Estimated nodes in the network."""
        return self._core.size_estimate()

    def rtt_estimate_ns(self, peer: int) -> int | None:
        """Round trip to a peer of the table: measured, else by coordinates; None if we know neither."""
        table = self._core.table
        place = table.find(peer)
        if place < 0:
            return None
        if measured := table.rtt_ns_of(place):
            return measured
        coordinate = table.coordinates[place]
        if coordinate == UNKNOWN or self._core.vivaldi.error >= 1.0:
            return None
        return estimate_ns(coordinate, self._core.vivaldi.packed)

    @property
    def full_table_members(self) -> int:
        """Members in full-table mode, 0 outside it."""
        return len(self._full) if self._full is not None else 0

    def next_wake(self) -> Instant | None:
        due = self._upkeep.due
        other = self._core.calls.next_due()
        if other is not None and other < due:
            due = other
        if self._publishing.timers:
            other = self._publishing.next_due()
            if other is not None and other < due:
                due = other
        if self._full is not None and self._upkeep.running:
            other = self._full.next_due()
            due = min(due, other)
        return None if due == FOREVER else Instant(due)

    # --- the machine ----------------------------------------------------------------------------------

    def receive(self, now: Instant, what: DhtInput) -> list[DhtEffect]:
        """Take one input; see protocol.machine.Machine. Total: nothing that a remote sent raises."""
        core = self._core
        core.now = now
        out: list[DhtEffect] = []
        core.out = out
        if type(what) is Received:
            self._message(what.peer, what.message)
        elif isinstance(what, Ordered):
            self._order(what.command)
        elif isinstance(what, PeerLost):
            self._lost(now, what.peer)
        wake = self.next_wake()
        if wake is not None and wake <= now:
            self._work(now)
            wake = self.next_wake()
        if self._operations.joined:
            self._operations.joined = False
            self._upkeep.start(now, joined=True)
            if self._full is not None:
                self._full.start(now)
            wake = self.next_wake()
        if wake is not None and (wake < self._announced or self._announced <= now):
            self._announced = wake
            out.append(WakeAt(wake))
        core.out = []
        return out

    def _work(self, now: Instant) -> None:
        """Do what has come due."""
        while (due := self._core.calls.due(now)) is not None:
            call, failed = due
            if failed:
                self._failed(now, call)
            elif call.purpose is Purpose.QUERY:
                self._operations.query_slow(call)
        self._upkeep.work(now)
        self._publishing.work(now)
        if self._full is not None and self._upkeep.running:
            self._full.work(now)

    # --- messages -------------------------------------------------------------------------------------

    def _message(self, peer: int, message: DhtMessage) -> None:
        core = self._core
        if peer == core.me:
            return
        cls = type(message)
        if cls not in _QUERIES:
            self._answer(peer, message)
            return
        if not self._serving.admits(peer):
            return
        if message.client:
            core.forget(peer)
        else:
            own = core.vivaldi.packed
            core.table.heard_of(peer, core.now >> TICK_BITS, message.coordinate, own, self_said=True)
            if not self._upkeep.running:
                self._upkeep.start(core.now, joined=False)
        self._serve(peer, message)

    def _serve(self, peer: int, query: DhtMessage) -> None:
        serving = self._serving
        if isinstance(query, FindNode):
            serving.find_node(peer, query)
        elif isinstance(query, Ping):
            serving.ping(peer, query)
        elif isinstance(query, FindProvidersOf):
            serving.find_providers(peer, query)
        elif isinstance(query, FindRecords):
            serving.find_records(peer, query)
        elif isinstance(query, AddProvider):
            serving.add_provider(peer, query)
        elif isinstance(query, Store):
            serving.store(peer, query)
        elif isinstance(query, GetPage):
            serving.get_page(peer, query)
        elif isinstance(query, CompareTables):
            serving.compare(peer, query)

    def _answer(self, peer: int, answer: DhtMessage) -> None:
        core = self._core
        call = core.calls.finish(answer.call, peer)
        if call is None:
            return  # late, unasked or forged
        if not _fits(call, answer):
            self._failed(core.now, call)
            return
        core.learn(peer, call, answer)
        if isinstance(answer, Pong):
            self._upkeep.ping_answered()
            if core.policy.rtt_aware:
                told = range(min(len(answer.contacts), MAX_PONG_CONTACTS))
                core.hear_contacts(answer.contacts, answer.coordinates, told)
        elif isinstance(answer, _FOUND):
            self._operations.query_answered(call, answer)
        elif isinstance(answer, Kept):
            self._operations.store_answered(call, answer)
        elif self._full is not None and isinstance(answer, Page):
            self._full.paged(call, answer)
        elif self._full is not None and isinstance(answer, Differences):
            self._full.compared(answer)

    def _failed(self, now: Instant, call: Call) -> None:
        self._upkeep.failed(now, call.peer)
        if call.purpose is Purpose.QUERY:
            self._operations.query_failed(call)
        elif call.purpose is Purpose.STORE:
            self._operations.store_failed(call)

    def _lost(self, now: Instant, peer: int) -> None:
        """The connection broke or could not be made: nothing asked of this peer will be answered."""
        calls = self._core.calls
        numbers = calls.to(peer)
        if not numbers:
            self._upkeep.failed(now, peer)
        for i, number in enumerate(numbers):
            call = calls.close(number)
            if i == 0:
                self._failed(now, call)
            elif call.purpose is Purpose.QUERY:
                self._operations.query_failed(call)
            elif call.purpose is Purpose.STORE:
                self._operations.store_failed(call)

    # --- orders ---------------------------------------------------------------------------------------

    def _order(self, command: DhtCommand) -> None:
        operations = self._operations
        match command:
            case Join(seeds):
                operations.join([seed for seed in seeds if seed != self._core.me])
            case FindClosest(ticket, target):
                operations.find_closest(ticket, target)
            case GetRecords(ticket, key, quorum):
                operations.get_records(ticket, key, quorum, self._publishing.own_records(key))
            case FindProviders(ticket, key, wanted):
                operations.find_providers(ticket, key, wanted)
            case PutRecord(ticket, envelope):
                self._put(ticket, envelope)
            case Provide(ticket, key):
                self._publishing.keep(key, None)
                operations.provide(ticket, key)
            case Withdraw(key):
                self._publishing.withdraw(key)
                self._serving.forget_provider(key, self._core.me)
            case Cancel(ticket):
                operations.cancel(ticket)
            case SetReachable(reachable):
                became_server = reachable and self._core.client
                self._core.client = not reachable
                if became_server:
                    operations.look_around()  # our neighbours may take us into their tables now
            case RoundTripSeen(peer, rtt_ns):
                self._round_trip(peer, rtt_ns)

    def _put(self, ticket: int, envelope: Envelope) -> None:
        core = self._core
        try:
            opened = self._serving.open(envelope)
        except ProtocolError:
            core.emit(Stored(ticket, 0, Cost(0, 0, 0, 0)))
            return
        self._publishing.keep(opened.body.key, envelope)
        self._operations.put(ticket, opened.body.key, envelope)

    def _round_trip(self, peer: int, rtt_ns: int) -> None:
        core = self._core
        place = core.table.find(peer)
        if place < 0 or not 0 < rtt_ns <= _MAX_SEEN_RTT_NS:
            return
        core.table.measured(place, max(rtt_ns // 1000, 1))
        core.vivaldi.sample(core.table.coordinates[place], _ASSUMED_ERROR_PARTS, rtt_ns, core.dice)


def _fits(call: Call, answer: Said) -> bool:
    """Whether this kind of answer belongs to that kind of call."""
    if call.purpose is Purpose.PING:
        return isinstance(answer, Pong)
    if call.purpose is Purpose.STORE:
        return isinstance(answer, Kept)
    if call.purpose is Purpose.PAGE:
        return isinstance(answer, Page)
    if call.purpose is Purpose.COMPARE:
        return isinstance(answer, Differences)
    return isinstance(answer, _FOUND)
