r"""What a Cargo is: the manifest's schema, its canonical bytes and its digest. Pure.

A Cargo is named for people by `name` (what consumers write in `model`) and for machines by its digest:
SHA-256 of the canonical bytes. The spelling of a manifest (TOML or JSON, order of keys, of files, of
categories) does not change them; anything that it means does. The rule, in full in docs/cargos.md:

    b"archipelag-cargo-1\n" + JSON of RFC 8785 (JCS) of all fields that differ from their default

A signature is made over the digest and lies beside the manifest (`NAME.sigstore.json`), never in it, so that a
Cargo keeps its name however many sign it.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Final, Literal, cast

import msgspec
from msgspec import Meta

from cargos.locator import MAX_SOURCE_CHARS
from protocol.ids import CargoDigest, cargo_digest_of
from protocol.limits import KIB, MAX_CONTEXT_TOKENS, MAX_NAME_CHARS, MIB
from protocol.ring import MAX_LAYERS

SCHEMA_VERSION: Final = 1

#: Keeps a manifest's digest apart from any other SHA-256 in the system, and schema versions from each other.
CANONICAL_DOMAIN: Final = b"archipelag-cargo-1\n"

#: The role of a small model with the same vocabulary, by which heads of chains may draft (docs/sharding.md).
ROLE_DRAFT: Final = "draft"

# --- bounds --------------------------------------------------------------------------------------

#: The largest known chat templates have 20 KiB; a manifest is otherwise some 2 KiB.
MAX_CHAT_TEMPLATE_CHARS: Final = 64 * KIB
#: A system prompt is put before each conversation and costs prefill every time.
MAX_SYSTEM_PROMPT_CHARS: Final = 8 * KIB
MAX_DESCRIPTION_CHARS: Final = 4 * KIB
MAX_TITLE_CHARS: Final = 128
#: A large sharded model has some 200 files of weights, tokenizer and configuration.
MAX_FILES: Final = 256
MAX_FILE_NAME_CHARS: Final = 200
#: More mirrors than this help nobody, and each costs a timeout when the net is down.
MAX_SOURCES: Final = 8
#: 4 TiB: four times the largest open weights in f16.
MAX_FILE_BYTES: Final = 1 << 42
#: Pieces are verified one by one: smaller ones cost more list (32 bytes each) than they save, larger ones
#: hold up a slow line for long before anything of them counts. Powers of two between.
MIN_PIECE_BYTES: Final = 16 * KIB
MAX_PIECE_BYTES: Final = 4 * MIB
#: A list of 32 MiB; a file of 4 TiB in the largest pieces.
MAX_PIECES: Final = 1 << 20
#: Values in a row of activations: the widest models known have 16,384 to 53,248.
MAX_WIDTH: Final = 1 << 16
#: Keys and values of one token in one layer: two rows of the largest width, in f16, eight times over.
MAX_KV_BYTES: Final = 1 << 21
MAX_ARCHITECTURE_CHARS: Final = 64
#: 64 TiB of memory or disk, 4096 cores: beyond any volunteer's machine.
MAX_MIB: Final = 1 << 26
MAX_CORES: Final = 4096
MAX_LABELS: Final = 32
MAX_LABEL_CHARS: Final = 32
MAX_SPDX_CHARS: Final = 128
#: Sampling defaults have this many decimals at most, so that each number has one spelling.
MAX_DECIMALS: Final = 4

_Mib = Annotated[int, Meta(ge=0, le=MAX_MIB)]
_Label = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]*\Z", max_length=MAX_LABEL_CHARS)]
_Labels = Annotated[tuple[_Label, ...], Meta(max_length=MAX_LABELS)]


class RuntimeType(StrEnum):
    """What runs the Cargo."""

    LLMCPP = "llmcpp"
    ONNX = "onnx"
    WASM = "wasm"
    CONTAINER = "container"
    DIFFUSERS = "diffusers"


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of the manifest's values."""


class CargoFile(_Part, frozen=True, kw_only=True):
    """One file. `name` may have folders (`unet/model.onnx`). `role` tells the runtime what it is for;
    a runtime documents the roles it knows ('model' is the weights). `sources` are tried in order.

    `piece_bytes`, `pieces_sha256`: the file in pieces of this size (the last may be shorter) can be verified
    piece by piece; SHA-256 over the concatenated SHA-256s (32 bytes each) of the pieces. 0 and '': not known.
    """

    name: Annotated[str, Meta(min_length=1, max_length=MAX_FILE_NAME_CHARS)]
    role: _Label
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_FILE_BYTES)]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    sources: Annotated[
        tuple[Annotated[str, Meta(max_length=MAX_SOURCE_CHARS)], ...],
        Meta(min_length=1, max_length=MAX_SOURCES),
    ]
    piece_bytes: Annotated[int, Meta(ge=0, le=MAX_PIECE_BYTES)] = 0
    pieces_sha256: Annotated[str, Meta(pattern=r"^(?:[0-9a-f]{64})?\Z")] = ""

    @property
    def pieces(self) -> int:
        """How many it has; 0 if it has no piece list."""
        return -(-self.size_bytes // self.piece_bytes) if self.piece_bytes else 0


class Sharding(_Part, frozen=True, kw_only=True):
    """How the layers of the model can be spread over several Islands: all that a planner needs to know of
    the weights. A Cargo without it runs whole or not at all. Written by `archi-node cargo pieces`.

    `width`: values in a row between layers. `layer_bytes`: weights of each layer. `embedding_bytes`: what the
    stage with layer 0 holds beside its layers, `head_bytes` what the stage with the last one does (vocabulary
    head, final norm and tokenizer; embeddings that serve as head count in both; the file with the role
    'draft', too). `kv_bytes`: keys and values of one token in one layer, in f16; `draft_kv_bytes`: in all
    layers of the model to draft with.
    """

    architecture: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_.-]*\Z", max_length=MAX_ARCHITECTURE_CHARS)]
    layers: Annotated[int, Meta(ge=1, le=MAX_LAYERS)]
    width: Annotated[int, Meta(ge=1, le=MAX_WIDTH)]
    layer_bytes: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=MAX_FILE_BYTES)], ...], Meta(min_length=1, max_length=MAX_LAYERS)
    ]
    embedding_bytes: Annotated[int, Meta(ge=0, le=MAX_FILE_BYTES)]
    head_bytes: Annotated[int, Meta(ge=0, le=MAX_FILE_BYTES)]
    kv_bytes: Annotated[int, Meta(ge=1, le=MAX_KV_BYTES)]
    draft_kv_bytes: Annotated[int, Meta(ge=0, le=MAX_KV_BYTES)] = 0

    def stage_bytes(self, first: int, last: int) -> int:
        """Weights that a stage with layers `first` to `last` (exclusive) holds in memory."""
        ends = (self.embedding_bytes if first == 0 else 0) + (self.head_bytes if last == self.layers else 0)
        return sum(self.layer_bytes[first:last]) + ends


