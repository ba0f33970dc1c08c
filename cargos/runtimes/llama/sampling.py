"""Which token comes next: a pure function of (logits, request, token index, tokens so far).

Nothing is carried over from one token to the next but what the tokens themselves say, so any Island
that computes the same logits goes on with the same token. The order is that of `protocol.work.Sampling`:
logit bias, penalties, top_k, top_p, min_p, temperature, draw. The draw walks the tokens in the order of their
ids, so that small numeric differences between machines move a border between two tokens and nothing else.

Presence and frequency penalties count the generated tokens (OpenAI's definition); the repeat penalty
looks at the prompt's tokens too (as in Hugging Face's and vLLM's).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from protocol.dice import draw_unit
from protocol.work import Sampling

#: Streams of the dice. The second draw of a constrained token is independent of the first: its
#: value is only looked at because the first fell on a forbidden token.
DRAW_STREAM: Final = 0x7361_6D70_6C65
REDRAW_STREAM: Final = DRAW_STREAM + 1

#: Values per block in the blockwise passes over a vocabulary (one pass over the blocks' sums or
#: maxima, then one block): near the square root of common vocabulary sizes.
_BLOCK: Final = 64

#: Candidates that a grammar looks at first. Testing a whole vocabulary takes tens of milliseconds.
_GRAMMAR_FIRST: Final = 1024

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


class Constraint(Protocol):
    """What a grammar must be able to say (`native.Grammar`)."""

    def admits(self, token: int) -> bool: ...

    def admitted(self, tokens: NDArray[np.int32]) -> NDArray[np.bool_]: ...


class BadLogits(Exception):
    """The model's output is not a number: its weights or this machine's memory are damaged."""


class History:
    """Tokens so far, as the penalties need them."""

    __slots__ = ("_counts", "_ids", "_place", "_used")

    def __init__(self, prompt: Sequence[int] = ()) -> None:
        self._place: dict[int, int] = {}
        self._ids = np.zeros(64, np.int64)
        self._counts = np.zeros(64, np.float32)
        self._used = 0
        for token in prompt:
            self._slot(token)

    def _slot(self, token: int) -> int:
        place = self._place.get(token)
        if place is None:
            place = self._used
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._place[token] = place
            self._ids[place] = token
            self._used += 1
        return place

    def add(self, token: int) -> None:
        """A generated token."""
        place = self._slot(token)  # first: it may move the arrays
        self._counts[place] += 1

    @property
    def ids(self) -> Ids:
        """Different tokens of prompt and output."""
        return self._ids[: self._used]

    @property
    def counts(self) -> Floats:
        """How often each of `ids` was generated; 0 for those only in the prompt."""
        return self._counts[: self._used]


def needs_history(sampling: Sampling) -> bool:
    return (
        sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0 or sampling.repeat_penalty != 1.0
    )


def adjusted(logits: Floats, sampling: Sampling, history: History, banned: Iterable[int] = ()) -> Floats:
    """Logits after bias, bans and penalties: the same array if there are none, else a copy."""
    ban = list(banned)
    penalties = needs_history(sampling)
    if not (ban or penalties or sampling.logit_bias):
        return logits
    row = logits.copy()
    for token, bias in sampling.logit_bias:
        row[token] += bias
    if penalties:
        ids, counts = history.ids, history.counts
        values = row[ids]
        if sampling.repeat_penalty != 1.0:
            rate = np.float32(sampling.repeat_penalty)
            values = np.where(values > 0, values / rate, values * rate)
        values -= counts * np.float32(sampling.frequency_penalty)
        values -= (counts > 0) * np.float32(sampling.presence_penalty)
        row[ids] = values
    row[ban] = -np.inf
    return row


def choose(row: Floats, sampling: Sampling, index: int, stream: int = DRAW_STREAM) -> int:
    """The token at this index, from adjusted logits. Raises BadLogits."""
    best = int(row.argmax())
    peak = float(row[best])
    if not math.isfinite(peak):
        raise BadLogits("the largest logit is not a finite number")
    if sampling.temperature == 0.0:
        return best
    ids = _filtered(row, peak, sampling)
    u = draw_unit(sampling.seed, stream, index)
    if ids is None:
        return _draw_from_all(row, peak, sampling.temperature, u)
    values = row[ids].astype(np.float64)
    weights = np.exp((values - peak) / max(sampling.temperature, 1e-6))
    return int(ids[_place(weights.cumsum(), u)])


def choose_constrained(row: Floats, sampling: Sampling, index: int, grammar: Constraint) -> int | None:
    """As `choose`, among the tokens that the grammar admits. None if it admits none at all.

    Most tokens of a well-behaved model fit, so the unconstrained choice is tested first; only if it is
    forbidden, a second, independent draw is made from what is admitted. Together that is exactly the
    distribution of a draw from the admitted tokens (p + (1 - A) p / A = p / A for admitted mass A).
    """
    first = choose(row, sampling, index)
    if grammar.admits(first):
        return first
    masked = np.full_like(row, -np.inf)
    leading = _largest(row, min(_GRAMMAR_FIRST, len(row)))
    admitted = leading[grammar.admitted(leading.astype(np.int32))]
    if admitted.size == 0 or not _outweighs(row, leading, admitted, sampling.temperature):
        everything = np.flatnonzero(row > -np.inf)
        admitted = everything[grammar.admitted(everything.astype(np.int32))]
    if admitted.size == 0:
        return None
    masked[admitted] = row[admitted]
    return choose(masked, sampling, index, REDRAW_STREAM)


def log_probabilities(logits: Floats, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural logarithms of the model's own probabilities (before any filter): the token's, and the
    `top` most probable ones, best first.
    """
    peak = np.float32(logits.max())
    total = float(peak) + math.log(float(np.exp(logits - peak).sum(dtype=np.float64)))
    best = [(int(i), float(logits[i]) - total) for i in _sorted(logits, _largest(logits, top))] if top else []
    return float(logits[token]) - total, best


