"""GGUF, version 3: the header of a model file, read and written. Pure: bytes in, bytes out.

    "GGUF", version, number of tensors, number of metadata entries
    metadata entries: key, type, value
    tensors: name, dimensions, type, offset
    padding to the alignment, then the tensors' data, each padded to the alignment

Metadata values stay raw bytes: a vocabulary of 262,144 strings is skipped over, never made into objects. What
is wanted of them is decoded on demand.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from cargos.errors import CargoError
from protocol.codec import excerpt
from protocol.limits import KIB, MIB

MAGIC: Final = b"GGUF"
VERSION: Final = 3
DEFAULT_ALIGNMENT: Final = 32
ALIGNMENT_KEY: Final = "general.alignment"

# --- bounds on files from anywhere -----------------------------------------------------------------

#: The largest vocabularies (262,144 tokens with merges) take 16 MiB.
MAX_HEADER_BYTES: Final = 128 * MIB
#: Real files have some 40 keys, those of imatrix collections some hundreds.
MAX_ENTRIES: Final = 4096
#: 512 layers of 60 tensors.
MAX_TENSORS: Final = 32 * KIB
MAX_KEY_BYTES: Final = KIB
#: The library's own bounds: GGML_MAX_NAME, GGML_MAX_DIMS.
MAX_TENSOR_NAME_BYTES: Final = 63
MAX_DIMENSIONS: Final = 4
MAX_TENSOR_BYTES: Final = 1 << 42
#: Padding between tensors is never more than this.
MAX_ALIGNMENT: Final = 64 * KIB


class BadGguf(CargoError):
    """Not a GGUF file that we can read."""


class Incomplete(CargoError):
    """The bytes given end before the header does; at least `needed` are wanted from the start of the file."""

    def __init__(self, needed: int) -> None:
        super().__init__(f"the file's header needs more than its first {needed} bytes")
        self.needed = needed


class Kind(IntEnum):
    """Types of metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_FORMATS: Final[dict[Kind, str]] = {
    Kind.UINT8: "B",
    Kind.INT8: "b",
    Kind.UINT16: "H",
    Kind.INT16: "h",
    Kind.UINT32: "I",
    Kind.INT32: "i",
    Kind.FLOAT32: "f",
    Kind.BOOL: "?",
    Kind.UINT64: "Q",
    Kind.INT64: "q",
    Kind.FLOAT64: "d",
}
_SIZES: Final = {kind: struct.calcsize("<" + code) for kind, code in _FORMATS.items()}
_INTEGERS: Final = frozenset(_FORMATS) - {Kind.FLOAT32, Kind.FLOAT64}
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


class TensorType(IntEnum):
    """The types that are named here; `BLOCKS` has all that can be carried."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ1_S = 19
    BF16 = 30


#: Of each tensor type the values in a block and the bytes of a block (ggml.h and ggml-common.h of llama.cpp).
BLOCKS: Final[dict[int, tuple[int, int]]] = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    9: (32, 36),  # Q8_1
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    15: (256, 292),  # Q8_K
    16: (256, 66),  # IQ2_XXS
    17: (256, 74),  # IQ2_XS
    18: (256, 98),  # IQ3_XXS
    19: (256, 50),  # IQ1_S
    20: (32, 18),  # IQ4_NL
    21: (256, 110),  # IQ3_S
    22: (256, 82),  # IQ2_S
    23: (256, 136),  # IQ4_XS
    24: (1, 1),  # I8
    25: (1, 2),  # I16
    26: (1, 4),  # I32
    27: (1, 8),  # I64
    28: (1, 8),  # F64
    29: (256, 56),  # IQ1_M
    30: (1, 2),  # BF16
    34: (256, 54),  # TQ1_0
    35: (256, 66),  # TQ2_0
    39: (32, 17),  # MXFP4
    40: (64, 36),  # NVFP4
    41: (128, 18),  # Q1_0
    42: (64, 18),  # Q2_0
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A metadata value as it lies in the file: `raw` begins after the type. `item` is the type of an array's
    items, `count` their number (1 for a single value).
    """

    kind: Kind
    raw: bytes
    item: Kind | None = None
    count: int = 1


@dataclass(frozen=True, slots=True)
class Tensor:
    """`start`: where its `size_bytes` of data begin in the file. `dimensions`: the fastest one first."""

    name: str
    dimensions: tuple[int, ...]
    type: int
    start: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """All of a GGUF file but its data. `data_start`: where that begins."""

    metadata: dict[str, Entry]
    tensors: tuple[Tensor, ...]
    alignment: int
    data_start: int

    def text(self, key: str) -> str | None:
        """A string value; None if there is none of this name. Raises BadGguf if it is something else."""
        entry = self.metadata.get(key)
        if entry is None:
            return None
        if entry.kind is not Kind.STRING:
            raise _wrong(key, "text")
        return _decode(entry.raw[8:], key)

    def integer(self, key: str) -> int | None:
        """A whole number or flag, as `text`."""
        entry = self.metadata.get(key)
        if entry is None:
            return None
        if entry.kind not in _INTEGERS:
            raise _wrong(key, "a whole number")
        return int(struct.unpack("<" + _FORMATS[entry.kind], entry.raw)[0])

    def integers(self, key: str) -> tuple[int, ...] | None:
        """An array of whole numbers or flags, as `text`."""
        entry = self.metadata.get(key)
        if entry is None:
            return None
        if entry.item is None or entry.item not in _INTEGERS:
            raise _wrong(key, "a list of whole numbers")
        return tuple(map(int, struct.unpack_from(f"<{entry.count}{_FORMATS[entry.item]}", entry.raw, 12)))


