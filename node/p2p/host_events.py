"""What a host tells its subscribers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from protocol.ids import PeerId


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """The first connection to this peer is up."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PeerDisconnected:
    """The last connection to this peer is gone."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class PeerDirect:
    """A direct connection stands beside relayed ones: new streams take it."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class AddressesChanged:
    """`Host.addresses` are others now."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Observed:
    """What a peer said of our own address. `mapped`: it met us on a connection from our listening port, so
    that others may meet us there, too; else the port is a passing one.
    """

    address: str
    mapped: bool


HostEvent: TypeAlias = PeerConnected | PeerDisconnected | PeerDirect | AddressesChanged
