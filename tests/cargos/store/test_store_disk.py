"""What the store keeps, notices and forgets; the disk's own troubles."""

import hashlib
import os
from pathlib import Path

import msgspec
import pytest

from cargos.errors import CargoError, FetchFailed, StoreUnusable, WrongContent
from cargos.manifest import MAX_FILE_BYTES, ROLE_DRAFT
from cargos.store import CargoStore, default_root

MIB = 1024 * 1024


@pytest.fixture
def shop(tmp_path):
    """A folder with a manifest's files beside it."""
    folder = tmp_path / "shop"
    folder.mkdir()
    return folder


async def test_relative_and_absolute_files_are_copied(store, cargo, blob, shop, steps):
    (shop / "sub").mkdir()
    (shop / "sub" / "a.bin").write_bytes(blob(MIB, 1))
    (shop / "b.bin").write_bytes(blob(2 * MIB, 2))
    manifest = cargo(
        ("unet/a.bin", blob(MIB, 1), ["file:sub/a.bin"]),
        ("b.bin", blob(2 * MIB, 2), [f"file:{shop}/b.bin"]),
    )
    paths = await store.ensure(manifest, base=shop, progress=steps.append)
    assert {name: path.read_bytes() for name, path in paths.items()} == {
        "unet/a.bin": blob(MIB, 1),
        "b.bin": blob(2 * MIB, 2),
    }
    assert paths["unet/a.bin"].parent.parent == paths["b.bin"].parent  # one folder, as the runtime expects
    assert "copying" in {step.state for step in steps}


async def test_a_file_that_two_cargos_share_is_kept_once(store, cargo, blob, shop):
    (shop / "a").write_bytes(blob(MIB))
    one = await store.ensure(cargo(("x.gguf", blob(MIB), ["file:a"]), name="one"), base=shop)
    (shop / "a").unlink()
    two = await store.ensure(cargo(("y.gguf", blob(MIB), ["file:a"]), name="two"), base=shop)
    assert one["x.gguf"].samefile(two["y.gguf"])


async def test_one_file_of_a_cargo_alone(store, cargo, blob, shop):
    (shop / "d").write_bytes(blob(MIB))
    manifest = cargo(("draft.gguf", blob(MIB), ["file:d"]), ("m.gguf", blob(MIB, 2), ["file:gone"]))
    path = await store.ensure_file(manifest.files[0], base=shop)
    assert path.read_bytes() == blob(MIB)
    assert store.list() == []
    (shop / "d").unlink()
    assert await store.ensure_file(manifest.files[0], base=shop) == path
    with pytest.raises(FetchFailed, match="gone"):
        await store.ensure_file(manifest.files[1], base=shop)


async def test_who_runs_a_cargo_whole_leaves_its_draft(store, cargo, blob, shop):
    (shop / "m").write_bytes(blob(MIB))
    plain = cargo(("m.gguf", blob(MIB), ["file:m"]), ("small.gguf", blob(MIB, 2), ["file:d"]))
    small = msgspec.structs.replace(plain.files[1], role=ROLE_DRAFT)
    manifest = msgspec.structs.replace(plain, files=(plain.files[0], small))
    paths = await store.ensure(manifest, base=shop, drafts=False)
    assert set(paths) == {"m.gguf"}
    assert [stored.present for stored in store.list()] == [True]
    with pytest.raises(FetchFailed, match="small"):
        await store.ensure(manifest, base=shop)
    (shop / "d").write_bytes(blob(MIB, 2))
    assert set(await store.ensure(manifest, base=shop)) == {"m.gguf", "small.gguf"}


async def test_bad_local_files(store, cargo, blob, shop, leftovers):
    (shop / "short").write_bytes(blob(10))
    (shop / "other").write_bytes(blob(20, 2))
    os.mkfifo(shop / "pipe")
    for source, said in (
        ("file:none", "No such file"),
        ("file:pipe", "not a regular file"),
        ("file:sub/../../shop", "Is a directory"),
        ("file:short", "expected 20 bytes, got 10 bytes"),
        ("file:other", "wrong content: expected sha256"),
    ):
        (shop / "sub").mkdir(exist_ok=True)
        with pytest.raises(FetchFailed, match=said):
            await store.ensure(cargo(("m", blob(20), [source])), base=shop)
        assert leftovers() == []


async def test_a_manifest_from_elsewhere_may_not_read_files_here(store, cargo, blob, shop):
    (shop / "a").write_bytes(blob(10))
    with pytest.raises(FetchFailed, match="from elsewhere"):
        await store.ensure(cargo(("m", blob(10), [f"file:{shop}/a"])), base=None)


async def test_a_file_that_changed_size_is_noticed_and_fetched_again(store, cargo, blob, shop):
    (shop / "a").write_bytes(blob(MIB))
    manifest = cargo(("m", blob(MIB), ["file:a"]))
    path = (await store.ensure(manifest, base=shop))["m"]
    path.chmod(0o644)
    with path.open("ab") as file:
        file.write(b"!")
    assert (await store.ensure(manifest, base=shop))["m"].read_bytes() == blob(MIB)


async def test_a_touched_file_is_hashed_again(store, cargo, blob, shop, steps):
    (shop / "a").write_bytes(blob(MIB))
    manifest = cargo(("m", blob(MIB), ["file:a"]))
    path = (await store.ensure(manifest, base=shop))["m"]
    (shop / "a").unlink()
    os.utime(path, ns=(1, 1))
    assert (await store.ensure(manifest, base=shop, progress=steps.append))["m"].read_bytes() == blob(MIB)
    assert [step.state for step in steps] == ["checking", "done"]
    steps.clear()
    await store.ensure(manifest, base=shop, progress=steps.append)
    assert [step.state for step in steps] == ["done"]


