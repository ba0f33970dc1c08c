"""A model file with its quantised tensors rewritten as F16: the same bytes on every machine.

Norms and biases stay as they are (F32), and so does what is no block format. Rows are decoded with the
library's own formulas (ggml-quants.c), in float32, and rounded to nearest, so that two machines make the same
file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cargos.errors import CargoError
from cargos.shards.gguf import (
    BLOCKS,
    Header,
    Kind,
    NewTensor,
    Tensor,
    TensorType,
    build_header,
    number_entry,
)
from protocol.limits import MIB

#: Bytes decoded at once, before: some five times as much while numpy works.
CHUNK_BYTES: Final = 2 * MIB
#: `general.file_type` of llama.cpp: mostly F16.
_FILE_TYPE_F16: Final = 1

_Bytes: TypeAlias = NDArray[np.uint8]
_Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Halves:
    """The new file: its header, the tensors of the old one in order, where each one's data begins, its size."""

    header: bytes
    tensors: tuple[Tensor, ...]
    starts: tuple[int, ...]
    size_bytes: int


def halves_of(header: Header) -> Halves:
    """Lay the new file out. Raises CargoError if a tensor has a type that we can not decode."""
    for tensor in header.tensors:
        if _is_quantised(tensor) and tensor.type not in _DECODERS:
            raise CargoError(f"{tensor.name} has the type {tensor.type}, which can not be rewritten as F16")
    metadata = dict(header.metadata)
    metadata["general.file_type"] = number_entry(Kind.UINT32, _FILE_TYPE_F16)
    metadata.pop("general.quantization_version", None)
    new = [
        NewTensor(tensor.name, tensor.dimensions, TensorType.F16 if _is_quantised(tensor) else tensor.type)
        for tensor in header.tensors
    ]
    head, starts, size = build_header(metadata, new, header.alignment)
    return Halves(head, header.tensors, tuple(starts), size)


def write_halves(source: Path, halves: Halves) -> Iterator[bytes]:
    """The new file, in pieces of some MiB. Raises CargoError, OSError."""
    yield halves.header
    at = len(halves.header)
    with source.open("rb", buffering=0) as file:
        for tensor, start in zip(halves.tensors, halves.starts, strict=True):
            if start > at:
                yield bytes(start - at)
            at = start
            for data in _chunks(file.fileno(), tensor):
                yield data
                at += len(data)
    if halves.size_bytes > at:
        yield bytes(halves.size_bytes - at)


def _is_quantised(tensor: Tensor) -> bool:
    return BLOCKS[tensor.type][0] > 1


def _chunks(descriptor: int, tensor: Tensor) -> Iterator[bytes]:
    _, block_bytes = BLOCKS[tensor.type]
    step = CHUNK_BYTES // block_bytes * block_bytes
    for at in range(0, tensor.size_bytes, step):
        data = os.pread(descriptor, min(step, tensor.size_bytes - at), tensor.start + at)
        if len(data) != min(step, tensor.size_bytes - at):
            raise CargoError("the model's file shrank while it was read", "Fetch it again.")
        if _is_quantised(tensor):
            yield to_floats(data, tensor.type).astype(np.float16).tobytes()
        else:
            yield data


def to_floats(data: bytes, kind: int) -> _Floats:
    """The values of whole blocks of a quantised type. Raises KeyError for types that are not known here."""
    blocks = np.frombuffer(data, np.uint8).reshape(-1, BLOCKS[kind][1])
    return _DECODERS[kind](blocks).reshape(-1)


def _half(blocks: _Bytes, at: int) -> _Floats:
    """The f16 at byte `at` of each block, as a column."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: _Bytes) -> NDArray[Any]:
    """Low halves of all bytes, then the high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(blocks: _Bytes, at: int) -> NDArray[Any]:
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << 4


def _q4_0(blocks: _Bytes) -> _Floats:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: _Bytes) -> _Floats:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: _Bytes) -> _Floats:
    values = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (values.astype(np.float32) - 16)


def _q5_1(blocks: _Bytes) -> _Floats:
    values = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * values.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: _Bytes) -> _Floats:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _k_scales(packed: _Bytes) -> tuple[_Floats, _Floats]:
    """Eight scales and eight minima of six bits each, packed into twelve bytes."""
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6) << 4], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _scaled(blocks: _Bytes, values: NDArray[Any]) -> _Floats:
    """Of super-blocks of eight times 32 values: d * scale * value - dmin * minimum."""
    scales, minima = _k_scales(blocks[:, 4:16])
    d, m = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    return np.subtract(d[:, :, None] * values.astype(np.float32), m[:, :, None], dtype=np.float32)


def _q4_k(blocks: _Bytes) -> _Floats:
    packed = blocks[:, 16:].reshape(-1, 4, 1, 32)
    values = packed >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1) & 15
    return _scaled(blocks, values.reshape(-1, 8, 32))


def _q5_k(blocks: _Bytes) -> _Floats:
    high, packed = blocks[:, 16:48].reshape(-1, 1, 32), blocks[:, 48:].reshape(-1, 4, 1, 32)
    values = (packed >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1) & 15).reshape(-1, 8, 32)
    bits = high >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1) & 1
    return _scaled(blocks, values | bits << 4)


def _q6_k(blocks: _Bytes) -> _Floats:
    low, high = blocks[:, :128].reshape(-1, 2, 1, 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    values = (low >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1) & 15).reshape(-1, 8, 32)
    bits = (high >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1) & 3).reshape(-1, 8, 32)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32) * _half(blocks, 208)
    whole = np.subtract(values | bits << 4, 32, dtype=np.float32)
    return np.multiply(scales[:, :, None], whole.reshape(-1, 16, 16), dtype=np.float32)


_DECODERS: Final[dict[int, Callable[[_Bytes], _Floats]]] = {
    TensorType.Q4_0: _q4_0,
    TensorType.Q4_1: _q4_1,
    TensorType.Q5_0: _q5_0,
    TensorType.Q5_1: _q5_1,
    TensorType.Q8_0: _q8_0,
    TensorType.Q4_K: _q4_k,
    TensorType.Q5_K: _q5_k,
    TensorType.Q6_K: _q6_k,
}
