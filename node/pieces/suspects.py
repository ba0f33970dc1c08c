"""Peers that sent what is not in a file: remembered for a while, at most so many."""

from __future__ import annotations

from collections import OrderedDict

from protocol.ids import PeerId


class Suspects:
    """`lasting_s`: how long one is kept; `limit`: the oldest are forgotten beyond."""

    def __init__(self, lasting_s: float, limit: int) -> None:
        self._lasting_s = lasting_s
        self._limit = limit
        self._until: OrderedDict[PeerId, float] = OrderedDict()

    def ban(self, peer: PeerId, now: float) -> None:
        self._until[peer] = now + self._lasting_s
        self._until.move_to_end(peer)
        while len(self._until) > self._limit:
            self._until.popitem(last=False)

    def banned(self, peer: PeerId, now: float) -> bool:
        return self._until.get(peer, 0.0) > now

    def __len__(self) -> int:
        return len(self._until)
