"""The DHT over libp2p: a short match over what its machine wants done.

The simulator has the other interpreter of the same machine (sim/world.py). A message travels as a notice on the
kept link to its peer, which is opened first if there is none; what the machine must know of links comes back as
`PeerLost` and `RoundTripSeen`. Everything here happens in the task that has the news, nothing waits, and no
task is started per message: only a dial has one.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import msgspec
import structlog
import trio

from dht.events import (
    Cancel,
    DhtCommand,
    DhtEvent,
    Found,
    Join,
    Joined,
    RoundTripSeen,
    Stored,
)
from dht.machine import DhtMachine
from dht.messages import DhtAnswer, DhtMessage
from dht.wire import DHT_CODEC, METHOD_DHT, WIRE_ANSWERS, Contact, WireMessage, from_wire_untrusted, to_wire
from node.machine_loop import MachineLoop
from node.overlay.addresses import Scope, bare, scope_of_remote
from node.overlay.book import AddressBook
from node.overlay.cache import OverlayFiles
from node.overlay.flood import FloodGuard
from node.p2p import Host
from node.peers import PeerChanged, PeerDown, PeerEvent, Peers
from node.rpc import PeerUnreachable
from protocol.errors import ProtocolError
from protocol.ids import PeerId
from protocol.machine import Disconnect, Effect, Emit, Input, Ordered, PeerLost, Persist, Received, Send

#: Messages that wait for one link to come up; a lookup sends one, storing a second.
MAX_WAITING_PER_PEER: Final = 16

#: Peers that messages wait for.
MAX_WAITING_PEERS: Final = 512

#: Peers whose answer is awaited, as far as the driver remembers it.
MAX_ASKED: Final = 4096

#: Contacts carry this many addresses of a peer: some transports and a relay.
CONTACT_ADDRESSES: Final = 4

DhtInput: TypeAlias = Input[int, DhtMessage, DhtCommand]
DhtEffect: TypeAlias = Effect[int, DhtMessage, DhtEvent]

_log = structlog.get_logger("overlay")


@dataclass(slots=True)
class DriverCounters:
    """For metrics and status."""

    sent: int = 0
    received: int = 0
    dropped: int = 0
    malformed: int = 0
    unasked: int = 0
    unreachable: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of an order. `closest` and `providers` of a `Found` by name: numbers may be given up later."""

    event: Found | Stored
    closest: tuple[PeerId, ...] = ()
    providers: tuple[PeerId, ...] = ()


@dataclass(slots=True)
class _Waiter:
    done: trio.Event = field(default_factory=trio.Event)
    answer: Answer | None = None


