"""Activations as bytes: how exact each dtype is, and that no bytes do harm."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cargos.shards.dtypes import decode_untrusted, encode, row_bytes
from protocol.errors import ProtocolError

DTYPES = ("f32", "f16s", "q8x")


def residual(rows: int, width: int, seed: int = 1) -> np.ndarray:
    """Like a real residual stream: most values small, a few channels of each row very large."""
    random = np.random.default_rng(seed)
    made = random.normal(0, 2, (rows, width))
    made[:, 7 % width] = 98_407.0
    made[:, 100 % width] = -31_000.5
    return made.astype(np.float32)


@pytest.mark.parametrize("width", [1, 5, 32, 33, 576, 640])
@pytest.mark.parametrize(("dtype", "worst"), [("f32", 0.0), ("f16s", 2**-11), ("q8x", 1 / 200)])
def test_what_comes_out_is_what_went_in_within_the_dtypes_precision(dtype, worst, width):
    rows = residual(9, width)
    data = encode(dtype, rows)
    assert encode(dtype, rows[:0]) == b""
    assert len(data) == 9 * row_bytes(dtype, width)
    back = decode_untrusted(dtype, data, 9, width)
    assert back.dtype == np.float32
    if dtype == "q8x":  # relative to the largest of a row that is not exact
        rest = np.sort(np.abs(rows), axis=1)[:, :-8].max(axis=1, initial=0)[:, None]
        assert (np.abs(back - rows) <= worst * rest + 1e-9).all()
        largest = np.abs(rows).argmax(axis=1)
        assert (back[np.arange(9), largest] == rows[np.arange(9), largest]).all()
    else:
        scale = np.maximum(np.abs(rows), np.abs(rows).max(axis=1, keepdims=True) * 2**-28)
        assert (np.abs(back - rows) <= worst * scale).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-30, 1.0, 3.4e38])
def test_extremes_survive(dtype, size):
    rows = np.array([[size, -size, 0.0, size / 3]], np.float32)
    back = decode_untrusted(dtype, encode(dtype, rows), 1, 4)
    assert np.allclose(back, rows, rtol=1e-2, atol=1e-39)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_how_they_are_cut_into_messages(dtype):
    rows = residual(5, 70)
    assert encode(dtype, rows) == b"".join(encode(dtype, rows[i : i + 1]) for i in range(5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_not_sent(dtype, bad):
    rows = residual(2, 40)
    rows[1, 3] = bad
    with pytest.raises(ValueError, match="finite"):
        encode(dtype, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_whatever_bytes_come_they_are_finite_rows_or_a_protocol_error(dtype, data):
    width = data.draw(st.integers(1, 70))
    rows = data.draw(st.integers(0, 3))
    exact = data.draw(st.booleans())
    size = rows * row_bytes(dtype, width) if exact else data.draw(st.integers(0, 500))
    blob = data.draw(st.binary(min_size=size, max_size=size))
    try:
        back = decode_untrusted(dtype, blob, rows, width)
    except ProtocolError:
        return
    assert back.shape == (rows, width)
    assert np.isfinite(back).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [0x00, 0x7C, 0x7D, 0x7F, 0xFC, 0xFF])
@pytest.mark.parametrize(
    "scale", [b"\x00\x00\x80\x3f", b"\x00\x00\x00\x01", b"\x00\x00\x80\x7f", b"\x00\x00\x00\x00"]
)
def test_bytes_that_are_no_numbers_are_told_apart(dtype, fill, scale):
    data = scale + bytes([fill]) * (row_bytes(dtype, 30) - 4)
    try:
        assert np.isfinite(decode_untrusted(dtype, data, 1, 30)).all()
    except ProtocolError:
        assert fill or scale[3] in (0x7F, 0)


def test_widths_out_of_range_are_refused():
    for width in (0, -1, (1 << 16) + 1):
        with pytest.raises(ValueError, match="values"):
            row_bytes("f32", width)
        with pytest.raises(ProtocolError):
            decode_untrusted("f32", b"", 0, width)
