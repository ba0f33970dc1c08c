"""Adverts, ranges and allocations in each other's terms, for the book of chains. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from cargos.manifest import Sharding
from protocol.adverts import OfferedCargo
from protocol.ids import PeerId
from routing.chains.costs import Rtt
from routing.chains.plan import Allocation, Holder, ModelShape, allocate
from routing.islands import Island

#: Addresses of an Island in a chain: four of each fit into an offer (MAX_CHAIN_BYTES).
MAX_STAGE_ADDRESSES: Final = 4

Offer: TypeAlias = tuple[Island[PeerId], OfferedCargo]


@dataclass(frozen=True, slots=True)
class Layout:
    """Who holds which layers, for people: (peer, first, last), the head last. `spares`: all others that hold
    some or were asked to.
    """

    layers: int
    stages: tuple[tuple[PeerId, int, int], ...]
    spares: tuple[tuple[PeerId, int, int], ...]

    @property
    def everybody(self) -> frozenset[tuple[PeerId, int, int]]:
        """Whoever of two equal ones counts as the spare."""
        return frozenset((*self.stages, *self.spares))


def possible(offered: OfferedCargo, sharding: Sharding) -> bool:
    """Whether there are such layers."""
    shard = offered.shard
    return shard is not None and shard.layers == sharding.layers and shard.first <= shard.last <= shard.layers


def middle_shape(sharding: Sharding, offers: Iterable[Offer]) -> ModelShape:
    """With memory for sequences as the middle one of the Islands wants it: one that exaggerates changes
    nothing. Who needs more than its room for it refuses.
    """
    wanted = sorted((o.slots * o.context_length, o.slots, o.context_length) for _, o in offers) or [(0, 0, 0)]
    _, slots, context = wanted[(len(wanted) - 1) // 2]
    return ModelShape.of_sharding(sharding, slots=max(1, slots), context=context)


def room_bytes(offered: OfferedCargo) -> int:
    return 0 if offered.shard is None else offered.shard.room_mib << 20


def layout_of(found: Allocation[PeerId], held: Sequence[Holder[PeerId]], layers: int) -> Layout:
    stages = tuple((one.peer, one.first, one.last) for one in found.stages)
    standing = {stage.peer for stage in found.stages}
    others = {(h.peer, h.first, h.last) for h in held if h.peer not in standing}
    others |= {(one.peer, one.first, one.last) for one in found.spares}
    return Layout(layers, stages, tuple(sorted(others, key=lambda row: (row[1], row[2], row[0]))))


def standing(
    found: Allocation[PeerId],
    shape: ModelShape,
    held: Sequence[Holder[PeerId]],
    loaded: Collection[tuple[PeerId, int, int]],
    rtt_of: Rtt[PeerId],
) -> Allocation[PeerId]:
    """The chain that works now: the best one, or, while some of its Islands still load, the best of those that
    do not. If there is none, the best one.
    """
    if all((stage.peer, stage.first, stage.last) in loaded for stage in found.stages):
        return found
    ready = [holder for holder in held if (holder.peer, holder.first, holder.last) in loaded]
    other = allocate(shape, (), ready, rtt_of, spares=0)
    return other if isinstance(other, Allocation) else found


def with_few_addresses(holder: Holder[PeerId]) -> Holder[PeerId]:
    if len(holder.addresses) <= MAX_STAGE_ADDRESSES:
        return holder
    return Holder(
        holder.peer,
        holder.first,
        holder.last,
        holder.speed,
        holder.slots,
        holder.active,
        holder.karma_milli,
        holder.suspect,
        holder.load_age_ns,
        holder.addresses[:MAX_STAGE_ADDRESSES],
    )