def tensor_bytes(kind: int, dimensions: Iterable[int]) -> int:
    """Of a tensor's data. Raises BadGguf for an unknown type or a row that is no whole number of blocks."""
    if kind not in BLOCKS:
        raise BadGguf(f"tensor type {kind} is unknown", "Is the file newer than this program?")
    values, size = BLOCKS[kind]
    row, *rest = dimensions
    if row % values:
        raise BadGguf(f"a row of {row} values does not fill blocks of {values}")
    total = row // values * size
    for dimension in rest:
        total *= dimension
    return total


def padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


# --- reading ----------------------------------------------------------------------------------------


def parse_header_untrusted(data: bytes, file_bytes: int) -> Header:
    """The header of a file of `file_bytes`, of which `data` is the beginning.

    Raises Incomplete if more of the beginning is needed, BadGguf, nothing else.
    """
    cursor = _Cursor(data, file_bytes)
    if cursor.take(4) != MAGIC:
        raise BadGguf("not a GGUF file (it begins with other bytes)")
    version = cursor.u32()
    if version != VERSION:
        hint = (
            "Convert it again with a current llama.cpp." if version < VERSION else "A newer program is needed."
        )
        raise BadGguf(f"GGUF version {version}, not {VERSION}", hint)
    tensor_count, entry_count = cursor.u64(), cursor.u64()
    if tensor_count > MAX_TENSORS:
        raise BadGguf(f"{tensor_count} tensors, at most {MAX_TENSORS}")
    if entry_count > MAX_ENTRIES:
        raise BadGguf(f"{entry_count} metadata entries, at most {MAX_ENTRIES}")
    metadata: dict[str, Entry] = {}
    for _ in range(entry_count):
        key = _decode(cursor.string(MAX_KEY_BYTES), "a key")
        if key in metadata:
            raise BadGguf(f"the key {excerpt(key)!r} appears twice")
        metadata[key] = _entry(cursor, key)
    alignment = _alignment(metadata)
    raw = [_tensor(cursor) for _ in range(tensor_count)]
    return Header(metadata, *_place(raw, alignment, cursor.at, file_bytes))


def _entry(cursor: _Cursor, key: str) -> Entry:
    kind = _kind(cursor.u32(), key)
    start = cursor.at
    if kind is Kind.STRING:
        cursor.string(MAX_HEADER_BYTES)
    elif kind is not Kind.ARRAY:
        cursor.skip(_SIZES[kind])
    else:
        item = _kind(cursor.u32(), key)
        count = cursor.u64()
        if item is Kind.ARRAY:
            raise BadGguf(f"{excerpt(key)!r} is a list of lists")
        if item is Kind.STRING:
            cursor.skip_strings(count)
        else:
            cursor.skip(count * _SIZES[item])
        return Entry(kind, cursor.data[start : cursor.at], item, count)
    return Entry(kind, cursor.data[start : cursor.at])


def _kind(number: int, key: str) -> Kind:
    try:
        return Kind(number)
    except ValueError as error:
        raise BadGguf(f"{excerpt(key)!r} has the unknown type {number}") from error


def _alignment(metadata: dict[str, Entry]) -> int:
    entry = metadata.get(ALIGNMENT_KEY)
    if entry is None:
        return DEFAULT_ALIGNMENT
    if entry.kind is not Kind.UINT32:
        raise _wrong(ALIGNMENT_KEY, "a whole number")
    (alignment,) = _U32.unpack(entry.raw)
    if alignment < 8 or alignment > MAX_ALIGNMENT or alignment & (alignment - 1):
        raise BadGguf(f"an alignment of {alignment} is no power of two between 8 and {MAX_ALIGNMENT}")
    return int(alignment)


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = _decode(cursor.string(MAX_TENSOR_NAME_BYTES), "a tensor's name")
    count = cursor.u32()
    if not 1 <= count <= MAX_DIMENSIONS:
        raise BadGguf(f"{excerpt(name)!r} has {count} dimensions")
    dimensions = tuple(cursor.u64() for _ in range(count))
    return name, dimensions, cursor.u32(), cursor.u64()


