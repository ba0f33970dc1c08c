"""Room that is offered, orders that are taken, layers that are held: with a store and engines of the tests'."""

from __future__ import annotations

import io
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from rich.console import Console

import node.shards.hosting as hosting_module
import node.shards.memory as memory_module
from cargos.catalogue import CargoEntry
from cargos.errors import CargoError
from cargos.manifest import ROLE_DRAFT
from cargos.resolve import resolve_cargo
from cargos.runtimes.base import RuntimeFailed
from cargos.shards.store import Removed
from node.config import EngineSettings, ShardSettings
from node.identity import new_identity
from node.island import unix_now
from node.p2p import open_host
from node.p2p.host import plain_errors
from node.rpc import Refused
from node.shards.hosted import MAX_MOVES, share_out, whole_mib, words_of
from node.shards.hosting import ShardHost
from node.shards.kept import FILE_NAME, read_kept
from node.shards.orders import ORDER_BURST
from node.shards.ring import open_ring
from node.snapshot import CounterSnapshot, Snapshot, shard_snapshots
from node.status import render_status
from protocol.adverts import ShardRange
from protocol.envelope import Signer
from protocol.instants import UnixNs
from protocol.ring import (
    SHARD_ORDER_KIND,
    SHARD_ORDER_TTL_NS,
    HoldShard,
    RelayedOrder,
    ShardHeld,
    ShardOrder,
)

SETTINGS = ShardSettings(memory_mib=150, slots=2, context_length=512)
BOSS, OTHER, STRANGER = (new_identity().peer for _ in range(3))


@pytest.fixture(scope="module")
def entry() -> CargoEntry:
    return resolve_cargo("smollm2-135m-f16")


class Engine:
    """Opens stages; `fail` is raised by the next ones, `loaded` holds them back."""

    def __init__(self, make_stage: Any) -> None:
        self.make_stage = make_stage
        self.specs: list[Any] = []
        self.open = 0
        self.most = 0
        self.fail = ""
        self.loaded = trio.Event()
        self.loaded.set()

    @asynccontextmanager
    async def __call__(self, spec: Any, on_event: Any) -> AsyncGenerator[Any]:
        self.specs.append(spec)
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            stage = self.make_stage(spec.first, spec.last, spec.layers, on_event)
            stage.ready = self._ready
            with plain_errors():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stage.run)
                    yield stage
                    nursery.cancel_scope.cancel()
        finally:
            self.open -= 1

    async def _ready(self) -> None:
        await self.loaded.wait()
        if self.fail:
            raise RuntimeFailed(self.fail)


class Store:
    def __init__(self) -> None:
        self.fail = ""
        self.draft: Path | None = None
        self.used: list[Path] = []
        self.pruned: list[int] = []

    async def ensure_draft(self, manifest: Any, **_: Any) -> Path | None:
        await trio.lowlevel.checkpoint()
        return self.draft

    async def ensure(self, manifest: Any, first: int, last: int, **_: Any) -> Path:
        await trio.lowlevel.checkpoint()
        if self.fail:
            raise CargoError(self.fail)
        return Path(f"/{manifest.name}/{first}-{last}")

    def in_use(self, path: Path) -> AbstractContextManager[None]:
        self.used.append(path)
        return nullcontext()

    async def prune(self, limit_bytes: int) -> list[Removed]:
        await trio.lowlevel.checkpoint()
        self.pruned.append(limit_bytes)
        return [Removed("old.gguf", 1)]


