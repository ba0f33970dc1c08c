"""Places for inbound connections that have not proved who they are, so that silent strangers keep nobody out.

A stranger costs a socket from the moment that the kernel's queue is emptied, long before its handshake begins,
and it may say nothing until its time is over. So not only handshakes under way are bounded but also those that
wait for one; and when places are short, the network that holds most of them gives one: its oldest, if that has
had its chance.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from node.p2p.errors import Unreachable

#: What a handshake may take before it gives way to others that wait: it takes some 50 ms, a second on a busy
#: machine or a bad link.
CHANCE_S: Final = 2.0

#: As many may wait as there are places.
WAITING_PER_PLACE: Final = 1

#: How often who waits looks for a place that has had its chance.
_LOOK_S: Final = 0.25


@dataclass(eq=False, slots=True)
class _Stranger:
    network: str
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    turn: trio.Event = field(default_factory=trio.Event)
    began: float | None = None


class Handshakes:
    """`places` at a time, as many more waiting."""

    def __init__(self, places: int) -> None:
        self._places: Final = places
        self._strangers: dict[_Stranger, None] = {}  # in the order in which they came

    def __len__(self) -> int:
        """Those that have a place or wait for one."""
        return len(self._strangers)

    @asynccontextmanager
    async def place(self, host: str) -> AsyncGenerator[None]:
        """Wait for a place for a connection from this IP address. Raises Unreachable: there is none, or it was
        needed for others.
        """
        stranger = _Stranger(_network_of(host))
        self._make_room(stranger.network)
        self._strangers[stranger] = None
        try:
            with stranger.scope:
                await self._wait_turn(stranger)
                yield
        finally:
            del self._strangers[stranger]
            self._next()
        if stranger.scope.cancelled_caught:
            raise Unreachable("it kept others waiting")

    async def _wait_turn(self, stranger: _Stranger) -> None:
        self._next()
        while not stranger.turn.is_set():
            with trio.move_on_after(_LOOK_S):
                await stranger.turn.wait()
                return
            self._oust()

    def _next(self) -> None:
        """Give free places to those who came first."""
        free = self._places - sum(s.began is not None and not s.scope.cancel_called for s in self._strangers)
        for stranger in self._strangers:
            if free <= 0:
                return
            if stranger.began is None and not stranger.scope.cancel_called:
                stranger.began = trio.current_time()
                stranger.turn.set()
                free -= 1

    def _oust(self) -> None:
        """One that has had its chance goes, of the network that has most here."""
        now = trio.current_time()
        network = self._largest()
        for stranger in self._strangers:
            had_chance = stranger.began is not None and now - stranger.began > CHANCE_S
            if stranger.network == network and had_chance and not stranger.scope.cancel_called:
                stranger.scope.cancel()
                self._next()
                return

    def _make_room(self, network: str) -> None:
        """Raises Unreachable if no network has more here than the newcomer's."""
        if len(self._strangers) < self._places * (1 + WAITING_PER_PLACE):
            return
        largest, counts = self._largest(), self._counts()
        if counts[network] >= counts[largest]:
            raise Unreachable("too many connections at a time")
        latest = next(s for s in reversed(self._strangers) if s.network == largest)
        latest.scope.cancel()
        self._next()

    def _counts(self) -> Counter[str]:
        return Counter(s.network for s in self._strangers if not s.scope.cancel_called)

    def _largest(self) -> str:
        """Of equally large ones that which came first."""
        counts = self._counts()
        return max(counts, key=counts.__getitem__, default="")


def _network_of(host: str) -> str:
    """What one stranger has for itself: an IPv4 address, or 64 bits of IPv6."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(int(address) >> 64)
    return str(address)
