"""The real models, cut: two architectures, quantised and F16, chains of two to four, bit for bit."""

import numpy as np
import pytest
import trio

from cargos.resolve import builtin_catalogue
from cargos.shards.cut import cut, read_model
from cargos.shards.layout import balanced_stages, sharding_of
from cargos.shards.pieces import hash_pieces, list_sha256
from cargos.store import CargoStore

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who had never",
]
TOKENS = 16

pytestmark = pytest.mark.model


@pytest.fixture(scope="module", params=["smollm2-135m", "smollm2-135m-f16", "gemma3-270m"])
def real(request):
    """A shipped Cargo that can be spread: its entry and its model. Fetched if it is not in the store."""
    entry = builtin_catalogue().lookup(request.param)

    async def ensure():
        return await CargoStore().ensure(entry.manifest, base=entry.base)

    (path,) = trio.run(ensure).values()
    return entry, path


def test_the_manifest_tells_the_truth(real):
    entry, path = real
    (file,) = entry.manifest.files
    hashes, sha256 = hash_pieces(path, file.piece_bytes)
    assert (sha256, list_sha256(hashes)) == (file.sha256, file.pieces_sha256)
    assert sharding_of(read_model(path)) == entry.manifest.sharding


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_chains_equal_the_whole_model(real, stages, native, tmp_path):
    entry, path = real
    paths = []
    for first, last in balanced_stages(entry.manifest.sharding, stages):
        paths.append(tmp_path / f"{first}.gguf")
        cut(path, paths[-1], first, last)
    whole = native.Part(path, head=True)
    tokens = whole.tokenize(PROMPTS[stages - 2])
    whole.close()
    expected = native.run_chain([path], tokens, TOKENS)
    assert np.array_equal(native.run_chain(paths, tokens, TOKENS), expected)
