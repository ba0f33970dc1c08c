"""A world of virtual time that runs the machines of production.

A node is a set of machines, each under the name of its service; a message goes from a service to the service
of the same name at the other node. `run_until` is the whole interpreter: take the earliest event from the heap,
give it to its machine, carry out the effects. The driver in `node` does the same with trio and libp2p.

Deterministic by construction: time is an integer, ties go to who was scheduled first, draws come from
`protocol.dice`, no set is iterated and no clock is read. `digest()` names the history (see `sim.event_log`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import heappop
from itertools import count
from typing import Any, Final, TypeAlias

from protocol.instants import Instant, after
from protocol.machine import (
    Disconnect,
    Effect,
    Emit,
    Ordered,
    PeerLost,
    Persist,
    Received,
    Send,
    Trace,
    WakeAt,
    Woken,
)
from sim import portable
from sim.agenda import Agenda
from sim.connections import ConnectionPolicy, Connections, Nat
from sim.draws import Draws, Stream, WireDraws
from sim.event_log import KINDS_PER_SERVICE, EventLog
from sim.links import Links
from sim.ports import NEVER, AnyMachine, Port, RoundTrip, Service

AnyEffect: TypeAlias = Effect[int, Any, Any]
AnyMessage: TypeAlias = Any
Observer: TypeAlias = Callable[[Instant, int, Any], None]
"""Called with (now, node, event)."""

_WOKEN: Final = Woken()

# What stands in an event's size if it is no message. Machines are shown MARK; the others are the world's own.
_MARK: Final = -1
_WAKE: Final = -2
_CALL: Final = -3
_QUEUE: Final = -4
_STOP: Final = -5

#: Events between two looks at the log: 40 bytes each, and some milliseconds.
_BLOCK: Final = 8192


class World:
    """Nodes, links and virtual time. `now` is the instant of the event at hand, 0 at the start."""

    def __init__(
        self,
        seed: int,
        links: Links | None = None,
        *,
        connections: ConnectionPolicy | None = None,
        unix_start_ns: int = 1_767_225_600_000_000_000,
    ) -> None:
        """`links`: by default 50 ms one way between any two. `connections`: None sends every message as a
        datagram (lost ones are lost, nobody is told of a death); a policy sends over kept connections, with
        set-up, NAT and `PeerLost`. `unix_start_ns`: the civil time at instant 0 (2026-01-01).
        """
        self.seed = seed
        self.links = links if links is not None else Links.uniform(50_000_000)
        self.now: Instant = Instant(0)
        self.unix_start_ns = unix_start_ns
        self.log = EventLog()
        self.lost = 0
        self.undelivered = 0
        self.overrun = 0
        self.traces: dict[tuple[str, str], int] = {}
        self.stored: dict[int, dict[str, bytes]] = {}
        #: Called with the time after every few thousand events, for whoever shows how far a run has come.
        self.watch: Callable[[Instant], None] | None = None
        # Its events: (instant, number, port, source, kind, size, what).
        self._agenda: Agenda[tuple[Any, int, Port, int, int, int, Any]] = Agenda()
        self._push = self._agenda.push
        self._next = count().__next__
        self._services: dict[str, Service] = {}
        self._observers: dict[str, list[Observer]] = {}
        self._places = Draws(seed, Stream.PLACES)
        self._wire = WireDraws(seed)
        self._caller = Port(-1, Service(-1, "world"), _Nobody(), (0, 0, 0), polled=False)
        # By node. Lists of plain integers: this is what every message looks up.
        self._row: list[int] = []
        self._site: list[int] = []
        self._access: list[int] = []
        self._up: list[bool] = []
        self._side: list[int] | None = None
        self._up_bps: list[int] = []
        self._up_free: list[int] = []
        self._down_bps: list[int] = []
        self._service_ns: list[int] = []
        self._busy: list[int] = []
        self._max_queue_ns = 10_000_000_000
        self._shaped = bool(self.links.loss or self.links.jitter_ns)
        self._stations = False
        #: What stands between nodes, if messages go over kept connections.
        self.connections = Connections(self, connections) if connections is not None else None
        self._send_plainly = self._plain_sender()
        self._send = self._send_over
        self._choose_sender()

    # --- nodes ------------------------------------------------------------------------------------

    def add_node(
        self,
        site: int | None = None,
        *,
        access_ns: int | None = None,
        nat: Nat = Nat.OPEN,
        up_bps: int = 0,
        down_bps: int = 0,
        service_ns: int = 0,
    ) -> int:
        """A new node, up and without machines; returns its number (0, 1, 2, ...).

        `site` and `access_ns` are drawn if not given. `up_bps`, `down_bps`: bits/s of its line, 0: unlimited.
        `service_ns`: what taking one message costs it; messages queue before it. `nat` needs connections.
        """
        node = len(self._site)
        if nat is not Nat.OPEN and self.connections is None:
            raise ValueError("NAT classes need World(connections=...): a datagram has no one who dialled")
        if site is None:
            site = self.links.draw_site(self._places)
        if access_ns is None:
            access_ns = self.links.draw_access_ns(self._places)
        self._site.append(site)
        self._row.append(site * self.links.sites)
        self._access.append(access_ns)
        self._up.append(True)
        self._up_bps.append(up_bps)
        self._down_bps.append(down_bps)
        self._service_ns.append(service_ns)
        self._up_free.append(0)
        self._busy.append(0)
        if self._side is not None:
            self._side.append(0)
        if self.connections is not None:
            self.connections.add_node(nat)
        self._shaped = self._shaped or bool(up_bps)
        self._stations = self._stations or bool(down_bps or service_ns)
        self._choose_sender()
        return node

    def service(
        self, name: str, *, size_of: Callable[[Any], int] | None = None, round_trip: RoundTrip | None = None
    ) -> Service:
        """The service of this name, made on first use. `size_of`: bytes of a message (else 0). `round_trip`:
        send every message through the wire codec; then sizes are the real ones.
        """
        service = self._services.get(name)
        if service is None:
            service = self._services[name] = Service(len(self._services), name)
            self._kind(service, Woken)
            self._kind(service, PeerLost)
        service.size_of = size_of or service.size_of
        service.round_trip = round_trip or service.round_trip
        return service

    def install(self, node: int, service: str, machine: AnyMachine, *, polled: bool = False) -> None:
        """Put a machine to work (in place of one that is there). `polled`: it emits no `WakeAt`; ask its
        `next_wake` after every input.
        """
        known = self.service(service)
        old = known.ports.get(node)
        if old is not None:
            old.machine = None
        place = (self._site[node], self._row[node], self._access[node])
        port = known.ports[node] = Port(node, known, machine, place, polled=polled)
        self._rearm(port)

    def machine(self, node: int, service: str) -> AnyMessage:
        """The machine of a node that is up; None if there is none."""
        port = self._services[service].ports.get(node) if service in self._services else None
        return None if port is None else port.machine

    @property
    def nodes(self) -> int:
        """How many there are, dead ones included."""
        return len(self._site)

    def is_up(self, node: int) -> bool:
        return self._up[node]

    def site_of(self, node: int) -> int:
        return self._site[node]

    def access_ns(self, node: int) -> int:
        """One way over the node's access line."""
        return self._access[node]

    def one_way_ns(self, a: int, b: int) -> int:
        """From a to b, without jitter and queues."""
        return self.links.table[self._row[a] + self._site[b]] + self._access[a] + self._access[b]

    def rtt_ns(self, a: int, b: int) -> int:
        return self.one_way_ns(a, b) + self.one_way_ns(b, a)

    def rtts_ns(self, node: int, peers: Sequence[int]) -> list[int]:
        """`rtt_ns` to many at a time."""
        site, access, table = self._site, self._access, self.links.round_trips
        row, twice = self._row[node], 2 * self._access[node]
        return [table[row + site[peer]] + 2 * access[peer] + twice for peer in peers]

    # --- what happens to them ---------------------------------------------------------------------

    def order(self, node: int, service: str, command: object, at: Instant | None = None) -> None:
        """Give a machine a command, now or at an instant. One to a machine that is not there is dropped."""
        port = self._services[service].ports.get(node) if service in self._services else None
        if port is None:
            return
        when = self.now if at is None else max(at, self.now)
        kind = self._kind(port.service, type(command))
        self._push((when, self._next(), port, node, kind, _MARK, Ordered(command)))

    def at(self, instant: Instant, action: Callable[[], None]) -> None:
        """Run something of the scenario's at this instant (not before now)."""
        when = max(instant, self.now)
        self._push((when, self._next(), self._caller, 0, 0, _CALL, action))

    def observe(self, service: str, observer: Observer) -> None:
        """Call `observer(now, node, event)` on each event that machines of this service emit."""
        self._observers.setdefault(service, []).append(observer)

    def kill(self, node: int, *, silent: bool = False) -> None:
        """Its machines are gone. With connections its peers get `PeerLost`: as its system closes the sockets,
        or, if `silent` (power cut, cable cut), when heartbeats stay away.
        """
        if not self._up[node]:
            return
        self._up[node] = False
        self._busy[node] = self._up_free[node] = 0
        for service in self._services.values():
            port = service.ports.pop(node, None)
            if port is not None:
                port.machine = None
        if self.connections is not None:
            self.connections.node_died(node, silent=silent)

    def revive(self, node: int) -> None:
        """It is up again, without machines (`install` them) or connections; `stored` is still there."""
        self._up[node] = True

    def partition(self, sides: Iterable[Iterable[int]]) -> None:
        """Cut the network: nodes of one group reach only each other; nodes in no group form one more."""
        side = [0] * self.nodes
        for number, group in enumerate(sides, 1):
            for node in group:
                side[node] = number
        self._side = side
        self._choose_sender()
        if self.connections is not None:
            self.connections.network_cut()

    def heal(self) -> None:
        """Undo `partition`."""
        self._side = None
        self._choose_sender()

    def can_reach(self, a: int, b: int) -> bool:
        """Whether no partition lies between them."""
        return self._side is None or self._side[a] == self._side[b]

    # --- time -------------------------------------------------------------------------------------

    def run_until(self, instant: Instant) -> None:
        """Let everything happen up to and including this instant."""
        self._push((instant, NEVER, self._caller, 0, 0, _STOP, None))
        try:
            while self._run_block():
                self.log.flush()
                if self.watch is not None:
                    self.watch(self.now)
        except Exception as error:
            error.add_note(f"in the simulated world at {self.now} ns, after {self.log.events} logged events")
            raise
        self.now = Instant(max(self.now, instant))
        self.log.flush()

    def _run_block(self) -> bool:
        """Some thousand events. False when the stop has been reached."""
        agenda, rows, pop = self._agenda, self.log.rows, heappop
        for _ in range(_BLOCK):
            now, _, port, src, kind, size, what = pop(agenda.today or agenda.next_day())
            machine = port.machine
            if machine is None:
                self.undelivered += 1
                continue
            self.now = now
            if size < _MARK:
                if size == _STOP:
                    return False
                if not self._special(port, src, kind, size, what):
                    continue
            rows += (now, src, port.node, kind, size)
            for effect in machine.receive(now, what):
                if type(effect) is Send:
                    self._send(now, port, effect.peer, effect.message)
                else:
                    self._carry_out(now, port, effect)
            if port.polled or size == _WAKE:
                self._rearm(port)
        return True

    def run_for(self, duration_ns: int) -> None:
        """`run_until` so much later than now."""
        self.run_until(after(self.now, duration_ns))

    def digest(self) -> str:
        """SHA-256 of the history so far."""
        return self.log.digest()

    # --- effects ----------------------------------------------------------------------------------

    def _carry_out(self, now: Instant, port: Port, effect: AnyEffect) -> None:
        """What is no Send. The twin of the driver's match in `node`."""
        match effect:
            case WakeAt():
                self._wake_at(port, effect.instant)
            case Emit():
                for observer in self._observers.get(port.service.name, ()):
                    observer(now, port.node, effect.event)
            case Disconnect():
                self._disconnect(port, effect.peer)
            case Persist():
                self.stored.setdefault(port.node, {})[effect.key] = effect.value
            case Trace():
                name = (port.service.name, effect.name)
                self.traces[name] = self.traces.get(name, 0) + 1
            case Send():
                self._send(now, port, effect.peer, effect.message)

    def _choose_sender(self) -> None:
        plain = self.connections is None and self._side is None and not (self._shaped or self._stations)
        self._send = self._send_plainly if plain else self._send_over

    def _plain_sender(self) -> Callable[[int, Port, int, object], None]:
        """`_send_over` for links that do nothing but take time: the same, without the questions."""
        push, next_number, table = self._push, self._next, self.links.table

        def send(now: int, port: Port, peer: int, message: object) -> None:
            target = port.ports.get(peer)
            kind = port.kinds.get(type(message))
            service = port.service
            if target is None or kind is None or service.round_trip is not None:
                self._send_over(now, port, peer, message)
                return
            size = service.size_of(message) if service.size_of is not None else 0
            arrival = now + table[port.row + target.site] + port.access + target.access
            src = port.node
            push((arrival, next_number(), target, src, kind, size, Received(src, message)))

        return send

    def _send_over(self, now: int, port: Port, peer: int, message: object) -> None:
        """Schedule a message's arrival, if it arrives."""
        service, src = port.service, port.node
        kind = service.kinds.get(type(message))
        if kind is None:
            kind = self._kind(service, type(message))
        size = 0
        if service.round_trip is not None:
            message, size = service.round_trip(src, peer, message)
        elif service.size_of is not None:
            size = service.size_of(message)
        arrival = self._arrival(now, port, peer, size)
        if arrival is None:
            return
        target = service.ports.get(peer)
        if target is None:
            self.undelivered += 1
        elif self._stations and (self._service_ns[peer] or self._down_bps[peer]):
            waiting = (size, Received(src, message))
            self._push((arrival, self._next(), target, src, kind, _QUEUE, waiting))
        else:
            self._push((arrival, self._next(), target, src, kind, size, Received(src, message)))

    def _arrival(self, now: int, port: Port, peer: int, size: int) -> int | None:
        """When it arrives, with everything that can befall it; None: never."""
        src = port.node
        depart: int = now
        if bps := self._up_bps[src]:
            depart = self._up_free[src] = max(now, self._up_free[src]) + size * 8_000_000_000 // bps
        if self.connections is not None:
            return self.connections.arrival(now, port, peer, depart)
        if self._side is not None and self._side[src] != self._side[peer]:
            self.lost += 1
            return None
        if self.links.loss and self._wire.unit() < self.links.loss:
            self.lost += 1
            return None
        return depart + self.one_way_ns(src, peer) + self.jitter_ns()

    def jitter_ns(self) -> int:
        """One draw of the links' extra delay, exponential."""
        mean = self.links.jitter_ns
        return round(-mean * portable.ln(1.0 - self._wire.unit())) if mean else 0

    def wire_loses(self) -> bool:
        """One draw of the links' loss."""
        return self.links.loss > 0.0 and self._wire.unit() < self.links.loss

    def tell_lost(self, port: Port, peer: int, at: int) -> None:
        """`PeerLost(peer)` to a machine at an instant."""
        kind = port.service.kinds[PeerLost]
        self._push((at, self._next(), port, peer, kind, _MARK, PeerLost(peer)))

    def port(self, service: Service, node: int) -> Port | None:
        return service.ports.get(node)

    def _disconnect(self, port: Port, peer: int) -> None:
        """This machine's stream to the peer ends; the other side sees it end one way later."""
        if self.connections is not None:
            self.connections.stream_closed(port, peer)
            return
        other = port.service.ports.get(peer)
        if other is not None and self.can_reach(port.node, peer):
            self.tell_lost(other, port.node, self.now + self.one_way_ns(port.node, peer))

    # --- the world's own events -------------------------------------------------------------------

    def _special(self, port: Port, src: int, kind: int, size: int, what: AnyMessage) -> bool:
        """Handle an event that is no machine's input. True if it turned out to be a due wake-up."""
        if size == _WAKE:
            return self._is_due(port)
        if size == _CALL:
            what()
            return False
        # A message has come in at a node that takes one at a time: its line first, then its processor.
        node = port.node
        size, received = what
        cost = self._service_ns[node]
        if bps := self._down_bps[node]:
            cost += size * 8_000_000_000 // bps
        start = max(self.now, self._busy[node])
        if start - self.now > self._max_queue_ns:
            self.overrun += 1
            return False
        self._busy[node] = start + cost
        self._push((start + cost, self._next(), port, src, kind, size, received))
        return False

    def _wake_at(self, port: Port, instant: int) -> None:
        if instant < port.wake:
            port.wake = instant
            kind = port.service.kinds[Woken]
            when = max(instant, self.now)
            self._push((when, self._next(), port, port.node, kind, _WAKE, _WOKEN))

    def _rearm(self, port: Port) -> None:
        wake = None if port.machine is None else port.machine.next_wake()
        if wake is not None:
            self._wake_at(port, wake)

    def _is_due(self, port: Port) -> bool:
        """A wake-up is in the heap only for the earliest instant asked for; later ones are asked for again
        here.
        """
        machine = port.machine
        if self.now < port.wake or machine is None:
            return False  # replaced by an earlier one, which has come already
        port.wake = NEVER
        wake = machine.next_wake()
        if wake is None:
            return False
        if wake > self.now:
            self._wake_at(port, wake)
            return False
        return True

    def _kind(self, service: Service, kind: type) -> int:
        number = service.kinds.get(kind)
        if number is None:
            if len(service.kinds) >= KINDS_PER_SERVICE:
                raise ValueError(
                    f"service {service.name!r} has more than {KINDS_PER_SERVICE} kinds of messages"
                )
            number = service.kinds[kind] = service.index * KINDS_PER_SERVICE + len(service.kinds)
            self.log.name_kind(number, f"{service.name}.{kind.__name__}")
        return number


class _Nobody:
    """Stands behind the world's own events; never gets one."""

    def receive(self, now: Instant, what: AnyMessage) -> Iterable[AnyEffect]:  # noqa: ARG002 - the Machine protocol
        return ()

    def next_wake(self) -> Instant | None:
        return None