class Island:
    """`at_first`: state and layers as its first advert would have them."""

    def __init__(
        self,
        host: ShardHost,
        engine: Engine,
        store: Store,
        ring: Any,
        digest: str,
        at_first: tuple[str, ShardRange],
    ) -> None:
        self.at_first = at_first
        self.host = host
        self.engine = engine
        self.store = store
        self.ring = ring
        self.digest = digest

    @property
    def shard(self) -> Any:
        return self.host.shards[self.digest]

    async def order(self, first: int, last: int, peer: str = BOSS) -> tuple[int, int]:
        held = await self.host.hold(peer, HoldShard(self.digest, first, last))  # type: ignore[arg-type]
        assert isinstance(held, ShardHeld)
        return held.first, held.last

    async def relay(
        self, first: int, last: int, *, by: Signer, sequence: int, to: str = "", through: str = BOSS
    ) -> tuple[int, int]:
        """As a coordinator passes it on."""
        order = ShardOrder(to or self.host._relayed._me, HoldShard(self.digest, first, last))  # noqa: SLF001
        expires = UnixNs(unix_now() + SHARD_ORDER_TTL_NS)
        envelope = by.seal(SHARD_ORDER_KIND, order, sequence=sequence, expires_unix_ns=expires)
        held = await self.host.hold_for(through, RelayedOrder(envelope))  # type: ignore[arg-type]
        return held.first, held.last


@pytest.fixture
def island(entry: CargoEntry, tmp_path: Path, make_stage: Any):
    @asynccontextmanager
    async def make(settings: ShardSettings = SETTINGS, *others: CargoEntry) -> AsyncGenerator[Island]:
        identity = new_identity()
        async with (
            open_host(identity) as host,
            open_ring(host, identity.signer, unix_offset_ns=10**18) as ring,
            trio.open_nursery() as nursery,
        ):
            engine, store = Engine(make_stage), Store()
            shards = ShardHost(
                ring,
                store,
                engine,
                settings=settings,
                engine=EngineSettings(threads=3),
                data_dir=tmp_path,
                coordinators=lambda: (BOSS, OTHER),
                changed=lambda: None,
                room_mib=settings.memory_mib,
                me=identity.peer,
                unix_now=unix_now,
            )
            for each in (entry, *others):
                shards.offer(each)
            at_first = (shards.shards[entry.digest].state, shards.range_of(shards.shards[entry.digest]))
            await nursery.start(shards.run)
            yield Island(shards, engine, store, ring, entry.digest, at_first)
            nursery.cancel_scope.cancel()

    return make


def test_what_fits_is_run_whole(entry: CargoEntry) -> None:
    small = resolve_cargo("smollm2-135m")
    roomy = ShardSettings(memory_mib=1000, slots=2, context_length=512)
    assert share_out([entry, small], ShardSettings()) == ([entry, small], [], 0)
    assert share_out([entry], ShardSettings(memory_mib=150, enabled=False))[0] == [entry]
    whole, shared, left = share_out([small, entry], roomy)
    assert (whole, shared) == ([small, entry], [])
    assert left == 1000 - whole_mib(small.manifest, roomy) - whole_mib(entry.manifest, roomy)
    tight = msgspec.structs.replace(roomy, memory_mib=whole_mib(entry.manifest, roomy) - 1)
    assert share_out([entry], tight) == ([], [entry], tight.memory_mib)
    # What only heads of chains draft with is not fetched by who has all of it, and takes no memory there.
    extra = msgspec.structs.replace(small.manifest.files[0], role=ROLE_DRAFT)
    drafted = msgspec.structs.replace(entry.manifest, files=(*entry.manifest.files, extra))
    assert whole_mib(drafted, roomy) == whole_mib(entry.manifest, roomy)


