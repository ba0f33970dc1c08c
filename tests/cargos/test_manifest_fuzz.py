"""Any bytes give a manifest or a ManifestError; any spelling of a manifest gives its digest."""

import json
import string

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cargos.errors import CargoError, ManifestError
from cargos.locator import BadLocator, parse_locator_untrusted
from cargos.manifest import Manifest, canonical_json
from cargos.manifest_text import parse_manifest_untrusted

SLUG = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,20}[a-z0-9])?", fullmatch=True)
LABEL = st.from_regex(r"[a-z0-9][a-z0-9-]{0,10}", fullmatch=True)
LINE = st.text(st.characters(codec="utf-8").filter(str.isprintable), min_size=1, max_size=40)
TEXT = st.lists(LINE, min_size=1, max_size=3).map("\n".join)
SEGMENT = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,10}", fullmatch=True)
DECIMAL = st.integers(0, 10_000).map(lambda i: i / 10_000)
SOURCE = st.one_of(
    SEGMENT.map("file:{}".format),
    SEGMENT.map("https://h.example/{}".format),
    SEGMENT.map("hf:o/r@main/{}".format),
    SEGMENT.map("pypi:p==1.0/{}".format),
)
FILE = st.fixed_dictionaries(
    {
        "name": SEGMENT,
        "role": LABEL,
        "size_bytes": st.integers(1, 1 << 42),
        "sha256": st.text("0123456789abcdef", min_size=64, max_size=64),
        "sources": st.lists(SOURCE, min_size=1, max_size=3, unique=True),
    }
)
MANIFEST = st.fixed_dictionaries(
    {
        "schema": st.just(1),
        "name": SLUG,
        "version": st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,3}){0,2}", fullmatch=True),
        "title": LINE,
        "runtime": st.sampled_from(["llmcpp", "onnx", "wasm", "container", "diffusers"]),
        "publisher": st.from_regex(r"[a-z][A-Za-z0-9._-]{0,20}", fullmatch=True),
        "licence": st.fixed_dictionaries({"spdx": st.sampled_from(["MIT", "Apache-2.0"])}),
        "needs": st.fixed_dictionaries(
            {"memory_mib": st.integers(1, 1 << 26)},
            optional={"cpu_cores": st.integers(1, 64), "gpu": st.sampled_from(["none", "preferred"])},
        ),
        "files": st.lists(FILE, min_size=1, max_size=3, unique_by=lambda file: file["name"].lower()),
    },
    optional={
        "description": TEXT,
        "context_length": st.integers(0, 262_144),
        "chat_template": TEXT,
        "categories": st.lists(LABEL, max_size=3, unique=True),
        "capabilities": st.lists(LABEL, max_size=3, unique=True),
        "defaults": st.fixed_dictionaries(
            {}, optional={"temperature": DECIMAL, "top_k": st.integers(0, 1000), "system_prompt": TEXT}
        ),
    },
)
JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FAST = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def parses_or_refuses(text, kind):
    try:
        manifest = parse_manifest_untrusted(text, kind)
    except ManifestError as error:
        assert str(error).isprintable() or "\n" in str(error)
        assert len(str(error)) < 4000
    else:
        assert isinstance(manifest, Manifest)
        assert parse_manifest_untrusted(canonical_json(manifest), "json") == manifest


def toml_of(value):
    """A value as inline TOML. JSON's strings are TOML's, but for the escape of DEL and surrogate pairs."""
    match value:
        case dict():
            return "{" + ", ".join(f"{json.dumps(k)} = {toml_of(v)}" for k, v in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(toml_of, value)) + "]"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case _:
            return json.dumps(value)


def shuffled(value, random):
    match value:
        case dict():
            items = [(key, shuffled(inner, random)) for key, inner in value.items()]
            random.shuffle(items)
            return dict(items)
        case list():
            return [shuffled(inner, random) for inner in value]
        case _:
            return value


@FAST
@given(MANIFEST, st.randoms(use_true_random=False))
def test_every_spelling_has_the_same_digest(plain, random):
    first = parse_manifest_untrusted(json.dumps(plain), "json")
    other = shuffled(plain, random)
    random.shuffle(other["files"])
    for labels in ("categories", "capabilities"):
        random.shuffle(other.get(labels, []))
    second = parse_manifest_untrusted(json.dumps(other, indent=1, ensure_ascii=False), "json")
    toml = "\n".join(f"{key} = {toml_of(value)}" for key, value in other.items())
    third = parse_manifest_untrusted(toml, "toml")
    assert first == second == third
    assert first.digest == second.digest == third.digest
    assert parse_manifest_untrusted(canonical_json(first), "json") == first


@settings(FAST, max_examples=40)
@given(MANIFEST, MANIFEST, st.data())
def test_equal_digests_mean_equal_manifests(one, two, data):
    """One field taken over from another manifest: mostly a change, sometimes none."""
    key = data.draw(st.sampled_from(sorted(one)))
    other = {**one, key: two.get(key, one[key])}
    first, second = (parse_manifest_untrusted(json.dumps(plain), "json") for plain in (one, other))
    assert (first.digest == second.digest) == (first == second)


@FAST
@given(MANIFEST, st.data())
def test_a_manifest_with_one_value_replaced_by_anything(plain, data):
    place = plain
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        place = inner
    place[key] = data.draw(JSON_VALUE)
    text = json.dumps(plain)
    parses_or_refuses(text, "json")


@FAST
@given(st.binary(max_size=200) | st.text(max_size=200), st.sampled_from(["toml", "json"]))
def test_any_bytes(text, kind):
    parses_or_refuses(text, kind)


@FAST
@given(JSON_VALUE)
def test_any_json(value):
    parses_or_refuses(json.dumps(value), "json")


@FAST
@given(
    st.lists(
        st.sampled_from([*"[]{}\"'=.,#\n\\u0", "a", "schema", "files", "1979-05-27", "1e5", "true", '"""'])
    )
)
def test_anything_made_of_toml_tokens(tokens):
    parses_or_refuses("".join(tokens), "toml")


@FAST
@given(MANIFEST, st.data())
def test_a_text_with_a_few_bytes_changed(plain, data):
    raw = bytearray(json.dumps(plain), "utf-8")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    parses_or_refuses(bytes(raw), "json")


@FAST
@given(
    st.text(max_size=60)
    | st.tuples(
        st.sampled_from(["file:", "https://", "http://", "hf:o/r@m/", "hf:", "pypi:", "pypi:a==1/"]),
        st.text(string.printable + "é\u202e\ud800", max_size=40),
    ).map("".join)
)
def test_any_locator(text):
    try:
        parse_locator_untrusted(text)
    except BadLocator as error:
        assert isinstance(error, CargoError)
