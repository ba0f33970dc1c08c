"""The native library, typed. No other module touches llama.cpp's C interface.

llama.cpp aborts the process on several kinds of bad input (a batch longer than `n_batch`, a grammar that is
fed a token it forbids), so this module checks what it passes on and raises instead. One thread uses a
`Context` at a time; a `Model` is immutable and may be used from several.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias, cast

import numpy as np
from llama_cpp import llama_cpp as _lib
from numpy.typing import NDArray

from cargos.runtimes.llama.leftovers import close_leftovers

Logits: TypeAlias = NDArray[np.float32]

#: Native log lines that are kept for error details. A failed load explains itself in under ten.
_LOG_LINES: Final = 20

#: Following a grammar over one token. A whole vocabulary takes JSON's 7 ms.
_GRAMMAR_LIMIT_S: Final = 0.5

#: Candidates between two looks at the clock.
_GRAMMAR_CHUNK: Final = 256

#: Longest value of a metadata key we read (chat templates reach some 30 KB).
_MAX_META_BYTES: Final = 1 << 20

#: ggml.h's own numbers; those in a comment of llama-cpp-python are of an older one.
_LOG_WARN: Final = 3
_LOG_ERROR: Final = 4
_ATTR_CONTROL: Final = 1 << 3
_VOCABULARY_NONE: Final = 0

_CANDIDATE: Final = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])

#: The ctypes layer is typed loosely (handles are plain integers); from here on it is one untyped value.
_c: Final = cast("Any", _lib)
close_leftovers()


class NativeError(Exception):
    """llama.cpp refused or failed; the message holds its own last words where it had any."""


class _Log:
    """Keeps the native library's last warnings and errors."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=_LOG_LINES)
        self._callback = _c.llama_log_callback(self._on_line)
        _c.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _on_line(self, level: int, text: bytes | None, _data: object) -> None:
        if level in (_LOG_WARN, _LOG_ERROR) and text:
            self.lines.append(text.decode("utf-8", "replace").strip())

    def last_words(self) -> str:
        return "; ".join(list(self.lines)[-4:]) or "no reason given"


_log: Final = _Log()
_c.llama_backend_init()


