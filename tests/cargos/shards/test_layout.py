"""What is in a slice, what it costs, where its bytes come from, what can not be cut."""

import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cargos.errors import CargoError, StoreUnusable
from cargos.manifest import Sharding
from cargos.shards import cut as cutting
from cargos.shards.architectures import KNOWN, CanNotCut, architecture_named
from cargos.shards.cut import cut, read_header, read_model
from cargos.shards.gguf import BadGguf, Kind, array_entry, number_entry, string_entry
from cargos.shards.layout import balanced_stages, ranges_of, sharding_of, slice_of, stages_of


@pytest.fixture
def make(synthetic, tmp_path):
    def build(name="m.gguf", **fields):
        return synthetic.write_model(tmp_path / name, synthetic.Shape(**fields))

    return build


def names(path):
    return {tensor.name for tensor in read_header(path).tensors}


def test_who_has_what(make, tmp_path):
    whole = make(layers=4, tied=False)
    for first, last in ((0, 2), (1, 3), (2, 4)):
        cut(whole, tmp_path / f"{first}", first, last)
    one, two, three = (read_header(tmp_path / str(first)) for first in range(3))
    assert [h.integer("llama.vocab_size") for h in (one, two)] == [288, 32]
    assert [h.text("tokenizer.ggml.model") for h in (one, two, three)] == ["none", "none", "llama"]
    assert [h.metadata.get("tokenizer.ggml.tokens") is not None for h in (one, two, three)] == [
        False,
        False,
        True,
    ]
    assert [h.integer("slice.first") for h in (one, two, three)] == [0, 1, 2]
    assert [h.integer("slice.last") for h in (one, two, three)] == [2, 3, 4]
    assert {h.integer("slice.of") for h in (one, two, three)} == {4}
    assert {h.integer("llama.block_count") for h in (one, two, three)} == {2}
    blocks = {name for name in names(whole) if name.startswith(("blk.0.", "blk.1."))}
    for path in ("0", "1", "2"):
        assert {name for name in names(tmp_path / path) if name.startswith("blk.")} == blocks
    sizes = {p: {t.name: t for t in read_header(tmp_path / p).tensors}["token_embd.weight"] for p in "012"}
    assert [sizes[p].dimensions[1] for p in "012"] == [288, 32, 288]
    head = next(t for t in read_header(whole).tensors if t.name == "output.weight")
    with whole.open("rb") as file, (tmp_path / "2").open("rb") as slice_:
        file.seek(head.start)
        slice_.seek(sizes["2"].start)
        assert slice_.read(head.size_bytes) == file.read(head.size_bytes)


def test_lists_by_layer_are_cut(make, tmp_path):
    whole = make(layers=4, extra={
        "llama.attention.head_count_kv": array_entry(Kind.UINT32, [2, 2, 2, 2]),
        "llama.feed_forward_length": array_entry(Kind.UINT32, [96, 96, 96, 96]),
        "llama.rope.dimension_sections": array_entry(Kind.UINT32, [1, 2, 3, 4]),
        "other.list": array_entry(Kind.UINT32, [1, 2, 3, 4]),
    })  # fmt: skip
    cut(whole, tmp_path / "s", 1, 3)
    header = read_header(tmp_path / "s")
    assert header.integers("llama.attention.head_count_kv") == (2, 2)
    assert header.integers("llama.feed_forward_length") == (96, 96)
    assert header.integers("llama.rope.dimension_sections") == (1, 2, 3, 4)
    assert header.integers("other.list") == (1, 2, 3, 4)


@pytest.mark.parametrize("tied", [True, False])
def test_sizes_are_those_of_the_slices(make, tied):
    """What planners are told is what Islands then hold: weights of the slices, without their headers."""
    whole = make(layers=5, tied=tied)
    model = read_model(whole)
    sharding = sharding_of(model)
    assert (sharding.layers, sharding.width, sharding.architecture) == (5, 64, "llama")
    assert sharding.kv_bytes == 2 * 2 * 16 * 2
    tokenizer = sum(len(e.raw) for key, e in model.header.metadata.items() if key.startswith("tokenizer."))
    for first, last in ((0, 2), (2, 4), (4, 5)):
        wanted = slice_of(model, first, last)
        data = sum(part.size for part in wanted.segments)
        norm = 0 if first == 0 or last == 5 else 256  # every slice has the final norm
        assert sharding.stage_bytes(first, last) + norm == data + (tokenizer if last == 5 else 0)


def test_ranges_are_all_that_is_needed(make, tmp_path):
    """A file that has only these bytes gives the same slice."""
    whole = make(layers=6)
    data = whole.read_bytes()
    model = read_model(whole)
    for first, last in ((0, 1), (2, 4), (5, 6)):
        ranges = ranges_of(model, first, last)
        assert list(ranges) == sorted(ranges)
        holes = bytearray(os.urandom(len(data)))
        for start, end in ranges:
            holes[start:end] = data[start:end]
        (tmp_path / "holes").write_bytes(holes)
        cut(tmp_path / "holes", tmp_path / "a", first, last)
        cut(whole, tmp_path / "b", first, last)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert sum(end - start for start, end in ranges) < len(data)


def test_layers_that_are_not_there(make):
    model = read_model(make())
    for first, last in ((-1, 2), (0, 5), (2, 2), (3, 1)):
        with pytest.raises(CanNotCut, match="layers 0 to 4"):
            slice_of(model, first, last)