def _sorted(row: Floats, ids: Ids) -> Ids:
    """`ids` (ascending) by falling logit; equal ones by id."""
    return ids[np.argsort(-row[ids], kind="stable")]


def _largest(row: Floats, count: int) -> Ids:
    """Ids of the `count` largest values, ascending; of equal values the lower ids."""
    n = len(row)
    if count >= n:
        return np.arange(n)
    blocks = n // _BLOCK
    if count < blocks:
        # The count-th largest of the blocks' maxima is a lower bound of the count-th largest value,
        # and not far below it: what passes it is few enough to sort.
        maxima = row[: blocks * _BLOCK].reshape(_BLOCK, blocks).max(axis=0)
        bound = np.partition(maxima, blocks - count)[blocks - count]
        ids = np.flatnonzero(row >= bound)
    else:
        bound = np.partition(row, n - count)[n - count]
        ids = np.flatnonzero(row >= bound)
    return np.sort(_sorted(row, ids)[:count])


def _filtered(row: Floats, peak: float, sampling: Sampling) -> Ids | None:
    """Ids that pass top_k, top_p and min_p, ascending; None if all do."""
    ids: Ids | None = None
    if 0 < sampling.top_k < len(row):
        ids = _largest(row, sampling.top_k)
    if sampling.top_p < 1.0:
        ids = _nucleus(row, peak, sampling.top_p, ids)
    if sampling.min_p > 0.0:
        bound = peak + math.log(sampling.min_p)
        ids = np.flatnonzero(row >= bound) if ids is None else ids[row[ids] >= bound]
    return ids


def _nucleus(row: Floats, peak: float, top_p: float, ids: Ids | None) -> Ids:
    """The fewest most probable tokens (of `ids`) whose probabilities reach `top_p`, ascending."""
    values = row if ids is None else row[ids]
    weights = np.exp(values - np.float32(peak))
    goal = top_p * float(weights.sum(dtype=np.float64))
    bound = 1e-3
    while True:
        # All weights above a bound are the most probable ones: sort those alone if they suffice.
        chosen = np.flatnonzero(weights >= bound)
        if bound == 0.0 or float(weights[chosen].sum(dtype=np.float64)) >= goal:
            break
        bound = bound * 1e-2 if bound > 1e-8 else 0.0
    order = chosen[np.argsort(-weights[chosen], kind="stable")]
    count = int(np.searchsorted(weights[order].cumsum(dtype=np.float64), goal, side="left")) + 1
    kept = np.sort(order[:count])
    return kept if ids is None else ids[kept]


def _draw_from_all(row: Floats, peak: float, temperature: float, u: float) -> int:
    weights = row - np.float32(peak)
    weights *= np.float32(1.0 / max(temperature, 1e-6))
    np.exp(weights, out=weights)
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK)).astype(np.float64).cumsum()
    block = _place(sums, u)
    before = float(sums[block - 1]) if block else 0.0
    start = block * _BLOCK
    inside = weights[start : start + _BLOCK].astype(np.float64).cumsum()
    goal = u * float(sums[-1]) - before
    place = int(np.searchsorted(inside, goal, side="right"))
    # The block's sum was rounded differently from its running sum: its last possible token takes the rest.
    return start + min(place, int(np.flatnonzero(weights[start : start + _BLOCK])[-1]))


def _place(running: NDArray[np.float64], u: float) -> int:
    """Index that the draw u in [0, 1) hits, given running sums of weights."""
    place = int(np.searchsorted(running, u * float(running[-1]), side="right"))
    return min(place, int(np.searchsorted(running, float(running[-1]), side="left")))


def _outweighs(row: Floats, leading: Ids, admitted: Ids, temperature: float) -> bool:
    """Whether the admitted among the leading tokens make those behind them negligible (below 1 in 10,000)."""
    if len(leading) == len(row):
        return True
    if temperature == 0.0:
        return True
    peak = row[admitted].max()
    floor = row[leading].min()
    scale = max(temperature, 1.0)  # filters see the untempered values, the draw the tempered ones
    return float(np.exp((floor - peak) / scale)) * (len(row) - len(leading)) < 1e-4
