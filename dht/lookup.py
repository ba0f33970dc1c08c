"""The iterative lookup as a state machine: whom to ask next, what an answer or a failure changes, when it is
done.

It knows no messages and no clock. Its user calls `next_peer` until that gives None, reports `answered`,
`failed` or `slow` for each peer asked, and looks at `done`. (The idea of a polled query: rust-libp2p,
kad/src/query/peers.)

Candidates are asked strictly in order of XOR distance; each may name k more. A path is done when the `beta`
closest peers it knows have answered, or when nobody is left to ask. With several paths (S/Kademlia) no peer is
asked by two, and each path follows only what its own peers said; the results are merged.

What a liar can do: its answer adds at most k candidates, of which the window keeps the nearest; once three of
them have failed and none has answered, the rest of its list is dropped. The lookup ends after `max_queries` in
any case.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Final

from dht.directory import Keys

WAITING: Final = 0
OPEN: Final = 1
SLOW: Final = 2
ANSWERED: Final = 3
FAILED: Final = 4
_STATE_MASK: Final = 7

# A candidate's record is one integer: state (3 bits), path (3 bits), depth (8 bits), referrer (the rest).
_PATH_SHIFT: Final = 3
_DEPTH_SHIFT: Final = 6
_REFERRER_SHIFT: Final = 14
_MAX_DEPTH: Final = 255

#: Failures of peers that one peer named, with no success among them, after which the rest of its list is
#: dropped.
MAX_BAD_REFERRALS: Final = 3

#: Candidates that a path remembers, as a multiple of k: room for the lists of some liars beside the honest
#: ones.
WINDOW_FACTOR: Final = 4

#: Queries open at once, slow ones included, as a multiple of alpha.
MAX_OPEN_FACTOR: Final = 3


class Path:
    """Candidates by distance, and how many queries are open."""

    __slots__ = ("active", "closed", "open", "order")

    def __init__(self) -> None:
        self.order: list[tuple[int, int]] = []
        self.open = 0
        self.active = 0
        self.closed = False


class Lookup:
    """See the module. `beta` may be as large as k: then all k closest are asked."""

    __slots__ = (
        "_alpha",
        "_beta",
        "_blame",
        "_info",
        "_k",
        "_keys",
        "_max_queries",
        "_me",
        "_turn",
        "failures",
        "paths",
        "queries",
        "target",
    )

    def __init__(
        self,
        me: int,
        target: int,
        seeds: Sequence[int],
        keys: Keys,
        *,
        k: int,
        alpha: int,
        beta: int,
        paths: int = 1,
        max_queries: int = 100,
    ) -> None:
        self._me = me
        self._keys = keys
        self._k = k
        self._alpha = alpha if paths == 1 else max(1, alpha // paths)
        self._beta = min(beta, k)
        self._max_queries = max_queries
        self._info: dict[int, int] = {}
        self._blame: dict[int, int] = {}
        self._turn = 0
        self.target = target
        self.paths = [Path() for _ in range(paths)]
        self.queries = 0
        self.failures = 0
        for i, peer in enumerate(seeds):
            if peer != me and peer not in self._info:
                self._add(i % paths, peer, keys[peer] ^ target, 1, me)

    # --- what its user calls --------------------------------------------------------------------------

    def next_peer(self) -> int | None:
        """The next peer to ask (it counts as asked), or None: wait for those asked, or `done`."""
        paths = self.paths
        if len(paths) == 1:
            return self._next_of(paths[0])
        for _ in range(len(paths)):
            path = paths[self._turn]
            self._turn = (self._turn + 1) % len(paths)
            if (peer := self._next_of(path)) is not None:
                return peer
        return None

    def _next_of(self, path: Path) -> int | None:
        if path.closed:
            return None
        info = self._info
        beta, k = self._beta, self._k
        answered = late = 0
        for rank, (_, peer) in enumerate(path.order):
            code = info[peer]
            state = code & _STATE_MASK
            if state == WAITING:
                if (
                    path.active >= self._alpha
                    or path.open >= self._alpha * MAX_OPEN_FACTOR
                    or self.queries >= self._max_queries
                ):
                    break
                info[peer] = code | OPEN
                path.active += 1
                path.open += 1
                self.queries += 1
                return peer
            if state == ANSWERED:
                answered += 1
                if answered >= beta and answered + late == rank + 1:
                    path.closed = True
                    return None
            elif state == SLOW:
                # Probably dead: who waits for it waits for its whole time-out.
                late += 1
            if rank + 1 >= k:
                break
        if not path.open and not (path.active or self._may_go_on(path)):
            path.closed = True
        return None

    def _may_go_on(self, path: Path) -> bool:
        if self.queries >= self._max_queries:
            return False
        info = self._info
        return any(info[peer] & _STATE_MASK == WAITING for _, peer in path.order[: self._k])

    @property
    def busy(self) -> bool:
        """Right after `next_peer` gave somebody: whether it surely has nobody more to give now."""
        paths = self.paths
        return len(paths) == 1 and paths[0].active >= self._alpha

    def answered(self, peer: int, contacts: Sequence[int]) -> list[int]:
        """The peer answered and named these (at most k of them count). Peers not asked are ignored. Gives the
        places in `contacts` of those that this lookup had not heard of.
        """
        code = self._info.get(peer)
        if code is None or not OPEN <= code & _STATE_MASK <= SLOW:
            return []
        path_number = code >> _PATH_SHIFT & 7
        path = self.paths[path_number]
        self._close_query(path, code)
        self._info[peer] = code & ~_STATE_MASK | ANSWERED
        self._blame[code >> _REFERRER_SHIFT] = -1
        depth = min((code >> _DEPTH_SHIFT & _MAX_DEPTH) + 1, _MAX_DEPTH)
        info, keys, target, me = self._info, self._keys, self.target, self._me
        fresh = [
            place for place, contact in enumerate(contacts[: self._k]) if contact not in info and contact != me
        ]
        order, window = path.order, WINDOW_FACTOR * self._k
        code = peer << _REFERRER_SHIFT | depth << _DEPTH_SHIFT | path_number << _PATH_SHIFT | WAITING
        for place in fresh:
            contact = contacts[place]
            if len(order) >= window or path.closed:
                self._add(path_number, contact, keys[contact] ^ target, depth, peer)
            elif contact not in info:  # `_add`, in the usual case
                insort(order, (keys[contact] ^ target, contact))
                info[contact] = code
        return fresh

    def failed(self, peer: int) -> None:
        """The peer did not answer in time, or its connection broke."""
        code = self._info.get(peer)
        if code is None or not OPEN <= code & _STATE_MASK <= SLOW:
            return
        path = self.paths[code >> _PATH_SHIFT & 7]
        self._close_query(path, code)
        self._info[peer] = code & ~_STATE_MASK | FAILED
        self._drop(path, peer)
        self.failures += 1
        referrer = code >> _REFERRER_SHIFT
        blame = self._blame.get(referrer, 0)
        if blame >= 0 and referrer != self._me:
            self._blame[referrer] = blame + 1
            if blame + 1 >= MAX_BAD_REFERRALS:
                self._discredit(path, referrer)

    def slow(self, peer: int) -> None:
        """The peer is late: it no longer counts against alpha, its answer is still welcome."""
        code = self._info.get(peer)
        if code is not None and code & _STATE_MASK == OPEN:
            self._info[peer] = code & ~_STATE_MASK | SLOW
            self.paths[code >> _PATH_SHIFT & 7].active -= 1

    @property
    def done(self) -> bool:
        """Nothing more will be asked. Answers of slow peers may still come; they are not waited for."""
        return all(path.closed for path in self.paths)

    def closest(self, *, count: int = 0, answered_only: bool = False) -> list[int]:
        """The `count` (0: k) closest known now, closest first, without those that failed or are late; those
        that have not answered yet were named by one who did.
        """
        info = self._info
        limit = count or self._k
        wanted = (ANSWERED,) if answered_only else (ANSWERED, WAITING, OPEN)
        if len(self.paths) == 1:
            order = self.paths[0].order
        else:
            order = sorted(item for path in self.paths for item in path.order)
        found: list[int] = []
        for _, peer in order:
            if info[peer] & _STATE_MASK in wanted:
                found.append(peer)
                if len(found) == limit:
                    break
        return found

    def hops(self, peers: Sequence[int]) -> int:
        """The longest chain of referrals to one of these; 1: it was known from the start."""
        return max(
            (self._info[peer] >> _DEPTH_SHIFT & _MAX_DEPTH for peer in peers if peer in self._info), default=0
        )

    def hop(self, peer: int) -> int:
        return self.hops((peer,))

    def references(self) -> set[int]:
        """Peers that it knows."""
        return set(self._info)

    @property
    def open_queries(self) -> int:
        return sum(path.open for path in self.paths)

    @property
    def active_queries(self) -> int:
        """Open and not slow."""
        return sum(path.active for path in self.paths)

    def held(self) -> int:
        """Peers remembered, for bounds."""
        return len(self._info)

    # --- candidates -----------------------------------------------------------------------------------

    def _add(self, path_number: int, peer: int, distance: int, depth: int, referrer: int) -> None:
        path = self.paths[path_number]
        if peer in self._info:
            return  # named twice in one answer
        order = path.order
        if len(order) >= WINDOW_FACTOR * self._k:
            last_distance, last = order[-1]
            if distance > last_distance:
                return
            order.pop()
            # Whoever was asked is remembered, so that it is not asked again: `max_queries` bounds these.
            if self._info[last] & _STATE_MASK == WAITING:
                del self._info[last]
        insort(order, (distance, peer))
        self._info[peer] = (
            referrer << _REFERRER_SHIFT | depth << _DEPTH_SHIFT | path_number << _PATH_SHIFT | WAITING
        )
        # Closer than those that closed the path? Then the path is not done after all.
        if path.closed and order[0][1] == peer and self.queries < self._max_queries:
            path.closed = False

    def _close_query(self, path: Path, code: int) -> None:
        path.open -= 1
        if code & _STATE_MASK == OPEN:
            path.active -= 1

    def _drop(self, path: Path, peer: int) -> None:
        item = (self._keys[peer] ^ self.target, peer)
        place = bisect_left(path.order, item)
        if place < len(path.order) and path.order[place] == item:
            del path.order[place]

    def _discredit(self, path: Path, referrer: int) -> None:
        info = self._info
        kept: list[tuple[int, int]] = []
        for item in path.order:
            code = info[item[1]]
            if code >> _REFERRER_SHIFT == referrer and code & _STATE_MASK == WAITING:
                del info[item[1]]
            else:
                kept.append(item)
        path.order = kept
