"""What a host holds and does at most, each with its reason. Nothing below has a cap of its own."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.limits import KIB, MIB


@dataclass(frozen=True, slots=True)
class HostLimits:
    """Bounds of one host. All are enforced by us; the libraries below set none."""

    max_connections: int = 4096
    """An idle connection costs about 20 KiB and two tasks; file descriptors are the next bound."""

    max_connections_per_peer: int = 4
    """Two arise when both sides dial at once; a restarted peer may overlap with its former self."""

    max_bulk_connections_per_peer: int = 4
    """Beside those above, for tensors and files: two when both sides dial at once, for each of the two uses."""

    bulk_idle_s: float = 120.0
    """A bulk connection without streams ends after this long (at the side that was dialled half as much later,
    so that rarely both end it at once). To dial again costs four round trips, which who waits for a token
    notices; so those that may be needed are dialled in advance, and stay for a while."""

    bulk_dial_s: float = 2.0
    """The addresses of a peer get this long for a bulk connection, if there is another way to reach it."""

    next_door_dial_s: float = 0.25
    """The same for the plain addresses of a peer that is to be met at a relay: they can only be of use in our
    own network, where a handshake takes milliseconds; elsewhere nobody answers there at all."""

    max_relayed_connections: int = 256
    """Each costs a plain connection plus a stream, and its bytes are sealed twice."""

    max_handshakes: int = 128
    """Inbound connections that have not proved who they are. Each costs a few ms of CPU; as many more wait, the
    rest is refused (node/p2p/handshakes.py says who)."""

    handshake_s: float = 10.0
    """TCP, noise and muxer negotiation: six round trips, 3 s on a satellite link with losses."""

    max_inbound_streams_per_peer: int = 1024
    """A gateway under load has some hundred jobs on one Island, one stream each."""

    max_inbound_streams: int = 8192
    """All peers together; a stream with its handler costs about 10 KiB."""

    negotiation_s: float = 10.0
    """A new stream must name its protocol, and the other side answer, within this time."""

    stream_window_bytes: int = 1 * MIB
    """A stream that moves data in bulk may have this much in flight: 80 MB/s at 13 ms. Others stay at
    yamux's initial 256 KiB."""

    max_unread_bytes: int = 256 * MIB
    """Received but not yet read by handlers, over all streams. Beyond it the stream that adds more is
    reset. 8192 streams with full windows would hold 2 GiB."""

    max_closing_streams: int = 64
    """Per connection: closed by us, not yet by the peer. The oldest are reset when there are more."""

    max_queued_replies: int = 1024
    """Per connection: answers to pings and refused streams that the peer provokes and does not read. At
    12 bytes each; a peer beyond it floods us and is disconnected."""

    send_queue_bytes: int = 256 * KIB
    """Per connection: frames that wait for the socket. Writers pause beyond it."""

    shutdown_s: float = 1.0
    """On closing, the last frames get this long to leave."""
