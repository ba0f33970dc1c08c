"""The schema, its errors, the canonical bytes."""

import copy
import hashlib
import json
import re
from pathlib import Path

import msgspec
import pytest

from cargos.catalogue import CargoEntry, Catalogue
from cargos.errors import ManifestError, UnknownCargo
from cargos.locator import (
    BadLocator,
    FileLocator,
    HttpLocator,
    HubLocator,
    WheelLocator,
    is_local,
    parse_locator_untrusted,
)
from cargos.manifest import (
    CargoFile,
    Defaults,
    Licence,
    Manifest,
    Needs,
    Sharding,
    canonical_bytes,
    canonical_json,
)
from cargos.manifest_text import EXPECTED, MAX_MANIFEST_BYTES, parse_manifest_untrusted
from cargos.resolve import resolve_cargo

TOML = """
schema = 1
name = "tiny"
version = "1.2.0"
title = "Tiny 🐟"
description = "Two\\nlines"
runtime = "llmcpp"
publisher = "tests"
context_length = 512
categories = ["chat", "a-b"]
[licence]
spdx = "MIT"
[needs]
memory_mib = 100
[defaults]
temperature = 1.0
top_p = 0.95
[[files]]
name = "b.gguf"
role = "model"
size_bytes = 5
sha256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
sources = ["https://example.org/b.gguf", "file:b.gguf"]
[[files]]
name = "a/b.json"
role = "config"
size_bytes = 7
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
sources = ["hf:o/r@main/b.json"]
"""


@pytest.fixture
def plain():
    return json.loads(canonical_json(parse_manifest_untrusted(TOML, "toml")))


def parse(plain):
    return parse_manifest_untrusted(json.dumps(plain), "json")


def test_canonical_bytes_are_fixed_for_ever():
    """If this fails, every digest and every signature in the world changes."""
    expected = (
        "archipelag-cargo-1\n"
        '{"categories":["a-b","chat"],"context_length":512,"defaults":{"temperature":1,"top_p":0.95},'
        '"description":"Two\\nlines","files":[{"name":"a/b.json","role":"config",'
        '"sha256":"0000000000000000000000000000000000000000000000000000000000000000","size_bytes":7,'
        '"sources":["hf:o/r@main/b.json"]},{"name":"b.gguf","role":"model",'
        '"sha256":"2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824","size_bytes":5,'
        '"sources":["https://example.org/b.gguf","file:b.gguf"]}],"licence":{"spdx":"MIT"},"name":"tiny",'
        '"needs":{"memory_mib":100},"publisher":"tests","runtime":"llmcpp","schema":1,"title":"Tiny 🐟",'
        '"version":"1.2.0"}'
    )
    manifest = parse_manifest_untrusted(TOML, "toml")
    assert canonical_bytes(manifest).decode() == expected
    assert manifest.digest == "sha256:" + hashlib.sha256(expected.encode()).hexdigest()


def test_spelling_does_not_matter(plain):
    manifest = parse_manifest_untrusted(TOML, "toml")
    spelled = dict(reversed(list(plain.items())))
    spelled["files"] = [dict(reversed(list(file.items()))) for file in reversed(plain["files"])]
    spelled["categories"] = ["chat", "a-b"]
    spelled["capabilities"] = []
    spelled["chat_template"] = None
    spelled["needs"] = {"gpu": "none", "cpu_cores": 1, "memory_mib": 100, "vram_mib": 0}
    spelled["defaults"] = {"top_p": 0.95, "temperature": 1, "seed": None}
    del spelled["defaults"]["seed"]
    again = parse_manifest_untrusted(json.dumps(spelled, indent=3, ensure_ascii=True), "json")
    assert again == manifest
    assert again.digest == manifest.digest
    assert parse_manifest_untrusted(TOML.replace("\n", "\r\n"), "toml") == manifest
    assert parse_manifest_untrusted(canonical_json(manifest), "json") == manifest


def leaves(value, path=()):
    match value:
        case dict():
            for key, inner in value.items():
                yield from leaves(inner, (*path, key))
        case list():
            for index, inner in enumerate(value):
                yield from leaves(inner, (*path, index))
        case _:
            yield path, value


