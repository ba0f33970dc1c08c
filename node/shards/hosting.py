"""Shards of Cargos that are too large for this Island: room that it offers, orders that it takes, layers.

A coordinator that this Island works for may order layers of a Cargo for which it offers room, for itself or for
somebody who asked it to and whose signature it shows (node/shards/orders.py). The first order counts: until the
layers have been of no use for a while, only whoever ordered them may order others. Layers that are idle give
way to those of another Cargo that is asked for (node/shards/memory.py). What is held is written down, so that
an Island that starts again has its place in the chains without being told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path, PurePath
from typing import Final, Protocol, TypeAlias

import structlog
import trio

from cargos.catalogue import CargoEntry
from cargos.errors import CargoError
from cargos.manifest import Manifest
from cargos.progress import FetchProgress, ProgressCallback
from cargos.runtimes.base import RuntimeFailed
from cargos.runtimes.shards.base import OnEvent, StageRuntime, StageSpec
from cargos.shards.store import Removed
from cargos.store import PieceFetcher
from node.config import EngineSettings, ShardSettings
from node.rpc import Refused
from node.shards.hosted import HostedShard, ShardState, words_of
from node.shards.kept import KeptShard, read_kept, write_kept
from node.shards.memory import ShardMemory
from node.shards.orders import RelayedOrders
from node.shards.ring import RingService
from protocol.adverts import ShardRange
from protocol.ids import PeerId
from protocol.instants import UnixNs
from protocol.limits import MIB
from protocol.ring import HoldShard, RelayedOrder, ShardHeld
from routing.chains.costs import ModelShape

#: A shard that was used so lately is in use, also between two jobs.
USED_S: Final = 60.0

#: Sessions on layers that are to go get this long to end; then their chains replace us.
DRAIN_S: Final = 60.0

#: Orders of others than this Island's coordinators may move a Cargo's layers MAX_MOVES times in so long:
#: whoever follows a coordinator can order, and loading costs more than ordering.
MOVES_S: Final = 600.0

#: Layers that could not be fetched or loaded are tried again after this long, if they are still wanted.
RETRY_S: Final = 60.0

#: How often a shard is looked at: while it loads, else, and while it drains.
_LOADING_LOOK_S: Final = 0.1
_LOOK_S: Final = 1.0

#: How soon others hear that a slot has become free here, or was taken: jobs may wait for it.
_BUSY_LOOK_S: Final = 0.25

StageOpener: TypeAlias = Callable[[StageSpec, OnEvent], AbstractAsyncContextManager[StageRuntime]]

_log = structlog.get_logger("shards")


class SliceStore(Protocol):
    """Where slices come from (cargos/shards/store.py)."""

    async def ensure(
        self,
        manifest: Manifest,
        first: int,
        last: int,
        *,
        base: PurePath | None = None,
        progress: ProgressCallback | None = None,
        fetch_pieces: PieceFetcher | None = None,
    ) -> Path:
        """The slice's GGUF. Raises CargoError."""
        ...

    async def ensure_draft(
        self,
        manifest: Manifest,
        *,
        base: PurePath | None = None,
        progress: ProgressCallback | None = None,
        fetch_pieces: PieceFetcher | None = None,
    ) -> Path | None:
        """What a head drafts with, if the Cargo names a model for it. Raises CargoError."""
        ...

    def in_use(self, path: Path) -> AbstractContextManager[None]:
        """While entered, the slice is not removed."""
        ...

    async def prune(self, limit_bytes: int) -> list[Removed]:
        """Remove what was not used lately, until the rest is within the limit. Raises CargoError."""
        ...


