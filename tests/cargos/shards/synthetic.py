"""Tiny models of random weights, in the layouts of real architectures: what is cut and chained in tests.

They are written with our own GGUF writer and loaded by llama.cpp, which proves the writer too. Their vocabulary
is a sentencepiece one of 288 tokens (three special ones, all bytes, letters), so that text goes through them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cargos.shards.gguf import (
    Entry,
    Kind,
    NewTensor,
    TensorType,
    array_entry,
    build_header,
    number_entry,
    string_entry,
    strings_entry,
)

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
LETTERS = ["\u2581", *"etaoinshrdlucmfwypvbgkqjxz", "\u2581t", "\u2581a"]
VOCABULARY = [*SPECIAL, *BYTES, *LETTERS]
#: Token types of llama.cpp: unknown, control, byte, normal.
_TYPES = [2, 3, 3] + [6] * len(BYTES) + [1] * len(LETTERS)


@dataclass
class Shape:
    """A model's shape. `window`: rows that sliding layers look back; `pattern`: which layers slide (None: the
    architecture's own habit). `experts` 0: dense. `extra`: more metadata.
    """

    architecture: str = "llama"
    layers: int = 4
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    ff: int = 96
    experts: int = 0
    experts_used: int = 2
    window: int = 0
    pattern: list[bool] | int | None = None
    tied: bool = True
    seed: int = 1
    rope_freqs: bool = False
    head_size: int = 0
    extra: dict[str, Entry] = field(default_factory=dict[str, Entry])

    @property
    def head(self) -> int:
        return self.head_size or self.width // self.heads


def write_model(path: Path, shape: Shape) -> Path:
    """Write the model; the same shape gives the same bytes."""
    draw = np.random.default_rng(shape.seed)
    tensors: list[tuple[str, np.ndarray[Any, Any]]] = []
    for name, dimensions in _tensors(shape):
        if name.endswith(".bias"):
            data = draw.normal(0, 0.1, dimensions)
        elif "norm" in name:
            data = 1 + draw.normal(0, 0.2, dimensions)
        elif name == "rope_freqs.weight":
            data = 1 + np.arange(dimensions[0]) % 3
        else:
            data = draw.normal(0, 1.0 if name.startswith("token_embd") else 0.15, dimensions)
        tensors.append((name, data.astype(np.float32)))
    header, starts, size = build_header(
        _metadata(shape), [NewTensor(name, data.shape, TensorType.F32) for name, data in tensors], 32
    )
    content = bytearray(size)
    content[: len(header)] = header
    for start, (_, data) in zip(starts, tensors, strict=True):
        content[start : start + data.nbytes] = data.tobytes()
    path.write_bytes(content)
    return path


def _metadata(shape: Shape) -> dict[str, Entry]:
    name = shape.architecture

    def u32(value: int) -> Entry:
        return number_entry(Kind.UINT32, value)

    def f32(value: float) -> Entry:
        return number_entry(Kind.FLOAT32, value)

    metadata = {
        "general.architecture": string_entry(name),
        "general.name": string_entry("synthetic"),
        f"{name}.block_count": u32(shape.layers),
        f"{name}.context_length": u32(2048),
        f"{name}.embedding_length": u32(shape.width),
        f"{name}.feed_forward_length": u32(shape.ff),
        f"{name}.attention.head_count": u32(shape.heads),
        f"{name}.attention.head_count_kv": u32(shape.kv_heads),
        f"{name}.attention.layer_norm_rms_epsilon": f32(1e-5),
        f"{name}.rope.freq_base": f32(10000),
        f"{name}.rope.dimension_count": u32(shape.head),
        "tokenizer.ggml.model": string_entry("llama"),
        "tokenizer.ggml.tokens": strings_entry(VOCABULARY),
        "tokenizer.ggml.scores": array_entry(Kind.FLOAT32, [-float(i) for i in range(len(VOCABULARY))]),
        "tokenizer.ggml.token_type": array_entry(Kind.INT32, _TYPES),
        "tokenizer.ggml.bos_token_id": u32(1),
        "tokenizer.ggml.eos_token_id": u32(2),
        "tokenizer.ggml.unknown_token_id": u32(0),
    }
    if name.startswith("gemma"):
        metadata[f"{name}.attention.key_length"] = u32(shape.head)
        metadata[f"{name}.attention.value_length"] = u32(shape.head)
    if shape.experts:
        metadata[f"{name}.expert_count"] = u32(shape.experts)
        metadata[f"{name}.expert_used_count"] = u32(shape.experts_used)
    if shape.experts and name.startswith(("qwen", "gpt-oss", "deepseek")):
        metadata[f"{name}.expert_feed_forward_length"] = u32(shape.ff)
    if name == "qwen2moe":
        metadata[f"{name}.expert_shared_feed_forward_length"] = u32(shape.ff)
    if name == "deepseek":
        metadata[f"{name}.leading_dense_block_count"] = u32(2)
        metadata[f"{name}.expert_shared_count"] = u32(1)
    if name == "gemma2":
        metadata[f"{name}.attn_logit_softcapping"] = f32(50)
        metadata[f"{name}.final_logit_softcapping"] = f32(30)
    if name == "gemma3" and shape.window:
        metadata[f"{name}.rope.freq_base"] = f32(1_000_000)
        metadata[f"{name}.rope.freq_base_swa"] = f32(10000)
    if name == "granite":
        scales = {"embedding_scale": 12.0, "residual_scale": 0.3, "attention.scale": 0.2, "logit_scale": 4.0}
        metadata |= {f"{name}.{key}": f32(value) for key, value in scales.items()}
    if shape.window:
        metadata[f"{name}.attention.sliding_window"] = u32(shape.window)
    if isinstance(shape.pattern, list):
        metadata[f"{name}.attention.sliding_window_pattern"] = array_entry(Kind.BOOL, shape.pattern)
    elif shape.pattern is not None:
        metadata[f"{name}.attention.sliding_window_pattern"] = u32(shape.pattern)
    return {**metadata, **shape.extra}


def _tensors(shape: Shape) -> list[tuple[str, tuple[int, ...]]]:
    """Names and dimensions, the fastest first."""
    name, width = shape.architecture, shape.width
    keys = shape.kv_heads * shape.head
    result: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (width, len(VOCABULARY)))]
    if shape.rope_freqs:
        result.append(("rope_freqs.weight", (shape.head // 2,)))
    for layer in range(shape.layers):
        own: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (width,),
            "attn_q.weight": (width, shape.heads * shape.head),
            "attn_k.weight": (width, keys),
            "attn_v.weight": (width, keys),
            "attn_output.weight": (shape.heads * shape.head, width),
            "ffn_norm.weight": (width,),
        }
        own |= {f"ffn_{part}.weight": dimensions for part, dimensions in _feed_forward(shape).items()}
        if shape.experts and name != "deepseek":
            _mix(own, shape)
        _adapt(own, shape, keys)
        if name == "deepseek" and layer >= 2:
            _mix(own, shape)
        result += [(f"blk.{layer}.{key}", dimensions) for key, dimensions in own.items()]
    result.append(("output_norm.weight", (width,)))
    if not shape.tied:
        result.append(("output.weight", (width, len(VOCABULARY))))
    return result


def _feed_forward(shape: Shape) -> dict[str, tuple[int, ...]]:
    width, ff = shape.width, shape.ff
    return {"gate": (width, ff), "down": (ff, width), "up": (width, ff)}


def _mix(own: dict[str, tuple[int, ...]], shape: Shape) -> None:
    """Make it a layer of experts, with a shared one where the architecture has such."""
    name, width = shape.architecture, shape.width
    own["ffn_gate_inp.weight"] = (width, shape.experts)
    for part, dimensions in _feed_forward(shape).items():
        del own[f"ffn_{part}.weight"]
        own[f"ffn_{part}_exps.weight"] = (*dimensions, shape.experts)
        if name in ("qwen2moe", "deepseek"):
            own[f"ffn_{part}_shexp.weight"] = dimensions
        if name == "gpt-oss":
            own[f"ffn_{part}_exps.bias"] = (dimensions[1], shape.experts)
    if name == "qwen2moe":
        own["ffn_gate_inp_shexp.weight"] = (width,)
    if name == "gpt-oss":
        own["ffn_gate_inp.bias"] = (shape.experts,)


def _adapt(own: dict[str, tuple[int, ...]], shape: Shape, keys: int) -> None:
    """What is different in a layer of this architecture."""
    name, width, ff = shape.architecture, shape.width, shape.ff
    if name in ("qwen2", "qwen2moe", "seed_oss"):
        own |= {"attn_q.bias": (width,), "attn_k.bias": (keys,), "attn_v.bias": (keys,)}
    if name in ("qwen3", "qwen3moe", "gemma3"):
        own |= {"attn_q_norm.weight": (shape.head,), "attn_k_norm.weight": (shape.head,)}
    if name in ("gemma2", "gemma3"):
        own |= {"post_attention_norm.weight": (width,), "post_ffw_norm.weight": (width,)}
    if name in ("olmo2", "olmoe"):
        own |= {"attn_q_norm.weight": (width,), "attn_k_norm.weight": (keys,)}
    if name == "olmo2":
        del own["attn_norm.weight"], own["ffn_norm.weight"]
        own |= {"post_attention_norm.weight": (width,), "post_ffw_norm.weight": (width,)}
    if name == "seed_oss":
        own["post_attention_norm.weight"] = own.pop("ffn_norm.weight")
    if name == "gpt-oss":
        own |= {
            "attn_q.bias": (width,),
            "attn_k.bias": (keys,),
            "attn_v.bias": (keys,),
            "attn_output.bias": (width,),
        }
        own["post_attention_norm.weight"] = own.pop("ffn_norm.weight")
        own["attn_sinks.weight"] = (shape.heads,)
    if name == "phi3":
        del own["attn_q.weight"], own["attn_k.weight"], own["attn_v.weight"], own["ffn_gate.weight"]
        own["attn_qkv.weight"] = (width, width + 2 * keys)
        own["ffn_up.weight"] = (width, 2 * ff)
