"""A manifest's text, TOML or JSON, to a checked `Manifest`. Pure; the text may come from anywhere."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from typing import Any, Final, Literal, TypeAlias, cast

import msgspec

from cargos.errors import ManifestError
from cargos.locator import BadLocator, parse_locator_untrusted
from cargos.manifest import (
    MAX_CHAT_TEMPLATE_CHARS,
    MAX_DECIMALS,
    MAX_DESCRIPTION_CHARS,
    MAX_FILE_BYTES,
    MAX_FILES,
    MAX_KV_BYTES,
    MAX_PIECE_BYTES,
    MAX_PIECES,
    MAX_SOURCES,
    MAX_SYSTEM_PROMPT_CHARS,
    MAX_TITLE_CHARS,
    MAX_WIDTH,
    MIN_PIECE_BYTES,
    SCHEMA_VERSION,
    CargoFile,
    Defaults,
    Licence,
    Manifest,
    Needs,
    RuntimeType,
    Sharding,
    normal_form,
)
from protocol.codec import excerpt
from protocol.errors import ProtocolError
from protocol.ids import peer_id_untrusted
from protocol.limits import KIB, MAX_CONTEXT_TOKENS
from protocol.ring import MAX_LAYERS

Format: TypeAlias = Literal["toml", "json"]

#: A manifest with the longest chat template and 64 files; all of it is parsed before anything is checked.
MAX_MANIFEST_BYTES: Final = 128 * KIB
#: Dots on one line of TOML. The standard parser takes quadratic time in the depth of a dotted key (15 s for
#: 30,000 parts); the schema needs a depth of two.
MAX_LINE_DOTS: Final = 200

_FILE_SEGMENT: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*\Z")
_AT: Final = re.compile(r"(?P<problem>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?\Z", re.DOTALL)
_INDEX: Final = re.compile(r"\[\d+\]")
_STEP: Final = re.compile(r"\[(\d+)\]|([^.\[]+)")

_TYPES: Final[dict[str, type[msgspec.Struct]]] = {
    "": Manifest,
    "licence": Licence,
    "needs": Needs,
    "files[]": CargoFile,
    "defaults": Defaults,
    "sharding": Sharding,
}

_SLUG: Final = "lower-case letters, digits, '.', '_', '-', such as 'smollm2-135m'"
_LABELS: Final = "a list of words of lower-case letters, digits and '-'"
_MIB: Final = "a whole number of MiB"
#: What each field wants to be, for people. Paths without indexes.
EXPECTED: Final[dict[str, str]] = {
    "schema": f"the number {SCHEMA_VERSION} (this program knows no other schema)",
    "name": _SLUG,
    "version": "a version that begins with a digit, such as '1.0.0'",
    "title": f"one line of 1 to {MAX_TITLE_CHARS} characters",
    "description": f"text of at most {MAX_DESCRIPTION_CHARS} characters",
    "runtime": "one of llmcpp, onnx, wasm, container, diffusers",
    "publisher": "a peer id (12D3KooW...) or a name of letters, digits, '.', '_', '-'",
    "licence": "a table with spdx and optionally url",
    "licence.spdx": "an SPDX licence expression, such as 'Apache-2.0'",
    "licence.url": "an https URL",
    "needs": "a table with memory_mib and optionally vram_mib, disk_mib, cpu_cores, gpu",
    "needs.memory_mib": f"{_MIB}, at least 1",
    "needs.vram_mib": _MIB,
    "needs.disk_mib": _MIB,
    "needs.cpu_cores": "a whole number, at least 1",
    "needs.gpu": "'none', 'preferred' or 'required'",
    "files": f"1 to {MAX_FILES} tables, each with name, role, size_bytes, sha256, sources",
    "files[]": "a table with name, role, size_bytes, sha256, sources",
    "files[].name": "a relative path of letters, digits, '.', '_', '+', '-' with '/' between folders",
    "files[].role": "what the file is for, such as 'model'",
    "files[].size_bytes": "the file's size, a whole number of bytes, at least 1",
    "files[].sha256": "64 lower-case hex digits (sha256sum FILE prints them)",
    "files[].sources": f"1 to {MAX_SOURCES} sources",
    "files[].sources[]": "file:PATH, https://HOST/PATH, hf:OWNER/REPO@REVISION/PATH, pypi:PKG==VERSION/PATH,"
    " join:SOURCE|SOURCE or f16:SOURCE",
    "files[].piece_bytes": f"a power of two between {MIN_PIECE_BYTES} and {MAX_PIECE_BYTES}, or 0",
    "files[].pieces_sha256": "64 lower-case hex digits (archi-node cargo pieces FILE prints them)",
    "context_length": f"a whole number of tokens between 0 and {MAX_CONTEXT_TOKENS}",
    "chat_template": f"a Jinja template of 1 to {MAX_CHAT_TEMPLATE_CHARS} characters",
    "categories": _LABELS,
    "categories[]": "a word of lower-case letters, digits and '-'",
    "capabilities": _LABELS,
    "capabilities[]": "a word of lower-case letters, digits and '-'",
    "sharding": "a table as 'archi-node cargo pieces FILE' prints it",
    "sharding.architecture": "the model's architecture as its GGUF names it, such as 'llama'",
    "sharding.layers": f"a whole number between 1 and {MAX_LAYERS}",
    "sharding.width": f"a whole number of values between 1 and {MAX_WIDTH}",
    "sharding.layer_bytes": f"one number of bytes per layer, at most {MAX_LAYERS}",
    "sharding.layer_bytes[]": f"a whole number of bytes between 1 and {MAX_FILE_BYTES}",
    "sharding.embedding_bytes": "a whole number of bytes",
    "sharding.head_bytes": "a whole number of bytes",
    "sharding.kv_bytes": f"a whole number of bytes between 1 and {MAX_KV_BYTES}",
    "sharding.draft_kv_bytes": f"a whole number of bytes, at most {MAX_KV_BYTES}",
    "defaults": "a table of sampling defaults and system_prompt",
    "defaults.system_prompt": f"text of 1 to {MAX_SYSTEM_PROMPT_CHARS} characters",
    "defaults.temperature": "a number between 0 and 2",
    "defaults.top_p": "a number above 0, at most 1",
    "defaults.top_k": "a whole number between 0 and 1000",
    "defaults.min_p": "a number between 0 and 1",
    "defaults.presence_penalty": "a number between -2 and 2",
    "defaults.frequency_penalty": "a number between -2 and 2",
    "defaults.repeat_penalty": "a number above 0, at most 2",
    "defaults.max_tokens": "a whole number of tokens, at least 1",
}
#: Fields that may have several lines.
_TEXTS: Final = frozenset({"description", "chat_template", "defaults.system_prompt"})


def parse_manifest_untrusted(text: str | bytes, format: Format) -> Manifest:  # noqa: A002 - the word for it
    """The manifest in this text, in normal form. Raises ManifestError, nothing else."""
    raw = _decode(text, format)
    _check_keys(raw)
    try:
        manifest = msgspec.convert(raw, Manifest)
    except msgspec.ValidationError as error:
        raise _explain(error, raw) from error
    _check_texts(cast("dict[str, Any]", msgspec.to_builtins(manifest)), "")
    _check_meaning(manifest)
    return normal_form(manifest)


def _decode(text: str | bytes, format: Format) -> dict[str, Any]:  # noqa: A002 - as above
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(
            "", f"a manifest of {len(data)} bytes exceeds {MAX_MANIFEST_BYTES}", "Weights belong into files."
        )
    try:
        clean = data.decode()
    except UnicodeDecodeError as error:
        raise ManifestError("", f"not UTF-8 (byte {error.start})", "Save the file as UTF-8 text.") from error
    try:
        raw = _decode_toml(clean) if format == "toml" else _decode_json(clean)
    except RecursionError as error:
        raise ManifestError(
            "", "nested too deeply", "The schema has two levels; see docs/cargos.md."
        ) from error
    if not isinstance(raw, dict):
        raise ManifestError("", f"a table of fields was expected, not {_kind(raw)}", "See docs/cargos.md.")
    return cast("dict[str, Any]", raw)


def _decode_toml(text: str) -> object:
    if any(line.count(".") > MAX_LINE_DOTS for line in text.split("\n")):
        raise ManifestError(
            "", f"a line has more than {MAX_LINE_DOTS} dots", "Break the line, or write the manifest as JSON."
        )
    try:
        return tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, and what int() and date() say of odd numbers
        raise ManifestError(
            "", f"not TOML: {excerpt(str(error))}", "Is it JSON? Then name it .json."
        ) from error


def _decode_json(text: str) -> object:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ManifestError("", f"the key {excerpt(key)!r} appears twice", "Keep one of them.")
            result[key] = value
        return result

    def no_constant(name: str) -> object:
        raise ManifestError("", f"{name} is no JSON number", "Write a finite number.")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except ValueError as error:  # JSONDecodeError, and integers of thousands of digits
        raise ManifestError(
            "", f"not JSON: {excerpt(str(error))}", "Is it TOML? Then name it .toml."
        ) from error


def _check_keys(raw: dict[str, Any]) -> None:
    """Refuse unknown keys, with the known one that they look like."""
    _check_table_keys("", "", raw)
    for key in ("licence", "needs", "defaults", "sharding"):
        _check_table_keys(key, key, raw.get(key))
    files: Any = raw.get("files")
    if isinstance(files, list):
        for index, file in enumerate(cast("list[Any]", files)[: MAX_FILES + 1]):
            _check_table_keys("files[]", f"files[{index}]", file)


def _check_table_keys(kind: str, path: str, table: object) -> None:
    if not isinstance(table, dict):
        return  # a wrong type is the converter's to report
    known = _TYPES[kind].__struct_fields__
    for key in cast("dict[str, Any]", table):
        if key not in known:
            close = difflib.get_close_matches(key[:64], known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Known here: {', '.join(known)}."
            raise ManifestError(_join(path, excerpt(key[:64])), "unknown field", hint)


def _explain(error: msgspec.ValidationError, raw: dict[str, Any]) -> ManifestError:
    """The converter's words as ours: path, what was expected, what was there."""
    found = _AT.match(str(error))
    problem = found["problem"] if found else ""
    path = (found["path"] if found else None) or ""
    missing = re.match(r"Object missing required field `(\w+)`", problem)
    if missing:
        path = _join(path, missing[1])
        return ManifestError(path, "missing", f"Expected: {_expected(path)}.")
    got = _kind(_look_up(raw, path))
    return ManifestError(path, f"{_expected(path)} expected, not {got}", "docs/cargos.md describes each field.")


