"""Who gets into the next batch, and which slot a newcomer gets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cargos.runtimes.llama.schedule import (
    Candidate,
    Placement,
    SlotView,
    common_prefix,
    gap,
    place,
    plan,
    prompt_budget,
)


def decoding(key: int, *, granted: bool = True) -> Candidate:
    return Candidate(key, pending=1, prompting=False, granted=granted)


def prompting(key: int, pending: int, *, granted: bool = True) -> Candidate:
    return Candidate(key, pending=pending, prompting=True, granted=granted)


def test_every_decoding_sequence_gets_its_token_and_the_prompts_share_the_rest():
    todo = plan([prompting(1, 30), decoding(2), prompting(3, 500), decoding(4)], n_batch=63, prefill_tps=500.0)
    assert todo.shares == ((2, 1), (4, 1), (1, 30), (3, 20))  # 0.1 s of 500 tokens/s are 50


def test_prompts_alone_get_more_at_once():
    assert plan([prompting(1, 500)], n_batch=512, prefill_tps=500.0).shares == ((1, 250),)
    assert plan([prompting(1, 500)], n_batch=63, prefill_tps=500.0).shares == ((1, 63),)


def test_paused_sequences_wait_and_keep_the_end_of_their_prompt():
    assert plan([decoding(1, granted=False)], n_batch=63, prefill_tps=0.0).shares == ()
    assert plan([prompting(1, 10, granted=False)], n_batch=63, prefill_tps=0.0).shares == ((1, 9),)
    assert plan([Candidate(1, 1, True, False)], n_batch=63, prefill_tps=0.0).shares == ()


def test_slow_machines_still_make_progress():
    assert prompt_budget(0.5, decoding=3, max_chunk=63) == 16
    assert prompt_budget(0.0, decoding=0, max_chunk=63) == 63


candidates = st.lists(
    st.builds(lambda pending, granted: (pending, granted), st.integers(1, 300), st.booleans()),
    max_size=12,
)


@given(candidates, st.integers(12, 80), st.floats(0, 5000))
def test_a_plan_fits_the_batch_and_asks_for_nothing_that_is_not_there(
    rows: list[tuple[int, bool]], n_batch: int, tps: float
):
    cs = [Candidate(i, pending, pending > 1, granted) for i, (pending, granted) in enumerate(rows)]
    todo = plan(cs, n_batch=n_batch, prefill_tps=tps)
    assert todo.tokens <= n_batch
    assert len({key for key, _ in todo.shares}) == len(todo.shares)
    for key, count in todo.shares:
        assert 1 <= count <= cs[key].pending
        assert cs[key].granted or count < cs[key].pending
    for c in cs:
        if c.granted and not c.prompting:
            assert (c.key, 1) in todo.shares
    if any(c.granted for c in cs):
        assert todo.shares


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40))
def test_common_prefix(a: list[int], b: list[int]):
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


def slot(tokens: list[int], used: int, *, busy: bool = False) -> SlotView:
    return SlotView(tokens, busy=busy, used=used)


LONG = list(range(100))


def test_no_free_slot():
    assert place([slot([], 0, busy=True)], LONG) is None


def test_an_empty_slot_before_one_that_remembers_something():
    assert place([slot([7] * 30, 1), slot([], 5)], LONG) == Placement(1, -1, 0)


def test_the_next_turn_of_a_conversation_continues_in_its_slot():
    slots = [slot([], 0), slot(LONG[:60], 3)]
    assert place(slots, LONG) == Placement(1, 1, 60)


def test_a_common_beginning_is_copied_and_stays_for_others():
    slots = [slot(LONG[:20] + [500] * 80, 9), slot([], 0), slot([1] * 50, 2)]
    assert place(slots, LONG) == Placement(1, 0, 20)


def test_a_running_sequence_lends_its_prefix():
    slots = [slot(LONG[:50], 3, busy=True), slot([900] * 10, 1), slot([901] * 10, 2)]
    assert place(slots, LONG) == Placement(1, 0, 50)


def test_the_last_token_is_always_computed():
    assert place([slot(LONG, 1)], LONG) == Placement(0, 0, 99)
    assert place([slot(LONG + LONG, 1), slot([], 0)], LONG) == Placement(1, 0, 99)


def test_a_few_equal_tokens_are_not_worth_a_copy():
    assert place([slot(LONG[:5] + [900] * 9, 1), slot([], 0)], LONG) == Placement(1, -1, 0)


def test_what_the_chosen_slot_holds_is_free():
    assert place([slot(LONG[:5] + [900] * 9, 1)], LONG) == Placement(0, 0, 5)


def test_a_slot_beside_the_busy_ones_and_of_those_the_one_unused_for_longest():
    slots = [slot([1] * 9, 5), slot([3] * 9, 6, busy=True), slot([2] * 9, 2), slot([], 0)]
    assert place(slots, LONG) == Placement(2, -1, 0)
    assert place([slot([1] * 9, 5), slot([2] * 9, 2), slot([4] * 9, 3)], LONG) == Placement(1, -1, 0)


@given(st.lists(st.booleans(), max_size=12))
def test_closing_gaps_ends_with_all_busy_slots_beside_each_other(busy: list[bool]):
    count = sum(busy)
    for _ in range(len(busy)):
        move = gap(busy)
        if move is None:
            break
        source, target = move
        assert busy[source]
        assert not busy[target]
        busy[source], busy[target] = False, True
    places = [i for i, is_busy in enumerate(busy) if is_busy]
    assert len(places) == count
    assert not places or places == list(range(places[0], places[0] + count))
