"""Chains of slices compute what the whole model does: each architecture, by the real library."""

import numpy as np
import pytest

from cargos.runtimes.llama.native import Model
from cargos.runtimes.shards.native import StageContext
from cargos.shards.architectures import KNOWN
from cargos.shards.cut import cut
from cargos.shards.layout import stages_of

CASES = {
    "llama": {},
    "llama-untied": {"architecture": "llama", "tied": False},
    "llama-rope-freqs": {"architecture": "llama", "rope_freqs": True},
    "llama-moe": {"architecture": "llama", "experts": 4, "tied": False},
    "mistral3": {"tied": False},
    "qwen2": {},
    "qwen2-untied": {"architecture": "qwen2", "tied": False},
    "qwen2moe": {"experts": 4, "tied": False},
    "qwen3": {},
    "qwen3-untied": {"architecture": "qwen3", "tied": False},
    "qwen3moe": {"experts": 4, "tied": False},
    "gemma": {},
    "gemma2": {"window": 5},
    "gemma2-listed": {"architecture": "gemma2", "window": 5, "pattern": [True, True, False, False]},
    "gemma3": {"window": 5, "layers": 7},
    "gemma3-period": {"architecture": "gemma3", "window": 5, "pattern": 2},
    "gemma3-listed": {"architecture": "gemma3", "window": 5, "pattern": [False, True, False, True]},
    "gemma3-full": {"architecture": "gemma3"},
    "gpt-oss": {"experts": 4, "tied": False, "window": 5},
    "deepseek": {"experts": 4, "tied": False, "kv_heads": 4},
    "phi3": {"tied": False},
    "granite": {},
    "olmo2": {"tied": False},
    "olmo2-window": {"architecture": "olmo2", "tied": False, "window": 5},
    "olmoe": {"experts": 4, "tied": False, "kv_heads": 4},
    "internlm2": {"tied": False},
    "exaone": {"tied": False},
    "seed_oss": {"tied": False},
}
TOKENS = np.array([1, 270, 262, 280, 5, 275, 264, 263, 130, 271, 266, 262, 279, 268, 261], np.int32)


def shape_of(synthetic, case):
    return synthetic.Shape(**{"architecture": case, **CASES[case]})


@pytest.mark.parametrize("case", CASES)
def test_a_chain_equals_the_whole(case, synthetic, native, tmp_path):
    shape = shape_of(synthetic, case)
    whole = synthetic.write_model(tmp_path / "whole.gguf", shape)
    expected = native.run_chain([whole], TOKENS, 8)
    assert np.isfinite(expected).all()
    assert len(set(expected.argmax(axis=1))) > 3, "a model that says the same whatever comes proves nothing"
    for stages in (2, 3, shape.layers):
        paths = [tmp_path / f"{first}.gguf" for first, _ in stages_of(shape.layers, stages)]
        for path, (first, last) in zip(paths, stages_of(shape.layers, stages), strict=True):
            cut(whole, path, first, last)
        assert np.array_equal(native.run_chain(paths, TOKENS, 8), expected), f"{stages} stages"


def test_all_known_architectures_are_shown():
    assert {CASES[case].get("architecture", case) for case in CASES} == set(KNOWN)


@pytest.mark.parametrize("architecture", ["gemma", "gemma2"])
def test_rows_are_scaled_back_by_the_stage_engine(architecture, synthetic, native, tmp_path):
    """sqrt(96) is no power of two, so a last bit may differ; without scaling nothing would agree."""
    shape = synthetic.Shape(architecture=architecture, width=96)
    whole = synthetic.write_model(tmp_path / "whole.gguf", shape)
    expected = native.run_chain([whole], TOKENS, 0)
    rows = TOKENS
    for first, last in ((0, 1), (1, 3), (3, 4)):
        cut(whole, tmp_path / "slice.gguf", first, last)
        model = Model([str(tmp_path / "slice.gguf")])
        stage = StageContext(
            model,
            context_length=64,
            n_seq=1,
            n_batch=32,
            threads=1,
            flash_attention=False,
            takes_tokens=first == 0,
            is_head=last == 4,
            max_outputs=32,
        )
        positions = list(range(len(TOKENS)))
        rows = stage.run(rows, positions, [0] * len(TOKENS), positions)
    logits = np.stack([stage.logits(index) for index in positions])
    assert np.abs(logits - expected).max() < 1e-3 * np.abs(expected).max()
    assert np.array_equal(logits.argmax(axis=1), expected.argmax(axis=1))


def test_gemma3_of_62_layers_scales_its_attention_as_the_whole_does(synthetic, native, tmp_path):
    """The library knows the model of 27 B by its 62 layers. A last bit may differ: the scale is in a norm."""
    shape = synthetic.Shape(
        architecture="gemma3", layers=62, width=32, heads=2, kv_heads=1, ff=32, head_size=32
    )
    whole = synthetic.write_model(tmp_path / "whole.gguf", shape)
    expected = native.run_chain([whole], TOKENS, 0)
    paths = [tmp_path / "a", tmp_path / "b"]
    cut(whole, paths[0], 0, 30)
    cut(whole, paths[1], 30, 62)
    got = native.run_chain(paths, TOKENS, 0)
    assert np.abs(got - expected).max() < 1e-3 * np.abs(expected).max()
    cut(whole, paths[0], 0, 62)
    assert np.array_equal(native.run_chain(paths[:1], TOKENS, 0), expected)