def _check_texts(value: object, path: str) -> None:
    """No invisible characters: they would make two manifests that look alike differ."""
    match value:
        case dict():
            for key, inner in cast("dict[str, Any]", value).items():
                _check_texts(inner, _join(path, key))
        case list() | tuple():
            for index, inner in enumerate(cast("list[Any]", value)):
                _check_texts(inner, f"{path}[{index}]")
        case str():
            several_lines = path in _TEXTS
            for c in value:
                if not (c.isprintable() or (several_lines and (c in "\n\t" or _joins(c)))):
                    raise ManifestError(path, f"the character U+{ord(c):04X} is not allowed here", "Remove it.")
        case _:
            pass


def _joins(character: str) -> bool:
    """Zero-width (non-)joiners: Indic and Persian words and emoji need them."""
    return character in "\u200c\u200d"


def _check_meaning(manifest: Manifest) -> None:
    _check_file_names(manifest.files)
    for i, file in enumerate(manifest.files):
        for j, source in enumerate(file.sources):
            try:
                parse_locator_untrusted(source)
            except BadLocator as error:
                raise ManifestError(f"files[{i}].sources[{j}]", error.problem, error.hint) from error
        if len(set(file.sources)) < len(file.sources):
            raise ManifestError(f"files[{i}].sources", "a source appears twice", "Keep one of them.")
    for name in ("categories", "capabilities"):
        labels = cast("tuple[str, ...]", getattr(manifest, name))
        if len(set(labels)) < len(labels):
            raise ManifestError(name, "a word appears twice", "Keep one of them.")
    _check_pieces(manifest.files)
    _check_sharding(manifest)
    _check_decimals(manifest.defaults)
    url = manifest.licence.url
    if url and not re.match(r"https?://[^\s/]+", url):
        raise ManifestError("licence.url", "an https URL expected", "Write https://HOST/PATH, or leave it out.")
    if manifest.publisher.startswith("12D3"):
        try:
            peer_id_untrusted(manifest.publisher)
        except ProtocolError as error:
            raise ManifestError("publisher", error.detail, "`archi-node id` prints an Island's.") from error
    if manifest.needs.gpu == "required" and not manifest.needs.vram_mib:
        raise ManifestError("needs.vram_mib", "missing although a GPU is required", "Say how much it takes.")


