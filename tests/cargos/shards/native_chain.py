"""Chains of slices in this process, run by llama.cpp: just enough to compare a chain with the whole model."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, cast

import numpy as np
from llama_cpp import llama_cpp as _lib

from cargos.runtimes.llama.leftovers import close_leftovers
from cargos.shards.cut import read_header
from cargos.shards.layout import SLICE_SCALE

_c: Any = cast("Any", _lib)
close_leftovers()
_quiet = _c.llama_log_callback(lambda *_: None)
_c.llama_log_set(_quiet, ctypes.c_void_p(0))
_c.llama_backend_init()
_name = None
for library in (_c._lib, ctypes.CDLL(None)):
    if hasattr(library, "ggml_get_name"):
        _name = library.ggml_get_name
        break


def _ggml() -> Any:
    """The library of tensors that llama.cpp itself uses."""
    with Path("/proc/self/maps").open(encoding="ascii", errors="replace") as maps:
        path = next(line.split()[-1] for line in maps if "libggml-base" in line)
    library = ctypes.CDLL(path)
    for name, kind in (
        ("ggml_get_name", ctypes.c_char_p),
        ("ggml_get_data", ctypes.c_void_p),
        ("ggml_nbytes", ctypes.c_size_t),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = kind, [ctypes.c_void_p]
    return library


class Part:
    """A loaded file: a slice or a whole model. `head`: rows of logits come out, else activations."""

    def __init__(self, path: Path, *, head: bool) -> None:
        params = _c.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = _c.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"llama.cpp does not load {path}"
        self.width = _c.llama_model_n_embd(self.model)
        self.layers = _c.llama_model_n_layer(self.model)
        self.vocabulary = _c.llama_vocab_n_tokens(_c.llama_model_get_vocab(self.model))
        self.head = head
        self.scale = np.float32(read_header(path).text(SLICE_SCALE) or 1)
        self._rows = np.zeros((0, self.width), np.float32)
        params = _c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 256, 64, 64, 1
        params.n_threads = params.n_threads_batch = 1
        params.swa_full = True
        params.flash_attn_type = _c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if not head:
            self._tap(params)
        self.context = _c.llama_init_from_model(self.model, params)
        assert self.context, f"llama.cpp makes no context of {path}"

    def _tap(self, params: Any) -> None:
        ggml, wanted = _ggml(), f"l_out-{self.layers - 1}".encode()

        def evaluate(tensor: int, ask: bool, _: object) -> bool:  # noqa: FBT001 - the library's
            if ask:
                return bool(ggml.ggml_get_name(tensor) == wanted)
            count = ggml.ggml_nbytes(tensor) // 4
            data = (ctypes.c_float * count).from_address(ggml.ggml_get_data(tensor))
            self._rows = np.array(data, np.float32).reshape(-1, self.width)
            return False  # what comes after it is not needed

        self._callback = _c.ggml_backend_sched_eval_callback(evaluate)
        params.cb_eval = self._callback

    def run(self, rows: np.ndarray[Any, Any], position: int) -> np.ndarray[Any, Any]:
        """Token ids (one dimension) or activations in, activations or logits out."""
        n, tokens = len(rows), rows.ndim == 1
        batch = _c.llama_batch_init(n, 0 if tokens else self.width, 1)
        batch.n_tokens = n
        if tokens:
            np.ctypeslib.as_array(batch.token, (n,))[:] = rows
        else:
            np.ctypeslib.as_array(batch.embd, (n * self.width,))[:] = (rows * self.scale).reshape(-1)
        for i in range(n):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = position + i, 1, 0, 1
        status = _c.llama_decode(self.context, batch)
        _c.llama_batch_free(batch)
        assert status == 0
        if not self.head:
            assert self._rows.shape == (n, self.width)
            return self._rows
        logits = [
            np.ctypeslib.as_array(_c.llama_get_logits_ith(self.context, i), (self.vocabulary,))
            for i in range(n)
        ]
        return np.stack(logits)

    def tokenize(self, text: str) -> np.ndarray[Any, Any]:
        data, out = text.encode(), (ctypes.c_int32 * (len(text) + 16))()
        vocabulary = _c.llama_model_get_vocab(self.model)
        n = _c.llama_tokenize(vocabulary, data, len(data), out, len(out), True, True)
        return np.array(out[:n], np.int32)

    def close(self) -> None:
        _c.llama_free(self.context)
        _c.llama_model_free(self.model)


def run_chain(paths: list[Path], tokens: np.ndarray[Any, Any], more: int) -> np.ndarray[Any, Any]:
    """Logits of all rows: the prompt at once, then `more` tokens chosen greedily, one by one."""
    parts = [Part(path, head=i == len(paths) - 1) for i, path in enumerate(paths)]
    try:
        out: list[np.ndarray[Any, Any]] = []
        position, rows = 0, tokens
        for _ in range(more + 1):
            count = len(rows)
            for part in parts:
                rows = part.run(rows, position)
            out.append(rows.copy())
            position += count
            rows = np.array([int(rows[-1].argmax())], np.int32)
        return np.concatenate(out)
    finally:
        for part in parts:
            part.close()