class Model:
    """The weights, memory-mapped, and the vocabulary.

    Raises NativeError if the file can not be loaded. `paths`: one GGUF file, or all parts of a split one in
    order. `on_progress` is called with 0..1 and may raise nothing.
    """

    def __init__(self, paths: Sequence[str], on_progress: Callable[[float], None] | None = None) -> None:
        missing = [path for path in paths if not os.path.isfile(path)]  # noqa: PTH113  (no Path arithmetic follows)
        if missing or not paths:
            raise NativeError(f"no such model file: {', '.join(missing) or '(none given)'}")

        def report(done: float, _data: object) -> bool:
            if on_progress is not None:
                on_progress(done)
            return True

        params = _c.llama_model_default_params()
        params.n_gpu_layers = 0
        callback = _c.llama_progress_callback(report)
        params.progress_callback = callback
        encoded = [os.fsencode(path) for path in paths]
        _log.lines.clear()  # of an earlier failure
        if len(encoded) == 1:
            self._model = _c.llama_model_load_from_file(encoded[0], params)
        else:
            array = (ctypes.c_char_p * len(encoded))(*encoded)
            self._model = _c.llama_model_load_from_splits(array, len(encoded), params)
        if not self._model:
            raise NativeError(f"llama.cpp can not load {paths[0]}: {_log.last_words()}")
        if _c.llama_model_has_encoder(self._model) or not _c.llama_model_has_decoder(self._model):
            raise NativeError(f"{paths[0]} is not a decoder-only language model")
        self._vocab = _c.llama_model_get_vocab(self._model)
        self.n_vocab: Final[int] = _c.llama_vocab_n_tokens(self._vocab)
        self.n_ctx_train: Final[int] = _c.llama_model_n_ctx_train(self._model)
        self.size_bytes: Final[int] = _c.llama_model_size(self._model)
        #: Slices of a model may have none: the library ends the process if it is asked about it then.
        self.has_vocabulary: Final[bool] = _c.llama_vocab_type(self._vocab) != _VOCABULARY_NONE
        known = range(self.n_vocab if self.has_vocabulary else 0)
        self.bos: Final[int] = _c.llama_vocab_bos(self._vocab) if known else -1
        self.eos: Final[int] = _c.llama_vocab_eos(self._vocab) if known else -1
        self.add_bos: Final[bool] = self.bos >= 0 and bool(_c.llama_vocab_get_add_bos(self._vocab))
        self.eog: Final = frozenset(t for t in known if _c.llama_vocab_is_eog(self._vocab, t))
        #: Whether a sequence's memory can be cut and shared at any position (not so in recurrent models).
        self.memory_is_positional: Final = not (
            _c.llama_model_is_recurrent(self._model) or _c.llama_model_is_hybrid(self._model)
        )
        self._pieces: dict[int, bytes] = {}
        self.max_piece_bytes: Final = max((len(self.text_of(t)) for t in known), default=0)

    def close(self) -> None:
        if self._model:
            _c.llama_model_free(self._model)
            self._model = None

    @property
    def handle(self) -> Any:  # noqa: ANN401  (a C pointer)
        return self._model

    @property
    def vocab(self) -> Any:  # noqa: ANN401  (a C pointer)
        return self._vocab

    def text_of(self, token: int) -> bytes:
        """The vocabulary's own spelling of a token (control tokens too; byte-level ones are escaped)."""
        return cast("bytes", _c.llama_vocab_get_text(self._vocab, token) or b"")

    def control_texts(self) -> tuple[str, ...]:
        """Spellings of the control tokens (turn markers and the like)."""
        control = (
            self.text_of(t)
            for t in range(self.n_vocab)
            if _c.llama_vocab_get_attr(self._vocab, t) & _ATTR_CONTROL
        )
        return tuple(text.decode("utf-8", "replace") for text in control if text)

    def chat_template(self) -> str | None:
        return self.meta("tokenizer.chat_template")

    def meta(self, key: str) -> str | None:
        """A metadata value as text, or None."""
        size = 4096
        while size <= _MAX_META_BYTES:
            buffer = ctypes.create_string_buffer(size)
            length = _c.llama_model_meta_val_str(self._model, key.encode(), buffer, size)
            if length < 0:
                return None
            if length < size:
                return buffer.value.decode("utf-8", "replace")
            size = length + 1
        return None

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        """Token ids; nothing is added before or after. Releases the GIL while it works."""
        data = text.encode("utf-8", "replace")
        room = len(data) + 16
        out = (ctypes.c_int32 * room)()
        count = _c.llama_tokenize(self._vocab, data, len(data), out, room, False, parse_special)
        if count < 0:
            raise NativeError(f"llama.cpp can not tokenize a text of {len(data)} bytes")
        return out[:count]

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for in the output; empty for control tokens."""
        known = self._pieces.get(token)
        if known is not None:
            return known
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = _c.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if length >= 0:
                break
            size = -length
        piece = buffer.raw[:length]
        self._pieces[token] = piece
        return piece


class Context:
    """Memory of up to `n_seq` sequences of `context_length` tokens, and the scratch space of one decode.

    Each sequence has cells of its own, in the order of its tokens. (In a pool shared by all, a new token takes
    any free cell, attention sums in the order of cells, and a sequence's numbers come to depend on what
    was in the memory before.) Flash attention is off where results must not depend on how the library
    splits its work over threads.
    """

    def __init__(
        self,
        model: Model,
        *,
        context_length: int,
        n_seq: int,
        n_batch: int,
        threads: int,
        flash_attention: bool,
    ) -> None:
        self._model = model
        params = _c.llama_context_default_params()
        params.n_ctx = n_seq * context_length
        params.n_seq_max = n_seq
        params.n_batch = n_batch
        params.n_ubatch = n_batch
        params.kv_unified = False
        params.n_outputs_max = min(n_batch, max(n_seq, 1))
        params.n_threads = threads
        params.n_threads_batch = threads
        params.no_perf = True
        params.flash_attn_type = (
            _c.LLAMA_FLASH_ATTN_TYPE_AUTO if flash_attention else _c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self._adjust(params)
        self._ctx = _c.llama_init_from_model(model.handle, params)
        if not self._ctx:
            raise NativeError(f"no memory for {n_seq} x {context_length} tokens: {_log.last_words()}")
        self._memory = _c.llama_get_memory(self._ctx)
        self.n_batch: Final = n_batch
        self.n_seq: Final = n_seq
        self.n_outputs_max: Final = int(params.n_outputs_max) or n_batch
        self._row_type = ctypes.c_float * model.n_vocab
        self._init_batch()

    def _adjust(self, params: Any) -> None:  # noqa: ANN401  (a C structure)
        """For kinds of contexts that want it otherwise."""

    def _init_batch(self) -> None:
        n = self.n_batch
        self._token = np.zeros(n, np.int32)
        self._pos = np.zeros(n, np.int32)
        self._seq = np.zeros(n, np.int32)
        self._want = np.zeros(n, np.int8)
        self._ones = np.ones(n, np.int32)
        self._seq_pointers = self._seq.ctypes.data + 4 * np.arange(n, dtype=np.uint64)
        self._batch = self._new_batch("token", self._token, ctypes.c_int32)

    def _new_batch(self, field: str, values: NDArray[Any], kind: type[Any]) -> Any:  # noqa: ANN401  (a C structure)
        """A batch whose input is in `values`."""
        batch = _c.llama_batch()
        for name, array, element in (
            (field, values, kind),
            ("pos", self._pos, ctypes.c_int32),
            ("n_seq_id", self._ones, ctypes.c_int32),
            ("seq_id", self._seq_pointers, ctypes.POINTER(ctypes.c_int32)),
            ("logits", self._want, ctypes.c_int8),
        ):
            setattr(batch, name, ctypes.cast(array.ctypes.data, ctypes.POINTER(element)))
        return batch

    def close(self) -> None:
        if self._ctx:
            _c.llama_free(self._ctx)
            self._ctx = None

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], wanted: Sequence[int]
    ) -> None:
        """Run one batch; `wanted` holds the indices whose logits will be asked for.

        It is computed in one go if the sequences are consecutive numbers in rising order, else in several.
        Raises ValueError on arguments that would abort the process, NativeError if the computation failed.
        """
        if len(tokens) != len(positions):
            raise ValueError(f"{len(tokens)} tokens for {len(positions)} positions")
        if min(tokens) < 0 or max(tokens) >= self._model.n_vocab:
            raise ValueError("a token id outside the vocabulary")
        if len(tokens) > self.n_batch:
            raise ValueError(f"{len(tokens)} tokens, at most {self.n_batch}")
        self._token[: len(tokens)] = tokens
        self._compute(self._batch, positions, sequences, wanted)

    def _compute(
        self,
        batch: Any,  # noqa: ANN401  (a C structure)
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: Sequence[int],
    ) -> None:
        n = len(positions)
        if not 1 <= n <= self.n_batch or len(sequences) != n:
            raise ValueError(f"a batch of {n}/{len(sequences)} does not fit {self.n_batch}")
        if len(wanted) > self.n_outputs_max:
            raise ValueError(f"{len(wanted)} rows of output, at most {self.n_outputs_max}")
        if min(sequences) < 0 or max(sequences) >= self.n_seq or min(positions) < 0:
            raise ValueError("a sequence or position out of range")
        self._pos[:n] = positions
        self._seq[:n] = sequences
        self._want[:n] = 0
        self._want[list(wanted)] = 1
        batch.n_tokens = n
        status = _c.llama_decode(self._ctx, batch)
        if status != 0:
            raise NativeError(f"llama_decode returned {status}: {_log.last_words()}")

    def logits(self, index: int) -> Logits:
        """The row of batch index `index` of the last decode: a view that the next decode overwrites."""
        pointer = _c.llama_get_logits_ith(self._ctx, index)
        if not pointer:
            raise NativeError(f"no logits for batch index {index}")
        row = self._row_type.from_address(ctypes.addressof(pointer.contents))
        return np.frombuffer(cast("memoryview", row), dtype=np.float32)

    def clear(self) -> None:
        """Forget all sequences, as if newly made."""
        _c.llama_memory_clear(self._memory, True)

    def cut(self, sequence: int, start: int) -> bool:
        """Forget a sequence's positions from `start` on. False if this memory can only forget all of it."""
        return bool(_c.llama_memory_seq_rm(self._memory, sequence, start, -1))

    def export(self, sequence: int) -> bytes:
        """A sequence's memory, for `load` of a context of the same model and kind."""
        size = _c.llama_state_seq_get_size(self._ctx, sequence)
        buffer = (ctypes.c_uint8 * max(1, size))()
        return bytes(buffer[: _c.llama_state_seq_get_data(self._ctx, buffer, size, sequence)])

    def load(self, sequence: int, data: bytes) -> bool:
        """Put in what `export` gave; what the sequence had is gone. False if it does not fit this context.

        The library checks sizes and kinds, not more: never give it bytes that are not from one of our own.
        """
        self.cut(sequence, 0)
        buffer = (ctypes.c_uint8 * max(1, len(data))).from_buffer_copy(data or b"\0")
        taken = _c.llama_state_seq_set_data(self._ctx, buffer, len(data), sequence)
        if taken != len(data):
            self.cut(sequence, 0)
            return False
        return True

    def copy(self, source: int, target: int, length: int) -> bool:
        """Give `target` the first `length` positions of `source`; what it had is gone.

        False as in `cut`. Copies all cells of the sequence, at the next decode.
        """
        _c.llama_memory_seq_cp(self._memory, source, target, 0, -1)
        return self.cut(target, length)


