"""Who gets into the next batch, and where a new sequence goes: the engine's policy, without the engine.

Pure: values in, values out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

#: Prompt tokens in one step. With others decoding, the step should stretch their time between tokens
#: little; alone, it must still end soon enough for a cancel. Not below 16: short products waste the machine.
_MIXED_STEP_S: Final = 0.1
_ALONE_STEP_S: Final = 0.5
_MIN_CHUNK: Final = 16

#: A prefix shorter than this is not worth copying a sequence's memory for: the copy (all of a slot) takes as
#: long as some 2 to 15 prompt tokens. What the chosen slot itself holds is free at any length.
_MIN_SHARED: Final = 8


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence that has a slot. `pending`: its tokens that are not in the memory yet. `prompting`: it
    is still working off its prompt (or the tokens it resumes from). `granted`: it may make its next token.
    """

    key: int
    pending: int
    prompting: bool
    granted: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """`shares`: (key, tokens of it) in batch order; who has all pending tokens in it makes a token."""

    shares: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.shares)


def prompt_budget(prefill_tps: float, *, decoding: int, max_chunk: int) -> int:
    """Prompt tokens for the next step, given the measured prompt speed (0.0: unknown)."""
    wanted = prefill_tps * (_MIXED_STEP_S if decoding else _ALONE_STEP_S)
    return max(_MIN_CHUNK, min(max_chunk, int(wanted))) if prefill_tps > 0 else min(max_chunk, 4 * _MIN_CHUNK)


def plan(candidates: Sequence[Candidate], *, n_batch: int, prefill_tps: float) -> Plan:
    """The next mixed batch: one token of each that decodes, then prompts in order of arrival.

    `candidates` in order of arrival. What is not granted waits; the last token of a prompt waits too then, as
    its logits would be lost by the time they may be used.
    """
    shares: list[tuple[int, int]] = [(c.key, 1) for c in candidates if not c.prompting and c.granted][:n_batch]
    room = n_batch - len(shares)
    budget = min(room, prompt_budget(prefill_tps, decoding=len(shares), max_chunk=n_batch))
    for c in candidates:
        if not c.prompting or budget <= 0:
            continue
        count = min(c.pending if c.granted else c.pending - 1, budget)
        if count > 0:
            shares.append((c.key, count))
            budget -= count
    return Plan(tuple(shares))


@dataclass(frozen=True, slots=True)
class SlotView:
    """A place in the memory. `tokens`: what it holds. `busy`: a sequence is using it (it may still lend its
    prefix). `used`: a counter that grows with each use.
    """

    tokens: Sequence[int]
    busy: bool
    used: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Put the sequence into `slot`; the first `shared` tokens are there already (`donor` == slot) or are
    copied from `donor`'s slot; with `shared` 0 there is no donor.
    """

    slot: int
    donor: int
    shared: int


def place(slots: Sequence[SlotView], tokens: Sequence[int]) -> Placement | None:
    """A free slot for these tokens, and the longest prefix in memory to start from. None if all are busy.

    The last token is never taken from memory: its logits are needed. An idle donor that the newcomer mostly
    continues (the next turn of a conversation) is taken over. Otherwise a slot beside the busy ones is (see
    `gap`), an empty one first, then the one unused for longest.
    """
    free = [i for i, slot in enumerate(slots) if not slot.busy]
    if not free:
        return None
    limit = len(tokens) - 1
    lengths = [min(common_prefix(slot.tokens, tokens), limit) for slot in slots]
    donor = max(range(len(slots)), key=lambda i: (lengths[i], not slots[i].busy, slots[i].used))
    shared = lengths[donor]
    if shared < _MIN_SHARED:
        donor, shared = -1, 0
    elif not slots[donor].busy and 2 * shared > len(slots[donor].tokens):
        return Placement(donor, donor, shared)
    busy = [i for i, slot in enumerate(slots) if slot.busy]
    beside = range(min(busy) - 1, max(busy) + 2) if busy else range(len(slots))
    slot = min(free, key=lambda i: (i not in beside, len(slots[i].tokens) > 0, i == donor, slots[i].used))
    if shared == 0 and lengths[slot] > 0:
        donor, shared = slot, lengths[slot]
    return Placement(slot, donor, shared)


def gap(busy: Sequence[bool]) -> tuple[int, int] | None:
    """A move (from, to) that brings the busy slots closer together; None if they are neighbours already.

    The memory of one slot is apart from the next one's, and the library computes only neighbouring slots
    together: with a gap, the weights would be read once more at each step.
    """
    places = [i for i, is_busy in enumerate(busy) if is_busy]
    if not places or places[-1] - places[0] + 1 == len(places):
        return None
    return places[-1], next(i for i in range(places[0], places[-1]) if not busy[i])


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading elements that are equal (halving search: whole slices are compared)."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
