"""Which models can be cut between layers, and what must be seen to where they are cut. Pure.

llama.cpp runs a slice as if it were a small model of its own: layer k of the slice is layer `first + k` of the
whole. So whatever it derives from a layer's number or from their count must be written into the slice. An
architecture stands in `KNOWN` once tests/cargos/shards has shown that a chain of slices computes what the whole
model does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cargos.errors import CargoError
from protocol.codec import excerpt


class CanNotCut(CargoError):
    """The model can not be spread over several Islands by layers. It may still run whole."""


@dataclass(frozen=True, slots=True)
class Window:
    """Attention over a sliding window in some layers. Without a pattern in the file, layer i has one unless
    `i % period == period - 1`. `always`: also where the file names no window.
    """

    period: int
    always: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """`own_head`: the library insists on a matrix of the vocabulary head, else embeddings may serve as it.
    `scaled_rows`: it multiplies the rows that come in by sqrt(width), also where they are activations of
    a layer before; who feeds a slice must divide (key `slice.input_scale`). `embedding_keys`: metadata that
    act on what comes in, and belong to the slice with the embeddings only. `odd_layers`: a number of layers by
    which the library knows a model whose attention it scales by 1/sqrt(width/heads), not by 1/sqrt(size of a
    head); `query_norm`: the norm of the queries can make up for it. `leading_dense`: its first layers have no
    experts, and how many they are is counted from the first layer of a file on.
    """

    window: Window | None = None
    own_head: bool = False
    scaled_rows: bool = False
    embedding_keys: tuple[str, ...] = ()
    odd_layers: int = 0
    query_norm: bool = False
    leading_dense: bool = False


_PLAIN: Final = Architecture()
_OWN_HEAD: Final = Architecture(own_head=True)

KNOWN: Final[dict[str, Architecture]] = {
    "llama": _PLAIN,  # Llama 1 to 3, Mistral, Mixtral, SmolLM2, Yi, TinyLlama
    "mistral3": _PLAIN,
    "qwen2": _PLAIN,
    "qwen2moe": _OWN_HEAD,
    "qwen3": _PLAIN,
    "qwen3moe": _PLAIN,
    "gemma": Architecture(scaled_rows=True),
    "gemma2": Architecture(window=Window(2, always=True), scaled_rows=True, odd_layers=46),
    "gemma3": Architecture(window=Window(6), odd_layers=62, query_norm=True),
    "gpt-oss": Architecture(window=Window(2, always=True), own_head=True),
    "deepseek": Architecture(leading_dense=True),
    "phi3": _PLAIN,
    "granite": Architecture(embedding_keys=("embedding_scale",)),
    "olmo2": Architecture(window=Window(4), own_head=True),
    "olmoe": _OWN_HEAD,
    "internlm2": _OWN_HEAD,
    "exaone": _PLAIN,
    "seed_oss": _PLAIN,
}

_RECURRENT: Final = "it keeps a recurrent state, which can not be cut back when drafts or replays demand it"
_NO_DECODER: Final = "it is an encoder: it does not generate text token by token"
_BY_NUMBER: Final = "the library derives from a layer's number what the layer is, which a slice would change"
_SIDE_INPUT: Final = "its layers take more than the row of the layer before, which a chain does not pass on"
_EXTRA: Final = "it has layers beside the chain (prediction of several tokens)"

_REFUSED: Final[dict[str, str]] = {
    **dict.fromkeys(
        (
            "mamba", "mamba2", "jamba", "falcon-h1", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7", "plamo2", "lfm2",
            "lfm2moe", "nemotron_h", "nemotron_h_moe", "granitehybrid", "qwen3next", "qwen35", "qwen35moe",
            "kimi-linear", "minimax-01",
        ),
        _RECURRENT,
    ),
    **dict.fromkeys(
        (
            "bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3",
            "eurobert", "gemma-embedding", "t5", "t5encoder", "llama-embed", "clip", "wavtokenizer-dec",
        ),
        _NO_DECODER,
    ),
    **dict.fromkeys(("smollm3", "llama4", "smallthinker", "afmoe", "dots1", "minicpm"), _BY_NUMBER),
    **dict.fromkeys(("gemma3n", "gemma4", "eagle3", "dflash", "qwen3vl", "qwen3vlmoe"), _SIDE_INPUT),
    **dict.fromkeys(("deepseek2", "deepseek32", "glm4moe", "exaone-moe", "mimo2", "glm-dsa"), _EXTRA),
}  # fmt: skip


def architecture_named(name: str, layers: int) -> Architecture:
    """How models of this architecture are cut. Raises CanNotCut, with the reason."""
    known = KNOWN.get(name)
    if known is None:
        why = _REFUSED.get(name, "nobody has shown yet that its slices compute what the whole model does")
        raise CanNotCut(
            f"models of the architecture {excerpt(name)!r} can not be cut: {why}",
            f"It can run whole on one Island. What can be cut: {', '.join(KNOWN)}.",
        )
    if known.odd_layers == layers and not known.query_norm:
        raise CanNotCut(
            f"{name} of {layers} layers can not be cut: the library knows it by the number of layers and scales"
            " its attention differently",
            "Other sizes of the family can be cut; this one can run whole on one Island.",
        )
    return known