async def test_room_becomes_layers_and_survives_a_restart(island, until, tmp_path: Path) -> None:
    async with island() as one:
        assert one.host.range_of(one.shard) == ShardRange(0, 0, 30, 150)
        assert one.shard.words == "room for layers of 30"
        assert await one.order(20, 30) == (20, 30)
        await until(lambda: one.shard.state == "ready")
        (spec,) = one.engine.specs
        assert (spec.first, spec.last, spec.layers, spec.is_head) == (20, 30, 30, True)
        assert (spec.slots, spec.context_length, spec.threads) == (2, 512, 3)
        assert spec.system_prompt
        told = one.host.range_of(one.shard)
        assert (told.first, told.last, told.layer_ns, told.prefill_layer_ns, told.vocabulary_ns) == (
            20,
            30,
            1000,
            100,
            500,
        )
        held = one.ring.held(one.digest)
        assert (held.first, held.last) == (20, 30)
    assert one.engine.open == 0
    async with island() as again:
        # Before anything has run: who seems to have room now is ordered elsewhere at once.
        state, told = again.at_first
        assert (state, told.first, told.last) == ("fetching", 20, 30)
        await until(lambda: again.shard.state == "ready")
        assert (again.shard.first, again.shard.last, again.shard.owner) == (20, 30, BOSS)
        assert await again.order(5, 5) == (0, 0)
        await until(lambda: again.shard.state == "room" and not again.engine.open)
        assert again.ring.held(again.digest) is None
    assert read_kept(tmp_path) == {}
    (tmp_path / FILE_NAME).write_text('{"x": {"first": -1}}')
    async with island() as damaged:
        assert damaged.shard.state == "room"


async def test_heads_draft_with_the_model_that_their_cargo_names(island, until) -> None:
    drafts_off = msgspec.structs.replace(SETTINGS, drafts=False)
    for settings, (first, last), given in (
        (SETTINGS, (0, 10), None),
        (SETTINGS, (20, 30), "/draft.gguf"),
        (drafts_off, (20, 30), None),
    ):
        async with island(settings) as one:
            one.store.draft = Path("/draft.gguf")
            assert await one.order(first, last) == (first, last)
            await until(lambda one=one: one.shard.state == "ready")
            assert one.engine.specs[-1].draft_path == given
            await one.order(5, 5)


async def test_who_may_order_and_what(island) -> None:
    async with island() as one:
        with pytest.raises(Refused, match="coordinators"):
            await one.order(0, 5, STRANGER)
        with pytest.raises(Refused, match="30 layers"):
            await one.order(0, 31)
        with pytest.raises(Refused, match="30 layers"):
            await one.order(7, 5)
        with pytest.raises(Refused, match="room for 150 MiB"):
            await one.order(0, 29)
        with pytest.raises(Refused, match="no room"):
            await one.host.hold(BOSS, HoldShard("sha256:" + "0" * 64, 0, 5))
        assert not one.engine.specs


async def test_the_first_order_counts(island, until, monkeypatch) -> None:
    async with island() as one:
        one.engine.loaded = trio.Event()
        assert await one.order(0, 10) == (0, 10)
        await until(lambda: one.shard.state == "loading")
        assert await one.order(10, 20, OTHER) == (0, 10)  # being loaded for somebody else
        assert await one.order(0, 10, OTHER) == (0, 10)
        assert await one.order(10, 20) == (10, 20)  # who ordered it may think again
        await until(lambda: one.shard.first == 10 and one.shard.state == "loading")
        one.engine.loaded.set()
        await until(lambda: one.shard.state == "ready")
        one.shard.used_at = trio.current_time()
        assert await one.order(0, 10, OTHER) == (10, 20)  # in use a moment ago
        monkeypatch.setattr(hosting_module, "USED_S", -1.0)
        assert await one.order(0, 10, OTHER) == (0, 10)
        await until(lambda: one.shard.state == "ready" and one.shard.first == 0)
        assert one.engine.open == 1
        assert one.shard.owner == OTHER


async def test_sessions_end_before_layers_go(island, until, monkeypatch) -> None:
    monkeypatch.setattr(hosting_module, "_LOOK_S", 0.01)
    async with island() as one:
        await one.order(0, 10)
        await until(lambda: one.shard.state == "ready")
        one.ring._engine_of["s" * 32] = one.digest  # noqa: SLF001 - as if a session ran
        assert await one.order(10, 20) == (10, 20)
        await until(lambda: one.shard.first == 10)
        assert one.ring.held(one.digest).first == 0
        assert one.engine.open == 1
        await trio.sleep(0.05)
        assert one.shard.state == "fetching"  # not what it holds, but what it will
        del one.ring._engine_of["s" * 32]  # noqa: SLF001
        await until(lambda: one.shard.state == "ready" and one.ring.held(one.digest).first == 10)


