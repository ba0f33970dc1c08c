"""Shards of Cargos that are too large for this Island: room that it offers, orders that it takes, layers.

A coordinator that this Island works for may order layers of a Cargo for which it offers room. The first order
counts: until the layers have been of no use for a while, only whoever ordered them may order others. What is
held is written down, so that an Island that starts again has its place in the chains without being told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Final, Literal, Protocol, TypeAlias

import structlog
import trio

from cargos.catalogue import CargoEntry
from cargos.errors import CargoError
from cargos.manifest import Manifest, Sharding
from cargos.progress import FetchProgress, ProgressCallback
from cargos.runtimes.base import RuntimeFailed
from cargos.runtimes.shards.base import OnEvent, StageLoad, StageRuntime, StageSpec
from cargos.store import PieceFetcher
from node.config import EngineSettings, ShardSettings
from node.rpc import Refused
from node.shards.kept import KeptShard, read_kept, write_kept
from node.shards.ring import RingService
from protocol.adverts import ShardRange
from protocol.ids import PeerId
from protocol.limits import MIB
from protocol.ring import HoldShard, ShardHeld
from routing.chains.costs import ModelShape

#: A shard that was used so lately is in use, also between two jobs.
USED_S: Final = 60.0

#: Sessions on layers that are to go get this long to end; then their chains replace us.
DRAIN_S: Final = 60.0

#: Layers that could not be fetched or loaded are tried again after this long, if they are still wanted.
RETRY_S: Final = 60.0

#: How often a shard is looked at: while it loads, else, and while it drains.
_LOADING_LOOK_S: Final = 0.1
_LOOK_S: Final = 1.0

#: How soon others hear that a slot has become free here, or was taken: jobs may wait for it.
_BUSY_LOOK_S: Final = 0.25

ShardState: TypeAlias = Literal["room", "fetching", "loading", "ready", "failed"]
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


def runs_whole(manifest: Manifest, settings: ShardSettings, left_mib: int) -> bool:
    """Whether the Cargo is run whole here, with `left_mib` for it and what comes after."""
    if not settings.offered or manifest.sharding is None:
        return True
    return whole_mib(manifest, settings) <= left_mib


def whole_mib(manifest: Manifest, settings: ShardSettings) -> int:
    """What a Cargo takes as a whole: its files, and the memory of its sequences."""
    sequences = 0
    if manifest.sharding is not None:
        tokens = settings.slots * (settings.context_length or manifest.context_length)
        sequences = manifest.sharding.kv_bytes * manifest.sharding.layers * tokens
    return -(-(manifest.total_bytes + sequences) // MIB)


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

    `state`: room, fetching, loading, ready, failed. `wanted`: the layers that it shall hold.
    """

    entry: CargoEntry
    sharding: Sharding
    shape: ModelShape
    context_length: int
    first: int = 0
    last: int = 0
    wanted: tuple[int, int] = (0, 0)
    owner: str = ""
    state: ShardState = "room"
    detail: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    runtime: StageRuntime | None = None
    used_at: float = float("-inf")
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
        fetch_pieces: PieceFetcher | None = None,
        fetched: Callable[[], None] = lambda: None,
    ) -> None:
        self.shards: Final[dict[str, HostedShard]] = {}
        self._ring = ring
        self._store = store
        self._opener = opener
        self._settings = settings
        self._engine = engine
        self._data_dir = data_dir
        self._coordinators = coordinators
        self._changed = changed
        self._room_mib = room_mib
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
            else:
                _log.warning("held layers do not fit any more", cargo=manifest.name, room_mib=self._room_mib)

    def room_of(self, shard: HostedShard) -> int:
        """MiB that layers of this Cargo may take, beside what others hold."""
        others = sum(
            max(other.mib_of(*other.wanted), other.mib_of(other.first, other.last))
            for other in self.shards.values()
            if other is not shard
        )
        return max(0, self._room_mib - others)

    def range_of(self, shard: HostedShard) -> ShardRange:
        """What the advert says."""
        load = shard.load() or shard.measured
        measured = (0, 0, 0) if load is None else (load.layer_ns, load.prefill_layer_ns, load.vocabulary_ns)
        return ShardRange(
            shard.first, shard.last, shard.layers, self.room_of(shard), *map(_three_digits, measured)
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
        shard = self.shards.get(order.cargo)
        if shard is None:
            raise Refused("failed", "no room was offered for that Cargo")
        first, last = order.first, order.last
        if not first <= last <= shard.layers:
            raise Refused("failed", f"it has {shard.layers} layers")
        if first == last:
            first = last = 0
        needed, room = shard.mib_of(first, last), self.room_of(shard)
        if needed > room:
            raise Refused("failed", f"layers {first} to {last} take {needed} MiB, there is room for {room} MiB")
        if (first, last) != shard.wanted and not self._may_move(shard, peer):
            _log.info("order not followed", cargo=shard.entry.manifest.name, by=peer[-8:])
        elif (first, last) != shard.wanted or shard.state == "failed":
            shard.owner = peer
            self._want(shard, first, last)
        return ShardHeld(*shard.wanted)

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
        manifest, digest = shard.entry.manifest, shard.entry.digest

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
            spec = self._spec(shard, path, first, last, draft)
            self._note(shard, "loading")
            async with self._opener(spec, self._ring.events_of(digest)) as runtime:
                shard.runtime = runtime
                try:
                    await self._watch(shard, runtime, first, last)
                finally:
                    shard.measured, shard.runtime = runtime.load(), None
                    self._ring.let_go(digest)
        except CargoError as error:
            self._note(shard, "failed", str(error))
        except RuntimeFailed as error:
            self._note(shard, "failed", str(error))

    async def _watch(self, shard: HostedShard, runtime: StageRuntime, first: int, last: int) -> None:
        await runtime.ready()
        self._ring.hold(shard.entry.digest, first, last, runtime)
        active = 0
        while True:
            load = runtime.load()
            if load.state == "failed":
                raise RuntimeFailed(load.detail)
            if shard.wanted == (first, last):  # else it drains, and others are told of what comes
                self._note(shard, load.state, load.detail)
            if load.active:
                shard.used_at = trio.current_time()
            if load.active != active:
                active = load.active
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


def words_of(first: int, last: int, layers: int) -> str:
    """For people, who count the last one in: 'layers 0-9 of 30'."""
    if first == last:
        return f"room for layers of {layers}"
    return f"layers {first}-{last - 1} of {layers}" if last - first > 1 else f"layer {first} of {layers}"


def _three_digits(value: int) -> int:
    """Measured times tremble; what is told changes only when it means something."""
    return int(float(f"{value:.3g}"))
