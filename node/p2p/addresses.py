"""The multiaddresses that this node understands: `/ip4/1.2.3.4/tcp/4001/p2p/12D3KooW…` and its kin.

A peer that nobody can dial is met at a relay: `/ip4/…/tcp/…/p2p/RELAY/p2p-circuit/p2p/PEER`.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import Final

import psutil

from node.p2p.errors import AddressInvalid
from protocol.errors import ProtocolError
from protocol.ids import PeerId, peer_id_untrusted
from protocol.limits import MAX_ADDRESS_CHARS

_KINDS: Final = ("ip4", "ip6", "dns", "dns4", "dns6")
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?\Z")
_FORM: Final = "/ip4/ADDRESS/tcp/PORT"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a peer listens. `kind` is ip4, ip6, dns, dns4 or dns6; `peer` is missing when we listen.

    With a `relay`, host and port are the relay's.
    """

    kind: str
    host: str
    port: int
    peer: PeerId | None = None
    relay: PeerId | None = None

    def __str__(self) -> str:
        base = f"/{self.kind}/{self.host}/tcp/{self.port}"
        if self.relay:
            base += f"/p2p/{self.relay}/p2p-circuit"
        return f"{base}/p2p/{self.peer}" if self.peer else base

    @property
    def of_relay(self) -> Address:
        """Where the relay of a relayed address itself is met."""
        return Address(self.kind, self.host, self.port, self.relay)


def parse_address(text: str) -> Address:
    """The address in this text, from wherever. Raises AddressInvalid, which says what was expected."""
    if len(text) > MAX_ADDRESS_CHARS:
        raise AddressInvalid(f"an address of {len(text)} characters is too long")
    at_relay, circuit, target = text.partition("/p2p-circuit")
    address = _parse_plain(text, at_relay)
    if not circuit:
        return address
    if address.peer is None or not target.startswith("/p2p/"):
        raise AddressInvalid(f"{text!r} is not of the form {_FORM}/p2p/RELAY/p2p-circuit/p2p/PEER")
    peer = _peer(text, target.removeprefix("/p2p/"))
    if peer == address.peer:
        raise AddressInvalid(f"{text!r}: a relay does not relay to itself")
    return Address(address.kind, address.host, address.port, peer, address.peer)


def parse_peer_address(text: str) -> tuple[Address, PeerId]:
    """An address that names the peer to be met there. Raises AddressInvalid."""
    address = parse_address(text)
    if address.peer is None:
        raise AddressInvalid(f"{text!r} does not say whom to expect: add /p2p/PEER at its end")
    return address, address.peer


def is_public(address: Address) -> bool:
    """Is this an IP address that can be routed from anywhere?"""
    if address.kind not in {"ip4", "ip6"}:
        return False
    return ipaddress.ip_address(address.host).is_global


def addresses_of(listener: tuple[str, int], peer: PeerId) -> list[str]:
    """How others reach a socket bound to (host, port): wildcards become the interfaces' addresses."""
    host, port = listener
    bound = ipaddress.ip_address(host.partition("%")[0])
    kind = f"ip{bound.version}"
    if not bound.is_unspecified:
        return [str(Address(kind, str(bound), port, peer))]
    family = socket.AF_INET if bound.version == 4 else socket.AF_INET6
    hosts = {
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == family and "%" not in entry.address  # link-local ones mean nothing elsewhere
    }
    # Loopback last: it is the least useful to others.
    ordered = sorted(hosts, key=lambda text: (ipaddress.ip_address(text).is_loopback, text))
    return [str(Address(kind, text, port, peer)) for text in ordered]


def _parse_plain(text: str, plain: str) -> Address:
    parts = plain.split("/")
    if len(parts) not in {5, 7} or parts[0] or parts[3] != "tcp" or (len(parts) == 7 and parts[5] != "p2p"):
        raise AddressInvalid(f"{text!r} is not of the form {_FORM}[/p2p/PEER]")
    kind, host = parts[1], parts[2]
    if not parts[4].isascii() or not parts[4].isdigit() or len(parts[4]) > 5 or int(parts[4]) > 65535:
        raise AddressInvalid(f"{text!r}: a TCP port between 0 and 65535 was expected")
    peer = _peer(text, parts[6]) if len(parts) == 7 else None
    return Address(kind, _host(text, kind, host), int(parts[4]), peer)


def _peer(text: str, peer: str) -> PeerId:
    try:
        return peer_id_untrusted(peer)
    except ProtocolError as error:
        raise AddressInvalid(f"{text!r}: {error.detail}") from error


def _host(text: str, kind: str, host: str) -> str:
    if kind not in _KINDS:
        raise AddressInvalid(f"{text!r}: this node dials /ip4, /ip6, /dns, /dns4 and /dns6 over TCP")
    if kind.startswith("dns"):
        if not _HOST_NAME.match(host):
            raise AddressInvalid(f"{text!r}: {host!r} is no host name")
        return host
    try:
        address = ipaddress.IPv4Address(host) if kind == "ip4" else ipaddress.IPv6Address(host)
    except ValueError as error:
        raise AddressInvalid(f"{text!r}: {error}") from error
    return str(address)