def _check_file_names(files: tuple[CargoFile, ...]) -> None:
    """Names are safe on any file system: no way out of the folder, no two that collide."""
    seen: dict[str, str] = {}
    for index, file in enumerate(files):
        path = f"files[{index}].name"
        segments = file.name.split("/")
        if not all(_FILE_SEGMENT.match(segment) for segment in segments):
            raise ManifestError(
                path,
                f"{EXPECTED['files[].name']} expected, not {_kind(file.name)}",
                "No absolute paths, no '..', no hidden files: a Cargo's files stay in its own folder.",
            )
        key = file.name.lower()  # macOS and Windows do not tell case apart
        if key in seen:
            raise ManifestError(path, f"{file.name!r} and {seen[key]!r} are the same name", "Rename one.")
        seen[key] = file.name
    for index, file in enumerate(files):
        parts = file.name.lower().split("/")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in seen:
                raise ManifestError(
                    f"files[{index}].name", f"the folder of {file.name!r} is also a file", "Rename one."
                )


def _check_pieces(files: tuple[CargoFile, ...]) -> None:
    for index, file in enumerate(files):
        size = file.piece_bytes
        if not size and not file.pieces_sha256:
            continue
        path = f"files[{index}].piece_bytes"
        if not size or not file.pieces_sha256:
            raise ManifestError(
                path, "piece_bytes and pieces_sha256 belong together", "'archi-node cargo pieces' prints both."
            )
        if size < MIN_PIECE_BYTES or size & (size - 1):
            raise ManifestError(
                path, f"{EXPECTED['files[].piece_bytes']} expected, not {size}", "1048576 suits most."
            )
        if file.pieces > MAX_PIECES:
            raise ManifestError(path, f"{file.pieces} pieces, at most {MAX_PIECES}", "Choose larger pieces.")


