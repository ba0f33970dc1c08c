"""A model by layers: which tensors a slice has, where their bytes lie in the whole file, how the slice's own
GGUF file looks. Pure.

    first slice    embeddings and layers; takes token ids; no tokenizer
    inner slices   layers only; take rows; a vocabulary of 32 made-up tokens, because the library wants one
    last slice     layers, final norm, vocabulary head, tokenizer; takes rows

A slice is a GGUF file that llama.cpp loads as a model of its own. Keys of ours in it: `slice.first`,
`slice.last`, `slice.of` (layers of the whole), `slice.input_scale` (a number, as text: rows must be
multiplied by it before they are fed in).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cargos.manifest import MAX_KV_BYTES, MAX_WIDTH, Sharding
from cargos.shards.architectures import Architecture, CanNotCut, architecture_named
from cargos.shards.gguf import (
    BLOCKS,
    BadGguf,
    Entry,
    Header,
    Kind,
    NewTensor,
    Tensor,
    TensorType,
    array_entry,
    build_header,
    number_entry,
    sliced,
    string_entry,
)
from protocol.ring import MAX_LAYERS

#: The size of the made-up vocabulary: a row of every block type divides it, and it costs nothing.
STUB_VOCABULARY: Final = 32
#: Stands for "no window" where the library insists on one: four times the longest context, and small enough
#: that the library's products with the number of sequences stay within 32 bits.
WIDE_WINDOW: Final = 1 << 20
F16_BYTES: Final = 2

SLICE_FIRST: Final = "slice.first"
SLICE_LAST: Final = "slice.last"
SLICE_OF: Final = "slice.of"
SLICE_SCALE: Final = "slice.input_scale"

_BLOCK: Final = re.compile(r"blk\.(\d{1,4})\.(.+)\Z", re.ASCII)
#: Arrays that have as many items as the model has layers only by accident.
_NOT_BY_LAYER: Final = frozenset(
    {"rope.dimension_sections", "rope.scaling.short_factor", "rope.scaling.long_factor"}
)
_EMBEDDING: Final = "token_embd.weight"
_HEAD: Final = "output.weight"
_HEAD_BIAS: Final = "output.bias"
_QUERY_NORM: Final = ".attn_q_norm.weight"


@dataclass(frozen=True, slots=True)
class Segment:
    """`size` bytes at `target` of the new file are those at `start` of the old one. Bytes of the new file
    that no segment covers are zero.
    """

    target: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Scaled:
    """As `Segment`, of float32 values that are multiplied by `factor`."""

    target: int
    start: int
    size: int
    factor: float


@dataclass(frozen=True, slots=True)
class Slice:
    """A slice's file, as header and places of its data in the whole file."""

    header: bytes
    segments: tuple[Segment, ...]
    size_bytes: int
    scaled: tuple[Scaled, ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """A whole model that can be cut. `blocks`: tensors by layer; `shared`: those that every slice has."""

    header: Header
    name: str
    architecture: Architecture
    layers: int
    width: int
    vocabulary: int
    kv_bytes: int
    blocks: tuple[tuple[Tensor, ...], ...]
    shared: tuple[Tensor, ...]
    embedding: Tensor
    head: Tensor | None
    head_bias: Tensor | None

    @property
    def tied(self) -> bool:
        """Whether the embeddings serve as vocabulary head too."""
        return self.head is None


def model_of(header: Header) -> Model:
    """The model that this file holds. Raises CanNotCut with the reason if it can not be cut, BadGguf."""
    name = header.text("general.architecture")
    if not name:
        raise BadGguf("the file names no architecture", "Is it a model? Vocabularies and adapters are not.")
    layers = _number(header, f"{name}.block_count", MAX_LAYERS)
    if header.integer(SLICE_OF) is not None:
        raise CanNotCut("this file is itself a slice", "Cut the whole model.")
    if (header.integer("split.count") or 1) > 1:
        raise CanNotCut(
            "this file is one of several that make the model", "Merge them: llama-gguf-split --merge."
        )
    architecture = architecture_named(name, layers)
    if header.integer(f"{name}.nextn_predict_layers"):
        raise CanNotCut("it has layers beside the chain, which predict several tokens", "It can run whole.")
    blocks: list[list[Tensor]] = [[] for _ in range(layers)]
    shared: list[Tensor] = []
    ends: dict[str, Tensor] = {}
    for tensor in header.tensors:
        found = _BLOCK.match(tensor.name)
        if found is None:
            if tensor.name in (_EMBEDDING, _HEAD, _HEAD_BIAS):
                ends[tensor.name] = tensor
            else:
                shared.append(tensor)
        elif int(found[1]) >= layers:
            raise CanNotCut(f"it has a layer {int(found[1])} beside its {layers}", "It can run whole.")
        else:
            blocks[int(found[1])].append(tensor)
    width = _number(header, f"{name}.embedding_length", MAX_WIDTH)
    embedding = ends.get(_EMBEDDING)
    if embedding is None or len(embedding.dimensions) != 2 or embedding.dimensions[0] != width:
        raise BadGguf("the file has no embeddings of the width that it names", "Is the file complete?")
    if not all(blocks):
        raise BadGguf(f"layer {blocks.index([])} of {layers} has no tensors", "Is the file complete?")
    return Model(
        header,
        name,
        architecture,
        layers,
        width,
        embedding.dimensions[1],
        _kv_bytes(header, name, width),
        tuple(map(tuple, blocks)),
        tuple(shared),
        embedding,
        ends.get(_HEAD),
        ends.get(_HEAD_BIAS),
    )


def sharding_of(model: Model) -> Sharding:
    """What a planner needs to know of the model: the manifest's `sharding` section."""
    shared = _size(model.shared)
    # Of full height in both ends, where the library insists on a head of its own: zeros, but they are mapped.
    stub = _stub(_HEAD, model.width, model.vocabulary).size_bytes if model.architecture.own_head else 0
    tokenizer = sum(
        len(entry.raw) for key, entry in model.header.metadata.items() if key.startswith("tokenizer.")
    )
    bias = model.head_bias.size_bytes if model.head_bias else 0
    return Sharding(
        architecture=model.name,
        layers=model.layers,
        width=model.width,
        layer_bytes=tuple(_size(block) for block in model.blocks),
        embedding_bytes=model.embedding.size_bytes + shared + stub,
        head_bytes=(model.head or model.embedding).size_bytes + bias + shared + tokenizer + stub,
        kv_bytes=model.kv_bytes,
    )


def ranges_of(model: Model, first: int, last: int) -> tuple[tuple[int, int], ...]:
    """The bytes of the whole file that a slice is made of, header included: (start, end) in rising order."""
    wanted = slice_of(model, first, last)
    spans = [(0, model.header.data_start)]
    spans += [(part.start, part.start + part.size) for part in (*wanted.segments, *wanted.scaled)]
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def stages_of(layers: int, stages: int) -> tuple[tuple[int, int], ...]:
    """Layers in `stages` ranges of about the same length. Raises CanNotCut if there are too few."""
    if not 1 <= stages <= layers:
        raise CanNotCut(f"{layers} layers can not be spread over {stages} stages", "Each needs at least one.")
    bounds = [(i * layers + stages // 2) // stages for i in range(stages + 1)]
    return tuple(itertools.pairwise(bounds))


def slice_of(model: Model, first: int, last: int) -> Slice:
    """The file of layers `first` to `last` (exclusive). Raises CanNotCut if there are no such layers."""
    if not 0 <= first < last <= model.layers:
        raise CanNotCut(f"the model has layers 0 to {model.layers}, not {first} to {last}")
    tensors: list[tuple[NewTensor, Tensor | None]]
    tensors = [(_renamed(tensor, tensor.name), tensor) for tensor in model.shared]
    for layer in range(first, last):
        for tensor in model.blocks[layer]:
            name = tensor.name.split(".", 2)[2]
            tensors.append((_renamed(tensor, f"blk.{layer - first}.{name}"), tensor))
    tensors += _ends(model, first, last)
    metadata = _metadata(model, first, last)
    header, starts, size = build_header(metadata, (new for new, _ in tensors), model.header.alignment)
    factor = _query_factor(model) if last - first < model.layers else 1.0
    segments: list[Segment] = []
    scaled: list[Scaled] = []
    for at, (_, old) in zip(starts, tensors, strict=True):
        if old is None:
            continue
        if factor != 1 and old.name.endswith(_QUERY_NORM):
            scaled.append(Scaled(at, old.start, old.size_bytes, factor))
        else:
            segments.append(Segment(at, old.start, old.size_bytes))
    return Slice(header, tuple(segments), size, tuple(scaled))


def _query_factor(model: Model) -> float:
    """What queries must be multiplied by in a slice, because the library does not know the model by its number
    of layers any more (`Architecture.odd_layers`).
    """
    if model.architecture.odd_layers != model.layers:
        return 1.0
    norms = [tensor for block in model.blocks for tensor in block if tensor.name.endswith(_QUERY_NORM)]
    if len(norms) != model.layers or any(tensor.type != TensorType.F32 for tensor in norms):
        raise CanNotCut(
            f"{model.name} of {model.layers} layers without norms of the queries", "It can run whole."
        )
    heads = _largest(model.header, f"{model.name}.attention.head_count")
    size = model.header.integer(f"{model.name}.attention.key_length") or model.width // heads
    return math.sqrt(size / (model.width // heads))


def _ends(model: Model, first: int, last: int) -> list[tuple[NewTensor, Tensor | None]]:
    """Embeddings and vocabulary head, or what stands in for them."""
    is_first, is_head = first == 0, last == model.layers
    ends: list[tuple[NewTensor, Tensor | None]] = []
    height = model.vocabulary if is_first or is_head else STUB_VOCABULARY
    if is_first or (is_head and model.tied):
        ends.append((_renamed(model.embedding, _EMBEDDING), model.embedding))
    elif is_head and model.head is not None and not model.architecture.own_head:
        # Rows come in, so nobody looks embeddings up; and without a head of its own the library uses them as
        # head. So the head can stand in their place, and nothing of full height has to be made up.
        ends.append((_renamed(model.head, _EMBEDDING), model.head))
    else:
        ends.append((_stub(_EMBEDDING, model.width, height), None))
    if is_head and model.head is not None and (is_first or model.architecture.own_head):
        ends.append((_renamed(model.head, _HEAD), model.head))
    elif not is_head and model.architecture.own_head:
        ends.append((_stub(_HEAD, model.width, height), None))
    if is_head and model.head_bias is not None:
        ends.append((_renamed(model.head_bias, _HEAD_BIAS), model.head_bias))
    return ends


def _stub(name: str, width: int, height: int) -> NewTensor:
    """Zeros of the smallest type that the width allows: a hole in the file."""
    for kind in (TensorType.IQ1_S, TensorType.Q4_0, TensorType.F16):
        if width % BLOCKS[kind][0] == 0:
            return NewTensor(name, (width, height), kind)
    raise AssertionError("any width fills blocks of one")


def _metadata(model: Model, first: int, last: int) -> dict[str, Entry]:
    name, layers = model.name, model.layers
    is_first, is_head = first == 0, last == layers
    dropped = {f"{name}.{key}" for key in model.architecture.embedding_keys} if not is_first else set[str]()
    metadata: dict[str, Entry] = {}
    for key, entry in model.header.metadata.items():
        by_layer = (
            entry.item not in (None, Kind.STRING)
            and entry.count == layers
            and key.startswith(f"{name}.")
            and key.removeprefix(f"{name}.") not in _NOT_BY_LAYER
        )
        if key in dropped or (not is_head and key.startswith("tokenizer.")):
            continue
        metadata[key] = sliced(entry, first, last) if by_layer else entry
    metadata[f"{name}.block_count"] = number_entry(Kind.UINT32, last - first)
    if not is_head:
        vocabulary = model.vocabulary if is_first else STUB_VOCABULARY
        metadata[f"{name}.vocab_size"] = number_entry(Kind.UINT32, vocabulary)
        metadata["tokenizer.ggml.model"] = string_entry("none")
    leading = model.header.integer(f"{name}.leading_dense_block_count")
    if model.architecture.leading_dense and leading:
        here = min(max(leading - first, 0), last - first)
        metadata[f"{name}.leading_dense_block_count"] = number_entry(Kind.UINT32, here)
    _set_window(model, metadata, first, last)
    for key, value in ((SLICE_FIRST, first), (SLICE_LAST, last), (SLICE_OF, layers)):
        metadata[key] = number_entry(Kind.UINT32, value)
    if model.architecture.scaled_rows and not is_first:
        # As text: the library shows numbers with six digits only.
        metadata[SLICE_SCALE] = string_entry(repr(1 / math.sqrt(model.width)))
    return metadata


def _set_window(model: Model, metadata: dict[str, Entry], first: int, last: int) -> None:
    """Say for each layer of the slice whether it looks through a sliding window. The library would otherwise
    go by the layer's number in the slice.
    """
    flags = _windowed(model)
    if flags is None:
        return
    window, pattern = f"{model.name}.attention.sliding_window", f"{model.name}.attention.sliding_window_pattern"
    own = flags[first:last]
    metadata.pop(pattern, None)
    if any(own):
        metadata[pattern] = array_entry(Kind.BOOL, own)
    elif model.architecture.window is not None and model.architecture.window.always:
        # It has no way of saying that there is none, and stops if no layer has one.
        metadata[pattern] = array_entry(Kind.BOOL, [True] * len(own))
        metadata[window] = number_entry(Kind.UINT32, WIDE_WINDOW)
        base, base_here = f"{model.name}.rope.freq_base", f"{model.name}.rope.freq_base_swa"
        if base in metadata:
            metadata[base_here] = metadata[base]
        else:
            metadata.pop(base_here, None)
    else:
        metadata.pop(window, None)


def _windowed(model: Model) -> Sequence[bool] | None:
    """Of each layer of the model, whether it has a sliding window; None if that is no matter here."""
    window = model.architecture.window
    header, prefix = model.header, f"{model.name}.attention.sliding_window"
    if window is None or not (window.always or header.integer(prefix)):
        return None
    key = f"{prefix}_pattern"
    entry = header.metadata.get(key)
    if entry is not None and entry.kind is Kind.ARRAY:
        flags = header.integers(key)
        if flags is None or len(flags) < model.layers:
            raise BadGguf(f"{key!r} says nothing of some layers")
        return [bool(flag) for flag in flags[: model.layers]]
    named = header.integer(key)
    period = window.period if named is None else named
    return [period <= 0 or layer % period < period - 1 for layer in range(model.layers)]


def _kv_bytes(header: Header, name: str, width: int) -> int:
    heads = _largest(header, f"{name}.attention.head_count")
    if not 1 <= heads <= width:
        raise BadGguf(
            f"'{name}.attention.head_count' is {heads}, not a number between 1 and the width of {width}"
        )
    kv_heads = _largest(header, f"{name}.attention.head_count_kv") or heads
    key = header.integer(f"{name}.attention.key_length") or width // heads
    value = header.integer(f"{name}.attention.value_length") or width // heads
    total = kv_heads * (key + value) * F16_BYTES
    if min(kv_heads, key, value) < 1 or total > MAX_KV_BYTES:
        raise BadGguf(f"keys and values of a token take {total} bytes", f"At most {MAX_KV_BYTES} are expected.")
    return total


def _largest(header: Header, key: str) -> int:
    entry = header.metadata.get(key)
    if entry is not None and entry.kind is Kind.ARRAY:
        return max(header.integers(key) or (0,), default=0)
    return header.integer(key) or 0


def _number(header: Header, key: str, most: int) -> int:
    value = header.integer(key)
    if value is None or not 1 <= value <= most:
        raise BadGguf(f"{key!r} is {value}, not a number between 1 and {most}")
    return value


def _renamed(tensor: Tensor, name: str) -> NewTensor:
    return NewTensor(name, tensor.dimensions, tensor.type)


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.size_bytes for tensor in tensors)


def balanced_stages(sharding: Sharding, stages: int) -> tuple[tuple[int, int], ...]:
    """Layers in ranges so that the stage that holds most holds as little as possible, ends included; among
    those, the evenest.

    Raises CanNotCut if there are fewer layers than stages.
    """
    layers = sharding.layers
    stages_of(layers, stages)  # for its complaint
    sums = list(itertools.accumulate(sharding.layer_bytes, initial=0))

    def size(first: int, last: int) -> int:
        ends = (sharding.embedding_bytes if first == 0 else 0) + (sharding.head_bytes if last == layers else 0)
        return sums[last] - sums[first] + ends

    # Of layers below `last` in the stages so far: the largest stage, the sum of squares, where each begins.
    best = {last: (size(0, last), size(0, last) ** 2, [0]) for last in range(1, layers + 1)}
    for stage in range(2, stages + 1):
        best = {
            last: min(
                (max(most, size(first, last)), squares + size(first, last) ** 2, [*starts, first])
                for first, (most, squares, starts) in best.items()
                if first < last
            )
            for last in range(stage, layers + 1)
        }
    _, _, starts = best[layers]
    return tuple(zip(starts, [*starts[1:], layers], strict=True))