FULL = {
    "description": "d",
    "context_length": 9,
    "chat_template": "{{ messages }}",
    "categories": ["x"],
    "capabilities": ["y"],
    "needs": {"memory_mib": 7, "vram_mib": 8, "disk_mib": 9, "cpu_cores": 2, "gpu": "preferred"},
    "licence": {"spdx": "MIT", "url": "https://example.org/l"},
    "defaults": {
        "system_prompt": "Hi",
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.5,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repeat_penalty": 0.5,
        "max_tokens": 5,
    },
    "sharding": {
        "architecture": "llama",
        "layers": 2,
        "width": 64,
        "layer_bytes": [1, 1],
        "embedding_bytes": 2,
        "head_bytes": 3,
        "kv_bytes": 9,
        "draft_kv_bytes": 7,
    },
}
PIECES = {"piece_bytes": 1 << 20, "pieces_sha256": "1" * 64}


def test_every_field_counts(plain):
    """Change any one value anywhere, and the digest changes. Covers all fields of all types."""
    plain.update(copy.deepcopy(FULL))
    plain["files"][1].update(PIECES)
    original = parse(plain)
    whole = parse({key: value for key, value in plain.items() if key != "sharding"})
    seen = {original.digest, whole.digest}
    assert len(seen) == 2
    others = {"schema": 1, "runtime": "onnx", "gpu": "required", "spdx": "BSD-3-Clause"}
    paths = [path for path, _ in leaves(plain) if path != ("schema",)]
    for path in paths:
        changed = copy.deepcopy(plain)
        if path[-1] in ("role", "runtime"):
            del changed["sharding"]  # which needs them as they are
        place = changed
        for step in path[:-1]:
            place = place[step]
        match place[path[-1]]:
            case int() as number if path[-1] == "piece_bytes":
                place[path[-1]] = number * 2
            case int() as number if path[-1] == "layers":
                place["layers"], place["layer_bytes"] = number + 1, [1, 1, 1]
            case int() | float() as number:
                place[path[-1]] = number + 0.25 if isinstance(number, float) else number + 1
            case text if path[-1] in others:
                assert text != others[path[-1]]
                place[path[-1]] = others[path[-1]]
            case text if path[-1] in ("sha256", "pieces_sha256"):
                place[path[-1]] = text[:-1] + ("1" if text[-1] != "1" else "2")
            case text:
                place[path[-1]] = text + "1"
        digest = parse(changed).digest
        assert digest not in seen, path
        seen.add(digest)
    touched = {step for path in paths for step in path} | {"schema"}
    for kind in (Manifest, CargoFile, Needs, Licence, Defaults, Sharding):
        assert set(kind.__struct_fields__) <= touched


def test_the_order_of_sources_counts(plain):
    before = parse(plain).digest
    plain["files"][1]["sources"].reverse()
    assert parse(plain).digest != before


def test_every_field_has_words():
    for prefix, kind in (("", Manifest), ("files[].", CargoFile), ("needs.", Needs), ("licence.", Licence)):
        assert {prefix + name for name in kind.__struct_fields__} <= set(EXPECTED)
    for prefix, kind in (("defaults.", Defaults), ("sharding.", Sharding)):
        assert {prefix + name for name in kind.__struct_fields__} <= set(EXPECTED)


def test_the_document_describes_every_field():
    text = (Path(__file__).parents[2] / "docs" / "cargos.md").read_text("utf-8")
    for kind in (Manifest, CargoFile, Needs, Licence, Defaults, Sharding):
        for name in kind.__struct_fields__:
            assert re.search(rf"`{name}`", text), name