class ShardHost:
    """`run` until cancelled. `offer` what does not fit before. `coordinators`: who may order; `changed` is
    called when what is offered has changed, `fetched` when something came into the store.
    """

    def __init__(
        self,
        ring: RingService,
        store: SliceStore,
        opener: StageOpener,
        *,
        settings: ShardSettings,
        engine: EngineSettings,
        data_dir: Path,
        coordinators: Callable[[], Iterable[PeerId]],
        changed: Callable[[], None],
        room_mib: int,
        me: PeerId,
        unix_now: Callable[[], UnixNs],
        fetch_pieces: PieceFetcher | None = None,
        fetched: Callable[[], None] = lambda: None,
    ) -> None:
        self.shards: Final[dict[str, HostedShard]] = {}
        self._memory: Final = ShardMemory(room_mib, idle_minutes=settings.idle_minutes)
        self._relayed: Final = RelayedOrders(me, coordinators, unix_now)
        self._freed = trio.Event()
        self._ring = ring
        self._store = store
        self._opener = opener
        self._settings = settings
        self._engine = engine
        self._data_dir = data_dir
        self._coordinators = coordinators
        self._changed = changed
        self._fetch_pieces = fetch_pieces
        self._fetched = fetched
        self._kept = read_kept(data_dir)

    def offer(self, entry: CargoEntry) -> None:
        """Offer room for layers of this Cargo, and hold those that were held before."""
        manifest, settings = entry.manifest, self._settings
        sharding = manifest.sharding
        if sharding is None:
            raise ValueError(f"{manifest.name} can not be sharded")
        context = settings.context_length or manifest.context_length
        shape = ModelShape.of_sharding(sharding, slots=settings.slots, context=context)
        shard = self.shards[entry.digest] = HostedShard(entry, sharding, shape, context)
        kept = self._kept.get(entry.digest)
        if kept is not None and kept.first < kept.last <= sharding.layers:
            if shard.mib_of(kept.first, kept.last) <= self.room_of(shard):
                shard.owner = kept.owner
                self._want(shard, kept.first, kept.last)
                # From the first advert on: who seems to have room is sent elsewhere at once.
                shard.first, shard.last, shard.state = kept.first, kept.last, "fetching"
            else:
                room_mib = self._memory.room_mib
                _log.warning("held layers do not fit any more", cargo=manifest.name, room_mib=room_mib)

    def room_of(self, shard: HostedShard) -> int:
        """MiB that layers of this Cargo may take, beside what others hold, idle or not."""
        return self._memory.free_mib(shard, self.shards.values())

    def range_of(self, shard: HostedShard) -> ShardRange:
        """What the advert says."""
        load = shard.load() or shard.measured
        measured = (0, 0, 0) if load is None else (load.layer_ns, load.prefill_layer_ns, load.vocabulary_ns)
        return ShardRange(
            shard.first,
            shard.last,
            shard.layers,
            self.room_of(shard),
            *map(_three_digits, measured),
            idle=self._is_idle(shard),
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold what is wanted, until cancelled."""
        async with trio.open_nursery() as nursery:
            for shard in self.shards.values():
                nursery.start_soon(self._live, shard)
            task_status.started()

    # --- orders -----------------------------------------------------------------------------------------

    async def hold(self, peer: PeerId, order: HoldShard) -> ShardHeld:
        """Answer an order (`METHOD_HOLD`). Raises Refused."""
        await trio.lowlevel.checkpoint()
        if peer not in self._coordinators():
            raise Refused("failed", "layers are ordered by coordinators that this Island works for")
        return self._take(peer, order, relayed=False)

    async def hold_for(self, peer: PeerId, message: RelayedOrder) -> ShardHeld:
        """Answer an order that a coordinator passes on (`METHOD_HOLD_FOR`). Raises Refused."""
        await trio.lowlevel.checkpoint()
        owner, order = self._relayed.open(peer, message.envelope)
        return self._take(owner, order, relayed=owner not in self._coordinators())

    def _take(self, owner: PeerId, order: HoldShard, *, relayed: bool) -> ShardHeld:
        """Do as `owner` says, as far as others have no claim. Raises Refused."""
        shard = self.shards.get(order.cargo)
        if shard is None:
            raise Refused("failed", "no room was offered for that Cargo")
        first, last = order.first, order.last
        if not first <= last <= shard.layers:
            raise Refused("failed", f"it has {shard.layers} layers")
        if first == last:
            first = last = 0
        if (first, last) == shard.wanted and shard.state != "failed":
            return ShardHeld(*shard.wanted)
        going = self._giving_way(shard, first, last, displace=order.displace)
        if (first, last) != shard.wanted and not self._may_move(shard, owner):
            _log.info("order not followed", cargo=shard.entry.manifest.name, by=owner[-8:])
            return ShardHeld(*shard.wanted)
        if relayed:
            self._count_move(shard)
        for other in going:
            name, words = other.entry.manifest.name, words_of(*other.wanted, other.layers)
            _log.info("idle layers give way", cargo=name, layers=words, to=shard.entry.manifest.name)
            self._want(other, 0, 0)
        shard.owner = owner
        self._want(shard, first, last)
        return ShardHeld(*shard.wanted)

    def _giving_way(self, shard: HostedShard, first: int, last: int, *, displace: bool) -> list[HostedShard]:
        """Cargos whose layers go for these. Raises Refused if there is too little room all the same."""
        needed, room = shard.mib_of(first, last), self.room_of(shard)
        if needed <= room:
            return []
        now, shards = trio.current_time(), self.shards.values()
        for other in shards:
            self._in_use(other)  # notes sessions that are there now
        going = self._memory.giving_way(shard, needed, shards, now) if displace else None
        if going is None:
            raise Refused("failed", f"layers {first} to {last} take {needed} MiB, there is room for {room} MiB")
        return going

    @staticmethod
    def _count_move(shard: HostedShard) -> None:
        now, moves = trio.current_time(), shard.moves
        if len(moves) == moves.maxlen and now - moves[0] < MOVES_S:
            raise Refused("busy", "these layers were moved too often lately")
        moves.append(now)

    def _is_idle(self, shard: HostedShard) -> bool:
        return self._memory.is_idle(shard, trio.current_time())

    def _may_move(self, shard: HostedShard, peer: PeerId) -> bool:
        if shard.wanted == (0, 0) or shard.state == "failed" or shard.owner == peer:
            return True
        busy = shard.state in {"fetching", "loading"} or self._in_use(shard)
        return not busy

    def _in_use(self, shard: HostedShard) -> bool:
        if self._ring.sessions_of(shard.entry.digest):
            shard.used_at = trio.current_time()
        return trio.current_time() - shard.used_at < USED_S

    def _want(self, shard: HostedShard, first: int, last: int) -> None:
        shard.wanted = (first, last)
        shard.ordered.set()
        shard.ordered = trio.Event()
        if first < last:
            self._kept[shard.entry.digest] = KeptShard(first, last, shard.owner)
        else:
            self._kept.pop(shard.entry.digest, None)
        write_kept(self._data_dir, self._kept)
        _log.info("layers ordered", cargo=shard.entry.manifest.name, layers=words_of(first, last, shard.layers))

    # --- holding ----------------------------------------------------------------------------------------

    async def _live(self, shard: HostedShard) -> None:
        """The life of one Cargo's layers here."""
        while True:
            first, last = shard.wanted
            shard.first, shard.last = first, last
            if first == last:
                self._note(shard, "room")
                await self._until_other(shard, first, last)
                continue
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hold, shard, first, last)
                await self._until_other(shard, first, last)
                await self._drain(shard)
                nursery.cancel_scope.cancel()
            shard.runtime = None
            self._changed()

    async def _until_other(self, shard: HostedShard, first: int, last: int) -> None:
        """Return when other layers are wanted, or the same once more after they failed."""
        while True:
            ordered = shard.ordered
            if shard.wanted != (first, last):
                return
            with trio.move_on_after(RETRY_S):
                await ordered.wait()
            if shard.state == "failed":
                return

    async def _drain(self, shard: HostedShard) -> None:
        """Let sessions end. No new ones come once nobody is told of these layers."""
        shard.first, shard.last = shard.wanted
        self._note(shard, "fetching" if shard.first < shard.last else "room")
        with trio.move_on_after(DRAIN_S):
            while self._ring.sessions_of(shard.entry.digest):  # noqa: ASYNC110 - sessions have no common event
                await trio.sleep(_LOOK_S)

    async def _hold(self, shard: HostedShard, first: int, last: int) -> None:
        """Fetch, load and work on these layers, until cancelled. What fails here is shown and advertised."""
        manifest = shard.entry.manifest

        def note(progress: FetchProgress) -> None:
            shard.done_bytes, shard.total_bytes = progress.done_bytes, progress.total_bytes or 0

        self._note(shard, "fetching")
        try:
            path = await self._store.ensure(
                manifest,
                first,
                last,
                base=shard.entry.base,
                progress=note,
                fetch_pieces=self._fetch_pieces,
            )
            draft = None
            if last == shard.layers and self._settings.drafts:
                draft = await self._store.ensure_draft(
                    manifest, base=shard.entry.base, progress=note, fetch_pieces=self._fetch_pieces
                )
            self._fetched()
            await self._prune()
            spec = self._spec(shard, path, first, last, draft)
            self._note(shard, "loading")
            await self._until_it_fits(shard)
            shard.occupied = (first, last)
            with self._store.in_use(path):
                await self._run_stage(shard, spec, first, last)
        except (CargoError, RuntimeFailed) as error:
            self._note(shard, "failed", str(error))
        finally:
            shard.occupied = (0, 0)
            self._freed.set()
            self._freed = trio.Event()

    async def _until_it_fits(self, shard: HostedShard) -> None:
        """Layers that give way may have sessions to end, and a worker."""
        while not self._memory.fits_now(shard, self.shards.values()):
            await self._freed.wait()

    async def _run_stage(self, shard: HostedShard, spec: StageSpec, first: int, last: int) -> None:
        digest = shard.entry.digest
        async with self._opener(spec, self._ring.events_of(digest)) as runtime:
            shard.runtime = runtime
            try:
                await self._watch(shard, runtime, first, last)
            finally:
                shard.measured, shard.runtime = runtime.load(), None
                self._ring.let_go(digest)

    async def _prune(self) -> None:
        """Slices that were not used lately make room on the disk. That failing stops nothing."""
        limit_bytes = self._settings.disk_mib * MIB
        if not limit_bytes:
            return
        try:
            removed = await self._store.prune(limit_bytes)
        except CargoError as error:
            _log.warning("slices can not be removed", reason=str(error))
            return
        for one in removed:
            _log.info("slice removed", file=one.name, freed_mib=-(-one.freed_bytes // MIB))

    async def _watch(self, shard: HostedShard, runtime: StageRuntime, first: int, last: int) -> None:
        await runtime.ready()
        shard.ready_at = trio.current_time()
        self._ring.hold(shard.entry.digest, first, last, runtime)
        told = (0, False)
        while True:
            load = runtime.load()
            if load.state == "failed":
                raise RuntimeFailed(load.detail)
            if shard.wanted == (first, last):  # else it drains, and others are told of what comes
                self._note(shard, load.state, load.detail)
            if load.active:
                shard.used_at = trio.current_time()
            self._in_use(shard)
            if told != (telling := (load.active, self._is_idle(shard))):
                told = telling
                self._changed()
            await trio.sleep(_LOADING_LOOK_S if load.state == "loading" else _BUSY_LOOK_S)

    def _spec(self, shard: HostedShard, path: Path, first: int, last: int, draft: Path | None) -> StageSpec:
        manifest = shard.entry.manifest
        return StageSpec(
            name=manifest.name,
            path=str(path),
            first=first,
            last=last,
            layers=shard.layers,
            context_length=shard.context_length,
            chat_template=manifest.chat_template,
            system_prompt=manifest.defaults.system_prompt,
            slots=self._settings.slots,
            threads=self._engine.threads,
            draft_path=None if draft is None else str(draft),
        )

    def _note(self, shard: HostedShard, state: ShardState, detail: str = "") -> None:
        if (state, detail) == (shard.state, shard.detail):
            return
        shard.state, shard.detail = state, detail
        level = _log.warning if state == "failed" else _log.info
        level(
            "shard state",
            cargo=shard.entry.manifest.name,
            layers=words_of(shard.first, shard.last, shard.layers),
            state=state,
            detail=detail or None,
        )
        self._changed()


def _three_digits(value: int) -> int:
    """Measured times tremble; what is told changes only when it means something."""
    return int(float(f"{value:.3g}"))
