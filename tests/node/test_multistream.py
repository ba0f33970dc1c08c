from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.p2p.multistream import (
    HEADING,
    MAX_LINE_BYTES,
    MAX_PROPOSALS,
    NegotiationFailed,
    NotSupported,
    Proposer,
    Responder,
    line,
)


@given(st.binary(max_size=50), st.binary(max_size=50), st.integers(1, 7))
def test_two_sides_agree_however_the_bytes_come(before: bytes, after: bytes, step: int) -> None:
    proposer, responder = Proposer("/job/1"), Responder("/job/1".__eq__)
    answer = b""
    to_responder = proposer.opening + before
    for at in range(0, len(to_responder), step):
        answer += responder.feed_untrusted(to_responder[at : at + step])
    assert responder.agreed == "/job/1"
    assert responder.rest() == before
    to_proposer = answer + after
    for at in range(0, len(to_proposer), step):
        proposer.feed_untrusted(to_proposer[at : at + step])
    assert proposer.agreed
    assert proposer.rest() == after


def test_a_protocol_that_is_not_spoken() -> None:
    proposer, responder = Proposer("/new/1"), Responder("/old/1".__eq__)
    with pytest.raises(NotSupported):
        proposer.feed_untrusted(responder.feed_untrusted(proposer.opening))
    assert responder.feed_untrusted(line("/old/1")) == line("/old/1")  # a second proposal may succeed
    assert responder.agreed == "/old/1"


def test_proposals_are_counted() -> None:
    responder = Responder("/old/1".__eq__)
    responder.feed_untrusted(line(HEADING))
    with pytest.raises(NegotiationFailed):
        responder.feed_untrusted(line("/x") * MAX_PROPOSALS)


def test_long_names() -> None:
    name = "/" + "x" * 500
    responder = Responder(name.__eq__)
    responder.feed_untrusted(Proposer(name).opening)
    assert responder.agreed == name
    with pytest.raises(ValueError, match="too long"):
        line("x" * MAX_LINE_BYTES)


@given(st.lists(st.binary(max_size=40)))
def test_any_bytes_to_a_responder(chunks: list[bytes]) -> None:
    responder = Responder(lambda _: False)
    try:
        for chunk in chunks:
            responder.feed_untrusted(chunk)
    except NegotiationFailed:
        return
    assert len(responder.rest()) <= MAX_LINE_BYTES + 2


@given(st.lists(st.binary(max_size=40) | st.sampled_from([line(HEADING), line("na"), line("/job/1")])))
def test_any_bytes_to_a_proposer(chunks: list[bytes]) -> None:
    proposer = Proposer("/job/1")
    try:
        for chunk in chunks:
            proposer.feed_untrusted(chunk)
    except (NegotiationFailed, NotSupported):
        pass
