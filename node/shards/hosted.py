"""What an Island knows of the Cargos that it holds in part, and which Cargos those are."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import trio

from cargos.catalogue import CargoEntry
from cargos.manifest import ROLE_DRAFT, Manifest, Sharding
from cargos.runtimes.shards.base import StageLoad, StageRuntime
from node.config import ShardSettings
from protocol.limits import MIB
from routing.chains.costs import ModelShape

#: Moves of one Cargo's layers that are remembered, to bound those that strangers order.
MAX_MOVES: Final = 8

ShardState: TypeAlias = Literal["room", "fetching", "loading", "ready", "failed"]


def runs_whole(manifest: Manifest, settings: ShardSettings, left_mib: int) -> bool:
    """Whether the Cargo is run whole here, with `left_mib` for it and what comes after."""
    if not settings.offered or manifest.sharding is None:
        return True
    return whole_mib(manifest, settings) <= left_mib


def whole_mib(manifest: Manifest, settings: ShardSettings) -> int:
    """What a Cargo takes as a whole: its files without drafts, and the memory of its sequences."""
    sequences = 0
    if manifest.sharding is not None:
        tokens = settings.slots * (settings.context_length or manifest.context_length)
        sequences = manifest.sharding.kv_bytes * manifest.sharding.layers * tokens
    files = sum(file.size_bytes for file in manifest.files if file.role != ROLE_DRAFT)
    return -(-(files + sequences) // MIB)


def share_out(
    entries: Iterable[CargoEntry], settings: ShardSettings
) -> tuple[list[CargoEntry], list[CargoEntry], int]:
    """Cargos that are run whole, in the order given as far as they fit; those of which layers are held; the MiB
    that are left for them.
    """
    whole: list[CargoEntry] = []
    shared: list[CargoEntry] = []
    left_mib = settings.memory_mib
    for entry in entries:
        if runs_whole(entry.manifest, settings, left_mib):
            whole.append(entry)
            left_mib = max(0, left_mib - whole_mib(entry.manifest, settings))
        else:
            shared.append(entry)
    return whole, shared, left_mib


@dataclass(slots=True, eq=False)
class HostedShard:
    """A Cargo of which this Island holds layers `first` to `last`, or (`first == last`) offers room for some.

    `state`: room, fetching, loading, ready, failed. `wanted`: the layers that it shall hold. `occupied`: those
    that take up memory now, which may still be others. `ready_at`, `used_at`: since when the layers are loaded,
    and when a session ran on them last (seconds of trio's clock). `moves`: when strangers' orders moved them.
    """

    entry: CargoEntry
    sharding: Sharding
    shape: ModelShape
    context_length: int
    first: int = 0
    last: int = 0
    wanted: tuple[int, int] = (0, 0)
    occupied: tuple[int, int] = (0, 0)
    owner: str = ""
    state: ShardState = "room"
    detail: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    runtime: StageRuntime | None = None
    ready_at: float = float("-inf")
    used_at: float = float("-inf")
    moves: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_MOVES))
    measured: StageLoad | None = None
    ordered: trio.Event = field(default_factory=trio.Event)

    @property
    def layers(self) -> int:
        return self.sharding.layers

    @property
    def words(self) -> str:
        """What is held, for people."""
        return words_of(self.first, self.last, self.layers)

    def mib_of(self, first: int, last: int) -> int:
        """What layers take up, weights and sequences."""
        return 0 if first == last else -(-self.shape.bytes_of(first, last) // MIB)

    def load(self) -> StageLoad | None:
        return None if self.runtime is None else self.runtime.load()


def words_of(first: int, last: int, layers: int) -> str:
    """For people, who count the last one in: 'layers 0-9 of 30'."""
    if first == last:
        return f"room for layers of {layers}"
    return f"layers {first}-{last - 1} of {layers}" if last - first > 1 else f"layer {first} of {layers}"