async def test_what_fails_is_told_and_can_be_ordered_again(island, until) -> None:
    async with island() as one:
        one.store.fail = "no source could deliver it"
        await one.order(0, 10)
        await until(lambda: one.shard.state == "failed")
        assert one.shard.detail == "no source could deliver it"
        one.store.fail = ""
        one.engine.fail = "its worker died too often"
        await one.order(0, 10, OTHER)
        await until(lambda: one.shard.detail == "its worker died too often")
        assert one.ring.held(one.digest) is None
        one.engine.fail = ""
        await one.order(0, 10)
        await until(lambda: one.shard.state == "ready")


async def test_orders_that_come_through_a_coordinator(island, until, monkeypatch) -> None:
    mine, theirs = Signer(b"m" * 32), Signer(b"t" * 32)
    async with island() as one:
        with pytest.raises(Refused, match="works for"):
            await one.relay(0, 10, by=mine, sequence=1, through=STRANGER)
        with pytest.raises(Refused, match="another Island"):
            await one.relay(0, 10, by=mine, sequence=1, to=OTHER)
        assert await one.relay(0, 10, by=mine, sequence=5) == (0, 10)
        assert await one.relay(0, 10, by=mine, sequence=5, through=OTHER) == (0, 10)  # the same, another way
        await until(lambda: one.shard.state == "ready")
        assert one.shard.owner == mine.peer
        one.shard.used_at = trio.current_time()
        assert await one.relay(10, 20, by=theirs, sequence=9) == (0, 10)  # in use, and not theirs
        assert await one.order(10, 20) == (0, 10)  # nor the coordinator's that brought it
        assert await one.relay(10, 20, by=mine, sequence=6) == (10, 20)
        with pytest.raises(Refused, match="later order"):
            await one.relay(0, 10, by=mine, sequence=5)  # brought once more by who kept it
        forged = RelayedOrder(
            msgspec.structs.replace(
                mine.seal(
                    SHARD_ORDER_KIND,
                    ShardOrder(one.host._relayed._me, HoldShard(one.digest, 0, 5)),  # noqa: SLF001
                    sequence=7,
                    expires_unix_ns=UnixNs(unix_now() + SHARD_ORDER_TTL_NS),
                ),
                sequence=8,
            )
        )
        with pytest.raises(Refused, match="signature"):
            await one.host.hold_for(BOSS, forged)
        monkeypatch.setattr(hosting_module, "USED_S", -1.0)
        await until(lambda: one.shard.state == "ready")
        assert await one.relay(0, 10, by=theirs, sequence=10) == (0, 10)
        for sequence in range(11, 11 + MAX_MOVES - 3):
            at = sequence % 2 * 10
            assert await one.relay(at, at + 10, by=theirs, sequence=sequence) == (at, at + 10)
        with pytest.raises(Refused, match="too often"):
            await one.relay(0, 5, by=theirs, sequence=100)
        await until(lambda: one.shard.state == "ready")
        assert await one.order(0, 5) == (0, 5)  # its coordinators are its own choice


async def test_strangers_orders_are_metered(island) -> None:
    async with island() as one:
        signer = Signer(b"m" * 32)
        with pytest.raises(Refused, match="at a time"):  # noqa: PT012 - one of many
            for sequence in range(1, 2 * ORDER_BURST):
                await one.relay(0, 5, by=signer, sequence=sequence)
        assert await one.relay(0, 5, by=signer, sequence=100, through=OTHER) == (0, 5)


