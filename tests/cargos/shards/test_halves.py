"""Quantised tensors as F16: the library's own decoding, value for value."""

import ctypes

import numpy as np
import pytest

from cargos.shards.cut import read_header
from cargos.shards.gguf import BLOCKS, TensorType, tensor_bytes
from cargos.shards.halves import halves_of, to_floats, write_halves

KINDS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]


class Traits(ctypes.Structure):
    """The beginning of ggml_type_traits."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@pytest.fixture(scope="module")
def traits(native):
    function = native._ggml().ggml_get_type_traits
    function.restype, function.argtypes = ctypes.POINTER(Traits), [ctypes.c_int]
    return lambda kind: function(int(kind)).contents


def random_blocks(kind, count):
    """Any bits are a block, if its scales are finite numbers."""
    values, size = BLOCKS[kind]
    blocks = np.random.default_rng(kind).integers(0, 256, (count, size), np.uint8)
    halves = {"Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
    for at in halves.get(TensorType(kind).name, [0]):
        scales = np.random.default_rng(at).normal(0, 0.05, count).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.tobytes(), values * count


@pytest.mark.parametrize("name", KINDS)
def test_values_are_the_librarys(name, traits):
    kind = TensorType[name]
    assert (traits(kind).blck_size, traits(kind).type_size) == BLOCKS[kind]
    data, count = random_blocks(kind, 300)
    expected = np.zeros(count, np.float32)
    traits(kind).to_float(data, expected.ctypes.data, count)
    got = to_floats(data, kind)
    assert np.array_equal(got.astype(np.float16), expected.astype(np.float16))
    # The library may fuse multiplication and addition: the last bit of float32, which F16 does not have.
    assert np.allclose(got, expected, rtol=1e-6, atol=1e-7)


def test_every_type_that_is_carried_has_the_librarys_size(traits):
    for kind, (values, size) in BLOCKS.items():
        assert (traits(kind).blck_size, traits(kind).type_size) == (values, size), kind


def test_a_rewritten_file_is_sound(synthetic, native, tmp_path):
    """F32 stays F32: the same numbers come out, and the layout is the one announced."""
    whole = synthetic.write_model(tmp_path / "whole.gguf", synthetic.Shape())
    halves = halves_of(read_header(whole))
    new = tmp_path / "new.gguf"
    new.write_bytes(b"".join(write_halves(whole, halves)))
    assert new.stat().st_size == halves.size_bytes
    header = read_header(new)
    assert header.integer("general.file_type") == 1
    assert [tensor_bytes(t.type, t.dimensions) for t in header.tensors] == [
        t.size_bytes for t in header.tensors
    ]
    tokens = np.array([1, 270, 5, 264], np.int32)
    assert np.array_equal(native.run_chain([new], tokens, 3), native.run_chain([whole], tokens, 3))