class DhtDriver:
    """Runs the machine. `run` keeps its time; all else happens when peers or users call."""

    def __init__(
        self,
        host: Host,
        peers: Peers,
        *,
        book: AddressBook,
        machine: DhtMachine,
        files: OverlayFiles,
        nursery: trio.Nursery,
    ) -> None:
        self.machine: Final = machine
        self.counters: Final = DriverCounters()
        self.guard: Final = FloodGuard()
        self.closed = False
        self._host = host
        self._peers = peers
        self._book = book
        self._files = files
        self._nursery = nursery
        self._loop: MachineLoop[int, DhtMessage, DhtCommand, DhtEvent] = MachineLoop(machine, self._apply)
        self._next_ticket = 1
        self._waiters: dict[int, _Waiter] = {}
        self._joins: list[Callable[[int], None]] = []
        self._outbox: dict[int, deque[WireMessage]] = {}
        self._asked: OrderedDict[int, float] = OrderedDict()  # since when an answer is awaited
        peers.serve_notice(METHOD_DHT, DHT_CODEC, self._take, admit=self._admit)
        peers.subscribe(self._on_peer)
        peers.subscribe_round_trips(self._on_round_trip)

    # --- for the overlay ----------------------------------------------------------------------------

    def order(self, command: DhtCommand) -> None:
        """Tell the machine what a user wants."""
        self._drive(Ordered(command))

    def set_clock(self, unix_offset_ns: int) -> None:
        """Civil time is so far from the machine's clock now."""
        self.machine.set_clock(unix_offset_ns)

    async def ask(self, make: Callable[[int], DhtCommand]) -> Answer:
        """Order what `make(ticket)` says, wait for its end. Cancelled, the machine drops it."""
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        waiter = self._waiters[ticket] = _Waiter()
        try:
            self._drive(Ordered(make(ticket)))
            await waiter.done.wait()
        finally:
            del self._waiters[ticket]
            if waiter.answer is None:
                self._drive(Ordered(Cancel(ticket)))
        assert waiter.answer is not None  # noqa: S101 - `done` is set with it
        return waiter.answer

    def order_unattended(self, make: Callable[[int], DhtCommand]) -> None:
        """Order what `make(ticket)` says; nobody waits for its end."""
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        self._drive(Ordered(make(ticket)))

    async def join(self, seeds: tuple[int, ...]) -> int:
        """Enter the network by these peers. How many entries the routing table has then."""
        joined = trio.Event()
        contacts: list[int] = []

        def note(count: int) -> None:
            contacts.append(count)
            joined.set()

        self._joins.append(note)
        self._drive(Ordered(Join(seeds)))
        await joined.wait()
        return contacts[0]

    def references(self) -> set[int]:
        """Numbers that must stay in the book."""
        up = (self._book.find(peer) for peer in self._peers.up())
        return {*self.machine.references(), *self._outbox, *(number for number in up if number is not None)}

    async def run(self) -> None:
        """Wake the machine when it asks for it, until cancelled."""
        await self._loop.run()

    # --- the machine --------------------------------------------------------------------------------

    def _drive(self, what: DhtInput) -> None:
        if not self.closed:
            self._loop.feed(what)

    def _apply(self, effect: DhtEffect) -> None:
        match effect:
            case Send(peer, message):
                self._send(peer, message)
            case Emit(event):
                self._tell(event)
            case Disconnect(peer, reason):
                self._drop(peer, reason)
            case Persist(key, value):
                self._files.save_value(key, value)
            case _:
                pass  # Trace: for the simulator's record

    def _tell(self, event: DhtEvent) -> None:
        match event:
            case Joined(contacts):
                joins, self._joins = self._joins, []
                for note in joins:
                    note(contacts)
            case Found() | Stored():
                waiter = self._waiters.get(event.ticket)
                if waiter is not None:
                    waiter.answer = self._named(event)
                    waiter.done.set()

    def _named(self, event: Found | Stored) -> Answer:
        if isinstance(event, Stored):
            return Answer(event)
        name = self._book.peer_of
        return Answer(event, tuple(map(name, event.closest)), tuple(map(name, event.providers)))

    # --- sending ------------------------------------------------------------------------------------

    def _send(self, number: int, message: DhtMessage) -> None:
        peer = self._book.peer_of(number)
        wire = to_wire(message, self._contact)
        if isinstance(message, DhtAnswer):
            self._transmit(peer, wire)  # or not at all: nobody makes us dial by asking and hanging up
            return
        self._note_asked(number)
        if self._peers.hello(peer) is not None:
            self._transmit(peer, wire)
        else:
            self._send_later(number, wire)

    def _transmit(self, peer: PeerId, wire: WireMessage) -> None:
        self.counters.sent += 1
        self._peers.notify(peer, METHOD_DHT, wire)

    def _send_later(self, number: int, wire: WireMessage) -> None:
        waiting = self._outbox.get(number)
        if waiting is not None:
            if len(waiting) >= MAX_WAITING_PER_PEER:
                waiting.popleft()
                self.counters.dropped += 1
            waiting.append(wire)
        elif len(self._outbox) >= MAX_WAITING_PEERS:
            self.counters.dropped += 1
            self._drive(PeerLost(number))
        else:
            self._outbox[number] = deque((wire,))
            self._nursery.start_soon(self._connect, number)

    async def _connect(self, number: int) -> None:
        """Open a link, then send what waits for it; or tell the machine that the peer can not be met."""
        peer = self._book.peer_of(number)
        try:
            await self._peers.reach(peer, self._book.addresses(number))
        except PeerUnreachable as error:
            self._outbox.pop(number, None)
            self._asked.pop(number, None)
            self._book.failed(number)
            self.counters.unreachable += 1
            _log.debug("unreachable", peer=peer, reason=str(error))
            self._drive(PeerLost(number))
        else:
            for wire in self._outbox.pop(number, ()):
                self._transmit(peer, wire)

    def _contact(self, number: int) -> Contact:
        peer = self._book.peer_of(number)
        addresses = self._book.addresses(number)[:CONTACT_ADDRESSES]
        return Contact(peer, tuple(bare(peer, address) for address in addresses))

    def _note_asked(self, number: int) -> None:
        if number not in self._asked:
            self._asked[number] = trio.current_time()
            if len(self._asked) > MAX_ASKED:
                self._asked.popitem(last=False)

    def _drop(self, number: int, reason: str) -> None:
        peer = self._book.peer_of(number)
        self._nursery.start_soon(self._host.disconnect, peer, reason)

    # --- receiving ----------------------------------------------------------------------------------

    def _admit(self, peer: PeerId) -> bool:
        number = self._book.find(peer)
        return self.guard.admit(peer, awaited=number is not None and number in self._asked)

    def _take(self, peer: PeerId, wire: WireMessage) -> None:
        """A notice came. Raises ProtocolError, which the link counts."""
        number = self._book.number_of(peer)
        if isinstance(wire, WIRE_ANSWERS) and not self.machine.awaits(number, wire.c):
            # Late, or made up. To take up its contacts would cost 10 ms and displace others in the book.
            self._asked.pop(number, None)
            self.counters.unasked += 1
            return
        narrowest = self._scope_of(peer)

        def intern(contact: Contact) -> int | None:
            return self._book.intern_untrusted(contact.peer, contact.addresses, narrowest)

        try:
            message = from_wire_untrusted(wire, intern)
        except ProtocolError:
            self.counters.malformed += 1
            raise
        self.counters.received += 1
        self._asked.pop(number, None)
        if not self._book.addresses(number):
            message = as_client(message)  # whoever can not be dialled stands in no table
        self._drive(Received(number, message))

    # --- links --------------------------------------------------------------------------------------

    def _on_peer(self, event: PeerEvent) -> None:
        peer = event.peer
        number = self._book.number_of(peer)
        if isinstance(event, PeerDown):
            self.guard.forget(peer)
            if number in self._asked or (not event.orderly and self.machine.table.find(number) >= 0):
                self._probe(number)
            return
        remote = self._host.remote_of(peer)
        if remote is not None:
            told = self._book.own_word_untrusted(number, event.hello.addresses, self._scope_of(peer))
            for address in told:
                self._peers.forgive(address)
            if not isinstance(event, PeerChanged):
                self._book.met(number, remote)

    def _scope_of(self, peer: PeerId) -> Scope:
        """From where the peer speaks to us; of a relayed one, from where its relay does."""
        paths = self._host.paths(peer)
        relay = paths[0].relay if paths and all(path.relay for path in paths) else None
        remote = self._host.remote_of(relay or peer)
        return Scope.WORLD if remote is None else scope_of_remote(remote)

    def _probe(self, number: int) -> None:
        """A link broke: has the peer gone, or only the link? Dialling it tells, sooner than a ping's
        time-out.
        """
        if number not in self._outbox and len(self._outbox) < MAX_WAITING_PEERS and not self.closed:
            self._outbox[number] = deque()
            self._nursery.start_soon(self._connect, number)

    def _on_round_trip(self, peer: PeerId, rtt_ns: int) -> None:
        number = self._book.find(peer)
        if number is not None:
            self._drive(Ordered(RoundTripSeen(number, rtt_ns)))


def as_client(message: DhtMessage) -> DhtMessage:
    """The message as if its sender had said that it is a client."""
    return message if message.client else msgspec.structs.replace(message, client=True)
