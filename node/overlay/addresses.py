"""Which addresses are believed, from whom, and which are told to whom.

An address has a scope: this machine (loopback), a private network, or the world. Who speaks to us from the
world can not know what is good on our machine or in our network, and must not make us knock there; so an
address of a narrower scope than its teller's is refused. Nobody makes us look up names: those come from
settings only.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from enum import IntEnum
from typing import Final

from node.p2p import AddressInvalid, parse_address
from node.p2p.addresses import Address
from protocol.ids import PeerId
from protocol.limits import MAX_ADDRESS_CHARS

#: Addresses that we take of one peer from one teller; two transports by IPv4 and IPv6, and some relays.
MAX_ADDRESSES_TAKEN: Final = 8

_IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class Scope(IntEnum):
    """From where an address can be used; a narrower scope is smaller."""

    MACHINE = 0
    NETWORK = 1
    WORLD = 2


def scope_of_host(host: str) -> Scope | None:
    """The scope of an IP address as text; None for one that means nothing to others (link-local, ...)."""
    try:
        ip: _IpAddress = ipaddress.ip_address(host)
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.is_loopback:
        return Scope.MACHINE
    if ip.is_unspecified or ip.is_multicast or ip.is_link_local or (ip.is_reserved and not ip.is_global):
        return None
    return Scope.WORLD if ip.is_global else Scope.NETWORK


def group_of_host(host: str) -> int:
    """The network of an IP address, for diversity: IPv4 /16, IPv6 /32; 0 for all that is not global."""
    if scope_of_host(host) is not Scope.WORLD:
        return 0
    ip: _IpAddress = ipaddress.ip_address(host)
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if isinstance(ip, ipaddress.IPv4Address):
        return 1 << 32 | int(ip) >> 16
    return 2 << 32 | int(ip) >> 96


def scope_of_remote(remote: str) -> Scope:
    """The scope of a connection's other end, 'host:port'. What is no IP address counts as the world."""
    scope = scope_of_host(host_of_remote(remote))
    return Scope.WORLD if scope is None else scope


def host_of_remote(remote: str) -> str:
    return remote.rpartition(":")[0].strip("[]").partition("%")[0]


def scope_of(address: Address) -> Scope | None:
    """Names count as the world. Relayed addresses have the scope of their relay."""
    return Scope.WORLD if address.kind.startswith("dns") else scope_of_host(address.host)


def widest_scope(addresses: Iterable[str]) -> Scope:
    """The widest scope among addresses of ours; this machine if there is none."""
    scopes = [scope_of(parse_address(text)) for text in addresses]
    return max((scope for scope in scopes if scope is not None), default=Scope.MACHINE)


def take_addresses_untrusted(peer: PeerId, texts: Iterable[str], narrowest: Scope) -> tuple[str, ...]:
    """What can be used of addresses told of `peer`, in full form (with /p2p/PEER), at most MAX_ADDRESSES_TAKEN.

    Left out without a word: what is no address, no IP, names another peer, has a port of 0, or a scope below
    `narrowest`.
    """
    taken: list[str] = []
    for text in texts:
        if len(taken) >= MAX_ADDRESSES_TAKEN:
            break
        full = _take_untrusted(peer, text, narrowest)
        if full is not None and full not in taken:
            taken.append(full)
    return tuple(taken)


def bare(peer: PeerId, address: str) -> str:
    """The address without the peer's name at its end: in a contact, that stands beside it."""
    return address.removesuffix(f"/p2p/{peer}")


def _take_untrusted(peer: PeerId, text: str, narrowest: Scope) -> str | None:
    suffix = f"/p2p/{peer}"
    full = text if text.endswith(suffix) else text + suffix
    if len(full) > MAX_ADDRESS_CHARS:
        return None
    try:
        address = parse_address(full)
    except AddressInvalid:
        return None
    if address.peer != peer or not address.port or address.kind.startswith("dns"):
        return None
    scope = scope_of(address)
    return full if scope is not None and scope >= narrowest else None
