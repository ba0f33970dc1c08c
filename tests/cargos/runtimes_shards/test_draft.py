"""Drafts: what is proposed is what followed before, and as many as pay."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from cargos.runtimes.shards.draft import MAX_DRAFT, MAX_GRAM, Drafter, DraftPolicy, RowCosts, Speculation
from protocol.dice import Dice

MS = 1_000_000
SEEDS = range(20)


def slow_place(tokens: list[int]) -> int:
    """Where the longest run of last tokens was seen last: the definition, by looking everywhere."""
    known = len(tokens)
    for n in range(MAX_GRAM, 0, -1):
        for end in range(known - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[known - n :]:
                return end
    return 0


def slow_propose(tokens: list[int], limit: int) -> list[int]:
    if not (at := slow_place(tokens)):
        return []
    copied = list(tokens)
    for i in range(limit):
        copied.append(copied[at + i])
    return copied[len(tokens) :]


@pytest.mark.parametrize("seed", SEEDS)
def test_it_proposes_what_looking_everywhere_finds(seed: int) -> None:
    dice = Dice(seed)
    alphabet = (2, 5, 40, 4000)[seed % 4]
    tokens: list[int] = []
    drafter = Drafter()
    for _ in range(300):
        if tokens and dice.below(4) == 0:
            start = dice.below(len(tokens))  # text quotes itself
            new = tokens[start : start + 1 + dice.below(12)]
        else:
            new = [dice.below(alphabet) for _ in range(1 + dice.below(3))]
        if tokens and dice.below(5) == 0:
            length = dice.below(len(tokens) + 1) if dice.below(10) == 0 else max(0, len(tokens) - dice.below(9))
            del tokens[length:]
            drafter.truncate(length)
        tokens += new
        drafter.extend(new)
        limit = dice.below(20)
        proposed = drafter.propose(limit)
        assert len(drafter) == len(tokens)
        assert len(proposed) <= limit
        assert proposed == slow_propose(tokens, limit)
    again = Drafter(tokens)
    assert (again.propose(9), again.match()) == (
        drafter.propose(9),
        drafter.match(),
    )  # a function of the tokens, not of how they came


def test_nothing_is_proposed_for_what_was_never_seen() -> None:
    drafter = Drafter()
    assert drafter.propose(5) == []
    assert drafter.match() is None
    drafter.extend([1])
    assert drafter.propose(5) == []
    drafter.extend([2, 3])
    assert drafter.propose(5) == []
    drafter.extend([1])
    assert drafter.propose(0) == []
    assert drafter.propose(5) == [2, 3, 1, 2, 3]
    assert drafter.match() == 1


def test_longer_agreement_wins_over_later() -> None:
    # "1 2 3 4" came once before, with 9 after it; "4" came later, with 7 after it.
    drafter = Drafter([1, 2, 3, 4, 9, 4, 7, 1, 2, 3, 4])
    assert drafter.propose(1) == [9]
    assert drafter.match() == 4


def test_repeating_text_is_drafted_in_its_period_and_agreement_counted_up_to_its_limit() -> None:
    drafter = Drafter([1, 2, 3] * 20)
    assert drafter.propose(7) == [1, 2, 3, 1, 2, 3, 1]
    assert drafter.match() == 16


def test_impossible_lengths_are_refused() -> None:
    drafter = Drafter([1, 2])
    for length in (-1, 3):
        with pytest.raises(ValueError, match="2 tokens"):
            drafter.truncate(length)
    with pytest.raises(ValueError, match="3 of 2"):
        DraftPolicy().note(2, 3)


def test_ten_thousand_tokens_cost_no_more_each_than_few() -> None:
    """Work, not time: chains are walked for eight steps at most, whatever stands in them."""
    drafter = Drafter([7] * 10_000)
    assert drafter.propose(16) == [7] * 16
    drafter.truncate(5_000)
    drafter.extend(range(1000, 6_000))
    assert drafter.propose(4) == []


# --- how many ----------------------------------------------------------------------------------------


def best_length(chance: float, trip: int, row: int) -> tuple[int, Callable[[int], float]]:
    """By the formula, the chance being the same at each depth."""

    def rate(drafts: int) -> float:
        return sum(chance**i for i in range(drafts + 1)) / (trip + drafts * row)

    return max(range(MAX_DRAFT + 1), key=rate), rate


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.8, 0.95])
@pytest.mark.parametrize(("trip", "row"), [(100 * MS, 1 * MS), (100 * MS, 20 * MS), (12 * MS, 9 * MS)])
def test_it_finds_the_length_that_pays_best(chance: float, trip: int, row: int) -> None:
    """Expected speed at the lengths chosen is near that of the best fixed length."""
    dice, policy = Dice(1), DraftPolicy()
    best, rate = best_length(chance, trip, row)
    tokens = time = 0
    for step in range(1200):
        drafts = policy.length(trip, row)
        right = 0
        while right < drafts and dice.unit() < chance:
            right += 1
        policy.note(drafts, right)
        if step >= 200:
            tokens += right + 1
            time += trip + drafts * row
    assert tokens / time >= 0.9 * rate(best)


def test_no_drafts_where_none_can_pay() -> None:
    """Rows cost as much as traversals: stages on one machine."""
    policy = DraftPolicy()
    for _ in range(500):
        assert policy.length(10 * MS, 10 * MS) == 0
        policy.note(1, 1)
    assert policy.length(0, 1) == 0


def test_it_draws_back_when_drafts_fail_and_comes_again_when_they_would_not() -> None:
    trip, row = 50 * MS, 5 * MS
    policy = DraftPolicy()
    for _ in range(50):
        policy.note(policy.length(trip, row), policy.length(trip, row))
    assert policy.length(trip, row) == MAX_DRAFT
    failing: list[int] = []
    for _ in range(130):
        failing.append(policy.length(trip, row))
        policy.note(failing[-1], 0)
    assert failing[-1] <= 1
    assert sum(failing[60:]) <= 4
    lengths: list[int] = []
    for _ in range(400):
        lengths.append(policy.length(trip, row))
        policy.note(lengths[-1], lengths[-1])
    assert lengths[-1] == MAX_DRAFT


def test_a_longer_agreement_is_trusted_apart_from_a_short_one() -> None:
    trip, row = 30 * MS, 8 * MS
    policy = DraftPolicy()
    for _ in range(100):
        policy.note(1, 0, match=1)
        policy.note(8, 8, match=8)
    assert policy.length(trip, row, match=1) == 0
    assert policy.length(trip, row, match=8) >= 8


# --- both --------------------------------------------------------------------------------------------


def run(text: list[int], prompt: int, trip: int, row: int) -> tuple[int, int]:
    """A ring that says `text`, whatever is drafted. Traversals and rows until it is said."""
    speculation = Speculation()
    speculation.extend(text[: prompt + 1])
    at, trips, rows = prompt + 1, 0, 0
    while at < len(text):
        room = len(text) - at - 1
        drafts = speculation.draft(trip, row, room)
        assert len(drafts) <= max(0, room)
        right = 0
        while right < len(drafts) and drafts[right] == text[at + right]:
            right += 1
        speculation.verified(text[at : at + right + 1])
        at += right + 1
        trips, rows = trips + 1, rows + 1 + len(drafts)
    return trips, rows


def test_copied_text_takes_few_traversals() -> None:
    dice = Dice(3)
    passage = [dice.below(4000) for _ in range(200)]
    trips, _ = run([*passage, 1, 2, *passage], len(passage) + 4, 100 * MS, 2 * MS)
    assert trips <= 196 / 7


def test_text_that_does_not_repeat_costs_few_rows_in_vain() -> None:
    dice = Dice(4)
    text = [dice.below(60) for _ in range(1500)]  # pairs repeat, continuations are chance
    trips, rows = run(text, 100, 100 * MS, 20 * MS)
    assert trips > 1300
    assert rows < 1.2 * trips


def test_it_learns_without_drafting() -> None:
    """On loopback nothing is sent; when the ring grows long, drafts are at once as many as pay."""
    text = [1, 2, 3, 4, 5, 6, 7] * 30
    speculation = Speculation()
    speculation.extend(text[:20])
    for token in text[20:]:
        assert speculation.draft(10 * MS, 10 * MS, 99) == []
        speculation.verified([token])
    assert len(speculation.draft(200 * MS, 2 * MS, 99)) >= 8


def test_the_same_history_drafts_the_same() -> None:
    dice = Dice(5)
    text = [dice.below(6) for _ in range(600)]
    assert run(text, 10, 50 * MS, 5 * MS) == run(text, 10, 50 * MS, 5 * MS)


class Oracle:
    """A model that drafts: right `chance` of the time, and each draft takes it `cost_ns`."""

    def __init__(self, text: list[int], chance: float, cost_ns: int) -> None:
        self._text, self._chance, self._cost_ns = text, chance, cost_ns
        self._dice, self._at, self.made = Dice(9), 0, 0

    @property
    def cost_ns(self) -> int:
        return self._cost_ns

    def match(self) -> int | None:
        return 0

    def extend(self, tokens: Iterable[int]) -> None:
        self._at += len(tuple(tokens))

    def truncate(self, length: int) -> None:
        self._at = length

    def propose(self, limit: int) -> list[int]:
        self.made += limit
        coming = self._text[self._at : self._at + limit]
        return [token if self._dice.unit() < self._chance else -1 for token in coming]


@pytest.mark.parametrize(
    ("chance", "cost", "least", "most"), [(0.9, 5, 4, 16), (0.9, 95, 0, 0.1), (0.02, 5, 0, 0.3)]
)
def test_a_model_drafts_where_lookup_can_not_and_its_time_is_paid_back(
    chance: float, cost: int, least: float, most: float
) -> None:
    """Drafts a traversal: many of a good and quick one, hardly any of a slow or bad one."""
    dice = Dice(8)
    text = [dice.below(30_000) for _ in range(900)]
    oracle = Oracle(text, chance, cost * MS)
    speculation = Speculation(oracle)
    speculation.extend(text[:10])
    at, trips = 10, 0
    while at < len(text) - 20:
        drafts = speculation.draft(100 * MS, 2 * MS, 16)
        right = 0
        while right < len(drafts) and drafts[right] == text[at + right]:
            right += 1
        speculation.verified(text[at : at + right + 1])
        at, trips = at + right + 1, trips + 1
    assert least <= oracle.made / trips <= most


def test_lookup_is_preferred_where_it_knows() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8] * 60
    oracle = Oracle(text, 0.9, 30 * MS)
    speculation = Speculation(oracle)
    speculation.extend(text[:40])
    at = 40
    while at < len(text) - 20:
        drafts = speculation.draft(100 * MS, 2 * MS, 16)
        assert drafts == text[at : at + len(drafts)] or -1 in drafts
        right = next((i for i, token in enumerate(drafts) if token != text[at + i]), len(drafts))
        speculation.verified(text[at : at + right + 1])
        at += right + 1
    assert oracle.made <= 16


def test_what_rows_cost_is_learnt_by_their_number() -> None:
    costs = RowCosts()
    assert costs.times(3 * MS) == [3 * MS * n for n in range(1, MAX_DRAFT + 1)]  # nothing seen: the estimate
    for _ in range(40):
        costs.note(1, 25 * MS)
        costs.note(4, 31 * MS)
    times = costs.times(3 * MS)
    assert times[0] == pytest.approx(25 * MS, rel=0.1)
    assert times[3] == pytest.approx(31 * MS, rel=0.1)
    assert times == sorted(times)
    assert times[-1] - times[3] == pytest.approx(
        (MAX_DRAFT - 4) * 3 * MS, rel=0.01
    )  # beyond, the estimate again
    for bad in (0, MAX_DRAFT + 1):
        with pytest.raises(ValueError, match="drafts"):
            costs.note(bad, 1)
    trembling = RowCosts()
    for turn in range(400):
        trembling.note(1, (10 + (60 if turn % 2 else -60)) * MS)
    assert trembling.times(10 * MS)[0] == pytest.approx(10 * MS, rel=0.4)  # not the 35 of the slow ones alone
    for _ in range(100):
        trembling.note(1, -50 * MS)
    assert min(trembling.times(0)) == 0


def test_a_first_draft_that_costs_more_than_it_brings_is_not_sent_though_rows_are_said_to_be_cheap() -> None:
    policy, costs = DraftPolicy(), RowCosts()
    sent = 0
    for _ in range(400):
        length = policy.length(30 * MS, costs.times(2 * MS))
        if length:
            sent += 1
            costs.note(length, 40 * MS)
            policy.note(length, 1)
    assert sent < 40


def test_where_a_model_does_not_pay_it_is_not_asked_and_bad_luck_is_not_for_ever() -> None:
    text = list(range(5000))
    for trip, most in ((30 * MS, 0), (300 * MS, 1 << 30)):
        oracle = Oracle(text, 0.9, 20 * MS)
        speculation = Speculation(oracle)
        for _ in range(6):  # nothing it says is right at first
            speculation.draft(trip, 2 * MS, 16)
            speculation.verified([-7])
        asked = oracle.made if trip > 100 * MS else 0
        oracle.truncate(0)
        at = 0
        while at < 3000:
            drafts = speculation.draft(trip, 2 * MS, 16)
            right = next((i for i, token in enumerate(drafts) if token != text[at + i]), len(drafts))
            speculation.verified(text[at : at + right + 1])
            at += right + 1
        assert oracle.made <= most
        assert trip < 100 * MS or oracle.made > asked + 1000
