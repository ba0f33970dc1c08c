"""The whole way: peers of an overlay, stores on disk, slices of a model of which the source is gone."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from bench.scripted_island import ScriptedRuntime
from cargos.errors import FetchFailed
from cargos.manifest import CargoFile, Licence, Manifest, Needs, RuntimeType, canonical_json
from cargos.runtimes.base import RuntimeSpec
from cargos.shards.cut import cut, read_model
from cargos.shards.layout import ranges_of, sharding_of
from cargos.shards.pieces import hash_pieces, list_sha256, pieces_of_ranges
from cargos.shards.store import ShardStore
from cargos.sources.settings import FetchSettings
from cargos.store import CargoStore
from dht.keys import key_of_file
from node import island
from node.config import NetworkSettings, NodeSettings
from node.identity import new_identity
from node.overlay.overlay import Overlay, OverlayConfig, open_overlay
from node.p2p import Host, open_host
from node.peers import open_peers
from node.pieces.service import PiecesConfig, PieceService, open_pieces
from node.state import IslandState
from protocol.adverts import Hello
from protocol.dice import Dice

PIECE = 1 << 14


@dataclass
class Peer:
    host: Host
    overlay: Overlay
    store: CargoStore
    pieces: PieceService


@asynccontextmanager
async def peer(
    folder: Path, bootstrap: tuple[str, ...] = (), config: PiecesConfig | None = None
) -> AsyncGenerator[Peer]:
    identity = new_identity()
    store = CargoStore(folder / "store", FetchSettings(attempts=1, backoff_s=0.01, connect_timeout_s=1.0))
    async with (
        open_host(identity) as host,
        open_peers(host, hello=Hello("p", "0", ()), dice=Dice(1)) as peers,
        open_overlay(host, peers, OverlayConfig(folder, bootstrap), identity) as overlay,
        open_pieces(host, overlay, store, config or PiecesConfig()) as pieces,
    ):
        yield Peer(host, overlay, store, pieces)


@pytest.fixture
def model(synthetic, tmp_path) -> tuple[Path, Manifest]:
    """A model of six layers, and a manifest whose source refuses."""
    path = synthetic.write_model(tmp_path / "m.gguf", synthetic.Shape(layers=6, tied=False))
    hashes, sha256 = hash_pieces(path, PIECE)
    file = CargoFile(
        name="m.gguf",
        role="model",
        size_bytes=path.stat().st_size,
        sha256=sha256,
        sources=("https://127.0.0.1:1/m.gguf",),
        piece_bytes=PIECE,
        pieces_sha256=list_sha256(hashes),
    )
    return path, Manifest(
        schema=1,
        name="m",
        version="1",
        title="M",
        runtime=RuntimeType.LLMCPP,
        publisher="tests",
        licence=Licence(spdx="MIT"),
        needs=Needs(memory_mib=1),
        files=(file,),
        sharding=sharding_of(read_model(path)),
    )


async def stock(peer: Peer, path: Path, manifest: Manifest) -> None:
    """As if it had been fetched when its source was there."""
    (file,) = manifest.files
    here = msgspec.structs.replace(file, sources=(f"file:{path.name}",))
    await peer.store.ensure(msgspec.structs.replace(manifest, files=(here,)), base=path.parent)
    peer.pieces.note_change()


async def test_slices_and_files_travel_from_peer_to_peer_without_a_source(model, tmp_path, until) -> None:
    path, manifest = model
    (file,) = manifest.files
    needed = len(pieces_of_ranges([(0, 1), *ranges_of(read_model(path), 2, 4)], PIECE))
    cut(path, tmp_path / "expected.gguf", 2, 4)
    expected = (tmp_path / "expected.gguf").read_bytes()
    with trio.fail_after(120):
        async with peer(tmp_path / "b") as b:
            entry = (b.host.addresses[0],)
            async with peer(tmp_path / "a", entry) as a:
                await stock(a, path, manifest)
                await until(lambda: file.sha256 in a.pieces.here)
                slices = ShardStore(b.store)
                made = await slices.ensure(manifest, 2, 4, fetch_pieces=b.pieces.fetch_pieces)
                assert made.read_bytes() == expected
                # The header takes some pieces beside those of the layers, but never all.
                assert needed <= b.pieces.fetched.pieces < file.pieces
                assert a.pieces.server.counters.pieces == b.pieces.fetched.pieces
            await until(lambda: file.sha256 in b.pieces.here)
            # The only one that had all of it is gone; what is left makes the same slice, but no other one.
            async with peer(tmp_path / "c", entry) as c:
                made = await ShardStore(c.store).ensure(manifest, 2, 4, fetch_pieces=c.pieces.fetch_pieces)
                assert made.read_bytes() == expected
                with pytest.raises(FetchFailed, match="peers"):
                    await ShardStore(c.store).ensure(manifest, 5, 6, fetch_pieces=c.pieces.fetch_pieces)


async def test_a_file_of_a_store_is_told_to_the_overlay_for_as_long_as_it_is_there(
    model, tmp_path, until
) -> None:
    path, manifest = model
    (file,) = manifest.files
    with trio.fail_after(120):
        async with peer(tmp_path / "a") as a, peer(tmp_path / "b", (a.host.addresses[0],)) as b:
            await stock(b, path, manifest)

            async def providers() -> tuple[str, ...]:
                return (await a.overlay.find_providers(key_of_file(file.sha256))).providers

            while b.host.peer not in await providers():  # noqa: ASYNC110 - there is no event
                await trio.sleep(0.05)
            paths = await a.store.ensure(manifest, peers=a.pieces.fetch_pieces)
            assert paths["m.gguf"].read_bytes() == path.read_bytes()
            a.pieces.note_change()
            await until(lambda: file.sha256 in a.pieces.here)
            await a.store.remove(manifest.digest)
            a.pieces.note_change()
            await until(lambda: file.sha256 not in a.pieces.here)


async def test_who_does_not_serve_is_not_told_of_and_fetches_all_the_same(model, tmp_path, until) -> None:
    path, manifest = model
    (file,) = manifest.files
    with trio.fail_after(120):
        async with (
            peer(tmp_path / "a") as a,
            peer(tmp_path / "b", (a.host.addresses[0],), PiecesConfig(serve=False)) as b,
        ):
            await stock(a, path, manifest)
            await until(lambda: file.sha256 in a.pieces.here)
            await b.store.ensure(manifest, peers=b.pieces.fetch_pieces)
            assert b.store.verified_path(file) is not None
            assert not b.pieces.here
            assert b.pieces.fetched.pieces == file.pieces


async def test_an_island_goes_on_asking_until_somebody_has_its_cargo(
    model, tmp_path, until, monkeypatch
) -> None:
    path, manifest = model
    (file,) = manifest.files
    monkeypatch.setattr(island, "FETCH_AGAIN_S", 0.5)
    (tmp_path / "m.json").write_text(canonical_json(msgspec.structs.replace(manifest, sharding=None)))
    loaded: list[str] = []

    @asynccontextmanager
    async def open_script(spec: RuntimeSpec) -> AsyncGenerator[ScriptedRuntime]:
        loaded.extend(spec.files.values())
        yield ScriptedRuntime(1000, stamp=False)

    async def ready(state: IslandState) -> None:
        states.append(state)

    states: list[IslandState] = []
    with trio.fail_after(120):
        async with peer(tmp_path / "a") as a, trio.open_nursery() as nursery:
            settings = NodeSettings(
                data_dir=str(tmp_path / "data"),
                cache_dir=str(tmp_path / "cache"),
                cargos=(str(tmp_path / "m.json"),),
                network=NetworkSettings(bootstrap=(a.host.addresses[0],)),
            )
            opener = {RuntimeType.LLMCPP: open_script}
            nursery.start_soon(partial(island.Island(settings, opener).run, ready=ready))
            await until(lambda: states)
            (hosted,) = states[0].cargos.values()
            await until(lambda: hosted.state == "failed")
            assert "no source could deliver it" in hosted.detail
            await stock(a, path, manifest)
            await until(lambda: hosted.state == "ready")
            assert hosted.detail == ""
            assert await trio.Path(loaded[0]).read_bytes() == await trio.Path(path).read_bytes()
            assert file.sha256 in a.pieces.here
            nursery.cancel_scope.cancel()
