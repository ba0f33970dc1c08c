"""Items that neighbours announced and that we have not got: when to ask whom for what.

An announced item first waits for a push; then it goes to the backlog of a neighbour that has it, is asked for
as soon as that neighbour owes us few enough, and if it does not come in time, the next one is asked.
Everything is bounded by `GossipPolicy`; what is forgotten, a comparison finds again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Final, Generic, TypeVar

from protocol.instants import Instant, after
from routing.gossip_messages import Want
from routing.gossip_peers import MAX_SOURCES, GossipPolicy, Neighbour

P = TypeVar("P")


class MissingItems(Generic[P]):
    """`neighbours` is the machine's own table, read here."""

    def __init__(self, policy: GossipPolicy, neighbours: Mapping[P, Neighbour[P]]) -> None:
        self._policy: Final = policy
        self._neighbours: Final = neighbours
        self._sources: dict[int, list[P]] = {}
        # The delays are constant, so both queues are in the order of their times.
        self._waiting: OrderedDict[int, tuple[Instant, Neighbour[P]]] = OrderedDict()
        self._asked: OrderedDict[int, tuple[Instant, P]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sources)

    def next_due(self) -> Instant | None:
        waiting = next(iter(self._waiting.values()), None)
        asked = next(iter(self._asked.values()), None)
        times = [one[0] for one in (waiting, asked) if one is not None]
        return min(times, default=None)

    def announced(self, now: Instant, neighbour: Neighbour[P], ids: Iterable[int], *, missing: bool) -> None:
        """The neighbour has these, which we have not. `missing`: no push will bring them."""
        for item_id in ids:
            sources = self._sources.get(item_id)
            if sources is None:
                if len(self._sources) >= self._policy.max_missing:
                    return
                if len(neighbour.backlog) + neighbour.waiting >= self._policy.max_missing // 4:
                    return
                self._sources[item_id] = [neighbour.peer]
                if missing:
                    neighbour.backlog.append(item_id)
                else:
                    self._waiting[item_id] = (after(now, self._policy.graft_ns), neighbour)
                    neighbour.waiting += 1
            elif neighbour.peer not in sources and len(sources) < MAX_SOURCES:
                sources.append(neighbour.peer)
                if missing and self._waits_no_more(item_id):
                    neighbour.backlog.append(item_id)

    def arrived(self, item_id: int, sender: P) -> bool:
        """It is here. True if we had asked the sender for it."""
        self._sources.pop(item_id, None)
        self._waits_no_more(item_id)
        asked = self._asked.pop(item_id, None)
        if asked is None:
            return False
        debtor = self._neighbours.get(asked[1])
        if debtor is not None:
            debtor.asked -= 1
            if asked[1] == sender:
                debtor.broken = max(0, debtor.broken - 1)
        return asked[1] == sender

    def lost(self, gone: Neighbour[P]) -> None:
        """What was expected of a neighbour that is no longer in the table is asked of others."""
        expected = [item_id for item_id, (_, peer) in self._asked.items() if peer == gone.peer]
        for item_id in expected:
            del self._asked[item_id]
        for item_id in (*expected, *gone.backlog):
            self._next_source(item_id, gone.peer)

    def overdue(self, now: Instant) -> list[Neighbour[P]]:
        """Pass what did not come in time on to the next source. Returns those who have broken too many
        promises.
        """
        untrue: dict[P, Neighbour[P]] = {}
        while self._asked and next(iter(self._asked.values()))[0] <= now:
            item_id, (_, peer) = self._asked.popitem(last=False)
            neighbour = self._neighbours.get(peer)
            if neighbour is not None:
                neighbour.asked -= 1
                neighbour.broken += 1
                if neighbour.broken > self._policy.broken_wants:
                    untrue[peer] = neighbour
            self._next_source(item_id, peer)
        return list(untrue.values())

    def wants(self, now: Instant) -> list[tuple[P, Want]]:
        """What to ask for now, of each neighbour so much at a time."""
        while self._waiting and next(iter(self._waiting.values()))[0] <= now:
            item_id = next(iter(self._waiting))
            self._waits_no_more(item_id)
            having = map(self._neighbours.get, self._sources[item_id])
            neighbour = next((one for one in having if one is not None), None)
            if neighbour is None:
                del self._sources[item_id]
            else:
                neighbour.backlog.append(item_id)
                neighbour.graft = True
        due = after(now, self._policy.want_ns)
        wanted: list[tuple[P, Want]] = []
        for peer, neighbour in self._neighbours.items():
            ids: list[int] = []
            while neighbour.backlog and neighbour.asked < self._policy.max_asked:
                item_id = neighbour.backlog.popleft()
                if item_id in self._sources and item_id not in self._asked:
                    self._asked[item_id] = (due, peer)
                    neighbour.asked += 1
                    ids.append(item_id)
            if ids:
                wanted.append((peer, Want(tuple(ids), neighbour.graft)))
                neighbour.graft = False
        return wanted

    def _waits_no_more(self, item_id: int) -> bool:
        """Whether it did."""
        waiting = self._waiting.pop(item_id, None)
        if waiting is None:
            return False
        waiting[1].waiting -= 1
        return True

    def _next_source(self, item_id: int, failed: P) -> None:
        """Ask another that announced it, or forget it."""
        sources = self._sources.get(item_id)
        if sources is None or item_id in self._asked or item_id in self._waiting:
            return
        while sources:
            peer = sources.pop(0)
            neighbour = self._neighbours.get(peer)
            if peer != failed and neighbour is not None:
                sources.append(peer)
                neighbour.backlog.append(item_id)
                return
        del self._sources[item_id]
