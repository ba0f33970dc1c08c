"""The network: hosts, connections and streams. See docs/network.md."""

from node.p2p.addresses import Address, parse_address, parse_peer_address
from node.p2p.errors import AddressInvalid, ListenFailed, StreamBroken, Unreachable
from node.p2p.host import Host, HostEvent, PeerConnected, PeerDisconnected, open_host
from node.p2p.limits import HostLimits
from node.p2p.stream import Counters, Stream

__all__ = [
    "Address",
    "AddressInvalid",
    "Counters",
    "Host",
    "HostEvent",
    "HostLimits",
    "ListenFailed",
    "PeerConnected",
    "PeerDisconnected",
    "Stream",
    "StreamBroken",
    "Unreachable",
    "open_host",
    "parse_address",
    "parse_peer_address",
]
