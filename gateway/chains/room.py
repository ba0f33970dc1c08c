"""What Islands of a contested Cargo hold of others: what of it gives way, and what there is in all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from protocol.adverts import OfferedCargo
from protocol.ids import PeerId
from routing.islands import Island

_MIB: Final = 1 << 20


def idle_bytes(island: Island[PeerId], digest: str, stays: Callable[[str], bool]) -> int:
    """What gives way to this Cargo there, once that is asked for: idle layers of others. `stays`: whether those
    of a Cargo do not, for our part.
    """
    return _MIB * sum(
        other.memory_mib
        for other in _others_held(island, digest)
        if other.shard is not None and other.shard.idle and not stays(other.digest)
    )


def elsewhere_mib(offers: Iterable[tuple[Island[PeerId], OfferedCargo]]) -> int:
    """What these Islands hold of other Cargos in part."""
    return sum(other.memory_mib for island, offered in offers for other in _others_held(island, offered.digest))


def _others_held(island: Island[PeerId], digest: str) -> Iterable[OfferedCargo]:
    return (
        other
        for other in island.advert.cargos
        if other.digest != digest and other.shard is not None and other.shard.first < other.shard.last
    )
