"""How activations travel: what each dtype costs in bytes, and both ways between rows and bytes.

f32   lossless. 4 bytes a value.
f16s  half precision with a scale for each row, a power of two: residuals far beyond 65,504 (Gemma's) survive,
      and nothing is lost but digits. 2 bytes a value.
q8x   integers of 8 bits in blocks of 32, each block with its scale, and the eight largest values of a row
      exact: a few channels of a residual stream are hundreds of times larger than the rest, and would take
      all the precision of the blocks they are in. 1.06 bytes a value and 52 a row.

All little-endian. Rows are independent of each other: a session's rows decode the same however they are cut
into messages.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from protocol.errors import Fault, ProtocolError
from protocol.ring import Dtype

Rows: TypeAlias = NDArray[np.float32]

#: Values of a block in q8x.
BLOCK: Final = 32

#: Values of a row that q8x leaves as they are.
EXACT: Final = 8

#: An exact value's place in the row has two bytes.
MAX_WIDTH: Final = 1 << 16

#: Scales are chosen so that the largest value of a row is just below two to this power, in half precision.
_TOP_EXPONENT: Final = 15

#: Row scales beyond these are none of ours, and could overflow when they are multiplied.
_MIN_SCALE: Final = 2.0**-126
_MAX_SCALE: Final = 2.0**112


def row_bytes(dtype: Dtype, width: int) -> int:
    """Bytes of one row of `width` values. Raises ValueError for a width out of range."""
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"a row of {width} values, from 1 to {MAX_WIDTH} are possible")
    if dtype == "f32":
        return 4 * width
    if dtype == "f16s":
        return 4 + 2 * width
    return 4 + _blocks(width) * (2 + BLOCK) + min(EXACT, width) * (2 + 4)


def encode(dtype: Dtype, rows: Rows) -> bytes:
    """Rows (a matrix) as bytes. Raises ValueError if a value is not finite: the model overflowed."""
    if not np.isfinite(rows).all():
        raise ValueError("a value that is no finite number")
    if dtype == "f32":
        return np.ascontiguousarray(rows, "<f4").tobytes()
    if dtype == "f16s":
        scale = _row_scales(np.abs(rows).max(axis=1))
        return _pack(scale.astype("<f4")[:, None], (rows / scale[:, None]).astype("<f2"))
    return _encode_q8x(rows)


def decode_untrusted(dtype: Dtype, data: bytes, rows: int, width: int) -> Rows:
    """A matrix of `rows` rows, all values finite. Raises ProtocolError, nothing else, for whatever bytes."""
    if rows < 0 or not 1 <= width <= MAX_WIDTH:
        raise ProtocolError(Fault.MALFORMED, f"{rows} rows of {width} values")
    size = row_bytes(dtype, width)
    if len(data) != rows * size:
        raise ProtocolError(Fault.MALFORMED, f"{len(data)} bytes for {rows} rows of {size}")
    table = np.frombuffer(data, np.uint8).reshape(rows, size)
    with np.errstate(all="ignore"):  # what is no number is looked for below
        if dtype == "f32":
            values = _field(table, 0, width, "<f4").astype(np.float32)
        elif dtype == "f16s":
            values = _field(table, 4, width, "<f2").astype(np.float32) * _scales_untrusted(table)
        else:
            values = _decode_q8x_untrusted(table, width)
    if not np.isfinite(values).all():
        raise ProtocolError(Fault.MALFORMED, "a value that is no finite number")
    return values


def _blocks(width: int) -> int:
    return -(-width // BLOCK)


def _row_scales(largest: Rows) -> Rows:
    """A power of two for each row, such that `largest` over it just fits half precision."""
    _, exponent = np.frexp(largest)
    scale = np.ldexp(np.float32(1), exponent - _TOP_EXPONENT)
    return np.where(largest > 0, np.clip(scale, _MIN_SCALE, _MAX_SCALE), 1).astype(np.float32)


def _scales_untrusted(table: NDArray[np.uint8]) -> Rows:
    scale = _field(table, 0, 1, "<f4").astype(np.float32)
    if not ((scale >= _MIN_SCALE) & (scale <= _MAX_SCALE)).all():
        raise ProtocolError(Fault.MALFORMED, "a row's scale out of range")
    return scale


def _pack(*fields: NDArray[Any]) -> bytes:
    rows = len(fields[0])
    parts = [
        np.ascontiguousarray(field).view(np.uint8).reshape(rows, field.shape[1] * field.itemsize)
        for field in fields
    ]
    return np.concatenate(parts, axis=1).tobytes()


def _field(table: NDArray[np.uint8], at: int, count: int, kind: str) -> NDArray[Any]:
    """`count` values of `kind` from byte `at` of each row."""
    size = count * np.dtype(kind).itemsize
    return np.ascontiguousarray(table[:, at : at + size]).view(kind).reshape(len(table), count)


def _encode_q8x(rows: Rows) -> bytes:
    count, width = rows.shape
    kept = min(EXACT, width)
    place = np.sort(np.argpartition(-np.abs(rows), kept - 1, axis=1)[:, :kept], axis=1)
    exact = np.take_along_axis(rows, place, axis=1)
    rest = np.zeros((count, _blocks(width) * BLOCK), np.float32)
    rest[:, :width] = rows
    np.put_along_axis(rest, place, 0, axis=1)
    blocks = rest.reshape(count, _blocks(width), BLOCK)
    step = np.abs(blocks).max(axis=2) / np.float32(127)
    scale = _row_scales(step.max(axis=1))
    half = (step / scale[:, None]).astype("<f2")
    real = half.astype(np.float32) * scale[:, None]
    divisor = np.where(real > 0, real, 1)[:, :, None]
    numbers = np.clip(np.rint(blocks / divisor), -127, 127).astype(np.int8)
    return _pack(
        scale.astype("<f4")[:, None],
        half,
        numbers.reshape(count, rest.shape[1]),
        place.astype("<u2"),
        exact.astype("<f4"),
    )


def _decode_q8x_untrusted(table: NDArray[np.uint8], width: int) -> Rows:
    blocks, kept = _blocks(width), min(EXACT, width)
    at = 4
    step = _field(table, at, blocks, "<f2").astype(np.float32) * _scales_untrusted(table)
    at += 2 * blocks
    numbers = _field(table, at, blocks * BLOCK, "i1").astype(np.float32)
    at += blocks * BLOCK
    place = _field(table, at, kept, "<u2").astype(np.int64)
    exact = _field(table, at + 2 * kept, kept, "<f4").astype(np.float32)
    if (place >= width).any():
        raise ProtocolError(Fault.MALFORMED, "an exact value outside its row")
    if not np.isfinite(step).all():
        raise ProtocolError(Fault.MALFORMED, "a block's scale that is no finite number")
    grouped = numbers.reshape(len(table), blocks, BLOCK) * step[:, :, None]
    padded = grouped.reshape(len(table), blocks * BLOCK)
    values: Rows = np.ascontiguousarray(padded[:, :width], np.float32)
    np.put_along_axis(values, place, exact, axis=1)
    return values
