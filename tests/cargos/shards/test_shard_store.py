"""Slices in the store: of the whole file, of pieces from peers, of ranges from a server; and faults."""

import os
import time
from collections import Counter

import msgspec
import numpy as np
import pytest
import trio

from cargos.errors import CargoError, FetchFailed, SourceFailed, StoreUnusable
from cargos.manifest import CargoFile, Licence, Manifest, Needs, RuntimeType
from cargos.shards.architectures import CanNotCut
from cargos.shards.cut import cut, read_header, read_model
from cargos.shards.layout import ranges_of, sharding_of
from cargos.shards.pieces import hash_pieces, list_sha256, pieces_of_ranges
from cargos.shards.store import ShardStore
from cargos.sources import FetchSettings
from cargos.store import CargoStore

PIECE = 1 << 14


@pytest.fixture
def model(synthetic, tmp_path):
    """A model of six layers, its piece list, and a manifest whose one source is not there."""
    path = synthetic.write_model(tmp_path / "m.gguf", synthetic.Shape(layers=6, tied=False))
    hashes, sha256 = hash_pieces(path, PIECE)
    file = CargoFile(
        name="m.gguf",
        role="model",
        size_bytes=path.stat().st_size,
        sha256=sha256,
        sources=("file:m.gguf",),
        piece_bytes=PIECE,
        pieces_sha256=list_sha256(hashes),
    )
    manifest = Manifest(
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
    return path, manifest, hashes


@pytest.fixture
def shards(tmp_path):
    settings = FetchSettings(stall_timeout_s=5, connect_timeout_s=5, backoff_s=0.01, attempts=3)
    return ShardStore(CargoStore(tmp_path / "store", settings))


def with_sources(manifest, *sources):
    (file,) = manifest.files
    return msgspec.structs.replace(manifest, files=(msgspec.structs.replace(file, sources=sources),))


class Peers:
    """Has the pieces of a file but those of `lacks`."""

    def __init__(self, path, hashes, lacks=()):
        self.path, self.hashes, self.lacks = path, hashes, set(lacks)
        self.asked = Counter()

    async def __call__(self, file, wanted, pieces):
        if pieces.hashes() is None:
            await pieces.learn(self.hashes)
        with self.path.open("rb") as whole:
            for index in wanted:
                self.asked[index] += 1
                if index not in self.lacks:
                    whole.seek(index * file.piece_bytes)
                    await pieces.put(index, whole.read(file.piece_bytes))


def expected(path, tmp_path, first, last):
    cut(path, tmp_path / "expected.gguf", first, last)
    return (tmp_path / "expected.gguf").read_bytes()


async def test_of_the_whole_file(model, shards, tmp_path):
    path, manifest, _ = model
    steps = []
    got = await shards.ensure(manifest, 2, 4, base=tmp_path, progress=steps.append)
    assert got.read_bytes() == expected(path, tmp_path, 2, 4)
    states = [step.state for step in steps]
    assert "cutting" in states
    assert states[-1] == "done"
    before = got.stat().st_ino
    assert (await shards.ensure(manifest, 2, 4)).stat().st_ino == before
    got.write_bytes(b"damaged")
    again = await shards.ensure(manifest, 2, 4)
    assert again.read_bytes() == expected(path, tmp_path, 2, 4)


async def test_of_pieces_from_peers_only_those_that_are_needed(model, shards, tmp_path):
    path, manifest, hashes = model
    peers = Peers(path, hashes)
    manifest = with_sources(manifest, "pypi:no-such-package==1/m.gguf")
    for first, last in ((2, 3), (3, 4), (0, 1), (5, 6)):
        got = await shards.ensure(manifest, first, last, fetch_pieces=peers)
        assert got.read_bytes() == expected(path, tmp_path, first, last)
        if (first, last) == (2, 3):
            needed = set(pieces_of_ranges(ranges_of(read_model(path), 2, 3), PIECE))
            assert set(peers.asked) >= needed
            assert len(peers.asked) < manifest.files[0].pieces * 2 // 3
    assert set(peers.asked.values()) == {1}, "a piece that is here is not asked for again"


async def test_peers_that_fail(model, shards, tmp_path, server):
    """What a peer does is no reason to give up; what our disk says is."""
    path, manifest, hashes = model
    server.serve("/m.gguf", path.read_bytes())
    server.serve("/m.gguf.pieces", hashes)
    manifest = with_sources(manifest, f"{server.url}/m.gguf")

    async def full(*_):
        raise StoreUnusable("the disk is full")

    with pytest.raises(StoreUnusable, match="full"):
        await shards.ensure(manifest, 2, 4, base=tmp_path, fetch_pieces=full)

    async def gone(*_):
        raise SourceFailed("no peer answers")

    got = await shards.ensure(manifest, 2, 4, base=tmp_path, fetch_pieces=gone)
    assert got.read_bytes() == expected(path, tmp_path, 2, 4)


async def test_what_peers_lack_comes_from_the_server(model, shards, tmp_path, server):
    path, manifest, hashes = model
    served = server.serve("/m.gguf", path.read_bytes())
    needed = pieces_of_ranges(ranges_of(read_model(path), 2, 4), PIECE)
    peers = Peers(path, hashes, lacks=needed[-4:-1])
    manifest = with_sources(manifest, f"{server.url}/m.gguf")
    got = await shards.ensure(manifest, 2, 4, base=tmp_path, fetch_pieces=peers)
    assert got.read_bytes() == expected(path, tmp_path, 2, 4)
    assert [request["range"] for request in served.requests] == [
        f"bytes={needed[-4] * PIECE}-{(needed[-2] + 1) * PIECE - 1}"
    ]


async def test_of_ranges_alone(model, shards, tmp_path, server):
    """The piece list lies beside the file; the server breaks off now and then."""
    path, manifest, hashes = model
    served = server.serve("/m.gguf", path.read_bytes(), cuts=[20_000, 20_000, 40_000])
    server.serve("/m.gguf.pieces", hashes)
    steps = []
    manifest = with_sources(manifest, f"{server.url}/m.gguf")
    got = await shards.ensure(manifest, 4, 5, base=tmp_path, progress=steps.append)
    assert got.read_bytes() == expected(path, tmp_path, 4, 5)
    assert served.sent_bytes < path.stat().st_size
    assert any(step.state == "downloading" and step.done_bytes for step in steps)


@pytest.mark.parametrize("fault", ["list", "piece", "no list", "no range", "other size", "slow"])
async def test_a_server_that_is_no_good(fault, model, shards, tmp_path, server):
    """Nothing wrong gets in; the whole file comes from the next source."""
    path, manifest, hashes = model
    data = path.read_bytes()
    if fault != "no list":
        server.serve("/m.gguf.pieces", hashes if fault != "list" else hashes[:-1] + b"x")
    if fault == "piece":
        server.serve("/m.gguf", bytes(len(data)))
    elif fault == "other size":
        server.serve("/m.gguf", data + b"0")
    else:
        server.serve("/m.gguf", data, ranges=fault != "no range", statuses=[503] * 9 if fault == "slow" else [])
    manifest = with_sources(manifest, f"{server.url}/m.gguf", "pypi:no-such-package-anywhere==1/m.gguf")
    if fault in ("list", "no list", "no range"):
        got = await shards.ensure(manifest, 1, 2, base=tmp_path)
        assert got.read_bytes() == expected(path, tmp_path, 1, 2)
    else:
        with pytest.raises(FetchFailed) as caught:
            await shards.ensure(manifest, 1, 2, base=tmp_path)
        assert len(caught.value.causes) >= 2
        assert not list((shards._store.root / "shards").glob("*.gguf"))


async def test_two_at_once_make_it_once(model, shards, tmp_path):
    path, manifest, hashes = model
    peers = Peers(path, hashes)
    results = []

    async def one():
        results.append(await shards.ensure(manifest, 0, 3, fetch_pieces=peers))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(one)
    assert len(set(results)) == 1
    assert set(peers.asked.values()) == {1}


async def test_a_manifest_from_elsewhere_names_no_server_here(model, shards, server, tmp_path):
    path, manifest, _ = model
    served = server.serve("/m.gguf", path.read_bytes())
    with pytest.raises(FetchFailed):
        await shards.ensure(with_sources(manifest, f"{server.url}/m.gguf"), 0, 1)
    assert not served.requests


async def test_layers_that_are_not_there(model, shards):
    _, manifest, _ = model
    for first, last in ((0, 7), (3, 3), (-1, 2), (4, 2)):
        with pytest.raises(CanNotCut, match="layers 0 to 6"):
            await shards.ensure(manifest, first, last)
    with pytest.raises(CanNotCut, match="does not say"):
        await shards.ensure(msgspec.structs.replace(manifest, sharding=None), 0, 1)


async def test_a_manifest_that_describes_another_model(model, shards, tmp_path):
    _, manifest, _ = model
    wrong = msgspec.structs.replace(manifest.sharding, width=128)
    with pytest.raises(CargoError, match="layers of 64"):
        await shards.ensure(msgspec.structs.replace(manifest, sharding=wrong), 0, 1, base=tmp_path)


async def test_removal(model, shards, tmp_path):
    _, manifest, _ = model
    kept = await shards.ensure(manifest, 0, 3, base=tmp_path)
    gone = await shards.ensure(manifest, 3, 6, base=tmp_path)
    assert shards.remove(manifest, keep=(0, 3)) > 0
    assert kept.exists()
    assert not gone.exists()
    assert (await shards.ensure(manifest, 3, 6)).exists()


async def test_a_chain_out_of_the_store_computes(model, shards, native, tmp_path):
    path, manifest, hashes = model
    peers = Peers(path, hashes)
    paths = [await shards.ensure(manifest, a, b, fetch_pieces=peers) for a, b in ((0, 2), (2, 5), (5, 6))]
    tokens = np.array([1, 270, 5, 264, 33], np.int32)
    assert np.array_equal(native.run_chain(paths, tokens, 4), native.run_chain([path], tokens, 4))
    assert read_header(paths[1]).integer("slice.of") == 6


async def test_what_a_killed_process_left_half_written_is_gone(model, shards, tmp_path):
    _, manifest, _ = model
    target = shards.path(manifest.file_with_role("model"), 1, 3)
    target.parent.mkdir(parents=True)
    left = target.with_name(f"{target.name}.999999.new")
    left.write_bytes(b"half")
    other = target.with_name(f"other.{target.name}.999999.new")
    other.write_bytes(b"somebody's")
    assert await shards.ensure(manifest, 1, 3, base=tmp_path) == target
    assert not left.exists()
    assert other.exists()  # another slice, which may be being written


async def test_old_slices_make_room_and_those_in_use_stay(model, shards, tmp_path):
    _, manifest, _ = model
    slices = [await shards.ensure(manifest, n, n + 1, base=tmp_path) for n in range(5)]
    sizes = [path.stat().st_blocks * 512 for path in slices]

    def wanted(path, hours_ago):
        at = time.time() - 3600 * hours_ago
        os.utime(path.with_suffix(".ok"), (at, at))

    assert await shards.prune(0) == []  # all were wanted a moment ago
    for hours_ago, path in enumerate(reversed(slices), 1):
        wanted(path, hours_ago)
    assert await shards.prune(sum(sizes)) == []
    with shards.in_use(slices[0]), shards.in_use(slices[0]):  # as two Islands of one machine
        removed = await shards.prune(sum(sizes) - 1)
        assert [(one.name, one.freed_bytes) for one in removed] == [(slices[1].name, sizes[1])]
        assert slices[0].exists()
    await shards.ensure(manifest, 2, 3)  # wanted again
    removed = await shards.prune(0)
    assert {one.name for one in removed} == {slices[n].name for n in (0, 3, 4)}
    left = sorted(path.name for path in slices[0].parent.iterdir())
    assert left == sorted([slices[2].name, slices[2].with_suffix(".ok").name])
    made = await shards.ensure(manifest, 0, 1, base=tmp_path)
    assert made.exists()


async def test_a_store_without_slices_has_none_to_remove(shards):
    assert await shards.prune(0) == []