BAD = [
    # path of the change, new value, path of the error, words in it
    ("name", "../x", "name", "lower-case letters"),
    ("name", "Tiny", "name", "'Tiny'"),
    ("name", "tiny\n", "name", "lower-case"),
    ("name", "", "name", "''"),
    ("schema", 2, "schema", "the number 1"),
    ("schema", True, "schema", "the number 1"),
    ("version", "latest", "version", "begins with a digit"),
    ("runtime", "coreml", "runtime", "one of llmcpp, onnx, wasm, container, diffusers"),
    ("title", "two\nlines", "title", "U+000A"),
    ("title", "evil\u202egnp", "title", "U+202E"),
    ("title", 5, "title", "not 5"),
    ("description", "a\rb", "description", "U+000D"),
    ("context_length", -1, "context_length", "between 0 and 262144"),
    ("context_length", 1 << 80, "context_length", "not 12089"),
    ("context_length", 1 << 8000, "context_length", "a huge number"),
    ("context_length", 10.5, "context_length", "whole number"),
    ("publisher", "12D3KooWnobody", "publisher", "Ed25519 key"),
    ("publisher", None, "publisher", "null"),
    ("categories", "chat", "categories", "a list of words"),
    ("categories", ["chat", "chat"], "categories", "twice"),
    ("categories", ["Chat"], "categories[0]", "'Chat'"),
    ("licence", "MIT", "licence", "a table with spdx"),
    ("licence.spdx", "MIT; rm", "licence.spdx", "SPDX"),
    ("licence.url", "javascript:alert(1)", "licence.url", "https URL"),
    ("needs.memory_mib", 0, "needs.memory_mib", "at least 1"),
    ("needs.memory_mib", "4 GB", "needs.memory_mib", "'4 GB'"),
    ("needs.gpu", "yes", "needs.gpu", "'preferred'"),
    ("needs.gpu", "required", "needs.vram_mib", "missing"),
    ("defaults.temperature", 2.5, "defaults.temperature", "between 0 and 2"),
    ("defaults.temperature", 0.12345, "defaults.temperature", "decimals"),
    ("defaults.top_p", 0, "defaults.top_p", "above 0"),
    ("files", [], "files", "1 to 256 tables"),
    ("files", {}, "files", "1 to 256 tables"),
    ("files.0", "x.gguf", "files[0]", "a table with name"),
    ("files.0.name", "../x", "files[0].name", "No absolute paths"),
    ("files.0.name", "/etc/passwd", "files[0].name", "No absolute paths"),
    ("files.0.name", "a//b", "files[0].name", "No absolute paths"),
    ("files.0.name", "a/./b", "files[0].name", "No absolute paths"),
    ("files.0.name", "a\\b", "files[0].name", "No absolute paths"),
    ("files.0.name", "c:b", "files[0].name", "No absolute paths"),
    ("files.0.name", ".ssh", "files[0].name", "No absolute paths"),
    ("files.0.name", "a\n", "files[0].name", "U+000A"),
    ("files.0.name", "a" * 201, "files[0].name", "..."),
    ("files.0.name", "B.gguf", "files[1].name", "the same name"),
    ("files.0.name", "b.gguf", "files[1].name", "the same name"),
    ("files.0.name", "b.gguf/x", "files[0].name", "also a file"),
    ("files.0.size_bytes", 0, "files[0].size_bytes", "at least 1"),
    ("files.0.size_bytes", 1 << 60, "files[0].size_bytes", "bytes"),
    ("files.0.sha256", "00" * 31, "files[0].sha256", "64 lower-case hex"),
    ("files.0.sha256", "AB" * 32, "files[0].sha256", "64 lower-case hex"),
    ("files.0.piece_bytes", 1 << 20, "files[0].piece_bytes", "belong together"),
    ("files.0.pieces_sha256", "1" * 64, "files[0].piece_bytes", "belong together"),
    ("files.0.pieces_sha256", "1" * 63, "files[0].pieces_sha256", "64 lower-case hex"),
    ("files.0", {**PIECES, "piece_bytes": 1 << 23}, "files[0].piece_bytes", "power of two"),
    ("files.0", {**PIECES, "piece_bytes": 3 << 15}, "files[0].piece_bytes", "power of two"),
    ("files.0", {**PIECES, "piece_bytes": 1 << 10}, "files[0].piece_bytes", "power of two"),
    ("files.0", {**PIECES, "size_bytes": 1 << 41}, "files[0].piece_bytes", "2097152 pieces"),
    ("sharding", {"layers": 3}, "sharding.layer_bytes", "2 sizes for 3 layers"),
    ("sharding", {"layers": 0}, "sharding.layers", "between 1 and 512"),
    ("sharding", {"layer_bytes": [1, 0]}, "sharding.layer_bytes[1]", "between 1"),
    ("sharding", {"layer_bytes": [1, 5]}, "sharding.layer_bytes", "larger than the file"),
    ("sharding", {"head_bytes": 6}, "sharding.head_bytes", "larger than the file"),
    ("sharding", {"embedding_bytes": 6}, "sharding.embedding_bytes", "larger than the file"),
    ("sharding", {"architecture": "Llama 2"}, "sharding.architecture", "'Llama 2'"),
    ("sharding", {"first": 1}, "sharding.first", "unknown field"),
    ("sharding", 5, "sharding", "archi-node cargo pieces"),
    ("files.0.role", "", "files[0].role", "what the file is for"),
    ("files.0.sources", [], "files[0].sources", "1 to 8"),
    ("files.0.sources", ["file:x"] * 2, "files[0].sources", "twice"),
    ("files.0.sources", ["file:x", "gopher:x"], "files[0].sources[1]", "unknown scheme 'gopher'"),
    ("nmae", "x", "nmae", "Did you mean 'name'?"),
    ("license", "MIT", "license", "Did you mean 'licence'?"),
    ("zzz", 1, "zzz", "Known here: schema, name"),
    ("needs.memory", 1, "needs.memory", "Did you mean 'memory_mib'?"),
    ("files.1.sha265", "x", "files[1].sha265", "Did you mean 'sha256'?"),
    ("defaults.temprature", 1, "defaults.temprature", "Did you mean 'temperature'?"),
]