class Needs(_Part, frozen=True, kw_only=True):
    """What the Cargo takes of a machine while it runs. `gpu`: 'none' (it uses none), 'preferred', 'required';
    `vram_mib` counts only then. `disk_mib` is beside the files' own size (caches, compiled code).
    """

    memory_mib: Annotated[int, Meta(ge=1, le=MAX_MIB)]
    vram_mib: _Mib = 0
    disk_mib: _Mib = 0
    cpu_cores: Annotated[int, Meta(ge=1, le=MAX_CORES)] = 1
    gpu: Literal["none", "preferred", "required"] = "none"


class Licence(_Part, frozen=True, kw_only=True):
    """`spdx`: an SPDX licence expression ('Apache-2.0', 'LicenseRef-Gemma')."""

    spdx: Annotated[str, Meta(pattern=r"^[A-Za-z0-9(][A-Za-z0-9.+() :-]*\Z", max_length=MAX_SPDX_CHARS)]
    url: Annotated[str, Meta(max_length=MAX_SOURCE_CHARS)] = ""


class Defaults(_Part, frozen=True, kw_only=True):
    """What holds where a request leaves it out. None: the API's own default. Ranges are those of
    `protocol.work.Sampling`, numbers have at most four decimals.
    """

    system_prompt: Annotated[str, Meta(min_length=1, max_length=MAX_SYSTEM_PROMPT_CHARS)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1000)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repeat_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_CONTEXT_TOKENS)] | None = None


class Manifest(_Part, frozen=True, kw_only=True):
    """A Cargo. Made by `parse_manifest_untrusted`, which also checks what types can not say.

    `context_length` in tokens, 0 for runtimes without one. `chat_template` (Jinja) overrides the
    model's own. `publisher`: a peer id or a name; who it really is, a signature will say.
    """

    schema: Literal[1]
    name: Annotated[str, Meta(pattern=r"^[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?\Z", max_length=MAX_NAME_CHARS)]
    version: Annotated[str, Meta(pattern=r"^[0-9][0-9A-Za-z.+-]*\Z", max_length=64)]
    title: Annotated[str, Meta(min_length=1, max_length=MAX_TITLE_CHARS)]
    runtime: RuntimeType
    publisher: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z", max_length=MAX_NAME_CHARS)]
    licence: Licence
    needs: Needs
    files: Annotated[tuple[CargoFile, ...], Meta(min_length=1, max_length=MAX_FILES)]
    description: Annotated[str, Meta(max_length=MAX_DESCRIPTION_CHARS)] = ""
    context_length: Annotated[int, Meta(ge=0, le=MAX_CONTEXT_TOKENS)] = 0
    chat_template: Annotated[str, Meta(min_length=1, max_length=MAX_CHAT_TEMPLATE_CHARS)] | None = None
    categories: _Labels = ()
    capabilities: _Labels = ()
    defaults: Defaults = Defaults()
    sharding: Sharding | None = None

    @property
    def digest(self) -> CargoDigest:
        """SHA-256 of the canonical bytes."""
        return cargo_digest_of(canonical_bytes(self))

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files)

    def file_with_role(self, role: str) -> CargoFile | None:
        """The first file (by name) that has this role."""
        return next((file for file in self.files if file.role == role), None)


def canonical_bytes(manifest: Manifest) -> bytes:
    """The bytes that the digest and signatures are made over."""
    return CANONICAL_DOMAIN + canonical_json(manifest).encode()


def canonical_json(manifest: Manifest) -> str:
    """RFC 8785 JSON of the manifest in normal form. It is itself a valid manifest in JSON.

    Python's json agrees with RFC 8785 here because keys are ASCII, integers lie below 2**53, and floats
    have few decimals and are written as integers where they are whole.
    """
    plain = _whole_floats(msgspec.to_builtins(normal_form(manifest)))
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def normal_form(manifest: Manifest) -> Manifest:
    """The same Cargo with what has no order sorted: files by name, categories and capabilities."""
    return msgspec.structs.replace(
        manifest,
        files=tuple(sorted(manifest.files, key=lambda file: file.name)),
        categories=tuple(sorted(manifest.categories)),
        capabilities=tuple(sorted(manifest.capabilities)),
    )


def _whole_floats(value: object) -> object:
    match value:
        case dict():
            return {key: _whole_floats(inner) for key, inner in cast("dict[str, object]", value).items()}
        case list() | tuple():
            return [_whole_floats(inner) for inner in cast("list[object]", value)]
        case float() if value.is_integer():
            return int(value)  # also turns -0.0 into 0
        case _:
            return value