def _place(
    raw: list[tuple[str, tuple[int, ...], int, int]], alignment: int, end: int, file_bytes: int
) -> tuple[tuple[Tensor, ...], int, int]:
    """Tensors follow each other without gap or overlap, as the library demands: so no slice of a file can
    be larger than the file.
    """
    data_start = padded(end, alignment)
    offset = 0
    tensors: dict[str, Tensor] = {}
    for name, dimensions, kind, given in raw:
        size = tensor_bytes(kind, dimensions)
        if name in tensors:
            raise BadGguf(f"the tensor {excerpt(name)!r} appears twice")
        if not 0 < size <= MAX_TENSOR_BYTES:
            raise BadGguf(f"{excerpt(name)!r} has {'no' if not size else 'too many'} bytes")
        if given != offset:
            raise BadGguf(f"{excerpt(name)!r} lies at {given}, not {offset}", "The file is damaged.")
        tensors[name] = Tensor(name, dimensions, kind, data_start + offset, size)
        if data_start + offset + size > file_bytes:
            raise BadGguf(f"{excerpt(name)!r} reaches beyond the end of the file", "Is the file complete?")
        offset += padded(size, alignment)
    return tuple(tensors.values()), alignment, data_start


class _Cursor:
    """Reads forward and never beyond what is there."""

    def __init__(self, data: bytes, file_bytes: int) -> None:
        self.data: Final = data
        self.at = 0
        self._file_bytes = min(file_bytes, MAX_HEADER_BYTES)
        self._end = min(len(data), self._file_bytes)

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > self._end:
            self._fail(self.at)

    def take(self, size: int) -> bytes:
        start = self.at
        self.skip(size)
        return self.data[start : self.at]

    def u32(self) -> int:
        return int(_U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack(self.take(8))[0])

    def string(self, limit: int) -> bytes:
        size = self.u64()
        if size > limit:
            raise BadGguf(f"a name or text of {size} bytes, at most {limit}")
        return self.take(size)

    def skip_strings(self, count: int) -> None:
        """Over an array of strings: the one loop that runs 262,144 times."""
        data, at, end, length = self.data, self.at, self._end, _U64.unpack_from
        if at + 8 * count > self._file_bytes:
            self._fail(at + 8 * count)
        for _ in range(count):
            if at + 8 > end:
                self._fail(at + 8)
            at += 8 + length(data, at)[0]
        self.at = at
        self.skip(0)

    def _fail(self, needed: int) -> None:
        if needed > self._file_bytes:
            raise BadGguf(
                f"its header ends beyond byte {self._file_bytes}", "Is the file complete, and a GGUF file?"
            )
        raise Incomplete(needed)


def _decode(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadGguf(f"{excerpt(what)} is not UTF-8") from error


def _wrong(key: str, wanted: str) -> BadGguf:
    return BadGguf(f"{excerpt(key)!r} is not {wanted}")


# --- writing ----------------------------------------------------------------------------------------


def string_entry(text: str) -> Entry:
    data = text.encode()
    return Entry(Kind.STRING, _U64.pack(len(data)) + data)


def number_entry(kind: Kind, value: float) -> Entry:
    return Entry(kind, struct.pack("<" + _FORMATS[kind], value))


def array_entry(item: Kind, values: Iterable[float]) -> Entry:
    items = list(values)
    raw = _U32.pack(item) + _U64.pack(len(items)) + struct.pack(f"<{len(items)}{_FORMATS[item]}", *items)
    return Entry(Kind.ARRAY, raw, item, len(items))


def strings_entry(texts: Iterable[str]) -> Entry:
    items = [text.encode() for text in texts]
    raw = b"".join(_U64.pack(len(item)) + item for item in items)
    return Entry(Kind.ARRAY, _U32.pack(Kind.STRING) + _U64.pack(len(items)) + raw, Kind.STRING, len(items))


def sliced(entry: Entry, first: int, last: int) -> Entry:
    """Items `first` to `last` of an array of numbers or flags."""
    if entry.item is None or entry.item is Kind.STRING:
        raise ValueError("only arrays of numbers are cut")
    size = _SIZES[entry.item]
    head = _U32.pack(entry.item) + _U64.pack(last - first)
    return Entry(Kind.ARRAY, head + entry.raw[12 + first * size : 12 + last * size], entry.item, last - first)


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written."""

    name: str
    dimensions: tuple[int, ...]
    type: int

    @property
    def size_bytes(self) -> int:
        return tensor_bytes(self.type, self.dimensions)


def build_header(
    metadata: dict[str, Entry], tensors: Iterable[NewTensor], alignment: int
) -> tuple[bytes, Iterator[int], int]:
    """The header of a new file, padded; where each tensor's data begins in it; the size of the whole file.

    `alignment` must be what the metadata say.
    """
    listed = list(tensors)
    parts = [MAGIC, _U32.pack(VERSION), _U64.pack(len(listed)), _U64.pack(len(metadata))]
    for key, entry in metadata.items():
        name = key.encode()
        parts += [_U64.pack(len(name)), name, _U32.pack(entry.kind), entry.raw]
    offset = 0
    offsets: list[int] = []
    for tensor in listed:
        name = tensor.name.encode()
        shape = struct.pack(f"<I{len(tensor.dimensions)}Q", len(tensor.dimensions), *tensor.dimensions)
        parts += [_U64.pack(len(name)), name, shape, _U32.pack(tensor.type), _U64.pack(offset)]
        offsets.append(offset)
        offset += padded(tensor.size_bytes, alignment)
    header = b"".join(parts)
    header += bytes(padded(len(header), alignment) - len(header))
    return header, (len(header) + at for at in offsets), len(header) + offset