@pytest.mark.parametrize(
    ("where", "value", "path", "words"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)]
)
def test_what_is_wrong_is_said_with_its_place(plain, where, value, path, words):
    place = plain
    *steps, last = [int(step) if step.isdigit() else step for step in where.split(".")]
    for step in steps:
        place = place[step]
    if isinstance(value, dict) and value:  # a few fields of a table
        base = FULL["sharding"] if where == "sharding" else place[last]
        value = {**base, **value}
    place[last] = value
    with pytest.raises(ManifestError) as caught:
        parse(plain)
    assert caught.value.path == path
    assert words in str(caught.value)
    assert caught.value.hint
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("missing", ["schema", "name", "files", "needs", "licence", "title", "publisher"])
def test_missing_fields(plain, missing):
    del plain[missing]
    with pytest.raises(ManifestError, match=rf"^{missing}: missing") as caught:
        parse(plain)
    assert EXPECTED[missing] in caught.value.hint


@pytest.mark.parametrize(
    ("change", "words"),
    [({"runtime": "onnx"}, "no layers to spread"), ({"files": "model twice"}, "2 files have the role")],
)
def test_sharding_needs_one_model_of_the_right_runtime(plain, change, words):
    plain["sharding"] = FULL["sharding"]
    parse(plain)
    if "files" in change:
        plain["files"][0]["role"] = "model"
    else:
        plain.update(change)
    with pytest.raises(ManifestError, match=words):
        parse(plain)


def test_pieces_and_stages_are_counted(plain):
    plain["files"][1].update(PIECES, size_bytes=(1 << 20) + 1)
    plain["sharding"] = {**FULL["sharding"], "layer_bytes": [10, 20]}
    manifest = parse(plain)
    assert [file.pieces for file in manifest.files] == [0, 2]
    stages = manifest.sharding.stage_bytes
    assert (stages(0, 2), stages(0, 1), stages(1, 2)) == (35, 12, 23)


def test_missing_field_of_a_file(plain):
    del plain["files"][1]["sha256"]
    with pytest.raises(ManifestError, match=r"^files\[1\]\.sha256: missing"):
        parse(plain)


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("x" * (MAX_MANIFEST_BYTES + 1), "toml", "exceeds"),
        (b"\xff\xfe", "json", "not UTF-8"),
        ("\ud800", "json", "not UTF-8"),
        ("[1]", "json", "a table of fields was expected, not a list of 1"),
        ("{", "json", "not JSON"),
        ("{}", "toml", "not TOML"),
        ("[" * 100_000, "json", "nested too deeply"),
        ("a=" + "[" * 100_000, "toml", "nested too deeply"),
        (".".join(["a"] * 60_000) + "=1", "toml", "dots"),
        ('{"schema":1,"schema":1}', "json", "appears twice"),
        ("a = 1\na = 1", "toml", "not TOML"),
        ('{"schema":NaN}', "json", "NaN"),
        ("1" * 5000, "json", "not JSON"),
        ("a = " + "1" * 5000, "toml", "not TOML"),
        ("", "json", "not JSON"),
        ("", "toml", "schema: missing"),
    ],
)
def test_texts_that_are_no_manifest(text, kind, words):
    with pytest.raises(ManifestError, match=words):
        parse_manifest_untrusted(text, kind)


def test_nan_and_surrogates_in_values(plain):
    with pytest.raises(ManifestError, match="temperature"):
        parse_manifest_untrusted(TOML.replace("temperature = 1.0", "temperature = nan"), "toml")
    with pytest.raises(ManifestError, match=r"U\+D800"):
        parse_manifest_untrusted(canonical_json(parse(plain)).replace("Tiny 🐟", "\\ud800"), "json")


