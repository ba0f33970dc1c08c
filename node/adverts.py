"""What an Island says of itself to coordinators: Cargos, shards, machine, prices, hours."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, Literal

import psutil

from cargos.manifest import RuntimeType
from node.config import NodeSettings
from node.schedule import windows_of
from node.shards.hosted import HostedShard, ShardState
from node.shards.hosting import ShardHost
from node.state import HostedCargo
from protocol.adverts import (
    MAX_ADVERT_MEMORY_MIB,
    MAX_ADVERT_THREADS,
    Hardware,
    IslandAdvert,
    OfferedCargo,
)
from protocol.limits import MIB

#: Free memory changes all the time; adverts tell it in these steps, so that idle Islands say nothing new.
MEMORY_STEP_MIB: Final = 256

#: Room is as good as ready: an order may come at any time.
_SHARD_STATES: Final[Mapping[ShardState, Literal["loading", "ready", "failed"]]] = MappingProxyType(
    {"room": "ready", "fetching": "loading", "loading": "loading", "ready": "ready", "failed": "failed"}
)


class AdvertMaker:
    """What does not change while the Island runs, and how the rest is told. Raises SettingsError."""

    def __init__(self, settings: NodeSettings, runtimes: Iterable[RuntimeType], version: str) -> None:
        self._settings = settings
        self._version = version
        self._runtimes = tuple(sorted(kind.value for kind in runtimes))
        self._schedule = windows_of(settings.schedule)
        self._hardware = Hardware(
            threads=min(_threads(), MAX_ADVERT_THREADS),
            memory_mib=min(psutil.virtual_memory().total // MIB, MAX_ADVERT_MEMORY_MIB),
        )

    def advert(
        self,
        cargos: Iterable[HostedCargo],
        shards: ShardHost | None,
        *,
        draining: bool,
        addresses: tuple[str, ...],
        coordinate: int,
    ) -> IslandAdvert:
        """All of it, now."""
        settings = self._settings
        offers = [self._whole(hosted) for hosted in cargos]
        if shards is not None:
            offers += [self._shard(shards, shard) for shard in shards.shards.values()]
        free_mib = psutil.virtual_memory().available // MIB
        return IslandAdvert(
            name=settings.name,
            cargos=tuple(offers),
            region=settings.region,
            memory_mib=min(free_mib - free_mib % MEMORY_STEP_MIB, MAX_ADVERT_MEMORY_MIB),
            version=self._version,
            draining=draining,
            addresses=addresses,
            country=settings.country or settings.coordinator.country,
            hardware=self._hardware,
            runtimes=self._runtimes,
            schedule=self._schedule,
            coordinate=coordinate,
        )

    def _whole(self, hosted: HostedCargo) -> OfferedCargo:
        manifest, engine, asks = hosted.entry.manifest, self._settings.engine, self._settings.asks
        load = hosted.runtime.load() if hosted.runtime is not None else None
        failed = hosted.state == "failed"
        return OfferedCargo(
            digest=hosted.entry.digest,
            name=manifest.name,
            version=manifest.version,
            runtime=manifest.runtime.value,
            state="failed" if failed else load.state if load is not None else "loading",
            context_length=engine.context_length or manifest.context_length,
            slots=engine.slots,
            active=load.active if load is not None else 0,
            queued=load.queued if load is not None else 0,
            decode_tps=_three_digits(load.decode_tps) if load is not None else 0.0,
            prefill_tps=_three_digits(load.prefill_tps) if load is not None else 0.0,
            publisher=manifest.publisher,
            prompt_ask_ucr=asks.prompt_ucr,
            output_ask_ucr=asks.output_ucr,
            unit_ask_ucr=asks.unit_ucr,
        )

    def _shard(self, host: ShardHost, shard: HostedShard) -> OfferedCargo:
        manifest, asks = shard.entry.manifest, self._settings.asks
        load = shard.load()
        return OfferedCargo(
            digest=shard.entry.digest,
            name=manifest.name,
            version=manifest.version,
            runtime=manifest.runtime.value,
            state=_SHARD_STATES[shard.state],
            context_length=shard.context_length,
            slots=self._settings.shards.slots,
            active=load.active if load is not None else 0,
            queued=0,
            decode_tps=0.0,
            prefill_tps=0.0,
            publisher=manifest.publisher,
            prompt_ask_ucr=asks.prompt_ucr,
            output_ask_ucr=asks.output_ucr,
            unit_ask_ucr=asks.unit_ucr,
            memory_mib=min(shard.mib_of(shard.first, shard.last), MAX_ADVERT_MEMORY_MIB),
            shard=host.range_of(shard),
        )


def _threads() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _three_digits(rate: float) -> float:
    """Measured rates tremble; what is told changes only when it means something."""
    return float(f"{rate:.3g}")
