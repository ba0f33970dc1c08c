"""Whom to ask for which piece: several peers at once, rarest pieces first. Pure.

A piece goes to one peer at a time; only when nothing is left to ask for are pieces asked of a second
peer that will likely be sooner (the end of a fetch would otherwise be as slow as its slowest peer). How many
pieces are open with a peer follows from what it brings: so many that it is busy for `horizon_ns`. A peer from
which nothing comes is given up after `stall_ns`, one that sent a wrong piece for good, and what was asked of
them is asked again.

    plan.add_peer(now, peer, held)           # and `lost`, when it is gone
    ask, cancel, stalled = plan.decide(now)  # after every event, and every TICK_NS
    plan.received(now, peer, index, size)    # bytes came
    plan.arrived(now, peer, index)           # all of it; then one of:
    plan.verified(index) / plan.wrong(peer, index)

`P` is the peer type. Nothing here raises for what a remote does: calls about what was not asked are ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple, TypeVar

from protocol.dice import draw_u64
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant
from protocol.pieces import MAX_OPEN_PIECES

P = TypeVar("P", bound=Hashable)

#: `decide` is to be called at least this often while anything is open: stalls and slow ends are noticed then.
TICK_NS: Final = 250 * MILLISECOND_NS

#: Weight of a new measurement of a peer's rate: three pieces and it follows a change of the line.
_RATE_GAIN: Final = 0.3
#: What a peer of unknown rate is thought to take for a piece.
_UNKNOWN_NS: Final = SECOND_NS
#: A silent peer is expected to be silent for this many times as long again.
_SILENCE_WEIGHT: Final = 4


@dataclass(frozen=True, slots=True)
class PiecesPolicy:
    """The plan's parameters."""

    max_open_per_peer: int = MAX_OPEN_PIECES // 2
    """Half of what a holder admits: pieces that were cancelled still count there for a moment."""

    max_open: int = 64
    """Over all peers."""

    first_open: int = 2
    """Asked of a peer whose rate is not known yet."""

    horizon_ns: int = 2 * SECOND_NS
    """A peer is asked for as much as it brings in this time: round trips do not show, slow peers get little."""

    stall_ns: int = 10 * SECOND_NS
    """A peer that was asked and sends nothing for so long is given up."""

    busy_ns: int = SECOND_NS
    """A peer that says it is busy is left alone for this long, then twice as long, up to `max_busy_ns`."""

    max_busy_ns: int = 30 * SECOND_NS

    max_copies: int = 2
    """Peers that one piece is asked of at the end."""


class Ask(NamedTuple, Generic[P]):
    """Ask this peer for this piece; or, in `Decision.cancel`, tell it that it is not wanted any more."""

    peer: P
    piece: int


class Decision(NamedTuple, Generic[P]):
    """What to do now. `stalled`: peers that were given up; their streams are to be closed."""

    ask: list[Ask[P]]
    cancel: list[Ask[P]]
    stalled: list[P]


@dataclass(slots=True)
class _Holder:
    """A peer. `open`: pieces asked of it, in order. `rate`: bytes per second, 0 while unknown."""

    held: set[int]
    heard: Instant
    began: Instant
    paused_until: Instant
    open: dict[int, None] = field(default_factory=dict[int, None])
    rate: float = 0.0
    cursor: int = 0
    refusals: int = 0


