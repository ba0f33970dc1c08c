"""Drafts: tokens that are likely next, so that one traversal of the ring may verify several.

A ring of distant stages spends its time on the way, not in the layers: the rows of some guesses travel and are
computed almost for free. The head samples each row as it would have without them and keeps what agrees, so
what comes out is the same; only how often the ring is gone round changes.

`Drafter` guesses by looking up what followed the last few tokens the last time (prompt lookup): no model, a
few microseconds. `DraftPolicy` says how many guesses are worth their rows. `Speculation` is both, for a head:

    speculation = Speculation()
    speculation.extend(prompt)
    drafts = speculation.draft(trip_ns, row_ns, room)     # fed behind the token that is known
    speculation.verified(tokens)                          # those that were kept and the one after them
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Protocol, TypeAlias

#: Tokens that must have been the same before, to take what followed: the longest of 4, 3, 2, 1. Longer ones
#: hardly find a better place; how far the agreement goes back (up to MAX_MATCH) says how sure the guess is.
MAX_GRAM: Final = 4

#: Agreement with the place that is copied from is counted up to here; behind it nothing changes.
MAX_MATCH: Final = 16

#: Most drafts at once. Beyond it even text that is copied word for word gains little, and the rows of a refused
#: draft delay everyone in the ring.
MAX_DRAFT: Final = 16

#: How many places that only share a hash are passed over. With tables half full at most, more than eight hardly
#: happen by accident; who picks tokens for it gets no drafts.
_MAX_STEPS: Final = 8

_SMALLEST_TABLE: Final = 256

#: Of what was seen before, how much counts after one more observation: about the last twenty matter.
_KEEP: Final = 0.95

#: A depth that was never tried is as good as the one before it; this many observations weigh as much as that.
_TRUST: Final = 2.0

#: The chance of a first guess before anything was seen. Repetition in prompts makes it about right for lookups.
_FIRST: Final = 0.5

#: So many answers "none" in a row, then one draft is tried: text changes. Costs a row in 64 steps.
_PROBE_AFTER: Final = 64

#: Where drafts cost work before they are sent, none is tried on the off-chance: what was seen of earlier ones
#: fades with each step without instead, by half in 70, so that bad luck is not for ever.
_FADE: Final = 0.99

#: And they must promise so much more speed than none: the work is certain, what it brings is an estimate.
_MARGIN: Final = 1.2


class _Grams:
    """Where each run of `n` tokens ended, latest first. Chained hashing in flat arrays, 12 to 20 bytes a token
    (a dict of tuples takes ten times that), and each entry can be taken back.
    """

    __slots__ = ("_before", "_n", "_table", "_tokens")

    def __init__(self, tokens: array[int], n: int) -> None:
        self._tokens = tokens
        self._n = n
        self._table = array("i", bytes(4 * _SMALLEST_TABLE))
        #: By end: the end that had its place in the table before; 0: none.
        self._before = array("i", [0])

    def note(self, end: int) -> None:
        """The run that ends before `end`; each end in order."""
        if end > len(self._table) // 2:
            self._grow(end)
        if end < self._n:
            self._before.append(0)
            return
        slot = self._slot(end)
        self._before.append(self._table[slot])
        self._table[slot] = end

    def forget(self) -> None:
        """Take back the last `note`; its tokens must still be there."""
        end = len(self._before) - 1
        if end >= self._n:
            self._table[self._slot(end)] = self._before[end]
        self._before.pop()

    def earlier(self) -> int:
        """The latest end before the last of the same run, or 0."""
        end = len(self._before) - 1
        if end < self._n:
            return 0
        wanted = self._tokens[end - self._n : end]
        for _ in range(_MAX_STEPS):
            end = self._before[end]
            if not end or self._tokens[end - self._n : end] == wanted:
                return end
        return 0

    def _slot(self, end: int) -> int:
        # Tuples of ints hash the same in each process, unlike text.
        return hash(tuple(self._tokens[end - self._n : end])) & (len(self._table) - 1)

    def _grow(self, end: int) -> None:
        self._table = array("i", bytes(4 * 4 * len(self._table)))
        self._before = array("i", [0])
        for past in range(1, end):
            self.note(past)


class Drafter:
    """Prompt lookup over the tokens of one session. A few microseconds a token, whatever its length.

    The place that is copied from is where the longest run of last tokens (up to MAX_GRAM) was seen last. If the
    copy reaches the end of what is known, it goes on with itself: text that repeats is drafted in its period.
    """

    __slots__ = ("_grams", "_tokens")

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens = array("i")
        self._grams = tuple(_Grams(self._tokens, n) for n in range(MAX_GRAM, 0, -1))
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """These came next."""
        for token in tokens:
            self._tokens.append(token)
            for grams in self._grams:
                grams.note(len(self._tokens))

    def truncate(self, length: int) -> None:
        """Only the first `length` tokens hold. Raises ValueError if there are fewer."""
        if not 0 <= length <= len(self._tokens):
            raise ValueError(f"there are {len(self._tokens)} tokens, not {length}")
        while len(self._tokens) > length:
            for grams in self._grams:
                grams.forget()
            self._tokens.pop()

    @property
    def cost_ns(self) -> int:
        return 0

    def match(self) -> int | None:
        """How many tokens before agree with the place that would be copied from, up to MAX_MATCH. None: there
        is no such place.
        """
        at, known, match = self._place(), len(self._tokens), 0
        while match < min(MAX_MATCH, at) and self._tokens[at - 1 - match] == self._tokens[known - 1 - match]:
            match += 1
        return match or None

    def propose(self, limit: int) -> list[int]:
        """What probably comes next: `limit` tokens, or none. A function of the tokens so far alone."""
        at = self._place()
        if not at:
            return []
        period = len(self._tokens) - at
        return [self._tokens[at + i % period] for i in range(max(0, limit))]

    def _place(self) -> int:
        """Where the copy begins; 0: nowhere."""
        return next(filter(None, (grams.earlier() for grams in self._grams)), 0)


#: What drafts take of the ring, ns: for each of them, or for 1, 2, ... MAX_DRAFT of them together.
RowTimes: TypeAlias = int | Sequence[int]


def _times(row_ns: RowTimes) -> Sequence[int]:
    return [n * row_ns for n in range(1, MAX_DRAFT + 1)] if isinstance(row_ns, int) else row_ns


class RowCosts:
    """What 1, 2, ... rows behind a token take of a traversal, as it was measured. For all sessions of a head.

    It is no straight line: with the second row other kernels may come in, which cost as much as ten rows more.
    What was not measured is the cost of one row less, and an estimate for the row.
    """

    __slots__ = ("_seen", "_sums")

    def __init__(self) -> None:
        self._sums = [0.0] * MAX_DRAFT
        self._seen = [0.0] * MAX_DRAFT

    def note(self, drafts: int, took_ns: int) -> None:
        """A traversal with so many drafts took so much longer than one without usually does. Negative where it
        was quicker: on a busy machine times tremble more than they differ, and only their mean says something.
        Raises ValueError if there can not be so many.
        """
        if not 1 <= drafts <= MAX_DRAFT:
            raise ValueError(f"{drafts} drafts")
        self._sums[drafts - 1] = self._sums[drafts - 1] * _KEEP + took_ns
        self._seen[drafts - 1] = self._seen[drafts - 1] * _KEEP + 1

    def times(self, row_ns: int) -> list[int]:
        """For 1, 2, ... MAX_DRAFT drafts. `row_ns`: the estimate for a row."""
        found: list[int] = []
        rows_ns = 0.0
        for summed, seen in zip(self._sums, self._seen, strict=True):
            rows_ns = max(rows_ns, (summed + _TRUST * (rows_ns + row_ns)) / (seen + _TRUST))
            found.append(round(rows_ns))
        return found


class DraftPolicy:
    """How many drafts to send, from what became of earlier ones and from what they cost.

    The chance of a draft depends on its depth: how many tokens before it agree with where it comes from, those
    of the draft before it included (a model that drafts starts at 0 each time). Of each depth the recent share
    of hits is kept. With chances a, b, c, ... a traversal with k drafts is expected to bring
    1 + a + ab + abc + ... tokens (k products) in trip + k row; the k with most tokens a second is chosen.
    """

    __slots__ = ("_hits", "_probes", "_seen", "_silent")

    def __init__(self, *, probes: bool = True) -> None:
        """`probes`: now and then a draft is tried where none seems to pay."""
        depths = MAX_MATCH + MAX_DRAFT
        self._hits = [0.0] * depths
        self._seen = [0.0] * depths
        self._probes = probes
        self._silent = 0

    def length(self, trip_ns: int, row_ns: RowTimes, *, match: int = 0) -> int:
        """How many drafts to send, 0 to MAX_DRAFT.

        `trip_ns`: one traversal with one row, computing included; 0: unknown, no drafts. `row_ns`: what one
        row more takes of the whole ring, times the sessions that share it (they all wait for it); or what
        1, 2, ... MAX_DRAFT rows take together.
        """
        length, rate = self.weigh(trip_ns, row_ns, match=match)
        if not self._probes and rate * trip_ns < _MARGIN:
            length = 0
        self._silent = 0 if length else self._silent + 1
        if self._silent and not self._probes:
            for table in (self._hits, self._seen):
                table[:] = [count * _FADE for count in table]
        elif self._silent > _PROBE_AFTER and 0 <= _times(row_ns)[0] < trip_ns:  # else not even a sure one pays
            self._silent = 0
            return 1
        return length

    def weigh(self, trip_ns: int, row_ns: RowTimes, *, match: int = 0) -> tuple[int, float]:
        """(the length that pays best, the tokens that it is expected to bring per nanosecond)."""
        if trip_ns <= 0:
            return 0, 0.0
        best, best_rate = 0, 1 / trip_ns
        expected = reached = 1.0
        for drafts, (chance, rows_ns) in enumerate(
            zip(self._chances(match), _times(row_ns), strict=True), start=1
        ):
            reached *= chance
            expected += reached
            rate = expected / (trip_ns + max(0, rows_ns))
            if rate > best_rate:
                best, best_rate = drafts, rate
        return best, best_rate

    def note(self, drafted: int, accepted: int, *, match: int = 0) -> None:
        """Of `drafted` drafts the first `accepted` were right. Raises ValueError if that can not be."""
        if not 0 <= accepted <= drafted <= MAX_DRAFT:
            raise ValueError(f"{accepted} of {drafted} drafts")
        for i in range(min(drafted, accepted + 1)):
            depth = min(match, MAX_MATCH) + i
            self._hits[depth] = self._hits[depth] * _KEEP + (i < accepted)
            self._seen[depth] = self._seen[depth] * _KEEP + 1

    def _chances(self, match: int) -> Iterator[float]:
        """Of the first draft, the second if the first was right, and so on."""
        chance = _FIRST
        start = min(match, MAX_MATCH)
        for depth in range(start + MAX_DRAFT):
            chance = (self._hits[depth] + _TRUST * chance) / (self._seen[depth] + _TRUST)
            if depth >= start:
                yield chance


class Proposer(Protocol):
    """Whatever drafts."""

    @property
    def cost_ns(self) -> int:
        """What it takes to make one draft."""
        ...

    def match(self) -> int | None:
        """The depth at which its drafts begin; None: it has none now."""
        ...

    def extend(self, tokens: Iterable[int]) -> None:
        """These came next."""
        ...

    def truncate(self, length: int) -> None:
        """Only the first `length` tokens hold."""
        ...

    def propose(self, limit: int) -> list[int]:
        """Up to `limit` drafts."""
        ...


class _Way:
    """A proposer and what became of its drafts."""

    __slots__ = ("guess", "match", "policy", "proposer")

    def __init__(self, proposer: Proposer) -> None:
        self.proposer = proposer
        self.policy = DraftPolicy(probes=not proposer.cost_ns)
        self.match = 0
        self.guess: Sequence[int] = ()

    def verified(self, tokens: Sequence[int]) -> None:
        checked = min(len(self.guess), len(tokens))
        right = 0
        while right < checked and self.guess[right] == tokens[right]:
            right += 1
        if checked:
            self.policy.note(checked, right, match=self.match)
        self.guess = ()


class Speculation:
    """Drafts for one session: by prompt lookup, or by another proposer where that one pays better."""

    __slots__ = ("_ways",)

    def __init__(self, *others: Proposer) -> None:
        self._ways = tuple(_Way(proposer) for proposer in (Drafter(), *others))

    def extend(self, tokens: Sequence[int]) -> None:
        """The prompt, or tokens of before. Nothing is learnt from them."""
        for way in self._ways:
            way.guess = ()
            way.proposer.extend(tokens)

    def truncate(self, length: int) -> None:
        """Only the first `length` tokens hold."""
        for way in self._ways:
            way.guess = ()
            way.proposer.truncate(length)

    def draft(self, trip_ns: int, row_ns: RowTimes, room: int, *, sharing: int = 1) -> list[int]:
        """What to send behind the last token: at most `room` drafts. Times as for `DraftPolicy.length`, but of
        a session alone; `sharing`: how many there are, which wait for each other's rows and drafts.
        """
        room = max(0, min(room, MAX_DRAFT))
        rows_ns = _times(row_ns)
        best: tuple[float, int, _Way] | None = None
        for way in self._ways:
            way.guess = ()
            match = way.proposer.match()
            if match is None or not room:
                continue
            way.match = match
            draft_ns = way.proposer.cost_ns
            cost_ns = [sharing * (row + n * draft_ns) for n, row in enumerate(rows_ns, start=1)]
            length = min(room, way.policy.length(trip_ns, cost_ns, match=match))
            if not way.proposer.cost_ns:
                # What costs nothing is made even if it is not sent, to see whether it would have been right.
                way.guess = way.proposer.propose(max(1, length))
            _, rate = way.policy.weigh(trip_ns, cost_ns, match=match)
            if length and (best is None or rate > best[0]):
                best = rate, length, way
        if best is None:
            return []
        _, length, way = best
        if way.proposer.cost_ns or not way.guess:
            way.guess = way.proposer.propose(length)
        return list(way.guess[:length])

    def verified(self, tokens: Sequence[int]) -> None:
        """These came of it: the drafts that were right and the token after them (or fewer at the end)."""
        for way in self._ways:
            way.verified(tokens)
        self.extend(tokens)