async def test_verify_finds_what_the_cheap_check_can_not_see(store, cargo, blob, shop):
    (shop / "a").write_bytes(blob(MIB))
    manifest = cargo(("m", blob(MIB), ["file:a"]))
    path = (await store.ensure(manifest, base=shop))["m"]
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"rot")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (await store.ensure(manifest, base=shop))["m"].read_bytes() != blob(MIB)
    assert (await store.ensure(manifest, base=shop, verify=True))["m"].read_bytes() == blob(MIB)


async def test_list_and_remove_keep_shared_files(store, cargo, blob, shop, leftovers):
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        (shop / name).write_bytes(blob(MIB, seed))
    shared = ("shared", blob(MIB, 1), ["file:a"])
    one = cargo(shared, ("own", blob(MIB, 2), ["file:b"]), name="one")
    two = cargo(shared, ("own", blob(MIB, 3), ["file:c"]), name="two")
    assert store.list() == []
    for manifest in (two, one):
        await store.ensure(manifest, base=shop)
    assert [(c.manifest.name, c.digest, c.present) for c in store.list()] == [
        ("one", one.digest, True),
        ("two", two.digest, True),
    ]
    assert await store.remove(one.digest) == MIB
    assert [cargo.digest for cargo in store.list()] == [two.digest]
    assert (await store.ensure(two))["shared"].read_bytes() == blob(MIB, 1)
    assert await store.remove(two.digest) == 2 * MIB
    assert leftovers() == []
    with pytest.raises(CargoError, match="is not in"):
        await store.remove(two.digest)


async def test_list_tells_of_missing_files_and_skips_what_it_can_not_read(store, cargo, blob, shop):
    (shop / "a").write_bytes(blob(10))
    manifest = cargo(("m", blob(10), ["file:a"]))
    path = (await store.ensure(manifest, base=shop))["m"]
    path.unlink()
    assert [cargo.present for cargo in store.list()] == [False]
    assert (await store.ensure(manifest))["m"].read_bytes() == blob(10)  # linked again, not fetched
    (store.root / "cargos" / manifest.digest.removeprefix("sha256:") / "manifest.json").write_text("{}")
    assert store.list() == []


async def test_a_full_disk_is_said_clearly_and_what_came_is_kept(store, cargo, blob, shop):
    """/dev/full is a disk that is always full: writing there is the real ENOSPC."""
    (shop / "a").write_bytes(blob(2 * MIB))
    manifest = cargo(("m", blob(2 * MIB), ["file:a"]))
    (store.root / "parts").mkdir(parents=True)
    (store.root / "parts" / f"{manifest.files[0].sha256}.part").symlink_to("/dev/full")
    with pytest.raises(StoreUnusable, match=r"is full\n.*Free some space"):
        await store.ensure(manifest, base=shop)


async def test_too_little_space_is_said_before_anything_is_fetched(store, cargo, server, blob, tmp_path):
    served = server.serve("/m", b"x")
    manifest = cargo(("m", b"x", [f"{server.url}/m"]))
    import msgspec

    (file,) = manifest.files
    huge = msgspec.structs.replace(manifest, files=(msgspec.structs.replace(file, size_bytes=MAX_FILE_BYTES),))
    with pytest.raises(StoreUnusable, match=r"MiB free, 41943\d\d MiB are needed"):
        await store.ensure(huge, base=tmp_path)
    assert served.requests == []


async def test_a_store_where_nothing_can_be_written(cargo, blob, settings, tmp_path):
    manifest = cargo(("m", blob(10), ["file:a"]))
    with pytest.raises(StoreUnusable, match=r"no permission to write|Read-only"):
        await CargoStore(Path("/sys/archipelag"), settings).ensure(manifest, base=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnusable, match="ARCHI_CACHE"):
        await CargoStore(tmp_path / "file" / "store", settings).ensure(manifest, base=tmp_path)


async def test_the_first_file_stays_when_the_second_fails(store, cargo, blob, shop):
    (shop / "a").write_bytes(blob(10, 1))
    manifest = cargo(("a", blob(10, 1), ["file:a"]), ("b", blob(10, 2), ["file:b"]))
    with pytest.raises(FetchFailed, match=r"^b: no source"):
        await store.ensure(manifest, base=shop)
    assert store.list() == []
    (shop / "b").write_bytes(blob(10, 2))
    (shop / "a").unlink()
    assert set(await store.ensure(manifest, base=shop)) == {"a", "b"}


async def test_a_good_later_source_makes_up_for_wrong_content(store, cargo, blob, shop):
    (shop / "bad").write_bytes(blob(MIB, 2))
    (shop / "good").write_bytes(blob(MIB, 1))
    paths = await store.ensure(cargo(("m", blob(MIB, 1), ["file:bad", "file:good"])), base=shop)
    assert hashlib.sha256(paths["m"].read_bytes()).digest() == hashlib.sha256(blob(MIB, 1)).digest()


def test_wrong_content_is_a_source_failure_with_its_parts():
    error = WrongContent("f", "sha256 a", "sha256 b")
    assert (error.file, error.expected, error.got) == ("f", "sha256 a", "sha256 b")


def test_default_root(tmp_path):
    assert default_root({"ARCHI_CACHE": str(tmp_path), "XDG_CACHE_HOME": "/x"}) == tmp_path
    assert default_root({"XDG_CACHE_HOME": "/x"}) == Path("/x/archipelag")
    assert default_root({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache" / "archipelag"
    assert default_root({}) == Path.home() / ".cache" / "archipelag"
