"""Chains of Islands as this gateway knows and wants them. Pure: adverts and answers in, orders and chains out.

For each Cargo that Islands offer to hold in part, and that none offers whole: who should hold which layers
(`routing.chains.allocation`), what was ordered and answered, whether a chain is complete; and for each job the
best chain out of what is held (`routing.chains.routes`).

A job whose head died goes on with the same chain and another head: the other stages still have what they
computed. Only its last place changes, with a higher generation. Who stands in for other dead stages is settled
in the ring itself, by the spares that the chain names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from cargos.manifest import Sharding
from gateway.chains.layout import (
    Layout,
    Offer,
    layout_of,
    middle_shape,
    possible,
    room_bytes,
    standing,
    with_few_addresses,
)
from gateway.chains.renewal import renewed
from gateway.chains.room import elsewhere_mib, idle_bytes
from gateway.chains.shortage import Shortage, shortage_of
from gateway.chains.state import ChainedCargo, Refused, Taken
from protocol.dice import Dice
from protocol.ids import CargoDigest, PeerId
from protocol.instants import SECOND_NS, Instant, after
from protocol.ring import Dtype, HoldShard, ShardHeld, StageWork
from protocol.work import Work
from routing.chains.costs import measured_layer_ns
from routing.chains.offers import held_ranges, holders_of, rooms_of
from routing.chains.plan import (
    Allocation,
    Holder,
    ModelShape,
    NoAllocation,
    Room,
    Route,
    allocate,
    route,
)
from routing.chains.rebalance import BalancePolicy, Balancer
from routing.islands import IslandBook
from routing.job_events import FULL, Ask, Assignment, Full, NotYet, StageSeen
from routing.placement import JobShape, Query, admitted, shape_of
from routing.requirements import Outlook, Requirements

#: Islands that start together should all be seen before the first layers are ordered: so long after the last
#: newcomer, but no longer than this after the first one.
SETTLE_NS: Final = SECOND_NS
MAX_SETTLE_NS: Final = 5 * SECOND_NS

#: Gateways that know a Cargo's Islands only through coordinators see the same and would all order at once, each
#: its own chain. Each waits for a drawn part of this, and most find what the first one ordered. No job waits.
STAGGER_NS: Final = 10 * SECOND_NS

#: An Island that took an order shows it in its advert within this time, or the order counts as lost.
ORDER_SHOWN_NS: Final = 20 * SECOND_NS

#: An Island that loads layers for longer than this is not waited for: 10 GB at 300 Mbit/s.
LOADING_NS: Final = 300 * SECOND_NS

#: One that did not take an order is asked again after this, doubling.
REFUSED_FIRST_NS: Final = 2 * SECOND_NS
REFUSED_MAX_NS: Final = 120 * SECOND_NS

#: How often it is looked whether a range should be joined by others: so many times while a load becomes one
#: that lasts, but at least this often.
BALANCE_NS: Final = 30 * SECOND_NS
BALANCE_LOOKS: Final = 4

#: Jobs wait for Islands that refused so often; after that it is said that there is no chain.
PATIENT_REFUSALS: Final = 3

#: A Cargo whose last job came so lately is asked for: idle layers of others may go for its chain. Consumers who
#: were told to wait have come again by then.
ASKED_NS: Final = 120 * SECOND_NS

#: Spares that are kept for each range, if there are Islands left for it.
SPARES: Final = 1

#: Weight of the newest measurement of an Island's layers: what heads say is a claim.
SPEED_WEIGHT: Final = 0.2

#: What a wanted Cargo's job looks like while nobody has asked for one.
_ANY_PROMPT: Final = 128
_ANY_OUTPUT: Final = 256

_MIB: Final = 1 << 20

RttOf = Callable[[PeerId, PeerId], int | None]


@dataclass(frozen=True, slots=True)
class Order:
    """Ask this Island to hold these layers (none if `first == last`)."""

    peer: PeerId
    hold: HoldShard


class Stepped(msgspec.Struct, frozen=True):
    """What a look at a Cargo gave. `wake`: look again then at the latest. `became_ready`: jobs may go on."""

    orders: tuple[Order, ...] = ()
    wake: Instant | None = None
    became_ready: bool = False


def _anybody(_peer: PeerId) -> bool:
    return True


class ChainBook:
    """`sharding_of`: how a Cargo's layers can be spread, from its manifest; None: not known (yet), or not at
    all. `rtt_of`: between two Islands. `me`: the gateway, whom heads answer. `ours`: whether an Island
    advertises to it.
    """

    def __init__(
        self,
        islands: IslandBook[PeerId],
        outlook: Outlook[PeerId],
        *,
        me: PeerId,
        requirements: Requirements,
        sharding_of: Callable[[str], Sharding | None],
        rtt_of: RttOf,
        dice: Dice,
        dtype: Dtype = "f16s",
        ours: Callable[[PeerId], bool] = _anybody,
        balance: BalancePolicy | None = None,
    ) -> None:
        self._islands = islands
        self._outlook = outlook
        self._me = me
        self._requirements = requirements
        self._sharding_of = sharding_of
        self._rtt_of = rtt_of
        self._dice = dice
        self._dtype: Dtype = dtype
        self._ours = ours
        self._balance_policy = balance or BalancePolicy()
        self._balance_ns = min(BALANCE_NS, self._balance_policy.smoothing_ns // BALANCE_LOOKS)
        self._cargos: dict[str, ChainedCargo] = {}

    # --- what others ask ----------------------------------------------------------------------------

    def wanted(self) -> list[str]:
        """Digests of Cargos that some Island offers in part, the one asked for last first. Others are gone."""
        shelves = self._islands.shelves
        digests = [digest for digest, shelf in shelves.items() if shelf.shards > 0]
        for digest in self._cargos.keys() - set(digests):
            del self._cargos[digest]
        return sorted(digests, key=self._asked_at, reverse=True)

    def note_asked(self, now: Instant, digest: str) -> bool:
        """A job wants it. Whether that is news that may bring it a chain."""
        cargo = self._cargos.get(digest)
        if cargo is None:
            return False
        news = not cargo.ready and not self.is_asked(now, digest)
        cargo.asked = now
        return news

    def is_asked(self, now: Instant, digest: str) -> bool:
        """Whether a job wanted it lately."""
        cargo = self._cargos.get(digest)
        return cargo is not None and cargo.asked is not None and now - cargo.asked < ASKED_NS

    def _asked_at(self, digest: str) -> int:
        cargo = self._cargos.get(digest)
        return -1 if cargo is None or cargo.asked is None else cargo.asked

    def ready_tps(self, digest: str) -> float | None:
        """Tokens/s expected of a complete chain; None: there is none."""
        cargo = self._cargos.get(digest)
        if cargo is None or not cargo.ready:
            return None
        return SECOND_NS / max(1, cargo.token_ns)

    def layout(self, digest: str) -> Layout | None:
        """The chain as it is planned or held."""
        cargo = self._cargos.get(digest)
        return None if cargo is None else cargo.layout

    def shortage(self, digest: str) -> Shortage | None:
        """Why there is no chain and none can be made of the Islands that are here; None if that is not so."""
        cargo = self._cargos.get(digest)
        return None if cargo is None else cargo.shortage

    # --- jobs ---------------------------------------------------------------------------------------

    def place(
        self, now: Instant, digest: CargoDigest, work: Work, ask: Ask[PeerId]
    ) -> Assignment[PeerId] | NotYet | Full | None:
        """A chain for the job: the one that had it with another head, or the best there is."""
        cargo, sharding = self._cargos.get(digest), self._sharding_of(digest)
        if cargo is None:
            return None
        if sharding is None:
            return cargo.progress
        job = shape_of(digest, work, ask.done)
        query = Query(job, self._outlook, ask.excluded, self._requirements)
        holders = [
            with_few_addresses(holder)
            for holder in holders_of(now, self._islands.offers(digest), query, self._layer_ns(cargo))
            if holder.peer not in ask.lost
        ]
        if ask.chain is not None and (chain := renewed(ask.chain, holders)) is not None:
            return Assignment(PeerId(chain.head.peer), chain, goes_on=True)
        found = route(
            digest,
            sharding.layers,
            holders,
            self._rtt_of,
            prompt_tokens=job.prompt_tokens,
            output_tokens=job.output_tokens,
            dtype="f32" if work.deterministic else self._dtype,
            consumer=self._me,
            dice=self._dice,
        )
        if isinstance(found, Route):
            return Assignment(PeerId(found.chain.head.peer), found.chain)
        if found.busy or (cargo.ready and ask.lost):
            return FULL  # one of those that are left out for a while may take it again, or is seen to be gone
        return cargo.progress

    def measured(self, digest: str, stages: Iterable[StageSeen]) -> None:
        """What the stages before them measured, as the head tells it."""
        cargo = self._cargos.get(digest)
        if cargo is None:
            return
        by_index = {stage.index: PeerId(stage.peer) for stage in stages if not stage.failed}
        for stage in stages:
            peer = PeerId(stage.peer)
            before = by_index.get(stage.index - 1 if stage.index else max(by_index, default=0))
            if stage.failed or before is None or peer not in cargo.known:
                continue
            work = StageWork(stage.peer, stage.index, stage.first, stage.last, stage.hop_ns)
            layer_ns = measured_layer_ns(work, self._rtt_of(before, peer))
            if layer_ns:
                known = cargo.layer_ns.get(peer, layer_ns)
                cargo.layer_ns[peer] = known + SPEED_WEIGHT * (layer_ns - known)

    # --- forming chains -----------------------------------------------------------------------------

    def step(self, now: Instant, digest: str, *, learning: bool) -> Stepped:
        """Look at a Cargo. `learning`: its manifest is being asked for."""
        cargo = self._cargos.get(digest)
        if cargo is None:
            cargo = self._cargos[digest] = ChainedCargo(balancer=Balancer(self._balance_policy))
        sharding = self._sharding_of(digest)
        offers = [
            (island, offered)
            for island, offered in self._admitted(now, CargoDigest(digest))
            if sharding is None or possible(offered, sharding)
        ]
        self._note_offers(now, cargo, offers)
        if sharding is None:
            cargo.ready = False
            cargo.layout, cargo.progress = None, NotYet() if learning else None
            return Stepped()
        wake = self._settling(now, digest, cargo)
        if wake is not None:
            cargo.progress = NotYet(0, sharding.layers)
            return Stepped(wake=wake)
        stepped = self._plan(now, digest, cargo, sharding, offers)
        moved = self._balance(now, digest, cargo, sharding, offers)
        return msgspec.structs.replace(stepped, orders=(*stepped.orders, *moved)) if moved else stepped

    def answered(self, now: Instant, digest: str, order: Order, held: ShardHeld | None) -> None:
        """An order's answer; None: it could not be asked, or refused."""
        cargo = self._cargos.get(digest)
        if cargo is None:
            return
        cargo.asking.pop(order.peer, None)
        cargo.basis = None
        if held is None or (held.first, held.last) != (order.hold.first, order.hold.last):
            cargo.balancer.refused(order.peer, stays=held is not None and held.first < held.last)
        if held is None or held.first >= held.last:
            if order.hold.first < order.hold.last:
                before = cargo.refused.get(order.peer)
                times = 1 if before is None else before.times + 1
                wait_ns = min(REFUSED_FIRST_NS << min(times - 1, 10), REFUSED_MAX_NS)
                cargo.refused[order.peer] = Refused(after(now, wait_ns), times)
            return
        cargo.taken[order.peer] = Taken(
            held.first, held.last, after(now, ORDER_SHOWN_NS), (order.hold.first, order.hold.last)
        )

    # --- inside -------------------------------------------------------------------------------------

    def _admitted(self, now: Instant, digest: CargoDigest) -> list[Offer]:
        job = JobShape(digest, _ANY_PROMPT, _ANY_OUTPUT)
        query = Query(job, self._outlook, requirements=self._requirements)
        return [
            (island, offered)
            for island, offered in self._islands.offers(digest)
            if offered.shard is not None and admitted(now, island, offered, query)
        ]

    def _note_offers(self, now: Instant, cargo: ChainedCargo, offers: Sequence[Offer]) -> None:
        """Who came and who went, and what orders became visible."""
        here = {island.peer: offered for island, offered in offers}
        for peer in here.keys() - cargo.known.keys():
            if not cargo.known:
                cargo.first_seen = now
            cargo.known[peer] = None
            cargo.newcomer = now
        for peer in cargo.known.keys() - here.keys():
            for table in (cargo.known, cargo.taken, cargo.refused, cargo.loading, cargo.layer_ns):
                table.pop(peer, None)
        for peer, offered in here.items():
            shard, taken = offered.shard, cargo.taken.get(peer)
            if shard is None:
                continue
            shown = taken is not None and (shard.first, shard.last) == (taken.first, taken.last)
            if taken is not None and (shown or taken.until <= now):
                del cargo.taken[peer]
            if shard.first < shard.last:
                cargo.refused.pop(peer, None)
            if offered.state == "loading" and shard.first < shard.last:
                cargo.loading.setdefault(peer, now)
            else:
                cargo.loading.pop(peer, None)
        for peer in [peer for peer, refused in cargo.refused.items() if refused.until + REFUSED_MAX_NS < now]:
            del cargo.refused[peer]

    def _settling(self, now: Instant, digest: str, cargo: ChainedCargo) -> Instant | None:
        if cargo.settled:
            return None
        until = min(after(cargo.newcomer, SETTLE_NS), after(cargo.first_seen, MAX_SETTLE_NS))
        if not self.is_asked(now, digest) and not any(map(self._ours, cargo.known)):
            if cargo.stagger_ns is None:
                cargo.stagger_ns = self._dice.below(STAGGER_NS)
            until = after(until, cargo.stagger_ns)
        if until <= now:
            cargo.settled = True
            return None
        return until

    def _held(self, now: Instant, cargo: ChainedCargo, offers: Sequence[Offer]) -> list[Holder[PeerId]]:
        """Ranges that are held, being loaded or taken on, by what is told; not those that take too long."""
        stuck = {peer for peer, since in cargo.loading.items() if now - since > LOADING_NS}
        shown = {holder.peer: holder for holder in held_ranges(offers, stuck | cargo.taken.keys())}
        for island, offered in offers:
            promised = self._promised(cargo, island.peer)
            if promised is not None and island.peer not in stuck:
                shown[island.peer] = Holder(
                    island.peer, *promised, slots=max(1, offered.slots), active=offered.active
                )
        return list(shown.values())

    def _promised(self, cargo: ChainedCargo, peer: PeerId) -> tuple[int, int] | None:
        taken = cargo.taken.get(peer)
        return (taken.first, taken.last) if taken is not None else cargo.asking.get(peer)

    def _rooms(
        self,
        now: Instant,
        cargo: ChainedCargo,
        offers: Sequence[Offer],
        digest: str,
        *,
        displacing: bool = False,
    ) -> list[Room[PeerId]]:
        """Room that is free, without what was promised to other Cargos meanwhile. `displacing`: with that of
        idle layers.
        """
        query = Query(
            JobShape(CargoDigest(digest), _ANY_PROMPT, _ANY_OUTPUT),
            self._outlook,
            requirements=self._requirements,
        )

        def beside(peer: PeerId) -> int:
            more = self._idle_bytes(now, peer, digest) if displacing else 0
            return more - self._promised_bytes(peer, digest)

        rooms = rooms_of(now, offers, query, self._layer_ns(cargo), beside)
        return [
            room for room in rooms if (refused := cargo.refused.get(room.peer)) is None or refused.until <= now
        ]

    def _promised_bytes(self, peer: PeerId, digest: str) -> int:
        """What this Island is to hold of other Cargos and does not show yet."""
        return sum(
            other.shape.bytes_of(*promised)
            for name, other in self._cargos.items()
            if name != digest
            and other.shape is not None
            and (promised := self._promised(other, peer)) is not None
            and promised[0] < promised[1] <= other.shape.layers
        )

    def _idle_bytes(self, now: Instant, peer: PeerId, digest: str) -> int:
        """Not a stage of a chain that jobs want here, too."""
        island = self._islands.get(peer)

        def stays(other: str) -> bool:
            layout = self.layout(other)
            return (
                layout is not None
                and self.is_asked(now, other)
                and any(stage == peer for stage, *_ in layout.stages)
            )

        return 0 if island is None else idle_bytes(island, digest, stays)

    def _spares(self, digest: str) -> int:
        """None while another Cargo's chain is still to be planned: chains come before spares."""
        undecided = any(
            other.layout is None and other.shortage is None and self._sharding_of(name) is not None
            for name, other in self._cargos.items()
            if name != digest
        )
        return 0 if undecided else SPARES

    def _plan(
        self, now: Instant, digest: str, cargo: ChainedCargo, sharding: Sharding, offers: Sequence[Offer]
    ) -> Stepped:
        held, rooms = self._held(now, cargo, offers), self._rooms(now, cargo, offers, digest)
        wider = self._rooms(now, cargo, offers, digest, displacing=True) if self.is_asked(now, digest) else []
        loaded = {
            (island.peer, shard.first, shard.last)
            for island, offered in offers
            if (shard := offered.shard) is not None and offered.state == "ready"
        }
        spares, elsewhere = self._spares(digest), elsewhere_mib(offers)
        basis = (
            spares,
            elsewhere,
            tuple((h.peer, h.first, h.last) for h in held),
            tuple((room.peer, room.room_bytes) for room in rooms),
            tuple((room.peer, room.room_bytes) for room in wider),
            frozenset(loaded),
        )
        wake = self._next_look(now, cargo)
        if basis == cargo.basis:
            return Stepped(wake=wake)
        cargo.basis = basis
        shape = cargo.shape = middle_shape(sharding, offers)
        displacing = False
        found = allocate(shape, rooms, held, self._rtt_of, spares=spares)
        if isinstance(found, NoAllocation):
            found = self._anew(cargo, shape, offers, held, rooms, spares=spares)
        if isinstance(found, NoAllocation) and wider:
            displacing = True
            found = allocate(shape, wider, held, self._rtt_of, spares=0)
            if isinstance(found, NoAllocation):
                found = self._anew(cargo, shape, offers, held, wider, spares=0)
        was_ready = cargo.ready
        if isinstance(found, NoAllocation):
            cargo.ready, cargo.layout = False, None
            free = [max(0, room_bytes(o) - self._promised_bytes(i.peer, digest)) for i, o in offers]
            cargo.shortage = shortage_of(shape, free, elsewhere)
            waiting = any(r.until > now and r.times <= PATIENT_REFUSALS for r in cargo.refused.values())
            cargo.progress = NotYet(0, sharding.layers) if waiting else None
            return Stepped(wake=wake)
        works = standing(found, shape, held, loaded, self._rtt_of)
        cargo.shortage, cargo.token_ns = None, works.cost.token_ns
        cargo.layout = layout_of(works, held, sharding.layers)
        there = [s for s in works.stages if (s.peer, s.first, s.last) in loaded]
        cargo.ready = len(there) == len(works.stages)
        done = sum(stage.last - stage.first for stage in there)
        cargo.progress = None if cargo.ready else NotYet(done, sharding.layers)
        orders = tuple(
            Order(each.peer, HoldShard(digest, each.first, each.last, displacing))
            for each in found.orders
            if each.peer not in cargo.asking
        )
        for order in orders:
            cargo.asking[order.peer] = (order.hold.first, order.hold.last)
        return Stepped(orders, wake, became_ready=cargo.ready and not was_ready)

    def _balance(
        self, now: Instant, digest: str, cargo: ChainedCargo, sharding: Sharding, offers: Sequence[Offer]
    ) -> tuple[Order, ...]:
        """Ranges that are busy for long are joined by others."""
        held = self._held(now, cargo, offers)
        cargo.balancer.watch(now, held)
        if not cargo.ready or now - cargo.balanced < self._balance_ns:
            return ()
        cargo.balanced = now
        # Who was asked just now goes there: its advert may still offer the room, or show where it was.
        ordered = cargo.asking.keys() | cargo.taken.keys()
        rooms = [room for room in self._rooms(now, cargo, offers, digest) if room.peer not in ordered]
        shape = middle_shape(sharding, offers)
        moves = cargo.balancer.moves(now, shape, rooms, held, ordered=ordered)
        if not moves:
            moves = cargo.balancer.further(now, shape, rooms, held, self._rtt_of, ordered=ordered)
        orders = tuple(Order(move.peer, HoldShard(digest, move.first, move.last)) for move in moves)
        for order in orders:
            cargo.asking[order.peer] = (order.hold.first, order.hold.last)
        return orders

    def _anew(
        self,
        cargo: ChainedCargo,
        shape: ModelShape,
        offers: Sequence[Offer],
        held: Sequence[Holder[PeerId]],
        rooms: Sequence[Room[PeerId]],
        *,
        spares: int,
    ) -> Allocation[PeerId] | NoAllocation:
        """The ranges that are held do not fit into a chain: let those go that nobody works with."""
        told = {island.peer: offered for island, offered in offers}
        busy = [
            h
            for h in held
            if h.active or h.peer in cargo.taken or h.peer in cargo.asking or h.peer in cargo.loading
        ]
        keep = {h.peer for h in busy}
        loose = [
            Room(h.peer, max(room_bytes(told[h.peer]), shape.bytes_of(h.first, h.last)), h.speed)
            for h in held
            if h.peer not in keep
        ]
        return allocate(shape, [*rooms, *loose], busy, self._rtt_of, spares=spares)

    def _next_look(self, now: Instant, cargo: ChainedCargo) -> Instant | None:
        times = [taken.until for taken in cargo.taken.values()]
        times += [refused.until for refused in cargo.refused.values() if refused.until > now]
        times += [after(since, LOADING_NS + 1) for since in cargo.loading.values()]
        return min((time for time in times if time > now), default=None)

    def _layer_ns(self, cargo: ChainedCargo) -> Callable[[PeerId], int]:
        return lambda peer: round(cargo.layer_ns.get(peer, 0))
