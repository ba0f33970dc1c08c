"""The GGUF reader on files from anywhere, and the writer it reads back."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cargos.errors import CargoError
from cargos.shards import gguf
from cargos.shards.gguf import (
    BadGguf,
    Incomplete,
    Kind,
    NewTensor,
    TensorType,
    array_entry,
    build_header,
    number_entry,
    parse_header_untrusted,
    sliced,
    string_entry,
    strings_entry,
)
from cargos.shards.layout import model_of, ranges_of, sharding_of, slice_of

METADATA = {
    "general.architecture": string_entry("llama"),
    "general.alignment": number_entry(Kind.UINT32, 64),
    "a.flag": number_entry(Kind.BOOL, True),
    "a.float": number_entry(Kind.FLOAT64, 0.5),
    "a.list": array_entry(Kind.INT16, [1, -2, 3]),
    "tokenizer.ggml.tokens": strings_entry(["a", "", "\u2581b"]),
}
TENSORS = [NewTensor("token_embd.weight", (32, 3), TensorType.Q8_0), NewTensor("x", (5,), TensorType.F32)]


def sound(metadata=METADATA, tensors=TENSORS, alignment=64):
    header, starts, size = build_header(metadata, tensors, alignment)
    return header.ljust(size, b"\1"), list(starts)


def test_what_is_written_is_read():
    data, starts = sound()
    header = parse_header_untrusted(data, len(data))
    assert header.metadata == METADATA
    assert [(t.name, t.dimensions, t.type, t.start, t.size_bytes) for t in header.tensors] == [
        ("token_embd.weight", (32, 3), TensorType.Q8_0, starts[0], 102),
        ("x", (5,), TensorType.F32, starts[1], 20),
    ]
    assert header.data_start % 64 == 0
    assert header.text("general.architecture") == "llama"
    assert header.integer("a.flag") == 1
    assert header.integers("a.list") == (1, -2, 3)
    assert header.text("none") is header.integer("none") is header.integers("none") is None
    assert sliced(header.metadata["a.list"], 1, 3) == array_entry(Kind.INT16, [-2, 3])
    for read, key in ((header.text, "a.flag"), (header.integer, "a.float"), (header.integers, "a.flag")):
        with pytest.raises(BadGguf, match=key):
            read(key)


def test_any_beginning_asks_for_more():
    """And what it asks for suffices in the end, without reading all of the file."""
    data, starts = sound()
    size = 1
    while True:
        try:
            header = parse_header_untrusted(data[:size], len(data))
            break
        except Incomplete as error:
            assert size < error.needed <= header_end(data)
            size = error.needed
    assert size <= starts[0]
    assert header == parse_header_untrusted(data, len(data))


def header_end(data):
    return parse_header_untrusted(data, len(data)).data_start


def patched(at, form, *values):
    data = bytearray(sound()[0])
    struct.pack_into(form, data, at, *values)
    return bytes(data)


def raw(*entries, count=None, tensors=b"", tensor_count=0):
    head = b"GGUF" + struct.pack("<IQQ", 3, tensor_count, len(entries) if count is None else count)
    return head + b"".join(entries) + tensors


def entry(key, kind, value):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def tensor(name=b"x", dimensions=(4,), kind=0, offset=0, count=None):
    return (
        struct.pack("<Q", len(name))
        + name
        + struct.pack("<I", len(dimensions) if count is None else count)
        + struct.pack(f"<{len(dimensions)}QIQ", *dimensions, kind, offset)
    )


BAD = {
    "magic": (b"GGML" + bytes(40), "begins with other bytes"),
    "version 2": (patched(4, "<I", 2), "version 2"),
    "version 4": (patched(4, "<I", 4), "version 4"),
    "big endian": (patched(4, ">I", 3), "version"),
    "many tensors": (patched(8, "<Q", 1 << 40), "tensors, at most"),
    "many entries": (patched(16, "<Q", 1 << 40), "entries, at most"),
    "long key": (raw(struct.pack("<Q", 1 << 20) + bytes(2000)), "1048576 bytes, at most"),
    "huge key": (raw(struct.pack("<Q", (1 << 64) - 1)), "bytes, at most"),
    "long text": (raw(entry(b"a", 8, struct.pack("<Q", 1 << 62))), "bytes, at most"),
    "key twice": (raw(entry(b"a", 0, b"1"), entry(b"a", 0, b"2")), "twice"),
    "key not UTF-8": (raw(entry(b"\xff", 0, b"1")), "not UTF-8"),
    "unknown type": (raw(entry(b"a", 13, b"1")), "unknown type 13"),
    "lists of lists": (raw(entry(b"a", 9, struct.pack("<IQ", 9, 1))), "list of lists"),
    "unknown item": (raw(entry(b"a", 9, struct.pack("<IQ", 99, 1))), "unknown type 99"),
    "huge list": (raw(entry(b"a", 9, struct.pack("<IQ", 5, 1 << 61))), "ends beyond"),
    "huge list of texts": (raw(entry(b"a", 9, struct.pack("<IQ", 8, 1 << 61))), "ends beyond"),
    "text beyond the end": (raw(entry(b"a", 9, struct.pack("<IQQ", 8, 1, 1 << 63))), "ends beyond"),
    "alignment": (raw(entry(b"general.alignment", 4, struct.pack("<I", 24))), "no power of two"),
    "no alignment": (raw(entry(b"general.alignment", 4, struct.pack("<I", 0))), "no power of two"),
    "alignment text": (raw(entry(b"general.alignment", 8, struct.pack("<Q", 0))), "not a whole number"),
    "long name": (raw(tensors=tensor(b"x" * 64), tensor_count=1) + bytes(99), "64 bytes, at most 63"),
    "no dimensions": (raw(tensors=tensor(count=0), tensor_count=1) + bytes(99), "0 dimensions"),
    "five dimensions": (raw(tensors=tensor(count=5), tensor_count=1) + bytes(99), "5 dimensions"),
    "unknown tensor type": (raw(tensors=tensor(kind=4), tensor_count=1) + bytes(99), "type 4 is unknown"),
    "half a block": (raw(tensors=tensor(kind=2), tensor_count=1) + bytes(99), "does not fill blocks"),
    "empty": (raw(tensors=tensor(dimensions=(0,)), tensor_count=1) + bytes(99), "no bytes"),
    "too large": (raw(tensors=tensor(dimensions=(1 << 63, 1 << 63)), tensor_count=1) + bytes(99), "too many"),
    "beyond the end": (raw(tensors=tensor(dimensions=(99,)), tensor_count=1) + bytes(99), "beyond the end"),
    "gap": (raw(tensors=tensor(offset=32), tensor_count=1) + bytes(99), "lies at 32, not 0"),
    "overlap": (raw(tensors=tensor() + tensor(b"y"), tensor_count=2) + bytes(99), "lies at 0, not 32"),
    "twice": (raw(tensors=tensor() + tensor(offset=32), tensor_count=2) + bytes(199), "appears twice"),
    "cut off": (sound()[0][:60], "ends beyond byte 60"),
    "nothing": (b"", "ends beyond byte 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_the_reason(case):
    data, words = BAD[case]
    with pytest.raises(BadGguf, match=words):
        parse_header_untrusted(data, len(data))


def explore(data, file_bytes):
    """All that is done with a header from anywhere. Only our own errors come out."""
    try:
        header = parse_header_untrusted(data, file_bytes)
        model = model_of(header)
        sharding_of(model)
        for first in range(model.layers):
            wanted = slice_of(model, first, first + 1)
            assert wanted.size_bytes < 2 * file_bytes + (1 << 20)
            ranges = ranges_of(model, first, first + 1)
            assert all(0 <= start < end <= file_bytes for start, end in ranges)
    except CargoError:
        pass


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_mutated_models(data, synthetic, tmp_path_factory):
    base = model_bytes(synthetic, tmp_path_factory)
    end = header_end(base)
    mutated = bytearray(base)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, end - 1))
        mutated[at] = data.draw(st.sampled_from([0, 1, 2, 8, 9, 127, 128, 255]))
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, end))
        del mutated[cut : cut + data.draw(st.integers(0, 64))]
    explore(bytes(mutated), data.draw(st.sampled_from([len(mutated), end, 2 * len(mutated)])))


_bases: list[bytes] = []


def model_bytes(synthetic, tmp_path_factory):
    if not _bases:
        path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
        shape = synthetic.Shape(architecture="gemma3", layers=3, window=4, pattern=[True, False, True])
        synthetic.write_model(path, shape)
        _bases.append(path.read_bytes())
    return _bases[0]


@settings(max_examples=300, deadline=None)
@given(body=st.binary(max_size=400), size=st.integers(0, 1 << 40))
def test_any_bytes(body, size):
    explore(body, size)
    explore(b"GGUF" + struct.pack("<IQQ", 3, 2, 3) + body, size)


def test_a_large_vocabulary_is_skipped_quickly():
    """262,144 tokens with merges: no objects are made of them."""
    count = 262_144
    texts = b"".join(struct.pack("<Q", 6) + b"token!" for _ in range(count))
    blob = struct.pack("<IQ", 8, count) + texts
    data = raw(entry(b"tokenizer.ggml.tokens", 9, blob), entry(b"tokenizer.ggml.merges", 9, blob))
    header = parse_header_untrusted(data + bytes(64), len(data) + 64)
    assert header.metadata["tokenizer.ggml.tokens"].count == count
    assert len(header.metadata["tokenizer.ggml.merges"].raw) == len(blob)


def test_headers_are_bounded(monkeypatch):
    monkeypatch.setattr(gguf, "MAX_HEADER_BYTES", 100)
    with pytest.raises(BadGguf, match="ends beyond byte 100"):
        parse_header_untrusted(raw(entry(b"a", 9, struct.pack("<IQ", 0, 4000)) + bytes(4000)), 1 << 20)
