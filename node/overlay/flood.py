"""How many DHT messages a peer may send us, counted before they are decoded."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import trio

from protocol.ids import PeerId

#: Of one peer, sustained and at once. A gateway that looks up a hundred keys a second spreads them over the
#: whole network; decoding and answering a message takes some 200 us.
RATE_PER_PEER: Final = 100.0
BURST_PER_PEER: Final = 400.0

#: Of all peers together: half a core. Answers to what we asked are not counted here.
RATE_IN_ALL: Final = 2500.0
BURST_IN_ALL: Final = 10_000.0


#: Peers that are counted, the one heard of longest ago forgotten first: more than there may be connections.
MAX_COUNTED: Final = 8192


class _Bucket:
    """Fills with `rate` a second up to `size`."""

    __slots__ = ("at", "level", "rate", "size")

    def __init__(self, rate: float, size: float) -> None:
        self.rate = rate
        self.size = size
        self.level = size
        self.at = trio.current_time()

    def take(self, now: float) -> bool:
        self.level = min(self.size, self.level + (now - self.at) * self.rate)
        self.at = now
        if self.level < 1:
            return False
        self.level -= 1
        return True


class FloodGuard:
    """Whether a peer's message is taken. A peer's count is forgotten with its link."""

    def __init__(self) -> None:
        self.refused = 0
        self._all = _Bucket(RATE_IN_ALL, BURST_IN_ALL)
        self._peers: OrderedDict[PeerId, _Bucket] = OrderedDict()

    def admit(self, peer: PeerId, *, awaited: bool) -> bool:
        """`awaited`: we asked this peer something and have no answer yet."""
        now = trio.current_time()
        bucket = self._peers.get(peer)
        if bucket is None:
            bucket = self._peers[peer] = _Bucket(RATE_PER_PEER, BURST_PER_PEER)
            if len(self._peers) > MAX_COUNTED:
                self._peers.popitem(last=False)
        else:
            self._peers.move_to_end(peer)
        if bucket.take(now) and (awaited or self._all.take(now)):
            return True
        self.refused += 1
        return False

    def forget(self, peer: PeerId) -> None:
        self._peers.pop(peer, None)
