"""A small model with the same vocabulary that drafts for a head (a Cargo's file with the role `draft`).

It reads along in a context of its own, one sequence a session, and says what it would go on with: chosen as
the head will choose, with the same random number for the same place. Two models that give nearly the same
chances then say nearly always the same, also where text is sampled and the likeliest token is often wrong.

Drafts take the head's time, which `Speculation` weighs against the ring's. Reading a long prompt is spread over
steps, so that no other session waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

from cargos.runtimes.llama.native import Context, Model, NativeError
from cargos.runtimes.llama.sampling import BadLogits, Floats, choose
from protocol.work import Sampling

#: Rows that it reads in one go before it drafts; what is more is read the next times. On a core that reads 200
#: a second the other sessions of the head wait 0.15 s for it.
READ_ROWS: Final = 32

#: Tokens that are read when it is loaded, to see what one takes. The first ones warm up.
_TRIALS: Final = 8

#: Weight of a new measurement.
_GAIN: Final = 0.1


class DraftModel:
    """The model and its memory. Raises NativeError if it can not be loaded, or its vocabulary is another."""

    def __init__(
        self, path: str, vocabulary: Model, *, sequences: int, context_length: int, threads: int
    ) -> None:
        self._model = Model([path])
        try:
            _check(self._model, vocabulary, path)
            self._context = Context(
                self._model,
                context_length=context_length,
                n_seq=sequences,
                n_batch=max(READ_ROWS, sequences),
                threads=threads,
                flash_attention=True,
            )
        except BaseException:
            self._model.close()
            raise
        self.context_length: Final = context_length
        self.token_ns = 0
        self._free = list(range(sequences))
        # What a draft costs is known before the first one is weighed.
        for position in range(min(_TRIALS, context_length)):
            self.read(0, [0], position)
        self.cut(0, 0)

    def drafter(self, sampling: Sampling, prompt: int) -> ModelDrafter | None:
        """For one session, until it is closed, whose answer begins behind so many tokens and is sampled like
        this. None: as many as there may be have one.
        """
        return ModelDrafter(self, self._free.pop(), sampling, prompt) if self._free else None

    def close(self) -> None:
        self._context.close()
        self._model.close()

    # --- for drafters -----------------------------------------------------------------------------

    def give_back(self, sequence: int) -> None:
        self._context.cut(sequence, 0)
        self._free.append(sequence)

    def cut(self, sequence: int, start: int) -> None:
        self._context.cut(sequence, start)

    def read(self, sequence: int, tokens: list[int], position: int) -> Floats:
        """Take these in (at most READ_ROWS); logits of what comes next, until the next call."""
        began = time.monotonic_ns()
        n = len(tokens)
        self._context.decode(tokens, range(position, position + n), [sequence] * n, [n - 1])
        if n == 1:
            took_ns = time.monotonic_ns() - began
            self.token_ns += round(_GAIN * (took_ns - self.token_ns)) if self.token_ns else took_ns
        return self._context.logits(n - 1)


class ModelDrafter:
    """A `Proposer` for one session."""

    def __init__(self, model: DraftModel, sequence: int, sampling: Sampling, prompt: int) -> None:
        self._model = model
        self._sequence = sequence
        self._sampling = sampling
        self._prompt = prompt
        self._tokens: list[int] = []
        #: What is in the model's memory, drafts of before included, and how much of it is known to be right.
        self._read: list[int] = []
        self._right = 0

    @property
    def cost_ns(self) -> int:
        """Never 0: what costs nothing is asked for each time."""
        return max(1, self._model.token_ns)

    def match(self) -> int | None:
        return 0 if self._tokens else None

    def extend(self, tokens: Iterable[int]) -> None:
        self._tokens.extend(tokens)

    def truncate(self, length: int) -> None:
        del self._tokens[length:]
        self._right = min(self._right, length)

    def propose(self, limit: int) -> list[int]:
        """Up to `limit` drafts; none while it is still reading, or where its context ends."""
        limit = min(limit, self._model.context_length - len(self._tokens))
        if limit <= 0 or not self._tokens:
            return []
        following = self._catch_up()
        drafts: list[int] = []
        while following is not None and len(drafts) < limit:
            drafts.append(following)
            if len(drafts) < limit:
                following = self._take([following])
        return drafts

    def close(self) -> None:
        """Its place is free for another session."""
        self._model.give_back(self._sequence)

    def _catch_up(self) -> int | None:
        """Read what is missing, or a part of it. What comes next, if all is read."""
        shared = min(len(self._read), len(self._tokens))
        while self._right < shared and self._read[self._right] == self._tokens[self._right]:
            self._right += 1
        keep = min(
            self._right, len(self._tokens) - 1
        )  # the last one is read again if need be, to hear what follows
        if keep < len(self._read):
            self._model.cut(self._sequence, keep)
            del self._read[keep:]
            self._right = keep
        following = self._take(self._tokens[keep : keep + READ_ROWS])
        self._right = len(self._read)
        return following if len(self._read) == len(self._tokens) else None

    def _take(self, tokens: list[int]) -> int | None:
        logits = self._model.read(self._sequence, tokens, len(self._read))
        self._read.extend(tokens)
        # Penalties are left out: it is a guess. So no numbers of this model may be worse than no guess.
        try:
            return choose(logits, self._sampling, max(0, len(self._read) - self._prompt))
        except BadLogits:
            return None


def _check(model: Model, vocabulary: Model, path: str) -> None:
    same = model.n_vocab == vocabulary.n_vocab and all(
        model.text_of(token) == vocabulary.text_of(token) for token in range(model.n_vocab)
    )
    if not same:
        raise NativeError(f"{path} can not draft: its vocabulary is not the Cargo's")
    if not model.memory_is_positional:
        raise NativeError(f"{path} can not draft: its memory can not be cut back")