class PiecesPlan(Generic[P]):
    """One fetch. `wanted`: sizes in bytes of the pieces to get, by index. `seed`: breaks ties, so that many who
    fetch the same file at the same time begin with different pieces and have something to give to each other.
    """

    def __init__(
        self,
        wanted: Mapping[int, int],
        policy: PiecesPolicy = PiecesPolicy(),  # noqa: B008 - frozen: one shared default is safe
        *,
        seed: int = 0,
    ) -> None:
        self._sizes: Final = dict(wanted)
        self._policy: Final = policy
        self._seed: Final = seed
        self._holders: dict[P, _Holder] = {}
        self._banned: set[P] = set()
        self._left: set[int] = set(wanted)
        self._asked: dict[int, set[P]] = {}  # open pieces, with whom
        self._checked: dict[int, P] = {}  # arrived, not verified yet
        self._again: dict[int, None] = {}  # asked before, in vain
        self._order: list[int] = []
        self._stale = True  # the order no longer fits the holdings
        self._cancel: list[Ask[P]] = []

    # --- how it stands ------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        return not self._left

    @property
    def left(self) -> Collection[int]:
        """Pieces not verified yet."""
        return self._left

    @property
    def banned(self) -> Collection[P]:
        """Peers that sent a wrong piece."""
        return self._banned

    @property
    def peers(self) -> Collection[P]:
        return self._holders.keys()

    def open_at(self, peer: P) -> int:
        """Pieces asked of a peer."""
        holder = self._holders.get(peer)
        return 0 if holder is None else len(holder.open)

    def rate(self, peer: P) -> int:
        """Bytes per second that the peer brings, as measured; 0: unknown."""
        holder = self._holders.get(peer)
        return 0 if holder is None else round(holder.rate)

    def useful(self, peer: P) -> bool:
        """Has the peer anything that is still wanted?"""
        holder = self._holders.get(peer)
        return holder is not None and not self._left.isdisjoint(holder.held)

    def missing(self) -> set[int]:
        """Wanted pieces that nobody here has."""
        return self._left.difference(*(holder.held for holder in self._holders.values()), self._checked)

    # --- what happens -------------------------------------------------------------------------------

    def add_peer(self, now: Instant, peer: P, held: Iterable[int]) -> None:
        """A peer that has these pieces; or one that is known says what it has now. Ignored if it is banned."""
        if peer in self._banned:
            return
        mine = self._sizes.keys() & set(held)
        holder = self._holders.get(peer)
        if holder is None:
            self._holders[peer] = _Holder(mine, now, now, now)
        elif mine == holder.held:
            return
        else:
            holder.held = mine
        self._stale = True

    def lost(self, peer: P) -> None:
        """The peer is gone. What was asked of it is asked of others."""
        holder = self._holders.pop(peer, None)
        if holder is None:
            return
        for index in holder.open:
            self._release(peer, index)
        self._stale = True

    def received(self, now: Instant, peer: P, index: int) -> None:
        """Some bytes of a piece came."""
        holder = self._holders.get(peer)
        if holder is not None and index in holder.open:
            holder.heard = now

    def arrived(self, now: Instant, peer: P, index: int) -> bool:
        """All bytes of a piece came. Whether it is to be checked: False if it is not wanted any more."""
        holder = self._holders.get(peer)
        if holder is None or index not in holder.open:
            return False
        elapsed = max(1, now - holder.began)
        rate = self._sizes[index] * SECOND_NS / elapsed
        holder.rate = rate if not holder.rate else holder.rate + _RATE_GAIN * (rate - holder.rate)
        holder.began = holder.heard = now
        holder.refusals = 0
        del holder.open[index]
        others = self._asked.pop(index)
        others.discard(peer)
        for other in others:
            del self._holders[other].open[index]
            self._cancel.append(Ask(other, index))
        self._checked[index] = peer
        return True

    def verified(self, index: int) -> None:
        """A piece that arrived is right, and stored."""
        if self._checked.pop(index, None) is not None:
            self._left.discard(index)

    def wrong(self, peer: P, index: int) -> None:
        """A piece that arrived is not what it should be: the peer is asked no more, ever."""
        if self._checked.get(index) == peer:
            del self._checked[index]
            self._again[index] = None
        self._banned.add(peer)
        self.lost(peer)

    def refused(self, now: Instant, peer: P, index: int, *, busy: bool) -> None:
        """The peer does not send this piece: it has it not, or it is busy and wants to be left alone."""
        holder = self._holders.get(peer)
        if holder is None or index not in holder.open:
            return
        del holder.open[index]
        self._release(peer, index)
        if busy:
            pause = min(self._policy.busy_ns << min(holder.refusals, 16), self._policy.max_busy_ns)
            if now >= holder.paused_until:
                holder.refusals += 1
                holder.paused_until = Instant(now + pause)
        else:
            holder.held.discard(index)
            self._stale = True

    def decide(self, now: Instant) -> Decision[P]:
        """What to ask, to cancel, and whom to give up."""
        stalled = [
            peer
            for peer, holder in self._holders.items()
            if holder.open and now - holder.heard >= self._policy.stall_ns
        ]
        for peer in stalled:
            self.lost(peer)
        if self._stale:
            self._sort()
        ask: list[Ask[P]] = []
        # One piece for each in turn, the fastest first: where the sum is bounded, all get a share.
        ready = sorted(
            (peer for peer, holder in self._holders.items() if now >= holder.paused_until),
            key=lambda peer: -self._holders[peer].rate,
        )
        total = sum(len(holder.open) for holder in self._holders.values())
        while ready and total < self._policy.max_open:
            before = len(ask)
            for peer in tuple(ready):
                if total >= self._policy.max_open:
                    break
                index = self._next_for(now, peer)
                if index is None:
                    ready.remove(peer)
                    continue
                ask.append(self._open(now, peer, index))
                total += 1
            if len(ask) == before:
                break
        cancel, self._cancel = self._cancel, []
        return Decision(ask, cancel, stalled)

    # --- inside -------------------------------------------------------------------------------------

    def _sort(self) -> None:
        self._stale = False
        count = dict.fromkeys(self._left, 0)
        for holder in self._holders.values():
            holder.cursor = 0
            for index in holder.held & self._left:
                count[index] += 1
        self._order = sorted(
            (index for index, holders in count.items() if holders),
            key=lambda index: (count[index], draw_u64(self._seed, 0, index)),
        )

    def _open(self, now: Instant, peer: P, index: int) -> Ask[P]:
        holder = self._holders[peer]
        if not holder.open:
            holder.heard = holder.began = now
        holder.open[index] = None
        self._asked.setdefault(index, set()).add(peer)
        self._again.pop(index, None)
        return Ask(peer, index)

    def _release(self, peer: P, index: int) -> None:
        others = self._asked[index]
        others.discard(peer)
        if not others:
            del self._asked[index]
            self._again[index] = None

    def _depth(self, holder: _Holder, size: int) -> int:
        policy = self._policy
        if not holder.rate:
            return min(policy.first_open, policy.max_open_per_peer)
        brings = holder.rate * policy.horizon_ns / SECOND_NS
        return max(1, min(policy.max_open_per_peer, round(brings / size)))

    def _next_for(self, now: Instant, peer: P) -> int | None:
        holder = self._holders[peer]
        if len(holder.open) >= self._policy.max_open_per_peer:
            return None
        index = self._fresh(holder)
        if index is not None:
            if len(holder.open) < self._depth(holder, self._sizes[index]):
                return index
            if index not in self._again:
                holder.cursor -= 1  # not now
            return None
        return self._second(now, peer, holder)

    def _fresh(self, holder: _Holder) -> int | None:
        """A piece that is asked of nobody. The cursor stands behind it."""
        for index in self._again:
            if index in holder.held:
                return index
        while holder.cursor < len(self._order):
            index = self._order[holder.cursor]
            holder.cursor += 1
            if index in holder.held and self._free(index):
                return index
        return None

    def _free(self, index: int) -> bool:
        return index in self._left and index not in self._asked and index not in self._checked

    def _second(self, now: Instant, peer: P, holder: _Holder) -> int | None:
        """At the end: a piece that another peer was asked for and this one would bring much sooner."""
        best: tuple[int, int] | None = None
        for index, others in self._asked.items():
            if peer in others or index not in holder.held or len(others) >= self._policy.max_copies:
                continue
            size = self._sizes[index]
            if len(holder.open) >= self._depth(holder, size):
                continue
            here = self._eta(now, holder, len(holder.open), size)
            there = min(self._eta_of(now, other, index, size) for other in others)
            if there > 2 * here + _UNKNOWN_NS // 2 and (best is None or there > best[0]):
                best = there, index
        return None if best is None else best[1]

    def _eta_of(self, now: Instant, peer: P, index: int, size: int) -> int:
        holder = self._holders[peer]
        return self._eta(now, holder, list(holder.open).index(index), size)

    @staticmethod
    def _eta(now: Instant, holder: _Holder, ahead: int, size: int) -> int:
        """When a piece with so many before it is here, in nanoseconds from now."""
        one_ns = round(size * SECOND_NS / holder.rate) if holder.rate else _UNKNOWN_NS
        silence_ns = now - holder.heard if holder.open else 0
        return (ahead + 1) * one_ns + _SILENCE_WEIGHT * silence_ns
