"""A context that takes the residual stream in and gives it out, beside the whole models' one.

The rows that leave a slice are read by a callback that llama.cpp asks about each node of its graph: it says yes
to the last layer's output alone, copies it, and ends the computation there, so that a head that the slice may
carry for the loader's sake is not computed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as _lib
from numpy.typing import NDArray

from cargos.runtimes.llama.leftovers import close_leftovers
from cargos.runtimes.llama.native import Context, Model, NativeError
from cargos.shards.layout import SLICE_SCALE

Rows: TypeAlias = NDArray[np.float32]

#: What goes in: token ids (int32) or rows.
Values: TypeAlias = NDArray[Any]

#: The ctypes layer is typed loosely (as in the whole models' module).
_c: Final = cast("Any", _lib)
close_leftovers()


def _tensor_functions() -> Any:  # noqa: ANN401  (an untyped library)
    """The tensors' accessors, from the copy of the library that llama.cpp itself is linked with."""
    directory = Path(llama_cpp.__file__).parent / "lib"
    found = sorted(directory.glob("libggml-base*")) + sorted(directory.glob("ggml-base*.dll"))
    library = ctypes.CDLL(str(found[0]) if found else None)  # None: linked into one, as on some platforms
    for name, result in (
        ("ggml_get_name", ctypes.c_char_p),
        ("ggml_get_data", ctypes.c_void_p),
        ("ggml_nbytes", ctypes.c_size_t),
    ):
        function = getattr(library, name)
        function.restype = result
        function.argtypes = [ctypes.c_void_p]
    return library


_ggml: Final = _tensor_functions()


def width_of(model: Model) -> int:
    """Values in a row."""
    return int(_c.llama_model_n_embd(model.handle))


def layers_of(model: Model) -> int:
    """Layers in the file."""
    return int(_c.llama_model_n_layer(model.handle))


class StageContext(Context):
    """Memory and scratch space of a slice. `takes_tokens`: it is the first. `is_head`: logits come out."""

    def __init__(
        self,
        model: Model,
        *,
        context_length: int,
        n_seq: int,
        n_batch: int,
        threads: int,
        flash_attention: bool,
        takes_tokens: bool,
        is_head: bool,
        max_outputs: int,
    ) -> None:
        self.width: Final = width_of(model)
        self.is_head: Final = is_head
        self.takes_tokens: Final = takes_tokens
        self._max_outputs = max_outputs if is_head else n_batch
        self._wanted_name = f"l_out-{layers_of(model) - 1}".encode()
        self._out = np.zeros((n_batch, self.width), np.float32)
        self._taken = 0
        self._tap: Any = None
        super().__init__(
            model,
            context_length=context_length,
            n_seq=n_seq,
            n_batch=n_batch,
            threads=threads,
            flash_attention=flash_attention,
        )
        self._in = np.zeros((n_batch, self.width), np.float32)
        # Some architectures scale whatever comes in, as if it were embeddings: their slices say how to undo it.
        self._scale = np.float32(model.meta(SLICE_SCALE) or 1)
        self._embd_batch = self._new_batch("embd", self._in, ctypes.c_float)

    def _adjust(self, params: Any) -> None:  # noqa: ANN401  (a C structure)
        params.n_outputs_max = min(self._max_outputs, params.n_batch)
        params.swa_full = True  # a window's forgotten cells could not be cut back to
        if not self.is_head:
            self._tap = _c.ggml_backend_sched_eval_callback(self._make_tap())
            params.cb_eval = self._tap

    def _make_tap(self) -> Any:  # noqa: ANN401  (a ctypes callback's function)
        name_of, data_of, size_of = _ggml.ggml_get_name, _ggml.ggml_get_data, _ggml.ggml_nbytes
        wanted, start, room = self._wanted_name, self._out.ctypes.data, self._out.nbytes

        def tap(tensor: int, ask: bool, _data: object) -> bool:  # noqa: FBT001  (llama.cpp's signature)
            if ask:
                return name_of(tensor) == wanted
            size = size_of(tensor)
            if self._taken + size <= room:
                ctypes.memmove(start + self._taken, data_of(tensor), size)
            self._taken += size
            return False

        return tap

    def run(
        self,
        values: Values,
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: Sequence[int] = (),
    ) -> Rows | None:
        """Run one batch: rows out (a copy), or None in a head, whose `logits` at `wanted` may be asked then.

        `sequences`: consecutive numbers in rising order, each the same number of times, so that the library
        computes them in one go and in this order. Raises as `decode`.
        """
        self._taken = 0
        n = len(positions)
        outputs = wanted if self.is_head else range(n)
        if self.takes_tokens:
            self.decode([int(t) for t in values], positions, sequences, outputs)
        else:
            if values.shape != (n, self.width):
                raise ValueError(f"rows of shape {values.shape} for {n} positions of width {self.width}")
            if n > self.n_batch:
                raise ValueError(f"{n} rows, at most {self.n_batch}")
            np.multiply(values, self._scale, out=self._in[:n])
            self._compute(self._embd_batch, positions, sequences, outputs)
        if self.is_head:
            return None
        if self._taken != n * self.width * 4:
            raise NativeError(
                f"the last layer gave {self._taken} bytes for {n} rows: this architecture can not be cut"
            )
        return self._out[:n].copy()
