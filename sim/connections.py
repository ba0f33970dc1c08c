"""Kept connections: dialling, NAT, closing, and what a message over one goes through.

As in `node`: the first message to a peer dials, later ones use the connection that is there; a node keeps a
bounded number of them and closes the one idle longest. Over a connection messages stay in order and a lost
packet costs a retransmission instead of the message. When one breaks, the machines that used it get `PeerLost`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from protocol.dice import draw_u64, draw_unit
from protocol.instants import MILLISECOND_NS, SECOND_NS, after
from sim.draws import Stream

if TYPE_CHECKING:
    from sim.ports import Port, Service
    from sim.world import World

#: TCP's floor for a retransmission (Linux: 200 ms), doubled on each further loss of the same packet.
MIN_RETRANSMIT_NS: Final = 200 * MILLISECOND_NS

#: Losses of one packet in a row before TCP's patience counts as infinite here: at 20 % loss one in 10 million
#: packets.
MAX_RETRANSMITS: Final = 10


class Nat(IntEnum):
    """Who can be dialled. NATED: by a hole punched with a relay's help, or else through the relay. UNREACHABLE:
    not at all; it dials others, and they answer over its connections.
    """

    OPEN = 0
    NATED = 1
    UNREACHABLE = 2


@dataclass(frozen=True, slots=True)
class ConnectionPolicy:
    """What connecting costs. Durations in ns.

    `kept`: connections per node. `setup_rtts`: round trips before the first message may leave (TCP, agreeing on
    noise, noise, agreeing on a muxer, opening the stream, hello: six, as measured, docs/validation.md), and
    `setup_ns` of processor time beside them. `dial_timeout_ns`: until a dial that nobody answers fails.
    `heartbeat_timeout_ns`: until a silent peer counts as lost. `punch_share`: pairs between which a hole can be
    punched (measured in the wild: about 0.7, Trautwein et al. 2022); the rest stays on the relay.
    """

    kept: int = 128
    setup_rtts: int = 6
    dial_timeout_ns: int = 5 * SECOND_NS
    heartbeat_timeout_ns: int = 4 * SECOND_NS
    punch_share: float = 0.7
    setup_ns: int = 0


class Connection:
    """Between a and b (a dialled). `relay`: the node in between, -1 if direct. `uses`: services, in order of
    first use.
    """

    __slots__ = ("a", "b", "dead", "last_to_a", "last_to_b", "ready", "relay", "uses")

    def __init__(self, a: int, b: int, ready: int, relay: int) -> None:
        self.a = a
        self.b = b
        self.ready = ready
        self.relay = relay
        self.dead = False
        self.last_to_a = 0
        self.last_to_b = 0
        self.uses: list[Service] = []

    def other(self, node: int) -> int:
        return self.b if node == self.a else self.a


class Connections:
    """All connections of a world."""

    def __init__(self, world: World, policy: ConnectionPolicy) -> None:
        self.policy = policy
        self.dials = 0
        self.failed_dials = 0
        self.relayed = 0
        #: Called with (dialler, dialled, instant from which messages may leave) at each new connection.
        self.opened: list[Callable[[int, int, int], None]] = []
        self._world = world
        self._kept: list[OrderedDict[int, Connection]] = []
        self._nat: list[Nat] = []
        self._silent: dict[int, bool] = {}
        self._open: list[int] = []

    def add_node(self, nat: Nat) -> None:
        if nat is Nat.OPEN:
            self._open.append(len(self._nat))
        self._kept.append(OrderedDict())
        self._nat.append(nat)

    def keeps(self, node: int, peer: int) -> bool:
        """Whether the node has a live connection with the peer."""
        link = self._kept[node].get(peer)
        return link is not None and not link.dead

    def nat_of(self, node: int) -> Nat:
        return self._nat[node]

    def kept_by(self, node: int) -> tuple[int, ...]:
        """Peers that the node has a connection with, the one idle longest first."""
        return tuple(self._kept[node])

    def used_at(self, node: int, peer: int) -> int | None:
        """When the latest message between them arrives or arrived; None if no connection of theirs is up."""
        link = self._kept[node].get(peer)
        if link is None or link.dead or self._world.now < link.ready or not self._world.can_reach(node, peer):
            return None
        return max(link.ready, link.last_to_a, link.last_to_b)

    # --- sending ----------------------------------------------------------------------------------

    def arrival(self, now: int, port: Port, peer: int, depart: int) -> int | None:
        """When a message that may leave at `depart` arrives at the peer; None: never."""
        world, src = self._world, port.node
        link = self._kept[src].get(peer)
        if link is None:
            link = self._dial(now, port, peer)
            if link is None:
                return None
        self._kept[src].move_to_end(peer)
        if port.service not in link.uses:
            link.uses.append(port.service)
        if link.dead or not world.can_reach(src, peer):
            world.lost += 1
            return None
        way = self._way_ns(link, src, peer)
        arrival = max(depart, link.ready) + way + world.jitter_ns()
        wait = max(MIN_RETRANSMIT_NS, 2 * way)
        for _ in range(MAX_RETRANSMITS):
            if not world.wire_loses():
                break
            arrival, wait = arrival + wait, 2 * wait
        if peer == link.b:
            arrival = link.last_to_b = max(arrival, link.last_to_b)
        else:
            arrival = link.last_to_a = max(arrival, link.last_to_a)
        return arrival

    def _way_ns(self, link: Connection, src: int, dst: int) -> int:
        world = self._world
        if link.relay < 0:
            return world.one_way_ns(src, dst)
        return world.one_way_ns(src, link.relay) + world.one_way_ns(link.relay, dst)

    def _dial(self, now: int, port: Port, peer: int) -> Connection | None:
        """A new connection, ready some round trips from now; or None, and `PeerLost` comes."""
        world, policy, src = self._world, self.policy, port.node
        self.dials += 1
        relay = -1
        setup_ns = policy.setup_ns + policy.setup_rtts * world.rtt_ns(src, peer)
        fails_after_ns = -1
        if not world.can_reach(src, peer) or self._nat[peer] is Nat.UNREACHABLE:
            fails_after_ns = policy.dial_timeout_ns
        elif not world.is_up(peer):
            silent = self._silent.get(peer, True)
            fails_after_ns = policy.dial_timeout_ns if silent else world.rtt_ns(src, peer)
        elif self._nat[peer] is Nat.NATED:
            relay = self._relay_of(peer)
            if relay < 0 or not world.can_reach(src, relay):
                fails_after_ns = policy.dial_timeout_ns
            else:
                through = world.rtt_ns(src, relay) + world.rtt_ns(relay, peer)
                setup_ns = policy.setup_ns + policy.setup_rtts * through
                if self._can_punch(src, peer):
                    relay = -1
                    setup_ns += through  # both agree on the moment, then dial each other
                else:
                    self.relayed += 1
        if fails_after_ns >= 0:
            self.failed_dials += 1
            world.lost += 1
            world.tell_lost(port, peer, now + fails_after_ns)
            return None
        link = Connection(src, peer, now + setup_ns, relay)
        self._keep(src, peer, link)
        self._keep(peer, src, link)
        for told in self.opened:
            told(src, peer, link.ready)
        return link

    def _keep(self, node: int, peer: int, link: Connection) -> None:
        kept = self._kept[node]
        before = kept.pop(peer, None)
        if before is not None and before.dead:
            self._tell(before, node)  # the old one's end is noticed at the latest now
        kept[peer] = link
        if len(kept) > self.policy.kept:
            idle, closed = kept.popitem(last=False)
            self._kept[idle].pop(node, None)
            closed.dead = True

    def _relay_of(self, node: int) -> int:
        """The open node that relays for this one: drawn per node; the next one that is up if it is not."""
        count = len(self._open)
        first = draw_u64(self._world.seed, Stream.RELAYS, node) % count if count else 0
        for step in range(count):
            relay = self._open[(first + step) % count]
            if self._world.is_up(relay) and self._world.can_reach(relay, node):
                return relay
        return -1

    def _can_punch(self, a: int, b: int) -> bool:
        if self._nat[a] is Nat.OPEN:
            return True  # the one behind NAT dials back
        low, high = min(a, b), max(a, b)
        return draw_unit(self._world.seed, Stream.NAT, low << 32 | high) < self.policy.punch_share

    # --- ends -------------------------------------------------------------------------------------

    def stream_closed(self, port: Port, peer: int) -> None:
        """One service's stream to the peer ends; its machine there is told one way later."""
        world = self._world
        link = self._kept[port.node].get(peer)
        if link is None or link.dead or port.service not in link.uses:
            return
        link.uses.remove(port.service)
        other = port.service.ports.get(peer)
        if other is not None and world.can_reach(port.node, peer):
            at = max(world.now, link.ready) + self._way_ns(link, port.node, peer)
            world.tell_lost(other, port.node, max(at, link.last_to_a, link.last_to_b))

    def node_died(self, node: int, *, silent: bool) -> None:
        """All its connections end; the others notice at once (one way later) or when heartbeats stay away."""
        self._silent[node] = silent
        kept, self._kept[node] = self._kept[node], OrderedDict()
        for peer, link in kept.items():
            reachable = self._world.can_reach(node, peer)
            delay_ns = self.policy.heartbeat_timeout_ns
            if not silent and reachable:
                delay_ns = self._way_ns(link, node, peer)
            self._break(link, peer, delay_ns)

    def network_cut(self) -> None:
        """A partition: connections across it break when heartbeats stay away, unless it heals before."""
        world = self._world

        def still_cut() -> None:
            for node, kept in enumerate(self._kept):
                for peer, link in list(kept.items()):
                    if not link.dead and not world.can_reach(node, peer):
                        self._break(link, node, 0)
                        self._break(link, peer, 0)

        world.at(after(world.now, self.policy.heartbeat_timeout_ns), still_cut)

    def _break(self, link: Connection, witness: int, delay_ns: int) -> None:
        """The connection is dead from now on; `witness` learns it after a delay."""
        world = self._world
        link.dead = True

        def noticed() -> None:
            kept = self._kept[witness]
            if kept.get(link.other(witness)) is link:
                del kept[link.other(witness)]
                self._tell(link, witness)

        world.at(after(world.now, delay_ns), noticed)

    def _tell(self, link: Connection, node: int) -> None:
        for service in link.uses:
            port = service.ports.get(node)
            if port is not None:
                self._world.tell_lost(port, link.other(node), self._world.now)
