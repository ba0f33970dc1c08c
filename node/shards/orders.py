"""Orders for layers that come through a coordinator, from somebody to whom this Island does not advertise.

What such an order says is signed by whoever gives it, and names this Island: a coordinator can withhold it, but
neither make one in another's name, nor change it, nor bring an old one again.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from node.rpc import Refused
from protocol.codec import excerpt
from protocol.envelope import Envelope, open_untrusted
from protocol.errors import ProtocolError
from protocol.ids import PeerId
from protocol.instants import Instant, UnixNs
from protocol.ring import SHARD_ORDER, SHARD_ORDER_KIND, HoldShard
from routing.meter import Allowance, RateMeter

#: From each coordinator, which speaks for all its followers; each costs a check of a signature (0.1 ms).
ORDERS_PER_S: Final = 10
ORDER_BURST: Final = 32

#: Coordinators whose rate is known: an Island has two, and those that its owner names.
MAX_METERED: Final = 64

#: Last orders by (issuer, Cargo). Orders expire within a minute; a coordinator brings 600 in that time.
MAX_ORDERS_KNOWN: Final = 4096


class RelayedOrders:
    """`me`: this Island. `coordinators`: those that it works for now."""

    def __init__(
        self, me: PeerId, coordinators: Callable[[], Iterable[PeerId]], unix_now: Callable[[], UnixNs]
    ) -> None:
        self._me = me
        self._coordinators = coordinators
        self._unix_now = unix_now
        self._meter: Final[RateMeter[PeerId]] = RateMeter(ORDERS_PER_S, ORDER_BURST, MAX_METERED)
        self._last: OrderedDict[tuple[PeerId, str], int] = OrderedDict()

    def open(self, coordinator: PeerId, envelope: Envelope) -> tuple[PeerId, HoldShard]:
        """Who orders what. The same order may come through several coordinators. Raises Refused."""
        if coordinator not in self._coordinators():
            raise Refused("failed", "orders are passed on by coordinators that this Island works for")
        if self._meter.take(Instant(time.monotonic_ns()), coordinator) is not Allowance.GRANTED:
            raise Refused("busy", "too many orders at a time")
        try:
            opened = open_untrusted(envelope, SHARD_ORDER_KIND, SHARD_ORDER, self._unix_now())
        except ProtocolError as error:
            raise Refused("malformed", excerpt(error.detail)) from error
        order = opened.body
        if order.island != self._me:
            raise Refused("failed", "that order is for another Island")
        key = (opened.issuer, order.hold.cargo)
        if opened.sequence < self._last.get(key, 0):
            raise Refused("failed", "a later order has come already")
        self._last[key] = opened.sequence
        self._last.move_to_end(key)
        if len(self._last) > MAX_ORDERS_KNOWN:
            self._last.popitem(last=False)
        return opened.issuer, order.hold
