"""Who the small integers are.

Inside the DHT a peer is a small integer, given by a directory: the node's address book (PeerId, addresses)
or the simulator's list of simulated nodes. So a routing table is an array of integers, a hundred thousand
tables fit into memory, and the machine is the same in both. A number is never given to another peer.
"""

from __future__ import annotations

from typing import Protocol


class Keys(Protocol):
    """Key by peer number. A list is one; so is a dict."""

    def __getitem__(self, peer: int, /) -> int: ...


class Directory(Protocol):
    """What the DHT asks about peers."""

    @property
    def keys(self) -> Keys:
        """256-bit DHT key by peer number. Every number that was ever given out can be looked up."""
        ...

    def group_of(self, peer: int) -> int:
        """The network the peer's address lies in (IPv4 /16, IPv6 /32), for diversity; 0: not limited (loopback,
        private, unknown).
        """
        ...