def _check_sharding(manifest: Manifest) -> None:
    sharding = manifest.sharding
    if sharding is None:
        return
    hint = "'archi-node cargo pieces FILE' prints the whole section."
    if manifest.runtime is not RuntimeType.LLMCPP:
        raise ManifestError("sharding", f"runtime {manifest.runtime} has no layers to spread", "Leave it out.")
    models = [file for file in manifest.files if file.role == "model"]
    if len(models) != 1:
        raise ManifestError("sharding", f"{len(models)} files have the role 'model', not one", hint)
    if len(sharding.layer_bytes) != sharding.layers:
        raise ManifestError(
            "sharding.layer_bytes", f"{len(sharding.layer_bytes)} sizes for {sharding.layers} layers", hint
        )
    if sum(sharding.layer_bytes) > models[0].size_bytes:
        raise ManifestError("sharding.layer_bytes", "the layers are larger than the file", hint)
    for name in ("embedding_bytes", "head_bytes"):
        if cast("int", getattr(sharding, name)) > models[0].size_bytes:
            raise ManifestError(f"sharding.{name}", "larger than the file", hint)


def _check_decimals(defaults: Defaults) -> None:
    for name in defaults.__struct_fields__:
        value: Any = getattr(defaults, name)
        if isinstance(value, float) and round(value, MAX_DECIMALS) != value:
            raise ManifestError(f"defaults.{name}", f"more than {MAX_DECIMALS} decimals", "Round it.")


def _expected(path: str) -> str:
    return EXPECTED.get(_INDEX.sub("[]", path), "another kind of value")


def _look_up(raw: dict[str, Any], path: str) -> object:
    value: Any = raw
    for index, key in _STEP.findall(path):
        value = value[int(index)] if index else value.get(key)
    return value


def _kind(value: object) -> str:
    """A value from outside, shown: short and escaped."""
    match value:
        case dict():
            return "a table"
        case list():
            return f"a list of {len(cast('list[Any]', value))}"
        case None:
            return "null"
        case str():
            return repr(excerpt(value[:60])) + ("..." if len(value) > 60 else "")
        case bool():
            return "true" if value else "false"
        case int() if value.bit_length() > 128:
            return "a huge number"
        case _:
            return excerpt(str(value)[:60])


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