class GrammarTooCostly(Exception):
    """A grammar so ambiguous that following it would hold up everybody else."""


class Grammar:
    """A GBNF grammar and how far it has been followed. Raises NativeError if it does not parse.

    The other methods raise GrammarTooCostly.
    """

    def __init__(self, model: Model, source: str) -> None:
        if not source.strip() or "\0" in source:
            raise NativeError("the grammar is empty or holds a zero byte")
        self._sampler = _c.llama_sampler_init_grammar(model.vocab, source.encode("utf-8", "replace"), b"root")
        if not self._sampler:
            raise NativeError("the grammar does not parse, is left-recursive, or has no rule named root")
        self._one = np.zeros(1, _CANDIDATE)

    def close(self) -> None:
        if self._sampler:
            _c.llama_sampler_free(self._sampler)
            self._sampler = None

    def _apply(self, candidates: NDArray[Any]) -> None:
        array = _c.llama_token_data_array()
        array.data = ctypes.cast(candidates.ctypes.data, _c.llama_token_data_p)
        array.size = len(candidates)
        array.selected = -1
        array.sorted = False
        _c.llama_sampler_apply(self._sampler, ctypes.byref(array))

    def admits(self, token: int) -> bool:
        """Whether this token may come next."""
        self._one["id"] = token
        self._one["logit"] = 0.0
        self._apply(self._one)
        return bool(self._one["logit"][0] == 0.0)

    def admitted(self, tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which of these may come next."""
        candidates = np.zeros(len(tokens), _CANDIDATE)
        candidates["id"] = tokens
        deadline = time.monotonic() + _GRAMMAR_LIMIT_S
        for start in range(0, len(candidates), _GRAMMAR_CHUNK):
            self._apply(candidates[start : start + _GRAMMAR_CHUNK])
            _check_time(deadline)
        return cast("NDArray[np.bool_]", candidates["logit"] == 0.0)

    def advance(self, token: int) -> bool:
        """Follow the grammar over this token. False (and nothing changes) if it may not come next."""
        if not self.admits(token):
            return False  # the library would throw across the C border and end the process
        deadline = time.monotonic() + _GRAMMAR_LIMIT_S
        _c.llama_sampler_accept(self._sampler, token)
        _check_time(deadline)  # its readings multiply at each token: this one was slow, the next is hopeless
        return True


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise GrammarTooCostly("the constraint's grammar is too ambiguous to follow in reasonable time")


def last_words() -> str:
    """The native library's last warnings and errors."""
    return _log.last_words()
