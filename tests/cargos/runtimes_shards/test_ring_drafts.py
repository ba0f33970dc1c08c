"""Drafts round the ring: fewer traversals, the same tokens."""

from __future__ import annotations

import pytest

REPEAT = "Repeat this list exactly, three times: red, green, blue, yellow, orange, purple."


@pytest.mark.model
@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 0.7, "seed": 4, "repeat_penalty": 1.05, "top_logprobs": 2}]
)
async def test_drafts_change_nothing_but_how_often_the_ring_is_gone_round(ring, chat, fields):
    work = chat(REPEAT, max_tokens=40, **fields)
    async with ring(15) as plain:
        expected, end = await plain.ask(work)
        asked = len(plain.wanted)
    async with ring(15, drafts=True) as drafting:
        ids, finished = await drafting.ask(work, trip_ns=500_000_000)
        assert ids == expected
        assert finished.output_hash == end.output_hash
        assert finished.usage.completion_tokens == end.usage.completion_tokens
        assert any(len(wanted.tokens) > 1 for wanted in drafting.wanted[1:])
        # The account: every question, and every guess behind a token.
        usage, asked_for = finished.usage, drafting.wanted
        assert usage.traversals == len(asked_for)
        assert usage.drafts == sum(len(wanted.tokens) - 1 for wanted in asked_for[1:])
        made = len(ids) + (finished.finish == "stop")  # the token that ends it is none of its text
        assert usage.drafts_right == made - len(asked_for) > 0
        assert (end.usage.traversals, end.usage.drafts, end.usage.drafts_right) == (asked, 0, 0)
        if not fields:
            assert len(drafting.wanted) < 0.7 * asked
        # What is granted is never passed, whatever is drafted; a resumed job goes on the same.
        some, _ = await drafting.ask(work, until=9, trip_ns=500_000_000, name="some")
        rest, _ = await drafting.ask(work, resume=tuple(some), trip_ns=500_000_000, name="rest")
        assert some + rest == expected


@pytest.mark.model
async def test_a_small_model_may_draft(ring, chat, smollm2_path):
    """Played by the whole model, which is nearly always right."""
    work = chat("Write a story about the sea.", max_tokens=30, temperature=0.3, seed=2)
    async with ring(15) as plain:
        expected, _ = await plain.ask(work)
    async with ring(15, drafts=True, draft_path=str(smollm2_path)) as drafting:
        ids, _ = await drafting.ask(work, trip_ns=5_000_000_000)
        assert ids == expected
        assert len(drafting.wanted) < len(expected) / 2


@pytest.mark.model
async def test_a_paused_head_makes_no_token_past_its_grant(ring, chat):
    work = chat(REPEAT, max_tokens=30)
    async with ring(15, drafts=True) as chain:
        expected, _ = await chain.ask(work, trip_ns=500_000_000)
        got = []
        async with chain.head.submit(
            "paused", work, dtype="f32", granted=1, trip_ns=lambda: 500_000_000
        ) as session:
            for until in (1, 2, 9, len(expected)):
                session.grant(until)
                while len(got) < until:
                    event = await session.receive()
                    got += [token.id for token in getattr(event, "tokens", ())]
                assert len(got) == until
                assert session._tokens == []
        assert got == expected


@pytest.mark.model
@pytest.mark.parametrize("constraint", ["json_object"])
async def test_a_constraint_holds_with_drafts(ring, chat, constraint):
    from protocol.work import Constraint  # noqa: PLC0415

    work = chat("Give me three colours as JSON.", max_tokens=24, constraint=Constraint(constraint))
    async with ring(15) as plain:
        expected, _ = await plain.ask(work)
    async with ring(15, drafts=True) as drafting:
        assert (await drafting.ask(work, trip_ns=500_000_000))[0] == expected
