"""One job inside the engine: its tokens, what is to come, when it ends.

Knows nothing of batches and memory; the engine brings logits, the sequence turns them into tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final, Literal

from cargos.runtimes.base import JobRefused
from cargos.runtimes.llama.native import Logits
from cargos.runtimes.llama.prepare import Prepared
from cargos.runtimes.llama.sampling import (
    History,
    adjusted,
    choose,
    choose_constrained,
    log_probabilities,
    needs_history,
)
from cargos.runtimes.llama.text import Detokenizer
from cargos.runtimes.llama.wire import Done, Update
from protocol.jobs import Token, TopLogprob, Usage, token_hash


class Sequence:
    """A job's tokens. `tokens`: prompt, then generated ones. `in_memory`: how many of them the native
    memory holds. `slot`: where, or -1. Raises JobRefused if `resume` runs past its own end.
    """

    def __init__(
        self,
        key: int,
        job: Prepared,
        *,
        granted: int,
        piece: Callable[[int], bytes],
        eog: Collection[int],
        submitted_ns: int,
    ) -> None:
        self.key: Final = key
        self.job: Final = job
        self.granted = granted
        self.tokens = job.prompt + job.resume
        self.in_memory = 0
        self.slot = -1
        self.cached = 0
        self.done: Done | None = None
        self._piece = piece
        self._eog = eog
        self._banned = eog if job.work.ignore_eos and job.grammar is None else ()
        self._text = Detokenizer(job.work.stop)
        self._keeps_history = needs_history(job.work.sampling)
        self._history = History(job.prompt if self._keeps_history else ())
        self._fresh: list[Token] = []
        self._submitted_ns = submitted_ns
        self._started_ns = 0
        self._first_token_ns = 0
        self._replay()

    @property
    def made(self) -> int:
        """Tokens generated so far, resumed ones included: the index of the next one."""
        return len(self.tokens) - len(self.job.prompt)

    @property
    def pending(self) -> int:
        """Tokens that are not in the memory yet."""
        return len(self.tokens) - self.in_memory

    @property
    def may_go_on(self) -> bool:
        return self.made < self.granted

    def close(self) -> None:
        if self.job.grammar is not None:
            self.job.grammar.close()

    def started(self, now_ns: int) -> None:
        """It is in a batch for the first time."""
        if not self._started_ns:
            self._started_ns = now_ns

    def _replay(self) -> None:
        """Bring the text and the history to where the resumed tokens end; nothing of it goes out again."""
        for place, token in enumerate(self.job.resume):
            last = place == len(self.job.resume) - 1
            if self._keeps_history:
                self._history.add(token)
            self._text.push(self._piece(token))
            ended = self._text.stopped or (token in self._eog and not self._banned)
            if ended and not last:
                raise JobRefused("invalid", f"the tokens to resume from end at {place} already")
            if ended:
                self._finish("stop")
        if self.done is None and self.made >= self.job.room:
            self._finish("length")

    def advance(self, logits: Logits, now_ns: Callable[[], int]) -> None:
        """Make the next token. Raises BadLogits."""
        sampling = self.job.work.sampling
        row = adjusted(logits, sampling, self._history, self._banned)
        grammar = self.job.grammar
        token: int | None
        if grammar is None:
            token = choose(row, sampling, self.made)
        else:
            token = choose_constrained(row, sampling, self.made, grammar)
        if not self._first_token_ns:
            self._first_token_ns = now_ns()
        if token is None or token in self._eog:
            self._finish("stop", now_ns())
            return
        if grammar is not None:
            grammar.advance(token)
        self._take(token, logits)
        if self._text.stopped:
            self._finish("stop", now_ns())
        elif self.made >= self.job.room:
            self._finish("length", now_ns())

    def _take(self, token: int, logits: Logits) -> None:
        self.tokens.append(token)
        if self._keeps_history:
            self._history.add(token)
        piece = self._piece(token)
        text = self._text.push(piece)
        top = self.job.work.top_logprobs
        if top is None:
            self._fresh.append(Token(token, text))
            return
        own, best = log_probabilities(logits, token, top)
        ranked = tuple(TopLogprob(i, self._piece(i), value) for i, value in best)
        self._fresh.append(Token(token, text, piece, own, ranked))

    def _finish(self, finish: Literal["stop", "length"], now_ns: int = 0) -> None:
        tail = self._text.finish()
        if self._text.stopped:
            finish = "stop"
        started = self._started_ns or now_ns
        first = self._first_token_ns or now_ns
        usage = Usage(
            prompt_tokens=len(self.job.prompt),
            completion_tokens=self.made,
            generated_tokens=self.made - len(self.job.resume),
            cached_tokens=min(self.cached, len(self.job.prompt)),
            queue_ns=max(0, started - self._submitted_ns) if started else 0,
            prefill_ns=max(0, first - started),
            decode_ns=max(0, now_ns - first),
        )
        prompt = len(self.job.prompt)
        self.done = Done(
            finish, tail, usage, token_hash(self.tokens[:prompt]), token_hash(self.tokens[prompt:])
        )

    def update(self) -> Update | None:
        """What is new since the last call."""
        if not self._fresh and self.done is None:
            return None
        fresh = tuple(self._fresh)
        self._fresh.clear()
        return Update(self.key, self.made - len(fresh), fresh, done=self.done)

    def prompt_update(self) -> Update:
        return Update(
            self.key, prompt_done=min(self.in_memory, len(self.tokens)), prompt_total=len(self.tokens)
        )