REFUSED = [
    ({"architecture": "smollm3"}, "from a layer's number"),
    ({"architecture": "mamba"}, "recurrent"),
    ({"architecture": "bert"}, "encoder"),
    ({"architecture": "gemma3n"}, "more than the row"),
    ({"architecture": "no-such-thing"}, "nobody has shown"),
    ({"architecture": "gemma2", "layers": 46, "width": 32}, "knows it by the number of layers"),
    ({"extra": {"slice.of": number_entry(Kind.UINT32, 9)}}, "itself a slice"),
    ({"extra": {"split.count": number_entry(Kind.UINT16, 2)}}, "one of several"),
    ({"extra": {"llama.nextn_predict_layers": number_entry(Kind.UINT32, 1)}}, "predict several"),
    ({"extra": {"llama.block_count": number_entry(Kind.UINT32, 3)}}, "a layer 3 beside its 3"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids=[words[:20] for _, words in REFUSED])
def test_what_can_not_be_cut_and_why(make, fields, words):
    with pytest.raises(CanNotCut, match=words) as caught:
        read_model(make(**fields))
    assert caught.value.hint


def test_what_works_is_named():
    with pytest.raises(CanNotCut) as caught:
        architecture_named("rwkv7", 12)
    assert all(name in caught.value.hint for name in KNOWN)


BROKEN = [
    ({"llama.block_count": number_entry(Kind.UINT32, 5)}, "layer 4 of 5 has no tensors"),
    ({"llama.block_count": number_entry(Kind.UINT32, 0)}, "not a number between"),
    ({"llama.block_count": number_entry(Kind.UINT32, 1 << 31)}, "not a number between"),
    ({"llama.block_count": string_entry("4")}, "not a whole number"),
    ({"llama.embedding_length": number_entry(Kind.UINT32, 32)}, "no embeddings of the width"),
    ({"llama.attention.head_count": number_entry(Kind.UINT32, 0)}, "head_count"),
    ({"llama.attention.head_count": number_entry(Kind.UINT32, 126)}, "head_count"),
    ({"llama.attention.head_count": number_entry(Kind.INT32, -1)}, "head_count"),
    ({"llama.attention.key_length": number_entry(Kind.INT32, -16)}, "keys and values"),
    ({"llama.attention.key_length": number_entry(Kind.UINT32, 1 << 31)}, "keys and values"),
    ({"general.architecture": string_entry("")}, "no architecture"),
]


@pytest.mark.parametrize(("extra", "words"), BROKEN, ids=[words[:20] for _, words in BROKEN])
def test_broken_models(make, extra, words):
    with pytest.raises(BadGguf, match=words):
        read_model(make(extra=extra))


@given(layers=st.integers(1, 130), stages=st.integers(1, 130))
def test_even_stages(layers, stages):
    if stages > layers:
        with pytest.raises(CanNotCut):
            stages_of(layers, stages)
        return
    ranges = stages_of(layers, stages)
    assert [first for first, _ in ranges] == [0, *(last for _, last in ranges[:-1])]
    assert ranges[-1][1] == layers
    sizes = [last - first for first, last in ranges]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=9),
    ends=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    stages=st.integers(1, 5),
)
def test_balanced_stages_are_the_best_there_are(sizes, ends, stages):
    sharding = Sharding(
        architecture="x", layers=len(sizes), width=1, layer_bytes=tuple(sizes), embedding_bytes=ends[0],
        head_bytes=ends[1], kv_bytes=1,
    )  # fmt: skip
    if stages > len(sizes):
        with pytest.raises(CanNotCut):
            balanced_stages(sharding, stages)
        return

    def most(ranges):
        return max(sharding.stage_bytes(*part) for part in ranges)

    borders = itertools.combinations(range(1, len(sizes)), stages - 1)
    best = min(most(list(itertools.pairwise([0, *chosen, len(sizes)]))) for chosen in borders)
    assert most(balanced_stages(sharding, stages)) == best


class TestWriting:
    def test_without_the_kernels_help(self, make, tmp_path, monkeypatch):
        whole = make()
        cut(whole, tmp_path / "a", 1, 3)

        def refuse(*_):
            raise OSError(18, "across file systems")

        monkeypatch.setattr(os, "copy_file_range", refuse)
        monkeypatch.setattr(cutting, "COPY_BYTES", 1000)
        cut(whole, tmp_path / "b", 1, 3)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_a_failure_leaves_what_was_there(self, make, tmp_path, monkeypatch):
        whole = make()
        target = tmp_path / "out" / "s.gguf"
        target.parent.mkdir()
        target.write_bytes(b"older")

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "copy_file_range", full)
        with pytest.raises(StoreUnusable, match="full"):
            cut(whole, target, 0, 2)
        assert target.read_bytes() == b"older"
        assert list(target.parent.iterdir()) == [target]

    def test_files_that_are_not_there(self, make, tmp_path):
        with pytest.raises(CargoError, match="can not read"):
            cut(tmp_path / "none", tmp_path / "s", 0, 1)
        with pytest.raises(StoreUnusable):
            cut(make(), tmp_path / "no" / "folder", 0, 1)

    def test_the_models_file_shrinks(self, make, tmp_path):
        whole = make()
        model = read_model(whole)
        wanted = slice_of(model, 3, 4)
        os.truncate(whole, model.header.data_start + 10)
        with pytest.raises(CargoError, match="shrank"):
            cutting.write_slice(whole, tmp_path / "s", wanted)
        assert not (tmp_path / "s").exists()
