"""What stands in the store is served; what peers bring becomes a file of the store, or the source is asked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import trio

from cargos.errors import FetchFailed, StoreUnusable
from cargos.manifest import CargoFile, Licence, Manifest, Needs, RuntimeType
from cargos.progress import FetchProgress
from cargos.shards.pieces import PieceFile, hash_pieces
from cargos.sources.settings import FetchSettings
from cargos.store import CargoStore
from node.pieces import sources
from node.pieces.sources import Shelf


def manifest_of(file: CargoFile) -> Manifest:
    return Manifest(
        schema=1,
        name="weights",
        version="1.0.0",
        title="Weights",
        runtime=RuntimeType.LLMCPP,
        publisher="test",
        licence=Licence(spdx="Apache-2.0"),
        needs=Needs(memory_mib=1),
        files=(file,),
    )


@pytest.fixture
def store(tmp_path) -> CargoStore:
    return CargoStore(tmp_path / "store", FetchSettings(attempts=1, backoff_s=0.01))


@pytest.fixture
async def stocked(store, make_whole, tmp_path) -> CargoStore:
    """The file of `make_whole(10)` is in it."""
    whole = make_whole(10)
    await trio.Path(tmp_path / "weights.bin").write_bytes(whole.data)
    file = msgspec.structs.replace(whole.file, sources=("file:weights.bin",))
    await store.ensure(manifest_of(file), base=tmp_path)
    return store


class Giver:
    """Has these pieces."""

    def __init__(self, whole, held: Sequence[int] = ()) -> None:
        self.whole = whole
        self.held = held
        self.wanted: list[tuple[int, ...]] = []

    async def __call__(self, file: CargoFile, wanted: Sequence[int], piece_file: PieceFile) -> None:
        self.wanted.append(tuple(wanted))
        await piece_file.learn(self.whole.hashes)
        for index in wanted:
            if index in self.held:
                await piece_file.put(index, self.whole.piece(index))


async def test_a_whole_file_is_served_once_its_list_is_known(stocked, make_whole) -> None:
    whole = make_whole(10)
    shelf = Shelf(stocked)
    assert shelf.open(whole.file.sha256) is None, "not looked yet"
    assert await trio.to_thread.run_sync(shelf.look) == {whole.file.sha256}
    source = shelf.open(whole.file.sha256)
    assert source is not None
    assert source.hashes() == whole.hashes
    assert source.bits() == b"\xff\x03"
    assert source.read(3 * source.piece_bytes, source.piece_bytes) == whole.piece(3)
    source.close()
    # The list is kept: the next process need not hash.
    blob = stocked.verified_path(whole.file)
    assert blob.with_suffix(".pieces").read_bytes() == whole.hashes
    await stocked.remove(manifest_of(msgspec.structs.replace(whole.file, sources=("file:weights.bin",))).digest)
    assert not blob.with_suffix(".pieces").exists()
    assert await trio.to_thread.run_sync(shelf.look) == frozenset()
    assert shelf.open(whole.file.sha256) is None


async def test_a_store_that_may_only_be_read_is_served_and_hashed_once(
    stocked, make_whole, monkeypatch
) -> None:
    whole = make_whole(10)
    hashed: list[Path] = []

    def hash_once(path, *arguments):
        hashed.append(path)
        return hash_pieces(path, *arguments)

    def refuse(*_: object) -> int:
        raise PermissionError("read-only")

    monkeypatch.setattr(sources, "hash_pieces", hash_once)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    shelf = Shelf(stocked)
    for _ in range(2):
        assert await trio.to_thread.run_sync(shelf.look) == {whole.file.sha256}
    assert len(hashed) == 1


async def test_pieces_on_their_way_are_served(store, make_whole) -> None:
    whole = make_whole(10)
    shelf = Shelf(store)
    assert shelf.know(whole.file)
    assert not shelf.know(whole.file)
    async with PieceFile.held(store.root, whole.file) as piece_file:
        await piece_file.learn(whole.hashes)
        assert await trio.to_thread.run_sync(shelf.look) == frozenset()
        await piece_file.put(4, whole.piece(4))
        assert await trio.to_thread.run_sync(shelf.look) == {whole.file.sha256}
        source = shelf.open(whole.file.sha256)
        assert source is not None
        assert source.has(4)
        assert not source.has(5)
        await piece_file.put(5, whole.piece(5))
        assert source.has(5)
        source.close()


async def test_a_manifest_with_a_wrong_word_on_pieces_makes_nothing_served(stocked, make_whole) -> None:
    whole = make_whole(10)
    wrong = msgspec.structs.replace(whole.file, pieces_sha256="0" * 64)
    shelf = Shelf(stocked)
    shelf.know(wrong)
    await trio.to_thread.run_sync(shelf.look)
    assert await trio.to_thread.run_sync(shelf.look) == {whole.file.sha256}, "the store's own manifest is right"
    source = shelf.open(whole.file.sha256)
    assert source is not None
    source.close()


async def test_what_peers_have_is_not_asked_of_the_source(store, make_whole) -> None:
    whole = make_whole(10)
    told: list[FetchProgress] = []
    giver = Giver(whole, range(10))
    paths = await store.ensure(manifest_of(whole.file), progress=told.append, peers=giver)
    assert hashlib.sha256(await trio.Path(paths["weights.bin"]).read_bytes()).hexdigest() == whole.file.sha256
    assert {progress.source for progress in told if progress.state == "downloading"} == {"peers"}
    assert told[-1].state == "done"
    assert not list((store.root / "pieces").iterdir()), "nothing is kept twice"
    assert store.verified_path(whole.file) is not None


async def test_what_peers_lack_is_named_when_the_source_fails_too_and_not_fetched_again(
    store, make_whole
) -> None:
    whole = make_whole(10)
    giver = Giver(whole, range(7))
    with pytest.raises(FetchFailed, match="no peer has 3 of the 10 pieces"):
        await store.ensure(manifest_of(whole.file), peers=giver)
    giver.held = range(10)
    await store.ensure(manifest_of(whole.file), peers=giver)
    assert giver.wanted == [tuple(range(10)), (7, 8, 9)]


@pytest.mark.parametrize("ranges", [True, False], ids=["a server that knows Range", "one that does not"])
async def test_the_source_gives_what_peers_lack(ranges, store, make_whole, server, tmp_path) -> None:
    whole = make_whole(10)
    served = server.serve("/weights.bin", whole.data, ranges=ranges)
    file = msgspec.structs.replace(whole.file, sources=(server.url + "/weights.bin",))
    await store.ensure(manifest_of(file), base=tmp_path, peers=Giver(whole, range(7)))
    assert store.verified_path(file) is not None
    lacking = file.size_bytes - 7 * file.piece_bytes
    assert (served.sent_bytes == lacking) if ranges else (served.sent_bytes >= file.size_bytes)
    assert not list((store.root / "pieces").iterdir())


async def test_a_manifest_that_contradicts_itself_gives_no_file(store, make_whole) -> None:
    whole = make_whole(10)
    lying = msgspec.structs.replace(whole.file, sha256="0" * 64)
    with pytest.raises(FetchFailed, match="wrong content"):
        await store.ensure(manifest_of(lying), peers=Giver(whole, range(10)))
    assert not list((store.root / "pieces").iterdir())
    assert store.verified_path(lying) is None


async def test_a_full_disk_is_our_own_trouble_and_comes_as_it_is(store, make_whole) -> None:
    async def fails(file: CargoFile, wanted: Sequence[int], piece_file: PieceFile) -> None:
        raise StoreUnusable("the disk is full")

    with pytest.raises(StoreUnusable, match="the disk is full"):
        await store.ensure(manifest_of(make_whole(3).file), peers=fails)


async def test_files_without_pieces_and_files_that_lie_here_are_not_asked_of_peers(
    store, make_whole, tmp_path
) -> None:
    whole = make_whole(3)
    await trio.Path(tmp_path / "weights.bin").write_bytes(whole.data)
    giver = Giver(whole)
    here = msgspec.structs.replace(whole.file, sources=("file:weights.bin",))
    await store.ensure(manifest_of(here), base=tmp_path, peers=giver)
    plain = msgspec.structs.replace(make_whole(3, seed=2).file, piece_bytes=0, pieces_sha256="")
    with pytest.raises(FetchFailed):
        await store.ensure(manifest_of(plain), peers=giver)
    assert not giver.wanted