async def test_idle_layers_give_way_to_a_cargo_that_is_asked_for(island, until, monkeypatch) -> None:
    monkeypatch.setattr(hosting_module, "_LOOK_S", 0.01)
    monkeypatch.setattr(memory_module, "UNUSED_S", 3600.0)
    other = resolve_cargo("gemma3-270m")
    async with island(msgspec.structs.replace(SETTINGS, memory_mib=250), other) as one:
        host, gemma = one.host, one.host.shards[other.digest]
        assert await one.order(0, 10) == (0, 10)
        await until(lambda: one.shard.state == "ready")
        free = host.room_of(gemma)
        assert free == 250 - one.shard.mib_of(0, 10)
        last = next(n for n in range(1, 19) if gemma.mib_of(0, n) > free)
        order = HoldShard(other.digest, 0, last, displace=True)
        assert not host.range_of(one.shard).idle
        with pytest.raises(Refused, match="room for"):
            await host.hold(BOSS, order)  # a moment ago
        monkeypatch.setattr(memory_module, "UNUSED_S", 0.0)
        await until(lambda: host.range_of(one.shard).idle)
        assert one.shard.state == "ready"  # idle, and nobody wants the memory
        with pytest.raises(Refused, match="room for"):
            await host.hold(BOSS, msgspec.structs.replace(order, displace=False))
        one.ring._engine_of["s" * 32] = one.digest  # noqa: SLF001 - a session begins
        with pytest.raises(Refused, match="room for"):
            await host.hold(BOSS, order)
        del one.ring._engine_of["s" * 32]  # noqa: SLF001
        one.shard.used_at = float("-inf")
        open_before = one.engine.open
        assert await host.hold(OTHER, order) == ShardHeld(0, last)
        assert one.shard.wanted == (0, 0)
        assert host.room_of(one.shard) == 250 - gemma.mib_of(0, last)
        await until(lambda: gemma.state == "ready" and one.shard.state == "room")
        assert (open_before, one.engine.open) == (1, 1)
        assert one.engine.most == 1, "both had the memory at a time"
        kept = read_kept(host._data_dir)  # noqa: SLF001
        assert {digest: (each.first, each.last) for digest, each in kept.items()} == {other.digest: (0, last)}
        assert one.store.used[-1] == Path(f"/gemma3-270m/0-{last}")
        assert one.store.pruned == [SETTINGS.disk_mib << 20] * 2


async def test_layers_are_never_given_up_if_the_owner_says_so(island, until, monkeypatch) -> None:
    monkeypatch.setattr(memory_module, "UNUSED_S", 0.0)
    other = resolve_cargo("gemma3-270m")
    settings = msgspec.structs.replace(SETTINGS, idle_minutes=0, disk_mib=0)
    async with island(settings, other) as one:
        await one.order(0, 10)
        await until(lambda: one.shard.state == "ready")
        assert not one.host.range_of(one.shard).idle
        with pytest.raises(Refused, match="room for"):
            await one.host.hold(BOSS, HoldShard(other.digest, 0, 18, displace=True))
        assert one.store.pruned == []


def test_words() -> None:
    assert words_of(0, 10, 30) == "layers 0-9 of 30"
    assert words_of(29, 30, 30) == "layer 29 of 30"
    assert words_of(0, 0, 30) == "room for layers of 30"


async def test_status_says_which_layers(island, until) -> None:
    async with island() as one:
        await one.order(0, 10)
        await until(lambda: one.shard.state == "ready")
        (cargo,) = shard_snapshots(one.host)
        assert (cargo.state, cargo.shard.words) == ("ready", "layers 0-9 of 30")
        counters = CounterSnapshot(0, 0, 0, 0, 0, 0)
        shown = Snapshot("isle", "p", (), 1.0, False, (cargo,), (), (), counters)  # noqa: FBT003 - draining
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(render_status(shown, None, 0.0))
        text = console.export_text()
        assert "layers 0-9 of 30" in text
        assert "0/4" in text
        again = msgspec.json.decode(msgspec.json.encode(shown), type=Snapshot)
        assert again.cargos[0].shard.layers == 30
