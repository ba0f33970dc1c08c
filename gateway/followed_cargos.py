"""Which Cargos this gateway follows at other coordinators: all that they say they have, while there are
few; else those that were asked for lately.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Final

import trio

from node.coordination.coordinator import CoordinatorService
from node.coordination.following import FollowingService
from protocol.envelope import Envelope

#: A coordinator admits this many subscriptions of one follower.
MAX_FOLLOWED: Final = 64

#: Cargos that were asked for and are remembered.
MAX_ASKED: Final = 256

#: Summaries come every ten seconds.
REVIEW_S: Final = 10.0


class FollowedCargos:
    """`run` until cancelled."""

    def __init__(self, coordinator: CoordinatorService, following: FollowingService) -> None:
        self._coordinator = coordinator
        self._following = following
        self._asked: OrderedDict[str, None] = OrderedDict()
        self._followed: set[str] = set()
        self._news = trio.Event()
        coordinator.subscribe_summaries(self._on_summary)

    def asked_for(self, digest: str) -> None:
        """A consumer wants it: it comes before others from now on, and at once if it is not followed yet."""
        fresh = digest not in self._asked
        self._asked[digest] = None
        self._asked.move_to_end(digest)
        if len(self._asked) > MAX_ASKED:
            self._asked.popitem(last=False)
        if fresh:
            self._news.set()

    async def run(self) -> None:
        """Follow what is there."""
        while True:
            self._news = trio.Event()
            self._review()
            with trio.move_on_after(REVIEW_S):
                await self._news.wait()

    def _on_summary(self, envelope: Envelope) -> None:
        self._following.learn(envelope)
        self._news.set()

    def _review(self) -> None:
        offered: Counter[str] = Counter()
        for other in self._coordinator.machine.others:
            for count in other.summary.cargos:
                offered[count.digest] += count.islands
        lately = [digest for digest in reversed(self._asked) if digest in offered]
        by_islands = sorted(offered, key=lambda digest: (-offered[digest], digest))
        wanted = list(dict.fromkeys((*lately, *by_islands)))[:MAX_FOLLOWED]
        for digest in sorted(self._followed.difference(wanted)):
            self._following.unwant(digest)
        for digest in wanted:
            if digest not in self._followed:
                self._following.want(digest)
        self._followed = set(wanted)
