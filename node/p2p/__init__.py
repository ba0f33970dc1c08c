"""The network: hosts, connections and streams. See docs/network.md."""

from node.p2p.addresses import Address, parse_address, parse_peer_address
from node.p2p.errors import AddressInvalid, ListenFailed, StreamBroken, Unreachable
from node.p2p.host import Host
from node.p2p.host_events import AddressesChanged, HostEvent, PeerConnected, PeerDirect, PeerDisconnected
from node.p2p.limits import HostLimits
from node.p2p.opening import open_host
from node.p2p.stream import Counters, Stream

__all__ = [
    "Address",
    "AddressInvalid",
    "AddressesChanged",
    "Counters",
    "Host",
    "HostEvent",
    "HostLimits",
    "ListenFailed",
    "PeerConnected",
    "PeerDirect",
    "PeerDisconnected",
    "Stream",
    "StreamBroken",
    "Unreachable",
    "open_host",
    "parse_address",
    "parse_peer_address",
]
