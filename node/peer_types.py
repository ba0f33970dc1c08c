"""What the peer table is made of: its times and bounds, its events, its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from node.rpc import RpcLink
from protocol.adverts import METHOD_BYE, Accepted, Hello
from protocol.ids import PeerId
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant

PeerState: TypeAlias = Literal["connected", "connecting", "waiting"]


@dataclass(frozen=True, slots=True)
class PeersConfig:
    """Times and bounds of the peer table; durations are in nanoseconds."""

    heartbeat_ns: int = SECOND_NS
    """A ping is 60 bytes; a thousand peers cost 60 kB/s."""

    dead_after_ns: int = 4 * SECOND_NS
    """Four lost heartbeats. Longer pauses of a live peer are rare even on mobile links, and a consumer
    waits this long for a hand-over when an Island freezes."""

    backoff_first_ns: int = 250 * MILLISECOND_NS
    """A restarted process listens again after about this long."""

    backoff_max_ns: int = 30 * SECOND_NS
    """A peer that comes back after a night is found within this time."""

    steady_after_ns: int = 5 * SECOND_NS
    """A link that lived this long was a success: the next backoff starts anew."""

    connect_ns: int = 10 * SECOND_NS
    """Dialling, the RPC stream and hello together."""

    quiet_after_ns: int = 5 * SECOND_NS
    """A link that nobody needs but that was used this lately is pinged this often: that measures the round trip
    for those who use it. A newcomer finds no room if all links were used so lately."""

    quiet_heartbeat_ns: int = 20 * SECOND_NS
    """Heartbeat of a quiet link. It keeps a router's table from forgetting the connection (RFC 5382 asks for
    two hours, common devices forget after one minute); a thousand quiet links cost 50 pings/s."""

    idle_ns: int = 120 * SECOND_NS
    """A link that nobody needs is closed after this long without use. Lookups that come close together share
    links; to open one again costs four round trips and 2 ms of CPU."""

    idle_grace_ns: int = 30 * SECOND_NS
    """Whoever did not open the link closes it this much later, so that rarely both sides do it at once."""

    streamless_ns: int = 30 * SECOND_NS
    """A connection on which no stream is open and that nobody needs is closed after this long."""

    max_on_demand: int = 512
    """Links that we opened on demand. About 40 KiB each; a lookup needs some twenty."""

    max_strangers: int = 1024
    """Links that others opened and that nobody here needs. Beyond it the one unused for longest makes room,
    or, if all are in use, the newcomer is refused."""

    reach_ns: int = 8 * SECOND_NS
    """One address of a peer gets this long when it is dialled on demand: TCP, noise, the stream, hello. Who has
    something to send gives up sooner by itself; a busy machine may take seconds."""

    failed_first_ns: int = 2 * SECOND_NS
    """An address that failed is not dialled on demand again for this long, doubling to `failed_max_ns`."""

    failed_max_ns: int = 120 * SECOND_NS


@dataclass(frozen=True, slots=True)
class PeerUp:
    """Hello was exchanged: calls work."""

    peer: PeerId
    hello: Hello


@dataclass(frozen=True, slots=True)
class PeerDown:
    """The link is gone. Streams may have broken before this. `orderly`: one side said that it needs it no
    more.
    """

    peer: PeerId
    reason: str
    orderly: bool = False


@dataclass(frozen=True, slots=True)
class PeerChanged:
    """It says something new of itself."""

    peer: PeerId
    hello: Hello


PeerEvent: TypeAlias = PeerUp | PeerDown | PeerChanged


@dataclass(frozen=True, slots=True)
class PeerView:
    """One row of the peer table. `peer` is known for every address; `name` and `roles` once it said hello.

    `last_seen`: when bytes last came, on this process's monotonic clock.
    """

    peer: PeerId
    name: str
    roles: tuple[str, ...]
    address: str
    state: PeerState
    rtt_ns: int | None
    last_seen: Instant | None
    detail: str = ""


@dataclass(slots=True)
class Known:
    """A peer whose link is up.

    `ours`: we opened the stream. `lively`: needed or in use, so pinged at each heartbeat. `judged_from`:
    silence before this moment (of trio's clock) is not held against it. `pinged_at`: when a quiet link was
    last pinged. `leaving`: one side has said goodbye.
    """

    link: RpcLink
    hello: Hello
    ours: bool
    lively: bool
    judged_from: float
    pinged_at: float
    leaving: bool = False
    parted_at: float = 0.0

    def part(self, now: float) -> None:
        """Say goodbye: the other side ends the link then, and knows that nothing is wrong with us."""
        self.leaving, self.parted_at = True, now
        self.link.notify(METHOD_BYE, Accepted())
