"""Gossip among coordinators: every live one comes to hold every item, whoever dies on the way.

Three layers, each healing the one before:
1. *Push.* A new item goes in full to the eager neighbours, at most `fan_out`. Who gets items twice from more
than
   `redundancy` neighbours prunes the slower ones, so the eager links thin out to a few trees' worth (the idea
   of Plumtree, Leitao et al. 2007, with a redundancy of two instead of one).
2. *Announce.* The other neighbours get its id, gathered for `lazy_ns`. Who has not got the item `graft_ns`
later asks
   for it and makes that link eager again. So a dead or withholding neighbour costs half a second.
3. *Compare.* Now and then a neighbour drawn at random is sent a digest. Equal stores: no answer. Otherwise sums
   by bucket, then the ids of buckets that differ, then what is missing is asked for. So a partition heals.

What a neighbour can do to us: it has a budget (`take_rate`) for everything that we did not ask for; items
are verified before they are held or passed on, so who sends an invalid one made it or does not verify; who
announces and does not deliver, or exceeds its budget, loses its place for `expelled_ns`. All queues are bounded
(`GossipPolicy`).

Generic in the peer type; messages hold none. What an item means is its opener's business.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Generic, TypeAlias, TypeVar

from protocol.dice import Dice
from protocol.envelope import CLOCK_TOLERANCE_NS
from protocol.errors import Fault, ProtocolError
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, UnixNs, after
from protocol.limits import KIB
from protocol.machine import (
    Disconnect,
    Effect,
    Emit,
    Input,
    Ordered,
    PeerLost,
    Received,
    Send,
    WakeAt,
    Woken,
)
from routing.gossip_messages import (
    MAX_IDS,
    MAX_PUSH_BYTES,
    MAX_PUSH_ITEMS,
    AddPeer,
    Compare,
    Digest,
    Expelled,
    GossipCommand,
    GossipEvent,
    GossipMessage,
    Have,
    Item,
    Learnt,
    Opener,
    Prune,
    Publish,
    Push,
    Reconsider,
    Refused,
    RemovePeer,
    Sums,
    Thin,
    Want,
)
from routing.gossip_missing import MissingItems
from routing.gossip_peers import Budget, GossipPolicy, KindPolicy, Neighbour
from routing.gossip_store import ItemStore, RecentIds, supersedes

P = TypeVar("P")

GossipEffect: TypeAlias = Effect[P, GossipMessage, GossipEvent[P]]

#: What messages cost of a neighbour's budget, besides the items they bring: the work they cause.
_DIGEST_COST: Final = 8
_SUMS_COST: Final = 8
_COMPARE_COST: Final = 32
_IDS_PER_COST: Final = 64
_WANTED_PER_COST: Final = 8

#: Payload sent in answer to one Want: half of what the send queue of a link holds.
_ANSWER_BYTES: Final = 256 * KIB

_INVALID_STRIKES: Final = 4
#: A new neighbour is compared with within this time, so that those who come at once do not do so at once.
_GREETING_NS: Final = 500 * MILLISECOND_NS
#: So many pushes in a row that came later than others': then its pushes are not needed.
_USELESS_PUSHES: Final = 4
#: A neighbour is told to prune at most this often: what was under way when it was told is not its fault.
_PRUNE_NS: Final = SECOND_NS
#: Expired items are looked for at most this often.
_EXPIRY_NS: Final = 5 * SECOND_NS
#: Comparisons that differ and bring nothing, before the next is no longer hurried: some may have got lost.
_FRUITLESS: Final = 8
_MAX_EXPELLED: Final = 4_096


class GossipMachine(Generic[P]):
    """See the module's head. `openers` by kind of item, `kinds` their bounds; items of other kinds are ignored.

    `favoured(origin)`: whose items are kept when room gets scarce. `unix_offset_ns`: civil time minus this
    machine's clock.
    """

    def __init__(
        self,
        dice: Dice,
        policy: GossipPolicy,
        openers: Mapping[str, Opener],
        kinds: Mapping[str, KindPolicy],
        *,
        favoured: Callable[[bytes], bool] = lambda _: True,
        unix_offset_ns: int = 0,
    ) -> None:
        self._dice: Final = dice
        self._policy: Final = policy
        self._openers: Final = dict(openers)
        self._kinds: Final = dict(kinds)
        self._offset_ns = unix_offset_ns
        self.store: Final = ItemStore(policy.capacity, policy.stranger_capacity, policy.per_origin, favoured)
        self._recent: Final = RecentIds(policy.recent)
        self._neighbours: dict[P, Neighbour[P]] = {}
        self._expelled: OrderedDict[P, Instant] = OrderedDict()
        self._missing: Final = MissingItems(policy, self._neighbours)
        self._greet: OrderedDict[P, None] = OrderedDict()
        self._lazy_at: Instant | None = None
        self._sync_at: Instant | None = None
        self._sync_ns = policy.sync_first_ns
        self._fruitless = 0
        self._expire_at: Instant | None = None
        self._told_wake: Instant | None = None
        self._out: list[GossipEffect[P]] = []
        self._pushes: dict[P, list[Item]] = {}

    # --- the machine ----------------------------------------------------------------------------

    def receive(
        self, now: Instant, what: Input[P, GossipMessage, GossipCommand[P]]
    ) -> Sequence[GossipEffect[P]]:
        match what:
            case Received(peer=peer, message=message):
                neighbour = self._neighbours.get(peer)
                if neighbour is not None:
                    self._take(now, neighbour, message)
            case Ordered(command=command):
                self._obey(now, command)
            case PeerLost(peer=peer):
                self._remove(peer)
            case Woken():
                pass
        self._tick(now)
        return self._flush()

    def set_clock(self, unix_offset_ns: int) -> None:
        """Civil time is so far from this machine's clock now: it was set, or the machine slept."""
        self._offset_ns = unix_offset_ns
        self._recent.clear()  # what was refused as expired, or as from the future, may be good after all
        for held in self.store:
            self._recent.count(held.id)
        self._expire_at = Instant(0) if len(self.store) else None

    def next_wake(self) -> Instant | None:
        sync_at = self._sync_at if self._neighbours else None
        times = (self._lazy_at, sync_at, self._expire_at, self._missing.next_due())
        return min((time for time in times if time is not None), default=None)

    @property
    def neighbours(self) -> tuple[P, ...]:
        return tuple(self._neighbours)

    def _obey(self, now: Instant, command: GossipCommand[P]) -> None:
        match command:
            case AddPeer(peer=peer):
                self._add(now, peer)
            case RemovePeer(peer=peer):
                self._remove(peer)
            case Publish(item=item):
                self._publish(now, item)
            case Reconsider():
                self.store.reconsider()

    def _add(self, now: Instant, peer: P) -> None:
        until = self._expelled.get(peer)
        if until is not None and until > now:
            return
        self._expelled.pop(peer, None)
        if peer in self._neighbours or len(self._neighbours) >= self._policy.max_neighbours:
            return
        policy = self._policy
        inbound = Budget.full(policy.take_rate, policy.take_burst, now)
        outbound = Budget.full(policy.push_rate, policy.push_burst, now)
        neighbour = self._neighbours[peer] = Neighbour(peer, inbound, outbound, now)
        neighbour.eager = sum(n.eager for n in self._neighbours.values()) < policy.fan_out
        self._greet[peer] = None
        greeting = after(now, self._dice.below(_GREETING_NS))
        if self._sync_at is None or greeting < self._sync_at:
            self._sync_at = greeting

    def _remove(self, peer: P) -> None:
        neighbour = self._neighbours.pop(peer, None)
        if neighbour is None:
            return
        self._greet.pop(peer, None)
        self._pushes.pop(peer, None)
        self._missing.lost(neighbour)
        if neighbour.eager and not any(n.eager for n in self._neighbours.values()):
            self._promote_one()
        if len(self._neighbours) < self._policy.min_neighbours:
            self._out.append(Emit(Thin(len(self._neighbours))))

    def _promote_one(self) -> None:
        if self._neighbours:
            self._dice.choice(tuple(self._neighbours.values())).eager = True

    def _publish(self, now: Instant, item: Item) -> None:
        try:
            opening = self._openers[item.kind](item, self._unix(now))
        except ProtocolError as error:
            self._out.append(Emit(Refused(item, error.fault, error.detail)))
            return
        if not any(n.eager for n in self._neighbours.values()):
            self._promote_one()
        item_id = item.id
        self._recent.count(item_id)
        self._hold(now, item, item_id, opening.expires_unix_ns, None)

    # --- what neighbours say --------------------------------------------------------------------

    def _take(self, now: Instant, neighbour: Neighbour[P], message: GossipMessage) -> None:
        match message:
            case Push(items=items):
                self._take_items(now, neighbour, items)
            case Have(ids=ids, missing=missing):
                if self._pays(now, neighbour, 1 + len(ids) // _IDS_PER_COST):
                    self._announced(now, neighbour, ids, missing=missing)
            case Want(ids=ids, graft=graft):
                if self._pays(now, neighbour, 1 + len(ids) // _WANTED_PER_COST):
                    self._answer(neighbour, ids)
                    if graft:
                        self._make_eager(neighbour)
            case Prune():
                if self._pays(now, neighbour, 1):
                    neighbour.eager = False
            case Digest(count=count, sum=total):
                if self._pays(now, neighbour, _DIGEST_COST) and (count, total) != self._digest():
                    neighbour.awaits_compare = True
                    self._send(neighbour.peer, Sums(self.store.sums()))
                    self._sync_soon(now)  # should this comparison get lost, the next comes soon
            case Sums(sums=sums):
                if self._pays(now, neighbour, _SUMS_COST) and neighbour.awaits_sums:
                    neighbour.awaits_sums = False
                    self._compare(now, neighbour, sums)
            case Compare(buckets=buckets, ids=ids):
                if self._pays(now, neighbour, _COMPARE_COST) and neighbour.awaits_compare:
                    neighbour.awaits_compare = False
                    self._compared(now, neighbour, buckets, ids)

    def _pays(self, now: Instant, neighbour: Neighbour[P], cost: int) -> bool:
        if neighbour.inbound.take(now, cost):
            return True
        self._strike(now, neighbour, 1, Fault.UNEXPECTED, "it sends more than its share")
        return False

    def _strike(self, now: Instant, neighbour: Neighbour[P], count: int, fault: Fault, detail: str) -> None:
        if neighbour.strike(now, count, self._policy.strike_ns) < self._policy.strikes:
            return
        peer = neighbour.peer
        if peer not in self._neighbours:
            return
        self._remove(peer)
        self._expelled[peer] = after(now, self._policy.expelled_ns)
        self._expelled.move_to_end(peer)
        if len(self._expelled) > _MAX_EXPELLED:
            self._expelled.popitem(last=False)
        self._out.append(Emit(Expelled(peer, fault, detail)))
        self._out.append(Disconnect(peer, f"gossip: {detail}"))

    # --- items ----------------------------------------------------------------------------------

    def _take_items(self, now: Instant, neighbour: Neighbour[P], items: tuple[Item, ...]) -> None:
        for item in items:
            if neighbour.peer not in self._neighbours:
                return  # expelled by an item before
            item_id = item.id
            solicited = self._missing.arrived(item_id, neighbour.peer)
            if not solicited and not self._pays(now, neighbour, 1):
                continue
            copies = self._recent.count(item_id)
            if not solicited:
                self._judge_pushes(now, neighbour, copies)
            if copies > 1:
                neighbour.lazy.pop(item_id, None)
                continue
            self._open(now, neighbour, item, item_id)

    def _open(self, now: Instant, neighbour: Neighbour[P], item: Item, item_id: int) -> None:
        standing = self.store.standing(item)
        if standing is not None and item.version < standing.item.version:
            return
        opener, kind = self._openers.get(item.kind), self._kinds.get(item.kind)
        if opener is None or kind is None:
            return  # of a newer protocol
        if len(item.payload) > kind.max_bytes:
            self._strike(
                now, neighbour, _INVALID_STRIKES, Fault.OVERSIZE, f"an item exceeds {kind.max_bytes} bytes"
            )
            return
        try:
            opening = opener(item, self._unix(now))
        except ProtocolError as error:
            if error.fault is not Fault.EXPIRED:  # clocks differ, and news travel while they expire
                self._strike(now, neighbour, _INVALID_STRIKES, error.fault, error.detail)
            return
        if standing is not None and not supersedes(item, standing.item):
            self._out.append(
                Emit(Learnt(item, opening.body))
            )  # its origin gave one number twice: let them judge
        elif self._hold(now, item, item_id, opening.expires_unix_ns, neighbour):
            self._out.append(Emit(Learnt(item, opening.body)))

    def _hold(
        self, now: Instant, item: Item, item_id: int, expires: UnixNs, source: Neighbour[P] | None
    ) -> bool:
        """Hold and pass on. False if it has expired, claims to last longer than its kind may, or finds no
        room.
        """
        left_ns = expires - self._unix(now)
        if not 0 <= left_ns <= self._kinds[item.kind].max_ttl_ns + CLOCK_TOLERANCE_NS:
            return False
        standing = self.store.standing(item)
        if standing is not None and not supersedes(item, standing.item):
            return False
        if not self.store.put(item, item_id, expires):
            return False
        self._plan_expiry(now)
        self._fruitless = 0
        for neighbour in self._neighbours.values():
            if neighbour is source:
                continue
            if neighbour.eager and neighbour.outbound.take(now, 1):
                self._pushes.setdefault(neighbour.peer, []).append(item)
            elif len(neighbour.lazy) < self._policy.max_lazy:
                neighbour.lazy[item_id] = None
                self._lazy_at = self._lazy_at or after(now, self._policy.lazy_ns)
        return True

    def _judge_pushes(self, now: Instant, neighbour: Neighbour[P], copies: int) -> None:
        """Enough others are always faster: it need not push. Who is first for some items is not silenced for
        others.
        """
        if copies <= self._policy.redundancy:
            neighbour.useless = 0
            return
        neighbour.useless += 1
        told = neighbour.pruned_at
        if neighbour.useless >= _USELESS_PUSHES and (told is None or now - told >= _PRUNE_NS):
            neighbour.useless = 0
            neighbour.pruned_at = now
            self._send(neighbour.peer, Prune())

    # --- announced and wanted -------------------------------------------------------------------

    def _announced(self, now: Instant, neighbour: Neighbour[P], ids: Iterable[int], *, missing: bool) -> None:
        unknown: list[int] = []
        for item_id in ids:
            neighbour.lazy.pop(item_id, None)
            if item_id not in self._recent and self.store.get(item_id) is None:
                unknown.append(item_id)
        self._missing.announced(now, neighbour, unknown, missing=missing)

    def _ask(self, now: Instant) -> None:
        for neighbour in self._missing.overdue(now):
            self._strike(now, neighbour, self._policy.strikes, Fault.UNEXPECTED, "it announces and withholds")
        for peer, want in self._missing.wants(now):
            self._send(peer, want)

    def _answer(self, neighbour: Neighbour[P], ids: tuple[int, ...]) -> None:
        """Send what was wanted, as much as we would ask for ourselves and a send queue holds."""
        items = self._pushes.setdefault(neighbour.peer, [])
        size = 0
        for item_id in ids[: self._policy.max_asked]:
            neighbour.lazy.pop(item_id, None)
            held = self.store.get(item_id)
            if held is not None and size < _ANSWER_BYTES:
                self._fruitless = 0
                items.append(held.item)
                size += len(held.item.payload)

    def _make_eager(self, neighbour: Neighbour[P]) -> None:
        """It wants pushes. Beyond `fan_out` another loses them, which will graft if it misses something."""
        if neighbour.eager:
            return
        eager = [n for n in self._neighbours.values() if n.eager]
        if len(eager) >= self._policy.fan_out:
            self._dice.choice(eager).eager = False
        neighbour.eager = True

    # --- comparing ------------------------------------------------------------------------------

    def _digest(self) -> tuple[int, int]:
        return len(self.store), self.store.total()

    def _sync(self, now: Instant) -> None:
        """Compare with a newcomer, or with anyone; next time later if nothing is found missing."""
        if not self._neighbours:
            self._sync_at = None
            return
        if self._greet:
            peer, _ = self._greet.popitem(last=False)
        else:
            peer = self._dice.choice(tuple(self._neighbours))
        self._neighbours[peer].awaits_sums = True
        self._send(peer, Digest(*self._digest()))
        if self._greet:
            self._sync_at = after(now, self._dice.below(_GREETING_NS))
            return
        self._plan_sync(now)
        self._sync_ns = min(self._policy.sync_max_ns, 2 * self._sync_ns)

    def _plan_sync(self, now: Instant) -> None:
        half = self._sync_ns // 2
        self._sync_at = after(now, half + self._dice.below(2 * half))

    def _sync_soon(self, now: Instant) -> None:
        """Stores differ: compare again soon, unless that has brought nothing several times (what one holds,
        the other may have refused).
        """
        self._fruitless += 1
        if self._fruitless > _FRUITLESS:
            return
        if self._sync_ns > self._policy.sync_first_ns:
            self._sync_ns = self._policy.sync_first_ns
            self._plan_sync(now)

    def _compare(self, now: Instant, neighbour: Neighbour[P], sums: tuple[int, ...]) -> None:
        buckets, ids = self.store.differing(sums, self._dice.below(len(sums)))
        if not buckets:
            return
        self._sync_soon(now)
        self._send(neighbour.peer, Compare(tuple(buckets), tuple(ids)))

    def _compared(
        self, now: Instant, neighbour: Neighbour[P], buckets: tuple[int, ...], ids: tuple[int, ...]
    ) -> None:
        theirs = frozenset(ids)
        ours = self.store.ids_in(dict.fromkeys(buckets))
        lacking = tuple(item_id for item_id in ours if item_id not in theirs)[:MAX_IDS]
        if lacking:
            self._send(neighbour.peer, Have(lacking, missing=True))
        self._announced(now, neighbour, ids, missing=True)

    # --- time -----------------------------------------------------------------------------------

    def _tick(self, now: Instant) -> None:
        if self._lazy_at is not None and self._lazy_at <= now:
            self._lazy_at = None
            for neighbour in self._neighbours.values():
                if neighbour.lazy:
                    ids = tuple(item_id for item_id in neighbour.lazy if self.store.get(item_id) is not None)
                    neighbour.lazy.clear()
                    if ids:
                        self._send(neighbour.peer, Have(ids))
        if self._sync_at is not None and self._sync_at <= now:
            self._sync(now)
        if self._expire_at is not None and self._expire_at <= now:
            self.store.expire(self._unix(now))
            self._expire_at = None
            self._plan_expiry(now)
        self._ask(now)

    def _plan_expiry(self, now: Instant) -> None:
        first = self.store.next_expiry()
        if first is not None and self._expire_at is None:
            self._expire_at = max(after(now, _EXPIRY_NS), Instant(first - self._offset_ns + 1))

    def _unix(self, now: Instant) -> UnixNs:
        return UnixNs(now + self._offset_ns)

    # --- effects --------------------------------------------------------------------------------

    def _send(self, peer: P, message: GossipMessage) -> None:
        self._out.append(Send(peer, message))

    def _flush(self) -> list[GossipEffect[P]]:
        for peer, items in self._pushes.items():
            for batch in batches(items):
                self._out.append(Send(peer, Push(batch)))
        self._pushes.clear()
        out, self._out = self._out, []
        wake = self.next_wake()
        if wake is not None and wake != self._told_wake:
            out.append(WakeAt(wake))
        self._told_wake = wake
        return out


def batches(items: Iterable[Item]) -> Iterable[tuple[Item, ...]]:
    """Items in messages' worth."""
    batch: list[Item] = []
    size = 0
    for item in items:
        if batch and (len(batch) == MAX_PUSH_ITEMS or size + len(item.payload) > MAX_PUSH_BYTES):
            yield tuple(batch)
            batch, size = [], 0
        batch.append(item)
        size += len(item.payload)
    if batch:
        yield tuple(batch)