@pytest.mark.parametrize(
    ("text", "locator"),
    [
        ("file:a/b.gguf", FileLocator("a/b.gguf")),
        ("file:../b.gguf", FileLocator("../b.gguf")),
        ("file:/a b", FileLocator("/a b")),
        ("file:///a", FileLocator("/a")),
        ("file://localhost/a", FileLocator("/a")),
        ("https://h.example:8443/p?q=1", HttpLocator("https://h.example:8443/p?q=1", False)),
        ("http://127.0.0.1:80/p", HttpLocator("http://127.0.0.1:80/p", True)),
        ("http://[::1]/p", HttpLocator("http://[::1]/p", True)),
        ("https://localhost/p", HttpLocator("https://localhost/p", True)),
        ("hf:o/r@main/a/b.gguf", HubLocator("o", "r", "main", "a/b.gguf")),
        ("pypi:a-b==1.0/c/d.gguf", WheelLocator("a-b", "1.0", "c/d.gguf")),
    ],
)
def test_locators(text, locator):
    assert parse_locator_untrusted(text) == locator


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "file:", "file:a/", "file://host/a", "ftp://h/a", "data:,x",
        "http://example.org/x", "http://192.168.0.1/x", "http://127.0.0.1.evil.example/x", "http://0.0.0.0/x",
        "https://", "https:///x", "https:h/x", "https://h", "https://h/", "https://u:p@h/x", "https://h/x#f",
        "https://h:99999/x", "https://[::1/x", "https://h/a b", "https://h\\@g/x", "https://ü/x", "https://h/\n",
        "hf:o/r/x", "hf:o/r@main/", "hf:o/r@main/../x", "hf:o/r@/x", "hf:../r@m/x", "hf://o/r@m/x",
        "pypi:a/x", "pypi:a==1.*/x", "pypi:a>=1/x", "pypi:--index-url==1/x", "pypi:a==1/../x", "pypi:a==1//x",
        "pypi:a==-r/x", "pypi:a[b]==1/x", "pypi:a==1 ; x/y", "x" * 3000,
    ],
)  # fmt: skip
def test_bad_locators(text):
    with pytest.raises(BadLocator):
        parse_locator_untrusted(text)


def test_local_sources_are_told_apart():
    assert is_local(FileLocator("a"))
    assert is_local(HttpLocator("http://localhost/x", True))
    assert not is_local(HttpLocator("https://h/x", False))
    assert not is_local(HubLocator("o", "r", "m", "p"))
    assert not is_local(WheelLocator("p", "1", "m"))


def test_hub_urls_are_quoted():
    assert HubLocator("o", "r", "v1", "a b#?.gguf").url("https://hub/") == (
        "https://hub/o/r/resolve/v1/a%20b%23%3F.gguf"
    )


class TestCatalogue:
    def entry(self, name, version):
        plain = json.loads(canonical_json(parse_manifest_untrusted(TOML, "toml")))
        return CargoEntry.of(parse({**plain, "name": name, "version": version}))

    def test_lookup(self):
        entries = [self.entry("a", v) for v in ("1.9", "1.10-rc1", "1.10", "1.2")] + [self.entry("b", "1")]
        catalogue = Catalogue(entries)
        assert catalogue.lookup("a") is entries[2]
        assert catalogue.lookup("a@1.9") is entries[0]
        assert catalogue.lookup(entries[3].digest) is entries[3]
        assert list(catalogue) == entries
        assert len(catalogue) == 5
        with pytest.raises(UnknownCargo, match="Known: a, b"):
            catalogue.lookup("zzz")

    def test_nearest_name(self):
        with pytest.raises(UnknownCargo, match="Did you mean 'mistral'"):
            Catalogue([self.entry("mistral", "1")]).lookup("mistrla")

    def test_two_of_one_name_and_version(self):
        one = self.entry("a", "1")
        assert len(Catalogue([one, one])) == 1
        other = CargoEntry.of(msgspec.structs.replace(one.manifest, title="Other"))
        with pytest.raises(ValueError, match="two Cargos are named a@1"):
            Catalogue([one, other])


class TestResolve:
    def test_paths(self, tmp_path, plain):
        (tmp_path / "m.toml").write_text(TOML)
        (tmp_path / "m.json").write_text(json.dumps(plain))
        entry = resolve_cargo(str(tmp_path / "m.toml"))
        assert entry.base == tmp_path.resolve()
        assert resolve_cargo(tmp_path / "m.json").digest == entry.digest

    @pytest.mark.parametrize("reference", ["no/such.toml", "such.json", "./smollm2-135m.toml"])
    def test_missing(self, reference):
        with pytest.raises(UnknownCargo, match="can not read"):
            resolve_cargo(reference)

    def test_other_endings(self, tmp_path):
        (tmp_path / "m.yaml").write_text("")
        with pytest.raises(ManifestError, match="neither"):
            resolve_cargo(tmp_path / "m.yaml")

    def test_builtin(self):
        entry = resolve_cargo("smollm2-135m")
        assert entry.base is None
        assert resolve_cargo(entry.digest) is entry
        with pytest.raises(UnknownCargo, match="Did you mean 'smollm2-135m'"):
            resolve_cargo("smollm2")
