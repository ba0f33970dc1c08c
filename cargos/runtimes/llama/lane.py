"""Deterministic decoding: one job alone in a context of its own.

Whatever else the engine does, the job's computations are the same ones in the same order: its memory is
empty at the start, the prompt goes in in chunks of a fixed size, each token alone. A job that resumes
steps through just those computations again up to its last token, so that what follows is equal bit for bit.
"""

from __future__ import annotations

import time
from typing import Final

from cargos.runtimes.llama.native import Context, Logits, Model, NativeError
from cargos.runtimes.llama.sequence import Sequence

#: Prompt tokens in one go. Part of the definition of deterministic results: never change it.
_CHUNK: Final = 32

#: How long a lane may replay resumed tokens while the batched jobs wait for their next step.
_REPLAY_STEP_NS: Final = 50_000_000


class Lane:
    """Holds at most one sequence. The context is made at the first use."""

    def __init__(self, model: Model, *, context_length: int, threads: int) -> None:
        self._model = model
        self._context_length = context_length
        self._threads = threads
        self._context: Context | None = None
        self.sequence: Sequence | None = None
        self.logits: Logits | None = None

    def start(self, sequence: Sequence) -> None:
        if self._context is None:
            self._context = Context(
                self._model,
                context_length=self._context_length,
                n_seq=1,
                n_batch=_CHUNK,
                threads=self._threads,
                flash_attention=False,
            )
        self._context.clear()
        sequence.in_memory = 0
        self.sequence = sequence

    def release(self) -> None:
        self.sequence = None
        self.logits = None

    def close(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None

    def step(self) -> int:
        """Work for a bounded time. Tokens processed: 0 if the sequence is paused or there is none.

        Stops with `logits` when the sequence is to make its next token, which is computed only when that
        token may be made; without, when more steps must follow first.
        """
        self.logits = None
        sequence = self.sequence
        if sequence is None or sequence.done is not None:
            return 0
        began_ns = time.monotonic_ns()
        sequence.started(began_ns)
        done = 0
        while True:
            prompt = len(sequence.job.prompt)
            count = min(_CHUNK, max(1, prompt - sequence.in_memory))
            makes_token = count == sequence.pending
            if makes_token and not sequence.may_go_on:
                return done
            ends_prompt = sequence.in_memory + count >= prompt
            logits = self._run(sequence, count, wanted=ends_prompt)
            done += count
            if makes_token:
                self.logits = logits
                return done
            if time.monotonic_ns() - began_ns > _REPLAY_STEP_NS or not ends_prompt:
                return done

    def _run(self, sequence: Sequence, count: int, *, wanted: bool) -> Logits | None:
        context = self._context
        if context is None:  # start() made it
            raise NativeError("a lane stepped before its start")
        first = sequence.in_memory
        tokens = sequence.tokens[first : first + count]
        context.decode(tokens, range(first, first + count), [0] * count, [count - 1] if wanted else [])
        sequence.in_memory += count
        return context.logits(count - 1) if wanted else None
