"""Which rows get into a stage's next step, and in what groups the library computes them.

Pure: values in, values out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from cargos.runtimes.llama.schedule import prompt_budget

#: A feed of up to so many rows behind the prompt (a token and its drafts) is computed in one step or waits for
#: the next: its rows are of use only together.
MAX_TOGETHER: Final = 32


@dataclass(frozen=True, slots=True)
class Waiting:
    """Rows of one session that may be computed. `front`: as many of them were fed together. `prompting`: they
    are of the prompt. `since`: when the first of them came; who waits longest is first.
    """

    key: int
    rows: int
    front: int
    prompting: bool
    since: int


def choose(waiting: Sequence[Waiting], *, room: int, urgent: int, prefill_tps: float) -> list[tuple[int, int]]:
    """(key, rows) for the next step, at most `room` rows, of them at most `urgent` behind the prompts.

    Rows behind the prompts first: somebody waits for each of these tokens. Then prompts, in pieces that fit the
    measured speed, so that the stage behind this one can begin early and a newcomer does not wait long.
    """
    shares: list[tuple[int, int]] = []
    prompts: list[Waiting] = []
    for one in sorted(waiting, key=lambda w: w.since):
        together = min(one.rows, one.front)
        if one.prompting or together > MAX_TOGETHER:
            prompts.append(one)
        elif together <= min(room, urgent):
            shares.append((one.key, together))
            room -= together
            urgent -= together
    budget = min(room, prompt_budget(prefill_tps, decoding=len(shares), max_chunk=max(1, room)))
    for one in prompts:
        count = min(one.rows, budget)
        if count > 0:
            shares.append((one.key, count))
            budget -= count
    return shares


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are computed in one go: `each` rows of each of the sequences `first` to `first + count`."""

    first: int
    count: int
    each: int


def groups(shares: Iterable[tuple[int, int]]) -> list[Group]:
    """Cut (sequence, rows) into goes as the library would do it by itself: neighbouring sequences with the same
    number of rows. Doing it here keeps the order of the rows that come out known.
    """
    left = {sequence: rows for sequence, rows in sorted(shares) if rows > 0}
    made: list[Group] = []
    while left:
        first = next(iter(left))
        run = [first]
        while run[-1] + 1 in left:
            run.append(run[-1] + 1)
        each = min(left[sequence] for sequence in run)
        made.append(Group(first, len(run), each))
        for sequence in run:
            left[sequence] -= each
            if not left[sequence]:
                del left[sequence]
    return made
