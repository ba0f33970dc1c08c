"""Files that are made here: `join:` of parts, `f16:` of a quantised model."""

from pathlib import Path

import pytest

from cargos.errors import FetchFailed, ManifestError
from cargos.locator import (
    BadLocator,
    FileLocator,
    HalvesLocator,
    JoinedLocator,
    WheelLocator,
    is_local,
    parse_locator_untrusted,
)
from cargos.manifest import canonical_json
from cargos.manifest_text import parse_manifest_untrusted
from cargos.shards.cut import read_header
from cargos.shards.gguf import Kind, NewTensor, TensorType, build_header, number_entry, string_entry
from cargos.shards.halves import halves_of, write_halves

JOIN = "join:pypi:a==1/x|file:y"


def quantised(path: Path, blob) -> bytes:
    """A GGUF of two tensors: one of Q8_0 blocks, whose scales are made finite, and one of F32."""
    tensors = [
        NewTensor("a.weight", (64, 40), TensorType.Q8_0),
        NewTensor("norm.weight", (8,), TensorType.F32),
    ]
    metadata = {"general.architecture": string_entry("x"), "general.file_type": number_entry(Kind.UINT32, 7)}
    header, starts, size = build_header(metadata, tensors, 32)
    data = bytearray(header) + bytearray(size - len(header))
    for start, tensor in zip(starts, tensors, strict=True):
        data[start : start + tensor.size_bytes] = blob(tensor.size_bytes)
        if tensor.type == TensorType.Q8_0:
            for at in range(start, start + tensor.size_bytes, 34):
                data[at : at + 2] = b"\x00\x20"
    path.write_bytes(data)
    return bytes(data)


@pytest.fixture
def model(tmp_path, blob):
    """A quantised model on disk, and what it is as F16."""
    path = tmp_path / "model.gguf"
    data = quantised(path, blob)
    return data, b"".join(write_halves(path, halves_of(read_header(path))))


class TestLocators:
    def test_forms(self):
        joined = parse_locator_untrusted(JOIN)
        assert joined == JoinedLocator((WheelLocator("a", "1", "x"), FileLocator("y")))
        halves = parse_locator_untrusted(f"f16:{JOIN}")
        assert halves == HalvesLocator(joined, JOIN)
        assert is_local(joined)
        assert is_local(halves)
        assert not is_local(parse_locator_untrusted("f16:pypi:a==1/x"))
        assert not is_local(parse_locator_untrusted("join:pypi:a==1/x|pypi:b==1/x"))

    @pytest.mark.parametrize(
        "text",
        [
            "join:", "join:file:x", "join:|", "join:file:x|", "join:file:x|https://h/x",
            "join:file:x|join:file:y|file:z",
            "join:" + "|".join(["file:x"] * 17), "f16:", "f16:x", "f16:f16:file:x", "f16:https://h/x",
            "f16:hf:o/r@m/x", "join:f16:file:x|file:y",
        ],
    )  # fmt: skip
    def test_bad_ones(self, text):
        with pytest.raises(BadLocator) as caught:
            parse_locator_untrusted(text)
        assert caught.value.hint

    def test_in_a_manifest(self, cargo):
        text = canonical_json(cargo(("x", b"x", [JOIN])))
        assert parse_manifest_untrusted(text, "json").files[0].sources == (JOIN,)
        with pytest.raises(ManifestError, match="sources"):
            parse_manifest_untrusted(text.replace("join:", "join:https://h/|"), "json")


class TestJoin:
    async def test_parts_become_one_file(self, store, cargo, blob, tmp_path, leftovers):
        data = blob(9_000_000)
        (tmp_path / "a").write_bytes(data[:5_000_000])
        (tmp_path / "b").write_bytes(data[5_000_000:])
        manifest = cargo(("x.gguf", data, ["join:file:a|file:b"]))
        paths = await store.ensure(manifest, base=tmp_path)
        assert paths["x.gguf"].read_bytes() == data
        assert not [path for path in leftovers() if path.startswith("parts")]

    @pytest.mark.parametrize(
        ("a", "b", "words"),
        [
            (b"12", b"4", "ended after 3 of 4"),
            (b"12", b"345", "3 bytes, at most 2"),
            (b"12", b"35", "wrong content"),
        ],
    )
    async def test_wrong_parts(self, store, cargo, tmp_path, a, b, words, leftovers):
        (tmp_path / "a").write_bytes(a)
        (tmp_path / "b").write_bytes(b)
        with pytest.raises(FetchFailed, match=words):
            await store.ensure(cargo(("x", b"1234", ["join:file:a|file:b"])), base=tmp_path)
        assert not [path for path in leftovers() if "blobs" in path or path.endswith(".tmp")]

    async def test_a_manifest_from_elsewhere_joins_no_files_of_ours(self, store, cargo):
        with pytest.raises(FetchFailed, match="may not reach into this machine"):
            await store.ensure(cargo(("x", b"1", ["join:file:/etc/passwd|file:/etc/passwd"])))


class TestHalves:
    async def test_a_model_is_rewritten(self, store, cargo, model, tmp_path, steps):
        _, expected = model
        manifest = cargo(("x.gguf", expected, ["f16:file:model.gguf"]))
        paths = await store.ensure(manifest, base=tmp_path, progress=steps.append)
        assert paths["x.gguf"].read_bytes() == expected
        assert "rewriting" in {step.state for step in steps}
        header = read_header(paths["x.gguf"])
        assert [tensor.type for tensor in header.tensors] == [TensorType.F16, TensorType.F32]

    async def test_of_parts(self, store, cargo, model, tmp_path):
        data, expected = model
        (tmp_path / "a").write_bytes(data[:1000])
        (tmp_path / "b").write_bytes(data[1000:])
        manifest = cargo(("x.gguf", expected, ["f16:join:file:a|file:b"]))
        assert (await store.ensure(manifest, base=tmp_path))["x.gguf"].read_bytes() == expected

    async def test_what_the_store_has_is_not_fetched_again(self, store, cargo, model, tmp_path):
        data, expected = model
        await store.ensure(cargo(("q.gguf", data, ["file:model.gguf"])), base=tmp_path)
        (tmp_path / "model.gguf").unlink()
        manifest = cargo(("x.gguf", expected, ["f16:file:model.gguf"]), name="halves")
        assert (await store.ensure(manifest, base=tmp_path))["x.gguf"].read_bytes() == expected

    @pytest.mark.parametrize("content", [b"", b"GGUF", b"x" * 5000])
    async def test_what_is_no_model(self, store, cargo, model, tmp_path, content):
        _, expected = model
        (tmp_path / "model.gguf").write_bytes(content)
        with pytest.raises(FetchFailed, match=r"can not be rewritten|bytes, at most"):
            await store.ensure(cargo(("x.gguf", expected, ["f16:file:model.gguf"])), base=tmp_path)

    async def test_another_model(self, store, cargo, model, tmp_path):
        data, expected = model
        with pytest.raises(FetchFailed, match="as F16"):
            await store.ensure(cargo(("x.gguf", expected + b"0", ["f16:file:model.gguf"])), base=tmp_path)
        (tmp_path / "model.gguf").write_bytes(data[:-1] + b"0")
        with pytest.raises(FetchFailed, match="wrong content"):
            await store.ensure(cargo(("x.gguf", expected, ["f16:file:model.gguf"])), base=tmp_path)
