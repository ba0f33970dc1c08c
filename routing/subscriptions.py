"""Who follows which Cargo at a coordinator, what each has been told, and what is to be told next.

One push of a subscription is under way at a time. What changes meanwhile is noted (which Islands, not
what), so a slow follower gets fewer and newer pushes, and holds at most `limit` names here. A push is
repeated until it is taken; a follower that takes nothing is forgotten and finds out when it renews.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from protocol.coordination import (
    MAX_ISLANDS_PER_MESSAGE,
    CargoName,
    Follow,
    IslandsPushed,
    PushTaken,
    SeenIsland,
)
from protocol.envelope import Envelope
from protocol.instants import MICROSECOND_NS, Instant, after
from protocol.limits import KIB, MAX_RPC_BYTES
from routing.agenda import Agenda
from routing.coordinator_events import CoordinatorPolicy

P = TypeVar("P")

_NEVER: Final = Instant(0)

#: Bytes of adverts in one message; the rest of MAX_RPC_BYTES is for what stands around them, and for public
#: keys.
MAX_SHOWN_BYTES: Final = MAX_RPC_BYTES - 24 * KIB

#: An envelope's fields besides its body: key, signature, kind, numbers, and the frame of a SeenIsland.
SHOWN_OVERHEAD_BYTES: Final = 320


class Room:
    """What still fits into one message."""

    __slots__ = ("_bytes",)

    def __init__(self) -> None:
        self._bytes = MAX_SHOWN_BYTES

    def take(self, envelope: Envelope) -> bool:
        """False if it does not fit. The first one always does: an advert is smaller than a message."""
        size = len(envelope.body) + SHOWN_OVERHEAD_BYTES
        if size > self._bytes:
            return False
        self._bytes -= size
        return True


@dataclass(slots=True)
class Subscription(Generic[P]):
    """`told`: Islands that the follower knows of or will, with their public keys (`_UNTOLD`: it was not
    told yet). `dirty`: Islands to tell of. `gone`: public keys of Islands that are no longer there.
    """

    peer: P
    cargo: CargoName
    limit: int
    pushed: int
    taken: int = 0
    under_way: IslandsPushed | None = None
    tries: int = 0
    anew: bool = True
    last: Instant = _NEVER
    told: dict[P, bytes] = field(default_factory=dict["P", bytes])
    dirty: dict[P, None] = field(default_factory=dict["P", None])
    gone: dict[bytes, None] = field(default_factory=dict[bytes, None])


_Key = tuple[str, P, CargoName]
_UNTOLD: Final = b""


class Subscriptions(Generic[P]):
    """`offering`: Islands with a Cargo, in order. `show`: what is known of an Island now, None if it is gone.
    Both read the coordinator's book.
    """

    def __init__(
        self,
        policy: CoordinatorPolicy,
        offering: Callable[[CargoName], Iterator[P]],
        show: Callable[[Instant, P], SeenIsland | None],
        *,
        unix_offset_ns: int,
    ) -> None:
        self._policy: Final = policy
        self._offering: Final = offering
        self._show: Final = show
        self._unix_offset_ns: Final = unix_offset_ns
        self._by_cargo: dict[CargoName, dict[P, Subscription[P]]] = {}
        self._by_peer: dict[P, dict[CargoName, Subscription[P]]] = {}
        self._count = 0
        self._agenda: Agenda[_Key[P]] = Agenda()

    def __len__(self) -> int:
        return self._count

    def has(self, peer: P, cargo: CargoName) -> bool:
        """Whether this peer follows the Cargo."""
        return cargo in self._by_peer.get(peer, ())

    def follow(self, now: Instant, peer: P, wish: Follow) -> bool:
        """Begin or renew. False if there is no room."""
        mine = self._by_peer.get(peer, {})
        known = mine.get(wish.cargo)
        if known is None:
            if len(mine) >= self._policy.follows_per_peer or self._count >= self._policy.follows:
                return False
            # Pushes are numbered from the time in microseconds, so that a number is higher than any of an
            # earlier subscription, also before a restart of ours: followers drop what is not newer.
            first = (now + self._unix_offset_ns) // MICROSECOND_NS
            known = Subscription(peer, wish.cargo, wish.limit, first)
            self._by_peer.setdefault(peer, {})[wish.cargo] = known
            self._by_cargo.setdefault(wish.cargo, {})[peer] = known
            self._count += 1
            self._begin(now, known)
        else:
            under_way = 0 if known.under_way is None else known.under_way.push
            if wish.have not in {known.taken, under_way} or wish.limit != known.limit:
                known.limit = wish.limit
                self._begin(now, known)
        self._agenda.set(("lease", peer, wish.cargo), after(now, self._policy.follow_lease_ns))
        return True

    def unfollow(self, peer: P, cargo: CargoName) -> None:
        mine = self._by_peer.get(peer)
        if mine is None or mine.pop(cargo, None) is None:
            return
        if not mine:
            del self._by_peer[peer]
        followers = self._by_cargo[cargo]
        del followers[peer]
        if not followers:
            del self._by_cargo[cargo]
        self._count -= 1
        self._agenda.cancel(("lease", peer, cargo))
        self._agenda.cancel(("push", peer, cargo))

    def lost(self, peer: P) -> None:
        for cargo in tuple(self._by_peer.get(peer, ())):
            self.unfollow(peer, cargo)

    def changed(self, now: Instant, cargo: CargoName, island: P) -> None:
        """It appeared with this Cargo, or says something new of it."""
        for sub in self._by_cargo.get(cargo, {}).values():
            if island in sub.told or len(sub.told) < sub.limit:
                self._mark(sub, island)
                self._want_push(now, sub)

    def withdrawn(self, now: Instant, cargo: CargoName, island: P) -> None:
        """It is gone, or no longer has this Cargo."""
        for sub in self._by_cargo.get(cargo, {}).values():
            sub.dirty.pop(island, None)
            key = sub.told.pop(island, None)
            if key is None:
                continue
            if key != _UNTOLD:
                sub.gone[key] = None
            for other in self._offering(cargo):
                if other not in sub.told:
                    self._mark(sub, other)
                    break
            self._want_push(now, sub)

    def taken(self, now: Instant, peer: P, message: PushTaken) -> None:
        sub = self._by_peer.get(peer, {}).get(message.cargo)
        if sub is None or sub.under_way is None or sub.under_way.push != message.push:
            return
        sub.taken, sub.under_way, sub.tries = message.push, None, 0
        self._agenda.cancel(("push", peer, sub.cargo))
        if sub.dirty or sub.gone or sub.anew:
            self._want_push(now, sub)

    def next_wake(self) -> Instant | None:
        return self._agenda.next()

    def due(self, now: Instant) -> Iterator[tuple[P, IslandsPushed]]:
        """Pushes to send now."""
        while (key := self._agenda.pop_due(now)) is not None:
            what, peer, cargo = key
            sub = self._by_peer.get(peer, {}).get(cargo)
            if sub is None:
                continue
            if what == "lease" or sub.tries >= self._policy.push_tries:
                self.unfollow(peer, cargo)
                continue
            message = sub.under_way or self._make(now, sub)
            if message is not None:
                sub.under_way, sub.last = message, now
                sub.tries += 1
                self._agenda.set(("push", peer, cargo), after(now, self._policy.push_retry_ns))
                yield peer, message

    def _begin(self, now: Instant, sub: Subscription[P]) -> None:
        """Tell everything, as to somebody who knows nothing."""
        sub.told, sub.gone, sub.dirty = {}, {}, {}
        sub.under_way, sub.tries, sub.anew = None, 0, True
        for island in self._offering(sub.cargo):
            if len(sub.dirty) >= sub.limit:
                break
            self._mark(sub, island)
        self._want_push(now, sub)

    @staticmethod
    def _mark(sub: Subscription[P], island: P) -> None:
        sub.told.setdefault(island, _UNTOLD)
        sub.dirty[island] = None

    def _want_push(self, now: Instant, sub: Subscription[P]) -> None:
        if sub.under_way is None:
            soon = max(now, after(sub.last, self._policy.push_gap_ns))
            self._agenda.sooner(("push", sub.peer, sub.cargo), Instant(soon))

    def _make(self, now: Instant, sub: Subscription[P]) -> IslandsPushed | None:
        shown = self._take_dirty(now, sub)
        lost = tuple(sub.gone)[:MAX_ISLANDS_PER_MESSAGE]
        for key in lost:
            del sub.gone[key]
        anew, sub.anew = sub.anew, False
        if not (shown or lost or anew):
            return None
        sub.pushed += 1
        return IslandsPushed(sub.pushed, sub.cargo, shown, lost, anew)

    def _take_dirty(self, now: Instant, sub: Subscription[P]) -> tuple[SeenIsland, ...]:
        shown: list[SeenIsland] = []
        room = Room()
        for island in tuple(sub.dirty):
            seen = self._show(now, island)
            if seen is not None:
                if not room.take(seen.envelope):
                    break
                sub.told[island] = seen.envelope.issuer
                sub.gone.pop(seen.envelope.issuer, None)
                shown.append(seen)
            del sub.dirty[island]
        return tuple(shown)
